"""The shared hops to the embedder and the router; the deployments' handles are scripted."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from ray.exceptions import ActorUnavailableError

from serve_app.budget import Deadline
from serve_app.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NoCandidate,
    ReplicaDied,
)
from serve_app.orchestrator.decision_client import Decider, Kept, UnderWay, facts_of
from serve_app.router.rules.base import Routed, RoutingRequest
from serve_app.schemas import Candidate, DecidedBy, Decision, Fixed, Limits, Pair, Seen
from tests.path2_fakes import Method


class Deployments:
    """An embedder that numbers texts by their length, and a router that repeats the number."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.asked: list[Sequence[RoutingRequest]] = []
        """Of each decided batch."""
        self.open = asyncio.Event()
        self.open.set()
        self.deaths = 0
        """Of replicas, over the next calls."""
        self.embed = self.embed_lasting = Method(self._embed)
        self.decide = Method(self._decide)

    async def _embed(self, texts: list[str]) -> NDArray[np.float32]:
        self.batches.append(texts)
        await self.open.wait()
        self._die()
        if "bad" in texts:
            raise InvalidRequest("not text")
        return np.array([[len(text)] for text in texts], dtype=np.float32)

    def _die(self) -> None:
        if self.deaths:
            self.deaths -= 1
            raise ActorUnavailableError("gone", bytes(16))

    async def _decide(self, requests: Sequence[RoutingRequest]) -> list[Routed]:
        self._die()
        plain = [of.text for of in requests if of.text is not None and not self._sees(of)]
        if plain and any(self._sees(of) for of in requests):
            return [self._routed(of) if self._sees(of) else Routed(None) for of in requests]
        vectors = iter(await self._embed(plain) if plain else ())
        asked = [
            of if of.text is None or self._sees(of) else of.with_vector(next(vectors))
            for of in requests
        ]
        self.asked.append(asked)
        return [
            self._routed(of, None if before.text is None else self._vector(of))
            for before, of in zip(requests, asked, strict=True)
        ]

    @staticmethod
    def _sees(request: RoutingRequest) -> bool:
        """Whether a first look is enough."""
        return "seen" in (request.text or "") and not request.was_unsure

    @staticmethod
    def _vector(request: RoutingRequest) -> NDArray[np.float32] | None:
        if request.text is not None:
            return None
        return request.last_answer if request.history else request.embedding

    @staticmethod
    def _routed(request: RoutingRequest, vector: NDArray[np.float32] | None = None) -> Routed:
        if request.limits.models == frozenset():
            return Routed(NoCandidate("none within the limits"), vector)
        known = float(request.embedding[0]) if request.is_known else 0.0
        return Routed(decision(known), vector)


def decision(quality: float) -> Decision:
    candidate = Candidate(Pair("m", "none"), quality, quality, 0.0)
    return Decision((candidate,), DecidedBy.COLD_START, 1.0, 1.0, 0, 1)


LIMITS = Limits(alpha=0.0, deadline_s=5.0)


async def ask(decider: Decider, query: str, limits: Limits = LIMITS) -> float:
    embedding, decided = await decider.decide(query, limits, Deadline.after(5))
    assert embedding is not None
    assert float(embedding[0]) == decided.candidates[0].quality
    return decided.candidates[0].quality


async def test_a_lone_query_goes_at_once() -> None:
    deployments = Deployments()
    assert await ask(Decider(deployments, deployments), "four") == 4
    assert deployments.batches == [["four"]]


@pytest.mark.parametrize("deaths", [1, 2])
async def test_a_query_whose_replica_dies_is_sent_to_another(deaths: int) -> None:
    deployments = Deployments()
    deployments.deaths = deaths
    assert await ask(Decider(deployments, deployments), "four") == 4
    assert deployments.deaths == 0


async def test_a_query_that_kills_replicas_stops_after_the_third() -> None:
    deployments = Deployments()
    deployments.deaths = 1000
    with pytest.raises(ReplicaDied):
        await ask(Decider(deployments, deployments), "four")
    assert 1000 - deployments.deaths == 3


