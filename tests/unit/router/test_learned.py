"""The rule of both paths, on policies whose weights are known."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from rl.ppo.torch_policy_net import TorchPolicyNet
from serve_app.errors import NoCandidate, SnapshotError
from serve_app.router.rules.base import Batch, RoutingRequest
from serve_app.router.rules.beliefs import Prior
from serve_app.router.rules.policy_rule import LearnedRule
from serve_app.router.rules.voi import VoiRule
from serve_app.router.snapshots.snapshot import GATE_THRESHOLD
from serve_app.schemas import LOCAL_OWNER, Action, DecidedBy, Limits, Pair, Seen
from serve_app.signals import NUMBERS
from tests.policy_data import ALWAYS_POLICY, make_policy, with_policy
from tests.router_data import (
    COSTS_USD,
    DIM,
    LIMITS,
    PAIRS,
    decide,
    make_queries,
    make_snapshot,
    topics,
)
from tests.verifier_data import make_verifier

CHEAP, MATH, STRONG = PAIRS
MATHS = topics()[1]
ELSEWHERE: NDArray[np.float32] = np.eye(DIM, dtype=np.float32)[9]
STEPS = Limits(alpha=0.0, deadline_s=60.0, max_steps=4)


def saw(pair: Pair | None, key: str | None = "a", cost_usd: float = 1e-5) -> Seen:
    return Seen(pair, key, -0.1, 0, cost_usd)


def test_path_1_keeps_what_it_is_sure_of_and_the_policy_gets_the_rest() -> None:
    rule = LearnedRule(with_policy(threshold=0.5))
    confident = decide(rule, MATHS, STEPS, PAIRS, 1)
    assert confident.path is DecidedBy.CLUSTERS
    assert confident.confidence >= 0.5
    assert decide(rule, ELSEWHERE, STEPS, PAIRS, 1).path is DecidedBy.POLICY
    unsure = LearnedRule(with_policy(threshold=0.999))
    assert decide(unsure, MATHS, STEPS, PAIRS, 1).path is DecidedBy.POLICY


def test_path_1_keeps_the_requests_that_would_rather_be_wrong_than_pay() -> None:
    rule = LearnedRule(with_policy(threshold=1.01))
    limits = [replace(STEPS, alpha=alpha) for alpha in (0.5, 0.51)]
    paths = [decide(rule, MATHS, of, PAIRS, 1).path for of in limits]
    assert paths == [DecidedBy.POLICY, DecidedBy.CLUSTERS]


@pytest.mark.parametrize("alpha", [0.0, 0.4, 0.9])
def test_what_path_1_keeps_it_decides_as_if_it_were_alone(alpha: float) -> None:
    prior = Prior(PAIRS, np.array(COSTS_USD, np.float32), lambda e: np.abs(e[:3]))
    weighed = replace(with_policy(threshold=0.0), card_weight=0.2, outside_card_weight=0.3)
    rule, limits = LearnedRule(weighed, prior), replace(STEPS, alpha=alpha)
    rule.update(MATHS, CHEAP, 1.0, LOCAL_OWNER)
    paths = set()
    for query in [*(vector.astype(np.float32) for vector in topics()), ELSEWHERE]:
        decision = decide(rule, query, limits, PAIRS, 1)
        assert decision == decide(rule.clusters, query, limits, PAIRS, 1)
        paths.add(decision.path)
    assert paths == {DecidedBy.CLUSTERS, DecidedBy.OUT_OF_DISTRIBUTION}


def test_a_request_under_way_stays_with_the_policy() -> None:
    rule = LearnedRule(with_policy(threshold=0.0))
    decision = decide(rule, MATHS, STEPS, PAIRS, 1, history=(saw(STRONG),))
    assert (decision.path, decision.pair) == (DecidedBy.POLICY, MATH)


def test_each_pair_runs_once_and_steps_end_with_an_answer() -> None:
    rule = LearnedRule(with_policy())
    history: tuple[Seen, ...] = ()
    taken = []
    while (
        decision := decide(rule, MATHS, STEPS, PAIRS, 1, history=history)
    ).action is Action.ROUTE:
        taken.append(decision.pair)
        history += (saw(decision.pair),)
    assert taken == [MATH, STRONG, CHEAP]
    assert (decision.action, decision.candidates) == (Action.ANSWER, ())


def test_the_last_step_leaves_nothing_but_the_answer() -> None:
    rule = LearnedRule(with_policy())
    two = replace(STEPS, max_steps=2)
    first = decide(rule, MATHS, two, PAIRS, 1, history=(saw(MATH),))
    second = decide(rule, MATHS, two, PAIRS, 1, history=(saw(MATH), saw(STRONG)))
    assert (first.action, second.action) == (Action.ROUTE, Action.ANSWER)


def test_it_thinks_once_and_only_where_there_is_a_planner() -> None:
    rule = LearnedRule(with_policy(think=15.0))
    thinks = decide(rule, MATHS, STEPS, PAIRS, 1, planner="planner")
    alone = decide(rule, MATHS, STEPS, PAIRS, 1)
    after = decide(rule, MATHS, STEPS, PAIRS, 1, planner="planner", history=(saw(None, None),))
    assert [d.action for d in (thinks, alone, after)] == [
        Action.THINK,
        Action.ROUTE,
        Action.ROUTE,
    ]
    assert thinks.pair == MATH


def test_a_planner_that_the_caller_does_not_allow_is_not_asked() -> None:
    rule = LearnedRule(with_policy(think=15.0))
    listed = replace(STEPS, models=frozenset({"cheap", "strong"}))
    without = decide(rule, MATHS, listed, PAIRS, 1, planner="planner")
    assert (without.action, without.can_think) == (Action.ROUTE, False)
    within = decide(rule, MATHS, listed, PAIRS, 1, planner="strong")
    assert (within.action, within.can_think) == (Action.THINK, True)


def test_a_policy_that_never_learned_to_think_does_not() -> None:
    rule = LearnedRule(replace(with_policy(think=15.0), metadata={}))
    assert decide(rule, MATHS, STEPS, PAIRS, 1, planner="planner").action is Action.ROUTE


def test_the_callers_lists_and_dollars_hold() -> None:
    rule = LearnedRule(with_policy())
    listed = replace(STEPS, models=frozenset({"cheap", "strong"}), tools=frozenset({"none"}))
    assert decide(rule, MATHS, listed, PAIRS, 1).pair == STRONG
    assert decide(rule, MATHS, replace(STEPS, max_cost_usd=5e-5), PAIRS, 1).pair == CHEAP
    spent = decide(
        rule,
        MATHS,
        replace(STEPS, max_cost_usd=5e-4),
        PAIRS,
        1,
        history=(saw(MATH, cost_usd=4.95e-4),),
    )
    assert spent.action is Action.ANSWER
    with pytest.raises(NoCandidate):
        decide(rule, MATHS, replace(STEPS, max_cost_usd=1e-9), PAIRS, 1)
    with pytest.raises(NoCandidate):
        decide(rule, MATHS, STEPS, (Pair("stranger", "none"),), 1)


def test_a_pair_whose_model_left_still_counts_as_an_answer() -> None:
    rule = LearnedRule(with_policy(answer=10.0))
    decision = decide(rule, MATHS, STEPS, (CHEAP,), 1, history=(saw(MATH),))
    assert decision.action is Action.ANSWER


def test_a_batch_is_decided_as_each_of_its_requests_alone() -> None:
    rng = np.random.default_rng(3)
    policy = make_policy()
    policy = {
        name: value
        if name in (GATE_THRESHOLD, "num_heads")
        else value + 0.5 * rng.standard_normal(value.shape).astype(np.float32)
        for name, value in policy.items()
    }
    policy[GATE_THRESHOLD] = np.array([0.8], np.float32)
    rule = LearnedRule(replace(make_snapshot(), policy=policy))
    histories = [(), (saw(MATH),), (saw(MATH), saw(None, None)), (saw(CHEAP, None),), (), ()]
    limits = [STEPS, STEPS, replace(STEPS, alpha=0.5), STEPS, LIMITS,
              replace(STEPS, models=frozenset({"cheap"}))]  # fmt: skip
    queries = make_queries(np.array([0, 1, 2, 0, 1, 2]), seed=5, spread=0.4)
    requests = [
        RoutingRequest(query, limit, history, MATHS if history else None)
        for query, limit, history in zip(queries, limits, histories, strict=True)
    ]
    batch = Batch(tuple(requests), PAIRS, 1, "planner")
    together = rule.decide(batch)
    alone = [rule.decide(batch.part([number]))[0] for number in range(len(requests))]
    for one, other in zip(together, alone, strict=True):
        assert not isinstance(one, Exception)
        assert not isinstance(other, Exception)
        assert (one.action, one.path) == (other.action, other.path)
        assert [c.pair for c in one.candidates] == [c.pair for c in other.candidates]
        assert one.confidence == pytest.approx(other.confidence, abs=1e-5)


def test_exploration_takes_every_legal_action_as_often_as_it_says() -> None:
    rule = LearnedRule(with_policy(think=-2.0, answer=-1.0), epsilon=0.3, seed=1)
    history = (saw(MATH),)
    taken: Counter[tuple[Action, Pair | None]] = Counter()
    said: dict[tuple[Action, Pair | None], float] = {}
    for _ in range(1500):
        decision = decide(rule, MATHS, STEPS, PAIRS, 1, planner="planner", history=history)
        pair = decision.pair if decision.action is Action.ROUTE else None
        taken[decision.action, pair] += 1
        said[decision.action, pair] = decision.propensity
    assert set(taken) == {
        (Action.ROUTE, CHEAP),
        (Action.ROUTE, STRONG),
        (Action.THINK, None),
        (Action.ANSWER, None),
    }
    assert sum(said.values()) == pytest.approx(1.0)
    for action, propensity in said.items():
        assert propensity >= 0.3 / 4
        assert taken[action] / 1500 == pytest.approx(propensity, abs=0.05)


def test_without_exploration_it_is_deterministic() -> None:
    rule = LearnedRule(with_policy())
    decisions = [decide(rule, MATHS, STEPS, PAIRS, 1) for _ in range(5)]
    assert {(d.pair, d.propensity) for d in decisions} == {(MATH, 1.0)}


def test_a_pair_that_the_snapshot_does_not_know_is_a_candidate() -> None:
    new = Pair("new", "none")
    prior = Prior(
        (*PAIRS, new),
        np.array([*COSTS_USD, 1e-6], np.float32),
        lambda embedding: np.array([0.0, 0.0, 0.0, 1.0], np.float32),
        np.ones((4, DIM + 1), np.float32),
    )
    rule = LearnedRule(replace(with_policy(), prior_bias=0.99), prior)
    decision = decide(rule, MATHS, STEPS, (*PAIRS, new), 1)
    assert decision.pair == new


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (GATE_THRESHOLD, None),
        (GATE_THRESHOLD, np.array([np.nan], np.float32)),
        (GATE_THRESHOLD, np.zeros(2, np.float32)),
        ("candidate.weight", None),
        ("candidate.weight", np.zeros((8, 3), np.float32)),
        ("candidate.weight", np.full((8, 50), np.nan, np.float32)),
        ("stranger", np.zeros(1, np.float32)),
    ],
)
def test_wrong_tensors_are_refused(name: str, value: NDArray[np.float32] | None) -> None:
    policy = make_policy()
    policy.pop(name, None)
    if value is not None:
        policy[name] = value
    with pytest.raises(SnapshotError):
        LearnedRule(replace(make_snapshot(), policy=policy))


def test_a_policy_for_another_encoder_is_refused() -> None:
    with pytest.raises(SnapshotError, match="embeddings of 16"):
        LearnedRule(replace(make_snapshot(), policy=make_policy(dim=DIM + 1)))


def test_routing_by_a_policy_loads_no_torch() -> None:
    code = (
        "import sys, serve_app.config, serve_app.router.deployment, serve_app.gateway.deployment,"
        "serve_app.router.rules.policy_rule;"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


SEEN = tuple(
    (pair, logprob, key)
    for pair in PAIRS
    for logprob, key in ((-0.1, "a"), (-2.0, "a"), (-2.0, "b"), (-0.1, None))
)


def verified(pair: Pair, logprob: float, key: str | None) -> Seen:
    numbers = [math.nan] * len(NUMBERS)
    numbers[NUMBERS.index("answer_mean")] = logprob
    return Seen(pair, key, logprob, 0, 1e-4, tuple(numbers))


def untrained(dim: int = DIM) -> dict[str, NDArray[np.float32]]:
    tensors = TorchPolicyNet(dim, width=8, num_heads=2, num_layers=1).to_tensors()
    return tensors | {GATE_THRESHOLD: np.array([ALWAYS_POLICY], np.float32)}


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.3, 0.49])
def test_an_untrained_policy_decides_as_the_rule_voi(alpha: float) -> None:
    snapshot = replace(make_snapshot(), verifier=make_verifier())
    rule, learned = VoiRule(snapshot), LearnedRule(replace(snapshot, policy=untrained()))
    limits = replace(STEPS, alpha=alpha)
    histories = [(), *((verified(*of),) for of in SEEN)]
    histories += [
        (verified(*one), verified(*other)) for one in SEEN for other in SEEN if one[0] != other[0]
    ]
    actions = set()
    for query in [*topics(), ELSEWHERE]:
        for history in histories:
            expected = decide(rule, query, limits, PAIRS, history=history)
            found = decide(learned, query, limits, PAIRS, history=history)
            assert (found.action, found.answer_step) == (expected.action, expected.answer_step)
            assert found.chances == expected.chances
            if found.action is Action.ROUTE:
                assert found.pair == expected.pair
            actions.add(found.action)
    assert actions == {Action.ROUTE, Action.ANSWER}


def test_a_policy_with_a_verifier_returns_the_likeliest_answer_and_not_what_most_say() -> None:
    snapshot = replace(with_policy(answer=10.0), verifier=make_verifier())
    history = (verified(MATH, -0.1, "a"), verified(STRONG, -2.0, "b"), verified(CHEAP, -2.0, "b"))
    decision = decide(LearnedRule(snapshot), MATHS, STEPS, PAIRS, history=history)
    assert (decision.action, decision.answer_step) == (Action.ANSWER, 0)
    assert list(decision.chances) == pytest.approx([0.9, 0.2, 0.2], abs=1e-3)


def speaking(pair: Pair) -> Prior:
    """Cards of which one speaks for every query."""
    said = np.array([0.8 if of == pair else 0.1 for of in PAIRS], np.float32)
    return Prior(PAIRS, np.array(COSTS_USD, np.float32), lambda _: said)


def judged(prior: Prior | None) -> list[VoiRule | LearnedRule]:
    """`voi`, and a policy that takes the best pair not tried yet."""
    snapshot = replace(make_snapshot(), verifier=make_verifier())
    return [VoiRule(snapshot, prior), LearnedRule(replace(snapshot, policy=make_policy()), prior)]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("pair", PAIRS)
def test_far_from_the_profile_the_first_of_several_runs_is_the_cards_choice(
    pair: Pair, alpha: float
) -> None:
    for rule in judged(speaking(pair)):
        found = decide(rule, ELSEWHERE, replace(STEPS, alpha=alpha), PAIRS)
        assert (found.action, found.pair, found.propensity) == (Action.ROUTE, pair, 1.0)
        assert {of.pair for of in found.candidates} == set(PAIRS)  # the others come behind
        assert 0 < found.confidence < 1
        second = decide(rule, ELSEWHERE, STEPS, PAIRS, history=(verified(pair, -2.0, "a"),))
        assert second.pair != pair


def test_the_cards_choose_no_pair_that_may_not_run() -> None:
    limits = replace(STEPS, models=frozenset({"cheap", "math"}))
    for rule in judged(speaking(PAIRS[2])):
        assert decide(rule, ELSEWHERE, limits, PAIRS).pair in PAIRS[:2]


@pytest.mark.parametrize("pair", PAIRS)
def test_where_the_query_is_known_the_cards_do_not_choose(pair: Pair) -> None:
    for mute, spoken in zip(judged(None), judged(speaking(pair)), strict=True):
        for query in topics():
            assert (
                decide(spoken, query, STEPS, PAIRS).pair == decide(mute, query, STEPS, PAIRS).pair
            )


@pytest.mark.parametrize("pair", PAIRS)
def test_a_request_of_one_run_is_not_opened_by_the_cards(pair: Pair) -> None:
    once = replace(STEPS, max_steps=1)
    voi, learned = judged(speaking(pair))
    found = decide(voi, ELSEWHERE, once, PAIRS)
    assert found.candidates == decide(voi.clusters, ELSEWHERE, once, PAIRS).candidates
    _, mute = judged(None)
    assert decide(learned, ELSEWHERE, once, PAIRS).pair == decide(mute, ELSEWHERE, once, PAIRS).pair


def test_a_caller_who_would_rather_be_wrong_than_pay_gets_no_dear_opening() -> None:
    cheap = replace(STEPS, alpha=0.9)
    voi, _ = judged(speaking(PAIRS[2]))
    found = decide(voi, ELSEWHERE, cheap, PAIRS)
    assert found.candidates == decide(voi.clusters, ELSEWHERE, cheap, PAIRS).candidates


@pytest.mark.parametrize("pair", PAIRS)
def test_where_nothing_judges_answers_the_cards_do_not_choose(pair: Pair) -> None:
    mute, spoken = LearnedRule(with_policy()), LearnedRule(with_policy(), speaking(pair))
    assert (
        decide(spoken, ELSEWHERE, STEPS, PAIRS).pair == decide(mute, ELSEWHERE, STEPS, PAIRS).pair
    )
