"""The commands as a person meets them: what they print and where, how they end, and what is left after that."""

import csv
import io
import json
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from numpy.testing import assert_allclose
from PIL import Image

from equigram import GramStore, __version__, cli
from equigram.errors import SpecError
from equikernel.worker import processor_kind

EQUIGRAM = str(Path(sys.executable).with_name("equigram"))
ENVIRONMENT = os.environ | {"COLUMNS": "80", "TERM": "xterm", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
LIMIT = 120
COMMANDS = ("run", "plan", "status", "verify", "extend", "export", "import", "predict", "plot", "submit", "fetch")


class Done(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    err: str


class Place(NamedTuple):
    """A folder, and the command line in it."""

    folder: Path
    command: Callable[..., Done]

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def job(self, text: str | bytes | None = None, **sections: Any) -> str:
        """Write ``job.yaml``: small images, two classes, unless said otherwise."""
        if text is None:
            data = {"train": "images", "test_fraction": 0.25} | sections.pop("data", {})
            job = {
                "store": "run",
                "data": {name: value for name, value in data.items() if value is not None},
                "network": {"depth": 2},
                "gram": {"engine": "reference"},  # nothing to compile
                **sections,
            }
            text = yaml.safe_dump(job)
        (self / "job.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
        return "job.yaml"

    def refuses(self, words: str, *arguments: object, code: int = 2) -> None:
        """The command ends with one sentence that holds ``words``, prints nothing else, and leaves all as it was."""
        before = self.files()
        done = self.command(*arguments, folder=self.folder)
        *before_it, sentence = done.err.splitlines()
        assert (done.code, done.out) == (code, ""), done
        assert sentence.startswith("error: ")
        assert words in sentence
        assert not [line for line in before_it if line.startswith(("error: ", "Traceback", " "))]
        assert self.files() == before

    def files(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(self.folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def command(equigram: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., Done]:
    """Runs the command line as a process in a folder."""

    def run(*arguments: object, folder: Path) -> Done:
        done = equigram(folder, *arguments)
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def place(tmp_path: Path, command: Callable[..., Done]) -> Place:
    class_folders(tmp_path / "images")
    return Place(tmp_path, command)


def image(path: Path, shape: tuple[int, ...] = (5, 5), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


def class_folders(root: Path, count: int = 4, classes: str = "ab", shape: tuple[int, ...] = (5, 5)) -> Path:
    """Noise whose brightness tells the class."""
    for number, name in enumerate(classes):
        for index in range(count):
            path = image(root / name / f"{index}.png", shape, seed=100 * number + index)
            pixels = np.asarray(Image.open(path)) // 2 + 40 * number
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


# --------------------------------------------------------------------------------------------------- a finished run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A folder with a run that is done, and how it ended."""
    folder = tmp_path_factory.mktemp("finished")
    class_folders(folder / "images", 6, "abc")
    class_folders(folder / "new", 3, "abc")
    job = {
        "store": "run",
        "data": {"train": "images", "test": "new"},
        "network": {"depth": 2},
        "gram": {"groups": ["C1", "C4"], "tile": 8},
        "solve": {"ridge": [1e-2, 1e-4], "train_sizes": [2, 4], "choose": "first"},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    done = subprocess.run(
        [EQUIGRAM, "run", "job.yaml"],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def run(finished: tuple[Path, Done], command: Callable[..., Done]) -> Place:
    """The finished run, to be looked at only."""
    return Place(finished[0], command)


@pytest.fixture
def copy(tmp_path: Path, run: Place) -> Place:
    """A copy of the finished run, to be damaged."""
    return Place(Path(shutil.copytree(run.folder, tmp_path / "copy")), run.command)


def test_a_run_ends_with_its_results_and_what_to_do_next(finished: tuple[Path, Done]) -> None:
    lines = finished[1].out.splitlines()
    assert lines[0] == "run: 18 training and 9 test images, 12 tiles, all done"
    assert sum(line.split()[:2] == ["C4", "ntk"] for line in lines) == 2
    assert "which network did better: test accuracy, ridge 0.01" in lines
    assert lines[-2:] == ["next: equigram plot run", "      equigram predict run IMAGES"]
    assert max(map(len, lines)) <= 80


def test_a_run_without_a_terminal_writes_plain_lines(finished: tuple[Path, Done]) -> None:
    assert "\x1b" not in finished[1].out + finished[1].err
    lines = [line for line in finished[1].err.splitlines() if not line.startswith("solving regressions: 12 of 12")]
    assert lines[-1] == "note: computing in this process"


def test_a_finished_run_has_nothing_to_do_and_says_the_same(finished: tuple[Path, Done], run: Place) -> None:
    before = {name: content for name, content in run.files().items() if "/gram/" in name or "/cross/" in name}
    again = run.command("run", "job.yaml", folder=run.folder)
    assert (again.code, again.out) == (0, finished[1].out)
    assert {name: content for name, content in run.files().items() if name in before} == before


def test_a_finished_run_is_verified(run: Place) -> None:
    before = run.files()
    done = run.command("verify", "run", "--seed", 5, folder=run.folder)
    assert done.code == 0, done
    assert done.out.splitlines() == [
        "chunks    60 read",
        "diagonal  27 images computed with themselves, the same bits required",
        "minors    6 sampled",
        "anew      8 tiles computed, the same bits required; --seed 5",
        "missing   0 tiles",
        "wrong     nothing",
    ]
    assert run.files() == before


def test_a_missing_tile_is_nothing_wrong_and_a_damaged_solution_is(copy: Place) -> None:
    (copy / "run/gram/C4/ntk/c/0/1").unlink()
    done = copy.command("verify", "run", "--samples", 0, folder=copy.folder)
    assert done.code == 0, done
    assert done.out.splitlines()[-3:] == [
        "missing   1 tile", "wrong     nothing", "next: equigram run JOB.yaml computes what is missing",
    ]  # fmt: skip
    shutil.rmtree(copy / "run/solution/C4/ntk/coefficients")
    done = copy.command("verify", "run", "--samples", 0, folder=copy.folder)
    assert done.code == 1
    assert done.err.splitlines()[-1] == "error: run: 1 thing is wrong; mend it with `equigram verify run --repair`"
    np.savez(copy / "new.npz", x=np.zeros((1, 5, 5, 1), np.uint8))
    done = copy.command("predict", "run", "new.npz", folder=copy.folder)
    assert (done.code, done.out) == (1, "")
    assert "`equigram run JOB.yaml` solves again" in done.err
    assert copy.command("run", "job.yaml", folder=copy.folder).code == 0
    assert copy.command("verify", "run", "--samples", 0, folder=copy.folder).code == 0


def test_matrices_are_exported(run: Place, tmp_path: Path) -> None:
    output = tmp_path / "some.npz"
    done = run.command("export", "run", output, "--group", "C4", "--kernel", "ntk", "--train", "0:7", folder=run.folder)
    assert done == Done(
        0, f"{output}: labels/train, names/train, labels/test, names/test, gram/C4/ntk, cross/C4/ntk\n", ""
    )
    assert np.load(output)["cross/C4/ntk"].shape == (9, 7)
    again = run.command("export", "run", output, folder=run.folder)
    assert again == Done(2, "", f"error: {output} exists already; choose another name, or delete it\n")


def test_what_is_wrong_with_a_store_is_told_and_repaired(copy: Place) -> None:
    good = copy.files()
    (copy / "run/gram/C4/ntk/c/0/1").write_bytes(b"nothing")
    done = copy.command("verify", "run", "--samples", 0, folder=copy.folder)
    assert done.code == 1
    assert done.out.startswith("wrong: chunk 0, 1 of gram/C4/ntk has 7 bytes, not 260\n")
    assert done.err.splitlines()[-1] == "error: run: 1 thing is wrong; mend it with `equigram verify run --repair`"
    assert copy.command("verify", "run", "--repair", folder=copy.folder).code == 0
    assert {name: content for name, content in copy.files().items() if name in good} == good


def test_on_a_terminal_there_are_bars(run: Place) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [EQUIGRAM, "run", "job.yaml"], cwd=run.folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=theirs
    ) as process:
        os.close(theirs)
        seen = b""
        while chunk := _read(ours):
            seen += chunk
        assert process.wait(LIMIT) == 0
    os.close(ours)
    assert b"solving regressions" in seen
    assert b"100%" in seen


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux says that the other side is closed
        return b""


def test_status_of_a_finished_run_shows_its_results(finished: tuple[Path, Done], run: Place) -> None:
    done = run.command("status", "run", folder=run.folder)
    assert (done.code, done.err) == (0, "")
    facts = dict(line.split(maxsplit=1) for line in done.out.splitlines()[:7])
    assert facts["store"] == "run"
    assert facts["images"] == "18 training, 9 test, 5x5x1"
    assert facts["networks"] == "C1 C4 · nngp ntk · float32"
    assert facts["tiles"] == "12 of 12 done, 0 missing"
    assert facts["computed"] == f"on {processor_kind()}"
    assert facts["pairs"] == "333 of 333 (100.0%)"
    results = finished[1].out.split("all done\n")[1].split("next:")[0]
    assert done.out.endswith(results)


def test_status_of_a_store_with_missing_tiles_maps_them(copy: Place) -> None:
    (copy / "run/gram/C4/ntk/c/0/1").unlink()
    (copy / "run/cross/C1/nngp/c/1/2").unlink()
    shutil.rmtree(copy / "run/solution")
    done = copy.command("status", "run", folder=copy.folder)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines.pop(7).startswith("history   1 computation, last event 20")
    assert lines[5:] == [
        "tiles     10 of 12 done, 2 missing",
        f"pairs     {333 - 64 - 2} of 333 (80.2%)",
        "",
        "train x train, # done, + partly, . missing",
        "#.#",
        " ##",
        "  #",
        "",
        "test x train",
        "###",
        "##.",
        "next: equigram run JOB.yaml goes on from here",
    ]


def test_plan_of_a_new_job_says_what_it_will_cost_and_writes_nothing(place: Place) -> None:
    before = place.files()
    done = place.command("plan", place.job(gram={"groups": ["C1", "C4"], "tile": 4}), folder=place.folder)
    facts = {line[:10].strip(): line[10:] for line in done.out.splitlines()}
    assert done.code == 0
    assert facts["store"].startswith("run (new), ")
    assert facts["images"] == "6 training, 2 test, 5x5x1"
    assert facts["networks"] == "C1 C4 · nngp ntk · float32"
    assert facts["matrices"] == "4 of 6 x 6 and 4 of 2 x 6"
    assert facts["tiles"] == "5 of 4 x 4 images"
    assert facts["pairs"] == "33"
    assert re.fullmatch(r"\S+ ms on one worker, measured on this machine", facts["a pair"])
    assert re.fullmatch(r"about \S+ s", facts["time"])
    assert max(map(len, done.out.splitlines())) <= 80
    assert place.files().keys() == before.keys() | {str(place / "job.yaml")}


def test_plan_tells_what_the_hours_cost(place: Place) -> None:
    spec = place.job(gram={"groups": ["C4", "C3"], "tile": 4}, data={"size": 4})
    done = place.command("plan", spec, "--price", "1e9", folder=place.folder)
    facts = {line[:10].strip(): line[10:] for line in done.out.splitlines()}
    assert facts["engine"] == "cpu, general"
    assert facts["tiles"] == "5 of 4 x 4 images, in each of 2 passes"
    costs = [float(cost) for cost in facts["a pair"].split(" ms ")[0].split(" + ")]
    match = re.fullmatch(r"([\d,.]+) for (\S+) CPU-hours at 1e\+09 per 1,000", facts["cost"])
    assert match is not None
    assert float(match[1].replace(",", "")) == pytest.approx(33 * sum(costs) / 3600e3 * 1e6, rel=0.02)


def test_extend_and_import_by_command(copy: Place) -> None:
    assert copy.command("extend", "run", folder=copy.folder).code == 2
    refused = copy.command("extend", "run", "--test", "--group", "D4", folder=copy.folder)
    assert refused.code == 2
    assert "--test is about images, and none are named; add --data IMAGES" in refused.err
    more = (copy / "job.yaml").read_text().replace("- C4", "- C4\n  - D4")
    (copy / "more.yaml").write_text(more)
    refused = copy.command("run", "more.yaml", folder=copy.folder)
    assert "or add what is new with `equigram extend run --group D4`" in refused.err
    done = copy.command("extend", "run", "--group", "D4", folder=copy.folder)
    assert done.code == 0, done.err
    assert copy.command("run", "more.yaml", folder=copy.folder).code == 0
    assert re.search(r"^ D4 +ntk ", done.out, re.MULTILINE)
    status = copy.command("status", "run", folder=copy.folder)
    assert "tiles     24 of 24 done in 2 passes, 0 missing" in status.out
    assert copy.command("export", "run", "all.npz", folder=copy.folder).code == 0
    taken = copy.command("import", "job.yaml", "all.npz", folder=copy.folder)
    assert taken.code == 2
    assert "gram.groups is ['C1', 'C4', 'D4'] in the store and ['C1', 'C4'] in the job" in taken.err
    job = (copy / "job.yaml").read_text().replace("store: run", "store: second")
    (copy / "second.yaml").write_text(job)
    taken = copy.command("import", "second.yaml", "all.npz", folder=copy.folder)
    assert (taken.code, taken.out) == (0, "second: 12 tiles imported, 0 missing\nnext: equigram run second.yaml\n")


def test_plan_of_a_run_that_is_done_says_so(run: Place) -> None:
    done = run.command("plan", "job.yaml", folder=run.folder)
    assert done.code == 0
    assert "store     run (begun), " in done.out
    assert "\ntiles     12 of 8 x 8 images: 0 missing\npairs     333: 0 missing\n" in done.out
    assert done.out.endswith("time      nothing is left to compute\n")


def test_plan_of_a_run_that_was_interrupted_counts_what_is_missing(copy: Place) -> None:
    (copy / "run/gram/C4/ntk/c/0/1").unlink()
    done = copy.command("plan", "job.yaml", folder=copy.folder)
    assert "\ntiles     12 of 8 x 8 images: 1 missing\npairs     333: 64 missing\n" in done.out


def predictions(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_predictions_are_csv_and_those_of_the_run_itself(run: Place) -> None:
    done = run.command("predict", "run", "new", folder=run.folder)
    assert (done.code, done.err) == (0, "")
    rows = predictions(done.out)
    assert list(rows[0]) == ["image", "predicted", "a", "b", "c"]
    assert [row["image"] for row in rows] == [f"{name}/{index}.png" for name in "abc" for index in range(3)]
    values = np.array([[float(row[name]) for name in "abc"] for row in rows])
    arrays, _ = GramStore.open(str(run / "run")).solution("C4", "ntk")
    assert_allclose(values, arrays["predictions"][0], atol=1e-4)
    assert [row["predicted"] for row in rows] == ["abc"[index] for index in values.argmax(axis=1)]


def test_predictions_can_be_of_another_network_and_ridge_and_in_a_file(copy: Place) -> None:
    (copy / "p.csv").write_text("older predictions", encoding="utf-8")
    options = ("--group", "C1", "--kernel", "nngp", "--ridge", "1e-4", "-o", "p.csv")
    done = copy.command("predict", "run", "new", *options, folder=copy.folder)
    assert done == Done(0, "", "9 predictions (C1 nngp, ridge 0.0001) in p.csv\n")
    rows = predictions((copy / "p.csv").read_text(encoding="utf-8"))
    arrays, _ = GramStore.open(str(copy / "run")).solution("C1", "nngp")
    assert_allclose([[float(row[name]) for name in "abc"] for row in rows], arrays["predictions"][1], atol=1e-4)


def test_predictions_can_be_probabilities_with_variances(copy: Place) -> None:
    job = (copy / "job.yaml").read_text(encoding="utf-8")
    (copy / "job.yaml").write_text(job.replace("choose: first", "choose: leave_one_out"), encoding="utf-8")
    assert copy.command("run", "job.yaml", folder=copy.folder).code == 0
    done = copy.command("predict", "run", "new", "--probabilities", "--variances", folder=copy.folder)
    assert (done.code, done.err) == (0, "")
    rows = predictions(done.out)
    assert list(rows[0]) == ["image", "predicted", "a", "b", "c", "variance"]
    arrays, fields = GramStore.open(str(copy / "run")).solution("C4", "ntk")
    values = np.array([[float(row[name]) for name in "abc"] for row in rows])
    assert_allclose(values, arrays["probabilities"], atol=1e-4)
    assert all(float(row["variance"]) > 0 for row in rows)
    other = next(ridge for index, ridge in enumerate(arrays["ridge"]) if index != fields["chosen"])
    done = copy.command("predict", "run", "new", "--probabilities", "--ridge", f"{other:g}", folder=copy.folder)
    assert (done.code, done.out) == (2, "")
    assert "has no calibrated probabilities for C4 ntk, ridge" in done.err


def test_predictions_are_of_the_last_job_and_not_of_an_older_one(copy: Place) -> None:
    job = yaml.safe_load((copy / "job.yaml").read_text(encoding="utf-8"))
    job["solve"] = {"ridge": [0.7], "kernels": ["nngp"]}
    (copy / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    assert copy.command("run", "job.yaml", folder=copy.folder).code == 0
    done = copy.command("predict", "run", "new", "-o", "p.csv", folder=copy.folder)
    assert "(C4 nngp, ridge 0.7)" in done.err
    assert " ntk " not in copy.command("status", "run", folder=copy.folder).out.partition("history")[2]
    job["solve"] = {"ridge": [1e-9], "method": "iterative", "steps": 1, "rank": 1}
    (copy / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    assert copy.command("run", "job.yaml", folder=copy.folder).code == 1
    assert "next: equigram run JOB.yaml goes on from here" in copy.command("status", "run", folder=copy.folder).out
    done = copy.command("predict", "run", "new", folder=copy.folder)
    assert (done.code, done.out) == (2, "")
    assert "it is not solved as its last job asks for" in done.err


def test_a_single_image_can_be_predicted(run: Place) -> None:
    done = run.command("predict", "run", "new/a/0.png", folder=run.folder)
    assert done.code == 0
    assert [row["image"] for row in predictions(done.out)] == ["0.png"]


def test_predictions_go_into_the_file_behind_a_link_and_through_a_pipe(copy: Place) -> None:
    (copy / "link.csv").symlink_to("behind.csv")
    copy.command("predict", "run", "new/a/0.png", "-o", "link.csv", folder=copy.folder)
    assert (copy / "link.csv").is_symlink()
    os.mkfifo(copy / "pipe")
    with subprocess.Popen(["cat", "pipe"], cwd=copy.folder, stdout=subprocess.PIPE, text=True) as reader:
        copy.command("predict", "run", "new/a/0.png", "-o", "pipe", folder=copy.folder)
        assert reader.communicate(timeout=LIMIT)[0] == (copy / "behind.csv").read_text(encoding="utf-8")
    assert (copy / "pipe").is_fifo()


def test_a_file_name_that_is_no_text_does_not_end_predictions(copy: Place) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy(copy / "new/a/0.png", copy / name)
    done = copy.command("predict", "run", name, "-o", "p.csv", folder=copy.folder)
    assert done.code == 0, done.err
    assert (copy / "p.csv").read_bytes().splitlines()[1].startswith(b"caf\xe9.png,")


def test_plot_prints_the_pictures_it_writes(copy: Place) -> None:
    done = copy.command("plot", "run", "-o", "pictures", folder=copy.folder)
    assert (done.code, done.err) == (0, "")
    paths = [copy / line for line in done.out.splitlines()]
    assert sorted(paths) == sorted((copy / "pictures").glob("*.png"))
    assert all(path.with_suffix(".svg").exists() for path in paths)
    assert {path.read_bytes()[:8] for path in paths} == {b"\x89PNG\r\n\x1a\n"}


# ----------------------------------------------------------------------------------------------- wrong job files


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "job.yaml: the job file is empty; it needs at least `store` and `data.train`"),
        ("store: [", "job.yaml, line 1, column 9: cannot be read as YAML: "),
        (b"store: \xff", "job.yaml: byte 7 is not UTF-8; save the file as UTF-8 text"),
        (
            "store: a\nstore: b",
            "job.yaml, line 2, column 1: cannot be read as YAML: 'store' is given twice, first in l",
        ),
        ("[1]", "job.yaml: [1] is not allowed; it must be a section with the fields store, data, network, gram, "),
    ],
    ids=["empty", "not YAML", "not UTF-8", "a key twice", "a list"],
)
def test_a_file_that_is_no_job_is_refused(place: Place, text: str | bytes, words: str) -> None:
    place.refuses(words, "run", place.job(text))


def test_a_job_file_that_cannot_be_read_is_refused(place: Place) -> None:
    place.refuses("error: none.yaml: cannot be read: No such file or directory", "run", "none.yaml")
    place.refuses("error: images: cannot be read: Is a directory", "plan", "images")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (
            {"seed": 3},
            "seed: no such field; did you mean data.seed? Allowed here: store, data, network, gram, resour",
        ),
        ({"data": {"sizes": 3}}, "data.sizes: no such field; did you mean 'size'? Allowed here: train, test, "),
        ({"network": {"dept": 3}}, "network.dept: no such field; did you mean 'depth'? Allowed here: depth, "),
        ({"gram": {"group": "C4"}}, "gram.group: no such field; did you mean 'groups'? Allowed here: groups, "),
        ({"resources": {"cpu": 1}}, "resources.cpu: no such field. Allowed here: workers, cpus_per_worker, "),
        ({"solve": {"ridges": 1}}, "solve.ridges: no such field; did you mean 'ridge'? Allowed here: ridge, "),
        ({"network": {"depth": "three"}}, "network.depth: 'three' is not allowed; it must be a whole number from 1 to"),
        (
            {"network": {"activation": "rleu"}},
            "network.activation: 'rleu' is not allowed; choose relu, leaky_relu(a), abs,",
        ),
        ({"network": {"padding": "FULL"}}, "network.padding: 'FULL' is not allowed; choose 'SAME', 'VALID' or 'CIRC"),
        ({"network": {"filter_size": 4}}, "network.filter_size: 4 is even, and an even filter has no centre pixel"),
        (
            {"gram": {"groups": ["S4"]}},
            "gram.groups[0]: 'S4' is not allowed; choose C1, C2, C4, D1, D2, D4, or for small images any",
        ),
        ({"gram": {"engine": "tpu"}}, "gram.engine: 'tpu' is not allowed; choose 'auto', 'cpu', 'gpu', 'xla', "),
        ({"gram": {"dtype": "float16"}}, "gram.dtype: 'float16' is not allowed; choose 'float32' or 'float64'"),
        ({"gram": {"tile": "foo"}}, "gram.tile: 'foo' is not allowed; choose 'auto' or a whole number from 1 to 65536"),
        ({"data": {"test": "new"}}, "data: test = 'new' and test_fraction = 0.25 both name the test images; keep one"),
    ],
    ids=lambda value: "" if isinstance(value, str) else json.dumps(value),
)
def test_a_wrong_field_is_refused_in_one_sentence(place: Place, section: dict[str, Any], words: str) -> None:
    place.refuses(f"error: job.yaml: {words}", "run", place.job(**section))


def test_options_that_do_not_exist_are_refused(place: Place) -> None:
    for arguments in (["run"], ["walk"], ["run", "job.yaml", "--fast"], ["predict", "run", "images", "--ridge", "x"]):
        done = place.command(*arguments, folder=place.folder)
        assert done.code == 2
        assert "Usage: equigram" in done.err
        assert done.out == ""


# --------------------------------------------------------------------------------------------------- wrong images


def test_a_missing_folder_is_refused(place: Place) -> None:
    place.refuses(
        "error: none does not exist; check the path, and where relative", "run", place.job(data={"train": "none"})
    )


def test_a_missing_url_is_refused(place: Place) -> None:
    job = place.job(data={"train": "memory://nothing/here.npz"})
    place.refuses("error: memory://nothing/here.npz does not exist; check the path", "run", job)


def test_an_unknown_protocol_is_refused(place: Place) -> None:
    job = place.job(data={"train": "gopher://images"})
    place.refuses("error: gopher://images starts with 'gopher', a protocol that is not known; use a path", "run", job)


def test_an_unreadable_image_is_refused(place: Place) -> None:
    (place / "images/a/1.png").write_text("not an image", encoding="utf-8")
    place.refuses("error: a/1.png in images is not an image that can be read", "run", place.job())


def test_a_truncated_image_is_refused(place: Place) -> None:
    path = place / "images/a/1.png"
    path.write_bytes(path.read_bytes()[:-40])
    place.refuses("error: a/1.png in images is truncated or damaged (image file is truncated)", "run", place.job())


def test_images_that_are_not_square_are_refused_for_quarter_turns(place: Place) -> None:
    class_folders(place / "wide", shape=(6, 8))
    words = "error: a/0.png in wide is 8 pixels wide and 6 high, but quarter turns need square images; set data.crop"
    place.refuses(words, "run", place.job(data={"train": "wide"}))


def test_images_of_different_sizes_are_refused(place: Place) -> None:
    image(place / "images/b/1.png", (9, 9))
    words = "error: b/1.png in images is 9 pixels wide and 9 high, but a/0.png in images is 5 wide and 5 high; set data"
    place.refuses(words, "run", place.job())


def arrays(place: Place, images: Any, labels: Any) -> dict[str, str]:
    np.save(place / "x.npy", images)
    np.save(place / "y.npy", labels)
    return {"train": "x.npy", "train_labels": "y.npy"}


def test_a_pixel_that_is_no_number_is_refused(place: Place) -> None:
    images = np.zeros((8, 8, 8), np.float32)
    images[3, 2, 1] = np.nan
    data = arrays(place, images, np.arange(8) % 2)
    place.refuses("error: x.npy[3] in x.npy holds [nan] at row 2, column 1; every pixel", "run", place.job(data=data))


def test_labels_that_do_not_match_the_images_are_refused(place: Place) -> None:
    data = arrays(place, np.ones((8, 8, 8), np.float32), np.arange(7) % 2)
    place.refuses("error: y.npy holds 7 labels, but x.npy holds 8 images", "run", place.job(data=data))


def test_without_labels_there_is_nothing_to_solve(place: Place) -> None:
    data = arrays(place, np.random.default_rng(0).random((8, 8, 8)), np.arange(8)) | {"train_labels": None}
    place.refuses("error: the training images have no labels, so there is nothing", "run", place.job(data=data))


def test_matrices_without_a_solution_need_no_labels(place: Place) -> None:
    data = arrays(place, np.random.default_rng(0).random((8, 8, 8)), np.arange(8)) | {"train_labels": None}
    done = place.command("plan", place.job(data=data, solve=None), folder=place.folder)
    assert done.code == 0
    assert "\nto solve  nothing\n" in done.out


def test_a_class_with_too_few_images_is_refused(place: Place) -> None:
    words = (
        "error: class 'a' has 3 training images left of 4 after data.test_fraction in images, but data.per_class = 9"
    )
    place.refuses(words, "run", place.job(data={"per_class": 9}))


def test_a_learning_curve_beyond_the_images_is_refused(place: Place) -> None:
    words = "error: class 'a' has 3 training images, but 4 per class are asked for"
    for command in ("plan", "run"):
        place.refuses(words, command, place.job(solve={"train_sizes": [4]}))


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_an_address_on_the_command_line_replaces_that_of_the_job(place: Place, verb: str) -> None:
    job = place.job(resources={"address": "auto"})
    place.refuses(
        "error: --address: resources.address: 'here' is no Ray address; write", verb, job, "--address", "here"
    )
    words = "error: no Ray cluster answers at resources.address = '127.0.0.1:1' (Connection refused); start one with"
    place.refuses(words, verb, job, "--address", "127.0.0.1:1", code=1)


def test_padding_that_eats_the_image_is_refused(place: Place) -> None:
    job = place.job(network={"depth": 4, "padding": "VALID"})
    words = (
        "error: VALID padding eats the image: 4 convolutions of size 3 remove 8 of 5 pixels per side; use depth <= 2"
    )
    place.refuses(words, "run", job)
    place.refuses(words, "plan", job)


def test_more_memory_than_there_is_is_refused_with_both_numbers(place: Place) -> None:
    data = arrays(place, np.zeros((400_000, 1, 1), np.uint8), np.arange(400_000) % 2)
    job = place.job(data=data, network={"depth": 1, "filter_size": 1}, solve={"method": "direct"})
    done = place.command("run", job, folder=place.folder)
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(
        r"error: solving with 300,000 training images needs 1\.\d TiB of memory with method 'direct', and \S+ [GM]iB "
        r"may be used; take solve\.method: iterative, fewer images .*, or set `solve: null` .*\n",
        done.err,
    )
    assert not list(place.folder.glob("run/*"))


# ------------------------------------------------------------------------------------------ wrong stores, clusters


def test_a_store_of_another_job_is_refused_naming_what_differs(run: Place, tmp_path: Path) -> None:
    job = Place(tmp_path, run.command).job(
        store=str(run / "run"),
        data={"train": str(run / "images"), "test": str(run / "new"), "test_fraction": None},
        network={"depth": 3},
        gram={"groups": ["C1", "C4"], "tile": 8},
    )
    before = run.files()
    for command in ("run", "plan"):
        done = run.command(command, tmp_path / job, folder=run.folder)
        assert (done.code, done.out) == (2, "")
        assert "belongs to another job: " in done.err
        assert "network.depth is 2 in the store and 3 in the job" in done.err
        assert len(done.err.splitlines()) == 1
    assert run.files() == before


def test_a_folder_that_is_something_else_is_left_alone(place: Place) -> None:
    (place / "foreign").mkdir()
    (place / "foreign/thesis.tex").write_text("years of work", encoding="utf-8")
    words = (
        "error: foreign already holds something that is not an equigram run, and is left alone; choose another place"
    )
    for command in ("run", "plan"):
        place.refuses(words, command, place.job(store="foreign"))


def test_a_cluster_where_nobody_answers_is_a_failed_run(place: Place) -> None:
    with socket.socket() as bound:  # bound and not listening, so that nobody else takes the port
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        words = f"error: no Ray cluster answers at resources.address = '{address}' (Connection refused); start one"
        place.refuses(words, "run", place.job(resources={"address": address}), code=1)


def test_what_is_no_ray_address_is_refused(place: Place) -> None:
    words = "error: job.yaml: resources.address: 'nobody' is no Ray address; write host:port, ray://host:port or auto"
    place.refuses(words, "run", place.job(resources={"address": "nobody"}))


@pytest.mark.parametrize("arguments", [["status"], ["plot"], ["predict"]], ids=lambda arguments: arguments[0])
def test_what_is_no_store_is_refused(place: Place, arguments: list[str]) -> None:
    more = ["images"] if arguments == ["predict"] else []
    (place / "file").write_text("text", encoding="utf-8")
    for store in ("none", "images", "file"):
        place.refuses(f"error: {store} is not a ", *arguments, store, *more)


def test_an_unfinished_run_has_no_pictures_and_no_predictions(copy: Place) -> None:
    (copy / "run/gram/C4/ntk/c/0/1").unlink()
    shutil.rmtree(copy / "run/solution")
    words = "1 of 12 tiles are missing; `equigram run JOB.yaml` computes them"
    copy.refuses(f"error: run has nothing to predict with: {words}", "predict", "run", "new")
    words = "1 tiles of the train matrices are missing; `equigram run JOB.yaml` computes them"
    copy.refuses(f"error: run has nothing to draw yet: {words}", "plot", "run")


def test_a_run_that_was_not_solved_has_no_predictions(copy: Place) -> None:
    shutil.rmtree(copy / "run/solution")
    words = "error: run has nothing to predict with: it is not solved as its last job asks for; run that"
    copy.refuses(words, "predict", "run", "new")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--group", "C2"], "--group 'C2' is not solved in run; choose C1 or C4"),
        (["--group", "c1"], "--group 'c1' is not solved in run; choose C1 or C4; did you mean 'C1'?"),
        (["--kernel", "ntkk"], "--kernel 'ntkk' is not solved in run; choose nngp or ntk; did you mean 'ntk'?"),
        (["--ridge", "3"], "the run has no solution for ridge 3; choose one of 0.01, 0.0001"),
        (["-o", "none/p.csv"], "none/p.csv: there is no folder "),
        (["-o", "images"], "images is a folder; name a file for the predictions"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_predictions_that_cannot_be_made_are_refused(run: Place, options: list[str], words: str) -> None:
    run.refuses(f"error: {words}", "predict", "run", "new", *options)


def test_new_images_unlike_the_training_images_are_refused(run: Place, tmp_path: Path) -> None:
    wide, red = image(tmp_path / "wide.png", (9, 9)), image(tmp_path / "red.png", (5, 5, 3))
    run.refuses(f"error: wide.png in {wide} is 9 pixels wide and 9 high, but every training", "predict", "run", wide)
    run.refuses(f"error: red.png in {red} has 3 channels, but every training image has 1", "predict", "run", red)
    run.refuses("error: none does not exist", "predict", "run", "none")


def test_a_place_that_cannot_be_written_is_a_failure(run: Place) -> None:
    run.refuses(
        "error: /proc/p.csv: cannot write the predictions: ", "predict", "run", "new", "-o", "/proc/p.csv", code=1
    )
    run.refuses("error: job.yaml/gram-C1-nngp.png: cannot be written", "plot", "run", "-o", "job.yaml", code=1)


# ------------------------------------------------------------------------------------------------- how commands end


def test_help_and_version_are_on_standard_output(command: Callable[..., Done], tmp_path: Path) -> None:
    for arguments in (["--help"], ["-h"], *([name, "--help"] for name in COMMANDS)):
        done = command(*arguments, folder=tmp_path)
        assert (done.code, done.err) == (0, "")
        assert "Usage: equigram" in done.out
        assert max(map(len, done.out.splitlines())) <= 80
    assert command("--version", folder=tmp_path) == Done(0, f"equigram {__version__}\n", "")


def test_the_help_of_run_shows_the_job_line_by_line(command: Callable[..., Done], tmp_path: Path) -> None:
    lines = [line.rstrip() for line in command("run", "--help", folder=tmp_path).out.splitlines()]
    for line in (cli.run.__doc__ or "").splitlines():
        if line.startswith(8 * " "):
            assert any(shown.strip() == line.strip() for shown in lines), line


def test_no_arguments_show_the_help(command: Callable[..., Done], tmp_path: Path) -> None:
    done = command(folder=tmp_path)
    assert done.code == 2
    assert "Usage: equigram" in done.out + done.err


def ending_with(error: BaseException, monkeypatch: pytest.MonkeyPatch, command: str = "run") -> None:
    def fail(path: object) -> None:
        raise error

    monkeypatch.setattr("equigram.spec.JobSpec.load", fail)
    monkeypatch.setattr(sys, "argv", ["equigram", command, "job.yaml"])
    cli.main()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("run", "interrupted; finished tiles are kept, and the same command goes on from there\n"),
        ("plan", "interrupted\n"),
    ],
)
def test_an_interrupt_says_what_is_kept(
    command: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        ending_with(KeyboardInterrupt(), monkeypatch, command)
    assert end.value.code == 130
    assert capsys.readouterr().err == words


def test_an_error_that_nobody_foresaw_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        ending_with(ZeroDivisionError("a bug"), monkeypatch)


def test_an_error_may_hold_what_looks_like_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        ending_with(SpecError("runs/[bold]a[/]: no such :smile:"), monkeypatch)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: runs/[bold]a[/]: no such :smile:\n"


def test_a_reader_that_has_enough_ends_a_command_quietly(run: Place) -> None:
    with subprocess.Popen(
        [EQUIGRAM, "status", "run"], cwd=run.folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, complaint = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert complaint == b""
