"""What the benchmark of scale computes from what it measured, and its small sizes."""

from __future__ import annotations

import pytest

from benchmarks.scale.__main__ import sized, traffic_of
from benchmarks.scale.deciding import by_functions, by_rules, measured
from benchmarks.scale.growth import Growth
from benchmarks.scale.requests import KINDS, Cost
from benchmarks.scale.simulation import Autoscaling, Change, Traffic, replicas_for, simulate
from benchmarks.scale.stores import by_requests

QUEUE = Traffic(50.0, {"Gateway": 0.01}, {"Gateway": 1.0})


@pytest.mark.parametrize(
    ("points", "word"),
    [
        ({10: 1.0, 100: 1.1, 1000: 1.2}, "flat"),
        ({10: 1.0, 100: 9.0, 1000: 90.0}, "linear"),
        ({10: 1.0, 100: 3.0, 1000: 9.0}, "less than linear"),
    ],
)
def test_growth_has_its_word(points: dict[int, float], word: str) -> None:
    assert Growth("x", "ms", points).word == word


def test_one_replica_at_half_its_capacity_waits_as_the_theory_says() -> None:
    latencies, _ = simulate(QUEUE, {"Gateway": 1}, 400.0)
    # M/M/1: the time in the system is exponential with mean 1 / (100 - 50) seconds.
    assert latencies.quantile_ms(0.5) == pytest.approx(13.9, rel=0.1)
    assert len(latencies.took_s) == pytest.approx(20_000, rel=0.05)


def test_too_few_replicas_are_more_once_autoscaling_has_looked() -> None:
    busy = Traffic(300.0, {"Gateway": 0.01}, {"Gateway": 1.0})
    without, number = simulate(busy, {"Gateway": 1}, 60.0)
    assert number == {"Gateway": 1}
    scaled, number = simulate(busy, {"Gateway": 1}, 60.0, Autoscaling(start_s=5.0))
    assert number["Gateway"] > 3
    assert scaled.quantile_ms(0.99, 50.0) < without.quantile_ms(0.99, 50.0) / 10


def test_a_lost_node_comes_back_and_a_stage_that_nobody_passes_is_idle() -> None:
    traffic = Traffic(200.0, {"Gateway": 0.01, "Router": 1.0}, {"Gateway": 1.0, "Router": 0.0})
    change = Change(10.0, lost_share=0.5)
    latencies, number = simulate(
        traffic, {"Gateway": 4, "Router": 1}, 60.0, Autoscaling(upscale_delay_s=1e9), (change,)
    )
    assert number == {"Gateway": 4, "Router": 1}
    assert latencies.quantile_ms(0.99, 45.0) < latencies.quantile_ms(0.99, 12.0, 20.0)


def test_what_traffic_needs_follows_from_what_requests_cost() -> None:
    cpu_ms = {"Gateway": 2.0, "Router": 1.0, "Embedder": 4.0, "others": 1.0}
    costs = {kind.name: Cost(cpu_ms, 100.0, {}) for kind in KINDS}
    traffic = traffic_of(costs, 1_000.0)
    assert traffic.service_s["Gateway"] == pytest.approx(0.002)
    assert traffic.shares == pytest.approx({"Gateway": 1.0, "Router": 0.8, "Embedder": 0.2})
    assert replicas_for(traffic) == {"Gateway": 4, "Router": 2, "Embedder": 2}
    rows = sized(costs)
    assert [row["requests_per_s"] for row in rows] == [100.0, 1_000.0, 10_000.0]
    assert all(row["p99_ms"] > row["p50_ms"] > 0 for row in rows)
    assert rows[0]["node_lost_after_p99_ms"] > 0


def test_the_small_sizes_of_what_decides_are_measured() -> None:
    found = by_rules(lambda what: None, (10, 20)) + by_functions(lambda what: None, (1, 10))
    assert all(cost > 0 for growth in found for cost in growth.points.values())
    assert measured(1_000, 10)["decision_ms"] > 0


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_store_is_filled_and_read_by_its_keys(kind: str) -> None:
    growths, scans = by_requests(lambda what: None, (100, 2_000), (kind,))
    assert {growth.name for growth in growths} == {
        f"{kind}: a trace",
        f"{kind}: a verdict",
        f"{kind}: verdicts of two minutes",
        f"{kind}: writes of the outcome log",
    }
    assert all(list(growth.points) == [100, 2_000] for growth in growths)
    assert set(scans) == {kind}