async def test_a_query_that_kills_replicas_does_not_fail_those_of_its_batch() -> None:
    class Deadly(Deployments):
        async def _embed(self, texts: list[str]) -> NDArray[np.float32]:
            if "deadly" in texts:
                self.deaths = 1
            return await super()._embed(texts)

    deployments = Deadly()
    decider = Decider(deployments, deployments)
    deployments.open.clear()
    first = [asyncio.create_task(ask(decider, "x" * n)) for n in (1, 2)]  # two batches under way
    await asyncio.sleep(0)
    batch = [asyncio.create_task(ask(decider, query)) for query in ("four", "deadly", "fives")]
    await asyncio.sleep(0)
    deployments.open.set()
    results = await asyncio.gather(*first, *batch, return_exceptions=True)
    assert results[:3] == [1, 2, 4]
    assert isinstance(results[3], ReplicaDied)
    assert results[4] == 5
    assert sum("deadly" in texts for texts in deployments.batches) == 3


async def test_replicas_that_go_on_dying_end_with_the_deadline() -> None:
    deployments = Deployments()
    deployments.deaths = 1000
    with pytest.raises((DeadlineExceeded, ReplicaDied)):
        await Decider(deployments, deployments).decide("four", LIMITS, Deadline.after(0.05))


async def test_queries_that_arrive_while_two_batches_run_share_the_next() -> None:
    deployments = Deployments()
    deployments.open.clear()
    decider = Decider(deployments, deployments)
    tasks = [asyncio.create_task(ask(decider, "x" * n)) for n in range(1, 11)]
    await asyncio.sleep(0.01)
    assert [len(batch) for batch in deployments.batches] == [1, 1]
    deployments.open.set()
    assert await asyncio.gather(*tasks) == list(range(1, 11))
    assert [len(batch) for batch in deployments.batches] == [1, 1, 8]


async def test_a_full_batch_waits_for_none() -> None:
    deployments = Deployments()
    deployments.open.clear()
    decider = Decider(deployments, deployments)
    tasks = [asyncio.create_task(ask(decider, "x")) for _ in range(2 + 32)]
    await asyncio.sleep(0.01)
    assert [len(batch) for batch in deployments.batches] == [1, 1, 32]
    deployments.open.set()
    await asyncio.gather(*tasks)


async def test_one_query_that_cannot_be_embedded_fails_alone() -> None:
    deployments = Deployments()
    deployments.open.clear()
    decider = Decider(deployments, deployments)
    queries = ("a", "b", "bad", "fine")
    tasks = [asyncio.create_task(ask(decider, query)) for query in queries]
    await asyncio.sleep(0.01)
    deployments.open.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[2], InvalidRequest)
    assert [results[0], results[1], results[3]] == [1, 1, 4]


async def test_limits_that_admit_no_pair_fail_their_own_request_only() -> None:
    deployments = Deployments()
    deployments.open.clear()
    decider = Decider(deployments, deployments)
    nothing = Limits(alpha=0.0, deadline_s=5.0, models=frozenset())
    tasks = [
        asyncio.create_task(ask(decider, "abc", limits))
        for limits in (LIMITS, LIMITS, nothing, LIMITS)
    ]
    await asyncio.sleep(0.01)
    deployments.open.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[2], NoCandidate)
    assert [results[0], results[1], results[3]] == [3, 3, 3]


async def test_a_query_whose_time_is_up_does_not_wait_for_its_batch() -> None:
    deployments = Deployments()
    deployments.open.clear()
    decider = Decider(deployments, deployments)
    patient = asyncio.create_task(ask(decider, "ab"))
    with pytest.raises(DeadlineExceeded):
        await decider.decide("abc", LIMITS, Deadline.after(0.05))
    deployments.open.set()
    assert await patient == 2


async def test_a_query_whose_caller_left_is_not_embedded() -> None:
    deployments = Deployments()
    deployments.open.clear()
    decider = Decider(deployments, deployments)
    tasks = [asyncio.create_task(ask(decider, query)) for query in ("a", "b", "gone", "stays")]
    await asyncio.sleep(0.01)
    tasks[2].cancel()
    deployments.open.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert deployments.batches == [["a"], ["b"], ["stays"]]


