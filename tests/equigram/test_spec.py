"""The job file: what a job is, how YAML is read, and in which words a wrong one is refused."""

import inspect
import json
import pickle
import runpy
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from equigram import cli
from equigram import spec as specs
from equigram.errors import SpecError
from equigram.spec import DataSpec, GramSpec, JobSpec, ResourceSpec, SolveSpec
from equigram.yamlfile import read_yaml
from equikernel import Architecture, AvgPool, Conv, Custom, EngineError, GroupCNN, Residual
from equikernel import kernel as kernels
from equikernel.engines.gpu import GpuEngine

TOP = Path(__file__).parents[2]
SMALLEST = "store: runs/mine\ndata: {train: images}\n"
SECTIONS = [JobSpec, DataSpec, Architecture, GramSpec, ResourceSpec, SolveSpec]


def job(folder: Path, text: str | bytes) -> Path:
    path = folder / "job.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def load(folder: Path, more: str = "") -> JobSpec:
    return JobSpec.load(job(folder, SMALLEST + more))


def refused(path: Path) -> str:
    """The one line with which a job file is refused, without its name."""
    with pytest.raises(SpecError) as caught:
        JobSpec.load(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text.removeprefix(str(path))


# ---------------------------------------------------------------------------------------------------- what a job is


def test_everything_but_store_and_train_has_a_default(tmp_path: Path) -> None:
    spec = load(tmp_path)
    assert (spec.store, spec.data.train) == ("runs/mine", "images")
    assert spec.network == Architecture(depth=3, filter_size=3, padding="SAME", activation="relu", w_std=1, b_std=0)
    assert spec.gram == GramSpec(groups=("C4",), kernels=("nngp", "ntk"), dtype="float32", tile="auto", engine="auto")
    assert spec.resources == ResourceSpec(workers="auto", cpus_per_worker=1, gpus_per_worker=0, address=None)
    assert spec.solve == SolveSpec(ridge=(1e-6, 1e-4, 1e-2), kernels=None, train_sizes=None)


def test_without_solve_there_is_nothing_to_solve(tmp_path: Path) -> None:
    spec = load(tmp_path, "solve: null\n")
    assert spec.solve is None
    assert spec.solved_kernels == ()


def test_all_stored_kernels_are_solved_unless_some_are_named(tmp_path: Path) -> None:
    assert load(tmp_path).solved_kernels == ("nngp", "ntk")
    assert load(tmp_path, "solve: {kernels: [ntk]}\n").solved_kernels == ("ntk",)


def test_layers_of_any_kind_make_a_network(tmp_path: Path) -> None:
    layers = "[{kind: conv, filter: 5, activation: gelu}, {kind: avg_pool, size: 2}, "
    layers += "{kind: residual, layers: [{kind: conv}]}]"
    spec = load(tmp_path, f"network: {{layers: {layers}, b_std: 0.1}}\n")
    assert spec.network == Architecture(layers=(Conv(5, activation="gelu"), AvgPool(2), Residual([Conv()])), b_std=0.1)
    assert spec.network_for("D4") == spec.network.with_group("D4")
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


def test_groups_off_the_grid_take_passes_of_their_own(tmp_path: Path) -> None:
    gram = load(tmp_path, "gram: {groups: [C8, C1, D3, D4], kernels: ntk}\n").gram
    assert [one.groups for one in gram.passes] == [("C1", "D4"), ("C8",), ("D3",)]
    assert sorted(matrix for one in gram.passes for matrix in one.matrices) == sorted(gram.matrices)


def test_a_job_cannot_hold_a_python_function() -> None:
    for network in ({"activation": Custom(np.tanh)}, {"head": (Custom(np.tanh),)}):
        with pytest.raises(SpecError, match="network: the custom tanh is a Python function, which a job cannot hold"):
            JobSpec(store="runs/mine", data={"train": "images"}, network=network)


def test_a_wrong_layer_is_named_by_its_place(tmp_path: Path) -> None:
    layers = "[{kind: conv}, {kind: residual, layers: [{kind: conv, stride: 0}]}]"
    message = refused(job(tmp_path, SMALLEST + f"network: {{layers: {layers}}}\n"))
    assert "network.layers[1].layers[0].stride: 0 is not allowed; it must be a whole number of 1 or more" in message


def test_a_single_value_is_a_list_of_one(tmp_path: Path) -> None:
    spec = load(
        tmp_path,
        "gram: {groups: C1, kernels: ntk}\nsolve: {ridge: 1e-3, kernels: ntk, train_sizes: 4}\nnetwork: {head: erf}\n",
    )
    assert (spec.gram.groups, spec.gram.kernels, spec.network.head) == (("C1",), ("ntk",), ("erf",))
    assert spec.solve == SolveSpec(ridge=(1e-3,), kernels=("ntk",), train_sizes=(4,))


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "ray://head.example:10001", "[::1]:6379", "auto"])
def test_a_ray_address_is_a_host_and_a_port(tmp_path: Path, address: str) -> None:
    assert load(tmp_path, f"resources: {{address: '{address}'}}\n").resources.address == address


