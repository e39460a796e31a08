"""Checks what a store holds, without believing any of it.

Each check finds what the ones before it cannot:

- layout: the arrays are those of the job, with its shapes, dtype and chunks, and in its groups;
- images, labels, names: their SHA-256 is the one that was noted when they were stored;
- solutions: likewise;
- chunks: full size, matching checksum, finite values;
- symmetry: a chunk of the train matrix and its mirror image hold the same bits;
- diagonal: the kernel of every image with itself, computed anew;
- Cauchy-Schwarz: ``|K(f, f')| <= √(K(f, f) K(f', f'))`` for every entry;
- eigenvalues: principal minors of the train matrix, chosen at random, are positive semi-definite;
- places: an entry of every tile, chosen at random, computed anew, so that no chunk is in the place of another;
- recomputation: tiles chosen at random, computed anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from equigram.errors import DamagedArrayError, IncompleteRunError, StoreError
from equigram.events import Progress
from equigram.plan import Part, SplitName, Tile, TileSet, is_diagonal, row_split, tile_of
from equigram.store import SAME_SOFTWARE, versions
from equikernel.errors import EquikernelError, NonFiniteKernelError
from equikernel.worker import processor_kind

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from numpy.typing import NDArray

    from equigram.events import Listener
    from equigram.spec import Pass
    from equigram.store import GramStore
    from equikernel.kernel import Block

    Array = NDArray[np.float64]

T = TypeVar("T")

MINOR = 128
"""Images from each of the two blocks of a principal minor at most."""

TOLERANCE = {"float32": 5e-6, "float64": 1e-11}
"""Largest difference that another kind of processor or engine explains, relative to ``√(K(f, f) K(f', f'))``."""

SAME_BITS = ("cpu", "reference")
"""Engines with which the bits of a pair depend on the two images and the kind of processor alone."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
      what: what, and where.
      tile: the tile to compute again; ``None`` where that would not mend it.
      array: the matrix, or group of some, whose metadata are to be written again; ``None`` where that mends nothing.
      data: the images, labels or names that are to be loaded again; ``None`` where that mends nothing.
      solved: whether solving again mends it.
    """

    what: str
    tile: Tile | None = None
    array: str | None = None
    data: str | None = None
    solved: bool = False

    @property
    def beyond(self) -> bool:
        """Whether nothing mends it but making the store again."""
        return self.tile is None and self.array is None and self.data is None and not self.solved


@dataclass(frozen=True)
class Report:
    """What was checked, and what is wrong.

    Attributes:
      findings: in the order of the checks.
      missing: tiles that are not there yet, or not completely.
      chunks: chunks of matrices that were read.
      images: images whose kernel with themselves was computed.
      minors: principal minors whose eigenvalues were computed.
      anew: tiles that were computed anew.
      to_the_bit: whether what was computed anew had to have the same bits, not only agree to :data:`TOLERANCE`.
    """

    findings: tuple[Finding, ...]
    missing: int
    chunks: int
    images: int
    minors: int
    anew: int
    to_the_bit: bool

    @property
    def bad_tiles(self) -> list[Tile]:
        """The tiles to compute again."""
        return sorted({finding.tile for finding in self.findings if finding.tile is not None})

    @property
    def bad_arrays(self) -> list[str]:
        """The matrices and groups whose metadata are to be written again."""
        return sorted({finding.array for finding in self.findings if finding.array is not None})

    @property
    def bad_data(self) -> list[str]:
        """The images, labels and names to load again."""
        return sorted({finding.data for finding in self.findings if finding.data is not None})

    @property
    def bad_solutions(self) -> bool:
        """Whether to solve again."""
        return any(finding.solved for finding in self.findings)

    @property
    def beyond(self) -> bool:
        """Whether something is wrong that nothing mends but making the store again."""
        return any(finding.beyond for finding in self.findings)


def verify(store: GramStore, listener: Listener, samples: int, seed: int = 0) -> Report:
    """Check a store, finished or not. Changes nothing; computes in this process, on all cores.

    Args:
      store: the run.
      listener: told of the progress.
      samples: how many tiles are computed anew, and how many principal minors are taken.
      seed: of their choice.

    Raises:
      StoreError: the storage does not answer. That what it holds is wrong is no error, but in the report.
    """
    reports = [_Verification(part, one, listener, samples, seed).run() for one, part in store.passes()]
    found = [finding for report in reports for finding in report.findings]
    passes = {names for one, _ in store.passes() for names in one.matrices}
    if passes != set(store.matrices):
        found.append(Finding(f"the job has the matrices {sorted(store.matrices)}, and its passes {sorted(passes)}"))
    return Report(
        tuple(dict.fromkeys([*found, *_bad_solutions(store)])),
        sum(report.missing for report in reports),
        sum(report.chunks for report in reports),
        max(report.images for report in reports),
        sum(report.minors for report in reports),
        sum(report.anew for report in reports),
        all(report.to_the_bit for report in reports),
    )


def _bad_solutions(store: GramStore) -> list[Finding]:
    """What is wrong with the solutions that there are."""
    findings = []
    for group, kernel in store.matrices:
        try:
            store.solution(group, kernel)
        except IncompleteRunError:
            continue
        except StoreError as error:
            findings.append(Finding(str(error), solved=True))
    return findings


class _Verification:
    """The verification of what was computed in one pass."""

    def __init__(self, store: GramStore, one: Pass, listener: Listener, samples: int, seed: int) -> None:
        self._store, self._info, self._listener = store, store.info, listener
        self._samples, self._rng = samples, np.random.default_rng(seed)
        self._findings: list[Finding] = []
        self._bad: set[Tile] = set()
        self._chunks = 0
        spec, processors = self._info.spec, set(self._info.processors)
        self._dtype, self._tolerance = spec.gram.dtype, TOLERANCE[spec.gram.dtype]
        self._function = spec.function_here(one.groups, self._info.image_shape)
        now = versions(SAME_SOFTWARE)
        same_software = all(now.items() <= one.items() for one in self._info.all_versions)
        engine = self._function.engine.name
        self._to_the_bit = same_software and processors <= {processor_kind(engine)} and engine in SAME_BITS

    @property
    def _allowed(self) -> float:
        """Largest difference between what is stored and computed now, relative to ``√(K(f, f) K(f', f'))``."""
        return 0.0 if self._to_the_bit else self._tolerance

    def run(self) -> Report:
        """All checks; those that need the images are left out where these are damaged."""
        missing = images = minors = anew = 0
        errors = self._store.layout_errors()
        for name, what in errors.items():
            is_data = name in self._info.sha256
            self._findings.append(Finding(what, data=name) if is_data else Finding(what, array=name))
        whole = self._images_are_whole(errors)
        if errors.keys() <= self._info.sha256.keys():
            stored = self._stored_tiles()
            missing = len(self._info.tiling) - len(stored)
            diagonals: dict[tuple[str, str, str], Array] = {}
            if whole:
                try:
                    diagonals = self._self_kernels()
                    images = self._info.train + self._info.test
                except EquikernelError as error:
                    self._findings.append(Finding(f"an image has no kernel with itself: {error}"))
            self._check_values(self._good(stored), diagonals)
            if diagonals:
                minors = self._check_minors(self._good(stored))
                anew = self._check_anew(self._good(stored), diagonals)
        return Report(tuple(self._findings), missing, self._chunks, images, minors, anew, self._to_the_bit)

    def _good(self, tiles: list[Tile]) -> list[Tile]:
        return [tile for tile in tiles if tile not in self._bad]

    def _found(self, tile: Tile, what: str) -> None:
        """Something is wrong with a tile; only the first thing is told."""
        if tile not in self._bad:
            self._bad.add(tile)
            self._findings.append(Finding(what, tile))

    def _stored_tiles(self) -> list[Tile]:
        """The tiles of which all chunks are there; those of a wrong size are found."""
        store = self._store
        present: dict[Part, NDArray[np.bool_]] = {}
        for part in store.parts:
            matrices = {names: store.chunk_sizes(part, *names) for names in store.matrices}
            present[part] = np.logical_and.reduce([sizes >= 0 for sizes in matrices.values()])
            for (group, kernel), sizes in matrices.items():
                wrong = (sizes >= 0) & (sizes != store.chunk_bytes) if store.chunk_bytes else sizes == 0
                for row, col in np.argwhere(wrong).tolist():
                    what = (
                        f"chunk {row}, {col} of {part}/{group}/{kernel} has {sizes[row, col]} bytes, not "
                        f"{store.chunk_bytes or 'more'}"
                    )
                    self._found(tile_of(part, row, col), what)
        return list(TileSet(self._info.tiling, present))

    def _images_are_whole(self, unreadable: Container[str]) -> bool:
        """Whether the images, labels and names can be read, and are those that were stored."""
        before = len(self._findings)
        for name, noted in self._info.sha256.items():
            if name in unreadable:
                continue
            kind, _, split = name.partition("/")
            which: SplitName = "test" if split == "test" else "train"
            try:
                if kind == "images" and self._store.images_digest(which) != noted:
                    self._findings.append(Finding(f"{name} holds other values than were stored", data=name))
                elif kind == "labels":
                    self._store.labels(which)
                elif kind == "names":
                    self._store.names(which)
            except DamagedArrayError as error:
                self._findings.append(Finding(str(error), data=name))
        return len(self._findings) == before and not any(name in unreadable for name in self._info.sha256)

    def _self_kernels(self) -> dict[tuple[str, str, str], Array]:
        """The kernels ``(n,)`` of every image with itself in the dtype of the run, by split, group and kernel."""
        tiling = self._info.tiling
        blocks: list[tuple[SplitName, int]] = [("train", index) for index in range(tiling.train_blocks)]
        blocks += [("test", index) for index in range(tiling.test_blocks)]
        parts: dict[tuple[str, str, str], list[Array]] = {}
        for done, (split, index) in enumerate(blocks):
            self._listener(Progress("computing diagonal blocks", done, len(blocks)))
            first = index * tiling.edge
            block = self._function.prepare(self._store.block(split, index), f"images/{split}", first)
            for group, pooled in self._function.diagonal(block).items():
                for kernel in [kernel for name, kernel in self._store.matrices if name == group]:
                    with np.errstate(over="ignore"):
                        values = getattr(pooled, kernel).astype(self._dtype).astype(np.float64)
                    if not (finite := np.isfinite(values)).all():
                        image = f"images/{split}[{first + int(np.argmin(finite))}]"
                        raise NonFiniteKernelError(f"the {group} {kernel} of {image} is no finite {self._dtype}")
                    parts.setdefault((split, group, kernel), []).append(values)
        self._listener(Progress("computing diagonal blocks", len(blocks), len(blocks)))
        return {key: np.concatenate(values) for key, values in parts.items()}

    def _check_values(self, tiles: list[Tile], diagonals: dict[tuple[str, str, str], Array]) -> None:
        """Every stored value: checksums, symmetry, the diagonal, Cauchy-Schwarz, and an entry of each tile anew."""
        chosen, entries = self._sampled_entries() if diagonals else ({}, {})
        matrices, chunks = self._store.matrices, self._info.tiling.chunks
        reads = self._store.read_chunks(
            (tile.part, *names, *chunk) for tile in tiles for names in matrices for chunk in chunks(tile)
        )
        for done, tile in enumerate(tiles):
            self._listener(Progress("checking tiles", done, len(tiles)))
            for group, kernel in matrices:
                read = [next(reads) for _ in chunks(tile)]
                self._chunks += len(read)
                values = self._whole(tile, group, kernel, read)
                if values is None:
                    continue
                name = f"{group} {kernel} of tile {tile}"
                if is_diagonal(tile) and not np.array_equal(values, values.T):
                    self._found(tile, f"the {name} is not symmetric")
                if diagonals:
                    scale = self._of_tile(diagonals, tile, group, kernel)
                    self._check_bounds(tile, name, values, *scale)
                if entries:
                    row, col = chosen[row_split(tile.part)][tile.row], chosen["train"][tile.col]
                    entry, computed = values[row, col], entries[tile.part, group, kernel][tile.row, tile.col]
                    if abs(entry - computed) > self._allowed * np.sqrt(scale[0][row] * scale[1][col]):
                        self._found(
                            tile,
                            f"entry {row}, {col} of the {name} is {entry:.9g} in the store, and {computed:.9g} "
                            "computed now",
                        )
        self._listener(Progress("checking tiles", len(tiles), len(tiles)))

    def _sampled_entries(self) -> tuple[dict[SplitName, list[int]], dict[tuple[Part, str, str], Array]]:
        """An image of each block, by its place in it, and the kernels of these with each other, by matrix."""
        tiling, store = self._info.tiling, self._store
        chosen: dict[SplitName, list[int]] = {}
        prepared: dict[SplitName, list[Block]] = {}
        for part in store.parts:
            split = row_split(part)
            blocks = [tiling.rows(Tile(part, block, 0)) for block in range(tiling.blocks(part)[0])]
            chosen[split] = [int(self._rng.integers(len(block))) for block in blocks]
            images = [block.start + place for block, place in zip(blocks, chosen[split], strict=True)]
            prepared[split] = [
                self._function.prepare(np.concatenate([store.images(split, range(i, i + 1)) for i in some]))
                for some in (images[start : start + MINOR] for start in range(0, len(images), MINOR))
            ]
        entries = {
            (part, *names): np.full(tiling.blocks(part), np.nan) for part in store.parts for names in store.matrices
        }
        for part in store.parts:
            for y, row in enumerate(prepared[row_split(part)]):
                for x, col in enumerate(prepared["train"]):
                    if part == "gram" and x < y:
                        continue
                    kernels = self._function(row) if part == "gram" and x == y else self._function(row, col)
                    for group, kernel in store.matrices:
                        values = getattr(kernels[group], kernel).astype(self._dtype)
                        height, width = values.shape
                        entries[part, group, kernel][y * MINOR : y * MINOR + height, x * MINOR : x * MINOR + width] = (
                            values
                        )
        return chosen, entries

    def _read(self, tile: Tile, group: str, kernel: str) -> Array | None:
        """The values of a tile, if all of its chunks are whole and its transpose is the same."""
        chunks = self._info.tiling.chunks(tile)
        read = [self._store.read_chunk(tile.part, group, kernel, *chunk) for chunk in chunks]
        return self._whole(tile, group, kernel, read)

    def _whole(self, tile: Tile, group: str, kernel: str, read: list[tuple[Array, str]]) -> Array | None:
        """The values of a tile from what was read of its chunks, as :meth:`_read`."""
        for (row, col), (_, wrong) in zip(self._info.tiling.chunks(tile), read, strict=True):
            if wrong:
                self._found(tile, f"chunk {row}, {col} of {tile.part}/{group}/{kernel} is damaged: {wrong}")
                return None
        values = [chunk.astype(np.float64) for chunk, _ in read]
        if len(values) == 2 and not np.array_equal(values[0], values[1].T):
            self._found(tile, f"the {group} {kernel} of tile {tile} differs from its transpose")
            return None
        return values[0]

    def _of_tile(
        self, diagonals: dict[tuple[str, str, str], Array], tile: Tile, group: str, kernel: str
    ) -> tuple[Array, Array]:
        """The self-kernels of the images along the rows and the columns of a tile."""
        rows, cols = self._info.tiling.rows(tile), self._info.tiling.cols(tile)
        along, across = diagonals[row_split(tile.part), group, kernel], diagonals["train", group, kernel]
        return along[rows.start : rows.stop], across[cols.start : cols.stop]

    def _check_bounds(self, tile: Tile, name: str, values: Array, rows: Array, cols: Array) -> None:
        scale = np.sqrt(np.outer(rows, cols))
        beyond = np.abs(values) > scale * (1 + 2 * self._tolerance)
        if beyond.any():
            place = np.unravel_index(int(beyond.argmax()), beyond.shape)
            self._found(
                tile,
                f"entry {place[0]}, {place[1]} of the {name} is {values[place]:.9g}, and by Cauchy-Schwarz at most "
                f"{scale[place]:.9g}",
            )
        if is_diagonal(tile):
            self._compare(tile, f"diagonal of the {name}", np.diag(values), rows, rows)

    def _compare(self, tile: Tile, name: str, stored: Array, computed: Array, scale: Array) -> None:
        """Find a tile whose values are not those that are computed now."""
        error = np.abs(stored - computed)
        wrong = error > self._allowed * scale
        if wrong.any():
            place = np.unravel_index(int((error / np.where(scale > 0, scale, 1)).argmax()), error.shape)
            self._found(
                tile,
                f"entry {', '.join(map(str, place))} of the {name} is {stored[place]:.9g} in the store, and "
                f"{computed[place]:.9g} computed now",
            )

    def _check_minors(self, tiles: list[Tile]) -> int:
        """Smallest eigenvalues of the train matrix restricted to images of two blocks."""
        good = set(tiles)
        pairs = [
            (Tile("gram", t.row, t.row), t, Tile("gram", t.col, t.col))
            for t in tiles
            if t.part == "gram" and {Tile("gram", t.row, t.row), Tile("gram", t.col, t.col)} <= good
        ]
        chosen = self._choose(pairs)
        for trio in chosen:
            for group, kernel in self._store.matrices:
                first, between, second = (self._read(tile, group, kernel) for tile in trio)
                if first is None or between is None or second is None:
                    break
                minor = first if is_diagonal(trio[1]) else np.block([[first, between], [between.T, second]])
                keep = np.sort(self._rng.permutation(len(minor))[: 2 * MINOR])
                values = np.linalg.eigvalsh(minor[np.ix_(keep, keep)])
                if values[0] < -len(keep) * self._tolerance * values[-1]:
                    for tile in dict.fromkeys(trio):
                        self._found(
                            tile,
                            f"the {group} {kernel} of the images of tile {trio[1]} is not positive semi-definite: "
                            f"eigenvalues from {values[0]:.3g} to {values[-1]:.3g}",
                        )
        return len(chosen)

    def _check_anew(self, tiles: list[Tile], diagonals: dict[tuple[str, str, str], Array]) -> int:
        """Compute some tiles anew."""
        chosen = self._choose(tiles)
        for done, tile in enumerate(chosen):
            self._listener(Progress("recomputing tiles", done, len(chosen)))
            row = self._function.prepare(self._store.block(row_split(tile.part), tile.row))
            if is_diagonal(tile):
                kernels = self._function(row)
            else:
                kernels = self._function(row, self._function.prepare(self._store.block("train", tile.col)))
            for group, kernel in self._store.matrices:
                stored = self._read(tile, group, kernel)
                if stored is not None:
                    scale = np.sqrt(np.outer(*self._of_tile(diagonals, tile, group, kernel)))
                    computed = getattr(kernels[group], kernel).astype(self._dtype).astype(np.float64)
                    self._compare(tile, f"{group} {kernel} of tile {tile}", stored, computed, scale)
        self._listener(Progress("recomputing tiles", len(chosen), len(chosen)))
        return len(chosen)

    def _choose(self, things: Sequence[T]) -> list[T]:
        """As many as there are samples, at random."""
        return [things[i] for i in sorted(self._rng.permutation(len(things))[: self._samples])]
