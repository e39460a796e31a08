"""The run store: the only module that knows the zarr layout, and the only ledger of what is done.

One zarr v3 group per run, on any fsspec URL, readable by any zarr reader:

=============================  ===========================================================================
attribute ``equigram``         the job, software versions, normalisation constants, fingerprints, edge of a tile
``images/train``, ``/test``    ``(n, H, W, C)`` float32, as the kernels see them
``labels/train``, ``/test``    ``(n,)`` int64 class indices or ``(n, k)`` float64 targets
``names/train``, ``/test``     where each image came from: UTF-8 text, a line each, as uint8
``gram/<group>/<kernel>``      ``(n, n)``, chunk = tile, both triangles filled
``cross/<group>/<kernel>``     ``(m, n)``, test against training images
``solution/<group>/<kernel>``  coefficients, predictions; metrics as attributes
=============================  ===========================================================================

A tile is done when all its chunks are there with the right size; every chunk ends with a CRC-32C, checked on reading.
Missing values read as NaN, and NaN is never stored, so a missing tile is never mistaken for one of zeros.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from equigram.data import Dataset, Preprocessing
from equigram.errors import (
    DamagedTileError,
    EquigramError,
    IncompleteRunError,
    StoreError,
    StoreMismatchError,
    StoreNotFoundError,
)
from equigram.plan import Tile, Tiling
from equigram.spec import JobSpec

if TYPE_CHECKING:
    import zarr
    from numpy.typing import NDArray

    from equikernel.kernel import Kernel

FORMAT = 1
SplitName = Literal["train", "test"]
PACKAGES = ("equigram", "numpy", "numba", "llvmlite", "zarr", "ray", "jax")


@dataclass(frozen=True)
class RunInfo:
    """What a store says about its run, from one read of its metadata."""

    spec: JobSpec
    tile: int
    train: int
    test: int
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...] | None
    preprocessing: Preprocessing
    fingerprint: str
    processor: str
    created: str
    versions: dict[str, str]
    notes: tuple[str, ...]

    @property
    def tiling(self) -> Tiling:
        """The tiles of this run."""
        return Tiling(self.train, self.test, self.tile)


class GramStore:
    """A run store that exists. Cheap to make and to pickle; the zarr group is opened on first use.

    Raises (from every method):
      StoreError: the storage does not answer, is full or is read-only; nothing stored before is lost.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (self.url,)

    def __repr__(self) -> str:
        return f"GramStore({self.url!r})"

    # ------------------------------------------------------------------ creating and opening

    @classmethod
    def exists(cls, url: str) -> bool:
        """Whether a run is stored at ``url``, complete with its images."""
        return (cls(url)._attributes() or {}).get("state") == "ready"

    @classmethod
    def open(cls, url: str) -> Self:
        """The run at ``url``.

        Raises:
          StoreNotFoundError: there is none, or its images were never completely stored.
        """
        if not cls.exists(url):
            raise StoreNotFoundError(f"{url} is not a run store; make one with `equigram run JOB.yaml`")
        store = cls(url)
        written = store._attributes() or {}
        if written.get("format") != FORMAT:
            raise StoreMismatchError(
                f"{url} has store format {written.get('format')!r}, this version of equigram reads {FORMAT}; "
                f"use equigram {written.get('versions', {}).get('equigram', '?')}"
            )
        return store

    @classmethod
    def create(cls, spec: JobSpec, dataset: Dataset, tile: int, fingerprint: str, processor: str) -> Self:
        """Write the images, labels and empty matrices of a new run; over the remains of an interrupted creation.

        Raises:
          StoreMismatchError: the place holds something that is not an unfinished creation of a run.
        """
        import zarr

        store = cls(spec.store)
        store.check_creatable()
        splits = {"train": dataset.train, "test": dataset.test}
        attributes: dict[str, Any] = {
            "format": FORMAT,
            "state": "preparing",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "spec": spec.model_dump(mode="json"),
            "tile": tile,
            "train": len(dataset.train.images),
            "test": 0 if dataset.test is None else len(dataset.test.images),
            "image_shape": list(dataset.train.images.shape[1:]),
            "classes": dataset.classes,
            "preprocessing": dataset.preprocessing.to_json(),
            "fingerprint": fingerprint,
            "images_sha256": {
                name: hashlib.sha256(split.images.tobytes()).hexdigest() for name, split in splits.items() if split
            },
            "processor": processor,
            "python": platform.python_version(),
            "versions": _versions(),
            "notes": dataset.notes,
        }
        with store._storage("create the run store"):
            root = zarr.open_group(store._zarr_store(), mode="w", zarr_format=3, attributes={"equigram": attributes})
            for name, split in splits.items():
                if split is None:
                    continue
                _add_array(root, f"images/{name}", split.images, (tile, *split.images.shape[1:]))
                if split.labels is not None:
                    _add_array(root, f"labels/{name}", split.labels, split.labels.shape)
                text = np.frombuffer("\n".join(split.names).encode(), dtype=np.uint8)
                _add_array(root, f"names/{name}", text, text.shape)
            tiling = Tiling(attributes["train"], attributes["test"], tile)
            for group in spec.gram.groups:
                for kernel in spec.gram.kernels:
                    _add_matrix(root, f"gram/{group}/{kernel}", (tiling.train, tiling.train), tile, spec.gram.dtype)
                    if tiling.test:
                        _add_matrix(root, f"cross/{group}/{kernel}", (tiling.test, tiling.train), tile, spec.gram.dtype)
            root.attrs["equigram"] = {**attributes, "state": "ready"}
        return cls(spec.store)

    def check_creatable(self) -> None:
        """Raise unless a run may be created here: nothing there, or an interrupted creation; and it is writable.

        Raises:
          StoreMismatchError: the place holds other files.
          StoreError: the place cannot be written.
        """
        fs, path = self._filesystem()
        with self._storage("create the run store"):
            attributes = self._attributes()
            if attributes is None and fs.exists(path) and (not fs.isdir(path) or fs.ls(path, detail=False)):
                raise StoreMismatchError(
                    f"{self.url} already holds something that is not an equigram run, and is left alone; "
                    "choose another place for `store`"
                )
            fs.makedirs(path, exist_ok=True)
            probe = f"{path}/.equigram-write-test"
            with fs.open(probe, "wb") as file:
                file.write(b"equigram")
            fs.rm(probe)

    # ------------------------------------------------------------------ what the run is

    @cached_property
    def info(self) -> RunInfo:
        """The run's metadata."""
        attributes = self._attributes()
        if attributes is None:
            raise StoreNotFoundError(f"{self.url} is not a run store; make one with `equigram run JOB.yaml`")
        classes = attributes["classes"]
        return RunInfo(
            spec=JobSpec.parse(attributes["spec"], source=self.url),
            tile=attributes["tile"],
            train=attributes["train"],
            test=attributes["test"],
            image_shape=tuple(attributes["image_shape"]),
            classes=None if classes is None else tuple(classes),
            preprocessing=Preprocessing.from_json(attributes["preprocessing"]),
            fingerprint=attributes["fingerprint"],
            processor=attributes["processor"],
            created=attributes["created"],
            versions=attributes["versions"],
            notes=tuple(attributes["notes"]),
        )

    def check_belongs_to(self, spec: JobSpec) -> None:
        """Raise :class:`StoreMismatchError` naming every field in which ``spec`` asks for other matrices."""
        differences = [
            f"{field} is {stored!r} in the store and {asked!r} in the job"
            for (field, stored), (_, asked) in zip(
                _identity(self.info.spec, self.info.tile), _identity(spec, self.info.tile), strict=True
            )
            if stored != asked
        ]
        if differences:
            raise StoreMismatchError(
                f"{self.url} belongs to another job: {'; '.join(differences)}. "
                "Give this job another `store`, or restore those fields"
            )

    # ------------------------------------------------------------------ images and labels

    def images(self, split: SplitName, rows: range | None = None) -> NDArray[np.float32]:
        """Images ``(n, H, W, C)`` float32, all or those of ``rows``, as the kernels see them."""
        selection = slice(None) if rows is None else slice(rows.start, rows.stop)
        return self._read_array(f"images/{split}", selection)

    def block(self, split: SplitName, index: int) -> NDArray[np.float32]:
        """Images ``(b, H, W, C)`` of one block of a split, as tiles are made of."""
        tiling = self.info.tiling
        return self.images(split, tiling.rows(Tile("cross" if split == "test" else "gram", index, 0)))

    def labels(self, split: SplitName) -> NDArray[Any] | None:
        """Class indices ``(n,)`` int64, targets ``(n, k)`` float64, or ``None`` where the images have no labels."""
        with self._storage("read labels"):
            present = f"labels/{split}" in self._root
        return self._read_array(f"labels/{split}", slice(None)) if present else None

    def names(self, split: SplitName) -> list[str]:
        """Where each image came from."""
        text: str = self._read_array(f"names/{split}", slice(None)).tobytes().decode()
        return text.split("\n")

    # ------------------------------------------------------------------ tiles

    def write_tile(self, tile: Tile, kernels: Mapping[str, Kernel]) -> None:
        """Store a tile of every matrix, and its transpose; doing so again changes nothing.

        Args:
          tile: which block.
          kernels: by group, with a ``(rows, cols)`` array for every stored kernel.
        """
        spec, tiling = self.info.spec.gram, self.info.tiling
        rows, cols = tiling.rows(tile), tiling.cols(tile)
        with self._storage(f"write tile {tile}"):
            for group in spec.groups:
                for kernel in spec.kernels:
                    block = getattr(kernels[group], kernel)
                    matrix = self._matrix(tile.part, group, kernel)
                    for (row, _), values in zip(tiling.chunks(tile), (block, block.T), strict=False):
                        if row == tile.row:
                            matrix[rows.start : rows.stop, cols.start : cols.stop] = values
                        else:
                            matrix[cols.start : cols.stop, rows.start : rows.stop] = values

    def finished_tiles(self) -> set[Tile]:
        """The tiles whose chunks are all there, in full size, from one listing per matrix."""
        spec, tiling = self.info.spec.gram, self.info.tiling
        present: dict[str, set[tuple[int, int]]] = {}
        for part in ("gram", "cross") if tiling.test else ("gram",):
            listings = [self._whole_chunks(f"{part}/{g}/{k}") for g in spec.groups for k in spec.kernels]
            present[part] = set.intersection(*listings)
        return {tile for tile in tiling.tiles() if all(chunk in present[tile.part] for chunk in tiling.chunks(tile))}

    def discard_tile(self, tile: Tile) -> None:
        """Delete a tile, so that the next run computes it again."""
        spec = self.info.spec.gram
        fs, path = self._filesystem()
        with self._storage(f"delete tile {tile}"):
            for row, col in self.info.tiling.chunks(tile):
                for group in spec.groups:
                    for kernel in spec.kernels:
                        with contextlib.suppress(FileNotFoundError):
                            fs.rm_file(f"{path}/{tile.part}/{group}/{kernel}/c/{row}/{col}")

    def matrix(self, part: Literal["gram", "cross"], group: str, kernel: str) -> NDArray[Any]:
        """A whole matrix, ``(n, n)`` or ``(m, n)``, in the dtype of the run.

        Raises:
          IncompleteRunError: tiles are missing.
          DamagedTileError: a chunk fails its checksum or holds values that are not finite; ``error.tile`` names it.
        """
        info = self.info
        if group not in info.spec.gram.groups or kernel not in info.spec.gram.kernels:
            raise StoreMismatchError(
                f"{self.url} holds no {part} matrix of {group} {kernel}; it holds the groups "
                f"{', '.join(info.spec.gram.groups)} and the kernels {', '.join(info.spec.gram.kernels)}"
            )
        tiling = info.tiling
        blocks = tiling.test_blocks if part == "cross" else tiling.train_blocks
        result = np.empty((info.test if part == "cross" else info.train, info.train), info.spec.gram.dtype)
        chunks = self._whole_chunks(f"{part}/{group}/{kernel}")
        lacking = blocks * tiling.train_blocks - len(chunks)
        if lacking:
            raise IncompleteRunError(
                f"{self.url}: {lacking} of {blocks * tiling.train_blocks} chunks of {part}/{group}/{kernel} are "
                "missing; `equigram run JOB.yaml` computes them"
            )
        for row in range(blocks):
            for col in range(tiling.train_blocks):
                tile = Tile(part, min(row, col), max(row, col)) if part == "gram" else Tile(part, row, col)
                here = (tiling.rows(Tile(part, row, col)), tiling.cols(Tile(part, row, col)))
                window = tuple(slice(side.start, side.stop) for side in here)
                result[window] = self._read_chunk(tile, f"{part}/{group}/{kernel}", window, row, col)
        return result

    def _read_chunk(self, tile: Tile, name: str, window: tuple[slice, ...], row: int, col: int) -> NDArray[Any]:
        try:
            with self._storage(f"read tile {tile}"):
                values: NDArray[Any] = np.asarray(self._matrix(*name.split("/"))[window])
            reason = "" if np.isfinite(values).all() else "it holds values that are not finite"
        except ValueError as error:  # zarr raises it when a checksum does not match
            values, reason = np.empty(0), str(error)
        if reason:
            raise DamagedTileError(
                f"{self.url}: chunk {row}, {col} of {name} (tile {tile}) is damaged: {reason}; "
                "`equigram run JOB.yaml` computes that tile again",
                tile,
            )
        return values

    # ------------------------------------------------------------------ solutions

    def write_solution(
        self, group: str, kernel: str, arrays: Mapping[str, NDArray[Any]], attributes: Mapping[str, Any]
    ) -> None:
        """Store named arrays and JSON attributes of a solution, replacing an older one."""
        with self._storage("write the solution"):
            place = self._root.create_group(f"solution/{group}/{kernel}", overwrite=True)
            for name, values in arrays.items():
                _add_array(place, name, values, values.shape)
            place.attrs.update(dict(attributes))

    def has_solution(self, group: str, kernel: str) -> bool:
        """Whether a solution is stored completely."""
        name = f"solution/{group}/{kernel}"
        with self._storage("read the solution"):
            return name in self._root and "solutions" in self._root[name].attrs

    def solution(self, group: str, kernel: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """The arrays and attributes that :meth:`write_solution` stored.

        Raises:
          IncompleteRunError: there is none.
        """
        if not self.has_solution(group, kernel):
            raise IncompleteRunError(
                f"{self.url} has no solution for {group} {kernel}; finish it with `equigram run JOB.yaml`"
            )
        with self._storage("read the solution"):
            place: Any = self._root[f"solution/{group}/{kernel}"]
            return {key: np.asarray(array[...]) for key, array in place.arrays()}, dict(place.attrs)

    # ------------------------------------------------------------------ storage

    @cached_property
    def _root(self) -> zarr.Group:
        import zarr

        with self._storage("open the run store"):
            return zarr.open_group(self._zarr_store(), mode="r+")

    def _zarr_store(self) -> Any:
        from zarr.storage import FsspecStore, LocalStore

        fs, path = self._filesystem()
        if "file" in _protocols(fs):
            return LocalStore(path)  # writes a temporary file and renames: no torn chunk is ever visible
        return FsspecStore.from_url(self.url)

    def _filesystem(self) -> tuple[Any, str]:
        import fsspec

        try:
            fs, path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise StoreError(f"{self.url}: cannot open this kind of URL: {error}") from None
        return fs, str(path).rstrip("/")

    def _attributes(self) -> dict[str, Any] | None:
        """The attribute ``equigram`` of the root group; ``None`` where there is no run."""
        import json

        fs, path = self._filesystem()
        with self._storage("open the run store"):
            try:
                document = json.loads(fs.cat_file(f"{path}/zarr.json"))
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError, json.JSONDecodeError):
                return None
        attributes: dict[str, Any] | None = document.get("attributes", {}).get("equigram")
        return attributes

    def _matrix(self, *name: str) -> Any:
        path = "/".join(name)
        if path not in self._matrices:
            self._matrices[path] = self._root[path]
        return self._matrices[path]

    @cached_property
    def _matrices(self) -> dict[str, Any]:
        return {}

    def _read_array(self, name: str, selection: slice) -> NDArray[Any]:
        with self._storage(f"read {name}"):
            try:
                array: Any = self._root[name]
                return np.asarray(array[selection])
            except ValueError as error:
                raise StoreError(f"{self.url}: {name} is damaged: {error}; delete the store and run again") from None

    def _whole_chunks(self, matrix: str) -> set[tuple[int, int]]:
        """The chunks ``(row, col)`` of a matrix that are there in full size; temporary files are passed over."""
        info = self.info
        size = info.tile**2 * np.dtype(info.spec.gram.dtype).itemsize + 4
        fs, path = self._filesystem()
        with self._storage(f"list {matrix}"):
            fs.invalidate_cache()
            try:
                listing = fs.find(f"{path}/{matrix}/c", detail=True)
            except FileNotFoundError:
                return set()
        chunks = set()
        for name, entry in listing.items():
            row, col = name.rsplit("/", 2)[-2:]
            if row.isdigit() and col.isdigit() and entry["size"] == size:
                chunks.add((int(row), int(col)))
        return chunks

    @contextlib.contextmanager
    def _storage(self, doing: str) -> Iterator[None]:
        """Turn whatever the storage raises into one sentence."""
        try:
            yield
        except (EquigramError, ValueError, KeyError, TypeError):
            raise
        except Exception as error:
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise StoreError(
                f"{self.url}: cannot {doing}: {reason}; nothing finished is lost: mend that and run again"
            ) from error


