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
``factor/<group>/<kernel>``    ``(n, n)`` float64, Cholesky factors of matrices that no memory holds
``iterate/<group>/<kernel>/…``  ``(n, k)`` float64, where a solver is; gone when it has ended
``history/events``             what happened, in files of JSON lines
=============================  ===========================================================================

A tile is done when all its chunks are there with the right size; every chunk ends with a CRC-32C, checked on reading.
Missing floats read as NaN, and NaN is never stored, so what is missing is never mistaken for zeros.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import operator
import os
import platform
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from equigram.claim import LOOK, claim, lock
from equigram.claim import NAME as CLAIM
from equigram.data import Dataset, Preprocessing, Split
from equigram.digests import json_sha256
from equigram.errors import (
    DamagedArrayError,
    DamagedTileError,
    EquigramError,
    IncompleteRunError,
    SpecError,
    StoreError,
    StoreExistsError,
    StoreMismatchError,
    StoreNotFoundError,
)
from equigram.plan import Part, SplitName, Tile, TileSet, Tiling, chunk_bytes, tile_of
from equigram.spec import GramSpec, JobSpec, KernelName, Pass
from equigram.storage import ask, children, reason
from equikernel.errors import EquikernelError, NonFiniteKernelError

if TYPE_CHECKING:
    import zarr
    from numpy.typing import NDArray

    from equikernel.kernel import Kernel

FORMAT = 4
PACKAGES = ("equigram", "numpy", "llvmlite", "zarr", "ray", "jax")

SAME_SOFTWARE = ("equigram", "numpy", "llvmlite")
"""Packages that must have the same version for the same bits."""

ANSWER_SECONDS = 60.0
"""How long the storage may take over one request: a listing, or some chunks to read or write."""

ROW_LISTING = 500
"""Chunks in a row of a matrix from which on object storage is listed row by row."""

READERS = 16
"""Chunks that are read at a time where all of them are: object storage takes its time over each."""

HISTORY, EVENTS = "history", "history/events"
"""A group, and the folder of its files: of what is no array, readers of zarr complain once then, not for each file."""

PARTIAL = ".partial"
"""How the names of files and folders end that are being written, of zarr and of this module."""

LEFT_SECONDS = 3600.0
"""A chunk that has been half written for so long was left by a process that is gone."""

LOAD_AGAIN = "`equigram verify --repair` reads them from the job's data again"
"""What mends damaged images, labels and names."""

SOLVE_AGAIN = "`equigram run JOB.yaml` solves again"
"""What mends a damaged solution."""

SOLVED = ("solution", "factor", "iterate")
"""Groups that hold what comes from the matrices."""

_ZSTD: dict[str, Any] = {"cname": "zstd", "clevel": 3, "shuffle": 1}
"""Blosc as chunks are compressed with: shuffled by bytes, zstd."""

PROBE = ".equigram-write-test"
"""Written and deleted to find out whether object storage may be written."""


@dataclass(frozen=True)
class RunInfo:
    """What a store says about its run, from one read of its metadata."""

    spec: JobSpec
    passes: tuple[Pass, ...]
    tile: int
    train: int
    test: int
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...] | None
    preprocessing: Preprocessing
    fingerprint: dict[str, int | str]
    processors: tuple[str, ...]
    created: str
    versions: dict[str, str]
    all_versions: tuple[dict[str, str], ...]
    extensions: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    sha256: dict[str, str]
    """Of the images, labels and names that there are, by the name of their array."""
    names_bytes: dict[str, int]
    """Bytes of the names of a split that count: an interrupted extension may have stored more."""

    @property
    def tiling(self) -> Tiling:
        """The tiles of this run."""
        return Tiling(self.train, self.test, self.tile)


