"""The folder deploy/, as far as it can be tried without a container engine, Kubernetes, Slurm and AWS."""

import contextlib
import fnmatch
import http.server
import importlib.metadata
import json
import os
import re
import runpy
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from equigram import __version__
from equigram.api.security import Readable, Tokens
from equigram.cli import app
from equigram.client import Client
from equigram.errors import SpecError
from equigram.spec import JobSpec
from equigram.store import GramStore

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
IMAGE = f"registry.example.com/equigram:{__version__}"
IMAGES = {IMAGE, f"{IMAGE}-cuda"}
SCRIPTS = Path(sys.executable).parent


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def document(name: str, kind: str | None = None) -> Any:
    (found,) = [one for one in documents(DEPLOY / name) if kind is None or one["kind"] == kind]
    return found


def job_files() -> list[Path]:
    return [
        path for path in [*DEPLOY.glob("*.yaml"), *(ROOT / "examples").glob("*.yaml")] if "train:" in path.read_text()
    ]


# What all of them share


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_yaml_file_holds_mappings_without_tabs(path: Path) -> None:
    assert all(isinstance(one, dict) and one for one in documents(path))
    assert "\t" not in path.read_text()


@pytest.mark.parametrize("path", job_files(), ids=lambda path: path.name)
def test_every_job_file_is_a_job(path: Path) -> None:
    assert JobSpec.load(path).data.train


def test_the_example_for_object_stores_is_in_a_bucket_and_uses_the_cluster_it_is_started_on() -> None:
    spec = JobSpec.load(DEPLOY / "job-s3.yaml")
    assert spec.store.startswith("s3://runs/")
    assert spec.resources.address == "auto"


def images(value: Any) -> Iterator[str]:
    """The values of all keys ``image`` and ``worker_image`` that are ours."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("image", "worker_image", "head_image") and "equigram" in inner:
                yield inner
            yield from images(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from images(inner)


def test_all_use_the_two_images_of_this_version() -> None:
    for path in sorted(DEPLOY.rglob("*.yaml")):
        used = set(images(documents(path)))
        assert used <= IMAGES
        assert used or path.name == "job-s3.yaml"
    assert set(re.findall(r"docker build -t (\S+)", (ROOT / "Dockerfile").read_text())) == IMAGES


def parsed(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The name of a command of equigram, and the values of its arguments and options."""
    command: Any = typer.main.get_command(app)
    name, _, rest = command.resolve_command(command.make_context("equigram", list(arguments)), list(arguments))
    return name, command.commands[name].make_context(name, list(rest)).params


JOB = document("kubernetes/rayjob.yaml", "RayJob")
CLUSTER = document("kubernetes/raycluster.yaml")["spec"]
SERVICE = DEPLOY / "kubernetes/service.yaml"


def options_of_ray(command: str) -> set[str]:
    from ray.scripts.scripts import cli

    return {option for parameter in cli.commands[command].params for option in parameter.opts}


def ray_commands() -> list[list[str]]:
    """Every ``ray start`` in the folder."""
    launcher = document("ray-cluster.yaml")
    found = [shlex.split(one) for kind in ("head", "worker") for one in launcher[f"{kind}_start_ray_commands"]]
    found += [one.get("entrypoint", []) for one in document("compose.yaml")["services"].values()]
    script = (DEPLOY / "slurm.sh").read_text().replace("\\\n", " ")
    found += [["ray", "start", *re.findall(r"--[a-z-]+", line)] for line in re.findall(r"ray start .*", script)]
    found += [["ray", "start", *re.findall(r"--[a-z-]+", line)] for line in re.findall(r"(?m)^ *start \"\$.*", script)]
    return [command for command in found if command[:2] == ["ray", "start"]]


def test_every_option_of_ray_start_exists_in_the_installed_ray() -> None:
    commands = ray_commands()
    assert len(commands) == 8
    known = options_of_ray("start")
    for command in commands:
        assert {option.partition("=")[0] for option in command[2:] if option.startswith("--")} <= known
    for group in [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]:
        assert {f"--{name}" for name in group["rayStartParams"]} <= known


def test_the_token_is_asked_for_everywhere() -> None:
    assert CLUSTER["authOptions"] == {"mode": "token"}
    assert "--env=RAY_AUTH_MODE=token" in document("ray-cluster.yaml")["docker"]["run_options"]
    assert example_environment()["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_MODE=token" in (DEPLOY / "slurm.sh").read_text()


# AWS


def test_ray_takes_the_file_of_the_cluster_launcher() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(document("ray-cluster.yaml"))
    validate_config(config)
    gpu = config["available_node_types"]["gpu"]
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, config["max_workers"])
    assert config["setup_commands"] == config["head_setup_commands"] == config["worker_setup_commands"] == []


