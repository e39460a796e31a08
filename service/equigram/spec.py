"""The job file: one validated value that says everything about a run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from equigram.errors import SpecError
from equigram.yamlfile import read_yaml
from equikernel.activations import Custom
from equikernel.errors import EngineError
from equikernel.fields import describe
from equikernel.groups import on_grid
from equikernel.kernel import EngineName, KernelFunction, check_gpu, choose_engine, jax_has_gpu, why_no_gpu
from equikernel.network import Architecture, GroupCNN, GroupName

KernelName = Literal["nngp", "ntk"]


def _one_is_a_list(value: Any) -> Any:
    return [value] if isinstance(value, (int, float, str)) else value


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("the list is empty; name at least one")
    seen = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{value!r} is named twice; name each once")
        seen.add(value)
    return values


def _path_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _ray_address(value: str) -> str:
    try:
        parts = urlsplit(value if "//" in value else f"//{value}")
        fits = parts.scheme in ("", "ray") and bool(parts.hostname and parts.port)
    except ValueError:
        fits = False
    if not fits and value != "auto":
        raise ValueError(f"{value!r} is no Ray address; write host:port, ray://host:port or auto")
    return value


def _plain_labels(labels: dict[str, str]) -> dict[str, str]:
    for key, value in labels.items():
        if not re.fullmatch(r"[A-Za-z0-9]([\w./-]*[A-Za-z0-9])?", value):
            raise ValueError(f"{key} = {value!r} is no value of a label; write letters, digits, '-', '_' and '.'")
    return labels


Item = TypeVar("Item")
Several = Annotated[tuple[Item, ...], BeforeValidator(_one_is_a_list), AfterValidator(_distinct)]
Url = Annotated[str, BeforeValidator(_path_as_text), Field(min_length=1, max_length=4096), "a path or URL"]
Count = Annotated[int, Field(ge=1, strict=True)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class DataSpec(_Section):
    """Which images, and what is done to them before the kernels see them."""

    train: Url
    """Training images: a folder of class folders, an .npz, .npy or zarr; any fsspec URL."""
    test: Url | None = None
    """Test images, in the same forms. Without it and ``test_fraction``, an .npz's or zarr's own test images, if any."""
    test_fraction: float | None = Field(default=None, gt=0, lt=1, strict=True)
    """Share of each class of ``train`` (of all images without classes) held out as test images."""
    train_labels: Url | None = None
    """Labels of ``train`` when it is an array without any: (n,) integers for classes, (n,) or (n, k) float targets."""
    test_labels: Url | None = None
    """Labels of ``test`` when it is an array without any."""
    size: int | None = Field(default=None, ge=1, le=4096, strict=True)
    """Resize to ``size x size`` pixels, with anti-aliasing. Without it all images must have one size."""
    crop: Literal["center"] | None = None
    """``center``: cut images to their central square; without it, non-square ones are refused where needed."""
    color: Literal["auto", "gray", "rgb"] = "auto"
    """Channels: ``auto`` is rgb if any image file has colour, else gray. Arrays keep the channels they have."""
    normalize: Literal["per_channel", "none"] = "per_channel"
    """``per_channel``: subtract the mean and divide by the standard deviation of the training images' channels."""
    per_class: Count | None = None
    """Training images per class, chosen by ``seed``; all without it."""
    test_per_class: Count | None = None
    """Test images per class, chosen by ``seed``; all without it."""
    seed: int = Field(default=0, ge=0, strict=True)
    """Seed of every random choice."""

    @model_validator(mode="after")
    def _one_source_of_test_images(self) -> Self:
        if self.test is not None and self.test_fraction is not None:
            raise ValueError(
                f"test = {self.test!r} and test_fraction = {self.test_fraction} both name the test images; keep one"
            )
        if self.test_labels is not None and self.test is None:
            raise ValueError(f"test_labels = {self.test_labels!r} has no test images to label; set test")
        return self


