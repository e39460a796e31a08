"""Images and labels from folders and arrays: what is read, chosen, refused, and in which words."""

import io
import json
import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import fsspec
import numpy as np
import pytest
import zarr
from numpy.testing import assert_array_equal
from numpy.typing import NDArray
from PIL import Image

from equigram.data import Dataset, Preprocessing, Survey, fingerprint, load_dataset, load_images, survey
from equigram.data.preprocessing import resize
from equigram.errors import DataError, DataNotFoundError, ResourceError
from equigram.spec import DataSpec

Array: TypeAlias = NDArray[Any]


def assert_close(actual: Any, expected: Any, *, rtol: float = 1e-6, atol: float = 0) -> None:
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def load(train: Path | str, *, square: bool = False, **fields: Any) -> Dataset:
    fields.setdefault("normalize", "none")
    return load_dataset(DataSpec(train=str(train), **fields), square=square)


def refuses(words: str, train: Path | str, *, square: bool = False, **fields: Any) -> str:
    """Loading is refused with one line that holds each of ``words``, split at ``|``."""
    with pytest.raises(DataError) as caught:
        load(train, square=square, **fields)
    return check_words(words, caught.value)


def check_words(words: str, error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    for word in words.split("|"):
        assert word in text, f"{word!r} is not in {text!r}"
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None
    return text


def noise(*shape: int, seed: int = 0, dtype: Any = np.uint8) -> Array:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)


def save(path: Path, image: Image.Image | Array, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def class_folders(root: Path, counts: dict[str, int], size: int = 4) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        for index in range(count):
            save(root / name / f"{index:03}.png", noise(size, size, seed=100 * number + index))
    return root


def one_class(root: Path, image: Image.Image | Array, name: str = "a.png", **options: Any) -> Path:
    save(root / "only" / name, image, **options)
    return root


def pixels(
    root: Path, image: Image.Image | Array, name: str = "a.png", save_options: Any = None, **fields: Any
) -> Array:
    """What becomes of one image file."""
    image_of: Array = load(one_class(root, image, name, **(save_options or {})), **fields).train.images[0]
    return image_of


# Folders


def test_the_folder_of_an_image_is_its_class(tmp_path: Path) -> None:
    class_folders(tmp_path, {"dog": 2, "cat": 3})
    data = load(tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.train.images.shape == (5, 4, 4, 1)
    assert data.train.images.dtype == np.float32
    assert data.train.labels is not None
    assert data.train.labels.dtype == np.int64
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert sorted(data.train.names) == ["cat/000.png", "cat/001.png", "cat/002.png", "dog/000.png", "dog/001.png"]
    assert data.test is None
    assert data.notes == ()
    for name, image in zip(data.train.names, data.train.images, strict=True):
        assert_array_equal(image[..., 0], np.asarray(Image.open(tmp_path / name), dtype=np.float32) / 255)


def test_uppercase_suffixes_unicode_names_and_all_formats_are_read(tmp_path: Path) -> None:
    for name in ("Ä/ü ñ.PNG", "Ä/b.JPG", "日本/c.jpeg", "日本/d.TIF", "日本/e.Tiff"):
        save(tmp_path / name, noise(4, 4))
    data = load(tmp_path)
    assert data.classes == ("Ä", "日本")
    assert len(data.train.names) == 5


def test_hidden_files_are_ignored_silently_and_other_files_with_a_note(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 1, "b": 1})
    for name in (".hidden.png", "a/.DS_Store", "a/._000.png", "__MACOSX/a.png", ".cache/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name in ("README.txt", "a/notes.csv", "b/cat.webp"):
        (tmp_path / name).write_bytes(b"")
    data = load(tmp_path)
    assert len(data.train.names) == 2
    assert data.notes == (
        f"ignored 3 files of {tmp_path} that are not PNG, JPEG or TIFF: README.txt, a/notes.csv, b/cat.webp",
    )


def test_links_to_images_and_to_class_folders_are_followed(tmp_path: Path) -> None:
    class_folders(tmp_path / "elsewhere", {"a": 2})
    class_folders(tmp_path / "data", {"b": 1})
    (tmp_path / "data/a").symlink_to(tmp_path / "elsewhere/a")
    (tmp_path / "data/b/link.png").symlink_to(tmp_path / "elsewhere/a/000.png")
    assert sorted(load(tmp_path / "data").train.names) == ["a/000.png", "a/001.png", "b/000.png", "b/link.png"]


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 1})
    (tmp_path / "a/gone.png").symlink_to(tmp_path / "nowhere.png")
    refuses(f"a/gone.png in {tmp_path} does not exist", tmp_path)


def test_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 1})
    save(tmp_path / "stray.png", noise(4, 4))
    refuses(f"stray.png in {tmp_path} lie beside the class folders a|move them into class folders", tmp_path)


def test_a_folder_of_images_without_classes_is_refused_for_training(tmp_path: Path) -> None:
    save(tmp_path / "x.png", noise(4, 4))
    refuses("holds 1 images but no class folders|in a folder of its name", tmp_path)


def test_a_folder_inside_a_class_folder_is_refused(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": 1})
    refuses(f"train/a in {tmp_path} is a folder inside the class folder 'train'|{tmp_path}/train as the", tmp_path)


def test_an_empty_class_folder_is_named_with_what_lies_in_it(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 1})
    (tmp_path / "b").mkdir()
    (tmp_path / "b/x.webp").write_bytes(b"")
    refuses("the class folder 'b'|holds no PNG, JPEG or TIFF image, but b/x.webp", tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    refuses(f"{tmp_path} holds no PNG, JPEG or TIFF image; add images", tmp_path)


def test_a_single_class_is_taken_with_a_note(tmp_path: Path) -> None:
    assert load(class_folders(tmp_path, {"a": 2})).notes == (
        "all images are of the one class 'a': there is nothing to tell apart",
    )


# Places


def test_a_source_that_is_not_there_is_refused_whatever_its_kind(tmp_path: Path) -> None:
    for name in ("nothing", "nothing.npz", "nothing.npy", "nothing.zarr"):
        with pytest.raises(DataNotFoundError) as caught:
            load(tmp_path / name)
        check_words(f"{tmp_path / name} does not exist|check the path", caught.value)
    with pytest.raises(DataNotFoundError):
        load("memory://test-nowhere")


def test_an_unknown_protocol_is_refused() -> None:
    refuses("foo://x starts with 'foo'|not known|s3://", "foo://x")


def test_a_protocol_whose_package_is_missing_is_refused() -> None:
    refuses("gcs://bucket/x needs a package that is not installed|gcsfs|pip", "gcs://bucket/x")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Forbidden"), "may not be read: permission denied|credentials"),
        (ConnectionError("no route\nto host"), "cannot be read (ConnectionError: no route)|check the URL, the network"),
        (RuntimeError(), "cannot be read (RuntimeError)|check the URL"),
    ],
)
def test_what_a_file_system_raises_becomes_one_sentence(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.isdir", fail)
    refuses(f"memory://test-broken {words}", "memory://test-broken")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"PK")
    refuses(f"neither a folder nor an .npz, .npy or zarr|zip://::{tmp_path}/images.zip", tmp_path / "images.zip")


