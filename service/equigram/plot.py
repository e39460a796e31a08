"""Pictures of runs and experiments: Gram matrices, spectra, confusion matrices, learning curves and more.

Every function writes a PNG to a local path and an SVG beside it, creating their folder, each whole or not at all, and
returns the path. Raises StoreError where it cannot be written and SpecError where arrays do not fit together.
"""

from __future__ import annotations

import io
import itertools
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from equigram.errors import SpecError
from equigram.tables import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 200
_FONT = 9
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which colour-blind readers can tell apart, without the yellow that paper swallows."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", ":", "-.")


def gram_heatmap(
    gram: NDArray[np.floating[Any]],
    labels: NDArray[np.integer[Any]] | None,
    classes: Sequence[str] | None,
    title: str,
    path: str | Path,
) -> Path:
    """A Gram matrix in colours, images sorted by class; above 2,000 images a pixel is the mean of a block.

    Colours span the 0.5th to 99.5th percentile of the pixels; entries that are not finite stay grey.

    Args:
      gram: (n, n) floats.
      labels: (n,) integers, or None for the stored order without class names.
      classes: names of the classes 0, 1, …; without them labels are named by their number.
      title: written above.
      path: the PNG.
    """
    from matplotlib.ticker import MaxNLocator

    n = len(gram)
    if gram.ndim != 2 or gram.shape != (n, n) or n == 0:
        raise SpecError(f"the Gram matrix to draw has shape {gram.shape}; it must be (n, n) with n of 1 or more")
    if labels is not None and labels.shape != (n,):
        raise SpecError(f"labels {labels.shape} do not fit a Gram matrix {gram.shape}; pass one label per row")
    order = np.arange(n) if labels is None else np.argsort(labels, kind="stable")
    pixels = _block_means(gram, order, most=1000 if n > 2000 else n)
    finite = pixels[np.isfinite(pixels)]
    low, high = (
        (np.percentile(finite, 0.5, method="lower"), np.percentile(finite, 99.5, method="higher"))
        if finite.size
        else (0.0, 1.0)
    )
    outside = (finite.min(initial=low) < low, finite.max(initial=high) > high)

    figure, axes = _axes(4.5, 4.5)
    colors = _color_map("viridis")
    image = axes.imshow(
        np.ma.masked_invalid(pixels),
        cmap=colors,
        vmin=low,
        vmax=high,
        extent=(-0.5, n - 0.5, n - 0.5, -0.5),
        interpolation="auto",
    )
    _color_bar(figure, image, extend={(1, 1): "both", (1, 0): "min", (0, 1): "max"}.get(outside, "neither"))
    if labels is None:
        _label(axes, x="image", y="image", title=title)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        return _write(figure, path)
    present, counts = np.unique(labels, return_counts=True)
    ends = np.cumsum(counts)
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="white", linewidth=0.6)
        axes.axvline(end - 0.5, color="white", linewidth=0.6)
    middles = ends - counts / 2 - 0.5
    _name_ticks(axes, middles, [_class_name(int(label), classes) for label in present], 4.5 * 72 / n)
    _label(axes, title=title)
    return _write(figure, path)


def spectrum(eigenvalues: Mapping[str, NDArray[np.floating[Any]]], path: str | Path) -> Path:
    """Eigenvalues over the mean diagonal (their mean) against their index from the largest, both logarithmic.

    Eigenvalues of 0 or below have no logarithm; the legend counts them.

    Args:
      eigenvalues: (n,) floats in any order by name of the curve, for example ``"C4 ntk"``.
      path: the PNG.
    """
    figure, axes = _axes(4.5, 3.4)
    for number, (name, values) in enumerate(_some(eigenvalues).items()):
        if values.ndim != 1 or not values.size or not np.isfinite(values).all() or values.mean() <= 0:
            raise SpecError(
                f"the eigenvalues of {name!r}, shape {values.shape}, must be (n,) finite numbers with a mean above 0; "
                "pass those of a Gram matrix"
            )
        descending = np.sort(values.astype(np.float64))[::-1] / values.mean(dtype=np.float64)
        positive = descending[descending > 0]
        left_out = f" ({values.size - positive.size} of {values.size} ≤ 0)" if positive.size < values.size else ""
        axes.plot(np.arange(1, positive.size + 1), positive, label=name + left_out, **_style(number, positive.size))
    axes.set_xscale("log")
    axes.set_yscale("log")
    _label(axes, x="index", y="eigenvalue / mean diagonal")
    _legend(axes)
    return _write(figure, path)


