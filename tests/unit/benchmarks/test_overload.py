"""The overload benchmark's own parts: what it counts as answered, refused, silent and late."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.overload import Record, judge
from benchmarks.overload_load import Answer

ANSWERED = Answer(due_s=1.0, latency_ms=100.0, status=200, says_when=False)
REFUSED = Answer(due_s=1.0, latency_ms=5.0, status=429, says_when=True)
GOOD = Record(
    idle=[ANSWERED] * 50,
    rush=[ANSWERED] * 100 + [REFUSED] * 50,
    surge=[replace(ANSWERED, latency_ms=180.0)] * 100 + [REFUSED] * 400,
    after=[ANSWERED] * 50,
    rush_s=10.0,
    memory_before=100,
    memory_peak=110,
    memory_after=105,
)


def test_a_gateway_that_refuses_what_is_too_much_holds_every_target() -> None:
    figures, targets = judge(GOOD)
    assert all(target.holds for target in targets)
    assert figures["sustained_per_s"] == 10.0
    assert figures["surge_answered_share"] == 0.2


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"surge": [replace(ANSWERED, latency_ms=300.0)] * 100}, "p99 at 5 times"),
        ({"surge": [ANSWERED] * 80 + [REFUSED] * 420}, "answered at 5 times"),
        (
            {"surge": [ANSWERED] * 100 + [replace(REFUSED, latency_ms=400.0)] * 400},
            "p99 of the refusals",
        ),
        (
            {"surge": [ANSWERED] * 100 + [replace(REFUSED, says_when=False)] * 400},
            "refusals without Retry-After",
        ),
        ({"surge": [*GOOD.surge, replace(ANSWERED, status=504)]}, "neither answered"),
        ({"memory_peak": 200}, "memory"),
        ({"after": [replace(ANSWERED, due_s=11.0, latency_ms=900.0)]}, "latency back"),
        ({"after": [replace(REFUSED, due_s=11.0)]}, "latency back"),
    ],
)
def test_what_goes_wrong_misses_its_target(change: dict[str, object], missed: str) -> None:
    _, targets = judge(replace(GOOD, **change))  # type: ignore[arg-type]
    assert [t.name for t in targets if not t.holds and missed in t.name]