def test_a_single_image_is_refused_for_training(tmp_path: Path) -> None:
    refuses("x.png is a single image; name a folder", save(tmp_path / "x.png", noise(4, 4)))


def test_folders_in_memory_and_in_a_zip_are_read_like_local_ones(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", {"a": 2, "b": 1})
    local = load(tmp_path / "images", seed=3)
    memory = fsspec.filesystem("memory")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in (tmp_path / "images").rglob("*.png"):
            name = path.relative_to(tmp_path / "images").as_posix()
            memory.pipe_file(f"/test-folder/{name}", path.read_bytes())
            archive.write(path, name)
    for url in ("memory://test-folder", "memory://test-folder/", f"zip://::{tmp_path}/images.zip"):
        data = load(url, seed=3)
        assert data.train.names == local.train.names
        assert_array_equal(data.train.images, local.train.images)


# Kinds of image files


def test_grey_files_give_one_channel_and_colour_files_three(tmp_path: Path) -> None:
    grey, colour = noise(3, 3), noise(3, 3, 3)
    assert_array_equal(pixels(tmp_path / "1", grey)[..., 0], np.float32(grey) / 255)
    assert_array_equal(pixels(tmp_path / "2", colour), np.float32(colour) / 255)


def test_grey_files_among_colour_files_become_rgb_with_a_note(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 2}, size=3)
    save(tmp_path / "a/colour.png", noise(3, 3, 3))
    data = load(tmp_path)
    assert data.train.images.shape == (3, 3, 3, 3)
    assert "2 of 3 images are grey; all are stored as RGB" in data.notes
    grey = data.train.images[data.train.names.index("a/000.png")]
    assert_array_equal(grey[..., 0], grey[..., 1])
    assert_array_equal(grey[..., 0], grey[..., 2])


def test_colour_in_the_test_images_counts(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": 1})
    save(tmp_path / "test/a/x.png", noise(4, 4, 3))
    data = load(tmp_path / "train", test=str(tmp_path / "test"))
    assert data.train.images.shape == (1, 4, 4, 3)


def test_gray_uses_the_luma_of_itu_r_601(tmp_path: Path) -> None:
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], dtype=np.uint8)
    result = pixels(tmp_path, colours, color="gray")
    assert_close(result[..., 0], [[0.299, 0.587], [0.114, 1]], rtol=1e-7)


def test_rgb_gives_three_channels_to_grey_files(tmp_path: Path) -> None:
    assert pixels(tmp_path, noise(3, 3), color="rgb").shape == (3, 3, 3)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_opaque_alpha_is_dropped_without_a_note(tmp_path: Path, suffix: str) -> None:
    colours = noise(3, 3, 3)
    opaque = np.concatenate([colours, np.full((3, 3, 1), 255, np.uint8)], axis=2)
    one_class(tmp_path, opaque, f"a.{suffix}")
    data = load(tmp_path)
    assert_array_equal(data.train.images[0], np.float32(colours) / 255)
    assert not any("transparent" in note for note in data.notes)


def test_transparent_pixels_are_put_on_white_with_a_note(tmp_path: Path) -> None:
    one_class(tmp_path, np.array([[[255, 0, 0, 0], [0, 0, 0, 51], [10, 20, 30, 255]]], dtype=np.uint8))
    data = load(tmp_path)
    assert_close(data.train.images[0][0], [[1, 1, 1], [0.8, 0.8, 0.8], [10 / 255, 20 / 255, 30 / 255]], rtol=1e-6)
    assert "1 of 1 images are partly transparent; they are put on white" in data.notes


def test_grey_with_alpha_stays_grey(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[[0, 255], [0, 0]]], dtype=np.uint8), "LA")
    assert_array_equal(pixels(tmp_path, image)[..., 0], [[0, 1]])


def test_a_transparent_grey_level_is_put_on_white(tmp_path: Path) -> None:
    grey = np.array([[7, 100]], dtype=np.uint8)
    assert_close(pixels(tmp_path / "8", grey, save_options={"transparency": 7})[..., 0], [[1, 100 / 255]], rtol=1e-6)
    deep = grey.astype(np.uint16) * 100
    result = pixels(tmp_path / "16", deep, save_options={"transparency": 700})
    assert_close(result[..., 0], [[1, 10000 / 65535]], rtol=1e-6)


def palette_image(colours: list[int]) -> Image.Image:
    image = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8), "P")
    image.putpalette(colours)
    return image


def test_palettes_show_their_colours(tmp_path: Path) -> None:
    result = pixels(tmp_path / "colour", palette_image([255, 0, 0, 0, 0, 255]))
    assert_array_equal(result, [[[1, 0, 0], [0, 0, 1]], [[0, 0, 1], [1, 0, 0]]])
    grey = pixels(tmp_path / "grey", palette_image([51] * 3 + [255] * 3))
    assert_close(grey, [[[0.2], [1]], [[1], [0.2]]], rtol=1e-6)


def test_a_transparent_palette_entry_is_white(tmp_path: Path) -> None:
    for name, transparency in (("one", 0), ("many", bytes([0, 255]))):
        image = palette_image([255, 0, 0, 0, 0, 255])
        result = pixels(tmp_path / name, image, save_options={"transparency": transparency})
        assert_array_equal(result, [[[1, 1, 1], [0, 0, 1]], [[0, 0, 1], [1, 1, 1]]])


def test_cmyk_is_converted(tmp_path: Path) -> None:
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    for name in ("a.jpg", "a.tif"):
        assert_close(pixels(tmp_path / name, image, name), np.broadcast_to([0, 1, 1], (8, 8, 3)), atol=0.02)


def test_one_bit_images_are_black_and_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("1")
    for name in ("a.png", "a.tif"):
        assert_array_equal(pixels(tmp_path / name, image, name)[..., 0], [[0, 1], [1, 0]])


