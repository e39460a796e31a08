"""What is imported when, and in which direction: a client stays light, and the mathematics knows no cluster."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import equigram
import equikernel

SERVICE = Path(equigram.__file__).parent
WORKERS = Path(equikernel.__file__).parent
HEAVY = {"jax", "jaxlib", "ray", "numba", "llvmlite", "zarr", "matplotlib", "scipy", "neural_tangents", "fsspec", "PIL"}


def loaded(code: str) -> set[str]:
    """The top-level modules that are loaded after ``code`` in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import equigram", HEAVY | {"numpy", "pydantic", "typer", "rich", "yaml"}),
        ("import equigram.cli", HEAVY | {"numpy", "pydantic", "yaml", "httpx"}),
        ("import equigram; equigram.Client, equigram.Job", HEAVY | {"fastapi", "uvicorn", "prometheus_client"}),
        ("import equigram; equigram.JobSpec, equigram.EquigramError", HEAVY),
        ("import equikernel; equikernel.GroupCNN(group='C4', depth=2)", HEAVY),
    ],
)
def test_heavy_packages_are_imported_only_where_they_are_needed(code: str, absent: set[str]) -> None:
    assert not loaded(code) & absent


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["predict", "--help"]])
def test_help_needs_no_heavy_package(arguments: list[str]) -> None:
    code = f"""
sys.argv = ['equigram', *{arguments!r}]
from equigram.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
"""
    assert not loaded(code) & (HEAVY | {"numpy"})


def test_a_kernel_needs_neither_a_cluster_nor_a_store() -> None:
    code = """
import numpy
import equikernel
images = numpy.eye(4).reshape(1, 4, 4, 1)
equikernel.GroupCNN(group='C4', depth=1).kernel(images, engine='reference')
"""
    assert not loaded(code) & {"ray", "zarr", "jax", "neural_tangents", "equigram"}


def test_the_names_of_the_package_are_all_there() -> None:
    assert {name for name in equigram.__all__ if getattr(equigram, name) is None} == set()
    with pytest.raises(AttributeError, match="module 'equigram' has no attribute 'Gram'"):
        equigram.Gram  # noqa: B018


def imported(path: Path) -> Iterator[str]:
    """The top-level packages that a module imports anywhere, also inside functions and for type checking."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield (node.module or "").partition(".")[0]


def modules(package: Path) -> list[Path]:
    found = sorted(package.rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("path", modules(WORKERS), ids=lambda path: str(path.relative_to(WORKERS)))
def test_the_mathematics_knows_neither_service_nor_cluster_nor_store(path: Path) -> None:
    assert not set(imported(path)) & {"equigram", "ray", "zarr", "fsspec", "typer", "rich"}


KNOW_JAX = {
    "equikernel/finite.py",
    "engines/xla.py",
    "engines/xla_planes.py",
    "engines/general.py",
    "engines/dense.py",
    "engines/device.py",
    "engines/functions.py",
    "equikernel/kernel.py",  # to ask for a GPU, where a plug-in for one is installed
    "equikernel/activations.py",  # to call a user's function in float64
}
"""Modules that import JAX; the last two only inside a function."""


@pytest.mark.parametrize("path", modules(SERVICE) + modules(WORKERS), ids=lambda path: path.name)
def test_only_the_bridge_knows_neural_tangents_and_few_modules_jax(path: Path) -> None:
    names = set(imported(path))
    bridge = path.is_relative_to(WORKERS / "tangents")
    assert "neural_tangents" not in names or bridge
    assert "jax" not in names or bridge or str(path.relative_to(path.parents[1])) in KNOW_JAX


@pytest.mark.parametrize("path", modules(SERVICE), ids=lambda path: str(path.relative_to(SERVICE)))
def test_one_module_draws_three_know_ray_and_four_know_zarr(path: Path) -> None:
    name, names = str(path.relative_to(SERVICE)), set(imported(path))
    assert "matplotlib" not in names or name == "plot.py"
    assert "ray" not in names or name in ("driver.py", "solve/cluster.py", "api/cluster.py")
    assert "zarr" not in names or name in ("store.py", "data/arrays.py", "export.py", "importing.py")
