"""A train Gram matrix in the memory of the workers of a Ray cluster, which multiply with it together."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from equigram.driver import check_local_cluster, fitting_workers, share_of_a_worker, target_workers
from equigram.errors import ClusterError, ResourceError
from equigram.solve.operators import StoredOperator, stored_scale, tile_bytes, upper_triangle
from equikernel.memory import format_bytes

if TYPE_CHECKING:
    from equigram.solve.matrices import Float64s
    from equigram.spec import ResourceSpec
    from equigram.store import GramStore

COLUMNS = 64
"""Columns that are multiplied at a time."""

LOOK_SECONDS = 5.0
"""How often the local cluster is looked at while its answers are waited for."""


class ClusterOperator:
    """A Gram matrix whose tiles are spread over Ray actors, as :class:`equigram.solve.operators.Operator`.

    Each actor reads its tiles from the store once and keeps those that it has memory for; the others it reads for each
    product. An actor that dies is started again by Ray, elsewhere if need be, and reads them anew. Needs a
    :func:`equigram.driver.ray_session`; to be used in a ``with`` statement, which ends the actors.

    Args:
      store: a run whose train matrices are complete, where the workers can read it too.
      group, kernel: which of them.
      resources: how many workers, and what each has.

    Raises (also :meth:`multiply`):
      IncompleteRunError, DamagedTileError: a tile is missing or damaged.
      SolverError: the diagonal is negative somewhere, or 0 everywhere.
      ResourceError: not one worker fits on the cluster.
      ClusterError: the cluster is gone.
    """

    def __init__(self, store: GramStore, group: str, kernel: str, resources: ResourceSpec) -> None:
        import ray

        self.count, self.dtype = store.info.train, np.dtype(store.info.spec.gram.dtype)
        self.scale = stored_scale(store, group, kernel)
        places, one = upper_triangle(store), tile_bytes(store)
        beside = 6 * 8 * self.count * COLUMNS  # columns and products, on their way too
        workers = min(target_workers(resources, beside), len(places))
        each = -(-len(places) // workers)
        kept = each * one
        while kept and fitting_workers(resources, kept + beside) < workers:
            kept //= 2
        if fitting_workers(resources, kept + beside) < 1:
            raise ResourceError(
                f"a worker that multiplies with a matrix of {self.count:,} images needs {format_bytes(beside)} of "
                "memory, and no node of the Ray cluster has as much; take larger nodes"
            )
        actor: Any = ray.remote(StoredOperator).options(
            **share_of_a_worker(resources), memory=kept + beside, max_restarts=-1, max_task_retries=-1
        )
        self._actors = [
            actor.remote(store, group, kernel, kept, places[first::workers], self.scale) for first in range(workers)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for actor in self._actors:
            with contextlib.suppress(Exception):  # the cluster may be gone
                ray.kill(actor)

    def multiply(self, values: Float64s) -> Float64s:
        """A ``values``, (n, k)."""
        parts = [self._multiply(values[:, first : first + COLUMNS]) for first in range(0, values.shape[1], COLUMNS)]
        return np.concatenate(parts, axis=1)

    def _multiply(self, values: Float64s) -> Float64s:
        import ray
        from ray.exceptions import RayError, RayTaskError

        sent = ray.put(np.ascontiguousarray(values))
        product = np.zeros(values.shape)
        try:
            for part in [actor.multiply.remote(sent) for actor in self._actors]:  # always added in this order
                while not ray.wait([part], timeout=LOOK_SECONDS)[0]:
                    check_local_cluster()
                product += ray.get(part)
        except RayTaskError as error:
            raise getattr(error, "cause", error) from None
        except RayError as error:
            raise ClusterError(f"the workers that multiply with the matrix are gone: {error}; run again") from error
        return product