def confusion(matrix: NDArray[np.integer[Any]], classes: Sequence[str] | None, title: str, path: str | Path) -> Path:
    """A confusion matrix: counts (up to 30 classes) in cells coloured by the share of the true class.

    Args:
      matrix: (k, k) counts, rows the true and columns the predicted class.
      classes: names of the k classes; without them their numbers.
      title: written above.
      path: the PNG.
    """
    k = len(matrix)
    if matrix.shape != (k, k) or k == 0 or (classes is not None and len(classes) != k):
        raise SpecError(
            f"the confusion matrix has shape {matrix.shape} and {k if classes is None else len(classes)} class names; "
            "pass (k, k) counts and k names"
        )
    totals = matrix.sum(axis=1, keepdims=True)
    shares = matrix / np.maximum(totals, 1)
    cell = 0.5 if k <= 20 else 10 / k  # inches
    figure, axes = _axes(max(1.5, k * cell), max(1.5, k * cell))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    _color_bar(figure, image, name="share of the true class")
    digits = len(str(matrix.max()))
    font = min(_FONT, cell * 72 * 1.2 / max(digits, 2))
    if k <= 30 and font >= 4:
        for row, column in np.ndindex(k, k):
            dark = shares[row, column] > 0.55
            zero = matrix[row, column] == 0
            axes.text(
                column,
                row,
                str(matrix[row, column]),
                ha="center",
                va="center",
                fontsize=font,
                color="white" if dark else "#999999" if zero else "black",
            )
    _name_ticks(axes, np.arange(k), [_class_name(label, classes) for label in range(k)], cell * 72)
    _label(axes, x="predicted class", y="true class", title=title)
    return _write(figure, path)


def learning_curves(accuracy: Mapping[str, Sequence[tuple[int, float]]], path: str | Path) -> Path:
    """Accuracy in percent against training images per class, one line per network.

    Args:
      accuracy: by name of the network, for example ``"C4 ntk"``: pairs (training images per class, share in 0 … 1).
      path: the PNG.
    """
    figure, axes = _axes(4.5, 3.4)
    for number, (name, points) in enumerate(_some(accuracy).items()):
        if not points or not all(size >= 1 and 0 <= share <= 1 for size, share in points):
            raise SpecError(
                f"the learning curve of {name!r} is {list(points)!r}; it must be pairs of training images per class, "
                "1 or more, and accuracy, 0 to 1"
            )
        sizes, shares = zip(*sorted(points), strict=True)
        axes.plot(sizes, [100 * share for share in shares], label=name, **_style(number, len(sizes)))
    axes.set_xscale("log")
    all_sizes = np.unique([size for points in accuracy.values() for size, _ in points])
    low, high = np.log(axes.get_xlim())
    places = (np.log(all_sizes) - low) / (high - low) * 4.5 * 72
    names = np.array([f"{size:,}" for size in all_sizes.tolist()])
    shown = _apart(places, 0.65 * _FONT * np.char.str_len(names) + 4)
    axes.set_xticks(all_sizes[shown], names[shown])
    axes.set_xticks(all_sizes, minor=True)
    axes.tick_params(axis="x", which="minor", labelbottom=False)
    _label(axes, x="training images per class", y="accuracy (%)")
    _legend(axes)
    return _write(figure, path)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one plot of ``width x height`` inches; saving adds the margins that its names need."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.tick_params(labelsize=_FONT)
    return figure, axes


def colors(values: NDArray[np.floating[Any]], low: float, high: float) -> NDArray[np.uint8]:
    """The colours of a heat map, without axes: ``(rows, cols, 4)``, clear where a value is not finite.

    Args:
      values: ``(rows, cols)``.
      low, high: the values at the ends of the colours.
    """
    from matplotlib import colormaps

    scaled = (np.asarray(values, dtype=np.float64) - low) / (high - low if high > low else 1.0)
    found: NDArray[np.uint8] = colormaps["viridis"](np.ma.masked_invalid(scaled), bytes=True)
    found[~np.isfinite(values), 3] = 0
    return found


def _color_map(name: str) -> Any:
    from matplotlib import colormaps

    return colormaps[name].with_extremes(bad="#BBBBBB")


