"""The pages: commands and programs in them are run here, or say in the source why not; and all links lead somewhere.

In front of a block of code an HTML comment, which readers do not see, may say

    <!-- not run: REASON -->    why the commands of the block are not run here
    <!-- file: NAME -->         the reader saves the block under this name
    <!-- given: NAMES -->       the Python program goes on with what the reader has
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image

from equigram import Client
from equigram.api.cluster import LocalCluster

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", ROOT / "deploy/README.md", *(ROOT / "docs").rglob("*.md")]
    if "_build" not in path.parts
)

PROGRAMS = {
    "apt-get", "aws", "bash", "cd", "cp", "curl", "docker", "equigram", "export", "git", "kubectl", "ls", "make",
    "mkdir", "mv", "pip", "python", "ray", "rm", "sbatch", "sed", "sh", "source", "sudo", "timeout", "unzip", "until",
    "wget", ".",
}  # fmt: skip
"""First words by which an indented block is known to hold commands."""

FEW = {"kernels: [nngp, ntk]": "kernels: [ntk]", "kernels: [ntk]}": "kernels: [ntk], tile: 36}"}
"""Matrices and tiles that pages have beyond need."""

Command = Callable[..., subprocess.CompletedProcess[str]]

PATIENCE = 120.0
"""Seconds after which a service that does not do what it should has failed."""


SIXTEEN = ("size: 16", "size: 8")
SMALL = dict([SIXTEEN, ("size: 32", "size: 16"), ("size=(10, 32, 32, 3)", "size=(10, 16, 16, 3)")])
"""Sizes of images, and what tests put in their place to be done sooner."""


class Block(NamedTuple):
    """A block of code of a page, and the comment in front of it."""

    page: str
    line: int
    language: str
    text: str
    mark: str
    value: str


def language_of(text: str) -> str:
    """What an indented block holds."""
    words = [line.split()[0] for line in text.splitlines() if line.strip()]
    if PROGRAMS.intersection(words):
        return "sh"
    if words[0] in (">>>", "store:"):
        return "yaml" if words[0] == "store:" else "session"
    try:
        ast.parse(text)
    except SyntaxError:
        return "formula"
    return "python"


def blocks(page: str) -> list[Block]:
    """The blocks of code of a page, in order."""
    found, comment = [], ""
    for token in MarkdownIt().enable("table").parse((ROOT / page).read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            language = token.info.strip() if token.type == "fence" else language_of(token.content)
            mark = re.fullmatch(r"<!-- (not run|file|given): (.+) -->", comment)
            kind, value = mark.groups() if mark else ("", "")
            line = token.map[0] + 1 if token.map else 0
            found.append(Block(page, line, language, token.content, kind, value))
        comment = token.content.strip() if token.type == "html_block" else ""
    return found


ALL = [block for page in PAGES for block in blocks(page)]


def commands(script: str) -> list[str]:
    """The commands of a script: a line each, or all of it if it has loops."""
    if re.search(r"(?m)^(until|while|for|if)\b", script):
        return [script]
    return [line for line in script.replace("\\\n", " ").splitlines() if line.split("#")[0].strip()]


def replace(text: str, replaced: dict[str, str]) -> str:
    """A text with others in the place of some."""
    for given, other in replaced.items():
        text = text.replace(given, other)
    return text


class Reader:
    """Somebody who does what a page says, in a folder.

    Args:
      equigram: runs the command line; ``None`` starts a process as a shell would.
      replaced: texts of commands and files, and what stands for them here.
    """

    def __init__(self, folder: Path, equigram: Command | None = None, replaced: dict[str, str] | None = None) -> None:
        self.folder, self.equigram, self.replaced = folder, equigram, replaced or {}
        self.environment = {"PATH": f"{SCRIPTS}:{os.environ['PATH']}", "COLUMNS": "100"}
        self.names: dict[str, Any] = {}
        self.said: dict[str, str] = {}

    def read(self, page: str) -> None:
        """Do all of a page."""
        for block in blocks(page):
            where, text = f"{page}, line {block.line}", replace(block.text, self.replaced)
            if block.mark == "not run":
                continue
            if block.mark == "file":
                (self.folder / block.value).write_text(text, encoding="utf-8")
            elif block.language == "sh":
                for command in commands(text):
                    self.run(command, where)
            elif block.language == "python":
                needed = re.findall(r"\w+", block.value) if block.mark == "given" else []
                assert set(needed) <= set(self.names), f"{where}: the test does not give {needed}"
                exec(compile(text, where, "exec"), self.names)

    def run(self, command: str, where: str) -> None:
        """Give a command, which must end with exit code 0."""
        words = shlex.split(command, comments=True)
        if words[0] == "export":
            self.environment |= dict(word.split("=", 1) for word in words[1:])
            return
        if words[0] == "equigram" and self.equigram and not re.search(r"[|&<>;]", command.split("#")[0]):
            done = self.equigram(self.folder, *words[1:], environment=self.environment)
        else:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command], cwd=self.folder, env=os.environ | self.environment,
                capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
        assert done.returncode == 0, f"{where}: {command}\n{done.stdout}\n{done.stderr}"
        self.said[command] = done.stdout


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of the checkout that commands name, where Python programs run as well."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images and the job of the tutorial, with fewer and smaller ones."""
    place = tmp_path_factory.mktemp("tutorial")
    runpy.run_path(str(ROOT / "examples/tissue.py"))["main"](place / "data", train=4, test=1)
    (text,) = [block.text for block in ALL if block.page == "docs/tutorial.md" and block.mark == "file"]
    (place / "job.yaml").write_text(replace(text, dict([SIXTEEN]) | FEW), encoding="utf-8")
    return place


