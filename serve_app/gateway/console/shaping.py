"""From what the store says to what a page shows: charts, a request's waterfall, intervals."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from serve_app.gateway.console.queries import Window
from serve_app.schemas import SpanRecord
from serve_app.store import Mode, Policy
from serve_app.store.traffic import Calibration, Latency, Traffic, WinRate

Json = dict[str, Any]

_Z = 1.959964
"""Of a 95% interval."""
_MIN_BAR = 0.4
"""Of the waterfall's width in percent: what takes no time is seen too."""


def traffic_charts(
    window: Window,
    now_s: float,
    traffic: Sequence[Traffic],
    latencies: Sequence[Latency],
    changes: Sequence[tuple[int, float]],
) -> list[Json]:
    """The charts of the overview, with a line where the policy changed."""
    times = list(range(window.began_s(now_s), int(now_s) + 1, window.width_s))
    by_time = {row.began_unix_s: row for row in traffic}
    rows = [by_time.get(at, Traffic(at, 0, 0, 0.0, 0)) for at in times]
    took = {row.began_unix_s: row for row in latencies}
    per_hour = 3600 / window.width_s
    lines = [{"at": at, "label": f"policy {version}"} for version, at in changes]

    def chart(title: str, unit: str, **series: list[float | None]) -> Json:
        named = [{"label": name.replace("_", " "), "values": v} for name, v in series.items()]
        return {"title": title, "unit": unit, "times": times, "series": named, "lines": lines}

    return [
        chart(
            "Requests per hour",
            "",
            requests=[row.requests * per_hour for row in rows],
            errors=[row.errors * per_hour for row in rows],
        ),
        chart(
            "Seconds per request",
            "s",
            p50=[took[at].median_s if at in took else None for at in times],
            p95=[took[at].p95_s if at in took else None for at in times],
        ),
        chart("Dollars per hour", "$", dollars=[row.cost_usd * per_hour for row in rows]),
        chart(
            "Out of distribution",
            "%",
            share=[
                100 * row.out_of_distribution / row.requests if row.requests else None
                for row in rows
            ],
        ),
    ]


@dataclass(frozen=True, slots=True)
class Bar:
    """One span of a request, as it is drawn."""

    span: SpanRecord
    depth: int
    left: float
    """In percent of the request's time, as the width."""
    width: float


def waterfall(spans: Sequence[SpanRecord], seconds: float) -> list[Bar]:
    """The spans of a request below one another, each after the one it is part of."""
    depths: dict[int, int] = {}
    children: dict[int | None, list[SpanRecord]] = {}
    for span in spans:
        children.setdefault(span.parent_id, []).append(span)
        depths[span.span_id] = 0 if span.parent_id is None else depths[span.parent_id] + 1
    whole = max([seconds, *(span.began_s + (span.seconds or 0.0) for span in spans)]) or 1.0
    bars: list[Bar] = []
    waiting = children.get(None, [])[::-1]
    while waiting:
        span = waiting.pop()
        waiting += children.get(span.span_id, [])[::-1]
        left = min(100 * span.began_s / whole, 100 - _MIN_BAR)
        took = whole - span.began_s if span.seconds is None else span.seconds
        width = min(max(100 * took / whole, _MIN_BAR), 100 - left)
        bars.append(Bar(span, depths[span.span_id], left, width))
    return bars


@dataclass(frozen=True, slots=True)
class IntervalBar:
    """A mean, and the 95% interval of what it estimates."""

    middle: float
    low: float
    high: float


def wilson(wins: int, count: int) -> IntervalBar:
    """Wilson's interval of a share (Wilson, 1927); it holds for few verdicts too."""
    share, z2 = wins / count, _Z * _Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return IntervalBar(share, max(0.0, middle - half), min(1.0, middle + half))


def share_of(wins: int, count: int) -> IntervalBar | None:
    """A share with its interval; `None` of nothing."""
    return wilson(wins, count) if count else None


def with_intervals(rates: Sequence[WinRate]) -> list[tuple[WinRate, IntervalBar]]:
    """Each win rate with its interval."""
    return [(rate, wilson(rate.wins, rate.verdicts)) for rate in rates]


def calibration_chart(tenths: Sequence[Calibration]) -> Json | None:
    """What came of decisions by the confidence that was stated; `None` of fewer than two points."""
    if len(tenths) < 2:
        return None
    stated = [100 * one.confidence for one in tenths]
    return {
        "title": "Mean score by stated confidence",
        "unit": "%",
        "x": {"label": "stated", "unit": "%", "is_log": False},
        "times": stated,
        "series": [
            {"label": "came of it", "values": [100 * one.score for one in tenths]},
            {"label": "as stated", "values": stated},
        ],
        "lines": [],
    }


@dataclass(frozen=True, slots=True)
class Service:
    """One publication, and for how long it served."""

    policy: Policy
    ended_unix_s: float | None
    """`None`: it serves, or is on trial."""
    is_evaluated: bool
    """Whether there is an evaluation that it was promoted on."""


def served(policies: Sequence[Policy], evaluated: Collection[int]) -> list[Service]:
    """What served when, of publications the newest first."""
    found, ends = [], None
    for policy in policies:
        found.append(Service(policy, ends, policy.policy_version in evaluated))
        if policy.mode is Mode.SERVING:  # it ended what was before it, trials too
            ends = policy.created_unix_s
    return found