@dataclass(frozen=True)
class Pass:
    """Matrices that are computed together, tile by tile: all kernels of all groups."""

    groups: tuple[str, ...]
    kernels: tuple[KernelName, ...]

    @property
    def matrices(self) -> list[tuple[str, str]]:
        """Group and kernel of each."""
        return [(group, kernel) for group in self.groups for kernel in self.kernels]


class GramSpec(_Section):
    """Which Gram matrices, and how they are computed."""

    groups: Several[GroupName] = ("C4",)
    """Symmetry groups. C1, C2, C4, D1, D2 and D4 come from one pass at the cost of the largest; every other one takes a
    pass of its own."""
    kernels: Several[KernelName] = ("nngp", "ntk")
    """Kernels to store."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the engine and of the stored matrices."""
    tile: Literal["auto"] | Annotated[int, Field(ge=1, le=65536, strict=True)] = "auto"
    """Edge of a tile in images; ``auto`` chooses it from the measured cost of a pair."""
    compression: Literal["none", "zstd"] = "none"
    """``zstd`` (with shuffled bytes) makes chunks of float32 about a fifth smaller. Then a chunk that was cut short
    shows when it is read, and not in a listing."""
    engine: EngineName = "auto"
    """How the kernels are computed: ``cpu`` is fast and exact, ``gpu`` the same on NVIDIA GPUs, ``xla`` the same in
    JAX, ``general`` does any network, ``reference`` is the slow literal recursion; ``auto`` takes ``general`` where the
    others cannot, else ``gpu`` for workers with GPUs (``xla`` where numba-cuda is missing) and ``cpu`` for those
    without."""

    @property
    def passes(self) -> tuple[Pass, ...]:
        """What is computed together: the groups that map pixels to pixels, and each other one alone."""
        together = tuple(group for group in self.groups if on_grid(group))
        alone = [(group,) for group in self.groups if not on_grid(group)]
        return tuple(Pass(groups, self.kernels) for groups in (together, *alone) if groups)

    @property
    def matrices(self) -> list[tuple[str, str]]:
        """Group and kernel of every matrix, of which there is a train and a test one each."""
        return [(group, kernel) for group in self.groups for kernel in self.kernels]


def _whole_gpus(count: float) -> float:
    if count > 1 and count % 1:
        raise ValueError(f"{count:g} GPUs cannot be had: it is a fraction of one, or a whole number")
    return count


class ResourceSpec(_Section):
    """Where tiles are computed, and with what."""

    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=100_000, strict=True)] = "auto"
    """Workers, as Ray actors. ``auto`` is as many as the cluster's CPUs (and GPUs, if asked for) hold at any time, or
    none for what this process can compute before a local cluster has started; 0 is always none. A number is also what
    a cluster that grows is asked for."""
    cpus_per_worker: int = Field(default=1, ge=1, le=1024, strict=True)
    """CPU cores, and threads, of one worker."""
    gpus_per_worker: Annotated[float, Field(ge=0, le=64, strict=True), AfterValidator(_whole_gpus)] = 0
    """GPUs of one worker; a fraction below 1 shares one."""
    node_labels: Annotated[dict[str, str], AfterValidator(_plain_labels), "a section of labels"] | None = None
    """Ray labels of the nodes that may compute, ``{ray.io/accelerator-type: H100}``; without it all may."""
    wait: Annotated[float, Field(ge=0, le=1e6, strict=True)] | None = None
    """Seconds to wait for room for a first worker, also where no node is large enough yet: for clusters that start
    nodes when they are asked to. Without it 120 where nodes are only busy, and none where none is large enough."""
    hung_after: float = Field(default=600, ge=1, le=1e6, strict=True)
    """Seconds without a finished tile after which a worker is taken for hung and replaced."""
    address: Annotated[str, AfterValidator(_ray_address), "host:port, ray://host:port or auto"] | None = None
    """Ray cluster, ``host:port``, ``ray://host:port`` or ``auto``; without it a local one is started for the run."""

    @model_validator(mode="after")
    def _no_workers_need_no_cluster(self) -> Self:
        if self.workers == 0 and self.address is not None:
            raise ValueError(
                f"workers = 0 computes in this process, and address = {self.address!r} names a cluster; keep one"
            )
        return self


