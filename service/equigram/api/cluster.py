"""Ray as the service needs it: drivers are submitted as Ray jobs, to a cluster that outlives the service."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import psutil

from equigram.api.models import NodeView
from equigram.errors import ClusterError, JobNotFoundError

START_SECONDS = 120
"""How long a local cluster may take to start."""

ANSWER_SECONDS = 10.0
"""How long Ray's dashboard may take over a question whether it is there."""

STOP_SECONDS = 10.0
"""How long killed processes are waited for."""

LOOK_SECONDS = 10.0
"""Time between two questions to a local cluster whether it is still there."""

PARTS = ("gcs_server", "raylet", "dashboard.py")
"""The processes without which a cluster is of no use."""

OBJECT_STORE = 256 * 2**20
"""Bytes of shared memory of a local cluster, for blocks of images."""

Status: TypeAlias = Literal["pending", "running", "ended"]
"""Of a driver, as Ray sees it."""

_STATUS: dict[str, Status] = {"PENDING": "pending", "RUNNING": "running"}


class Cluster:
    """A Ray cluster that takes jobs.

    Args:
      dashboard: where it does, ``http://host:8265``.
      python: the interpreter of the drivers there.

    Raises (from every method):
      ClusterError: it does not answer.
    """

    def __init__(self, dashboard: str, python: str) -> None:
        self.dashboard = dashboard
        self._python = python
        self._known: Any = None

    @property
    def _client(self) -> Any:
        if self._known is None:
            from ray.job_submission import JobSubmissionClient

            with _explained(self.dashboard):
                self._known = JobSubmissionClient(self.dashboard)
        return self._known

    def submit(self, name: str, arguments: Sequence[str]) -> None:
        """Start the driver of an attempt at a job; one of that name that was started before stays as it is."""
        entry = shlex.join([self._python, "-m", "equigram.api.drive", *arguments])
        with _explained(self.dashboard):
            try:
                self._client.submit_job(entrypoint=entry, submission_id=name, metadata={"program": "equigram"})
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise

    def statuses(self) -> dict[str, Status]:
        """Of all drivers that Ray knows, by name."""
        with _explained(self.dashboard):
            jobs = self._client.list_jobs()
        return {
            str(job.submission_id): _STATUS.get(job.status.value, "ended")
            for job in jobs
            if job.submission_id is not None
        }

    def stop(self, name: str) -> None:
        """Have a driver end, if there is one of that name: it is terminated, and killed after some seconds."""
        with _explained(self.dashboard):
            try:
                self._client.stop_job(name)
            except RuntimeError as error:
                if "does not exist" not in str(error) and "404" not in str(error):
                    raise

    def log(self, name: str) -> str:
        """What a driver has printed.

        Raises:
          JobNotFoundError: Ray does not know it: it was not started yet, or its cluster is gone.
        """
        with _explained(self.dashboard):
            try:
                text: str = self._client.get_job_logs(name)
            except RuntimeError as error:
                if "does not exist" in str(error) or "404" in str(error):
                    raise JobNotFoundError(
                        f"Ray has no log of {name}: it did not start, or its cluster is gone"
                    ) from None
                raise
        return text

    def nodes(self) -> list[NodeView]:
        """The machines."""
        from ray.util.state import list_nodes

        with _explained(self.dashboard):
            found = list_nodes(
                address=self.dashboard, limit=1000, timeout=int(ANSWER_SECONDS), raise_on_missing_output=False
            )
        return [
            NodeView(
                name=str(node.node_name or node.node_ip),
                alive=node.state == "ALIVE",
                cpus=float((node.resources_total or {}).get("CPU", 0)),
                gpus=float((node.resources_total or {}).get("GPU", 0)),
                memory=int((node.resources_total or {}).get("memory", 0)),
            )
            for node in found
        ]

    def answers(self) -> bool:
        """Whether it does."""
        return _answers(self.dashboard)


@contextlib.contextmanager
def _explained(dashboard: str) -> Iterator[None]:
    """Turn what Ray raises into one sentence."""
    try:
        yield
    except (ClusterError, JobNotFoundError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ClusterError(f"the Ray cluster at {dashboard} does not answer as it should: {reason}") from error


def _answers(dashboard: str) -> bool:
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not token and path:
        with contextlib.suppress(OSError):
            token = Path(path).read_text(encoding="ascii").strip()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{dashboard}/api/version", headers=headers), timeout=ANSWER_SECONDS
        ) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


