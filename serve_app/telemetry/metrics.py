"""Names of metrics, declared once, and the sinks that take them.

Slash-grouped names are ours; a sink maps them to what its backend allows (`gateway/requests`
becomes `atlas_gateway_requests` in Prometheus).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol


class Metric(NamedTuple):
    """One metric: what is counted or measured, and by which tags it is split."""

    name: str
    kind: Literal["counter", "histogram", "gauge"]
    description: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()
    """Histogram bucket bounds, in the metric's own unit."""


_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
)

GATEWAY_REQUESTS = Metric(
    "gateway/requests", "counter", "HTTP requests answered.", ("route", "status")
)
GATEWAY_SECONDS = Metric(
    "gateway/seconds", "histogram", "Seconds from arrival to the last byte.", ("route",), _SECONDS
)
GATEWAY_ONGOING = Metric("gateway/ongoing", "gauge", "HTTP requests being worked on.")
GATEWAY_TOKENS = Metric(
    "gateway/tokens", "counter", "Tokens of answered requests.", ("pair", "kind")
)
GATEWAY_COST_USD = Metric(
    "gateway/cost_usd", "counter", "Dollars spent on answered requests.", ("pair",)
)
STORE_WRITTEN = Metric(
    "store/outcomes_written", "counter", "Finished requests written to the store."
)
STORE_DROPPED = Metric(
    "store/outcomes_dropped",
    "counter",
    "Finished requests lost: queue and journal were full, or a row bad.",
)
STORE_WAITING = Metric(
    "store/outcomes_waiting", "gauge", "Finished requests not yet written to the store."
)
STORE_SPILLED = Metric(
    "store/outcomes_spilled",
    "counter",
    "Finished requests left to the journal alone: the queue was full, or the process ended.",
)
STORE_RECOVERED = Metric(
    "store/outcomes_recovered", "counter", "Finished requests written for a process that ended."
)
TOOLS_MCP_CHANGED = Metric(
    "tools/mcp_changed",
    "counter",
    "Functions of MCP servers that are not offered because their definition changed or is new.",
    ("tool",),
)

ALL_METRICS = (
    GATEWAY_REQUESTS,
    GATEWAY_SECONDS,
    GATEWAY_ONGOING,
    GATEWAY_TOKENS,
    GATEWAY_COST_USD,
    STORE_WRITTEN,
    STORE_DROPPED,
    STORE_WAITING,
    STORE_SPILLED,
    STORE_RECOVERED,
    TOOLS_MCP_CHANGED,
)


class MetricSink(Protocol):
    """Where metrics go."""

    def record(self, metric: Metric, value: float = 1.0, /, **tags: str) -> None:
        """Add to a counter, set a gauge, or put an observation into a histogram."""
        ...


class NoMetrics:
    """Drops everything: for tests, and for processes outside Ray."""

    def record(self, metric: Metric, value: float = 1.0, /, **tags: str) -> None:
        """Do nothing."""


class RayMetrics:
    """Exports through Ray's own metrics agent; each metric is made at its first record."""

    def __init__(self) -> None:
        """Start with no metric made."""
        self._made: dict[str, Any] = {}

    def record(self, metric: Metric, value: float = 1.0, /, **tags: str) -> None:
        """Pass the value on to Ray."""
        made = self._made.get(metric.name)
        if made is None:
            made = self._made[metric.name] = self._make(metric)
        if metric.kind == "counter":
            if value > 0:
                made.inc(value, tags)
        elif metric.kind == "gauge":
            made.set(value, tags)
        else:
            made.observe(value, tags)

    @staticmethod
    def _make(metric: Metric) -> Any:
        from ray.util import metrics

        name = "atlas_" + metric.name.replace("/", "_")
        if metric.kind == "counter":
            return metrics.Counter(name, metric.description, metric.tags)
        if metric.kind == "gauge":
            return metrics.Gauge(name, metric.description, metric.tags)
        return metrics.Histogram(name, metric.description, list(metric.boundaries), metric.tags)
