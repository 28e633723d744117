"""From latencies to the figures that are printed, stored and held against targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from benchmarks.client import Measurement


@dataclass(frozen=True, slots=True)
class Summary:
    """One scenario under one load. Latencies in milliseconds; `None` where nothing came."""

    requests: int
    errors: int
    requests_per_s: float
    mean_ms: float | None
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    first_p50_ms: float | None
    """Streams: sent to first content."""
    client_cpu_ms: float | None
    """CPU time of the load generator per request: what it cannot see below."""
    error_sample: str | None


@dataclass(frozen=True, slots=True)
class Target:
    """One figure and what it is held against."""

    name: str
    value: float
    relation: Literal["<=", ">="]
    target: float

    @property
    def holds(self) -> bool:
        """Whether the figure reaches the target."""
        return self.value <= self.target if self.relation == "<=" else self.value >= self.target

    def as_json(self) -> dict[str, Any]:
        """As the results hold it."""
        wanted = f"{self.relation} {self.target:g}"
        return {"name": self.name, "value": self.value, "target": wanted, "holds": self.holds}


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which `share` (in [0, 100]) of the values lie; `None` of nothing."""
    return float(np.percentile(values, share)) if values else None


def merge(measurements: Sequence[Measurement]) -> Measurement:
    """Several rounds of one load as one measurement."""
    merged = Measurement()
    for part in measurements:
        merged.latencies_ms += part.latencies_ms
        merged.first_ms += part.first_ms
        merged.errors += part.errors
        merged.error_sample = merged.error_sample or part.error_sample
        merged.seconds += part.seconds
        merged.client_cpu_s += part.client_cpu_s
    return merged


def summarise(measurement: Measurement) -> Summary:
    """The figures of a measurement."""
    latencies = measurement.latencies_ms
    count = len(latencies)
    return Summary(
        requests=count,
        errors=measurement.errors,
        requests_per_s=count / measurement.seconds if measurement.seconds else 0.0,
        mean_ms=float(np.mean(latencies)) if latencies else None,
        p50_ms=percentile(latencies, 50),
        p95_ms=percentile(latencies, 95),
        p99_ms=percentile(latencies, 99),
        first_p50_ms=percentile(measurement.first_ms, 50),
        client_cpu_ms=measurement.client_cpu_s / count * 1e3 if count else None,
        error_sample=measurement.error_sample,
    )
