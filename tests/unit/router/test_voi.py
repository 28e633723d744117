"""The rule `voi`, with a verifier written by hand, so that a test knows what it says."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from serve_app.errors import SnapshotError
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.voi import VoiRule
from serve_app.router.snapshots.snapshot import VOTERS, RouterSnapshot
from serve_app.schemas import Action, DecidedBy, Limits, Pair, Seen
from serve_app.signals import NUMBERS
from tests.router_data import PAIRS, decide, make_snapshot, topics
from tests.verifier_data import make_verifier

CHEAP, MATH, STRONG = PAIRS
MATHS = topics()[1]
STEPS = Limits(alpha=0.0, deadline_s=60.0, max_steps=4)
SURE, UNSURE = -0.1, -2.0


def make_rule(**changes: Any) -> VoiRule:
    return VoiRule(replace(make_snapshot(), verifier=make_verifier(), **changes))


def saw(pair: Pair, logprob: float, key: str | None = "a") -> Seen:
    numbers = [math.nan] * len(NUMBERS)
    numbers[NUMBERS.index("answer_mean")] = logprob
    return Seen(pair, key, logprob, 0, 1e-4, tuple(numbers))


def test_the_first_candidate_is_that_of_cluster_routing() -> None:
    snapshot = make_snapshot()
    for topic in topics():
        for alpha in (0.0, 0.3, 0.8):
            limits = replace(STEPS, alpha=alpha)
            first = decide(make_rule(), topic, limits, PAIRS)
            assert first.path is DecidedBy.VOI
            assert first.pair == decide(ClusterRule(snapshot), topic, limits, PAIRS).pair


def test_an_answer_that_is_likely_right_ends_the_request() -> None:
    history = (saw(CHEAP, SURE),)
    decision = decide(make_rule(), topics()[0], replace(STEPS, alpha=0.3), PAIRS, history=history)
    assert (decision.action, decision.answer_step) == (Action.ANSWER, 0)
    assert list(decision.chances) == [pytest.approx(0.9, abs=1e-3)]


def test_a_doubtful_answer_is_followed_by_the_candidate_that_is_worth_most() -> None:
    decision = decide(make_rule(), MATHS, STEPS, PAIRS, history=(saw(MATH, UNSURE),))
    assert (decision.action, decision.pair) == (Action.ROUTE, STRONG)
    assert list(decision.chances) == [pytest.approx(0.2, abs=1e-3)]


def test_a_candidate_whose_price_exceeds_its_worth_does_not_run() -> None:
    history = (saw(MATH, UNSURE),)
    paid = decide(make_rule(), MATHS, replace(STEPS, alpha=0.2), PAIRS, history=history)
    assert (paid.action, paid.pair) == (Action.ROUTE, STRONG)
    dear = decide(make_rule(), MATHS, replace(STEPS, alpha=0.7), PAIRS, history=history)
    assert (dear.action, dear.pair) == (Action.ROUTE, CHEAP)
    never = decide(make_rule(), MATHS, replace(STEPS, alpha=0.97), PAIRS, history=history)
    assert (never.action, never.answer_step) == (Action.ANSWER, 0)


def test_any_answer_held_may_be_returned_and_the_likeliest_is() -> None:
    history = (saw(MATH, SURE, "a"), saw(STRONG, UNSURE, "b"), saw(CHEAP, UNSURE, "b"))
    decision = decide(make_rule(), MATHS, STEPS, PAIRS, history=history)
    assert (decision.action, decision.answer_step) == (Action.ANSWER, 0)
    assert decision.confidence == pytest.approx(0.9, abs=1e-3)


def test_a_candidate_that_never_differed_from_one_that_answered_is_not_asked() -> None:
    twins = make_rule(metadata={VOTERS: [0, 1, 1]})
    decision = decide(twins, MATHS, STEPS, PAIRS, history=(saw(MATH, UNSURE),))
    assert (decision.action, decision.pair) == (Action.ROUTE, CHEAP)


def test_where_nothing_answered_the_next_candidate_runs_and_in_the_end_there_is_no_answer() -> None:
    failed = (saw(MATH, UNSURE, None),)
    decision = decide(make_rule(), MATHS, replace(STEPS, alpha=0.9), PAIRS, history=failed)
    assert decision.action is Action.ROUTE
    everyone = tuple(saw(pair, UNSURE, None) for pair in PAIRS)
    decision = decide(make_rule(), MATHS, STEPS, PAIRS, history=everyone)
    assert (decision.action, decision.answer_step) == (Action.ANSWER, None)
    assert decision.chances == (None, None, None)


def test_steps_and_dollars_bound_a_request() -> None:
    history = (saw(MATH, UNSURE),)
    for limits in (replace(STEPS, max_steps=1), replace(STEPS, max_cost_usd=1.05e-4)):
        assert decide(make_rule(), MATHS, limits, PAIRS, history=history).action is Action.ANSWER


def test_a_run_that_kept_no_signals_has_a_chance_too() -> None:
    bare = Seen(MATH, "a", None, 0, 1e-4)
    (chance,) = decide(make_rule(), MATHS, STEPS, PAIRS, history=(bare,)).chances
    assert chance == pytest.approx(0.2, abs=1e-3)


def test_a_snapshot_without_a_verifier_does_not_decide_by_value() -> None:
    bare: RouterSnapshot = make_snapshot()
    with pytest.raises(SnapshotError, match="lacks"):
        VoiRule(bare)