@pytest.fixture(scope="session")
def ended(started: Path, equigram: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with the job done."""
    place = tmp_path_factory.mktemp("done")
    shutil.copytree(started, place, dirs_exist_ok=True)
    assert equigram(place, "run", "job.yaml").returncode == 0
    return place


@pytest.fixture
def tutorial(folder: Path, started: Path) -> Path:
    """What how-to guides begin with."""
    shutil.copytree(started, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def finished(folder: Path, ended: Path) -> Path:
    """What how-to guides begin with that go on with a finished job."""
    shutil.copytree(ended, folder, dirs_exist_ok=True)
    return folder


# The pages, each read from top to bottom


def test_the_readme(folder: Path, equigram: Command) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("path/to/images", 5), ("more/images", 1), ("new-images", 1)):
        for label in "ab":
            (folder / name / label).mkdir(parents=True)
            for index in range(count):
                noise = rng.integers(0, 256, (36, 36, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / name / label / f"{index}.png")
    Reader(folder, equigram, SMALL | FEW | {"9100": str(free_port())}).read("README.md")
    assert (folder / "predictions.csv").read_text().count("\n") == 3
    assert (folder / "log.jsonl").exists()
    assert (folder / "plots/spectrum.svg").exists()


def test_the_tutorial(folder: Path, equigram: Command) -> None:
    reader = Reader(folder, equigram, SMALL)
    reader.read("docs/tutorial.md")
    (shown,) = [block.text for block in ALL if block.page == "docs/tutorial.md" and block.language == "text"]
    planned = reader.said["equigram plan job.yaml"]
    assert all(line in planned.splitlines() for line in shown.replace("16x16", "8x8").splitlines())
    assert (folder / "predictions.csv").read_text().startswith("image,predicted,ADI,BACK,")
    assert (folder / "plots/gram-C4-ntk.png").exists()
    assert (folder / "plots/learning-curves.png").exists()
    # As the reference has it, on the same store.
    reader.read("docs/store.md")


def test_resume_after_a_crash(tutorial: Path, equigram: Command) -> None:
    Reader(tutorial, equigram, SMALL | FEW).read("docs/howto/resume.md")


def test_extend_a_run(finished: Path, equigram: Command) -> None:
    reader = Reader(finished, equigram, SMALL | FEW)
    reader.read("docs/howto/extend.md")
    assert "54 training and 18 test images, " in reader.said["equigram run job.yaml"]


def test_choose_a_ridge(finished: Path, equigram: Command) -> None:
    Reader(finished, equigram, SMALL | FEW).read("docs/howto/ridge.md")


def test_add_an_activation(folder: Path) -> None:
    Reader(folder).read("docs/howto/activation.md")


def test_store_in_s3(tutorial: Path, equigram: Command, object_storage: str) -> None:
    import fsspec

    fsspec.filesystem("s3").mkdir("equigram-runs")
    reader = Reader(tutorial, equigram, SMALL | FEW)
    reader.environment |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    reader.read("docs/howto/s3.md")
    assert reader.environment["AWS_ENDPOINT_URL"] == object_storage
    assert (tutorial / "predictions.csv").read_text().count("\n") == 10


def test_solving(folder: Path) -> None:
    from equikernel import GroupCNN

    rng = np.random.default_rng(0)
    images, more_images = rng.normal(size=(12, 4, 4, 1)), rng.normal(size=(3, 4, 4, 1))
    network = GroupCNN(group="C4", depth=2)
    train, cross, test = network.kernel(images), network.kernel(more_images, images), network.kernel(more_images)
    reader = Reader(folder)
    reader.names |= {
        "GroupCNN": GroupCNN, "images": images, "more_images": more_images, "labels": np.arange(12) % 2,
        "y": rng.normal(size=(12, 1)), "ridges": [1e-4, 1e-2], "gram": train.ntk, "cross": cross.ntk,
        "nngp": train.nngp, "cross_nngp": cross.nngp, "test_nngp": test.nngp, "self_kernels": np.diag(test.ntk),
    }  # fmt: skip
    reader.read("docs/solving.md")


@pytest.mark.usefixtures("cluster")
def test_run_on_a_cluster(tutorial: Path, equigram: Command) -> None:
    """On the cluster of the other tests; that Ray starts, and stops, as the page says is a soak."""
    import ray

    (tutorial / "ray").write_text("#!/bin/sh\n")
    (tutorial / "ray").chmod(0o755)
    here = {"127.0.0.1:6379": ray.get_runtime_context().gcs_address}
    reader = Reader(tutorial, equigram, here)
    reader.environment["PATH"] = f"{tutorial}:{reader.environment['PATH']}"
    read_cluster_page(reader)


RAY = """\
#!/usr/bin/env bash
# `ray start` and `ray stop` of nodes that end with the test: in a folder of its own, and none but these are stopped.
set -euo pipefail
case $1 in
  start)
    setsid "{ray}" "$@" --block --temp-dir={folder}/nodes --include-dashboard=false --num-cpus=1 \\
      --object-store-memory=100000000 --disable-usage-stats >{folder}/ray.log 2>&1 </dev/null &
    echo $! >>{folder}/pids
    for _ in $(seq 60); do "{ray}" status --address 127.0.0.1:{port} >/dev/null 2>&1 && exit; sleep 1; done
    exit 1 ;;
  stop) for pid in $(cat {folder}/pids); do kill -TERM -- -$pid; done ;;
  *) exec "{ray}" "$@" ;;
