"""The layers of a network as validated values, and the elementary steps that every engine knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
)

from equikernel import activations
from equikernel.activations import Custom
from equikernel.errors import NetworkError
from equikernel.fields import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Padding = Literal["SAME", "VALID", "CIRCULAR"]


def _plain_number(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def odd(value: int) -> int:
    """Refuse even filter sides."""
    if value % 2 == 0:
        raise ValueError(
            f"{value} is even, and an even filter has no centre pixel to rotate about; use {value - 1} or {value + 1}"
        )
    return value


def _one_for_both(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    if isinstance(value, (int, float, np.number)):
        side, _ = handler((value, 1))  # one error, not two
        return side, side
    return handler(value)


def _some(layers: tuple[Any, ...]) -> tuple[Any, ...]:
    if not layers:
        raise ValueError("the branch is empty; give it layers, of which the last is a Conv")
    return layers


def _known_activation(value: Any) -> Any:
    if isinstance(value, Custom):
        return value
    if not isinstance(value, str):
        raise ValueError(
            f"{value!r} is not allowed; choose {activations.CHOICES}, or equikernel.Custom(function) in Python"
        )
    activation = activations.parse(value)
    return activation if isinstance(activation, Custom) else str(activation)


Number = Annotated[float, BeforeValidator(_plain_number)]
Whole = Annotated[int, BeforeValidator(_plain_number)]
Odd = Annotated[Whole, Field(ge=1, strict=True), AfterValidator(odd)]
ActivationName: TypeAlias = Annotated[
    Any,
    BeforeValidator(_known_activation),
    PlainSerializer(str, when_used="json"),
    WithJsonSchema({"type": "string"}),
    activations.CHOICES,
]
"""The name of an activation, ``"leaky_relu(0.1)"``, or a :class:`Custom` one."""


class _Layer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            lines = describe(error, type(self)).splitlines()
            raise NetworkError("\n".join(f"{type(self).__name__}: {line}" for line in lines)) from None

    # pydantic calls an overridden __init__ also for nested fields, where its own errors name the place better.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class Conv(_Layer):
    """A group convolution, the first one lifting, then an activation.

    >>> Conv(filter=5, stride=2, activation="gelu")

    What is not given is as in the network: weights, biases and activation.
    """

    kind: Literal["conv"] = "conv"
    filter: Annotated[tuple[Odd, Odd], WrapValidator(_one_for_both)] = Field(
        default=(3, 3), description="Rows and columns of the filter, odd; one for both."
    )
    stride: Annotated[Whole, Field(ge=1, strict=True)] = Field(
        default=1, description="Compute only every so many pixels."
    )
    w_std: Number | None = Field(default=None, gt=0, le=1e6, strict=True, description="Standard deviation of weights.")
    b_std: Number | None = Field(default=None, ge=0, le=1e6, strict=True, description="Standard deviation of biases.")
    activation: ActivationName | None = Field(
        default=None, description="Activation after the convolution; ``identity`` for none."
    )

    def __init__(self, filter: Any = (3, 3), **fields: Any) -> None:  # noqa: A002
        super().__init__(filter=filter, **fields)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class Activation(_Layer):
    """An activation by itself, for example in front of a convolution in a residual branch.

    Its input must be the output of a convolution, or a mean or sum of such: only these are Gaussian in the limit of
    infinite width, as the dual kernels assume. An activation of an activation is refused.

    >>> Activation("gelu")
    """

    kind: Literal["activation"] = "activation"
    activation: ActivationName = Field(description="The activation.")

    def __init__(self, activation: Any, **fields: Any) -> None:
        super().__init__(activation=activation, **fields)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class AvgPool(_Layer):
    """The mean over blocks of ``size x size`` pixels.

    >>> AvgPool(2)
    """

    kind: Literal["avg_pool"] = "avg_pool"
    size: Annotated[Whole, Field(ge=1, strict=True)] = Field(description="Side of the blocks.")

    def __init__(self, size: Any, **fields: Any) -> None:
        super().__init__(size=size, **fields)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class Residual(_Layer):
    """A branch whose output is added to its input: ``x + branch(x)``.

    Its last layer is a convolution, without activation unless it names one (which is refused): its fresh weights make
    branch and input uncorrelated, so their kernels add. It keeps the size of the image.

    An activation at its beginning needs a convolution without activation before the branch, see :class:`Activation`.

    >>> [Conv(3, activation="identity"), Residual([Activation("relu"), Conv(3)])]
    """

    kind: Literal["residual"] = "residual"
    layers: Annotated[tuple[AnyLayer, ...], AfterValidator(_some), "a list of layers"] = Field(
        description="The layers of the branch."
    )

    def __init__(self, layers: Any, **fields: Any) -> None:
        super().__init__(layers=(layers,) if isinstance(layers, _Layer) else layers, **fields)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def _kind(value: Any) -> Any:
    return value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)


AnyLayer = Annotated[
    Annotated[Conv, Tag("conv")]
    | Annotated[Activation, Tag("activation")]
    | Annotated[AvgPool, Tag("avg_pool")]
    | Annotated[Residual, Tag("residual")],
    Discriminator(
        _kind,
        custom_error_type="layer",
        custom_error_message="a layer is a Conv, Activation, AvgPool or Residual (in a job file a section with the "
        "field kind: conv, activation, avg_pool or residual)",
    ),
]
Residual.model_rebuild()


@dataclass(frozen=True)
class Convolution:
    """``K ← w² A(K) + b²``, ``Θ ← K + w² A(Θ)``, with ``A`` the mean over the filter support (and the group)."""

    place: str
    radii: tuple[int, int]
    stride: int
    w2: float
    b2: float


@dataclass(frozen=True)
class Nonlinearity:
    """``K ← E[σσ]``, ``Θ ← K̇ Θ``; of Gaussian features only, as convolutions make them."""

    activation: activations.Activation
    place: str


@dataclass(frozen=True)
class Pooling:
    """The mean over blocks of pixels."""

    place: str
    size: int


@dataclass(frozen=True)
class Branch:
    """Residual: the kernels of the steps are added to those of their input."""

    place: str
    steps: tuple[Step, ...]


Step: TypeAlias = Convolution | Nonlinearity | Pooling | Branch


def convolutions(steps: tuple[Step, ...]) -> Iterator[Convolution]:
    """All convolutions, in the order of computation."""
    for step in steps:
        if isinstance(step, Convolution):
            yield step
        elif isinstance(step, Branch):
            yield from convolutions(step.steps)


def nonlinearities(steps: tuple[Step, ...]) -> Iterator[Nonlinearity]:
    """All nonlinearities, in the order of computation."""
    for step in steps:
        if isinstance(step, Nonlinearity):
            yield step
        elif isinstance(step, Branch):
            yield from nonlinearities(step.steps)


def lower(
    layers: tuple[Any, ...], w_std: float, b_std: float, activation: Any, place: Callable[[int], str]
) -> tuple[Step, ...]:
    """The elementary steps of ``layers``; what they do not say is as given here."""
    steps: list[Step] = []
    for index, layer in enumerate(layers):
        here = place(index)
        match layer:
            case Conv():
                w = w_std if layer.w_std is None else layer.w_std
                b = b_std if layer.b_std is None else layer.b_std
                radii = (layer.filter[0] // 2, layer.filter[1] // 2)
                steps.append(Convolution(here, radii, layer.stride, w**2, b**2))
                steps += _nonlinearity(activation if layer.activation is None else layer.activation, here)
            case Activation():
                steps += _nonlinearity(layer.activation, here)
            case AvgPool():
                steps += [Pooling(here, layer.size)] if layer.size > 1 else []
            case Residual():
                *first, last = layer.layers
                if isinstance(last, Conv) and last.activation is None:
                    last = last.model_copy(update={"activation": "identity"})

                def inside(i: int, here: str = here) -> str:
                    return f"{here}.layers[{i}]"

                steps.append(Branch(here, lower((*first, last), w_std, b_std, activation, inside)))
    return tuple(steps)


def _nonlinearity(given: Any, place: str) -> list[Step]:
    activation = given if isinstance(given, Custom) else activations.parse(given)
    return [] if activation == activations.IDENTITY else [Nonlinearity(activation, place)]
