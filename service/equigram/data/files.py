"""One PNG, JPEG or TIFF file: what its header says, and its pixels as a person sees them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import (
    Image,
    JpegImagePlugin,  # noqa: F401  loaded here, so that threads do not race to load it
    MpoImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,
    UnidentifiedImageError,
)

from equigram.errors import DataError, EquigramError

Pixels: TypeAlias = NDArray[np.float32]

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")

_FORMATS = ("PNG", "JPEG", "TIFF")
_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")
_COLOUR_MODES = ("RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_PALETTE_MODES = ("P", "PA")
_ORIENTATION = 274
_PHOTOMETRIC = 262
_WHITE_IS_ZERO = 0
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Header:
    """What is known of an image before its pixels are read."""

    height: int
    """Rows, after the turn that EXIF asks for."""
    width: int
    """Columns, after that turn."""
    channels: int
    """Without alpha; of a file 1 (grey) or 3 (colour)."""
    integer: bool = True
    """Whether the pixels are stored as integers, which are scaled to 0..1; floats are used as they are."""
    reduced: bool = False
    """Whether 16 bits per colour channel are read as 8, the most that Pillow keeps."""
    partial: bool = False
    """Whether the file has further channels without a meaning, such as infrared, which are left out."""


def read_header(file: IO[bytes], where: str) -> Header:
    """The header of an image file.

    Raises:
      DataError: not an image, damaged, animated, with several pages, or of a kind that has no clear meaning.
    """
    with _decoding(where):
        return _header(_open(file), where)


def read_pixels(content: bytes, where: str) -> tuple[Pixels, bool]:
    """The pixels of an image file, and whether some are transparent, which shows white through them.

    Args:
      content: the whole file.
      where: what the image is called in errors.

    Returns:
      (H, W, 1) float32 for a grey image and (H, W, 3) for one with colour, in 0..1: 8-bit values are divided by 255,
      16-bit grey by 65535. Upright as EXIF says; without alpha.

    Raises:
      DataError: as :func:`read_header`, or the file is truncated.
    """
    with _decoding(where):
        image = _open(io.BytesIO(content))
        header = _header(image, where)
        image.load()
        turn = _TURNS.get(_orientation(image))
        if turn is not None:
            image = image.transpose(turn)
        if header.channels == 1 and image.mode.startswith("I"):
            colours, alpha = _sixteen_bits(image, where)
        else:
            colours, alpha = _eight_bits(image, grey=header.channels == 1)
        if alpha is None or alpha.min() == 1:
            return colours, False
        return colours * alpha + (1 - alpha), True


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silences Pillow's warnings about large images and odd metadata; what it cannot read is an error anyway."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _open(file: IO[bytes]) -> Image.Image:
    return Image.open(file, formats=_FORMATS)


@contextmanager
def _decoding(where: str) -> Iterator[None]:
    try:
        yield
    except EquigramError:
        raise
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DataError(f"{where} has more than {most} pixels, Pillow's limit for one image; shrink it first") from None
    except UnidentifiedImageError:
        raise DataError(
            f"{where} is not an image that can be read: not PNG, JPEG or TIFF, of a rare kind, or only its first bytes;"
            " replace or remove the file"
        ) from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{where} is truncated or damaged ({reason}); replace or remove the file") from None


def _header(image: Image.Image, where: str) -> Header:
    frames = getattr(image, "n_frames", 1)
    # An MPO is a camera's JPEG with further views of the same scene behind the photograph.
    if frames > 1 and image.format != "MPO":
        raise DataError(f"{where} holds {frames} pages or frames, not one image; save each as a file of its own")
    if image.mode == "F":
        raise DataError(
            f"{where} holds floating-point pixels, whose range is unknown; save it as 16-bit TIFF, or all images as "
            ".npy, whose floats are used as they are"
        )
    if image.mode not in (*_GREY_MODES, *_COLOUR_MODES, *_PALETTE_MODES):
        raise DataError(f"{where} is stored in the colour space {image.mode}; save it as grey or RGB")
    width, height = image.size
    if _orientation(image) >= 5:
        width, height = height, width
    layouts = [str(tile.args) for tile in getattr(image, "tile", ())]
    grey = (
        image.mode in _GREY_MODES
        or (image.mode in _PALETTE_MODES and _has_grey_palette(image))
        or any("LA;16" in layout for layout in layouts)
    )
    reduced = not image.mode.startswith("I") and any(";16" in layout for layout in layouts)
    partial = any("X" in layout for layout in layouts)
    return Header(height, width, 1 if grey else 3, reduced=reduced, partial=partial)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, that is left to apply; metadata that cannot be read asks for nothing."""
    # Pillow turns TIFF files itself, and would decode a PNG file to look for metadata behind its pixels.
    if image.format == "TIFF" or (image.format == "PNG" and not {"exif", "xmp"} & image.info.keys()):
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _has_grey_palette(image: Image.Image) -> bool:
    if image.palette is None:
        return False
    bands = len(image.palette.mode)
    colours = np.frombuffer(bytes(image.palette.palette or b""), dtype=np.uint8)
    if bands < 3 or colours.size % bands:
        return False
    colours = colours.reshape(-1, bands)
    return bool((colours[:, :1] == colours[:, 1:3]).all())


def _sixteen_bits(image: Image.Image, where: str) -> tuple[Pixels, Pixels | None]:
    values = np.asarray(image)[:, :, None]
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise DataError(
            f"{where} holds values from {low} to {high}, but integer pixels are 0 to 65535; save it as 16-bit unsigned,"
            " or all images as float .npy"
        )
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = 65535 - values
    transparent = image.info.get("transparency")
    alpha = None if transparent is None else (values != transparent).astype(np.float32)
    return values.astype(np.float32) / np.float32(65535), alpha


def _eight_bits(image: Image.Image, *, grey: bool) -> tuple[Pixels, Pixels | None]:
    def values(mode: str) -> Pixels:
        array = np.asarray(image.convert(mode), dtype=np.float32) / np.float32(255)
        return array.reshape(*array.shape[:2], -1)

    if not image.has_transparency_data:
        return values("L" if grey else "RGB"), None
    both = values("RGBA")
    return both[:, :, : 1 if grey else 3], both[:, :, 3:]