def test_the_head_of_the_cluster_launcher_has_no_room_for_workers_and_its_machines_start_without_the_entry_point() -> (
    None
):
    config = document("ray-cluster.yaml")
    assert any("--head" in one and "--num-cpus=0" in one for one in config["head_start_ray_commands"])
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}
    assert any(one.startswith("--entrypoint=") for one in config["docker"]["run_options"])
    assert config["docker"]["worker_image"] == f"{IMAGE}-cuda"
    assert config["docker"]["worker_run_options"] == ["--gpus=all"]


# Kubernetes


def templates() -> dict[str, Any]:
    groups = {group["groupName"]: group["template"]["spec"] for group in CLUSTER["workerGroupSpecs"]}
    submitter = JOB["spec"]["submitterPodTemplate"]["spec"]
    api = document("kubernetes/service.yaml", "Deployment")["spec"]["template"]["spec"]
    return {"head": CLUSTER["headGroupSpec"]["template"]["spec"], "submitter": submitter, "api": api, **groups}


@pytest.mark.parametrize("path", sorted((DEPLOY / "kubernetes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_manifest_says_what_it_is(path: Path) -> None:
    versions = {"ConfigMap": "v1", "Service": "v1", "Deployment": "apps/v1", "NetworkPolicy": "networking.k8s.io/v1"}
    versions |= {"RayCluster": "ray.io/v1", "RayJob": "ray.io/v1"}
    for one in documents(path):
        assert one["apiVersion"] == versions[one["kind"]]
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", one["metadata"]["name"])


def test_the_job_of_kubernetes_brings_the_same_cluster_with_the_ray_of_the_lock_and_ends_it() -> None:
    assert JOB["spec"]["rayClusterSpec"] == CLUSTER
    assert CLUSTER["rayVersion"] == locked("requirements.txt")["ray"][None]
    assert JOB["spec"]["shutdownAfterJobFinishes"] is True
    assert JOB["spec"]["backoffLimit"] > 0


def test_the_entry_point_is_a_command_of_equigram_on_the_job_of_the_config_map() -> None:
    program, *arguments = shlex.split(JOB["spec"]["entrypoint"])
    assert program in {point.name for point in importlib.metadata.entry_points(group="console_scripts")}
    name, given = parsed(arguments)
    assert (name, str(given["job"]), given["address"]) == ("run", "/jobs/job.yaml", "auto")

    head = templates()["head"]
    (mounted,) = [one for one in head["containers"][0]["volumeMounts"] if one["mountPath"] == "/jobs"]
    (volume,) = [one for one in head["volumes"] if one["name"] == mounted["name"]]
    config_map = document("kubernetes/rayjob.yaml", "ConfigMap")
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    assert JobSpec.parse(yaml.safe_load(config_map["data"]["job.yaml"]), source="ConfigMap").store.startswith("s3://")


@pytest.mark.parametrize("name", ["head", "submitter", "api", "cpu", "gpu"])
def test_pods_are_not_root_and_say_what_they_need(name: str) -> None:
    spec = templates()[name]
    assert spec["securityContext"] == {
        "runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000,
        "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    (container,) = spec["containers"]
    read_only = {"readOnlyRootFilesystem": True} if name == "api" else {}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, **read_only,
    }  # fmt: skip
    asked, limits = container["resources"]["requests"], container["resources"]["limits"]
    assert set(asked) == set(limits) >= {"cpu", "memory"}
    assert ("nvidia.com/gpu" in limits) == (name == "gpu") == (container["image"] == f"{IMAGE}-cuda")
    if name != "submitter":
        assert container["envFrom"] == [{"secretRef": {"name": "equigram-s3"}}]


def test_no_tiles_are_computed_on_the_head_and_gpu_nodes_come_and_go() -> None:
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert CLUSTER["enableInTreeAutoscaling"] is True
    assert CLUSTER["autoscalerOptions"]["resources"].keys() == {"requests", "limits"}
    for group in CLUSTER["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert [group["minReplicas"] for group in CLUSTER["workerGroupSpecs"] if group["groupName"] == "gpu"] == [0]


def test_the_service_of_kubernetes_hands_its_drivers_to_the_cluster_and_asks_for_tokens() -> None:
    (container,) = templates()["api"]["containers"]
    name, given = parsed(container["args"])
    assert (name, given["host"], given["port"]) == ("serve", "0.0.0.0", container["ports"][0]["containerPort"])
    cluster = document("kubernetes/raycluster.yaml")["metadata"]["name"]
    ports = {one["name"]: one["containerPort"] for one in templates()["head"]["containers"][0]["ports"]}
    assert given["address"] == f"http://{cluster}-head-svc:{ports['dashboard']}"
    assert all(place.startswith("s3://") for place in Readable(given["read"]).places)

    environment = {one["name"]: one.get("value") or one["valueFrom"]["secretKeyRef"] for one in container["env"]}
    assert environment == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": {"name": cluster, "key": "auth_token"}}
    mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    volumes = {one.pop("name"): one for one in templates()["api"]["volumes"]}
    secret = volumes[mounts[str(given["tokens"].parent)]]["secret"]
    created = re.search(r"create secret generic (\S+) --from-literal=(\w+)=", SERVICE.read_text())
    assert created
    assert created.groups() == (secret["secretName"], given["tokens"].name)
    assert "emptyDir" in volumes[mounts["/tmp"]]


def test_there_is_one_service_per_root_which_is_watched_and_knows_no_kubernetes() -> None:
    deployment = document("kubernetes/service.yaml", "Deployment")["spec"]
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
    spec = deployment["template"]["spec"]
    assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"]) == (False, False)
    (container,) = spec["containers"]
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {name: one["path"] for name, one in probes.items()} == {
        "startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz",
    }  # fmt: skip
    for one in probes.values():
        assert one["port"] == container["ports"][0]["name"]
        assert one["httpHeaders"] == [{"name": "Host", "value": "localhost"}]

    service = document("kubernetes/service.yaml", "Service")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == service["selector"] == labels
    assert service["type"] == "ClusterIP"
    assert service["ports"][0]["targetPort"] == container["ports"][0]["name"]


def test_the_dashboard_is_for_the_service_and_all_other_ports_of_ray_for_the_cluster() -> None:
    policy = document("kubernetes/service.yaml", "NetworkPolicy")["spec"]
    nodes = {"matchLabels": {"ray.io/cluster": document("kubernetes/raycluster.yaml")["metadata"]["name"]}}
    labels = document("kubernetes/service.yaml", "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert (policy["podSelector"], policy["policyTypes"]) == (nodes, ["Ingress"])
    assert policy["ingress"] == [
        {"from": [{"podSelector": nodes}]},
        {"from": [{"podSelector": {"matchLabels": labels}}], "ports": [{"protocol": "TCP", "port": 8265}]},
    ]


# Compose


def example_environment() -> dict[str, str]:
    lines = (DEPLOY / "example.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_the_services_of_compose_wait_for_each_other_and_are_watched() -> None:
    compose = document("compose.yaml")
    services = compose["services"]
    conditions = {"service_healthy", "service_completed_successfully"}
    for name, service in services.items():
        for other, wanted in service.get("depends_on", {}).items():
            assert wanted["condition"] in conditions
            if wanted["condition"] == "service_healthy":
                assert services[other]["restart"] == "unless-stopped"
                assert services[other]["image"] in IMAGES or services[other]["healthcheck"]["test"][0] == "CMD"
        assert ("restart" in service) == (name != "bucket")
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert source in compose["volumes"] or (DEPLOY / source).exists() or source == "../data"
    assert services["worker"]["depends_on"] == {"head": {"condition": "service_healthy"}}
    assert services["api"]["depends_on"]["head"] == {"condition": "service_healthy"}
    assert services["head"]["depends_on"] == {"bucket": {"condition": "service_completed_successfully"}}
    assert services["bucket"]["depends_on"] == {"store": {"condition": "service_healthy"}}


def test_what_compose_takes_from_the_environment_is_in_the_example_with_placeholders_for_secrets() -> None:
    example = example_environment()
    text = (DEPLOY / "compose.yaml").read_text()
    taken = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "EQUIGRAM_TOKENS"}
    assert set(re.findall(r"\$\{(\w+):\?", text)) == set(re.findall(r"\$\{(\w+)", text)) == taken <= set(example)
    hidden = [value for name, value in example.items() if re.search("SECRET|TOKEN|PASSWORD", name)]
    assert len(hidden) == 3
    assert all("placeholder" in value for value in hidden)
    assert "deploy/.env" in (ROOT / ".gitignore").read_text().splitlines()
    assert {service.get("env_file", ".env") for service in document("compose.yaml")["services"].values()} == {".env"}
    store = document("compose.yaml")["services"]["store"]
    assert f"-s3.port={example['AWS_ENDPOINT_URL'].rpartition(':')[2]}" in store["command"]


def test_the_service_of_compose_is_for_this_machine_with_tokens_and_hands_its_drivers_to_the_head() -> None:
    services = document("compose.yaml")["services"]
    api, head = services["api"], services["head"]
    assert "entrypoint" not in api
    name, given = parsed(api["command"])
    assert (name, given["host"], given["port"]) == ("serve", "0.0.0.0", 8786)
    assert given["hostname"] == ["localhost"]
    assert f"--dashboard-port={given['address'].removeprefix('http://head:')}" in head["entrypoint"]
    assert given["root"].startswith("s3://runs")
    assert set(Readable(given["read"]).places) == {volume.split(":")[1] for volume in api["volumes"]}
    assert set(api["volumes"]) < set(head["volumes"])  # where the drivers read
    assert (api["read_only"], api["tmpfs"]) == (True, ["/tmp"])


def test_nothing_of_compose_is_published_but_the_service_on_loopback_and_all_give_up_privileges() -> None:
    services = document("compose.yaml")["services"]
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {"api": ["127.0.0.1:8786:8786"]}
    assert not any({"network_mode", "privileged", "cap_add"} & service.keys() for service in services.values())
    for name, service in services.items():
        if name != "store":
            assert (service["cap_drop"], service["security_opt"]) == (["ALL"], ["no-new-privileges:true"])


def test_only_the_service_of_compose_knows_its_tokens_and_it_refuses_the_placeholder() -> None:
    services = document("compose.yaml")["services"]
    known = {name: service["environment"]["EQUIGRAM_TOKENS"] for name, service in services.items() if name != "store"}
    assert known.pop("api").startswith("${EQUIGRAM_TOKENS:?")
    assert set(known.values()) == {""}
    with pytest.raises(SpecError, match="the token of me has 11 characters, and 16 are needed"):
        Tokens(example_environment()["EQUIGRAM_TOKENS"], "deploy/.env")


# The image


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", " ")
    pairs = (line.split(None, 1) for line in text.splitlines() if line.strip())
    return [(name, rest) for name, rest in pairs]


def test_the_image_installs_the_lock_by_hash_then_is_not_root_and_watches_itself() -> None:
    lines = instructions()
    names = [name for name, _ in lines]
    assert names[0] == "FROM"
    assert set(names) <= {"FROM", "ARG", "RUN", "COPY", "ENV", "USER", "WORKDIR", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    installs = [place for place, (name, rest) in enumerate(lines) if name == "RUN" and " install " in f" {rest} "]
    (user,) = [place for place, name in enumerate(names) if name == "USER"]
    assert lines[user][1] == "1000"
    assert user > max(installs)
    (locked_install,) = [lines[place][1] for place in installs if "$lock" in lines[place][1]]
    assert "--require-hashes --no-deps" in locked_install
    assert all("--no-deps" in lines[place][1] for place in installs if "pip install" in lines[place][1])
    (check,) = [rest for name, rest in lines if name == "HEALTHCHECK"]
    assert json.loads(check.partition("CMD")[2])[-1] == "/opt/equigram/healthcheck.py"
    assert json.loads(dict(lines)["ENTRYPOINT"]) == ["equigram"]


@pytest.mark.parametrize(
    ("variant", "lock"), [("cpu", "requirements.txt"), ("cuda", "requirements-cuda.txt"), ("rocm", None)]
)
def test_the_variant_chooses_the_lock(variant: str, lock: str | None, tmp_path: Path) -> None:
    (choice,) = [rest for name, rest in instructions() if name == "RUN" and "$VARIANT" in rest]
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\necho "$*"\n')
    pip.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VARIANT": variant}
    done = subprocess.run(["sh", "-c", choice], env=environment, capture_output=True, text=True, timeout=30)
    if lock is None:
        assert (done.returncode, done.stdout) == (1, "")
        assert "VARIANT is cpu or cuda, not rocm" in done.stderr
    else:
        assert done.returncode == 0
        assert done.stdout.split()[-2:] == ["-r", lock]


def enters(path: str) -> bool:
    """Whether a file is part of the context of a build: the last pattern of .dockerignore that fits it decides."""
    answer = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        parents = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
        anywhere = pattern.removeprefix("**/")
        if any(
            fnmatch.fnmatchcase(Path(one).name if anywhere != pattern else one, anywhere)
            and (anywhere != pattern or one.count("/") == pattern.count("/"))
            for one in parents
        ):
            answer = line.startswith("!")
    return answer


def test_what_is_copied_enters_the_build_and_nothing_private_or_large_does() -> None:
    wanted = {source for name, rest in instructions() if name == "COPY" for source in rest.split()[:-1]}
    assert all((ROOT / source).exists() for source in wanted)
    seen = [path for top in ROOT.iterdir() if top.name not in (".git", ".venv") for path in [top, *top.rglob("*")]]
    files = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in seen if path.is_file()}
    context = {path: size for path, size in files.items() if enters(path)}
    assert {"service/equigram/cli.py", "workers/equikernel/kernel.py", "deploy/healthcheck.py"} <= set(context)
    for source in wanted:
        assert any(path == source or path.startswith(f"{source}/") for path in context)
    for path in context:
        assert any(path == source or path.startswith(f"{source}/") for source in wanted)
    assert sum(context.values()) < 4 * 2**20
    private = [".git/config", ".env", "deploy/.env", "service/.env", "runs/mine/zarr.json", ".venv/bin/python"]
    assert not any(
        enters(path) for path in [*private, "service/equigram/__pycache__/cli.cpython-312.pyc", "data/a.png"]
    )


def locked(name: str) -> dict[str, dict[str | None, str]]:
    """The versions of a lock by package and marker."""
    found: dict[str, dict[str | None, str]] = {}
    for line in (ROOT / name).read_text().splitlines():
        if "==" in line and not line.startswith((" ", "#")):
            requirement = Requirement(line.rstrip(" \\"))
            (version,) = requirement.specifier
            marker = str(requirement.marker) if requirement.marker else None
            found.setdefault(requirement.name, {})[marker] = version.version
    return found


def test_the_two_images_hold_the_same_versions_and_the_plug_ins_of_their_jax() -> None:
    cpu, cuda = locked("requirements.txt"), locked("requirements-cuda.txt")
    assert {name: cuda[name] for name in cpu} == cpu
    assert cpu["jax"] == cpu["jaxlib"] == cuda["jax-cuda13-plugin"] == cuda["jax-cuda13-pjrt"]
    assert {re.split("-", name)[0] for name in set(cuda) - set(cpu)} == {"cuda", "jax", "numba", "nvidia"}


def test_the_images_hold_what_ray_needs_on_clusters() -> None:
    """The agent that probes ask, jobs, and the autoscaler on AWS are extras of Ray."""
    cpu = locked("requirements.txt")
    needed = [Requirement(text) for text in importlib.metadata.requires("ray") or []]
    for one in needed:
        if one.marker and one.marker.evaluate({"extra": "default", "python_version": "3.12"}):
            name = one.name.replace("_", "-")
            assert all(Version(version) in one.specifier for version in cpu[name].values())
    assert "boto3" in cpu


class Agent(http.server.BaseHTTPRequestHandler):
    """The agent of a Ray node, sound or not; or a service."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path in ("/api/healthz", "/healthz") else 404)
        self.end_headers()
        self.wfile.write(b"raylet: success\ngcs: gone")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def agent(request: pytest.FixtureRequest) -> Iterator[int]:
    """The port of an agent that answers with the status of the parameter."""
    handler = type("Handler", (Agent,), {"status": request.param})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


NODE = "/usr/local/bin/python3.12\0/usr/local/bin/ray\0start\0--head\0--block\0"
INIT = "/sbin/docker-init\0--\0ray\0start\0--address=head:6379\0--block\0"
SHELL = "/bin/bash\0-c\0ulimit -n 65536; ray start --block\0"
SERVICES = {
    "plain": "/usr/local/bin/python3.12\0/usr/local/bin/equigram\0serve\0s3://runs\0--port\0PORT\0--read\0/data\0",
    "init": "/sbin/docker-init\0--\0equigram\0serve\0s3://runs\0--host=0.0.0.0\0--port=PORT\0",
    "shell": "/bin/sh\0-c\0exec equigram serve /runs --port PORT\0",
}


@pytest.fixture
def trouble(tmp_path: Path) -> Callable[..., str | None]:
    """What the health check says of a container whose first process has a command line."""
    check = runpy.run_path(str(DEPLOY / "healthcheck.py"))["trouble"]

    def look(command_line: str, port: int | None) -> Any:
        (tmp_path / "cmdline").write_text(command_line)
        return check(tmp_path / "cmdline", port)

    return look


@pytest.mark.parametrize("agent", [200, 503], indirect=True)
@pytest.mark.parametrize("command_line", [NODE, INIT, SHELL], ids=["plain", "init", "shell"])
def test_a_ray_node_is_healthy_if_its_agent_says_so(
    trouble: Callable[..., str | None], agent: int, command_line: str, request: pytest.FixtureRequest
) -> None:
    wrong = request.node.callspec.params["agent"] != 200
    assert trouble(command_line, agent) == ("the Ray node is not well: raylet: success, gcs: gone" if wrong else None)


def test_a_ray_node_that_does_not_answer_is_unhealthy_but_a_command_is_not_asked(
    trouble: Callable[..., str | None],
) -> None:
    (port,) = free_ports(1)
    assert str(trouble(NODE, port)).startswith("the Ray node does not answer: ")
    for job in ("/jobs/array start.yaml", "/jobs/equigram/serve.yaml"):
        assert trouble(f"/usr/local/bin/python3.12\0/usr/local/bin/equigram\0run\0{job}\0", port) is None


@pytest.mark.parametrize("agent", [200, 503], indirect=True)
@pytest.mark.parametrize("command_line", SERVICES.values(), ids=SERVICES)
def test_a_service_is_healthy_if_it_says_so_where_it_listens(
    trouble: Callable[..., str | None], agent: int, command_line: str, request: pytest.FixtureRequest
) -> None:
    wrong = request.node.callspec.params["agent"] != 200
    said = trouble(command_line.replace("PORT", str(agent)), None)
    assert said == ("the service is not well: raylet: success, gcs: gone" if wrong else None)


def test_a_service_that_does_not_answer_is_unhealthy_and_listens_where_the_command_line_has_it_by_default(
    trouble: Callable[..., str | None],
) -> None:
    (port,) = free_ports(1)
    assert str(trouble(SERVICES["init"].replace("PORT", str(port)), None)).startswith("the service does not answer: ")
    constants = runpy.run_path(str(DEPLOY / "healthcheck.py"))
    assert constants["SERVICE_PORT"] == parsed(["serve", "s3://runs"])[1]["port"]


# For real


@contextlib.contextmanager
def processes_end(folder: str) -> Iterator[Callable[[], list[int]]]:
    """Tells the processes whose command lines hold ``folder``; kills them, and removes it."""

    def running() -> list[int]:
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                if folder in (place / "cmdline").read_text(errors="replace"):
                    found.append(int(place.name))
        return found

    try:
        yield running
    finally:
        for process in running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports from 20000 to 29999, where no connection begins."""
    found: list[int] = []
    for port in range(20_000 + os.getpid() % 9_000, 30_000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("not enough ports are free")


def wait_for(port: int) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    raise AssertionError(f"nothing listens at port {port}")


def until(happens: Callable[[], bool]) -> None:
    end = time.monotonic() + 90
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.2)


def write_job(folder: Path, **fields: Any) -> Path:
    """A job of some seconds: plain CNNs of small random images, by the reference engine, in tiles of 4."""
    rng = np.random.default_rng(0)
    pictures: dict[str, Any] = {
        name: rng.integers(0, 256, (count, 6, 6), dtype=np.uint8) for name, count in SPLITS.items()
    }
    labels: dict[str, Any] = {name.replace("x", "y"): np.arange(len(one)) % 3 for name, one in pictures.items()}
    np.savez(folder / "images.npz", **pictures, **labels)
    job = {
        "store": "run",
        "data": {"train": str(folder / "images.npz")},
        "network": {"depth": 2},
        "gram": {"groups": ["C1"], "tile": 4, "engine": "reference"},
        "resources": {"workers": "auto"},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump({**job, **fields}))
    return folder / "job.yaml"


SPLITS = {"x_train": 20, "x_test": 4}


def assert_complete(url: str) -> None:
    store = GramStore.open(url)
    assert len(store.finished_tiles()) == len(store.info.tiling) == 20
    assert np.isfinite(store.matrix("gram", "C1", "ntk")).all()


def done_by(command: list[str], environment: dict[str, str], end: Callable[[str], bool]) -> str:
    """What a command says, tried again until that is the end."""
    for _ in range(40):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        if end(done.stdout + done.stderr):
            return done.stdout + done.stderr
        time.sleep(0.5)
    raise AssertionError(done.stdout + done.stderr)


FOUND = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")


@pytest.fixture(scope="module")
def nodes(object_storage: str) -> Iterator[dict[str, str]]:
    """The services of compose, as processes of this machine: the environment of drivers, which finds them."""
    services = document("compose.yaml")["services"]
    port, dashboard, client, *agents = free_ports(5)
    address = f"127.0.0.1:{port}"
    given = {name: value for name, value in example_environment().items() if not name.startswith("AWS_")}
    given |= {"RAY_AUTH_TOKEN": secrets.token_hex(32), "EQUIGRAM_TOKENS": ""}
    environment = {**os.environ, "PATH": f"{SCRIPTS}:{os.environ['PATH']}", **given}
    subprocess.run(services["bucket"]["entrypoint"], env=environment, check=True, timeout=60)
    folder = tempfile.mkdtemp(prefix="equigram-", dir="/tmp")
    head = [*services["head"]["entrypoint"], "--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={folder}"]
    head += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    worker = [one.replace("head:6379", address) for one in services["worker"]["entrypoint"]] + ["--num-cpus=1"]
    for command, agent in zip((head, worker), agents, strict=True):
        command.append(f"--dashboard-agent-listen-port={agent}")
    with processes_end(folder), contextlib.ExitStack() as stack:
        for command in (head, worker):
            node = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(node.wait)
            stack.callback(node.terminate)
            wait_for(port)
        found = {"RAY_ADDRESS": address, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        done_by(["ray", "status"], environment | found, lambda said: "/1.0 CPU" in said)
        yield environment | found


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_the_entry_points_of_compose_compute_a_job_in_the_bucket(nodes: dict[str, str], tmp_path: Path) -> None:
    given = yaml.safe_load((DEPLOY / "job-s3.yaml").read_text())
    job = write_job(tmp_path, store=given["store"], resources=given["resources"], solve=given["solve"])
    program, name, _, *options = shlex.split(JOB["spec"]["entrypoint"])
    done = subprocess.run([program, name, str(job), *options], env=nodes, capture_output=True, text=True, timeout=180)
    assert "20 training and 4 test images, 20 tiles, all done" in done.stdout, done.stderr
    assert_complete(given["store"])


@pytest.fixture
def service(nodes: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """The service of compose, as a process of this machine: the environment of those who may use it."""
    (port,) = free_ports(1)
    token = secrets.token_hex(32)
    mapped = {"8786": str(port), "http://head:8265": nodes["RAY_API_SERVER_ADDRESS"], "/data": str(tmp_path)}
    command = document("compose.yaml")["services"]["api"]["command"]
    for place, here in mapped.items():
        command = [one.replace(place, here) for one in command]
    entry = json.loads(dict(instructions())["ENTRYPOINT"])
    with (tmp_path / "service.log").open("w") as log:
        # Ray's variables would count for more than the address that is given.
        environment = {name: value for name, value in nodes.items() if name not in FOUND}
        environment["EQUIGRAM_TOKENS"] = f"me write {token}"
        process = subprocess.Popen([*entry, *command], env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://localhost:{port}"
            wait_for(port)
            ready = [sys.executable, "-c", f"import urllib.request; urllib.request.urlopen('{url}/readyz')"]
            done_by(ready, nodes, lambda said: not said)
            check = runpy.run_path(str(DEPLOY / "healthcheck.py"))["trouble"]
            assert check(Path(f"/proc/{process.pid}/cmdline")) is None
            yield {**nodes, "EQUIGRAM_SERVER": url, "EQUIGRAM_TOKEN": token}
        finally:
            process.terminate()
            process.wait(timeout=60)


@pytest.mark.soak
@pytest.mark.timeout(500)
def test_the_service_of_compose_computes_what_is_submitted_and_ends_what_is_cancelled(
    service: dict[str, str], tmp_path: Path
) -> None:
    def say(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = ["equigram", *map(str, arguments)]
        return subprocess.run(command, env=service, capture_output=True, text=True, timeout=240)

    for headers in ({}, {"Authorization": f"Bearer {secrets.token_hex(32)}"}):
        dashboard = urllib.request.Request(f"{service['RAY_API_SERVER_ADDRESS']}/api/jobs/", headers=headers)
        with pytest.raises(urllib.error.HTTPError, match=r"40[13]") as caught:
            urllib.request.urlopen(dashboard, timeout=60)
        caught.value.close()

    job = write_job(tmp_path, store="served")
    stranger = {**service, "EQUIGRAM_TOKEN": secrets.token_hex(32)}
    refused = subprocess.run(["equigram", "submit", job], env=stranger, capture_output=True, text=True, timeout=60)
    assert (refused.returncode, "does not know this token" in refused.stderr) == (4, True)

    done = say("submit", job, "--wait")
    assert (done.returncode, done.stdout.split()[0]) == (0, "served"), done.stderr
    assert_complete("s3://runs/served")
    assert say("logs", "served").returncode == 0

    with Client(service["EQUIGRAM_SERVER"], service["EQUIGRAM_TOKEN"]) as client:
        assert sorted(node.cpus for node in client.service().nodes if node.alive) == [0, 1]
        assert client.job("served").refresh().state == "done"
        long = client.submit(write_job(tmp_path, store="cancelled", network={"depth": 40}))
        until(lambda: (counts := long.refresh().summary.counts) is not None and counts.finished > 0)
        assert long.cancel().refresh().state in ("running", "cancelled")
        until(lambda: long.refresh().state == "cancelled")
    assert len(GramStore.open("s3://runs/cancelled").finished_tiles()) < 20


def test_the_script_for_slurm_is_bash_and_asks_for_what_it_relies_on() -> None:
    subprocess.run(["bash", "-n", DEPLOY / "slurm.sh"], check=True, timeout=30)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", DEPLOY / "slurm.sh"], check=True, timeout=60)
    asked = re.findall(r"(?m)^#SBATCH (\S+)", (DEPLOY / "slurm.sh").read_text())
    assert {"--signal=B:TERM@120", "--requeue", "--no-kill", "--ntasks-per-node=1"} <= set(asked)


SRUN = """#!/bin/sh
node=
while case "$1" in --*) ;; *) false ;; esac; do
  case "$1" in --nodelist=*) node=${1#--nodelist=} ;; esac
  shift
done
echo "srun $node $*" >> "$CALLS"
exec "$@"
"""

SCONTROL = """#!/bin/sh
echo "scontrol $*" >> "$CALLS"
case "$1 $2" in
  "show hostnames") printf 'one\\ntwo\\n' ;;
  "show job") echo "JobId=$3 JobState=RUNNING" ;;
esac
"""


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_the_script_for_slurm_queues_a_job_again_that_runs_out_of_time_and_then_finishes_it(tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    number = free_ports(1)[0] - 20_000
    calls = tmp_path / "calls"
    environment = {
        **os.environ,
        "PATH": f"{commands}:{SCRIPTS}:{os.environ['PATH']}",
        "CALLS": str(calls), "HEAD_IP": "127.0.0.1", "NODE_SECONDS": "90",
        "SLURM_JOB_ID": str(number), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "1",
    }  # fmt: skip
    script = ["bash", str(DEPLOY / "slurm.sh"), str(write_job(tmp_path, network={"depth": 12}, solve=None))]
    with processes_end(f"/tmp/ray-{number}") as running:
        job = subprocess.Popen(
            script, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            while not (GramStore.exists(str(tmp_path / "run")) and len(tiles := finished(tmp_path / "run"))):
                assert job.poll() is None, job.communicate()[0]
                time.sleep(0.2)
            job.send_signal(signal.SIGTERM)
            said, _ = job.communicate(timeout=120)
        finally:
            job.kill()
        assert job.returncode == 143, said
        assert "2 of 2 nodes are there" in said
        assert "terminated; finished tiles are kept" in said
        assert len(tiles) < 20
        assert running() == []
        told = calls.read_text().splitlines()
        assert told[-1] == f"scontrol requeue {number}"
        assert [re.sub("--.*", "", line).strip() for line in told if "ray start" in line] == [
            "srun one ray start", "srun two ray start",
        ]  # fmt: skip

        calls.unlink()
        again = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert again.returncode == 0, again.stderr
        assert running() == []
        assert "requeue" not in calls.read_text()
        assert not Path(f"/tmp/ray-{number}").exists()
    assert_complete(str(tmp_path / "run"))


def finished(store: Path) -> list[Any]:
    return list(GramStore.open(str(store)).finished_tiles())
