"""The network as a validated value. It knows nothing of how its kernels are computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, overload

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from equikernel import groups
from equikernel.errors import ImageError, NetworkError, suggestion
from equikernel.fields import describe
from equikernel.groups import GroupName

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import ArrayLike

    from equikernel.kernel import Kernel

Padding = Literal["SAME", "VALID", "CIRCULAR"]
ActivationName = Literal["relu", "erf"]


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError(
            f"{value} is even, and an even filter has no centre pixel to rotate about; use {value - 1} or {value + 1}"
        )
    return value


class Architecture(BaseModel):
    """An infinitely wide convolutional network, but for its symmetry group.

    ``depth`` convolutions, each followed by the activation, then the mean over pixels (and rotations), then one
    dense layer with activation per name in ``head``, then a linear dense read-out with one output. NTK
    parameterization: every convolution and dense layer multiplies its mean by ``w_std²`` and adds ``b_std²``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    depth: int = Field(
        default=3,
        ge=1,
        le=1000,
        strict=True,
        description="Number of convolutions, of which the first is the lifting layer.",
    )
    filter_size: Annotated[int, AfterValidator(_odd), "an odd number of 1 or more"] = Field(
        default=3, ge=1, strict=True, description="Side of the square filters in pixels."
    )
    padding: Padding = Field(
        default="SAME",
        description="Beyond the border a filter sees zeros (``SAME``) or the opposite side (``CIRCULAR``), or it stays "
        "within (``VALID``), and images shrink.",
    )
    activation: ActivationName = Field(default="relu", description="Activation after every convolution.")
    w_std: float = Field(default=1.0, gt=0, le=1e6, strict=True, description="Standard deviation of the weights.")
    b_std: float = Field(default=0.0, ge=0, le=1e6, strict=True, description="Standard deviation of the biases.")
    head: tuple[ActivationName, ...] = Field(
        default=(), description="Activation of each hidden dense layer after the pooling."
    )

    @field_validator("depth", "filter_size", "w_std", "b_std", mode="before")
    @classmethod
    def _plain_number(cls, value: Any) -> Any:
        return value.item() if isinstance(value, np.generic) else value

    @field_validator("head", mode="before")
    @classmethod
    def _one_layer_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @property
    def radius(self) -> int:
        """Pixels the filter reaches beyond its centre: ``(filter_size - 1) / 2``."""
        return self.filter_size // 2

    @property
    def margin(self) -> int:
        """Pixels that the convolutions take off each border: ``depth · radius`` for VALID padding, else 0."""
        return self.depth * self.radius if self.padding == "VALID" else 0

    def check_images(self, height: int, width: int, group: str = "C1") -> None:
        """Raise :class:`NetworkError` or :class:`ImageError` unless the network is defined on ``height x width``."""
        if groups.needs_square_images(group) and height != width:
            raise ImageError(
                f"images are {height}x{width} pixels, but {group} turns them by quarter turns and needs square ones; "
                f"crop them to {min(height, width)}x{min(height, width)}, or use the group C1, C2, D1 or D2"
            )
        smallest = min(height, width)
        if smallest <= 2 * self.margin:
            shallower = (smallest - 1) // (2 * self.radius)
            remedy = f"use depth <= {shallower}, " if shallower >= 1 else "use a smaller filter, "
            raise NetworkError(
                f"VALID padding eats the image: {self.depth} convolutions of size {self.filter_size} remove "
                f"{2 * self.margin} of {smallest} pixels per side; {remedy}or padding SAME, or larger images"
            )
        if self.padding == "CIRCULAR" and smallest < self.filter_size:
            raise NetworkError(
                f"CIRCULAR padding: a filter of size {self.filter_size} wraps around an image of {smallest} pixels "
                f"more than once; use filter_size <= {smallest - 1 + smallest % 2}"
            )