def test_the_network_of_a_job_is_that_of_the_library(tmp_path: Path) -> None:
    spec = load(tmp_path, "network: {depth: 2, activation: erf}\n")
    assert spec.network_for("C2") == GroupCNN(group="C2", depth=2, activation="erf")


def test_a_job_is_the_same_after_json_and_pickling(tmp_path: Path) -> None:
    spec = load(tmp_path, "gram: {tile: 8}\nsolve: {train_sizes: [2, 4]}\nnetwork: {head: [erf]}\n")
    assert JobSpec.parse(json.loads(json.dumps(spec.model_dump(mode="json")))) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_a_job_can_be_made_in_python_and_is_refused_in_the_same_words(tmp_path: Path) -> None:
    spec = JobSpec(store=tmp_path / "run", data={"train": tmp_path})
    assert spec.store == str(tmp_path / "run")
    with pytest.raises(SpecError, match=r"^gram.tile: 'foo' is not allowed; choose 'auto' or a whole number from 1 to"):
        JobSpec(store="run", data={"train": "images"}, gram={"tile": "foo"})


@pytest.mark.parametrize("path", sorted((TOP / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_a_job(path: Path) -> None:
    JobSpec.load(path)


def test_the_job_in_the_help_of_run_is_whole(tmp_path: Path) -> None:
    help_text = inspect.cleandoc(cli.run.__doc__ or "")
    block = [line for line in help_text.splitlines() if line.startswith("    ")]
    path = job(tmp_path, textwrap.dedent("\n".join(block)))
    assert JobSpec.load(path).model_fields_set == set(JobSpec.model_fields)


# ------------------------------------------------------------------------------------------------------------ docs


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_says_what_it_means(section: type[BaseModel]) -> None:
    for name, field in section.model_fields.items():
        assert field.description, f"{section.__name__}.{name} has no docstring"


def test_the_page_about_the_job_says_what_the_model_says() -> None:
    render = runpy.run_path(str(TOP / "docs/write_job.py"))["render"]
    page = (TOP / "docs/job.md").read_text(encoding="utf-8")
    assert page == render(), "docs/job.md is not up to date; run .venv/bin/python docs/write_job.py"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_the_page_about_the_job_has_every_field(section: type[BaseModel]) -> None:
    page = (TOP / "docs/job.md").read_text(encoding="utf-8")
    for name in section.model_fields:
        assert f"\n| `{name}` |" in page


# ------------------------------------------------------------------------------------------------------------ YAML


def yaml(folder: Path, text: str) -> Any:
    return read_yaml(job(folder, text))


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    assert yaml(tmp_path, "[1e-6, 1E5, -2e+3, .5e3, 1.e2, 1.0e-4]") == [1e-6, 1e5, -2e3, 500.0, 100.0, 1e-4]
    assert yaml(tmp_path, "[e5, 1e5x, '1e-6', 1e]") == ["e5", "1e5x", "1e-6", "1e"]


def test_a_date_is_the_name_of_a_folder(tmp_path: Path) -> None:
    assert yaml(tmp_path, "[2024-01-31, 2024-13-45]") == ["2024-01-31", "2024-13-45"]


def test_aliases_and_merged_sections_are_fine(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, x: 3}\n"
    assert yaml(tmp_path, text) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 2}, "c": {"x": 3, "y": 2}}


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    assert JobSpec.load(job(tmp_path, b"\xef\xbb\xbf" + SMALLEST.encode())).store == "runs/mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("store: a\nstore: b\n", ", line 2, column 1: cannot be read as YAML: 'store' is given twice, first in line 1"),
        ("data: {train: a, size: 8,\n  'train': b}", ", line 2, column 3: cannot be read as YAML: 'train' is given tw"),
        ("store: a\n\tdata: b", ", line 2, column 1: cannot be read as YAML: while scanning for the next token, found"),
        ("store: [a", ", line 1, column 10: cannot be read as YAML: while parsing a flow"),
        ("store: a: b", ", line 1, column 9: cannot be read as YAML: mapping values are not allowed here"),
        (
            "? [a, b]\n: 3",
            ", line 1, column 3: cannot be read as YAML: while constructing a mapping, found unhashable k",
        ),
        ("{[a]: 3}", ", line 1, column 2: cannot be read as YAML: while constructing a mapping, found unhashable key"),
        ("a: *b", ", line 1, column 4: cannot be read as YAML: found undefined alias 'b'"),
        (
            "a: 1\n---\na: 2",
            ", line 2, column 1: cannot be read as YAML: expected a single document in the stream, but",
        ),
        (
            "a: !!python/object:os.system x",
            ", line 1, column 4: cannot be read as YAML: could not determine a construc",
        ),
        ("a: !!int x", ": cannot be read as YAML: invalid literal for int()"),
        ("a: \x00", ": cannot be read as YAML: unacceptable character #x0000: special characters are not allowed"),
        ("[" * 5000, ": cannot be read as YAML: it is nested too deep"),
        ("", ": the job file is empty; it needs at least `store` and `data.train`"),
        ("# nothing yet\n", ": the job file is empty; it needs at least `store` and `data.train`"),
        (b"store: \xff", ": byte 7 is not UTF-8; save the file as UTF-8 text"),
        ("store: a".encode("utf-16"), ": byte 0 is not UTF-8; save the file as UTF-8 text"),
    ],
)
def test_what_is_no_clear_yaml_is_refused_with_its_place(tmp_path: Path, text: str | bytes, words: str) -> None:
    assert words in refused(job(tmp_path, text))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "missing.yaml") == ": cannot be read: No such file or directory"
    assert refused(tmp_path) == ": cannot be read: Is a directory"


