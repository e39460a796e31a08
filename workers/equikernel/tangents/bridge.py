"""neural-tangents 0.6.5 on the current JAX, and without TensorFlow.

>>> from equikernel.tangents import neural_tangents, stax

The last release of neural-tangents imports names that JAX has removed since 0.5.3, and a package
(``neural_tangents.experimental``) that imports TensorFlow. This module supplies both while neural-tangents is imported
and takes them away again: nothing else in the process sees them. Once this module is imported, ``import
neural_tangents`` works anywhere in the process.

Works: ``stax``, ``predict``, ``batch``, ``monte_carlo_kernel_fn``, ``linearize``, ``taylor_expand``, and
``empirical_ntk_fn`` with the implementations ``JACOBIAN_CONTRACTION`` (the default) and ``NTK_VECTOR_PRODUCTS``. Does
not work, and is refused: the implementations ``STRUCTURED_DERIVATIVES`` and ``AUTO``, written against the removed
internals.
``neural_tangents.experimental`` is left out also where TensorFlow is installed; there ``import
neural_tangents.experimental`` adds it. Tested with JAX 0.10.2, 0.11.2 and 0.12.0.1.

No engine needs this module or neural-tangents, and ``cpu`` and ``reference`` do not need JAX either.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import jax.core
import jax.extend.core
import jax.interpreters.ad

from equikernel.errors import EquikernelError

__all__ = ["NeuralTangentsError", "neural_tangents", "stax"]

_SUPPORTED = "0.6.5"


class NeuralTangentsError(EquikernelError, ImportError):
    """neural-tangents is not installed, is another version, or does not import on this JAX."""


def _check_version() -> None:
    """Raise :class:`NeuralTangentsError` unless the one release that this module knows how to import is installed."""
    remedy = f"pip install neural-tangents=={_SUPPORTED}"
    try:
        installed = importlib.metadata.version("neural-tangents")
    except importlib.metadata.PackageNotFoundError:
        raise NeuralTangentsError(
            f"neural-tangents is not installed, and equikernel.tangents needs version {_SUPPORTED}; {remedy}"
        ) from None
    if installed != _SUPPORTED:
        raise NeuralTangentsError(
            f"neural-tangents {installed} is installed, but equikernel.tangents knows only how to import version "
            f"{_SUPPORTED} on jax {jax.__version__}; {remedy}"
        )


def _refuse_implementation(name: str) -> Callable[..., Any]:
    """What stands in for an implementation of the empirical NTK that needs internals which JAX has removed."""

    def refuse(**kwargs: Any) -> Any:
        raise NeuralTangentsError(
            f"the implementation {name} of empirical_ntk_fn needs internals of JAX that are gone since 0.5.3, and this "
            f"is jax {jax.__version__}; use NtkImplementation.JACOBIAN_CONTRACTION or NTK_VECTOR_PRODUCTS"
        )

    return refuse


def _safe_map(function: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
    return [function(*values) for values in zip(*arguments, strict=True)]


def _safe_zip(*arguments: Iterable[Any]) -> list[tuple[Any, ...]]:
    return list(zip(*arguments, strict=True))


@contextlib.contextmanager
def _removed_names() -> Iterator[None]:
    """Inside the context, what neural-tangents imports from JAX exists; afterwards JAX is as it was.

    A name that this JAX still has is left alone. None is needed after the import: the modules of neural-tangents hold
    their own references, and what they look up on ``jax.core`` later is in the parts that do not work anyway.
    """
    current = jax.extend.core
    removed: list[tuple[ModuleType, str, Any]] = [
        (jax.core, "Jaxpr", current.Jaxpr),
        (jax.core, "JaxprEqn", current.JaxprEqn),
        (jax.core, "Literal", current.Literal),
        (jax.core, "Primitive", current.Primitive),
        (jax.core, "Var", current.Var),
        # Only the key of a table entry: no program that this JAX traces contains the primitive.
        (jax.interpreters.ad, "zeros_like_p", current.Primitive("zeros_like")),
    ]
    util = ModuleType("jax.util")
    util.__dict__.update(safe_map=_safe_map, safe_zip=_safe_zip)
    modules = [ModuleType("neural_tangents.experimental")]
    if importlib.util.find_spec("jax.util") is None:
        modules.append(util)

    with contextlib.ExitStack() as undo:
        for module, name, value in removed:
            if not hasattr(module, name):
                setattr(module, name, value)
                undo.callback(delattr, module, name)
        for module in modules:
            if module.__name__ not in sys.modules:
                sys.modules[module.__name__] = module
                undo.callback(sys.modules.pop, module.__name__)
        yield


_check_version()
try:
    with _removed_names():
        import neural_tangents
        from neural_tangents import stax
        from neural_tangents._src.empirical import _implementation_to_ntk_fn
except (AttributeError, ImportError) as error:
    raise NeuralTangentsError(
        f"neural-tangents {_SUPPORTED} does not import on jax {jax.__version__}: {error}; "
        "use a version of jax that equikernel is tested with, 0.10.2 to 0.12"
    ) from error
for _implementation in (
    neural_tangents.NtkImplementation.STRUCTURED_DERIVATIVES,
    neural_tangents.NtkImplementation.AUTO,
):
    _implementation_to_ntk_fn[_implementation] = _refuse_implementation(_implementation.name)
# The empty package that stood in for it would only hide that it is left out.
vars(neural_tangents).pop("experimental", None)