esac
"""


@pytest.fixture
def own_ray() -> Iterator[tuple[Path, int]]:
    """A folder with a program ``ray`` whose nodes end with the test, and a port for their head."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as place:
        port = free_port()
        program = Path(place) / "ray"
        program.write_text(RAY.format(ray=SCRIPTS / "ray", folder=place, port=port))
        program.chmod(0o755)
        yield Path(place), port
        groups = (Path(place) / "pids").read_text().split() if (Path(place) / "pids").exists() else []
        for group in groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(group), signal.SIGKILL)


@pytest.mark.soak
def test_run_on_a_cluster_that_is_started_by_hand(tutorial: Path, own_ray: tuple[Path, int]) -> None:
    place, port = own_ray
    reader = Reader(tutorial, None, {"6379": str(port)})
    reader.environment |= {
        "PATH": f"{place}:{reader.environment['PATH']}",
        "HOME": str(place),
        "RAY_TMPDIR": str(place),
    }
    read_cluster_page(reader)


def read_cluster_page(reader: Reader) -> None:
    reader.read("docs/howto/cluster.md")
    (said,) = [said for command, said in reader.said.items() if command.startswith("equigram run")]
    assert "36 training and 9 test images" in said


class Served(Reader):
    """Somebody who has a service, and waits until a job that is cancelled has ended."""

    def run(self, command: str, where: str) -> None:
        super().run(command, where)
        deadline = time.monotonic() + PATIENCE
        while command.startswith("equigram cancel") and (state := Client().job("histology").state) != "cancelled":
            assert time.monotonic() < deadline, f"{where}: the job is {state}"
            time.sleep(0.1)


