"""Where metrics go: Ray's metrics agents, or nowhere."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Protocol

from serve_app.telemetry.metrics import Metric

logger = logging.getLogger(__name__)

_EVERY_S = 1.0
MAX_SERIES = 2_000
"""Combinations of tags of one metric in one process; what comes later is counted together."""
OTHER = "other"
"""The value of every tag of what is counted together."""


class MetricSink(Protocol):
    """Where metrics go."""

    def record(self, metric: Metric, value: float = 1.0, /, **tags: str) -> None:
        """Add to a counter, set a gauge, or put an observation into a histogram."""
        ...


class ToldMetrics(MetricSink, Protocol):
    """Metrics that can be read where they go."""

    async def page(self) -> str:
        """Every metric so far, of all processes, in Prometheus' text format."""
        ...


class NoMetrics:
    """Drops everything: for tests, and for processes outside Ray."""

    def record(self, metric: Metric, value: float = 1.0, /, **tags: str) -> None:
        """Do nothing."""

    async def page(self) -> str:
        """Nothing."""
        return ""


class SeriesBound:
    """Holds the number of series of each metric down, whatever names the pool comes to have."""

    def __init__(self) -> None:
        """Begin with no series."""
        self._known: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)

    def bounded(self, metric: Metric, tags: Mapping[str, str]) -> tuple[str, ...]:
        """Values of a metric's tags in their order: the given ones while there is room."""
        known, values = self._known[metric.name], tuple([tags[name] for name in metric.tags])
        if values not in known:
            if len(known) >= MAX_SERIES:
                return (OTHER,) * len(values)
            known.add(values)
        return values


_Series = tuple[Metric, tuple[str, ...]]


class RayMetrics:
    """Exports through Ray's own metrics agent, a second later.

    A record in Ray takes ten times as long as one here, and a request makes a dozen: they are
    summed up, and a thread hands the sums on.
    """

    def __init__(self) -> None:
        """Start with no metric made."""
        self._made: dict[str, Any] = {}
        self._series = SeriesBound()
        self._lock = threading.Lock()
        self._added: defaultdict[_Series, float] = defaultdict(float)
        self._set: dict[_Series, float] = {}
        self._observed: list[tuple[_Series, float]] = []
        self._thread: threading.Thread | None = None

    def record(self, metric: Metric, value: float = 1.0, /, **tags: str) -> None:
        """Note the value for Ray."""
        series = (metric, self._series.bounded(metric, tags))
        with self._lock:
            if metric.kind == "counter":
                self._added[series] += value
            elif metric.kind == "gauge":
                self._set[series] = value
            else:
                self._observed.append((series, value))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._hand_on_forever, name="metrics", daemon=True
                )
                self._thread.start()

    def hand_on(self) -> None:
        """Tell Ray what was noted since the last time."""
        with self._lock:
            added, self._added = self._added, defaultdict(float)
            told, self._set = self._set, {}
            observed, self._observed = self._observed, []
        for (metric, values), value in added.items():
            if value > 0:
                self._of(metric).inc(value, dict(zip(metric.tags, values, strict=True)))
        for (metric, values), value in told.items():
            self._of(metric).set(value, dict(zip(metric.tags, values, strict=True)))
        for (metric, values), value in observed:
            self._of(metric).observe(value, dict(zip(metric.tags, values, strict=True)))

    async def page(self) -> str:
        """What the agents of all nodes tell; they hear of a change within about ten seconds."""
        import ray

        from serve_app.telemetry.ray_page import read_agents

        nodes = await asyncio.to_thread(ray.nodes)
        return await read_agents(
            [
                f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
                for node in nodes
                if node["Alive"] and node.get("MetricsExportPort")
            ]
        )

    def _hand_on_forever(self) -> None:
        while True:
            time.sleep(_EVERY_S)
            try:
                self.hand_on()
            except Exception:
                logger.exception("metrics are not told")

    def _of(self, metric: Metric) -> Any:
        if metric.name not in self._made:
            self._made[metric.name] = self._make(metric)
        return self._made[metric.name]

    @staticmethod
    def _make(metric: Metric) -> Any:
        from ray.util import metrics

        name = metric.exported
        if metric.kind == "counter":
            return metrics.Counter(name, metric.description, metric.tags)
        if metric.kind == "gauge":
            return metrics.Gauge(name, metric.description, metric.tags)
        return metrics.Histogram(name, metric.description, list(metric.boundaries), metric.tags)
