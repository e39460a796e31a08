"""Kernel convergence: the mean kernels of random networks of finite width against their infinite-width limit.

For each group and width the NNGP and NTK of m networks are sampled on the same random images. With the mean ``M`` over
the networks and the limit ``K``, the relative error is ``|M - K| / |K|``, averaged over all entries of the Gram matrix.
It has two parts: the spread of the mean, of order ``1 / √(m width)``, which more networks lower, and the bias of finite
width, of order ``1 / width``, which they do not. Both are fitted. Narrow networks are cheap, so there are more of them,
and the bias shows: best with an activation like erf and images of one sign (a ReLU network has none on the diagonal of
its NNGP, and with noise as images the signs of the bias cancel).
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from equigram.errors import SpecError, StoreError
from equigram.events import Listener, Progress
from equigram.tables import write_table, write_whole
from equikernel import GroupCNN

if TYPE_CHECKING:
    from equikernel.network import GroupName

Array = NDArray[np.float64]

KERNELS = ("nngp", "ntk")

BATCH = 8
"""Of the widest networks so many are sampled, of narrower ones more, before samples are kept; always whole batches."""

MORE = 64
"""Narrow networks are up to so many times as many as the widest."""

WIDE = 512
"""Networks of this width or more are sampled in the smallest batch."""

RESAMPLED = 200
"""Bootstrap samples from which standard errors are computed."""


@dataclass(frozen=True)
class Convergence:
    """What to sample.

    Attributes:
      groups: symmetry groups of the networks.
      widths: channels of the hidden layers.
      samples: networks of each group with the largest width; narrower ones are more, in inverse proportion, up to 64
        times as many.
      depth: convolutions.
      images: random images on which the kernels are compared.
      size: pixels along their sides.
      channels: of the images.
      activation: a named one.
      w_std: standard deviation of the weights.
      seed: of images and networks.
    """

    groups: tuple[str, ...] = ("C1", "C2", "C4", "C8")
    widths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    samples: int = 100
    depth: int = 3
    images: int = 3
    size: int = 4
    channels: int = 1
    activation: str = "erf"
    w_std: float = 1.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, values in (("groups", self.groups), ("widths", self.widths)):
            if not values or len(set(values)) < len(values):
                raise SpecError(f"{name} = {list(values)} is not allowed; name at least one, and each once")
        for name, least in (("samples", 2), ("depth", 1), ("images", 1), ("size", 1), ("channels", 1)):
            if getattr(self, name) < least:
                raise SpecError(f"{name} = {getattr(self, name)} is not allowed; it must be {least} or more")
        if min(self.widths) < 1:
            raise SpecError(f"width {min(self.widths)} is not allowed; it must be 1 or more")

    def networks(self, width: int) -> int:
        """How many networks of a width there are for each group."""
        return self.samples * min(MORE, max(self.widths) // width)

    def network(self, group: GroupName) -> GroupCNN:
        """The network of a group."""
        return GroupCNN(group=group, depth=self.depth, activation=self.activation, w_std=self.w_std)

    def inputs(self) -> Array:
        """The images ``(n, H, W, C)``, uniform between 0 and 1."""
        shape = (self.images, self.size, self.size, self.channels)
        return np.random.default_rng(self.seed).uniform(size=shape)


def run_convergence(spec: Convergence, folder: Path, listener: Listener) -> list[dict[str, Any]]:
    """Sample what is missing in ``folder``, and write its table and figure.

    The samples of a group and width are in ``samples/<group>-<width>.npz``; with the same settings they are not sampled
    again, and more are added to them.

    Returns:
      The rows of the table, one for each group, kernel and width.

    Raises:
      SpecError: the folder holds samples of other settings.
      StoreError: the folder cannot be written.
      NetworkError, ImageError: a network does not fit the images.
    """
    from equigram import plot

    nets = {group: spec.network(group) for group in spec.groups}
    fields = {name: value for name, value in asdict(spec).items() if name not in ("groups", "widths", "samples")}
    settings = folder / "settings.json"
    try:
        there = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else fields
    except (OSError, ValueError) as error:
        raise StoreError(f"{settings} is damaged ({error}); choose another folder") from None
    if not settings.exists() and (folder / "samples").exists():
        raise StoreError(f"{folder} holds samples, but not of what ({settings.name}); choose another folder")
    if there != fields:
        raise SpecError(f"{folder} holds samples of {there}, and asked for are {fields}; choose another folder")
    write_whole(settings, json.dumps(fields).encode())
    total = len(spec.groups) * sum(map(spec.networks, spec.widths))
    samples: dict[tuple[str, int], dict[str, Array]] = {}
    done = 0
    for width in sorted(spec.widths, reverse=True):  # the dearest first, so that the time left is not underestimated
        for group in spec.groups[::-1]:
            path = folder / "samples" / f"{group}-{width}.npz"
            found = _stored(path)
            while len(found["ntk"]) < spec.networks(width):
                listener(Progress("networks", done + len(found["ntk"]), total))
                found = _more(spec, nets[group], width, found)
                _keep(path, found)
            done += spec.networks(width)
            samples[group, width] = {name: found[name][: spec.networks(width)] for name in KERNELS}
    rows: list[dict[str, Any]] = []
    for group, net in nets.items():
        engine = "reference" if _small(spec) else "auto"
        limit = net.kernel(spec.inputs(), engine=engine, dtype="float64")
        for name in KERNELS:
            of_widths = [samples[group, width][name] for width in spec.widths]
            rows += _rows(group, name, spec, np.asarray(getattr(limit, name)), of_widths)
    listener(Progress("networks", total, total))
    write_table(folder / "convergence.csv", rows)
    plot.convergence(rows, folder / "convergence.png")
    return rows


def _small(spec: Convergence) -> bool:
    return spec.size <= 6 and spec.depth <= 3


def _stored(path: Path) -> dict[str, Array]:
    """Samples ``(m, n, n)`` by kernel; none where there is no file."""
    if not path.exists():
        return {name: np.empty((0, 0, 0)) for name in KERNELS}
    try:
        with path.open("rb") as content, np.load(content) as file:
            return {name: file[name] for name in KERNELS}
    except (OSError, ValueError, LookupError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise StoreError(f"{path} is damaged ({error}); delete it and run again") from None


def _keep(path: Path, samples: dict[str, Array]) -> None:
    content = io.BytesIO()
    np.savez(content, **samples)  # type: ignore[arg-type]
    write_whole(path, content.getvalue())


def _more(spec: Convergence, net: GroupCNN, width: int, found: dict[str, Array]) -> dict[str, Array]:
    """The samples, and those of a few more networks, each from a key of its own."""
    from equikernel.finite import empirical_kernels, random_key

    key = random_key(spec.seed, width, len(found["ntk"]))
    images = spec.inputs().astype(np.float32)
    samples = BATCH * min(MORE, max(1, WIDE // width))
    more = dict(zip(KERNELS, empirical_kernels(net, width, key, images, samples=samples), strict=True))
    return {
        name: np.concatenate([found[name].reshape(-1, *more[name].shape[1:]), more[name].astype(np.float64)])
        for name in KERNELS
    }


def _rows(group: str, kernel: str, spec: Convergence, limit: Array, samples: Sequence[Array]) -> list[dict[str, Any]]:
    """The rows of a group and kernel, with both fits."""
    rng = np.random.default_rng(spec.seed)
    scale = np.abs(limit)
    upper = np.triu_indices(len(limit))  # the other half is the same
    weights = np.where(upper[0] == upper[1], 1.0, 2.0)
    weights /= weights.sum()

    def averaged(entries: Array) -> Array:
        return np.asarray((entries[..., upper[0], upper[1]] * weights).sum(axis=-1))

    errors, bars, biases, bias_bars, spreads = [], [], [], [], []
    for found in samples:
        mean = found.mean(axis=0)
        chosen = rng.integers(len(found), size=(RESAMPLED, len(found)))
        again = np.stack([found[one].mean(axis=0) for one in chosen])
        errors.append(float(averaged(np.abs(mean - limit) / scale)))
        bars.append(float(averaged(np.abs(again - limit) / scale).std(ddof=1)))
        biases.append(float(averaged((mean - limit) / scale)))
        bias_bars.append(float(averaged((again - limit) / scale).std(ddof=1)))
        spreads.append(float(averaged(found.std(axis=0, ddof=1) / scale)))
    inverse = 1 / np.array(spec.widths)
    accuracy = 1 / np.square(np.maximum(bias_bars, 1e-12))
    bias = float((accuracy * inverse * biases).sum() / (accuracy * inverse**2).sum())
    bias_bar = float(1 / np.sqrt((accuracy * inverse**2).sum()))
    spread = float(np.exp(np.mean(np.log(np.maximum(spreads, 1e-300)) - 0.5 * np.log(inverse))))
    exponents = _exponents(np.log(spec.widths), np.array(biases), np.array(bias_bars), np.array(spreads))
    return [
        {
            "group": group,
            "kernel": kernel,
            "width": width,
            "networks": spec.networks(width),
            "relative_error": errors[index],
            "standard_error": bars[index],
            "relative_bias": biases[index],
            "bias_standard_error": bias_bars[index],
            "spread_of_one": spreads[index],
            "fitted_bias_times_width": bias,
            "fitted_bias_standard_error": bias_bar,
            "fitted_spread_times_root_width": spread,
            "bias_exponent": exponents[0],
            "bias_exponent_standard_error": exponents[1],
            "spread_exponent": exponents[2],
        }
        for index, width in enumerate(spec.widths)
    ]


def _exponents(
    logs: Array, biases: Array, bars: Array, spreads: Array
) -> tuple[float | None, float | None, float | None]:
    """Exponents of the width in bias (with standard error) and spread, fitted without assuming them.

    The bias is fitted where it is three standard errors or more; ``None`` where that is at less than three widths.
    """
    spread = float(np.polyfit(logs, np.log(spreads), 1)[0]) if len(logs) > 2 and (spreads > 0).all() else None
    seen = np.abs(biases) > 3 * bars
    if np.count_nonzero(seen) < 3:
        return None, None, spread
    weights = (np.abs(biases) / bars)[seen]
    slope, covariance = np.polyfit(logs[seen], np.log(np.abs(biases[seen])), 1, w=weights, cov="unscaled")
    return float(slope[0]), float(np.sqrt(covariance[0, 0])), spread