class SolveSpec(_Section):
    """Kernel regression on the finished matrices."""

    ridge: Several[Annotated[float, Field(ge=0, strict=True)]] = (1e-6, 1e-4, 1e-2)
    """Ridge values λ in units of the mean diagonal of the train Gram matrix."""
    choose: Literal["auto", "first", "leave_one_out", "folds"] = "auto"
    """Which of them to predict with: the ``first``, or that with the smallest mean squared error on training images
    that are left out, one at a time (in closed form) or in ``folds``; never on test images. ``auto`` leaves out one at
    a time where the matrix fits in memory, else takes the first."""
    folds: Annotated[int, Field(ge=2, strict=True)] = 5
    """Parts that the training images are split into for ``choose: folds``, at random by ``data.seed``."""
    kernels: Several[KernelName] | None = None
    """Kernels to predict with; without it all of ``gram.kernels``."""
    train_sizes: Several[Count] | None = None
    """Learning curve: also solve with only so many training images per class (of all images in regression)."""
    variances: bool = Field(default=False, strict=True)
    """Also the variances of the predictions, and the likelihood of the test targets; needs the matrix in memory."""
    method: Literal["auto", "direct", "tiled", "iterative"] = "auto"
    """``direct`` factorises in memory, ``tiled`` in the store, ``iterative`` runs conjugate gradients over the stored
    tiles; ``auto`` is direct where that fits in memory, else iterative."""
    memory: Annotated[float, Field(gt=0, strict=True)] | None = None
    """GiB of memory that the solver may use; without it nine tenths of what is available."""
    tolerance: Annotated[float, Field(gt=0, lt=1, strict=True)] = 1e-8
    """Relative residual at which conjugate gradients stop."""
    steps: Count = 1000
    """Steps of conjugate gradients at most."""
    rank: Count = 512
    """Rank of their preconditioner: a higher one takes memory, and fewer steps."""