class LocalCluster:
    """A Ray cluster of this machine, for one root: detached from the service, on loopback only, with a token.

    Args:
      root: URL of the folder of the service; each has a cluster of its own.
      cpus: of the cluster; ``None`` means those that this process may use.
    """

    def __init__(self, root: str, cpus: int | None = None) -> None:
        name = hashlib.sha256(root.encode()).hexdigest()[:12]
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
        self._folder = state / "equigram" / name
        # Paths of sockets must be short.
        self._ray = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / f"equigram-{os.getuid()}-{name}"
        self._cpus = cpus
        self._token = self._folder / "token"
        self._cluster: Cluster | None = None
        self._looked = 0.0

    def __call__(self) -> Cluster:
        """The cluster, started if it is not there, or not any more.

        Raises:
          ClusterError: it does not start.
        """
        clock = time.monotonic()
        look = clock - self._looked > LOOK_SECONDS
        if self._cluster is None or (look and not (self._is_whole() and self._cluster.answers())):
            self._cluster = None
            self._cluster = self._open()
        if look:
            self._looked = clock
        return self._cluster

    def _open(self) -> Cluster:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self._token.exists():
                beside = self._token.with_suffix(".new")
                beside.touch(mode=0o600)
                beside.write_text(secrets.token_hex(32), encoding="ascii")
                beside.replace(self._token)
            os.environ.update(self._settings())  # for Ray's client in this process
            dashboard = self._dashboard()
            if dashboard is None or not self._is_whole():
                self.stop()
                dashboard = self._start()
            elif not _answers(dashboard):  # ended, it would take the drivers with it: it is waited for
                raise ClusterError(f"the Ray cluster of this machine, at {dashboard}, is slow to answer")
        return Cluster(dashboard, sys.executable)

    def stop(self) -> None:
        """End all processes of the cluster, and with them the drivers and workers; what is stored stays."""
        processes = self._processes()
        for process in list(processes):  # some of Ray's have another title, and then no environment
            with contextlib.suppress(psutil.NoSuchProcess):
                processes += process.children(recursive=True)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=STOP_SECONDS)
        shutil.rmtree(self._ray, ignore_errors=True)
        self._file.unlink(missing_ok=True)

    @property
    def _file(self) -> Path:
        return self._folder / "cluster.json"

    def _dashboard(self) -> str | None:
        try:
            return str(json.loads(self._file.read_text(encoding="utf-8"))["dashboard"])
        except (OSError, ValueError, KeyError):
            return None

    def _environment(self) -> dict[str, str]:
        """Of the cluster, and so of drivers and workers: without the tokens of the service."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("EQUIGRAM_TOKEN")}
        return kept | self._settings()

    def _settings(self) -> dict[str, str]:
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray then listens on loopback only, also on Linux
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }

    def _is_whole(self) -> bool:
        """Whether all processes are there without which Ray does nothing."""
        names = set()
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                names.add(next((part for part in PARTS if part in " ".join(process.cmdline()[:4])), ""))
        return set(PARTS) <= names

    def _start(self) -> str:
        from equikernel.kernel import available_cores

        self._ray.mkdir(mode=0o700, exist_ok=True)
        if self._ray.stat().st_uid != os.getuid() or self._ray.is_symlink():
            raise ClusterError(f"{self._ray} belongs to somebody else; set RAY_TMPDIR to a folder of your own")
        dashboard, agent, client = _free_ports(3)
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--port=0",
            "--dashboard-host=127.0.0.1",
        ]
        command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
        command += [f"--ray-client-server-port={client}", "--include-dashboard=true", "--include-log-monitor=false"]
        command += [f"--object-store-memory={OBJECT_STORE}", f"--num-cpus={self._cpus or available_cores()}"]
        command += ["--disable-usage-stats", f"--temp-dir={self._ray}"]
        log = self._folder / "ray-start.log"
        with log.open("w") as file:
            try:
                done = subprocess.run(
                    command, env=self._environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                    timeout=START_SECONDS, check=False, start_new_session=True, cwd="/",
                )  # fmt: skip
                code: int | None = done.returncode
            except subprocess.TimeoutExpired:
                code = None
        url = f"http://127.0.0.1:{dashboard}"
        deadline = time.monotonic() + START_SECONDS
        while code == 0 and not _answers(url) and time.monotonic() < deadline:
            time.sleep(0.2)
        if code != 0 or not _answers(url):
            raise ClusterError(f"a local Ray cluster does not start; {log} says why")
        self._file.write_text(json.dumps({"dashboard": url}), encoding="utf-8")
        return url

    def _processes(self) -> list[psutil.Process]:
        """All processes with the token of the cluster in their environment, but for this one."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # it has ended, or is somebody else's
                mine = process.environ().get("RAY_AUTH_TOKEN_PATH") == str(self._token)
                if mine and process.pid != os.getpid():
                    found.append(process)
        return found


def _free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens at just now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