def free_space(url: str) -> int | None:
    """Bytes free where a local store is or would be; ``None`` for other storage."""
    fs, path = GramStore(url)._filesystem()
    if "file" not in _protocols(fs):
        return None
    place = Path(path)
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _identity(spec: JobSpec, tile: int) -> list[tuple[str, Any]]:
    """The fields that decide what is in the matrices, flat and in a fixed order."""
    gram = spec.gram.model_dump(mode="json")
    gram["groups"], gram["kernels"] = sorted(gram["groups"]), sorted(gram["kernels"])
    gram["tile"] = tile if spec.gram.tile == "auto" else spec.gram.tile
    data, network = spec.data.model_dump(mode="json"), spec.network.model_dump(mode="json")
    sections = {"data": data, "network": network, "gram": gram}
    return [(f"{section}.{field}", value) for section, fields in sections.items() for field, value in fields.items()]


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _add_array(group: zarr.Group, name: str, values: NDArray[Any], chunks: tuple[int, ...]) -> None:
    from zarr.codecs import Crc32cCodec, ZstdCodec

    array: Any = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=tuple(max(1, min(c, s)) for c, s in zip(chunks, values.shape, strict=True)),
        compressors=[ZstdCodec(), Crc32cCodec()],
        overwrite=True,
    )
    if values.size:
        array[...] = values


def _add_matrix(group: zarr.Group, name: str, shape: tuple[int, int], tile: int, dtype: str) -> None:
    from zarr.codecs import Crc32cCodec

    group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(tile, tile),
        compressors=[Crc32cCodec()],
        fill_value=float("nan"),
        config={"write_empty_chunks": True},
        overwrite=True,
    )
