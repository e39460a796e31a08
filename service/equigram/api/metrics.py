"""Counts of the service for Prometheus."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from equigram.api.models import State


class ServiceMetrics:
    """Requests by route and status, jobs by state, and watchers."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        options: dict[str, Any] = {"namespace": "equigram_service", "registry": self._registry}
        labels = ["method", "route"]
        self._requests = Counter("requests", "Requests that were answered.", [*labels, "status"], **options)
        self._seconds = Histogram(
            "request_seconds",
            "Time to the end of an answer.",
            labels,
            buckets=[0.001 * 4**n for n in range(8)],
            **options,
        )
        self._jobs = Gauge("jobs", "Jobs by state.", ["state"], **options)
        self._watchers = Gauge("watchers", "Connections that watch a job.", **options)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(method, route, status).inc()
        self._seconds.labels(method, route).observe(seconds)

    def text(self, states: list[State], watchers: Callable[[], int]) -> bytes:
        """All of them, as Prometheus reads them."""
        counts = Counts(states)
        for state in get_args(State):
            self._jobs.labels(state).set(counts[state])
        self._watchers.set(watchers())
        return generate_latest(self._registry)
