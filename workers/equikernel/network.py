"""The network as a validated value. It knows nothing of how its kernels are computed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Self, overload

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from equikernel import geometry, groups
from equikernel.activations import Activation, Custom, parse
from equikernel.errors import ImageError, NetworkError, either, suggestion
from equikernel.fields import describe
from equikernel.layers import (
    ActivationName,
    AnyLayer,
    Branch,
    Conv,
    Convolution,
    Nonlinearity,
    Number,
    Padding,
    Pooling,
    Step,
    Whole,
    convolutions,
    lower,
    nonlinearities,
    odd,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike

    from equikernel.kernel import Explanation, Kernel


class Architecture(BaseModel):
    """An infinitely wide convolutional network, but for its symmetry group.

    ``depth`` equal convolutions, each followed by the activation, or any ``layers``; then the mean over pixels (and
    rotations), then one dense layer with activation per name in ``head``, then a linear dense read-out with one output.
    NTK parameterization: every convolution and dense layer multiplies its mean by ``w_std²`` and adds ``b_std²``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, ignored_types=(cached_property,))

    depth: Whole = Field(
        default=3,
        ge=1,
        le=1000,
        strict=True,
        description="Number of convolutions, of which the first is the lifting layer.",
    )
    filter_size: Annotated[Whole, AfterValidator(odd), "an odd number of 1 or more"] = Field(
        default=3, ge=1, strict=True, description="Side of the square filters in pixels."
    )
    layers: Annotated[tuple[AnyLayer, ...] | None, "a list of layers"] = Field(
        default=None, description="Layers of any kind instead of ``depth`` and ``filter_size``; first a convolution."
    )
    padding: Padding = Field(
        default="SAME",
        description="Beyond the border a filter sees zeros (``SAME``) or the opposite side (``CIRCULAR``), or it stays "
        "within (``VALID``), and images shrink.",
    )
    activation: ActivationName = Field(
        default="relu", description="Activation after every convolution that does not say otherwise."
    )
    w_std: Number = Field(default=1.0, gt=0, le=1e6, strict=True, description="Standard deviation of the weights.")
    b_std: Number = Field(default=0.0, ge=0, le=1e6, strict=True, description="Standard deviation of the biases.")
    head: tuple[ActivationName, ...] = Field(
        default=(), description="Activation of each hidden dense layer after the pooling."
    )

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise NetworkError(describe(error, type(self))) from None

    # pydantic calls an overridden __init__ also for nested fields, where its own errors name the place better.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @field_validator("head", "layers", mode="before")
    @classmethod
    def _one_layer_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (str, Custom, BaseModel)) else value

    @model_validator(mode="after")
    def _layers_make_a_network(self) -> Self:
        if self.layers is None:
            return self
        both = sorted({"depth", "filter_size"} & self.model_fields_set)
        if both:
            raise ValueError(f"layers and {both[0]} = {getattr(self, both[0])} both say which convolutions; keep one")
        if not self.layers or not isinstance(self.layers[0], Conv):
            given = self.layers[0].kind if self.layers else "nothing"
            raise ValueError(f"layers[0] is {given}, but the first layer is the lifting convolution; begin with a Conv")
        _check_branches(self.steps, self.padding)
        _check_strides(self.convolutions, self.padding)
        _check_gaussian(self.steps, "")
        return self

    @model_serializer(mode="wrap")
    def _either_layers_or_depth(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        for name in ("layers",) if self.layers is None else ("depth", "filter_size"):
            fields.pop(name, None)
        return fields

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A network with other values for the fields in ``update``, validated like any; nothing else is shared.

        Raises:
          NetworkError: the new values make no network.
        """
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **(update or {})})

    def with_group(self, group: str) -> GroupCNN:
        """The network of this architecture over ``group``.

        Raises:
          NetworkError: there is no such group.
        """
        fields = {name: getattr(self, name) for name in self.model_fields_set if name != "group"}
        return GroupCNN(group=group, **fields)

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The elementary steps up to the group pooling."""
        if self.layers is not None:
            return lower(self.layers, self.w_std, self.b_std, self.activation, lambda i: f"layers[{i}]")
        equal = Conv(self.filter_size)
        return lower((equal,) * self.depth, self.w_std, self.b_std, self.activation, lambda i: f"convolution {i + 1}")

    @property
    def convolutions(self) -> tuple[Convolution, ...]:
        """All convolutions, those in residual branches included."""
        return tuple(convolutions(self.steps))

    @property
    def activations(self) -> tuple[Activation, ...]:
        """The activation of each nonlinearity before the pooling, in the order of computation."""
        return tuple(step.activation for step in nonlinearities(self.steps))

    @cached_property
    def head_activations(self) -> tuple[Activation, ...]:
        """The activations of the head."""
        return tuple(given if isinstance(given, Custom) else parse(given) for given in self.head)

    @property
    def margin(self) -> tuple[int, int]:
        """Pixels that convolutions take off each border, rows and columns: 0 unless the padding is VALID."""
        return geometry.margin(self.steps, self.padding)

    def fits(self, height: int, width: int, *names: str) -> bool:
        """Whether the networks over these groups are defined on images of ``height x width`` pixels."""
        try:
            self.check_images(height, width, *names)
        except (ImageError, NetworkError):
            return False
        return True

    def check_images(self, height: int, width: int, *names: str) -> None:
        """Refuse images of ``height x width`` pixels on which the network over one of some groups is not defined.

        Every size that is named as a remedy works for all of them.

        Raises:
          NetworkError: a filter or stride breaks the symmetry, or a layer does not fit.
          ImageError: the images are no squares, and a group turns them by other than half turns.
        """
        turning = next((name for name in names if not groups.keeps_rectangles(name)), None)
        if turning:
            self._check_filters(height, width, turning)
        if turning and height != width:
            raise ImageError(
                f"images are {height}x{width} pixels, but {turning} turns them by other than half turns and needs "
                f"square ones; {self._square_remedy(height, width, names)}"
            )
        errors = [self._misfit(side, axis, names) for axis, side in enumerate((height, width))]
        if any(errors):
            axes = ["sides"] if turning else ["heights", "widths"]
            raise NetworkError(self._with_remedy([error or "" for error in errors], (height, width), axes, names))

    def _check_filters(self, height: int, width: int, turning: str) -> None:
        """Refuse filters that are no squares, for a group that turns them by other than half turns."""
        for step in self.convolutions:
            if step.radii[0] != step.radii[1]:
                sides = tuple(2 * radius + 1 for radius in step.radii)
                remedies = ["a square filter", *self._other_groups(height, width)]
                raise NetworkError(
                    f"{step.place}: a filter of {sides[0]}x{sides[1]} pixels is no square, and {turning} turns it; use "
                    f"{', or '.join(remedies)}"
                )

    def _misfit(self, side: int, axis: int, names: tuple[str, ...]) -> str | None:
        """Why ``side`` pixels along ``axis`` do not fit, if so."""
        try:
            for name in names:
                geometry.trace(self.steps, side, axis, name, self.padding)
        except NetworkError as error:
            return str(error)
        return None

    def _other_groups(self, height: int, width: int) -> list[str]:
        """Groups that keep rectangles and whose networks are defined on these images, as a remedy."""
        others = [name for name in ("C1", "C2", "D1", "D2") if self.fits(height, width, name)]
        return [f"the group {either(others)}"] if others else []

    def _square_remedy(self, height: int, width: int, names: tuple[str, ...]) -> str:
        """What to do about images that are no squares."""
        short = min(height, width)
        sides = geometry.nearest_sides(lambda side: not self._misfit(side, 0, names), short + 1)
        remedies = [f"crop them to {side}x{side}" for side in sides if side <= short]
        remedies += [f"use {one}" for one in self._other_groups(height, width)]
        larger = [
            f"use larger ones: none within {short}x{short} fits this network, {side}x{side} does" for side in sides
        ]
        return ", or ".join(remedies or larger or [f"no square up to {geometry.SEARCHED} pixels a side fits"])

    def _with_remedy(self, errors: list[str], sides: tuple[int, int], axes: list[str], names: tuple[str, ...]) -> str:
        """What is wrong with ``sides``, by axis, and the nearest sides that work."""
        if self.layers is None and self.padding == "VALID":
            return self._eaten(min(sides), names)

        def nearest(axis: int, name: str) -> str:
            found = geometry.nearest_sides(lambda side: not self._misfit(side, axis, names), sides[axis])
            return (
                f"nearest {name} that work: {either(found)}" if found else f"no {name} up to {geometry.SEARCHED} work"
            )

        remedies = [nearest(axis, name) for axis, name in enumerate(axes) if errors[axis]]
        return "; ".join([errors[0] or errors[1], *remedies])

    def _eaten(self, side: int, names: tuple[str, ...]) -> str:
        """VALID convolutions that leave nothing of images of ``side`` pixels, and what would."""
        shrunk = max(sum(2 * groups.reach(name, step.radii)[0] for step in self.convolutions) for name in names)
        shallower = (side - 1) * self.depth // shrunk
        return (
            f"VALID padding eats the image: {self.depth} convolutions of size {self.filter_size} remove {shrunk} of "
            f"{side} pixels per side; use {f'depth <= {shallower}' if shallower else 'a smaller filter'}, or padding "
            f"SAME, or images of {shrunk + 1} pixels or more"
        )


def _check_branches(steps: tuple[Step, ...], padding: Padding) -> None:
    """Refuse a residual branch that does not end in a convolution, or whose output has another size than its input."""
    for step in steps:
        if isinstance(step, Branch):
            if not step.steps or not isinstance(step.steps[-1], Convolution):
                raise ValueError(
                    f"{step.place}: a residual branch ends in a convolution without activation, whose fresh weights "
                    "make it independent of its input; end with Conv(activation='identity')"
                )
            _check_sizes(step.steps, padding)
            _check_branches(step.steps, padding)


def _check_sizes(branch: tuple[Step, ...], padding: Padding) -> None:
    for step in branch:
        found = ""
        if isinstance(step, Pooling):
            found = f"blocks of {step.size} pixels make"
        elif isinstance(step, Convolution) and step.stride > 1:
            found = f"a stride of {step.stride} makes"
        elif isinstance(step, Convolution) and padding == "VALID" and step.radii != (0, 0):
            found = f"a filter of {2 * step.radii[0] + 1}x{2 * step.radii[1] + 1} pixels with VALID padding makes"
        if found:
            raise ValueError(
                f"{step.place}: {found} fewer pixels, but a residual branch keeps the size of the image, to be "
                "added to it; use stride 1 and no pooling in it, and with VALID padding 1x1 filters"
            )


def _check_strides(steps: tuple[Convolution, ...], padding: Padding) -> None:
    for step in steps:
        if padding == "CIRCULAR" and step.stride > 1:
            raise ValueError(
                f"{step.place}: a stride of {step.stride} with CIRCULAR padding is not supported: of turned images "
                "it would see other pixels; use stride 1 and AvgPool, or padding SAME or VALID"
            )


def _check_gaussian(steps: tuple[Step, ...], spoilt: str) -> str:
    """Refuse an activation of features that are not Gaussian, whose dual kernels would be those of no network.

    Convolutions make Gaussian features, by their fresh weights; means over pixels and sums with a branch keep them so.

    Args:
      steps: of the network or of a branch.
      spoilt: the place of the activation after which the input is not Gaussian; empty if it is.

    Returns:
      The same for the output.
    """
    for step in steps:
        if isinstance(step, Convolution):
            spoilt = ""
        elif isinstance(step, Nonlinearity):
            if spoilt:
                raise ValueError(
                    f"{step.place}: {step.activation} acts on features that have passed the activation of {spoilt} and "
                    "no convolution since; they are not Gaussian, so no recursion of kernels is exact; put a Conv in "
                    f"between, or leave out the activation of {spoilt} (activation='identity')"
                )
            spoilt = step.place
        elif isinstance(step, Branch):
            _check_gaussian(step.steps, spoilt)
    return spoilt


def _group_name(value: str) -> str:
    if not groups.is_group(value):
        hint = "" if re.fullmatch(r"[CD]\d+", value) else suggestion(value, groups.GRID_GROUPS)
        raise ValueError(f"{value!r} is not allowed; choose {GROUP_CHOICES}{hint}")
    return value


GROUP_CHOICES = (
    f"{', '.join(groups.GRID_GROUPS)}, or for small images any other C_n or D_n with n up to {groups.LARGEST}"
)
GroupName = Annotated[str, AfterValidator(_group_name), GROUP_CHOICES]


class GroupCNN(Architecture):
    """An infinitely wide group convolutional network over ``G ⋉ R²`` with group pooling.

    ``G`` are rotations of the plane by multiples of ``2π/n`` (``C_n``), or these and ``n`` reflections (``D_n``): D1
    has the left-right mirror image, D2 also the up-down one, D4 also those on the diagonals. ``C1`` is the plain CNN
    with global average pooling. Groups other than C1, C2, C4, D1, D2 and D4 do not map pixels to pixels; their filters
    are rotated by bilinear interpolation, and their kernels need much memory. Source: Misof, Kessel and Gerken,
    *Equivariant Neural Tangent Kernels*, arXiv 2406.06504.

    >>> net = GroupCNN(group="C4", depth=2)
    >>> k = net.kernel(images, dtype="float64")     # k.nngp, k.ntk: (n, n) arrays
    >>> net = GroupCNN(group="D4", layers=[Conv(5), AvgPool(2), Residual([Conv(3), Conv(3)])])
    """

    group: GroupName = Field(default="C4", description="Rotations and reflections that the network is equivariant to.")

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def explain(self, image_shape: tuple[int, int, int], engine: str = "auto", dtype: Any = "float32") -> Explanation:
        """Which engine computes kernels of images ``(H, W, C)``, why, and what a pair costs; computes nothing.

        Raises:
          ImageError, NetworkError, EngineError: as :meth:`kernel`.
        """
        from equikernel.kernel import explain

        return explain(self, (self.group,), image_shape, engine=engine, dtype=dtype)

    @overload
    def kernel(
        self,
        x1: ArrayLike,
        x2: ArrayLike | None = None,
        engine: str = "auto",
        dtype: Any = "float32",
        *,
        threads: int | None = None,
        memory_limit: int | None = None,
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
        memory_limit: int | None = None,
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
        memory_limit: int | None = None,
    ) -> Kernel | dict[str, Kernel]:
        """The NNGP and NTK of this network on pairs of images.

        Args:
          x1: ``(n1, H, W, C)`` images, real and finite; integers and float16 are converted to ``dtype``.
          x2: ``(n2, H, W, C)`` images; ``None`` means ``x1``, and computes each pair once.
          engine: ``"cpu"`` fast and exact, ``"gpu"`` the same mathematics in one kernel for NVIDIA GPUs, ``"xla"`` in
            JAX for CPU and GPU, ``"general"`` any group and layer in JAX with dense covariances, ``"reference"`` the
            literal recursion in float64, slow; ``"auto"`` the best one for this network and machine, see
            :meth:`explain`.
          dtype: ``"float32"`` or ``"float64"``, the precision of the fast engines and of the result. ``"general"``
            computes in float64 always; ``"reference"`` accepts any dtype and returns float64.
          groups: compute the networks over these groups of C1, C2, C4, D1, D2 and D4, instead of ``self.group``, all in
            one pass at the cost of their union: ``("C1", "C4")`` costs as much as C4 alone.
          threads: CPU threads of the engine ``"cpu"``; ``None`` means all cores this process may use. They change the
            time and not the bits.
          memory_limit: bytes that the computation may use besides its result; ``None`` means half of what is free. The
            work is cut to fit.

        Returns:
          ``k`` with ``k.nngp`` and ``k.ntk``, ``(n1, n2)`` arrays of ``dtype``, without units, and ``k.engine``, the
          engine that computed them. Both are symmetric to the bit when ``x2`` is ``None``. With ``groups`` a dictionary
          of them, by group.

        Raises:
          ImageError: wrong shapes, unequal sizes or channels, NaN or infinite pixels, non-square images for C4.
          NetworkError: the network does not fit the images (VALID padding that leaves no pixel, a stride that breaks
            the symmetry), an activation without second moment, or no such group.
          EngineError: no such engine or dtype, an engine that cannot do this network, or less than one thread.
          MemoryLimitError: a single pair, or the result, does not fit in memory.
          KeyboardInterrupt: within a second after Ctrl-C.
          NonFiniteKernelError: the result overflows ``dtype``.
        """
        from equikernel.kernel import compute

        names = (self.group,) if groups is None else _checked_groups(groups)
        kernels = compute(self, names, x1, x2, engine=engine, dtype=dtype, threads=threads, memory_limit=memory_limit)
        return kernels[self.group] if groups is None else kernels


def _checked_groups(names: Iterable[str]) -> tuple[str, ...]:
    choices = ", ".join(groups.GRID_GROUPS)
    if not isinstance(names, Iterable):
        raise NetworkError(f"groups = {names!r} is no list of names; choose of {choices}")
    given = (names,) if isinstance(names, str) else tuple(names)
    if not given:
        raise NetworkError(f"groups: the list is empty; choose of {choices}")
    for name in given:
        if name not in groups.GRID_GROUPS:
            hint = suggestion(str(name), groups.GRID_GROUPS)
            alone = f"; it needs a pass of its own, GroupCNN(group={name!r})" if groups.is_group(str(name)) else hint
            raise NetworkError(f"groups: {name!r} is not allowed; choose of {choices}{alone}")
    return tuple(dict.fromkeys(given))