# ---------------------------------------------------------------------------------------------------- wrong fields


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("store: runs/a", "data: this field is required; give a section with the fields train, test, test_fraction, "),
        ("data: {train: a}", "store: this field is required; give a path or URL"),
        ("store: a\ndata: {}", "data.train: this field is required; give a path or URL"),
        ("store: a\ndata: null", "data: nothing (null) is not allowed; it must be a section with the fields train, te"),
        ("store: a\ndata: folder", "data: 'folder' is not allowed; it must be a section with the fields train, test, "),
        ("store: a\ndata: {train: null}", "data.train: nothing (null) is not allowed; it must be a path or URL"),
        ("store: ''\ndata: {train: a}", "store: '' is not allowed; it must be a path or URL"),
        ("store: a\ndata: {train: 2024}", "data.train: 2024 is not allowed; it must be a path or URL; a number that "),
        ("- store\n- data", "['store', 'data'] is not allowed; it must be a section with the fields store, data, "),
        (
            "a job",
            "'a job' is not allowed; it must be a section with the fields store, data, network, gram, resources",
        ),
    ],
)
def test_a_job_without_what_it_needs_is_refused(tmp_path: Path, text: str, words: str) -> None:
    assert refused(job(tmp_path, text)).startswith(f": {words}")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("netwrok: {depth: 3}", "netwrok: no such field; did you mean 'network'? Allowed here: store, data, network, "),
        ("dtype: float64", "dtype: no such field; did you mean gram.dtype? Allowed here: store, data, network, gram, "),
        ("network: {dept: 3}", "network.dept: no such field; did you mean 'depth'? Allowed here: depth, filter_size, "),
        ("network: {group: C4}", "network.group: no such field; did you mean gram.groups? Allowed here: depth, filter"),
        ("gram: {kernel: ntk}", "gram.kernel: no such field; did you mean 'kernels'? Allowed here: groups, kernels, "),
        (
            "resources: {cpu: 1}",
            "resources.cpu: no such field. Allowed here: workers, cpus_per_worker, gpus_per_worker",
        ),
        (
            "solve: {ridges: 1}",
            "solve.ridges: no such field; did you mean 'ridge'? Allowed here: ridge, choose, folds, kernels, trai",
        ),
        (
            "solve: {store: b}",
            "solve.store: no such field; it belongs to the top level. Allowed here: ridge, choose, folds, kernels",
        ),
        ("gram: {1: 2}", "gram: 1 is not the name of a field. Allowed here: groups, kernels, dtype, tile, compression"),
    ],
)
def test_an_unknown_field_is_refused_with_a_suggestion(tmp_path: Path, more: str, words: str) -> None:
    assert refused(job(tmp_path, SMALLEST + more)).startswith(f": {words}")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            "network: 3",
            "network: 3 is not allowed; it must be a section with the fields depth, filter_size, layers, pad",
        ),
        ("network: {depth: '3'}", "network.depth: '3' is not allowed; it must be a whole number from 1 to 1000"),
        ("network: {depth: 2.5}", "network.depth: 2.5 is not allowed; it must be a whole number from 1 to 1000"),
        ("network: {filter_size: 4}", "network.filter_size: 4 is even, and an even filter has no centre pixel to rota"),
        ("network: {padding: FULL}", "network.padding: 'FULL' is not allowed; choose 'SAME', 'VALID' or 'CIRCULAR'"),
        ("network: {activation: rleu}", "network.activation: 'rleu' is not allowed; choose relu, leaky_relu(a), abs,"),
        ("network: {w_std: yes}", "network.w_std: True is not allowed; it must be a number above 0 and up to 1000000"),
        ("solve: {variances: maybe}", "solve.variances: 'maybe' is not allowed; it must be true or false"),
        ("network: {head: [relu, tanh]}", "network.head[1]: 'tanh' is not allowed; choose relu, leaky_relu(a), abs,"),
        ("gram: {groups: []}", "gram.groups: the list is empty; name at least one"),
        ("gram: {groups: [C1, C1]}", "gram.groups: 'C1' is named twice; name each once"),
        (
            "gram: {kernels: [NTK]}",
            "gram.kernels[0]: 'NTK' is not allowed; choose 'nngp' or 'ntk'; did you mean 'ntk'?",
        ),
        ("gram: {dtype: float16}", "gram.dtype: 'float16' is not allowed; choose 'float32' or 'float64'"),
        (
            "network: {layers: [{kind: conv}, {kind: avg_pool, size: 2}]}\ngram: {engine: xla}",
            "gram.engine: the engine 'xla' cannot do this network: the pooling layers[1] does not keep the offset",
        ),
        ("gram: {engine: tpu}", "gram.engine: 'tpu' is not allowed; choose 'auto', 'cpu', 'gpu', 'xla', 'general' or "),
        ("gram: {tile: foo}", "gram.tile: 'foo' is not allowed; choose 'auto' or a whole number from 1 to 65536"),
        ("gram: {tile: 0}", "gram.tile: 0 is not allowed; choose 'auto' or a whole number from 1 to 65536"),
        ("resources: {workers: -1}", "resources.workers: -1 is not allowed; choose 'auto' or a whole number from 0 to"),
        (
            "resources: {cpus_per_worker: 0}",
            "resources.cpus_per_worker: 0 is not allowed; it must be a whole number from 1 to 1024",
        ),
        (
            "resources: {gpus_per_worker: -1}",
            "resources.gpus_per_worker: -1 is not allowed; it must be a number from 0 to 64",
        ),
        (
            "resources: {gpus_per_worker: 1.5}",
            "resources.gpus_per_worker: 1.5 GPUs cannot be had: it is a fraction of one, or a whole number",
        ),
        (
            "resources: {gpus_per_worker: 1}\ngram: {engine: cpu}",
            "resources.gpus_per_worker = 1, but the engine 'cpu' runs on CPUs only; leave it out, or choose",
        ),
        (
            "resources: {address: 6379}",
            "resources.address: 6379 is not allowed; it must be host:port, ray://host:port or ",
        ),
        (
            "solve: 3",
            "solve: 3 is not allowed; it must be null, or a section with the fields ridge, choose, folds, kernels, t",
        ),
        ("solve: {ridge: -1}", "solve.ridge[0]: -1 is not allowed; it must be a number of 0 or more"),
        ("solve: {ridge: .inf}", "solve.ridge[0]: inf is not allowed; it must be a number of 0 or more"),
        ("solve: {ridge: {a: 1}}", "solve.ridge: {'a': 1} is not allowed; it must be a list of numbers of 0 or more"),
        ("solve: {train_sizes: [4, 0]}", "solve.train_sizes[1]: 0 is not allowed; it must be a whole number of 1 or "),
        ("gram: {kernels: nngp}\nsolve: {kernels: ntk}", "solve.kernels names 'ntk', which gram.kernels = ['nngp'] do"),
        ("gram: &gram {tile: *gram}", "gram.tile: {'tile': {'tile': {...}}} is not allowed; choose 'auto' or a whole "),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(tmp_path: Path, more: str, words: str) -> None:
    assert refused(job(tmp_path, SMALLEST + more)).startswith(f": {words}")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("test: b, test_fraction: 0.2", "data: test = 'b' and test_fraction = 0.2 both name the test images; keep one"),
        ("test_labels: y.npy", "data: test_labels = 'y.npy' has no test images to label; set test"),
        ("test_fraction: 1", "data.test_fraction: 1 is not allowed; it must be a number above 0 and below 1, or null"),
        ("size: 0", "data.size: 0 is not allowed; it must be a whole number from 1 to 4096, or null"),
        ("crop: top", "data.crop: 'top' is not allowed; choose 'center', or null"),
        ("color: grey", "data.color: 'grey' is not allowed; choose 'auto', 'gray' or 'rgb'; did you mean 'gray'?"),
        ("normalize: false", "data.normalize: False is not allowed; choose 'per_channel' or 'none'"),
        ("per_class: all", "data.per_class: 'all' is not allowed; it must be a whole number of 1 or more, or null"),
        ("seed: -1", "data.seed: -1 is not allowed; it must be a whole number of 0 or more"),
    ],
)
def test_wrong_data_fields_are_refused(tmp_path: Path, fields: str, words: str) -> None:
    assert refused(job(tmp_path, f"store: a\ndata: {{train: a, {fields}}}")) == f": {words}"


