"""Overload: what is taken is answered about as fast as ever, what is not is refused at once.

The limit runs against simulated deployments by a simulated clock, so that nothing here depends on
the machine; the edge around it is the real one, on loopback.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import pytest

from serve_app.config import LimitsConfig
from serve_app.errors import RateLimited
from serve_app.gateway.edge.admission import _MAX_KINDS, AdmissionLimit, InFlight
from serve_app.gateway.edge.edge import worked_on
from serve_app.schemas import ChatCall
from serve_app.telemetry import RequestLine
from tests.gateway_fakes import Loopback, eventually, running_gateway

Length = Callable[[random.Random], float]
MEAN_S = 0.2


def fixed(rng: random.Random) -> float:
    return MEAN_S


def uneven(rng: random.Random) -> float:
    """Seconds of answers of which some are ten times as long as others."""
    return rng.lognormvariate(-2.1, 1.0)


@dataclass
class Deployment:
    """Slots that work on one request each, and a queue before them, by a simulated clock."""

    slots: int
    length: Length
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    now_s: float = 0.0

    def __post_init__(self) -> None:
        self.limit = AdmissionLimit(self.limits, clock=lambda: self.now_s)
        self._rng = random.Random(7)
        self._ends: list[tuple[float, int, InFlight, float]] = []
        self._number = 0

    def run(self, load: float, seconds: float) -> tuple[list[float], float]:
        """Requests come at random at `load` times what the slots can do.

        Returns:
            Seconds that each answered request took, and the share that was refused.
        """
        rate = load * self.slots / MEAN_S
        until_s, came, refused = self.now_s + seconds, 0, 0
        answered: list[float] = []
        free = [self.now_s] * self.slots
        arrival_s = self.now_s
        while (arrival_s := arrival_s + self._rng.expovariate(rate)) < until_s:
            answered += self._finish(arrival_s)
            came += 1
            try:
                place = self.limit.enter()
            except RateLimited:
                refused += 1
                continue
            begin_s = max(arrival_s, free[0])
            end_s = begin_s + self.length(self._rng)
            heapq.heapreplace(free, end_s)
            self._number += 1
            heapq.heappush(self._ends, (end_s, self._number, place, arrival_s))
        answered += self._finish(float("inf"))
        return answered, refused / came

    def _finish(self, until_s: float) -> list[float]:
        """Let what ends before then end."""
        took = []
        while self._ends and self._ends[0][0] <= until_s:
            self.now_s, _, place, arrival_s = heapq.heappop(self._ends)
            self.limit.leave(place, "chat", answered=True)
            took.append(self.now_s - arrival_s)
        if until_s < float("inf"):
            self.now_s = until_s
        return took


def p99(seconds: list[float]) -> float:
    return sorted(seconds)[int(0.99 * len(seconds))]


SIZES = [
    (24, LimitsConfig()),
    (100, LimitsConfig()),
    (4, LimitsConfig(min_ongoing_requests=4)),
]


@pytest.mark.parametrize("length", [fixed, uneven])
@pytest.mark.parametrize(("slots", "limits"), SIZES)
def test_at_five_times_the_load_p99_stays_below_twice_the_unloaded_one(
    slots: int, limits: LimitsConfig, length: Length
) -> None:
    deployment = Deployment(slots, length, limits)
    unloaded, _ = deployment.run(0.1, 5000 * MEAN_S / slots)
    deployment.run(1.2, 60)  # it has seen a rush before
    loaded, refused = deployment.run(5.0, 60)
    assert p99(loaded) <= 2.0 * p99(unloaded)
    assert refused == pytest.approx(0.8, abs=0.05)
    assert len(loaded) >= 0.95 * slots / MEAN_S * 60  # every slot was busy all the time


def test_after_a_surge_nothing_is_refused_and_latency_is_back() -> None:
    deployment = Deployment(24, fixed)
    deployment.run(0.5, 20)
    deployment.run(5.0, 30)
    answered, refused = deployment.run(0.5, 10)
    assert refused == 0
    assert p99(answered) < 1.2 * MEAN_S


def test_a_deployment_that_grew_is_used() -> None:
    deployment = Deployment(24, fixed)
    deployment.run(0.1, 60)
    deployment.run(2.0, 60)
    deployment.slots = 96
    deployment.run(1.0, 20)
    answered, _ = deployment.run(1.0, 20)
    assert len(answered) >= 0.9 * 96 / MEAN_S * 20


def test_light_traffic_is_not_refused_because_its_answers_grow_longer() -> None:
    deployment = Deployment(100, fixed)
    deployment.run(0.2, 30)
    deployment.length = lambda rng: 10 * MEAN_S
    _, refused = deployment.run(0.04, 60)  # 40 in flight
    assert refused == 0


def test_what_an_idle_deployment_takes_is_measured_anew_when_it_is_of_other_days() -> None:
    deployment = Deployment(100, fixed)
    deployment.run(0.2, 30)
    deployment.length = lambda rng: 10 * MEAN_S
    deployment.run(0.08, 120)  # 80 in flight: more than ever were, and no one waits
    _, refused = deployment.run(0.08, 60)
    assert refused == 0


@pytest.mark.parametrize(("soon_enough_s", "is_calm"), [(0.25, True), (0.0, False)])
def test_pauses_of_a_fast_deployment_refuse_nobody(soon_enough_s: float, is_calm: bool) -> None:
    def pausing(rng: random.Random) -> float:
        return 0.15 if rng.random() < 0.002 else 0.003

    deployment = Deployment(1, fixed, LimitsConfig(soon_enough_s=soon_enough_s))
    deployment.length = lambda rng: 0.003
    deployment.run(20.0, 20)
    deployment.run(5 * MEAN_S / 0.003, 5)  # it has seen a rush before
    deployment.length = pausing
    _, refused = deployment.run(40.0, 60)  # 200 a second, at 60% with the pauses
    assert (refused == 0) == is_calm


def test_a_deployment_that_answers_nothing_holds_a_bounded_number() -> None:
    limits = LimitsConfig()
    limit = AdmissionLimit(limits)
    taken = 0
    for _ in range(10_000):
        try:
            limit.enter()
        except RateLimited:
            continue
        taken += 1
    assert taken == limits.initial_ongoing_requests


def test_requests_that_are_given_up_tell_of_the_wait() -> None:
    now_s = 0.0
    limit = AdmissionLimit(LimitsConfig(), clock=lambda: now_s)

    for _ in range(8):
        place = limit.enter()
        now_s += 1.0
        limit.leave(place, "chat", answered=True)
    before = limit.limit
    places = [limit.enter() for _ in range(before)]
    with pytest.raises(RateLimited):
        limit.enter()
    now_s += 60.0
    for place in places:
        limit.leave(place, "chat", answered=False)
    assert limit.limit < before


def test_kinds_are_forgotten_before_there_are_too_many() -> None:
    limit = AdmissionLimit(LimitsConfig())
    for number in range(2 * _MAX_KINDS):
        limit.leave(limit.enter(), f"model-{number}", answered=True)
    assert len(limit._calm) == _MAX_KINDS


# The edge.

CHAT = {"model": "atlas", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Loopback]:
    limits = {"initial_ongoing_requests": 4, "min_ongoing_requests": 4}
    with running_gateway(tmp_path, limits=limits) as loopback:
        yield loopback


async def test_a_full_gateway_refuses_chats_and_nothing_else(gateway: Loopback) -> None:
    hang = CHAT | {"messages": [{"role": "user", "content": "!hang"}]}
    async with httpx2.AsyncClient(base_url=gateway.url, timeout=20) as client:
        hanging = [
            asyncio.create_task(client.post("/v1/chat/completions", json=hang)) for _ in range(4)
        ]
        assert await asyncio.to_thread(eventually, lambda: len(gateway.orchestrator.calls) == 4)
        for path in ("/v1/chat/completions", "/v1/route"):
            refused = await client.post(path, json=CHAT)
            assert refused.status_code == 429
            # Not the share of the key, which is alone: a limit that is never met never changes.
            assert "more requests are coming" in refused.json()["error"]["message"]
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert refused.headers.get("connection") != "close"
        for path in ("/healthz", "/readyz", "/v1/models", "/v1/admin/models", "/v1/admin/jobs"):
            assert (await client.get(path)).status_code == 200
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)
        assert await asyncio.to_thread(eventually, lambda: len(gateway.orchestrator.cancelled) == 4)
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def flooded(folder: Path, **limits: Any) -> list[float]:
    """Seconds that answers took behind the edge, while 40 clients ask four slots all the time."""
    slots, held_s = asyncio.Semaphore(4), 0.05
    took: list[float] = []
    with running_gateway(folder, limits=limits) as gateway:
        complete = gateway.orchestrator.complete

        async def limited(call: ChatCall) -> Any:
            began_s = time.monotonic()
            async with slots:
                await asyncio.sleep(held_s)
            took.append(time.monotonic() - began_s)
            return await complete(call)

        gateway.orchestrator.complete = limited  # type: ignore[method-assign]
        bounds = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=gateway.url, timeout=20, limits=bounds) as client:

            async def ask() -> int:
                return (await client.post("/v1/chat/completions", json=CHAT)).status_code

            for _ in range(4):  # what an idle deployment takes
                assert await ask() == 200
            took.clear()

            async def insist() -> None:
                for _ in range(20):
                    if await ask() == 429:
                        await asyncio.sleep(held_s)

            await asyncio.gather(*(insist() for _ in range(40)))
    return took


@pytest.mark.serial
async def test_behind_the_real_edge_answers_are_fast_where_they_would_queue(tmp_path: Path) -> None:
    bounds = {"initial_ongoing_requests": 8, "min_ongoing_requests": 4, "soon_enough_s": 0.0}
    taken = await flooded(tmp_path / "adapting", **bounds)
    queued = await flooded(tmp_path / "fixed", adapt_to_load=False)
    assert len(queued) == 40 * 20
    assert 0 < len(taken) < len(queued)
    assert median(taken) < 0.5 * median(queued)


@pytest.mark.parametrize(
    ("model", "pair", "kind"),
    [
        ("atlas", "small@none", "atlas"),
        ("atlas", "pattern:slow", "pattern:slow"),
        ("small", "small@none", "small"),
        ("atlas", None, "atlas"),
    ],
)
def test_a_request_that_a_pattern_answers_is_compared_with_its_like(
    model: str, pair: str | None, kind: str
) -> None:
    """A plan takes many times as long as a pair, and is no sign of load."""
    assert worked_on(RequestLine("req_1", model=model, pair=pair)) == kind
