"""The errors of both packages: one root each, leaves that are the builtin one expects, whole after pickling."""

import copy
import inspect
import pickle
from collections.abc import Callable
from types import ModuleType

import pytest

import equigram.errors
import equikernel.errors
from equigram.errors import DamagedTileError, EquigramError
from equigram.plan import Tile
from equikernel.errors import EquikernelError, suggestion

WRONG_REQUEST, FAILED_RUN, GOES_ON, NO_SERVICE = 2, 1, 3, 4

EXPECTED: dict[str, tuple[type[Exception], int]] = {
    "AuthenticationError": (PermissionError, NO_SERVICE),
    "ClusterError": (ConnectionError, FAILED_RUN),
    "ConflictError": (ValueError, WRONG_REQUEST),
    "DamagedArrayError": (OSError, FAILED_RUN),
    "DamagedTileError": (OSError, FAILED_RUN),
    "DataError": (ValueError, WRONG_REQUEST),
    "DataNotFoundError": (FileNotFoundError, WRONG_REQUEST),
    "EngineError": (ValueError, WRONG_REQUEST),
    "EquigramError": (Exception, FAILED_RUN),
    "EquikernelError": (Exception, WRONG_REQUEST),
    "ForbiddenUrlError": (PermissionError, WRONG_REQUEST),
    "ImageError": (ValueError, WRONG_REQUEST),
    "IncompleteRunError": (OSError, WRONG_REQUEST),
    "JobCancelledError": (RuntimeError, GOES_ON),
    "JobFailedError": (RuntimeError, FAILED_RUN),
    "JobNotFoundError": (LookupError, WRONG_REQUEST),
    "LimitError": (ValueError, WRONG_REQUEST),
    "NetworkError": (ValueError, WRONG_REQUEST),
    "MemoryLimitError": (MemoryError, WRONG_REQUEST),
    "NonFiniteKernelError": (ArithmeticError, FAILED_RUN),
    "ResourceError": (MemoryError, WRONG_REQUEST),
    "ServiceError": (ConnectionError, NO_SERVICE),
    "SolverError": (ArithmeticError, FAILED_RUN),
    "SpecError": (ValueError, WRONG_REQUEST),
    "StoreError": (OSError, FAILED_RUN),
    "StoreExistsError": (ValueError, WRONG_REQUEST),
    "StoreMismatchError": (ValueError, WRONG_REQUEST),
    "StoreNotFoundError": (FileNotFoundError, WRONG_REQUEST),
    "TileFailedError": (RuntimeError, FAILED_RUN),
    "WaitTimeoutError": (TimeoutError, GOES_ON),
}


def errors_of(module: ModuleType) -> list[type[Exception]]:
    classes = [one for _, one in inspect.getmembers(module, inspect.isclass) if issubclass(one, Exception)]
    return [one for one in classes if one.__module__ == module.__name__]


ALL = errors_of(equikernel.errors) + errors_of(equigram.errors)


def an(error: type[Exception]) -> Exception:
    if issubclass(error, DamagedTileError):
        return error("chunk 0, 1 is damaged", Tile("gram", 0, 1))
    return error("the ridge is -1; take 0 or more")


def test_every_error_is_listed_here() -> None:
    assert sorted(error.__name__ for error in ALL) == sorted(EXPECTED)


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
def test_an_error_is_the_builtin_one_expects_and_knows_its_exit_code(error: type[Exception]) -> None:
    builtin, code = EXPECTED[error.__name__]
    assert issubclass(error, builtin)
    assert error.exit_code == code  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
def test_an_error_has_one_root_and_says_in_a_docstring_what_it_means(error: type[Exception]) -> None:
    assert issubclass(error, EquigramError) != issubclass(error, EquikernelError)
    assert error.__doc__
    assert error.__doc__ != error.__mro__[1].__doc__


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
@pytest.mark.parametrize("way", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy], ids=["pickled", "copied"])
def test_an_error_survives_the_way_from_a_worker(error: type[Exception], way: Callable[[Exception], Exception]) -> None:
    before = an(error)
    after = way(before)
    assert type(after) is error
    assert str(after) == str(before) != ""
    assert after.args == before.args
    assert vars(after) == vars(before)


def test_a_suggestion_names_what_is_close_in_any_case() -> None:
    assert suggestion("ReLu", ("relu", "erf")) == "; did you mean 'relu'?"
    assert suggestion("same", ("SAME", "VALID")) == "; did you mean 'SAME'?"


def test_nothing_is_suggested_for_what_is_far_from_everything() -> None:
    assert suggestion("tanh", ("relu", "erf")) == ""
    assert suggestion(None, ("relu", "erf")) == ""
    assert suggestion("relu", ()) == ""
