"""The errors of :mod:`equigram`: one root, leaves that are also the builtin a caller expects.

Every message states what is wrong, the offending value beside the expected one, where, and the remedy. Errors
survive pickling, so a worker's error reaches the driver as it was raised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from equigram.plan import Tile


class EquigramError(Exception):
    """Root of the errors raised on purpose by this package."""

    exit_code = 1
    """Exit status of a command that ends with this error: 2 a wrong request, 1 a failed run."""


class SpecError(EquigramError, ValueError):
    """The job file, or an argument, asks for something that does not exist or does not fit together."""

    exit_code = 2


class DataError(EquigramError, ValueError):
    """The images or labels cannot be used."""

    exit_code = 2


class DataNotFoundError(DataError, FileNotFoundError):
    """Nothing is found where the images or labels should be."""


class StoreError(EquigramError, OSError):
    """The run store, or a file with results, cannot be read or written."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no run store at this URL."""

    exit_code = 2


class StoreMismatchError(StoreError, ValueError):
    """The run store belongs to another job."""

    exit_code = 2


class StoreExistsError(StoreMismatchError):
    """A run is stored where a new one was to be made."""


class IncompleteRunError(StoreError):
    """What is asked for needs tiles, or a solution, that are not computed yet."""

    exit_code = 2


class DamagedTileError(StoreError):
    """A stored tile does not match its checksum, or holds values that are not finite.

    Attributes:
      tile: the :class:`equigram.plan.Tile` to compute again.
    """

    def __init__(self, message: str, tile: Tile) -> None:
        super().__init__(message)
        self.tile = tile

    def __reduce__(self) -> tuple[type[Self], tuple[str, Tile]]:
        return type(self), (str(self), self.tile)


class DamagedArrayError(StoreError):
    """The stored images, labels or names do not match their checksums, or are not all there."""


class ResourceError(EquigramError, MemoryError):
    """The job needs more memory, disk, cores or GPUs than there are."""

    exit_code = 2


class ClusterError(EquigramError, ConnectionError):
    """No Ray cluster answers, or it has nothing to run the workers on."""


class TileFailedError(EquigramError, RuntimeError):
    """A tile failed again and again; the finished ones are kept."""


class SolverError(EquigramError, ArithmeticError):
    """The regression has no usable solution.

    Attributes:
      images: the training images that are the cause, as far as that is known: their places in the train matrix.
    """

    def __init__(self, message: str, images: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.images = images


class ServiceError(EquigramError, ConnectionError):
    """The service does not answer, or not as one of equigram does."""

    exit_code = 4


class AuthenticationError(EquigramError, PermissionError):
    """The service does not know the token, or its scope does not allow what is asked for."""

    exit_code = 4


class JobNotFoundError(EquigramError, LookupError):
    """The service has no such job, or the job has no such thing."""

    exit_code = 2


class ConflictError(EquigramError, ValueError):
    """The job is not in a state that allows what is asked for, or another job has its name."""

    exit_code = 2


class LimitError(EquigramError, ValueError):
    """More is asked for than the service allows."""

    exit_code = 2


class ForbiddenUrlError(SpecError, PermissionError):
    """The service does not allow jobs to read or write there."""


class JobFailedError(EquigramError, RuntimeError):
    """The job that was waited for failed; what it had finished is kept."""


class JobCancelledError(EquigramError, RuntimeError):
    """The job that was waited for was cancelled, or is incomplete; what it had finished is kept."""

    exit_code = 3


class WaitTimeoutError(EquigramError, TimeoutError):
    """The job that was waited for has not ended in the time that was given; it goes on."""

    exit_code = 3