def test_every_wrong_field_is_named_in_a_line_of_its_own(tmp_path: Path) -> None:
    path = job(tmp_path, "store: 3\ndata: {train: a, sise: 3}\ngram: {tile: 0, groups: C0}\n")
    with pytest.raises(SpecError) as caught:
        JobSpec.load(path)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        [str(path), field] for field in ("store", "data.sise", "gram.groups[0]", "gram.tile")
    ]


@pytest.mark.parametrize(
    ("sections", "engine"),
    [
        ({}, "cpu"),
        ({"resources": {"gpus_per_worker": 0.5}}, "gpu"),
        ({"gram": {"groups": ["C4", "C8"]}}, "cpu"),
        ({"gram": {"groups": ["C8"]}, "resources": {"gpus_per_worker": 1}}, "general"),
        ({"network": {"layers": [{"kind": "conv"}, {"kind": "avg_pool", "size": 2}]}}, "general"),
        ({"gram": {"engine": "reference"}}, "reference"),
    ],
)
def test_the_engine_depends_on_the_job_alone(sections: dict[str, Any], engine: str) -> None:
    spec = JobSpec.parse({"store": "runs/x", "data": {"train": "x.npz"}, **sections})
    assert spec.engine_for(spec.gram.passes[0].groups) == engine