@pytest.mark.parametrize(("name", "dtype"), [("a.png", "<u2"), ("a.tif", "<u2"), ("a.tif", ">u2"), ("a.tif", "<i4")])
def test_sixteen_bit_grey_is_scaled_and_never_clipped(tmp_path: Path, name: str, dtype: str) -> None:
    values = np.array([[0, 255, 256], [300, 40000, 65535]], dtype=dtype)
    assert_array_equal(pixels(tmp_path, values, name)[..., 0], values.astype(np.float32) / np.float32(65535))


def test_sixteen_bit_tiff_with_white_as_zero_is_not_inverted(tmp_path: Path) -> None:
    result = pixels(tmp_path, np.array([[0, 65535]], dtype=np.uint16), "a.tif", {"tiffinfo": {262: 0}})
    assert_array_equal(result[..., 0], [[1, 0]])


@pytest.mark.parametrize("values", [[-1, 5], [0, 65536]])
def test_integers_beyond_sixteen_bits_are_refused(tmp_path: Path, values: list[int]) -> None:
    one_class(tmp_path, np.array([values], dtype=np.int32), "a.tif")
    refuses(f"only/a.tif in {tmp_path} holds values from {values[0]} to {values[1]}|0 to 65535|16-bit", tmp_path)


def test_sixteen_bits_per_colour_are_noted(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/deep.png").write_bytes(png_of_16_bit_colour())
    assert "1 of 1 images have 16 bits per colour channel, of which 8 are read" in load(tmp_path).notes


def png_of_16_bit_colour() -> bytes:
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    row = b"\0" + struct.pack(">HHH", 65535, 0, 256)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")


def test_channels_beyond_colour_are_noted(tmp_path: Path) -> None:
    one_class(tmp_path, Image.frombytes("RGBX", (4, 4), noise(4, 4, 4).tobytes()), "a.tif")
    data = load(tmp_path)
    assert data.train.images.shape == (1, 4, 4, 3)
    assert "1 of 1 images have channels beyond grey or RGB, which are left out" in data.notes


def test_float_files_are_refused(tmp_path: Path) -> None:
    one_class(tmp_path, np.ones((2, 2), dtype=np.float32), "a.tif")
    refuses("only/a.tif|floating-point pixels|16-bit TIFF|.npy", tmp_path)


def test_files_with_several_pages_are_refused(tmp_path: Path) -> None:
    frames = [Image.fromarray(noise(4, 4, seed=seed)) for seed in range(3)]
    one_class(tmp_path / "tif", frames[0], "a.tif", save_all=True, append_images=frames[1:])
    refuses("only/a.tif|holds 3 pages or frames|save each", tmp_path / "tif")
    one_class(tmp_path / "png", frames[0], "a.png", save_all=True, append_images=frames[1:])
    refuses("only/a.png|holds 3 pages or frames|save each", tmp_path / "png")


def test_the_photograph_of_a_camera_file_with_further_views_is_read(tmp_path: Path) -> None:
    photo, view = Image.fromarray(noise(8, 8, 3)), Image.fromarray(noise(8, 8, 3, seed=1))
    result = pixels(tmp_path, photo, "a.jpg", {"format": "MPO", "save_all": True, "append_images": [view]})
    assert result.shape == (8, 8, 3)


def test_a_colour_space_without_a_plain_meaning_is_refused(tmp_path: Path) -> None:
    one_class(tmp_path, Image.new("LAB", (4, 4)), "a.tif")
    refuses("only/a.tif|colour space LAB|RGB", tmp_path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright_as_exif_says(tmp_path: Path, name: str, orientation: int) -> None:
    upright = np.kron(np.array([[0, 80, 160], [240, 20, 120]], dtype=np.uint8), np.ones((8, 8), np.uint8))
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    options = {"tiffinfo": {274: orientation}} if name == "a.tif" else {"exif": exif, "quality": 95}
    data = load(one_class(tmp_path, np.ascontiguousarray(stored), name, **options))
    assert (data.preprocessing.height, data.preprocessing.width) == (16, 24)
    assert_close(data.train.images[0][..., 0], upright / 255, atol=0.05)


def test_broken_exif_does_not_hide_an_image(tmp_path: Path) -> None:
    assert pixels(tmp_path, noise(8, 8), "a.jpg", {"exif": b"Exif\0\0nonsense"}).shape == (8, 8, 1)


# Files that are not what they should be


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
@pytest.mark.parametrize("share", [0.6, 0.9])
def test_a_truncated_file_is_named(tmp_path: Path, name: str, share: float) -> None:
    path = save(tmp_path / "only" / name, noise(64, 64, 3))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    text = refuses(f"only/{name} in {tmp_path} is |replace or remove the file", tmp_path)
    assert "truncated or damaged" in text or "only its first bytes" in text


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"RIFF0000WEBPVP8 "])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    class_folders(tmp_path, {"a": 1})
    (tmp_path / "a/bad.png").write_bytes(content)
    refuses(f"a/bad.png in {tmp_path} is |replace or remove the file", tmp_path)


def test_an_image_that_only_claims_its_suffix_is_refused_if_not_png_jpeg_or_tiff(tmp_path: Path) -> None:
    one_class(tmp_path, noise(4, 4), "a.png", format="GIF")
    refuses("only/a.png|is not an image that can be read: not PNG, JPEG or TIFF", tmp_path)