class JobSpec(_Section):
    """A whole run: images to Gram matrices to predictions. Only ``store`` and ``data.train`` have no default.

    >>> spec = JobSpec.load("job.yaml")
    >>> spec = JobSpec(store="runs/mine", data={"train": "class-folders", "test_fraction": 0.2})

    Raises:
      SpecError: one line per wrong or unknown field, with its value and what is allowed.
    """

    store: Url
    """Where the run lives."""
    data: DataSpec
    """The images."""
    network: Architecture = Architecture()
    """The network, but for its symmetry groups, which are in ``gram``."""
    gram: GramSpec = GramSpec()
    """The Gram matrices."""
    resources: ResourceSpec = ResourceSpec()
    """The workers."""
    solve: SolveSpec | None = SolveSpec()
    """The regression; ``null`` computes the Gram matrices only."""
    storage_options: Annotated[dict[str, dict[str, Any]], "a section of options for each protocol"] | None = Field(
        default=None, repr=False
    )
    """Options of fsspec's file systems by protocol, ``{s3: {endpoint_url: "http://…"}}``. Not kept in the store, and
    better in the environment (``FSSPEC_S3_ENDPOINT_URL``) where they are secrets."""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise SpecError(describe(error, type(self))) from None

    # pydantic calls an overridden __init__ also when it validates plain data, where `parse` names the source.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_validator(mode="after")
    def _solve_only_what_is_stored(self) -> Self:
        missing = [kernel for kernel in self.solved_kernels if kernel not in self.gram.kernels]
        if missing:
            raise ValueError(
                f"solve.kernels names {missing[0]!r}, which gram.kernels = {list(self.gram.kernels)} does not store; "
                "add it there"
            )
        return self

    @model_validator(mode="after")
    def _engine_can_do_the_network(self) -> Self:
        try:
            engines = [self.engine_for(one.groups) for one in self.gram.passes]
        except EngineError as error:
            raise ValueError(f"gram.engine: {error}") from None
        gpus = self.resources.gpus_per_worker
        if gpus and (engine := engines[0]) in ("cpu", "reference"):
            raise ValueError(
                f"resources.gpus_per_worker = {gpus:g}, but the engine {engine!r} runs on CPUs only; leave it out, or "
                "choose gram.engine: auto"
            )
        return self

    @model_validator(mode="after")
    def _activations_have_names(self) -> Self:
        network = self.network
        custom = [one for one in (*network.head_activations, *network.activations) if isinstance(one, Custom)]
        if custom:
            raise ValueError(
                f"network: the {custom[0]} is a Python function, which a job cannot hold; use a named activation, or "
                "equikernel.GroupCNN.kernel in your own program"
            )
        return self

    def to_store(self) -> dict[str, Any]:
        """The fields as plain data, but for what may be secret."""
        return self.model_dump(mode="json", exclude={"storage_options"})

    def engine_for(self, groups: tuple[str, ...]) -> str:
        """The engine of a pass on all workers, of the plan and of predictions: it depends on the job, not on a machine.

        Raises:
          EngineError: ``gram.engine`` cannot do this network.
        """
        return choose_engine(self.network, groups, self.gram.engine, gpu=self.resources.gpus_per_worker > 0)[0]

    def engine_here(self, groups: tuple[str, ...]) -> str:
        """The engine of a pass on this machine, which may have no GPU: where it is planned, checked or compared."""
        if self.engine_for(groups) == "gpu" and why_no_gpu():
            return "xla" if jax_has_gpu() else "cpu"
        return self.engine_of_workers(groups)

    def function_here(
        self, groups: tuple[str, ...], image_shape: tuple[int, int, int], threads: int | None = None
    ) -> KernelFunction:
        """The kernels of groups that share a pass, as this machine computes them, for images ``(H, W, C)``.

        Raises:
          ImageError, NetworkError: the network is not defined on such images.
          EngineError: ``gram.engine`` cannot do it for them.
        """
        if self.gram.engine == "gpu":  # perhaps not here
            check_gpu(self.network, image_shape[1], self.gram.dtype)
        function = KernelFunction(self.network, groups, self.engine_here(groups), self.gram.dtype, threads)
        function.check_shape(*image_shape[:2])
        return function

    def engine_of_workers(self, groups: tuple[str, ...]) -> str:
        """The engine of a pass as workers are told: ``auto`` for GPUs, of which each takes the best that it can use."""
        engine = self.engine_for(groups)
        return self.gram.engine if engine == "gpu" else engine

    @property
    def solved_kernels(self) -> tuple[KernelName, ...]:
        """The kernels that the solver stage uses; empty without one."""
        if self.solve is None:
            return ()
        return self.solve.kernels or self.gram.kernels

    def network_for(self, group: GroupName) -> GroupCNN:
        """The network of this job with symmetry ``group``."""
        return self.network.with_group(group)

    @classmethod
    def parse(cls, fields: Any, source: str = "job") -> Self:
        """Validate plain data, for example parsed YAML.

        Raises:
          SpecError: one line per wrong or unknown field, with its value and what is allowed.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            lines = describe(error, cls).splitlines()
        raise SpecError("\n".join(f"{source}: {line}" for line in lines))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a YAML job file.

        Raises:
          SpecError: the file cannot be read, is not YAML, or has wrong fields.
        """
        fields = read_yaml(path)
        if fields is None:
            raise SpecError(f"{path}: the job file is empty; it needs at least `store` and `data.train`")
        return cls.parse(fields, source=str(path))