def _color_bar(figure: Figure, image: Any, name: str = "", extend: str = "neither") -> None:
    width = figure.get_figwidth()
    bar = figure.colorbar(image, cax=figure.add_axes((1 + 0.12 / width, 0, 0.15 / width, 1)), extend=extend)
    bar.ax.tick_params(labelsize=_FONT)
    bar.set_label(name, fontsize=_FONT)
    bar.outline.set_linewidth(0.5)


def _label(axes: Axes, x: str = "", y: str = "", title: str = "") -> None:
    axes.set_xlabel(x, fontsize=_FONT + 1)
    axes.set_ylabel(y, fontsize=_FONT + 1)
    axes.set_title(textwrap.fill(title, 60), fontsize=_FONT + 2, parse_math=False)


def convergence(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Relative errors of mean finite-width kernels, and the spread of one, over the width, with the fitted slopes.

    Args:
      rows: of :func:`equigram.experiments.convergence.run_convergence`.
      path: the PNG.
    """
    from matplotlib.figure import Figure

    kernels, groups = (list(dict.fromkeys(str(row[name]) for row in _few(rows))) for name in ("kernel", "group"))
    figure = Figure(figsize=(4.0 * len(kernels) + 1.2, 6.4), layout="constrained")
    panels = figure.subplots(2, len(kernels), sharex=True, sharey="row", squeeze=False)
    for column, kernel in enumerate(kernels):
        errors, spreads = panels[:, column]
        for number, group in enumerate(groups):
            some = [row for row in rows if (row["kernel"], row["group"]) == (kernel, group)]
            widths = np.array([row["width"] for row in some], dtype=float)
            style, color = _style(number, len(some)), _COLORS[number % len(_COLORS)]
            error, bar = (np.array([row[name] for row in some]) for name in ("relative_error", "standard_error"))
            bars = np.minimum(bar, 0.9 * error), bar  # the axis has no 0
            errors.errorbar(widths, error, bars, capsize=2, label=group, **{**style, "linestyle": ""})
            bias = np.abs(some[0]["fitted_bias_times_width"]) / widths
            errors.plot(widths, bias, color=color, linestyle="--")
            spreads.plot(widths, [row["spread_of_one"] for row in some], **{**style, "linestyle": ""})
            spreads.plot(widths, some[0]["fitted_spread_times_root_width"] / np.sqrt(widths), color=color)
        noise = [row["fitted_spread_times_root_width"] / np.sqrt(row["networks"] * row["width"]) for row in some]
        errors.plot(widths, noise, color="#888888", linestyle=":", label="spread / √m")
        errors.plot([], [], color="#888888", linestyle="--", label="bias ∝ 1/width")
        spreads.plot([], [], color="#888888", label="∝ 1/√width")
        for axes, what in ((errors, "relative error of the mean"), (spreads, "relative spread of one")):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            _label(
                axes,
                x="width" if axes is spreads else "",
                y=what if column == 0 else "",
                title=kernel.upper() if axes is errors else "",
            )
            _grid(axes)
    for axes in panels[:, -1]:
        _legend(axes)
    return _write(figure, path)


def dynamics(spectra: Sequence[Mapping[str, Any]], over_time: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Eigenvalues, what the targets have along their eigenvectors, and predicted errors over the training time.

    Args:
      spectra, over_time: of :func:`equigram.experiments.dynamics.run_dynamics`.
      path: the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 3.4), layout="constrained")
    values, shares, errors = figure.subplots(1, 3)
    for number, (name, rows) in enumerate(_by_name(spectra).items()):
        style = _style(number, len(rows))
        positive = [row for row in rows if row["eigenvalue"] > 0]
        ranks = [row["rank"] for row in positive]
        values.plot(ranks, [row["eigenvalue"] for row in positive], label=name, **style)
        shares.plot([row["rank"] for row in rows], [row["cumulative_alignment"] for row in rows], label=name, **style)
    for number, (name, rows) in enumerate(_by_name(over_time).items()):
        finite = [row for row in rows if np.isfinite(row["time"])]
        times = [row["time"] for row in finite]
        color = _COLORS[number % len(_COLORS)]
        errors.plot(times, [row["train_mse"] for row in finite], color=color, linestyle=":", label=f"{name}, train")
        if finite and finite[0]["test_mse"] is not None:
            errors.plot(times, [row["test_mse"] for row in finite], color=color, linestyle="-", label=f"{name}, test")
    for axes in (values, shares, errors):
        axes.set_xscale("log")
    values.set_yscale("log")
    _label(values, x="rank", y="eigenvalue / mean diagonal")
    _label(shares, x="rank", y="share of the targets up to it")
    _label(errors, x="time in 1 / (learning rate x mean diagonal)", y="mean squared error")
    for axes in (values, shares):
        _grid(axes)
    _legend(errors)
    return _write(figure, path)


def curves(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Mean accuracies over subsets against the training images, with standard deviations.

    Args:
      rows: of :func:`equigram.experiments.curves.run_curves`.
      path: the PNG.
    """
    figure, axes = _axes(4.5, 3.4)
    for number, (name, some) in enumerate(_by_name(rows).items()):
        sizes = sorted({row["images"] for row in some})
        scores = [[row["accuracy"] for row in some if row["images"] == size] for size in sizes]
        deviations = [float(np.std(one, ddof=1)) if len(one) > 1 else 0.0 for one in scores]
        means = [float(np.mean(one)) for one in scores]
        axes.errorbar(sizes, means, deviations, capsize=2, label=name, **_style(number, len(sizes)))
    axes.set_xscale("log")
    count = len({row["subset"] for row in rows})
    title = f"mean and standard deviation of {count} random subsets" if count > 1 else ""
    _label(axes, x="training images", y="test accuracy", title=title)
    _legend(axes)
    return _write(figure, path)


def augmentation(points: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Predictions of the averaged kernel against those of the augmented images, which should be equal.

    Args:
      points: of :func:`equigram.experiments.augmentation.run_augmentation`.
      path: the PNG.
    """
    figure, axes = _axes(3.6, 3.6)
    for number, (name, some) in enumerate(_by_name(points).items()):
        style = {**_style(number, 1), "linestyle": "", "markersize": 3}
        axes.plot([row["augmented"] for row in some], [row["averaged"] for row in some], label=name, **style)
    ends = [min(row["augmented"] for row in points), max(row["augmented"] for row in points)]
    axes.plot(ends, ends, color="#888888", linewidth=0.8, zorder=0)
    _label(axes, x="trained on all turned images", y="averaged kernel", title="predictions of test images")
    _legend(axes)
    return _write(figure, path)


def trainability(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Condition numbers of the NTK over depth and weight variance, a panel for each group and bias variance.

    Grey cells are not positive definite to rounding; the line is the boundary between the phases, χ₁ = 1.

    Args:
      rows: of :func:`equigram.experiments.trainability.run_trainability`.
      path: the PNG.
    """
    from matplotlib.figure import Figure

    names = ("group", "bias_variance", "depth", "weight_variance")
    groups, biases, depths, weights = (sorted({row[name] for row in _few(rows)}) for name in names)
    by_place = {tuple(row[name] for name in names): row for row in rows}
    figure = Figure(figsize=(2.4 * len(biases) + 1.4, 2.3 * len(groups) + 0.4), layout="constrained")
    panels = figure.subplots(len(groups), len(biases), sharex=True, sharey=True, squeeze=False)
    finite = [float(np.log10(c)) for row in rows if (c := row["condition"]) is not None and np.isfinite(c)]
    limits = (min(finite, default=0.0), max(finite, default=1.0))
    image: Any = None
    for row_number, group in enumerate(groups):
        for axes, bias in zip(panels[row_number], biases, strict=True):
            places = [[by_place.get((group, bias, depth, weight), {}) for weight in weights] for depth in depths]
            values = np.array([[_log_condition(place) for place in row] for row in places])
            image = axes.imshow(
                np.ma.masked_invalid(values), cmap=_color_map("viridis"), vmin=limits[0], vmax=limits[1],
                origin="lower", aspect="auto",
            )  # fmt: skip
            slopes = np.array([place.get("slope") or np.nan for place in places[0]], dtype=float)
            for index in range(len(weights) - 1):
                low, high = slopes[index] - 1, slopes[index + 1] - 1
                if low < 0 <= high and np.isfinite(high):
                    axes.axvline(index + low / (low - high), color="white", linewidth=1.5)
                    axes.axvline(index + low / (low - high), color="black", linewidth=0.8, linestyle="--")
            axes.set_xticks(range(len(weights)), [f"{weight:g}" for weight in weights], fontsize=_FONT - 1)
            axes.set_yticks(range(len(depths)), [str(depth) for depth in depths], fontsize=_FONT - 1)
            _label(
                axes, x="weight variance" if group == groups[-1] else "", y="depth" if bias == biases[0] else "",
                title=f"{group}, bias variance {bias:g}",
            )  # fmt: skip
    bar = figure.colorbar(image, ax=panels.ravel().tolist())
    bar.set_label("log10 of the condition number", fontsize=_FONT)
    return _write(figure, path)


def _log_condition(place: Mapping[str, Any]) -> float:
    condition = place.get("condition")
    return float("nan") if condition is None or not np.isfinite(condition) else float(np.log10(condition))


def _by_name(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by group and kernel, in their order."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in _few(rows):
        found.setdefault(f"{row['group']} {str(row['kernel']).upper()}", []).append(row)
    return found


def _few(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    if not rows:
        raise SpecError("there is nothing to draw; pass at least one row")
    return rows


def _name_ticks(axes: Axes, places: NDArray[Any], names: Sequence[str], unit: float) -> None:
    """Class names along both axes, ``unit`` points per data unit, but none that would overlap the one before.

    Along x they stand upright where one is long.
    """
    wrapped = np.array([textwrap.fill(name, 24, max_lines=3, placeholder=" …") for name in names])
    shown = _apart(places * unit, 1.2 * _FONT * (1 + np.char.count(wrapped, "\n")) + 4)
    axes.set_yticks(places[shown], wrapped[shown], fontsize=_FONT, parse_math=False)
    axes.set_xticks(
        places[shown], wrapped[shown], fontsize=_FONT, parse_math=False, rotation=90 if max(map(len, names)) > 3 else 0
    )
    axes.tick_params(length=2)


def _legend(axes: Axes) -> None:
    """Beside the plot, where it hides no curve."""
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0, fontsize=_FONT, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    _grid(axes)


def _grid(axes: Axes) -> None:
    """Thin lines behind the curves, and no frame above and on the right."""
    axes.grid(which="major", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _style(number: int, points: int) -> dict[str, Any]:
    """Colour, line and marker of a curve; few points are marked each, many at their ends only."""
    return {
        "color": _COLORS[number % len(_COLORS)],
        "linestyle": _LINES[number // len(_COLORS) % len(_LINES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 4,
        "markevery": 1 if points <= 30 else (0.0, 0.12),
        "linewidth": 1.3,
    }


def _some(curves: Mapping[str, Any]) -> Mapping[str, Any]:
    if not curves:
        raise SpecError("there is no curve to draw; pass at least one")
    return curves


def _class_name(label: int, classes: Sequence[str] | None) -> str:
    if classes is None:
        return str(label)
    if not 0 <= label < len(classes):
        raise SpecError(f"label {label} has no name among {len(classes)} classes; name its class")
    return classes[label]


def _apart(places: NDArray[Any], widths: float | NDArray[Any]) -> list[int]:
    """Indices of the increasing ``places`` (points) where texts of these ``widths`` do not overlap the one before."""
    widths = np.broadcast_to(widths, places.shape)
    shown: list[int] = []
    for index, place in enumerate(places):
        if not shown or place - places[shown[-1]] >= (widths[index] + widths[shown[-1]]) / 2:
            shown.append(index)
    return shown


def _block_means(gram: NDArray[np.floating[Any]], order: NDArray[np.intp], most: int) -> NDArray[np.float64]:
    """``gram`` in ``order`` of rows and columns, as (p, p) means of blocks of nearly equal size, p at most ``most``."""
    edges = np.linspace(0, len(order), min(most, len(order)) + 1).astype(int)
    sizes = np.diff(edges)
    pixels = np.empty((len(sizes), len(sizes)))
    with np.errstate(invalid="ignore", over="ignore"):
        for row, (start, stop) in enumerate(itertools.pairwise(edges)):
            column_means = gram[order[start:stop]].mean(axis=0, dtype=np.float64)
            pixels[row] = np.add.reduceat(column_means[order], edges[:-1]) / sizes
    return pixels


def _write(figure: Figure, path: str | Path) -> Path:
    """Write ``figure`` as PNG to ``path``, and as SVG beside it; no torn file is ever there."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = Path(path)
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": "equigram"}):
        # A class name in a script that the font lacks is drawn as boxes, which no caller can change.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        FigureCanvasAgg(figure)
        for kind, metadata in (("png", {}), ("svg", {"Date": None})):
            picture = io.BytesIO()
            figure.savefig(
                picture, format=kind, dpi=_DPI, bbox_inches="tight", pad_inches=0.08, facecolor="white",
                metadata=metadata,
            )  # fmt: skip
            write_whole(path.with_suffix(f".{kind}") if kind == "svg" else path, picture.getvalue())
    return path