def test_a_decompression_bomb_is_refused_and_a_large_image_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_class(tmp_path, noise(20, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    assert load(tmp_path).train.images.shape == (1, 20, 20, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    refuses("only/a.png|more than 200 pixels|shrink it", tmp_path)


def test_of_several_bad_files_the_first_is_named(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 30})
    for index in (7, 21):
        (tmp_path / f"a/{index:03}.png").write_bytes(b"")
    first = min(range(30), key=lambda place: load_order(30)[place] not in (7, 21))
    refuses(f"a/{load_order(30)[first]:03}.png", tmp_path)


def load_order(count: int) -> list[int]:
    order: list[int] = np.random.default_rng(0).permutation(np.arange(count)).tolist()
    return order


# Size and crop


def test_without_size_a_differently_sized_image_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a/1.png", noise(4, 4))
    save(tmp_path / "b/2.png", noise(5, 6))
    refuses(
        f"b/2.png in {tmp_path} is 6 pixels wide and 5 high, but a/1.png in {tmp_path} is 4 wide and 4 high"
        "|set data.size",
        tmp_path,
    )


def test_size_resizes_all(tmp_path: Path) -> None:
    save(tmp_path / "a/1.png", noise(4, 4))
    save(tmp_path / "b/2.png", noise(9, 9))
    assert load(tmp_path, size=6).train.images.shape == (2, 6, 6, 1)


def test_an_image_that_is_not_square_is_refused_where_it_is_resized(tmp_path: Path) -> None:
    one_class(tmp_path, noise(4, 6))
    refuses("only/a.png|6 pixels wide and 4 high|cannot be resized to 4 x 4|data.crop: center", tmp_path, size=4)


def test_an_image_that_is_not_square_is_refused_for_quarter_turns(tmp_path: Path) -> None:
    one_class(tmp_path, noise(4, 6))
    refuses("only/a.png|6 pixels wide and 4 high|data.crop: center|C1, C2, D1 and D2", tmp_path, square=True)
    assert load(tmp_path).train.images.shape == (1, 4, 6, 1)


@pytest.mark.parametrize(("shape", "part"), [((4, 7), np.s_[:, 1:5]), ((7, 4), np.s_[1:5]), ((4, 4), np.s_[:])])
def test_crop_takes_the_central_square(tmp_path: Path, shape: tuple[int, int], part: Any) -> None:
    values = noise(*shape)
    one_class(tmp_path, values)
    data = load(tmp_path, crop="center", square=True)
    assert_array_equal(data.train.images[0][..., 0], np.float32(values[part]) / 255)


def test_cropped_images_of_different_sizes_need_size(tmp_path: Path) -> None:
    save(tmp_path / "a/1.png", noise(4, 5))
    save(tmp_path / "a/2.png", noise(6, 8))
    refuses("(cropped to a square)|set data.size", tmp_path, crop="center")
    assert load(tmp_path, crop="center", size=4).train.images.shape == (2, 4, 4, 1)


def test_shrinking_averages_instead_of_skipping_pixels() -> None:
    checkerboard = (np.indices((64, 64)).sum(axis=0) % 2).astype(np.float32)[:, :, None]
    assert_close(resize(checkerboard, 8), 0.5, atol=0.01)


@pytest.mark.parametrize("size", [1, 5, 16, 40])
def test_resizing_commutes_with_quarter_turns_and_keeps_constants(size: int) -> None:
    image = (noise(16, 16, 2) / 255).astype(np.float32)
    assert_close(resize(np.rot90(image), size), np.rot90(resize(image, size)), atol=1e-6)
    assert_close(resize(np.full((16, 16, 1), 0.3, dtype=np.float32), size), 0.3, atol=1e-6)
    assert resize(image, size).shape == (size, size, 2)


# Arrays


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_npz_with_x_and_y(tmp_path: Path) -> None:
    x, y = noise(6, 4, 4, 3), np.array([5, 3, 5, 10, 3, 5])
    data = load(npz(tmp_path / "d.npz", x=x, y=y))
    assert data.classes == ("3", "5", "10")
    assert data.train.labels is not None
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert data.notes == ()
    for name, image, label in zip(data.train.names, data.train.images, data.train.labels, strict=True):
        index = int(name.removeprefix("x[").removesuffix("]"))
        assert_array_equal(image, np.float32(x[index]) / 255)
        assert data.classes[label] == str(y[index])


@pytest.mark.parametrize(
    "names",
    [("x_train", "y_train", "x_test", "y_test"), ("train_images", "train_labels", "test_images", "test_labels")],
)
@pytest.mark.parametrize("label_shape", [(-1,), (-1, 1)])
def test_the_test_arrays_of_an_npz_are_used(
    tmp_path: Path, names: tuple[str, ...], label_shape: tuple[int, ...]
) -> None:
    y, y_test = np.arange(8, dtype=np.uint8) % 4, np.array([3, 0, 1], dtype=np.uint8)
    arrays = (noise(8, 5, 5), y.reshape(label_shape), noise(3, 5, 5, seed=1), y_test.reshape(label_shape))
    path = npz(tmp_path / "d.npz", **dict(zip(names, arrays, strict=True)))
    for test in (None, str(path)):
        data = load(path, test=test)
        assert data.test is not None
        assert data.test.labels is not None
        assert data.test.labels.tolist() == [3, 0, 1]
        assert data.test.names == (f"{names[2]}[0]", f"{names[2]}[1]", f"{names[2]}[2]")
        assert_array_equal(data.test.images[..., 0], np.float32(arrays[2]) / 255)
        assert data.notes == ()


def test_arrays_that_are_not_used_are_noted(tmp_path: Path) -> None:
    y = np.array([0, 1])
    medmnist = {f"{s}_{k}": v for s in ("train", "val", "test") for k, v in (("images", noise(2, 3, 3)), ("labels", y))}
    path = npz(tmp_path / "d.npz", **medmnist)
    assert load(path).notes == (f"not used of {path}: val_images, val_labels",)
    x = npz(tmp_path / "x.npz", x_train=noise(4, 3, 3), y_train=[0, 0, 1, 1], x_test=noise(1, 3, 3), y_test=[0])
    data = load(x, test_fraction=0.5)
    assert data.notes == (f"not used of {x}: x_test, y_test",)
    assert data.test is not None
    assert all(name.startswith("x_train") for name in data.test.names)


def test_test_images_in_another_file_are_found_under_any_of_the_names(tmp_path: Path) -> None:
    train = npz(tmp_path / "train.npz", x=noise(4, 3, 3), y=[0, 0, 1, 1])
    for names in (("x", "y"), ("images", "labels"), ("x_test", "y_test")):
        test = npz(tmp_path / "test.npz", **{names[0]: noise(2, 3, 3), names[1]: [1, 0]})
        data = load(train, test=str(test))
        assert data.test is not None
        assert data.test.labels is not None
        assert data.test.labels.tolist() == [1, 0]


def test_the_training_images_are_refused_as_test_images(tmp_path: Path) -> None:
    path = npz(tmp_path / "d.npz", x=noise(2, 3, 3), y=[0, 1])
    refuses("holds the training images themselves|data.test_fraction", path, test=str(path))
    class_folders(tmp_path / "f", {"a": 1})
    refuses("holds the training images themselves", tmp_path / "f", test=f"{tmp_path}/f/")


def test_wrong_names_in_an_npz_are_refused(tmp_path: Path) -> None:
    path = npz(tmp_path / "d.npz", X=noise(2, 3, 3), target=[0, 1])
    refuses(f"{path} holds X, target, but none of x_train, train_images, x, images", path)
    refuses("holds no arrays, but none of", npz(tmp_path / "e.npz"))


def test_npy_with_labels_of_its_own_file(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", noise(4, 3, 3))
    np.save(tmp_path / "y.npy", np.array([1, 0, 1, 0]))
    np.save(tmp_path / "t.npy", noise(2, 3, 3))
    data = load(tmp_path / "x.npy", train_labels=str(tmp_path / "y.npy"), test=str(tmp_path / "t.npy"))
    assert data.classes == ("0", "1")
    assert sorted(data.train.names) == ["x.npy[0]", "x.npy[1]", "x.npy[2]", "x.npy[3]"]
    assert data.test is not None
    assert data.test.labels is None


def test_npy_without_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", noise(5, 3, 3))
    data = load(tmp_path / "x.npy", test_fraction=0.4)
    assert data.classes is None
    assert data.train.labels is None
    assert data.test is not None
    assert (len(data.train.names), len(data.test.names)) == (3, 2)


def test_labels_are_refused_where_the_source_has_its_own(tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", [0, 1])
    labels = str(tmp_path / "y.npy")
    class_folders(tmp_path / "f", {"a": 1})
    refuses("data.train_labels|is a folder, whose class folders", tmp_path / "f", train_labels=labels)
    path = npz(tmp_path / "d.npz", x=noise(2, 3, 3), y=[0, 1])
    refuses("holds labels, y, and data.train_labels|names others", path, train_labels=labels)
    assert load(npz(tmp_path / "e.npz", x=noise(2, 3, 3)), train_labels=labels).classes == ("0", "1")
    np.save(tmp_path / "x.npy", noise(2, 3, 3))
    refuses("d.npz is not a single array of labels", tmp_path / "x.npy", train_labels=str(path))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr_groups_and_arrays(tmp_path: Path, zarr_format: Any) -> None:
    x, y = noise(6, 4, 4), np.array([0, 0, 0, 1, 1, 1], dtype=np.int32)
    group = zarr.open_group(tmp_path / "d.zarr", mode="w", zarr_format=zarr_format)
    group.create_array("images", data=x, chunks=(2, 4, 4))
    group.create_array("labels", data=y)
    np.savez(tmp_path / "d.npz", images=x, labels=y)
    np.save(tmp_path / "y.npy", y)
    expected = load(tmp_path / "d.npz", per_class=2)
    for url in (str(tmp_path / "d.zarr"), f"file://{tmp_path}/d.zarr"):
        data = load(url, per_class=2)
        assert data.train.names == expected.train.names
        assert_array_equal(data.train.images, expected.train.images)
    single = load(tmp_path / "d.zarr/images", train_labels=str(tmp_path / "y.npy"), per_class=2)
    assert_array_equal(single.train.images, expected.train.images)
    single = load(tmp_path / "d.zarr/images", train_labels=str(tmp_path / "d.zarr/labels"), per_class=2)
    assert_array_equal(single.train.images, expected.train.images)


def test_zarr_in_memory_with_test_arrays() -> None:
    store = zarr.storage.FsspecStore.from_url("memory://test-zarr/d.zarr")
    group = zarr.open_group(store, mode="w")
    for name, data in {"x_train": noise(4, 3, 3), "y_train": np.array([0, 0, 1, 1]), "x_test": noise(2, 3, 3)}.items():
        group.create_array(name, data=data)
    dataset = load("memory://test-zarr/d.zarr")
    assert dataset.classes == ("0", "1")
    assert dataset.test is not None
    assert dataset.test.labels is None
    group = zarr.open_group(zarr.storage.FsspecStore.from_url("memory://test-zarr/e.zarr"), mode="w")
    group.create_array("pictures", data=noise(2, 3, 3))
    refuses("e.zarr holds pictures, but none of x_train", "memory://test-zarr/e.zarr")


def test_text_labels_are_class_names(tmp_path: Path) -> None:
    data = load(npz(tmp_path / "d.npz", x=noise(3, 3, 3), y=["dog", "cat", "dog"]))
    assert data.classes == ("cat", "dog")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2", "float16", "float32", ">f4", "float64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_any_usable_dtype_and_order(tmp_path: Path, dtype: str, order: Any) -> None:
    values = noise(3, 4, 4).astype(dtype)
    np.save(tmp_path / "x.npy", np.asarray(values, order=order))
    data = load(tmp_path / "x.npy", square=True)
    scale = {"uint8": 255, "uint16": 65535, ">u2": 65535}.get(dtype, 1)
    assert data.train.images.dtype == np.dtype("float32")
    for name, image in zip(data.train.names, data.train.images, strict=True):
        expected = values[int(name[6:-1])].astype(np.float32) / np.float32(scale)
        assert_array_equal(image[..., 0], expected)


@pytest.mark.parametrize("dtype", [bool, "int8", "int64", "uint32", "complex64"])
def test_arrays_of_other_dtypes_are_refused(tmp_path: Path, dtype: Any) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 3), dtype))
    refuses(f"x.npy has dtype {np.dtype(dtype)}, but images are uint8|floats|astype", tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((4, 4), "has shape (4, 4), but images are (n, height, width)|x[None]"),
        ((2, 3, 8, 8), "has shape (2, 3, 8, 8), which looks like (n, channels, height, width)|transpose(0, 2, 3, 1)"),
        ((2, 1, 28, 28), "looks like (n, channels, height, width)"),
        ((2, 8, 8, 17), "17 channels, and at most 16"),
        ((0, 8, 8, 3), "holds no pixels"),
        ((2, 8, 0), "holds no pixels"),
        ((1, 2, 8, 8, 3), "has shape (1, 2, 8, 8, 3), but images are"),
    ],
)
def test_arrays_of_other_shapes_are_refused(tmp_path: Path, shape: tuple[int, ...], words: str) -> None:
    np.save(tmp_path / "x.npy", np.zeros(shape, np.uint8))
    refuses(f"x.npy|{words}", tmp_path / "x.npy")