async def test_a_request_under_way_shares_the_batch_and_keeps_its_embedding() -> None:
    deployments = Deployments()
    deployments.open.clear()
    decider = Decider(deployments, deployments)
    seen = (Seen(Pair("m", "none"), "a", None, 0, 0.0),)
    known = np.array([7.0], np.float32)
    under_way = UnderWay(known, 5, seen, answer="four")
    in_flight = [asyncio.create_task(ask(decider, "x")) for _ in range(2)]
    await asyncio.sleep(0.01)
    new = asyncio.create_task(ask(decider, "abc"))
    next_one = asyncio.create_task(decider.decide_next(under_way, LIMITS, Deadline.after(5)))
    thinking = UnderWay(known, 6, seen, answer_embedding=known)
    after_thought = asyncio.create_task(decider.decide_next(thinking, LIMITS, Deadline.after(5)))
    await asyncio.sleep(0.01)
    deployments.open.set()
    assert await new == 3
    embedded, decided = await next_one
    assert embedded is not None
    assert (float(embedded[0]), decided.candidates[0].quality) == (4, 7)
    assert (await after_thought)[0] is known
    await asyncio.gather(*in_flight)
    assert deployments.batches[-1] == ["abc", "four"]
    asked = deployments.asked[-1]
    assert [of.history for of in asked] == [(), seen, seen]
    answers = [of.last_answer for of in asked]
    assert [None if answer is None else float(answer[0]) for answer in answers] == [None, 4, 7]
    assert [of.request_id for of in asked] == [None, None, None]
    assert [of.policy_version for of in asked] == [None, 5, 6]


async def test_what_a_first_look_decides_waits_for_no_embedding() -> None:
    deployments = Deployments()
    decider = Decider(deployments, deployments)
    assert (await decider.decide("seen", LIMITS, Deadline.after(5)))[0] is None
    deployments.open.clear()
    in_flight = [asyncio.create_task(ask(decider, "x" * n)) for n in (1, 2)]
    await asyncio.sleep(0.01)
    quick = asyncio.create_task(decider.decide("seen too", LIMITS, Deadline.after(5)))
    slow = asyncio.create_task(ask(decider, "four"))
    await asyncio.sleep(0.01)
    in_flight[0].cancel()
    deployments.open.set()
    assert (await quick)[0] is None
    assert await slow == 4
    await asyncio.gather(*in_flight, return_exceptions=True)
    assert deployments.batches == [["x"], ["xx"], ["four"]]


async def test_a_query_that_was_embedded_is_not_embedded_again() -> None:
    deployments = Deployments()
    decider = Decider(deployments, deployments)
    assert [await ask(decider, query) for query in ("four", "four", "fives", "four")] == [
        4,
        4,
        5,
        4,
    ]
    assert deployments.batches == [["four"], ["fives"]]
    vector = await decider.embed_query("fives", Deadline.after(5))
    assert float(vector[0]) == 5
    assert deployments.batches == [["four"], ["fives"]]


async def test_a_query_whose_result_is_wanted_again_is_embedded_apart_from_what_is_kept() -> None:
    deployments = Deployments()
    decider = Decider(deployments, deployments)
    await ask(decider, "four")
    await decider.decide("four", LIMITS, Deadline.after(5), fixed=Fixed(5.0))
    assert deployments.batches == [["four"], ["four"]]


def test_embeddings_that_are_kept_are_bounded_and_the_last_used_stay() -> None:
    kept = Kept()
    vector = np.zeros(1, np.float32)
    for number in range(2_048):
        kept.keep(f"query {number}", vector)
    assert kept.get("query 0") is not None
    kept.keep("one more", vector)
    assert kept.get("query 0") is not None
    assert kept.get("query 1") is None


async def test_nothing_is_embedded_where_there_is_no_new_text() -> None:
    deployments = Deployments()
    known = np.array([7.0], np.float32)
    under_way = UnderWay(known, 5, ())
    embedded, decided = await Decider(deployments, deployments).decide_next(
        under_way, LIMITS, Deadline.after(5)
    )
    assert (embedded, decided.candidates[0].quality) == (None, 7)
    assert deployments.batches == []


def test_a_decisions_span_tells_the_best_candidates_with_their_intervals() -> None:
    candidates = tuple(
        Candidate(Pair(name, "none"), 0.5, 0.8, 0.1, 0.7, 0.9) for name in ("a", "b", "c", "d")
    )
    facts = facts_of(Decision(candidates, DecidedBy.CLUSTERS, 0.6, 0.9, 2, 3))
    told = "a@none 0.80 [0.70 to 0.90], b@none 0.80 [0.70 to 0.90], c@none 0.80 [0.70 to 0.90]"
    assert facts["candidates"] == told
    assert facts["propensity"] == 0.9