@pytest.fixture
def served(tutorial: Path, equigram: Command, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """With the service that docs/howto/service.md starts, in small."""
    folder, port = tutorial, free_port()
    page = [block for block in ALL if block.page == "docs/howto/service.md"]
    # As URLs, images that are on this machine are the service's to read, and not uploaded.
    here = {"/data/": f"file://{folder}/data/", "8786": str(port), '"size": 16': '"size": 8'}
    here |= {
        f"equigram {verb} ID": f"equigram {verb} histology" for verb in ("cancel", "resume", "watch", "logs", "fetch")
    }
    reader = Served(folder, equigram, dict([SIXTEEN]) | here)
    reader.environment |= {
        "EQUIGRAM_SERVER": f"http://127.0.0.1:{port}",
        "XDG_CONFIG_HOME": str(folder),
        "XDG_STATE_HOME": str(folder / "state"),
        "CURL_HOME": str(folder),
    }
    (folder / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
    for name, value in reader.environment.items():
        monkeypatch.setenv(name, value)
    begin, *_ = [block.text for block in page if block.text.startswith("equigram serve")]
    (end,) = [block.text for block in page if block.text.startswith("equigram serve") and "--stop" in block.text]
    words = shlex.split(begin.replace("/data", f"{folder}/data"))[1:]
    with (folder / "service.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "equigram.cli", *words, "--port", str(port), "--cpus", "1"],
            stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        assert "equigram serves" in process.stdout.readline(), (folder / "service.log").read_text()
        deadline = time.monotonic() + PATIENCE
        while httpx.get(f"http://127.0.0.1:{port}/readyz").status_code != 200:
            assert time.monotonic() < deadline, (folder / "service.log").read_text()
            time.sleep(0.2)
        yield reader
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE) == 130
        reader.run(end, "docs/howto/service.md")
    finally:
        process.kill()
        process.communicate()
        LocalCluster(str(folder / "runs")).stop()


def test_run_the_service(served: Served) -> None:
    (text,) = [block.text for block in ALL if block.page == "docs/howto/service.md" and block.mark == "file"]
    (served.folder / "job.yaml").write_text(replace(text, served.replaced), encoding="utf-8")
    served.read("docs/client.md")
    assert {path.name for path in (served.folder / "results").iterdir()} >= {"result.json", "gram-C4-ntk.npy"}
    served.read("docs/howto/service.md")
    served.names["tiles"] = httpx.get(f"{Client().url}/jobs/histology/tiles")
    served.read("docs/http.md")
    assert (served.names["states"] == 2).all()
    assert served.names["k"].shape == (10, 20)
    served.run("equigram delete histology --yes", "docs/client.md")
    assert not (served.folder / "runs/histology").exists()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# All pages

READ = {
    "README.md", "docs/tutorial.md", "docs/store.md", "docs/solving.md", "docs/howto/activation.md",
    "docs/howto/cluster.md", "docs/howto/extend.md", "docs/howto/resume.md", "docs/howto/ridge.md",
    "docs/howto/s3.md", "docs/howto/service.md", "docs/client.md", "docs/http.md",
}  # fmt: skip
"""The pages that tests above read from top to bottom."""


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_run_or_says_why_not(page: str) -> None:
    for block in [one for one in ALL if one.page == page]:
        where = f"{page}, line {block.line}"
        allowed = {"sh", "python", "yaml", "json", "text", "session", "formula", "{eval-rst}"}
        assert block.language in allowed, f"{where}: {block.language!r} is no language of these pages"
        if block.language in ("sh", "python"):
            assert page in READ or block.mark == "not run", f"{where}: is not run, and does not say why"
        elif block.language in ("text", "formula"):
            first = block.text.split()[0]
            assert first not in PROGRAMS or page == "docs/cli.md", f"{where}: looks like a command"
        if block.language == "python":
            ast.parse(block.text)


def test_the_pages_that_are_said_to_be_read_are_read() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    assert set(re.findall(r'\.read\("([\w/.]+)"\)', here)) == READ


def test_comments_stand_in_front_of_code() -> None:
    marked = sum(block.mark != "" for block in ALL)
    there = sum(
        len(re.findall(r"(?m)^<!-- (?:not run|file|given): ", (ROOT / page).read_text(encoding="utf-8")))
        for page in PAGES
    )
    assert marked == there > 10


def anchors(path: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub makes them."""
    tokens = MarkdownIt().parse(path.read_text(encoding="utf-8"))
    titles = [tokens[place + 1].content for place, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)", re.sub(r"(?s)```.*?```|`[^`\n]*`", "", text))
    for target, anchor in links:
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page}: there is no {target}"
        if anchor:
            assert anchor in anchors(path), f"{page}: {target} has no heading #{anchor}"


def test_the_index_names_every_page() -> None:
    named = set(re.findall(r"\]\(([\w/.-]+\.md)\)", (ROOT / "docs/index.md").read_text(encoding="utf-8")))
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert named == pages - {"index.md"}


@pytest.mark.parametrize("name", ["cli", "store", "http"])
def test_generated_pages_say_what_the_program_says(name: str) -> None:
    page = (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")
    render = runpy.run_path(str(ROOT / f"docs/write_{name}.py"))["render"]
    assert page == render(), f"docs/{name}.md is not up to date; run .venv/bin/python docs/write_{name}.py"


def test_the_reference_has_every_public_name() -> None:
    import equigram
    import equikernel

    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    for package in (equigram, equikernel):
        errors = vars(importlib.import_module(f"{package.__name__}.errors"))
        for name in set(package.__all__) - set(errors) - {"__version__"}:
            assert re.search(rf"(?m)^\.\. auto\w+:: {package.__name__}\.(\w+\.)?{name}$", page), name


def test_the_site_is_built_of_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    navigation = runpy.run_path(str(ROOT / "docs/conf.py"))["navigation"]
    index = "# Title\n\n## How-to guides\n\n- [One](howto/one.md): words\n- [Two](two.md)\n\n## Words\n\nNo pages.\n"
    assert navigation(index) == textwrap.dedent(
        """

        ```{toctree}
        :hidden:
        :caption: How-to guides

        howto/one
        two
        ```"""
    )
