"""The neural-tangents bridge, and neural-tangents as an independent judge of the plain CNN."""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from equikernel import GroupCNN
from equikernel.tangents import NeuralTangentsError, bridge, neural_tangents, stax


def images(n: int, seed: int) -> Any:
    return np.random.default_rng(seed).normal(size=(n, 6, 6, 2)).astype(np.float32)


X1, X2 = images(3, seed=1), images(2, seed=2)


def run_python(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def stax_kernel(net: GroupCNN) -> Any:
    """The same plain CNN in neural-tangents, ``(nngp, ntk)`` of X1 against X2."""
    activations = {"relu": stax.Relu, "erf": stax.Erf}
    std = {"W_std": net.w_std, "b_std": net.b_std}
    layers = []
    for _ in range(net.depth):
        layers += [stax.Conv(1, (net.filter_size,) * 2, padding=net.padding, **std), activations[net.activation]()]
    layers.append(stax.GlobalAvgPool())
    for activation in net.head:
        layers += [stax.Dense(1, **std), activations[activation]()]
    _, _, kernel_fn = stax.serial(*layers, stax.Dense(1, **std))
    return jax.jit(lambda x1, x2: kernel_fn(x1, x2, ("nngp", "ntk")))(X1, X2)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR"])
def test_the_plain_cnn_is_that_of_neural_tangents(padding: str, activation: str, engine: str) -> None:
    net = GroupCNN(
        group="C1", depth=2, padding=padding, activation=activation, w_std=1.3, b_std=0.2, head=("relu", "erf")
    )
    kernel, expected = net.kernel(X1, X2, engine=engine), stax_kernel(net)
    assert_allclose(kernel.nngp, expected.nngp, rtol=1e-5)
    assert_allclose(kernel.ntk, expected.ntk, rtol=1e-5)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_a_deeper_cnn_without_biases_and_head_is_that_of_neural_tangents(engine: str) -> None:
    net = GroupCNN(group="C1", depth=4, filter_size=5)
    kernel, expected = net.kernel(X1, X2, engine=engine), stax_kernel(net)
    assert_allclose(kernel.nngp, expected.nngp, rtol=1e-5)
    assert_allclose(kernel.ntk, expected.ntk, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:size requires ndarray:DeprecationWarning")  # NTK_VECTOR_PRODUCTS, JAX >= 0.6
@pytest.mark.parametrize("implementation", ["JACOBIAN_CONTRACTION", "NTK_VECTOR_PRODUCTS"])
def test_empirical_kernels_of_neural_tangents_work(implementation: str) -> None:
    init_fn, apply_fn, _ = stax.serial(stax.Conv(4, (3, 3)), stax.Relu(), stax.GlobalAvgPool(), stax.Dense(1))
    _, params = init_fn(jax.random.key(0), X1.shape)
    ntk_fn = neural_tangents.empirical_ntk_fn(
        apply_fn, implementation=neural_tangents.NtkImplementation[implementation]
    )
    jacobian = jax.jacobian(lambda params: apply_fn(params, X1)[:, 0])(params)
    rows = np.concatenate([np.asarray(leaf).reshape(len(X1), -1) for leaf in jax.tree.leaves(jacobian)], axis=1)
    assert_allclose(ntk_fn(X1, None, params), rows @ rows.T, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["AUTO", "STRUCTURED_DERIVATIVES"])
def test_implementations_that_cannot_work_say_so(implementation: str) -> None:
    _, apply_fn, _ = stax.serial(stax.Dense(4), stax.Relu(), stax.Dense(1))
    message = f"the implementation {implementation} of empirical_ntk_fn needs internals of JAX that are gone"
    with pytest.raises(NeuralTangentsError, match=f"{message}.*use NtkImplementation.JACOBIAN_CONTRACTION"):
        neural_tangents.empirical_ntk_fn(apply_fn, implementation=neural_tangents.NtkImplementation[implementation])


def test_the_release_is_the_one_that_the_names_were_restored_for() -> None:
    assert neural_tangents.__version__ == "0.6.5"


def test_importing_the_bridge_warns_of_nothing_and_leaves_jax_as_it_was() -> None:
    run_python("""
import sys
import jax.core, jax.extend.core, jax.interpreters.ad
before = [set(vars(module)) for module in (jax.core, jax.extend.core, jax.interpreters.ad)]
from equikernel import tangents
after = [set(vars(module)) for module in (jax.core, jax.extend.core, jax.interpreters.ad)]
assert before == after, [b ^ a for b, a in zip(before, after)]
assert "jax.util" not in sys.modules
assert "tensorflow" not in sys.modules
assert "neural_tangents.experimental" not in sys.modules
import neural_tangents
assert neural_tangents is tangents.neural_tangents
""")


def test_kernels_need_neither_neural_tangents_nor_jax() -> None:
    run_python("""
import sys
import numpy as np
from equikernel import GroupCNN
for engine in ("reference", "cpu"):
    GroupCNN(group="C1", depth=1).kernel(np.ones((1, 4, 4, 1)), engine=engine)
assert "neural_tangents" not in sys.modules
assert "jax" not in sys.modules
""")


def test_another_release_is_refused_naming_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.6.4")
    with pytest.raises(NeuralTangentsError, match=r"neural-tangents 0\.6\.4 is installed.* version 0\.6\.5"):
        bridge._check_version()


def test_a_missing_neural_tangents_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"not installed.*pip install neural-tangents==0\.6\.5"):
        bridge._check_version()