@pytest.mark.parametrize(("width", "name"), [(8, "gpu"), (300, "cpu")])
def test_what_plans_and_checks_takes_another_engine_where_workers_do(
    width: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here as if there were a GPU: rows of 300 pixels are too wide for its engine."""
    chosen = kernels._engine
    monkeypatch.setattr(specs, "why_no_gpu", str)
    monkeypatch.setattr(kernels, "why_no_gpu", str)
    monkeypatch.setattr(kernels, "_free_memory", lambda _: 10**10)
    monkeypatch.setattr(
        kernels,
        "_engine",
        lambda name, network, groups, dtype, threads, memory: (
            GpuEngine(network, groups, dtype, memory, SimpleNamespace())
            if name == "gpu"
            else chosen(name, network, groups, dtype, threads, memory)
        ),
    )
    spec = JobSpec.parse({"store": "x", "data": {"train": "x.npz"}, "resources": {"gpus_per_worker": 1}})
    assert spec.function_here(("C1",), (8, width, 1)).engine.name == name
    asked = spec.model_copy(update={"gram": GramSpec(engine="gpu")})
    if name == "cpu":
        with pytest.raises(EngineError, match="rows of 300 pixels are too wide, the most is 256; use engine='auto'"):
            asked.function_here(("C1",), (8, width, 1))


@pytest.mark.parametrize(("jax", "name"), [(True, "xla"), (False, "cpu")])
@pytest.mark.parametrize("engine", ["auto", "gpu"])
def test_a_machine_without_the_gpus_of_the_workers_takes_the_best_that_it_has(
    jax: bool, name: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specs, "why_no_gpu", lambda: "there is none")
    monkeypatch.setattr(specs, "jax_has_gpu", lambda: jax)
    gram, resources = {"engine": engine}, {"gpus_per_worker": 1}
    spec = JobSpec.parse({"store": "x", "data": {"train": "x.npz"}, "gram": gram, "resources": resources})
    assert spec.engine_here(("C1",)) == name
    if engine == "gpu":
        with pytest.raises(EngineError, match="rows of 300 pixels are too wide, the most is 256"):
            spec.function_here(("C1",), (8, 300, 1))