def test_arrays_keep_their_channels_unless_told(tmp_path: Path) -> None:
    np.save(tmp_path / "2.npy", noise(2, 4, 4, 2))
    assert load(tmp_path / "2.npy").train.images.shape == (2, 4, 4, 2)
    refuses("has 2 channels, and data.color: gray converts images of 1 or 3", tmp_path / "2.npy", color="gray")
    np.save(tmp_path / "3.npy", noise(2, 4, 4, 3))
    assert load(tmp_path / "3.npy", color="gray").train.images.shape == (2, 4, 4, 1)
    np.save(tmp_path / "1.npy", noise(2, 4, 4))
    assert load(tmp_path / "1.npy", color="rgb").train.images.shape == (2, 4, 4, 3)
    refuses("1.npy[0]|has 1 channels, but|has 3|data.color: rgb", tmp_path / "3.npy", test=str(tmp_path / "1.npy"))


def test_arrays_are_cropped_and_resized_like_files(tmp_path: Path) -> None:
    values = noise(1, 8, 12, 3)
    np.save(tmp_path / "x.npy", values)
    from_file = pixels(tmp_path / "f", values[0], crop="center", size=5)
    assert_array_equal(load(tmp_path / "x.npy", crop="center", size=5).train.images[0], from_file)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_pixels_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    values = np.zeros((3, 4, 4))
    values[1, 2, 3] = value
    np.save(tmp_path / "x.npy", values)
    refuses("x.npy[1] in|row 2, column 3|finite", tmp_path / "x.npy")


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([{}, 1], dtype=object))
    refuses("x in|Python objects (dtype object)|unpickled", tmp_path / "d.npz")
    np.save(tmp_path / "x.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    refuses("x.npy holds Python objects", tmp_path / "x.npy")


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
@pytest.mark.parametrize("size", [0, 5, 60, 200, 400])
def test_truncated_array_files_are_refused(tmp_path: Path, name: str, size: int) -> None:
    path = tmp_path / name
    np.save(path, noise(20, 8, 8)) if name == "x.npy" else np.savez(path, x=noise(20, 8, 8))
    path.write_bytes(path.read_bytes()[:size])
    refuses(f"{name}|truncated, damaged|save it again", path)


def test_damaged_zarr_is_refused(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "x.zarr", data=noise(4, 3, 3), chunks=(2, 3, 3))
    (tmp_path / "x.zarr/c/0/0/0").write_bytes(b"nonsense")
    refuses("x.zarr cannot be read", tmp_path / "x.zarr")
    (tmp_path / "x.zarr/zarr.json").write_text("{")
    refuses("x.zarr cannot be read", tmp_path / "x.zarr")


# Labels


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1, 2], "holds 3 labels, but x in|holds 4 images|one label per image"),
        (np.zeros((4, 2), int), "dtype int64 and shape (4, 2)|argmax(axis=1)"),
        (np.zeros((4, 1, 1)), "shape (4, 1, 1)"),
        (np.zeros((4, 0)), "shape (4, 0)"),
        (np.array(3), "holds 1 labels, but x"),
        (np.zeros(4, complex), "has dtype complex128, but labels are integers"),
        ([0.5, np.nan, 1, 2], "holds [nan] for image 1|finite"),
    ],
)
def test_unusable_labels_are_refused(tmp_path: Path, labels: Any, words: str) -> None:
    refuses(f"y in {tmp_path}|{words}", npz(tmp_path / "d.npz", x=noise(4, 3, 3), y=labels))