class GroupCNN(Architecture):
    """An infinitely wide group convolutional network over ``G ⋉ R²`` with group pooling.

    ``G`` are rotations of the plane by multiples of ``2π/n`` (``C_n``), or these and ``n`` reflections (``D_n``): D1
    has the left-right mirror image, D2 also the up-down one, D4 also those on the diagonals. ``C1`` is the plain CNN
    with global average pooling. Source: Misof, Kessel and Gerken, *Equivariant Neural Tangent Kernels*, arXiv
    2406.06504.

    >>> net = GroupCNN(group="C4", depth=2)
    >>> k = net.kernel(images, dtype="float64")     # k.nngp, k.ntk: (n, n) arrays
    """

    group: GroupName = Field(default="C4", description="Rotations and reflections that the network is equivariant to.")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise NetworkError(describe(error, type(self))) from None

    # pydantic calls an overridden __init__ also for nested fields, where its own errors name the place better.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @overload
    def kernel(
        self,
        x1: ArrayLike,
        x2: ArrayLike | None = None,
        engine: str = "auto",
        dtype: Any = "float32",
        *,
        threads: int | None = None,
    ) -> Kernel: ...
    @overload
    def kernel(
        self,
        x1: ArrayLike,
        x2: ArrayLike | None = None,
        engine: str = "auto",
        dtype: Any = "float32",
        *,
        groups: Iterable[str],
        threads: int | None = None,
    ) -> dict[str, Kernel]: ...
    def kernel(
        self,
        x1: ArrayLike,
        x2: ArrayLike | None = None,
        engine: str = "auto",
        dtype: Any = "float32",
        *,
        groups: Iterable[str] | None = None,
        threads: int | None = None,
    ) -> Kernel | dict[str, Kernel]:
        """The NNGP and NTK of this network on pairs of images.

        Args:
          x1: ``(n1, H, W, C)`` images, real and finite.
          x2: ``(n2, H, W, C)`` images; ``None`` means ``x1``, and computes each pair once.
          engine: ``"reference"`` the literal recursion in float64, slow; ``"cpu"`` the fast exact engine; ``"auto"``
            the best one for this machine.
          dtype: ``"float32"`` or ``"float64"``, the precision of the fast engines. ``"reference"`` accepts any dtype
            and always computes and returns float64.
          groups: compute the networks over these groups, instead of ``self.group``, all in one pass at the cost of
            their union: ``("C1", "C4")`` costs as much as C4 alone.
          threads: CPU threads of the engine ``"cpu"``; ``None`` means all cores this process may use. They change the
            time and not the bits.

        Returns:
          ``k`` with ``k.nngp`` and ``k.ntk``, ``(n1, n2)`` arrays of ``dtype``, without units. Both are symmetric
          to the bit when ``x2`` is ``None``. With ``groups`` a dictionary of them, by group.

        Raises:
          ImageError: wrong shapes, unequal sizes or channels, NaN or infinite pixels, non-square images for C4.
          NetworkError: the network does not fit the images (VALID padding that leaves no pixel), or no such group.
          EngineError: no such engine or dtype, or less than one thread.
          KeyboardInterrupt: within a second or the time of one pair after Ctrl-C.
          NonFiniteKernelError: the result overflows ``dtype``.
        """
        from equikernel.kernel import compute

        if groups is None:
            return compute(self, (self.group,), x1, x2, engine=engine, dtype=dtype, threads=threads)[self.group]
        return compute(self, _checked_groups(groups), x1, x2, engine=engine, dtype=dtype, threads=threads)


def _checked_groups(names: Iterable[str]) -> tuple[str, ...]:
    given = (names,) if isinstance(names, str) else tuple(names)
    choices = ", ".join(groups.GROUPS)
    if not given:
        raise NetworkError(f"groups: the list is empty; choose of {choices}")
    for name in given:
        if name not in groups.GROUPS:
            hint = suggestion(name, groups.GROUPS)
            raise NetworkError(f"groups: {name!r} is not allowed; choose of {choices}{hint}")
    return tuple(dict.fromkeys(given))
