"""Which verdicts count in a fit, key by key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from rl.fit.traffic import fair_verdicts
from serve_app.schemas import LOCAL_OWNER, Pair
from serve_app.store import Verdict
from tests.router_data import DIM, PAIRS, make_queries, topics

CHEAP, MATH, STRONG = PAIRS
QUESTIONS = make_queries(np.arange(12) % 3, seed=0)


def verdicts(
    given: Sequence[tuple[str, float]], pair: Pair = MATH, topic: int = 1, start: int = 0
) -> list[Verdict]:
    embedding = topics()[topic].astype("<f4").tobytes()
    return [
        Verdict(f"req_{number:05}", owner, pair, "", embedding, score, float(number), 1.0)
        for number, (owner, score) in enumerate(given, start)
    ]


def owners(of: Sequence[Verdict]) -> Counter[str]:
    return Counter(verdict.owner for verdict in of)


def test_where_no_key_is_asked_for_every_verdict_counts() -> None:
    given = verdicts([(LOCAL_OWNER, 1.0)] * 7)
    assert fair_verdicts(given, QUESTIONS) == given


def test_verdicts_of_one_or_two_keys_do_not_count() -> None:
    given = verdicts([("a", 0.0)] * 100 + [("b", 0.0)] * 100)
    assert fair_verdicts(given[:100], QUESTIONS) == []
    assert fair_verdicts(given, QUESTIONS) == []


def test_the_highest_and_the_lowest_key_are_left_out() -> None:
    scores = {"a": 0.4, "b": 0.6, "c": 0.5, "high": 1.0, "low": 0.0}
    given = verdicts(list(scores.items()) * 4)
    assert owners(fair_verdicts(given, QUESTIONS)) == {"a": 4, "b": 4, "c": 4}


def test_a_key_counts_no_more_than_half_as_often_as_the_others_and_with_its_last_verdicts() -> None:
    few = [(owner, score) for owner, score in (("a", 0.4), ("b", 0.6), ("c", 0.5))] * 3
    given = verdicts([*few, *[("much", 0.1)] * 500, *[("much", 0.45)] * 40])
    kept = fair_verdicts(given, QUESTIONS)
    assert owners(kept) == {"much": 4, "c": 3}
    assert {verdict.score for verdict in kept if verdict.owner == "much"} == {0.45}


def test_keys_are_weighed_pair_by_pair_and_region_by_region() -> None:
    many = [(owner, 0.5) for owner in "abc"] * 2
    elsewhere = verdicts([("alone", 0.0)] * 50, topic=0, start=100)
    of_another = verdicts([("alone", 0.0)] * 50, pair=STRONG, start=200)
    kept = fair_verdicts([*verdicts(many), *elsewhere, *of_another], QUESTIONS)
    assert owners(kept) == {"b": 2}


def test_a_profile_of_one_question_has_one_region() -> None:
    given = verdicts([(owner, 0.5) for owner in "abc"])
    assert owners(fair_verdicts(given, np.eye(1, DIM, dtype=np.float32))) == {"b": 1}