@pytest.mark.parametrize("targets", [np.arange(5) / 3, (np.arange(10) / 3).reshape(5, 2).astype(np.float32)])
def test_float_labels_are_regression_targets(tmp_path: Path, targets: Array) -> None:
    data = load(npz(tmp_path / "d.npz", x=noise(5, 3, 3), y=targets))
    assert data.classes is None
    assert data.train.labels is not None
    assert data.train.labels.dtype == np.float64
    order = [int(name[2:-1]) for name in data.train.names]
    assert sorted(order) == list(range(5))
    assert_array_equal(data.train.labels, targets.reshape(5, -1)[order])
    assert data.notes == ()


def test_whole_numbers_stored_as_floats_are_noted(tmp_path: Path) -> None:
    data = load(npz(tmp_path / "d.npz", x=noise(2, 3, 3), y=[0.0, 1.0]))
    assert any("whole numbers stored as floats" in note for note in data.notes)


def test_test_labels_must_be_of_the_kind_of_the_training_labels(tmp_path: Path) -> None:
    x = noise(2, 3, 3)
    train = npz(tmp_path / "train.npz", x=x, y=[0, 1])
    targets = npz(tmp_path / "targets.npz", x=x, y=[[0.5], [1.5]])
    pairs = npz(tmp_path / "pairs.npz", x=x, y=np.ones((2, 2)) / 3)
    nothing = npz(tmp_path / "nothing.npz", x=x)
    refuses("have 1 regression targets per image, but|have classes", train, test=str(targets))
    refuses("have 2 regression targets per image, but|have 1 regression", targets, test=str(pairs))
    refuses("have classes, but|have no labels", nothing, test=str(train))


def test_test_classes_are_matched_by_name(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": 1, "b": 1, "c": 1})
    class_folders(tmp_path / "test", {"c": 2, "b": 1})
    data = load(tmp_path / "train", test=str(tmp_path / "test"))
    assert data.test is not None
    assert data.test.labels is not None
    assert data.test.labels.tolist() == [1, 2, 2]
    assert data.test.names == ("b/000.png", "c/000.png", "c/001.png")
    class_folders(tmp_path / "test", {"zebra": 1})
    refuses(
        "of the classes 'zebra', which|do not have ('a', 'b', 'c')", tmp_path / "train", test=str(tmp_path / "test")
    )


# Choice


def test_the_choice_is_the_same_whatever_order_files_are_listed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    class_folders(tmp_path, {"a": 9, "b": 7})
    fields: dict[str, Any] = {"test_fraction": 0.3, "per_class": 3, "test_per_class": 2, "seed": 5}
    expected = load(tmp_path, **fields)
    ls: Callable[..., list[Any]] = LocalFileSystem.ls
    monkeypatch.setattr(LocalFileSystem, "ls", lambda *a, **k: ls(*a, **k)[::-1])
    data = load(tmp_path, **fields)
    assert data.train.names == expected.train.names
    assert data.test is not None
    assert expected.test is not None
    assert data.test.names == expected.test.names


def test_per_class_chooses_nested_random_subsets(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 8, "b": 8})
    runs = [load(tmp_path, seed=1, per_class=k) for k in (1, 3, 8)] + [load(tmp_path, seed=1)]
    for small, large in pairwise(runs):
        for label in (0, 1):
            few, many = (names_of(run, label) for run in (small, large))
            assert many[: len(few)] == few
    assert runs[1].train.names != load(tmp_path, seed=2, per_class=3).train.names
    assert list(runs[3].train.names) != sorted(runs[3].train.names)


def names_of(data: Dataset, label: int) -> list[str]:
    return [name for name, own in zip(data.train.names, labels_of(data), strict=True) if own == label]


def labels_of(data: Dataset) -> list[int]:
    assert data.train.labels is not None
    return [int(label) for label in data.train.labels]


def test_only_chosen_files_are_decoded(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 5})
    kept = load(tmp_path, per_class=2).train.names
    for path in (tmp_path / "a").iterdir():
        if f"a/{path.name}" not in kept:
            path.write_bytes(b"no image")
    assert load(tmp_path, per_class=2).train.names == kept


def test_test_fraction_takes_its_share_of_every_class(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 10, "b": 5, "c": 2})
    data = load(tmp_path, test_fraction=0.2)
    assert data.test is not None
    assert data.test.labels is not None
    assert np.bincount(data.test.labels).tolist() == [2, 1, 1]
    assert np.bincount(labels_of(data)).tolist() == [8, 4, 1]
    assert not set(data.test.names) & set(data.train.names)
    assert list(data.test.names) == sorted(data.test.names)
    most = load(tmp_path, test_fraction=0.99).train
    assert len(most.names) == 3


