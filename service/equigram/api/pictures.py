"""Pictures of matrices and images, as PNG files in memory."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from equigram.plot import colors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from equigram.plan import Part, SplitName
    from equigram.store import GramStore

MOST_CHUNKS = 400
"""Chunks that are read for a picture at most; of a larger window it shows the entries of an even selection."""

SMALLEST_SIDE = 96
"""Pixels to which images are enlarged, whole times, so that browsers do not blur them."""


def gram_picture(
    store: GramStore, part: Part, group: str, kernel: str, rows: range, cols: range, pixels: int
) -> tuple[bytes, float, float]:
    """A window of a matrix in colours; clear where tiles are missing or damaged.

    Args:
      store: the run.
      part, group, kernel: which matrix.
      rows, cols: the window, in images.
      pixels: width and height of the picture at most; with more images than that it shows some, evenly spread.

    Returns:
      The PNG file, and the values at the ends of its colours: the least and greatest that it shows, 0 without any.
    """
    edge = store.info.tile
    row_blocks, rows_at = _selection(rows, pixels, edge)
    col_blocks, cols_at = _selection(cols, pixels, edge)
    values = np.full((len(rows_at), len(cols_at)), np.nan)
    chunks = [(part, group, kernel, row, col) for row in row_blocks for col in col_blocks]
    for (*_, row, col), (block, wrong) in zip(chunks, store.read_chunks(chunks), strict=True):
        if wrong:
            continue
        below, right = rows_at[:, 0] == row, cols_at[:, 0] == col
        some_rows = np.minimum(rows_at[below, 1], block.shape[0] - 1)
        some_cols = np.minimum(cols_at[right, 1], block.shape[1] - 1)
        values[np.ix_(below, right)] = block[np.ix_(some_rows, some_cols)]
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    return _png(colors(values, low, high)), low, high


def _selection(images: range, pixels: int, edge: int) -> tuple[list[int], NDArray[np.intp]]:
    """The images that are shown along a side, and the blocks that are read for them.

    Returns:
      The blocks, and ``(count, 2)``: block and place in it of each image.
    """
    shown = np.unique(np.linspace(images.start, images.stop - 1, min(len(images), pixels)).round().astype(np.intp))
    places = np.stack([shown // edge, shown % edge], axis=1)
    blocks, most = np.unique(places[:, 0]), int(MOST_CHUNKS**0.5)
    if len(blocks) > most:
        kept = blocks[np.linspace(0, len(blocks) - 1, most).round().astype(np.intp)]
        nearest = np.abs(places[:, :1] - kept).argmin(axis=1)
        places[:, 0] = kept[nearest]
        blocks = kept
    return blocks.tolist(), places


def image_picture(store: GramStore, split: SplitName, index: int) -> bytes:
    """An image as it was before it was normalised; of more channels than three the first three."""
    frozen = store.info.preprocessing
    (image,) = store.images(split, range(index, index + 1))
    values = image * np.asarray(frozen.std) + np.asarray(frozen.mean)
    scaled = np.clip((values - frozen.low) / ((frozen.high - frozen.low) or 1.0), 0, 1)
    pixels = np.round(255 * scaled).astype(np.uint8)
    pixels = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., 0]
    times = -(-SMALLEST_SIDE // max(pixels.shape[:2]))
    return _png(pixels.repeat(times, axis=0).repeat(times, axis=1))


def _png(pixels: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