class GramStore:
    """A run store that exists. Cheap to make and to pickle; the zarr group is opened on first use.

    Args:
      url: where it is.
      only: the pass whose matrices, and tiles, are all that there is to it; ``None`` means all of the run.

    Raises (from every method):
      StoreError: the storage does not answer, is full or is read-only; nothing stored before is lost.
    """

    def __init__(self, url: str, only: Pass | None = None) -> None:
        self.url = url
        self._only = only
        self._is_alone = False

    def __reduce__(self) -> tuple[type[Self], tuple[str, Pass | None]]:
        """A relative path becomes absolute: workers run in other folders."""
        fs, path = self._place
        return type(self), (path if _is_local(fs) else self.url, self._only)

    def __repr__(self) -> str:
        return f"GramStore({self.url!r})"

    # ------------------------------------------------------------------ creating and opening

    @classmethod
    def exists(cls, url: str) -> bool:
        """Whether a run is stored at ``url``, complete with its images; perhaps one that :meth:`open` refuses."""
        attributes = cls(url)._attributes()
        return attributes is not None and not _is_unfinished(attributes)

    @classmethod
    def open(cls, url: str) -> Self:
        """The run at ``url``.

        Raises:
          StoreNotFoundError: there is none, or its images were never completely stored.
          StoreMismatchError: another version of equigram made it, in a format that this one does not read.
        """
        store = cls(url)
        store.info  # noqa: B018
        return store

    @classmethod
    def create(cls, spec: JobSpec, dataset: Dataset, tile: int, fingerprint: dict[str, int | str]) -> Self:
        """Write the images, labels and empty matrices of a new run; over the remains of an interrupted creation.

        Raises:
          StoreMismatchError: the place holds something that is not an unfinished creation of a run.
          StoreExistsError: another process has made a run there meanwhile; it was waited for.
        """
        store = cls(spec.store)
        store.check_free()
        store.check_writable()
        with store._alone():
            store.check_free()
            store._create(spec, dataset, tile, fingerprint)
        return cls(spec.store)

    def _create(self, spec: JobSpec, dataset: Dataset, tile: int, fingerprint: dict[str, int | str]) -> None:
        """What :meth:`create` does, in a place that is free and claimed."""
        splits = {"train": dataset.train} | ({} if dataset.test is None else {"test": dataset.test})
        attributes: dict[str, Any] = {
            "format": FORMAT,
            "state": "preparing",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "spec": spec.to_store(),
            "passes": [dataclasses.asdict(one) for one in spec.gram.passes],
            "tile": tile,
            "train": len(dataset.train.images),
            "test": 0 if dataset.test is None else len(dataset.test.images),
            "image_shape": list(dataset.train.images.shape[1:]),
            "classes": dataset.classes,
            "preprocessing": dataset.preprocessing.to_json(),
            "fingerprint": fingerprint,
            "sha256": {
                f"{kind}/{name}": _sha256(values)
                for name, split in splits.items()
                for kind, values in _arrays_of(split).items()
            },
            "names_bytes": {name: len(_names_text(split.names)) for name, split in splits.items()},
            "processors": [],
            "python": platform.python_version(),
            "versions": versions(),
            "all_versions": [],
            "extensions": [],
            "notes": dataset.notes,
        }
        with self._storage("create the run store"):
            root = self._begin(attributes)
            for name, split in splits.items():
                self._add_split(root, name, split, tile)
            tiling = Tiling(attributes["train"], attributes["test"], tile)
            for one in spec.gram.passes:
                _add_matrices(root, one, tiling, spec.gram)
            root.create_group(HISTORY)
            root.attrs["equigram"] = _signed({**attributes, "state": "ready"})

    def extend(self, split: SplitName, more: Split, source: str, labels: str | None = None) -> None:
        """Add images to a split; the tiles with them, and those of the block that they fill up, are missing then.

        Interrupted, it leaves the run as it was, but for some tiles that are missing: what is added counts when the
        attributes say so, at the end.

        Args:
          split: which.
          more: the images, treated as those that are there, with labels if these have any.
          source: what they are called; a source is added once.
          labels: what their labels are called, if they are elsewhere.

        Raises:
          StoreMismatchError: it was added before.
        """
        with self._alone():
            self._look_again()
            self._extend(split, more, source, labels)

    def _look_again(self) -> None:
        """Forget what was read: another process may have changed it."""
        self.__dict__.pop("info", None)
        self._opened.clear()

    def _extend(self, split: SplitName, more: Split, source: str, labels_source: str | None) -> None:
        info, new = self.info, _sha256(more.images)
        known = [(one["split"], one["sha256"]) for one in info.extensions]
        if (split, new) in [*known, (split, info.sha256.get(f"images/{split}"))]:
            raise StoreMismatchError(
                f"{source} was added to {self.url} before; `equigram run` computes what is missing"
            )
        before = info.test if split == "test" else info.train
        counts = {"train": info.train, "test": info.test, split: before + len(more.images)}
        labels, names = (self.labels(split), self.names(split)) if before else (None, [])
        digest = self._images_hash(split)
        if before and digest.hexdigest() != info.sha256[f"images/{split}"]:
            raise DamagedArrayError(f"{self.url}: images/{split} holds other values than were stored; {LOAD_AGAIN}")
        digest.update(np.ascontiguousarray(more.images).data)
        sha256 = {**info.sha256, f"images/{split}": digest.hexdigest()}
        for tile in info.tiling.partial(split):
            self.discard_tile(tile)
        with self._storage("add images to the run store"):
            root = self._root_to_write
            if before == 0:
                self._add_split(root, split, more, info.tile)
                sha256 |= {f"{kind}/{split}": _sha256(values) for kind, values in _arrays_of(more).items()}
            else:
                _append(root[f"images/{split}"], before, more.images)
                if more.labels is not None and labels is not None:
                    _append(root[f"labels/{split}"], before, more.labels)
                    sha256[f"labels/{split}"] = _sha256(np.concatenate([labels, more.labels]))
                _append(root[f"names/{split}"], info.names_bytes[split], _names_text(["", *more.names]))
                sha256[f"names/{split}"] = _sha256(_names_text([*names, *more.names]))
            tiling = Tiling(counts["train"], counts["test"], info.tile)
            for one in info.passes:
                _add_matrices(root, one, tiling, info.spec.gram)
            self._delete_solved()
        names_bytes = {**info.names_bytes, split: len(_names_text([*names, *more.names]))}
        added = {"split": split, "source": source, "labels": labels_source, "images": len(more.images), "sha256": new}
        self._change(
            "add images to the run store",
            lambda attributes: {
                **counts,
                "sha256": sha256,
                "names_bytes": names_bytes,
                "extensions": [*attributes["extensions"], added],
            },
        )
        self._look_again()
        # Written meanwhile by somebody who did not know of the images.
        there = {part: self._any_chunks(part) for part in self.parts}
        for tile in info.tiling.partial(split):
            if any(there[tile.part][chunk] for chunk in info.tiling.chunks(tile)):
                self.discard_tile(tile)

    def add_matrices(self, groups: Sequence[str], kernels: Sequence[KernelName]) -> None:
        """Add groups and kernels to a run; their tiles are missing then, in passes of their own.

        Args:
          groups: those that are new, for all kernels.
          kernels: those that are new, for the groups that are not.

        Raises:
          StoreMismatchError: one of them is there.
        """
        with self._alone():
            self._look_again()
            spec = self.info.spec
            gram = spec.gram
            there = [name for name in (*groups, *kernels) if name in (*gram.groups, *gram.kernels)]
            if there:
                raise StoreMismatchError(f"{self.url} has {there[0]} already; `equigram run` computes what is missing")
            larger = gram.model_dump() | {"groups": [*gram.groups, *groups], "kernels": [*gram.kernels, *kernels]}
            parts = [{"groups": gram.groups, "kernels": kernels}] if kernels else []
            parts += [{"groups": groups}] if groups else []
            passes = [one for part in parts for one in GramSpec.model_validate(larger | part).passes]
            with self._storage("add matrices to the run store"):
                for one in passes:
                    _add_matrices(self._root_to_write, one, self.info.tiling, gram)
            fields = spec.model_copy(update={"gram": GramSpec.model_validate(larger)}).to_store()
            self._change(
                "add matrices to the run store",
                lambda attributes: {
                    "spec": fields,
                    "passes": [*attributes["passes"], *map(dataclasses.asdict, passes)],
                },
            )

    def restore(self, names: Iterable[str], splits: Mapping[SplitName, Split]) -> None:
        """Store images, labels or names anew: ``images/train``, for example.

        Args:
          names: which arrays.
          splits: all images of each split, as they were stored.

        Raises:
          StoreMismatchError: they are not what was stored; nothing was changed.
        """
        arrays = {f"{kind}/{name}": v for name, split in splits.items() for kind, v in _arrays_of(split).items()}
        chosen = {name: arrays.get(name) for name in names}
        for name, values in chosen.items():
            if values is None or _sha256(values) != self.info.sha256[name]:
                raise StoreMismatchError(
                    f"{name} of {self.url} cannot be mended: the sources of the job hold something else now than when "
                    "it was made; restore them, or the store from a copy"
                )
        with self._alone(), self._storage("store the images anew"):
            for name, values in chosen.items():
                assert values is not None
                chunks = (self.info.tile, *values.shape[1:]) if name.startswith("images/") else values.shape
                _add_array(self._root_to_write, name, values, chunks)
        self._opened.clear()

    @staticmethod
    def _add_split(root: zarr.Group, name: str, split: Split, tile: int) -> None:
        """Write the images, labels and names of a split."""
        for kind, values in _arrays_of(split).items():
            chunks = (tile, *values.shape[1:]) if kind == "images" else values.shape
            _add_array(root, f"{kind}/{name}", values, chunks)

    def check_free(self) -> None:
        """Raise unless a run may be created here: nothing is there, or an interrupted creation. Writes nothing.

        Raises:
          StoreMismatchError: the place holds other files.
          StoreExistsError: it holds a run.
        """
        if not self._is_free():
            time.sleep(LOOK)  # another process may be making a store of it just now
            if not self._is_free():
                if "gram" in self._children():
                    raise self._without_attributes()
                raise StoreMismatchError(
                    f"{self.url} already holds something that is not an equigram run, and is left alone; "
                    "choose another place for `store`"
                )

    def _is_free(self) -> bool:
        """Whether nothing is there, or an interrupted creation; raises as :meth:`check_free` where a run is."""
        path = self._place[1]
        with self._storage("look at the place of the run store"):
            taken = self._call("exists", path)
            if taken and self._call("isdir", path):
                taken = any(not name.endswith((PROBE, CLAIM, PARTIAL)) for name in self._children())
        attributes = self._attributes()
        if attributes is not None and not _is_unfinished(attributes):
            raise StoreExistsError(f"{self.url} has become a run store in the meantime; run again to go on from it")
        return not taken or attributes is not None

    def check_place(self) -> None:
        """Raise :class:`StoreError` if it can be seen, without writing, that this place cannot be written."""
        fs, path = self._place
        with self._storage("write to the run store"):
            if _is_local(fs):
                folder = _nearest(Path(path))
                if not folder.is_dir():
                    raise NotADirectoryError(None, f"{folder} is a file")
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise PermissionError(None, f"{folder} is read-only, or this user may not write there")
            elif _is_s3(self.url) and not self._call("exists", bucket := path.partition("/")[0]):
                raise FileNotFoundError(None, f"the bucket {bucket} does not exist")

    def check_writable(self) -> None:
        """Raise :class:`StoreError` unless this place can be written; on object storage it is tried."""
        fs, path = self._place
        if _is_local(fs):
            self.check_place()
            return
        with self._storage("write to the run store"):
            self._call("pipe_file", f"{path}/{PROBE}", b"equigram")
            self._call("rm_file", f"{path}/{PROBE}")

    def is_inside(self, place: str) -> bool:
        """Whether a path or URL is in this store."""
        fs, path = self._place
        other, inside = type(self)(place)._place
        return _protocols(fs) == _protocols(other) and f"{inside}/".startswith(f"{path}/")

    @property
    def in_this_process(self) -> bool:
        """Whether it lies in the memory of this process, where no other one can read or write."""
        return "memory" in _protocols(self._place[0])

    def _begin(self, attributes: dict[str, Any]) -> zarr.Group:
        """The root group with ``attributes``, and nothing else: interrupted, it still says that it is unfinished."""
        import zarr

        signed: dict[str, Any] = {"equigram": _signed(attributes)}
        root = zarr.open_group(self._zarr_store(), mode="a", zarr_format=3, attributes=signed)
        root.attrs.update(signed)
        for name in self._children():
            if name not in ("zarr.json", CLAIM):
                self._call("rm", f"{self._place[1]}/{name}", recursive=True)
        return root

    # ------------------------------------------------------------------ what the run is

    @cached_property
    def info(self) -> RunInfo:
        """The run's metadata."""
        attributes = self._attributes()
        if attributes is None or _is_unfinished(attributes):
            raise self._not_found()
        if attributes.get("format") != FORMAT:
            raise StoreMismatchError(
                f"{self.url} has store format {attributes.get('format')!r}, this version of equigram reads {FORMAT}; "
                "use the version of equigram that made it"
            )
        if attributes.pop("checksum", None) != json_sha256(attributes):
            raise StoreError(
                f"{self.url}: the attributes in zarr.json are damaged, or were edited: their checksum differs; restore "
                "the file, or delete the store and run again"
            )
        classes = attributes["classes"]
        return RunInfo(
            spec=JobSpec.parse(attributes["spec"], source=self.url),
            passes=tuple(Pass(tuple(one["groups"]), tuple(one["kernels"])) for one in attributes["passes"]),
            tile=attributes["tile"],
            train=attributes["train"],
            test=attributes["test"],
            image_shape=tuple(attributes["image_shape"]),
            classes=None if classes is None else tuple(classes),
            preprocessing=Preprocessing.from_json(attributes["preprocessing"]),
            fingerprint=attributes["fingerprint"],
            processors=tuple(attributes["processors"]),
            created=attributes["created"],
            versions=attributes["versions"],
            all_versions=tuple(attributes["all_versions"]),
            extensions=tuple(attributes["extensions"]),
            notes=tuple(attributes["notes"]),
            sha256=attributes["sha256"],
            names_bytes=attributes["names_bytes"],
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
            asked, stored = spec.gram, self.info.spec.gram
            more = [f"--group {group}" for group in asked.groups if group not in stored.groups]
            more += [f"--kernel {kernel}" for kernel in asked.kernels if kernel not in stored.kernels]
            adds = f", or add what is new with `equigram extend {self.url} {' '.join(more)}`" if more else ""
            raise StoreMismatchError(
                f"{self.url} belongs to another job: {'; '.join(differences)}. "
                f"Give this job another `store`, or restore those fields{adds}"
            )

    def remember(self, spec: JobSpec) -> None:
        """Keep ``spec`` as the job of this run, where it differs in what does not change the matrices."""
        fields = spec.to_store()

        def remembered(attributes: dict[str, Any]) -> dict[str, Any]:
            same = self.info.spec.to_store()["gram"] == attributes["spec"]["gram"]
            gram = fields["gram"] if same else attributes["spec"]["gram"]  # there may be more groups meanwhile
            return {"spec": {**fields, "gram": gram}}

        self._change("write the job into the run store", remembered)

    def remember_worker(self, processor: str) -> None:
        """Keep the kind of processor and the versions with which tiles of this run are computed from now on."""

        def remembered(attributes: dict[str, Any]) -> dict[str, Any]:
            every, now = attributes["all_versions"], versions()
            return {
                "processors": list(dict.fromkeys([*attributes["processors"], processor])),
                "all_versions": every if now in every else [*every, now],
            }

        self._change("write the kind of processor into the run store", remembered)

    def _change(self, doing: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Replace some of the attributes, as they are stored now, where that makes a difference."""

        def changed() -> dict[str, Any] | None:
            attributes = self._attributes()
            after = None if attributes is None else {**attributes, **change(attributes)}
            return after if after != attributes else None

        if changed():
            with self._alone(), self._storage(doing):
                if after := changed():  # somebody else may have changed them meanwhile
                    self._root_to_write.attrs["equigram"] = _signed(after)
        self.__dict__.pop("info", None)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other process sets up this store or changes what is said in it; waits for one that does."""
        if self._is_alone:
            yield
            return
        fs, path = self._place
        with contextlib.ExitStack() as stack:
            with self._storage("claim the run store"):
                stack.enter_context(lock(Path(path)) if _is_local(fs) else claim(self._call, path))
            self._is_alone = True
            try:
                yield
            finally:
                self._is_alone = False

    # ------------------------------------------------------------------ images and labels

    def images(self, split: SplitName, rows: range | None = None) -> NDArray[np.float32]:
        """Images ``(n, H, W, C)`` float32, all or those of ``rows``, as the kernels see them."""
        return self._read_array(f"images/{split}", self._all_rows(split) if rows is None else rows)

    def block(self, split: SplitName, index: int) -> NDArray[np.float32]:
        """Images ``(b, H, W, C)`` of one block of a split, as tiles are made of."""
        return self.images(split, self._block_rows(split, index))

    def labels(self, split: SplitName) -> NDArray[Any] | None:
        """Class indices ``(n,)`` int64, targets ``(n, k)`` float64, or ``None`` where the images have no labels.

        Raises:
          DamagedArrayError: they are damaged, or not those that were stored.
        """
        name = f"labels/{split}"
        return self._checked(name, self._all_rows(split)) if name in self.info.sha256 else None

    def names(self, split: SplitName) -> list[str]:
        """Where each image came from.

        Raises:
          DamagedArrayError: they are damaged, or not those that were stored.
        """
        stored = self._checked(f"names/{split}", range(self.info.names_bytes[split]))
        text: str = stored.tobytes().decode()
        return text.split("\n")

    def _checked(self, name: str, rows: range) -> NDArray[Any]:
        """Rows of a small array, if they are what was stored."""
        values = self._read_array(name, rows, LOAD_AGAIN)
        if _sha256(values) != self.info.sha256[name]:
            raise DamagedArrayError(f"{self.url}: {name} holds other values than were stored; {LOAD_AGAIN}")
        return values

    def images_digest(self, split: SplitName) -> str:
        """SHA-256 of the images of a split as they are stored now, as in :attr:`RunInfo.sha256`."""
        return str(self._images_hash(split).hexdigest())

    def _images_hash(self, split: SplitName) -> Any:
        digest, tiling = hashlib.sha256(), self.info.tiling
        for block in range(tiling.test_blocks if split == "test" else tiling.train_blocks):
            digest.update(np.ascontiguousarray(self.block(split, block)).data)
        return digest

    def _all_rows(self, split: SplitName) -> range:
        """The images that count: an interrupted extension may have stored more."""
        return range(self.info.test if split == "test" else self.info.train)

    def describe_image(self, split: SplitName, block: int, offset: int) -> str:
        """What to call an image of a block in errors: ``"training image 17 (b/3.png)"``."""
        index = self._block_rows(split, block).start + offset
        return f"{'training' if split == 'train' else 'test'} image {index} ({self.names(split)[index]})"

    def _block_rows(self, split: SplitName, index: int) -> range:
        return self.info.tiling.rows(Tile("cross" if split == "test" else "gram", index, 0))

    # ------------------------------------------------------------------ tiles

    def write_tile(self, tile: Tile, kernels: Mapping[str, Kernel]) -> None:
        """Store a tile of every matrix, and its transpose; doing so again changes nothing.

        Args:
          tile: which block.
          kernels: by group, with a ``(rows, cols)`` array for every stored kernel.

        Raises:
          NonFiniteKernelError: a value is not finite in the dtype of the run; nothing of that matrix is stored.
          StoreMismatchError: images were added to the run meanwhile, and this tile needs some of them.
        """
        self.write_values(tile, {(group, kernel): getattr(kernels[group], kernel) for group, kernel in self.matrices})

    def write_values(self, tile: Tile, blocks: Mapping[tuple[str, str], NDArray[Any]]) -> None:
        """Store a tile, and its transpose, of the matrices of some groups and kernels; raises as :meth:`write_tile`."""
        dtype = self.info.spec.gram.dtype
        for (group, kernel), block in blocks.items():
            with np.errstate(over="ignore"):
                values = np.asarray(block, dtype)
            if not np.isfinite(values).all():
                raise NonFiniteKernelError(
                    f"tile {tile} holds values of the {group} {kernel} that are no finite {dtype}; rescale the images, "
                    "lower w_std or depth, or use gram.dtype: float64"
                )
            with self._explained(f"write tile {tile}"):
                for (row, col), chunk in zip(self.info.tiling.chunks(tile), (values, values.T), strict=False):
                    name = f"{tile.part}/{group}/{kernel}/c/{row}/{col}"
                    self._put(name, self._encoded(chunk, compress=self._compressed))
        tiling, edge = self.info.tiling, self.info.tile
        if len(tiling.rows(tile)) < edge or len(tiling.cols(tile)) < edge:
            self._discard_if_extended(tile)

    def _discard_if_extended(self, tile: Tile) -> None:
        """Delete a tile that was written in ignorance of images that belong in it.

        :meth:`extend` deletes such tiles when it has told of the images; a later one is deleted here by its writer.
        """
        attributes = self._attributes()
        if attributes is not None and self._is_extended(attributes):
            self.discard_tile(tile)
            raise self._was_extended()

    def _is_extended(self, attributes: Mapping[str, Any]) -> bool:
        """Whether images were added, or the run was made anew, since its attributes were read."""
        info = self.info
        return (attributes.get("train"), attributes.get("test"), attributes.get("created")) != (
            info.train,
            info.test,
            info.created,
        )

    def _was_extended(self) -> StoreMismatchError:
        return StoreMismatchError(
            f"images were added to {self.url} by another process meanwhile; what is finished is kept: run again"
        )

    def _encoded(self, values: NDArray[Any], *, compress: bool) -> bytes:
        """A chunk as zarr stores it: little-endian, filled up with NaN, perhaps compressed, and its CRC-32C."""
        import google_crc32c
        import numcodecs

        edge = self.info.tile
        if values.shape != (edge, edge):
            whole = np.full((edge, edge), np.nan, values.dtype)
            whole[: values.shape[0], : values.shape[1]] = values
            values = whole
        values = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
        content = bytes(numcodecs.Blosc(**_ZSTD).encode(values)) if compress else values.tobytes()
        checksum: int = google_crc32c.value(content)
        return content + checksum.to_bytes(4, "little")

    def _put(self, name: str, content: bytes) -> None:
        """Write a file as a whole: under another name, and renamed, or as one object. No torn one is ever visible.

        Several times faster than through zarr, which takes some milliseconds for each chunk.
        """
        fs, path = self._place
        if not _is_local(fs):
            self._call("pipe_file", f"{path}/{name}", content)
            return
        target = Path(path, name)
        partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            try:
                partial.write_bytes(content)
            except FileNotFoundError:
                target.parent.mkdir(parents=True, exist_ok=True)
                partial.write_bytes(content)
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def finished_tiles(self, *, tidy: bool = False) -> TileSet:
        """The tiles whose chunks are all there, in full size, from one listing per matrix.

        Args:
          tidy: delete what killed workers have left half written, as :data:`LEFT_SECONDS` says; for the driver only.
        """
        return TileSet(
            self.info.tiling,
            {
                part: np.logical_and.reduce([self._whole_chunks(part, *names, tidy=tidy) for names in self.matrices])
                for part in self.parts
            },
        )

    def layout_errors(self) -> dict[str, str]:
        """What is wrong with the metadata of images, matrices and of all groups, by name, as sentences.

        They may be for more images than the job has: an extension that was interrupted leaves them.
        """
        info, errors = self.info, {}
        for name in info.sha256:
            found, (kind, _, split) = self._stored_node(name), name.partition("/")
            count = info.names_bytes[split] if kind == "names" else info.train if split == "train" else info.test
            shape = tuple(getattr(found, "shape", ()))
            if not shape:
                errors[name] = f"{name}: its metadata cannot be read"
            elif shape[0] < count or (kind == "images" and shape[1:] != info.image_shape):
                needed = (count, *info.image_shape) if kind == "images" else (count, *shape[1:])
                errors[name] = f"{name} has the shape {shape}; the job needs {needed}"
            elif _document(found) != _document(_like(found, kind)):
                errors[name] = f"{name}: its metadata are not those that it was made with"
        for name, expected in self._expected_nodes():
            found = self._stored_node(name)
            shape, needed = (tuple(getattr(node, "shape", ())) for node in (found, expected))
            if found is None:
                errors[name] = f"{name}: its metadata cannot be read"
            elif not _may_be_shape_of(name, shape, needed):
                errors[name] = f"{name} has the shape {shape}; the job needs {needed}"
            elif _document(found, needed) != _document(expected):
                errors[name] = f"{name}: its metadata are not those of the job"
        return errors

    def _stored_node(self, name: str) -> Any:
        """An array or group as it is stored now; ``None`` where it cannot be read."""
        with self._storage(f"open {name}"):
            try:
                return self._root[name]
            except (KeyError, ValueError, TypeError, AttributeError):
                return None

    def _expected_nodes(self, store: Any = None) -> list[tuple[str, Any]]:
        """The matrices that there should be, and all groups, by name; none of them is stored."""
        import zarr

        root = zarr.open_group({} if store is None else store, mode="w", zarr_format=3)
        for one in (self._only,) if self._only else self.info.passes:
            _add_matrices(root, one, self.info.tiling, self.info.spec.gram)
        place = f"{self._place[1]}/solution"
        solved = [names for names in self.matrices if self._call("exists", "/".join((place, *names)))]
        groups = {name.split("/")[0] for name in self.info.sha256}  # images, labels, names
        for name in [*sorted(groups), HISTORY, *(f"solution/{group}" for group, _ in solved)]:
            root.require_group(name)
        return list(root.members(max_depth=None))

    def mend_layout(self, names: Iterable[str]) -> None:
        """Write the metadata of matrices, or of groups, anew; what is in them stays."""
        documents: dict[str, Any] = {}
        self._expected_nodes(documents)
        with self._alone(), self._storage("mend the layout"):
            for name in names:
                self._put(f"{name}/zarr.json", documents[f"{name}/zarr.json"].to_bytes())
        self._opened.clear()

    def damaged_tiles(self) -> set[Tile]:
        """The tiles of which a stored chunk fails its checksum or holds values that are not finite; reads all."""
        chunks = [
            (part, group, kernel, row, col)
            for part in self.parts
            for group, kernel in self.matrices
            for row, col in np.argwhere(self._whole_chunks(part, group, kernel)).tolist()
        ]
        reads = zip(chunks, self.read_chunks(chunks), strict=True)
        return {tile_of(part, row, col) for (part, _, _, row, col), (_, wrong) in reads if wrong}

    def discard_tile(self, tile: Tile) -> None:
        """Delete a tile, so that the next run computes it again."""
        with self._storage(f"delete tile {tile}"):
            for row, col in self.info.tiling.chunks(tile):
                for group, kernel in self.matrices:
                    place = f"{self._place[1]}/{tile.part}/{group}/{kernel}/c/{row}/{col}"
                    try:
                        self._call("rm_file", place)
                    except FileNotFoundError:
                        pass
                    except (IsADirectoryError, PermissionError):
                        self._call("rm", place, recursive=True)

    def matrix(
        self,
        part: Part,
        group: str,
        kernel: str,
        rows: range | NDArray[np.integer[Any]] | None = None,
        cols: range | NDArray[np.integer[Any]] | None = None,
    ) -> NDArray[Any]:
        """A matrix, ``(n, n)`` or ``(m, n)``, in the dtype of the run; all of it, or some rows and columns.

        Args:
          part, group, kernel: which one.
          rows, cols: increasing indices of images; ``None`` means all. Only the chunks with them are read.

        Raises:
          StoreMismatchError: the run has no such matrix.
          IncompleteRunError: tiles are missing.
          DamagedTileError: a chunk fails its checksum or holds values that are not finite; ``error.tile`` names it.
        """
        info, tiling = self.info, self.info.tiling
        if (group, kernel) not in self.matrices or part not in self.parts:
            raise StoreMismatchError(
                f"{self.url} holds no matrix {part}/{group}/{kernel}; it holds {' and '.join(self.parts)} of the "
                f"groups {', '.join(info.spec.gram.groups)} and the kernels {', '.join(info.spec.gram.kernels)}"
            )
        shape = tiling.shape(part)
        along, across = (
            _by_block(np.arange(count) if some is None else np.asarray(some), info.tile)
            for some, count in zip((rows, cols), shape, strict=True)
        )
        places = [(row, col) for row in along for col in across]
        size = (sum(into.stop - into.start for into, _ in side.values()) for side in (along, across))
        result = np.empty(tuple(size), info.spec.gram.dtype)
        for (row, col), values in zip(places, self.read_blocks(part, group, kernel, places), strict=True):
            (into_y, from_y), (into_x, from_x) = along[row], across[col]
            result[into_y, into_x] = values[from_y][:, from_x]
        return result

    def read_blocks(
        self, part: Part, group: str, kernel: str, places: Sequence[tuple[int, int]]
    ) -> Iterator[NDArray[Any]]:
        """The chunks (row, col) of a matrix, in this order, in the dtype of the run; raises as :meth:`matrix`."""
        name = f"{part}/{group}/{kernel}"
        chunks = [(part, group, kernel, row, col) for row, col in places]
        for (row, col), (values, wrong) in zip(places, self.read_chunks(chunks), strict=True):
            if wrong:
                there = self._whole_chunks(part, group, kernel)[*np.transpose(places)]
                if not there.all():
                    raise IncompleteRunError(
                        f"{self.url}: {there.size - np.count_nonzero(there)} of {there.size} chunks of {name} are "
                        "missing; `equigram run JOB.yaml` computes them"
                    )
                tile = tile_of(part, row, col)
                raise DamagedTileError(
                    f"{self.url}: chunk {row}, {col} of {name} (tile {tile}) is damaged: {wrong}; `equigram "
                    "verify --repair` computes that tile again",
                    tile,
                )
            yield values

    def diagonal(self, group: str, kernel: str) -> NDArray[Any]:
        """The diagonal (n,) of a train matrix, in the dtype of the run; raises as :meth:`matrix`."""
        blocks = range(self.info.tiling.train_blocks)
        tiles = self.read_blocks("gram", group, kernel, [(block, block) for block in blocks])
        return np.concatenate([np.diagonal(tile) for tile in tiles])

    def read_chunk(self, part: Part, group: str, kernel: str, row: int, col: int) -> tuple[NDArray[Any], str]:
        """The values of a chunk of a matrix, and what is wrong with them, if anything.

        Several times faster than through zarr, which takes a millisecond for each chunk.
        """
        tile, dtype = Tile(part, row, col), np.dtype(self.info.spec.gram.dtype)
        shape = len(self.info.tiling.rows(tile)), len(self.info.tiling.cols(tile))
        return self._read_chunk(f"{part}/{group}/{kernel}", row, col, shape, dtype, compressed=self._compressed)

    def _read_chunk(
        self, name: str, row: int, col: int, shape: tuple[int, int], dtype: np.dtype[Any], *, compressed: bool
    ) -> tuple[NDArray[Any], str]:
        """The values of a chunk as far as they count, and what is wrong with them, if anything."""
        with self._explained(f"read {name}"):
            try:
                content = bytes(self._call("cat_file", f"{self._place[1]}/{name}/c/{row}/{col}"))
            except (FileNotFoundError, IsADirectoryError):
                return np.empty((0, 0)), "it is missing"
        values, wrong = self._decoded(content, dtype, compressed=compressed)
        if not wrong:
            values = values[: shape[0], : shape[1]]
            wrong = "" if np.isfinite(values).all() else "it holds values that are not finite"
        return values, wrong

    def _decoded(self, content: bytes, dtype: np.dtype[Any], *, compressed: bool) -> tuple[NDArray[Any], str]:
        """The values of what :meth:`_encoded` made, and what is wrong with them, if anything."""
        import google_crc32c
        import numcodecs

        nothing, body = np.empty((0, 0)), content[:-4]
        if google_crc32c.value(body) != int.from_bytes(content[-4:], "little"):
            return nothing, "its checksum does not match"
        if compressed:
            try:
                body = bytes(numcodecs.Blosc().decode(body))
            except RuntimeError:
                return nothing, "it cannot be decompressed"
        edge = self.info.tile
        if len(body) != edge * edge * dtype.itemsize:
            return nothing, f"it holds {len(body)} bytes, not {edge * edge * dtype.itemsize}"
        return np.frombuffer(body, dtype.newbyteorder("<")).reshape(edge, edge), ""

    @property
    def _compressed(self) -> bool:
        return self.info.spec.gram.compression == "zstd"

    def read_chunks(self, chunks: Iterable[tuple[Part, str, str, int, int]]) -> Iterator[tuple[NDArray[Any], str]]:
        """What :meth:`read_chunk` says of each, in this order; several are read at a time, and a few ahead."""
        return self._ahead(self.read_chunk, chunks)

    def _ahead(
        self, read: Callable[..., tuple[NDArray[Any], str]], chunks: Iterable[tuple[Any, ...]]
    ) -> Iterator[tuple[NDArray[Any], str]]:
        """What ``read`` says of each, in this order; several are read at a time, and a few ahead."""
        pending: deque[Future[tuple[NDArray[Any], str]]] = deque()
        with self._storage("read chunks"), ThreadPoolExecutor(READERS) as pool:
            try:
                for chunk in chunks:
                    pending.append(pool.submit(read, *chunk))
                    if len(pending) > READERS:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    # ------------------------------------------------------------------ solutions

    def write_solution(
        self, group: str, kernel: str, arrays: Mapping[str, NDArray[Any]], attributes: Mapping[str, Any]
    ) -> None:
        """Store named arrays and JSON attributes of a solution, replacing an older one once they are whole.

        Raises:
          StoreMismatchError: images were added to the run meanwhile.
        """
        sha256 = {name: _sha256(values) for name, values in arrays.items()}
        fields = _signed({**attributes, "sha256": sha256})
        fs, path = self._place
        with self._alone(), self._storage("write the solution"):
            if self._is_extended(self._attributes() or {}):
                raise self._was_extended()
            name = f"solution/{group}/{kernel}"
            self._root_to_write.require_group(f"solution/{group}")
            beside = f"{name}{PARTIAL}" if _is_local(fs) else name
            try:
                self._delete(beside)
                for key, content in _group_files(arrays, fields):
                    self._put(f"{beside}/{key}", content)
                if beside != name:
                    before = f"{name}.before{PARTIAL}"
                    self._delete(before)
                    with contextlib.suppress(FileNotFoundError):
                        Path(path, name).rename(Path(path, before))
                    Path(path, beside).rename(Path(path, name))
                    self._delete(before)
            except BaseException:
                if beside != name:
                    shutil.rmtree(Path(path, beside), ignore_errors=True)
                raise

    def has_solutions(self) -> bool:
        """Whether there is any solution, whole or not."""
        with self._storage("look for solutions"):
            return bool(self._call("exists", f"{self._place[1]}/solution"))

    def discard_solutions(self) -> None:
        """Delete all solutions, so that the next run solves again."""
        with self._alone(), self._storage("delete the solutions"):
            self._delete_solved()

    def _delete_solved(self) -> None:
        """Delete all that comes from the matrices, whole or not."""
        for name in SOLVED:
            self._delete(name)

    def _delete(self, name: str) -> None:
        """Delete a group or an array, whole or not, if there is one; interrupted, it is not there either."""
        with contextlib.suppress(FileNotFoundError):
            self._call("rm_file", f"{self._place[1]}/{name}/zarr.json")
        with contextlib.suppress(FileNotFoundError):
            self._call("rm", f"{self._place[1]}/{name}", recursive=True)

    def has_solution(self, group: str, kernel: str) -> bool:
        """Whether a solution is stored completely."""
        return self.solution_attributes(group, kernel) is not None

    def solution_attributes(self, group: str, kernel: str) -> dict[str, Any] | None:
        """Those of a solution, without reading its arrays; ``None`` where there is none.

        Raises:
          DamagedArrayError: they are damaged.
        """
        with self._storage("read the solution"):
            try:
                document = json.loads(self._call("cat_file", f"{self._place[1]}/solution/{group}/{kernel}/zarr.json"))
            except (FileNotFoundError, NotADirectoryError):
                return None
            except ValueError:
                document = {}
        fields = document.get("attributes") if isinstance(document, dict) else None
        if fields == {}:
            return None  # an interrupted solver stage
        if not isinstance(fields, dict) or fields.pop("checksum", None) != json_sha256(fields):
            raise DamagedArrayError(f"{self.url}: the solution of {group} {kernel} is damaged; {SOLVE_AGAIN}")
        return fields

    def solution(self, group: str, kernel: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """The arrays and attributes that :meth:`write_solution` stored.

        Raises:
          IncompleteRunError: there is none.
          DamagedArrayError: it is damaged.
        """
        fields = self.solution_attributes(group, kernel)
        if fields is None:
            raise IncompleteRunError(
                f"{self.url} has no solution for {group} {kernel}; finish it with `equigram run JOB.yaml`"
            )
        self._opened.clear()  # another solution may have been there
        names = fields.pop("sha256")
        arrays = {name: self._read_array(f"solution/{group}/{kernel}/{name}", remedy=SOLVE_AGAIN) for name in names}
        for name, values in arrays.items():
            if _sha256(values) != names[name]:
                raise DamagedArrayError(f"{self.url}: {name} of {group} {kernel} is damaged; {SOLVE_AGAIN}")
        return arrays, fields

    # ------------------------------------------------------------------ factors

    def begin_factor(self, group: str, kernel: str, fields: Mapping[str, Any]) -> int:
        """Make room for the Cholesky factor of a train matrix; one that was begun with the same ``fields`` goes on.

        Returns:
          How many columns of tiles are finished, from the left.
        """
        name, blocks = f"factor/{group}/{kernel}", self.info.tiling.train_blocks
        signed = _signed({**fields, "train": self.info.train})
        with self._alone(), self._storage("make room for a factor"):
            try:
                document = json.loads(self._call("cat_file", f"{self._place[1]}/{name}/zarr.json"))
                begun = document["attributes"] == signed
            except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
                begun = False
            if not begun:
                from zarr.codecs import Crc32cCodec

                self._root_to_write.create_array(
                    name,
                    shape=(self.info.train, self.info.train),
                    dtype="float64",
                    chunks=(self.info.tile, self.info.tile),
                    compressors=[Crc32cCodec()],
                    fill_value=float("nan"),
                    attributes=signed,
                    overwrite=True,
                )
                return 0
        there = self._sizes(name, (blocks, blocks)) == chunk_bytes(self.info.tile, 8)
        whole = [bool(there[col:, col].all()) for col in range(blocks)]
        return whole.index(False) if False in whole else blocks

    def write_factor(self, group: str, kernel: str, row: int, col: int, values: NDArray[np.float64]) -> None:
        """Store a tile of a factor; what is above the diagonal of it counts, too, and is 0."""
        with self._explained(f"write the factor of {group} {kernel}"):
            self._put(f"factor/{group}/{kernel}/c/{row}/{col}", self._encoded(values, compress=False))

    def read_factor(self, group: str, kernel: str, places: Iterable[tuple[int, int]]) -> Iterator[NDArray[np.float64]]:
        """The tiles (row, col) of a factor, in this order.

        Raises:
          DamagedArrayError: one is missing or damaged.
        """
        name, images = f"factor/{group}/{kernel}", self.info.tiling.train_images

        def read(row: int, col: int) -> tuple[NDArray[Any], str]:
            (top, left), dtype = map(images, (row, col)), np.dtype(np.float64)
            shape = top.stop - top.start, left.stop - left.start
            return self._read_chunk(name, row, col, shape, dtype, compressed=False)

        chosen = list(places)
        for (row, col), (values, wrong) in zip(chosen, self._ahead(read, chosen), strict=True):
            if wrong:
                self.discard_factor(group, kernel)
                raise DamagedArrayError(f"{self.url}: chunk {row}, {col} of {name} is damaged: {wrong}; {SOLVE_AGAIN}")
            yield values

    def discard_factor(self, group: str, kernel: str) -> None:
        """Delete a factor, if there is one."""
        name = f"factor/{group}/{kernel}"
        with self._storage("look for a factor"):
            there = self._call("exists", f"{self._place[1]}/{name}")
        if there:
            with self._alone(), self._storage("delete a factor"):
                self._delete(name)

    # ------------------------------------------------------------------ iterates

    def write_iterate(
        self, group: str, kernel: str, name: str, values: NDArray[np.float64], facts: Mapping[str, float]
    ) -> None:
        """Keep where a solver is, with numbers that belong to it; ``name`` says of which problem."""
        with self._storage("keep where the solver is"):
            place = self._root_to_write.require_group(f"iterate/{group}/{kernel}")
            _add_array(place, name, values, values.shape)
            place[name].attrs.update({**facts, "sha256": _sha256(values)})

    def iterate(self, group: str, kernel: str, name: str) -> tuple[NDArray[np.float64], dict[str, float]] | None:
        """What :meth:`write_iterate` kept; ``None`` where there is nothing, or nothing whole."""
        path = f"iterate/{group}/{kernel}/{name}"
        with self._storage("look for where the solver was"):
            if not self._call("exists", f"{self._place[1]}/{path}/zarr.json"):
                return None
        try:
            self._opened.clear()  # another one may have been there
            values = self._read_array(path)
            facts = dict(self._array(path).attrs)
        except DamagedArrayError:  # interrupted while it was written
            return None
        return (values, facts) if facts.pop("sha256", None) == _sha256(values) else None

    def discard_iterates(self, group: str, kernel: str) -> None:
        """Delete all iterates of a matrix."""
        with self._storage("delete where the solver was"):
            self._delete(f"iterate/{group}/{kernel}")

    # ------------------------------------------------------------------ history

    def write_history(self, name: str, lines: Sequence[str]) -> None:
        """Keep lines of JSON in a file of the history; names are in the order of time."""
        with self._storage("write the history"):
            self._put(f"{EVENTS}/{name}.jsonl", "".join(f"{line}\n" for line in lines).encode())

    def history_files(self) -> dict[str, datetime]:
        """The names of the files of the history, in the order of time, and when each was last written."""
        fs, path = self._place
        with self._storage("list the history"):
            fs.invalidate_cache()
            found = {}
            with contextlib.suppress(FileNotFoundError):
                for entry in self._call("ls", f"{path}/{EVENTS}", detail=True):
                    name = str(entry["name"]).rsplit("/", 1)[-1]
                    if name.endswith(".jsonl"):
                        found[name.removesuffix(".jsonl")] = _modified(entry)
        return dict(sorted(found.items()))

    def history(self, names: Iterable[str] | None = None) -> Iterator[dict[str, Any]]:
        """The events of this run in the order of time, or those in some files; a line that is none is passed over."""
        for name in self.history_files() if names is None else names:
            with self._storage("read the history"):
                text = self._call("cat_file", f"{self._place[1]}/{EVENTS}/{name}.jsonl").decode(errors="replace")
            for one in text.splitlines():
                with contextlib.suppress(ValueError):
                    yield json.loads(one)

    # ------------------------------------------------------------------ storage

    @cached_property
    def _place(self) -> tuple[Any, str]:
        """The fsspec file system, and the path in it."""
        import fsspec

        try:
            fs, path = fsspec.core.url_to_fs(self.url, **_file_system_options(self.url))
        except (ImportError, ValueError) as error:
            raise SpecError(f"{self.url}: cannot open this kind of URL: {error}") from None
        return fs, str(path).rstrip("/")

    @cached_property
    def _root(self) -> zarr.Group:
        """To read from."""
        import zarr

        with self._storage("open the run store"):
            return zarr.open_group(self._zarr_store(read_only=True), mode="r")

    @property
    def _root_to_write(self) -> zarr.Group:
        import zarr

        return zarr.open_group(self._zarr_store(), mode="r+")

    def _zarr_store(self, *, read_only: bool = False) -> Any:
        from zarr.storage import FsspecStore, LocalStore

        fs, path = self._place
        if _is_local(fs):
            return LocalStore(path, read_only=read_only)  # renames temporary files: no torn chunk is ever visible
        options = _file_system_options(self.url)
        return FsspecStore.from_url(self.url, storage_options=options, read_only=read_only)

    def _attributes(self) -> dict[str, Any] | None:
        """The attribute ``equigram`` of the root group; ``None`` where there is no run."""
        with self._storage("open the run store"):
            try:
                content = self._call("cat_file", f"{self._place[1]}/zarr.json")
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None
        try:
            return dict(json.loads(content)["attributes"]["equigram"])
        except (ValueError, KeyError, TypeError):
            return None

    def _not_found(self) -> StoreError:
        """What to raise where there are no attributes of a run."""
        with self._storage("open the run store"):
            bucket = self._place[1].partition("/")[0]
            if _is_s3(self.url) and not self._call("exists", bucket):
                return StoreNotFoundError(f"{self.url}: the bucket {bucket} does not exist")
            lost = self._attributes() is None and "gram" in self._children()
        return (
            self._without_attributes()
            if lost
            else StoreNotFoundError(f"{self.url} is not a finished run store; make one with `equigram run JOB.yaml`")
        )

    def _without_attributes(self) -> StoreError:
        """What to raise where matrices are, and no attributes of a run."""
        return StoreError(
            f"{self.url} holds matrices, but its zarr.json, which tells of the run, is gone or damaged; restore that "
            'file from a copy, or write {"zarr_format": 3, "node_type": "group"} in its place, give the job another '
            f"`store`, and take the matrices with `equigram import JOB.yaml {self.url}`"
        )

    @property
    def parts(self) -> tuple[Part, ...]:
        """The two matrices of each group and kernel, or the train matrix alone where there are no test images."""
        return ("gram", "cross") if self.info.test else ("gram",)

    @property
    def matrices(self) -> list[tuple[str, str]]:
        """Group and kernel of every matrix of a part."""
        return (self._only or self.info.spec.gram).matrices

    def passes(self) -> list[tuple[Pass, Self]]:
        """What is computed together, each with a store that holds nothing else."""
        return [(one, type(self)(self.url, one)) for one in self.info.passes]

    def _array(self, *name: str) -> Any:
        """The zarr array of a name in parts, opened once."""
        if name not in self._opened:
            self._opened[name] = self._root["/".join(name)]
        return self._opened[name]

    @cached_property
    def _opened(self) -> dict[tuple[str, ...], Any]:
        return {}

    def _read_array(self, name: str, rows: range | None = None, remedy: str = LOAD_AGAIN) -> NDArray[Any]:
        """An array, or some of its rows, a chunk at a time."""
        with self._storage(f"read {name}"):
            try:
                array: Any = self._array(name)
            except (KeyError, ValueError, TypeError) as error:
                raise DamagedArrayError(
                    f"{self.url}: {name} is gone, or its metadata are damaged ({type(error).__name__}); {remedy}"
                ) from None
            rows = range(array.shape[0]) if rows is None else rows
            values = np.empty((len(rows), *array.shape[1:]), array.dtype)
            for start in range(rows.start, rows.stop, array.chunks[0]):
                stop = min(start + array.chunks[0], rows.stop)
                try:
                    part = array[start:stop]
                    wrong = "a chunk is missing" if _holds_fill_value(array, part) else ""
                except ValueError as error:  # zarr raises it when a checksum does not match
                    wrong = str(error)
                if wrong:
                    raise DamagedArrayError(f"{self.url}: {name} is damaged: {wrong}; {remedy}")
                values[start - rows.start : stop - rows.start] = part
        return values

    def _whole_chunks(self, part: Part, group: str, kernel: str, *, tidy: bool = False) -> NDArray[np.bool_]:
        """Which chunks ``(row, col)`` of a matrix are there, as far as their sizes tell."""
        sizes = self.chunk_sizes(part, group, kernel, tidy=tidy)
        return sizes > 0 if self.chunk_bytes is None else sizes == self.chunk_bytes

    def _any_chunks(self, part: Part) -> NDArray[np.bool_]:
        """Where at least one of the matrices has a chunk, ``(row, col)``."""
        there: NDArray[np.bool_] = np.logical_or.reduce(
            [self.chunk_sizes(part, *names) >= 0 for names in self.matrices]
        )
        return there

    @property
    def chunk_bytes(self) -> int | None:
        """Bytes of every chunk of a matrix; ``None`` where they are compressed."""
        if self.info.spec.gram.compression != "none":
            return None
        return chunk_bytes(self.info.tile, np.dtype(self.info.spec.gram.dtype).itemsize)

    def chunk_sizes(self, part: Part, group: str, kernel: str, *, tidy: bool = False) -> NDArray[np.int32]:
        """Bytes of the chunks ``[row, col]`` of a matrix, -1 where there is none; temporary files are passed over.

        ``tidy`` is that of :meth:`finished_tiles`.
        """
        return self._sizes(f"{part}/{group}/{kernel}", self.info.tiling.blocks(part), tidy=tidy)

    def _sizes(self, name: str, blocks: tuple[int, int], *, tidy: bool = False) -> NDArray[np.int32]:
        """Bytes of the chunks of an array, -1 where there is none."""
        sizes = np.full(blocks, -1, dtype=np.int32)
        with self._storage(f"list {name}"):
            for row, col, size in self._list_chunks(f"{self._place[1]}/{name}/c", sizes.shape, tidy=tidy):
                if row.isdecimal() and col.isdecimal() and int(row) < sizes.shape[0] and int(col) < sizes.shape[1]:
                    sizes[int(row), int(col)] = min(size, np.iinfo(np.int32).max)
        return sizes

    def _list_chunks(self, folder: str, shape: tuple[int, ...], *, tidy: bool) -> Iterator[tuple[str, str, int]]:
        """Row, column and bytes of the files below a folder, without holding a million entries at the same time."""
        fs, _ = self._place
        if _is_local(fs):
            with contextlib.suppress(FileNotFoundError), os.scandir(folder) as rows:
                for row in rows:
                    if row.is_dir():
                        with os.scandir(row) as files:
                            for file in files:
                                if file.name.isdecimal():
                                    yield row.name, file.name, file.stat().st_size
                                elif tidy and file.name.endswith(PARTIAL):
                                    _delete_left(Path(file))
            return
        # Object storage lists a thousand objects per request: by rows, where these are about as long.
        places = [folder] if shape[1] < ROW_LISTING else [f"{folder}/{row}" for row in range(shape[0])]
        for place in places:
            fs.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                for file, entry in self._call("find", place, detail=True).items():
                    row, col = file.rsplit("/", 2)[-2:]
                    yield row, col, int(entry["size"])
        fs.invalidate_cache()

    def _children(self) -> list[str]:
        """Names of the files and folders directly in the store."""
        return children(*self._place, seconds=ANSWER_SECONDS)

    def _call(self, operation: str, *arguments: Any, **options: Any) -> Any:
        """A request to the file system, for :data:`ANSWER_SECONDS` at most where that is remote."""
        return ask(self._place[0], operation, *arguments, seconds=ANSWER_SECONDS, **options)

    @contextlib.contextmanager
    def _storage(self, doing: str) -> Iterator[None]:
        """Turn whatever the storage raises into one sentence, and the silence of zarr into an error."""
        import zarr

        with self._explained(doing), zarr.config.set({"async.timeout": ANSWER_SECONDS}):
            yield

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        """Turn whatever the storage raises into one sentence."""
        try:
            yield
        except (EquigramError, EquikernelError):
            raise
        except Exception as error:
            why = reason(error, seconds=ANSWER_SECONDS)
            raise StoreError(
                f"{self.url}: cannot {doing}: {why}; nothing finished is lost: mend that and run again"
            ) from error


def free_space(url: str) -> int | None:
    """Bytes free where a local store is or would be; ``None`` for storage that does not say."""
    store = GramStore(url)
    fs, path = store._place
    if not _is_local(fs):
        return None
    with store._storage("look at the place of the run store"):
        usage = shutil.disk_usage(_nearest(Path(path)))
    return usage.free if usage.total else None


def _by_block(images: NDArray[np.integer[Any]], edge: int) -> dict[int, tuple[slice, slice | NDArray[np.integer[Any]]]]:
    """Where increasing images lie: by block their place among ``images``, and in the block."""
    found: dict[int, tuple[slice, slice | NDArray[np.integer[Any]]]] = {}
    for block in np.unique(images // edge).tolist():
        start, stop = np.searchsorted(images, (block * edge, (block + 1) * edge)).tolist()
        inside = images[start:stop] - block * edge
        gapless = inside[-1] - inside[0] == len(inside) - 1
        found[block] = slice(start, stop), slice(int(inside[0]), int(inside[-1]) + 1) if gapless else inside
    return found


def _delete_left(partial: Path) -> None:
    """Delete a half-written file if nobody writes it any more."""
    with contextlib.suppress(FileNotFoundError):  # written meanwhile
        if time.time() - partial.stat().st_mtime > LEFT_SECONDS:
            partial.unlink()


def _modified(entry: Mapping[str, Any]) -> datetime:
    """When the file of a listing was last written; the epoch where the storage does not say."""
    when = entry.get("LastModified", entry.get("last_modified", entry.get("mtime", 0.0)))
    return when if isinstance(when, datetime) else datetime.fromtimestamp(float(when), UTC)


def _file_system_options(url: str) -> dict[str, Any]:
    """Options of the file system of a store, but for those that the user set."""
    from fsspec.config import conf

    # Else s3fs asks for the size of each object before it reads it.
    options = {"max_concurrency": 1} if _is_s3(url) else {}
    return options if "max_concurrency" not in conf.get("s3", {}) else {}


def _is_s3(url: str) -> bool:
    return url.startswith(("s3://", "s3a://"))


def _nearest(place: Path) -> Path:
    """``place``, or the folder above it that exists."""
    while not place.exists():
        place = place.parent
    return place


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _is_local(fs: Any) -> bool:
    return "file" in _protocols(fs)


def _identity(spec: JobSpec, tile: int) -> list[tuple[str, Any]]:
    """The fields that decide what is in the matrices, flat and in a fixed order."""
    gram = spec.gram.model_dump(mode="json")
    gram["groups"], gram["kernels"] = sorted(gram["groups"]), sorted(gram["kernels"])
    gram["tile"] = tile if spec.gram.tile == "auto" else spec.gram.tile
    data, network = spec.data.model_dump(mode="json"), spec.network.model_dump(mode="json")
    sections = {"data": data, "network": network, "gram": gram}
    return [(f"{section}.{field}", value) for section, fields in sections.items() for field, value in fields.items()]


def _document(node: Any, shape: tuple[int, ...] | None = None) -> str:
    """The metadata of an array or group in a form that can be compared; with another shape if one is given."""
    fields = node.metadata.to_dict()
    return json.dumps({**fields, "shape": list(shape)} if shape else fields, sort_keys=True, default=str)


def _may_be_shape_of(name: str, shape: tuple[int, ...], needed: tuple[int, ...]) -> bool:
    """Whether a matrix is that large, or larger by images that an interrupted extension was to add."""
    large = len(shape) == len(needed) and all(map(operator.ge, shape, needed))
    return large and (name.startswith("cross/") or len(set(shape)) == len(set(needed)))


def _like(array: Any, kind: str) -> Any:
    """An array as this module makes those of images, labels and names, of the shape, dtype and chunks of another."""
    import zarr

    allowed = {"images": ("float32",), "labels": ("int64", "float64"), "names": ("uint8",)}[kind]
    dtype = next((one for one in allowed if array.dtype == one), allowed[0])
    return _make_array(zarr.open_group({}, mode="w"), kind, array.shape, np.dtype(dtype), array.chunks)


def _sha256(values: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def _is_unfinished(attributes: Mapping[str, Any]) -> bool:
    """Whether attributes are those of an interrupted creation, and not damaged ones of a run."""
    return attributes.get("state") == "preparing" and _signed(attributes) == attributes


def _signed(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes with their checksum."""
    fields = {name: value for name, value in attributes.items() if name != "checksum"}
    return {**fields, "checksum": json_sha256(fields)}


def _arrays_of(split: Split) -> dict[str, NDArray[Any]]:
    """Images, labels if there are any, and names, as they are stored."""
    labels = {} if split.labels is None else {"labels": split.labels}
    return {"images": split.images, **labels, "names": _names_text(split.names)}


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _add_array(group: zarr.Group, name: str, values: NDArray[Any], chunks: tuple[int, ...]) -> None:
    """Store an array of finite floats, class indices or text, a chunk at a time."""
    array = _make_array(group, name, values.shape, values.dtype, chunks)
    for start in range(0, len(values), array.chunks[0]):
        array[start : start + array.chunks[0]] = values[start : start + array.chunks[0]]


def _group_files(arrays: Mapping[str, NDArray[Any]], attributes: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files of a zarr group, the one that makes it a group last.

    Where one file finds no room, zarr still writes those that it began together with it, at a time nobody knows.
    """
    import zarr
    from zarr.storage import MemoryStore

    for key, values in arrays.items():
        made: dict[str, Any] = {}
        _add_array(zarr.create_group(MemoryStore(made)), key, values, values.shape)
        del made["zarr.json"]
        yield from ((name, buffer.to_bytes()) for name, buffer in made.items())
    made = {}
    zarr.create_group(MemoryStore(made), attributes=dict(attributes))
    yield "zarr.json", made["zarr.json"].to_bytes()


def _make_array(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    chunks: tuple[int, ...],
) -> Any:
    """An array without chunks. One that is lost later reads as values that cannot be: NaN, -1 or the character 0."""
    from zarr.codecs import Crc32cCodec, ZstdCodec

    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=tuple(max(1, min(c, s)) for c, s in zip(chunks, shape, strict=True)),
        compressors=[ZstdCodec(), Crc32cCodec()],
        fill_value={"f": float("nan"), "i": -1}.get(dtype.kind, 0),
        config={"write_empty_chunks": True},
        overwrite=True,
    )


def _names_text(names: Sequence[str]) -> NDArray[np.uint8]:
    lines = [line.replace("\n", " ") for line in names]
    return np.frombuffer("\n".join(lines).encode(errors="backslashreplace"), dtype=np.uint8)


def _append(array: Any, count: int, values: NDArray[Any]) -> None:
    """Put ``values`` behind the first ``count`` of an array, whatever an interrupted attempt has left there."""
    array.resize((count + len(values), *array.shape[1:]))
    array[count:] = values


def _holds_fill_value(array: Any, values: NDArray[Any]) -> bool:
    return bool((np.isnan(values) if values.dtype.kind == "f" else values == array.fill_value).any())


def _add_matrices(root: zarr.Group, one: Pass, tiling: Tiling, gram: GramSpec) -> None:
    """Make the matrices of a pass, without tiles; those that are there keep them and grow to their new size."""
    parts: tuple[Part, ...] = ("gram", "cross") if tiling.test else ("gram",)
    for part in parts:
        for group, kernel in one.matrices:
            _add_matrix(root, f"{part}/{group}/{kernel}", tiling.shape(part), tiling.edge, gram)


def _add_matrix(root: zarr.Group, name: str, shape: tuple[int, int], tile: int, gram: GramSpec) -> None:
    from zarr.codecs import BloscCodec, BloscShuffle, Crc32cCodec

    if name in root:
        matrix: Any = root[name]
        matrix.resize(shape)
        return
    zstd = [] if gram.compression == "none" else [BloscCodec(**{**_ZSTD, "shuffle": BloscShuffle.shuffle})]
    root.create_array(
        name,
        shape=shape,
        dtype=gram.dtype,
        chunks=(tile, tile),
        compressors=[*zstd, Crc32cCodec()],
        fill_value=float("nan"),
        config={"write_empty_chunks": True},
    )