def test_a_class_too_small_to_be_shared_is_refused(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 3, "b": 1})
    refuses("class 'b' has 1 image|data.test_fraction = 0.2 needs at least 2", tmp_path, test_fraction=0.2)


def test_too_few_images_of_a_class_are_refused(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 9, "b": 4})
    refuses("class 'b' has 4 training images in|data.per_class = 5|lower it or add images", tmp_path, per_class=5)
    refuses("class 'b' has 3 training images left of 4", tmp_path, per_class=4, test_fraction=0.25)
    refuses("class 'b' has 1 test images|data.test_per_class = 2", tmp_path, test_per_class=2, test_fraction=0.25)


def test_choosing_by_class_needs_classes(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", noise(4, 3, 3))
    refuses("data.per_class = 2|no classes|integer labels", tmp_path / "x.npy", per_class=2)
    regression = npz(tmp_path / "d.npz", x=noise(4, 3, 3), y=np.arange(4) / 3)
    refuses("data.per_class = 2|no classes", regression, per_class=2)
    refuses("data.test_per_class = 1|no classes", regression, test_per_class=1, test_fraction=0.5)
    class_folders(tmp_path / "f", {"a": 2})
    refuses("data.test_per_class = 1, but there are no test images", tmp_path / "f", test_per_class=1)


# Normalisation


def test_each_channel_is_normalised_by_the_training_images(tmp_path: Path) -> None:
    x = noise(6, 4, 4, 3).astype(np.float64) * [1, 10, 100] + [1000, 0, -5]
    path = npz(tmp_path / "d.npz", x_train=x, x_test=x[:2] + 1)
    data = load(path, normalize="per_channel")
    assert_close(data.train.images.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    assert_close(data.train.images.std(axis=(0, 1, 2)), 1, atol=1e-5)
    assert_close(data.preprocessing.mean, x.mean(axis=(0, 1, 2)), rtol=1e-6)
    assert_close(data.preprocessing.std, x.std(axis=(0, 1, 2)), rtol=1e-6)
    assert data.test is not None
    expected = (x[:2] + 1 - x.mean(axis=(0, 1, 2))) / x.std(axis=(0, 1, 2))
    assert_close(data.test.images, expected, atol=1e-4)


def test_without_normalisation_mean_is_0_and_std_1(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", noise(2, 4, 4, 3))
    preprocessing = load(tmp_path / "x.npy").preprocessing
    assert (preprocessing.mean, preprocessing.std) == ((0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize("size", [None, 3])
def test_of_a_constant_channel_only_the_mean_is_removed(tmp_path: Path, size: int | None) -> None:
    x = noise(3, 7, 7, 3)
    x[..., 2] = 77
    np.save(tmp_path / "x.npy", x)
    data = load(tmp_path / "x.npy", normalize="per_channel", size=size)
    assert data.preprocessing.std[2] == 1
    assert_close(data.train.images[..., 2], 0, atol=1e-6)
    assert data.notes == ("channel 2 is constant over the training images: only its mean is removed",)


def test_preprocessing_survives_json(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 3})
    preprocessing = load(tmp_path, normalize="per_channel", size=3, crop="center").preprocessing
    assert Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json()))) == preprocessing
    with pytest.raises(DataError, match=r"differ from those of this version in \['mean'\]"):
        Preprocessing.from_json({k: v for k, v in preprocessing.to_json().items() if k != "mean"})


# New images


def refuses_new(words: str, url: Path | str, preprocessing: Preprocessing) -> None:
    with pytest.raises(DataError) as caught:
        load_images(str(url), preprocessing)
    check_words(words, caught.value)


def test_new_images_are_treated_like_the_training_images(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": 3, "b": 2}, size=8)
    data = load(tmp_path / "train", size=5, normalize="per_channel")
    again = load_images(str(tmp_path / "train"), data.preprocessing)
    assert again.labels is None
    assert again.names == tuple(sorted(data.train.names))
    order = [again.names.index(name) for name in data.train.names]
    assert_array_equal(again.images[order], data.train.images)
    one = load_images(str(tmp_path / "train/a/001.png"), data.preprocessing)
    assert one.names == ("001.png",)
    assert_array_equal(one.images[0], again.images[1])
    flat = load_images(str(tmp_path / "train/a"), data.preprocessing)
    assert flat.names == ("000.png", "001.png", "002.png")
    assert_array_equal(flat.images, again.images[:3])
    stack = np.stack([np.asarray(Image.open(tmp_path / "train/a" / name)) for name in flat.names])
    np.save(tmp_path / "x.npy", stack)
    np.savez(tmp_path / "x.npz", x=stack)
    zarr.create_array(tmp_path / "x.zarr", data=stack)
    for name in ("x.npy", "x.npz", "x.zarr"):
        assert_array_equal(load_images(str(tmp_path / name), data.preprocessing).images, again.images[:3])


def test_new_images_of_another_size_or_channels_are_refused(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": 2}, size=4)
    preprocessing = load(tmp_path / "train").preprocessing
    big, colour = save(tmp_path / "big.png", noise(5, 6)), save(tmp_path / "colour.png", noise(4, 4, 3))
    words = f"{big} is 6 pixels wide and 5 high, but every training image is 4 wide and 4 high; bring"
    refuses_new(words, big, preprocessing)
    refuses_new("colour.png has 3 channels, but every training image has 1|bring new images", colour, preprocessing)
    np.save(tmp_path / "x.npy", noise(1, 4, 4, 2))
    refuses_new("x.npy[0]|has 2 channels, but every training image has 1", tmp_path / "x.npy", preprocessing)
    gray = load(tmp_path / "train", color="gray").preprocessing
    assert load_images(str(colour), gray).images.shape == (1, 4, 4, 1)


def test_grey_new_images_fit_colour_training_images(tmp_path: Path) -> None:
    one_class(tmp_path / "train", noise(4, 4, 3))
    preprocessing = load(tmp_path / "train").preprocessing
    assert load_images(str(save(tmp_path / "grey.png", noise(4, 4))), preprocessing).images.shape == (1, 4, 4, 3)


def test_new_images_on_another_scale_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "int.npy", noise(2, 4, 4))
    np.save(tmp_path / "unit.npy", noise(2, 4, 4) / 255)
    np.save(tmp_path / "float.npy", noise(2, 4, 4).astype(np.float32))
    integer, unit, free = (load(tmp_path / name).preprocessing for name in ("int.npy", "unit.npy", "float.npy"))
    refuses_new("float pixels from|integers, scaled to 0..1", tmp_path / "float.npy", integer)
    refuses_new("integer pixels, which are scaled to 0..1, but|are floats from", tmp_path / "int.npy", free)
    assert_close(
        load_images(str(tmp_path / "unit.npy"), integer).images, load_images(str(tmp_path / "int.npy"), unit).images
    )
    refuses("float pixels from|integers, scaled", tmp_path / "int.npy", test=str(tmp_path / "float.npy"))


def test_there_must_be_new_images(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": 1})
    preprocessing = load(tmp_path / "train").preprocessing
    (tmp_path / "none").mkdir()
    refuses_new("holds no PNG, JPEG or TIFF image", tmp_path / "none", preprocessing)
    refuses_new("does not exist", tmp_path / "nothing", preprocessing)
    refuses_new("but none of x, images, x_test", npz(tmp_path / "d.npz", a=noise(1, 4, 4)), preprocessing)


# Progress, memory, fingerprint, import


def test_progress_counts_every_image(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 4})
    calls: list[tuple[str, int, int]] = []
    load_dataset(
        DataSpec(train=str(tmp_path), test_fraction=0.25), square=True, progress=lambda *call: calls.append(call)
    )
    assert calls == [
        *(("checking training images", done, 3) for done in (1, 2, 3)),
        ("checking test images", 1, 1),
        *(("reading training images", done, 3) for done in (1, 2, 3)),
        ("reading test images", 1, 1),
    ]


def test_what_a_survey_has_looked_at_is_not_looked_at_again(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 4})
    spec = DataSpec(train=str(tmp_path), test_fraction=0.25)
    calls: list[str] = []

    def told(what: str, done: int, total: int) -> None:
        calls.append(what)

    found = survey(spec, square=True, progress=told)
    assert calls == ["checking training images"] * 3 + ["checking test images"]
    dataset = load_dataset(spec, square=True, progress=told, surveyed=found)
    assert calls[4:] == ["reading training images"] * 3 + ["reading test images"]
    assert_array_equal(dataset.train.images, load_dataset(spec, square=True).train.images)


@pytest.mark.parametrize("name", ["photos", "photos.npz"])
def test_a_server_that_does_not_answer_is_not_called_an_absence(name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/{name}"
    refuses(f"{url} cannot be read (ClientConnectorError: Cannot connect to host|check the URL, the network", url)


def test_a_survey_tells_number_and_shape_without_decoding(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 4, "b": 4}, size=200)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:1000])
    spec = DataSpec(train=str(tmp_path), size=6, test_fraction=0.25, per_class=2, color="rgb")
    found = survey(spec, square=True)
    assert found == Survey(train=4, test=2, height=6, width=6, channels=3, labels=None, classes=("a", "b"))
    assert_array_equal(found.labels, [0, 0, 1, 1])
    with pytest.raises(DataError, match="truncated"):
        load_dataset(spec, square=True)


def test_more_images_than_memory_holds_are_refused_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_folders(tmp_path, {"a": 3}, size=16)
    monkeypatch.setattr("equigram.data.dataset.available_memory", lambda: 2048)
    with pytest.raises(ResourceError) as caught:
        load(tmp_path)
    check_words("3 images as float32 (3, 16, 16, 1) need 3.0 KiB|2.0 KiB is available|data.size", caught.value)


def test_an_array_larger_than_memory_is_refused_before_reading(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 64, 64)})
    (tmp_path / "x.npy").write_bytes(header.getvalue())
    np.save(tmp_path / "y.npy", [0, 1])
    spec = DataSpec(train=str(tmp_path / "x.npy"), train_labels=str(tmp_path / "y.npy"))
    with pytest.raises(DataError, match="holds 2 labels"):
        load_dataset(spec, square=False)
    (tmp_path / "x.npy").write_bytes(header.getvalue().replace(b"1000000000000, 64, 64", b"2, 1000000000, 64    "))
    with pytest.raises(ResourceError, match="need"):
        load_dataset(spec, square=False)


def test_the_fingerprint_changes_with_the_files_and_not_with_the_place(tmp_path: Path) -> None:
    def of(**fields: Any) -> dict[str, int | str]:
        return fingerprint(DataSpec(**fields))

    class_folders(tmp_path / "one", {"a": 2})
    (tmp_path / "one").rename(tmp_path / "two")
    class_folders(tmp_path / "one", {"a": 2})
    original = of(train=tmp_path / "one")
    assert of(train=tmp_path / "two") == original == of(train=f"file://{tmp_path}/one/")
    (tmp_path / "one/a/notes.txt").write_text("not used")
    assert of(train=tmp_path / "one") == original
    assert of(train=tmp_path / "one", test=tmp_path / "two") != original
    (tmp_path / "two/a/000.png").write_bytes(b"other")
    assert of(train=tmp_path / "two") != original
    (tmp_path / "one/a/000.png").rename(tmp_path / "one/a/0.png")
    assert of(train=tmp_path / "one") != original


def test_file_names_that_are_not_utf_8_are_taken(tmp_path: Path) -> None:
    path = save(tmp_path / "a/x.png", noise(4, 4))
    path.rename(os.fsdecode(os.fsencode(tmp_path / "a") + b"/\xff.png"))
    assert load(tmp_path).train.images.shape == (1, 4, 4, 1)
    assert fingerprint(DataSpec(train=str(tmp_path)))["data.train files"] == 1


def test_the_fingerprint_covers_arrays_labels_and_zarr(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", noise(2, 3, 3))
    np.save(tmp_path / "y.npy", [0, 1])
    zarr.create_array(tmp_path / "x.zarr", data=noise(4, 3, 3), chunks=(2, 3, 3))
    spec = DataSpec(train=f"{tmp_path}/x.npy", train_labels=f"{tmp_path}/y.npy", test=f"{tmp_path}/x.zarr")
    before = fingerprint(spec)
    assert fingerprint(spec) == before
    (tmp_path / "x.zarr/c/1/0/0").unlink()
    assert fingerprint(spec) != before
    before = fingerprint(spec)
    np.save(tmp_path / "y.npy", [1, 0])  # as many bytes
    assert fingerprint(spec) != before
    (tmp_path / "y.npy").unlink()
    with pytest.raises(DataNotFoundError, match=r"y\.npy does not exist"):
        fingerprint(spec)


def test_importing_it_stays_light() -> None:
    code = (
        "import sys, equigram.data; "
        "heavy = {'jax', 'ray', 'numba', 'matplotlib', 'zarr'} & set(sys.modules); "
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr == ""
