"""Off-policy estimates: intervals hold the true value as often as they say, for decisions and for
whole requests; what the log cannot tell is refused."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from rl.evaluate.importance_sampling import OffPolicyEstimate, Trajectories, estimate_value
from rl.evaluate.off_policy import (
    LoggedDecisions,
    LoggedStep,
    LoggedTrajectories,
    estimate,
    estimate_trajectories,
)
from rl.evaluate.policies import BootstrapInterval
from serve_app.errors import ConfigError, NoCandidate
from serve_app.router.rules.base import Answer, Batch, RoutingRequest
from serve_app.router.rules.clusters import ClusterRule
from serve_app.schemas import Action, Candidate, DecidedBy, Decision, Pair, Seen
from tests.router_data import DIM, LIMITS, PAIRS, SKILL, decide, make_queries, make_snapshot, topics

NUM_REPLICATIONS = 200
ESTIMATORS = ("score", "importance", "doubly_robust", "direct")
OWN = np.array([1, 2, 2])
"""What the logging policy prefers on each topic."""
BEST = np.array([2, 1, 0])
"""What the judged policy does on each topic; not the best there is."""
SURE = np.array([0.2, 0.9])
"""Chance that a wrong and a right answer look sure."""


def decided(pair: Pair | None, action: Action = Action.ROUTE, propensity: float = 1.0) -> Decision:
    candidates = () if pair is None else (Candidate(pair, 1.0, 1.0, 0.0),)
    return Decision(candidates, DecidedBy.POLICY, 1.0, propensity, 1, 1, action=action)


def topic_of(request: RoutingRequest) -> int:
    return int(request.embedding[:3].argmax())


class OneByOne(ABC):
    """A rule written by hand; every request is decided by itself."""

    snapshot = None

    def decide(self, batch: Batch) -> list[Answer]:
        return [self.answer(request) for request in batch.requests]

    @abstractmethod
    def answer(self, request: RoutingRequest) -> Answer: ...


class TopicRule(OneByOne):
    """One pair per topic."""

    def __init__(self, chosen: NDArray[np.int64] = BEST) -> None:
        self._decisions = [decided(PAIRS[pair]) for pair in chosen]

    def answer(self, request: RoutingRequest) -> Answer:
        return self._decisions[topic_of(request)]


class EscalatingRule(OneByOne):
    """Tries the pair of the topic, and the strong one where the answer does not look sure."""

    def answer(self, request: RoutingRequest) -> Answer:
        if not request.history:
            return decided(PAIRS[OWN[topic_of(request)]])
        (first, *others) = request.history
        sure = first.mean_logprob is not None and first.mean_logprob > -0.5
        if sure or others or first.pair == PAIRS[2]:
            return decided(None, Action.ANSWER)
        return decided(PAIRS[2])


def log_decisions(seed: int, number: int = 500, epsilon: float = 0.5) -> LoggedDecisions:
    rng = np.random.default_rng(seed)
    topic = rng.integers(3, size=number)
    chosen = np.where(rng.random(number) < epsilon, rng.integers(3, size=number), OWN[topic])
    return LoggedDecisions(
        encoder="test-encoder",
        embeddings=make_queries(topic, seed + 1, spread=0.05),
        pairs=PAIRS,
        chosen=chosen,
        propensity=epsilon / 3 + (1 - epsilon) * (chosen == OWN[topic]),
        score=(rng.random(number) < SKILL[topic, chosen]).astype(np.float64),
    )


def log_requests(seed: int, number: int = 600, max_steps: int = 2) -> LoggedTrajectories:
    """What a policy did that draws uniformly among the pairs it has not tried, and `answer`."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(3, size=number)
    requests, scores = [], np.zeros(number)
    for row, skill in enumerate(SKILL[topic]):
        steps: list[LoggedStep] = []
        left = [0, 1, 2]
        for _ in range(max_steps):
            actions = [*left, None] if steps else [*left]
            pair = actions[rng.integers(len(actions))]
            if pair is None:
                steps.append(LoggedStep(Action.ANSWER, None, 1 / len(actions)))
                break
            left.remove(pair)
            scores[row] = float(rng.random() < skill[pair])
            sure = rng.random() < SURE[int(scores[row])]
            seen = Seen(PAIRS[pair], f"{pair}", -0.1 if sure else -1.0, 0, 1e-5)
            steps.append(LoggedStep(Action.ROUTE, PAIRS[pair], 1 / len(actions), seen))
        requests.append(tuple(steps))
    return LoggedTrajectories(
        encoder="test-encoder",
        embeddings=make_queries(topic, seed + 1, spread=0.05),
        pairs=PAIRS,
        available=(PAIRS,) * number,
        limits=(replace(LIMITS, max_steps=max_steps),) * number,
        steps=tuple(requests),
        score=scores,
    )


def value_of_escalating() -> float:
    """Its exact expected score: a sure answer stands, an unsure one gives way to the strong
    pair's."""
    total = 0.0
    for topic, first in enumerate(OWN):
        right, strong = SKILL[topic, first], SKILL[topic, 2]
        if first == 2:
            total += strong
        else:
            unsure = right * (1 - SURE[1]) + (1 - right) * (1 - SURE[0])
            total += right * SURE[1] + unsure * strong
    return total / len(OWN)


@pytest.fixture(scope="module", params=["decisions", "requests"])
def replications(request: pytest.FixtureRequest) -> tuple[float, list[OffPolicyEstimate], bool]:
    """The true value, the estimates of many logs, and whether linear values can be right."""
    judged: Callable[[int], OffPolicyEstimate]
    if request.param == "decisions":
        known = float(SKILL[np.arange(3), BEST].mean())
        judged = partial(_of_decisions)
    else:
        known, judged = value_of_escalating(), partial(_of_requests)
    estimates = [judged(seed) for seed in range(NUM_REPLICATIONS)]
    return known, estimates, request.param == "decisions"


def _of_decisions(seed: int) -> OffPolicyEstimate:
    return estimate("judged", TopicRule(), log_decisions(10 * seed), 0.0, num_resamples=300)


def _of_requests(seed: int) -> OffPolicyEstimate:
    logged = log_requests(10 * seed)
    return estimate_trajectories("judged", EscalatingRule(), logged, num_resamples=300)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_intervals_hold_the_true_value_as_often_as_they_say(
    replications: tuple[float, list[OffPolicyEstimate], bool], estimator: str
) -> None:
    known, found, is_linear = replications
    if estimator == "direct" and not is_linear:
        pytest.skip(
            "what a request's state is worth is not linear; see the test of saturated values"
        )
    assert_honest(known, [getattr(one, estimator) for one in found])


def assert_honest(known: float, intervals: list[BootstrapInterval]) -> None:
    """They hold what is true in 95% of the cases, and are not off on average."""
    assert None not in intervals
    held = np.mean([one.low <= known <= one.high for one in intervals])
    assert 0.90 <= held <= 0.99  # three standard errors of 200 replications
    error = np.std([one.mean for one in intervals]) / np.sqrt(NUM_REPLICATIONS)
    assert np.mean([one.mean for one in intervals]) == pytest.approx(known, abs=3 * error + 0.003)


def test_the_direct_method_is_honest_where_its_values_can_be_right() -> None:
    """Two decisions; features that tell every state and action apart."""
    known = value_of_escalating()
    found = []
    for seed in range(NUM_REPLICATIONS):
        trajectories = saturated(log_requests(10 * seed))
        found.append(estimate_value(trajectories, num_resamples=200).direct)
    assert_honest(known, [one for one in found if one is not None])


def saturated(logged: LoggedTrajectories) -> Trajectories:
    """A feature per topic and first pair, and one per topic, first pair, its look, and second
    action."""
    size, rule = len(logged.steps), EscalatingRule()
    first, second = 3 * 3, 3 * 3 * 2 * 4
    ratio, reward = np.ones((size, 2)), np.zeros((size, 2))
    taken, expected = (np.zeros((size, 2, first + second)) for _ in range(2))
    for row, (query, steps) in enumerate(zip(logged.embeddings, logged.steps, strict=True)):
        topic, history = int(query[:3].argmax()), tuple[Seen, ...]()
        place = 0
        for number, step in enumerate(steps):
            target = decide(rule, query, LIMITS, PAIRS, 1, history=history)
            actions = [
                3 if one.action is Action.ANSWER else PAIRS.index(one.pair or PAIRS[0])
                for one in (step, target)
            ]
            if number == 0:
                places = [3 * topic + action for action in actions]
                place = places[0]
            else:
                sure = int((history[0].mean_logprob or 0.0) > -0.5)
                places = [first + 4 * (2 * place + sure) + action for action in actions]
            taken[row, number, places[0]] = expected[row, number, places[1]] = 1.0
            ratio[row, number] = (actions[0] == actions[1]) / step.propensity
            history = (*history, step.seen) if step.seen else history
        reward[row, len(steps) - 1] = logged.score[row]
    return Trajectories(ratio, reward, taken, expected, np.full(first + second, 1e-3))


def test_the_values_take_noise_off_the_importance_weights(
    replications: tuple[float, list[OffPolicyEstimate], bool],
) -> None:
    _, found, _ = replications
    spread = {
        name: np.std([getattr(one, name).mean for one in found])
        for name in ("importance", "doubly_robust", "direct")
    }
    assert spread["doubly_robust"] < 0.8 * spread["importance"]
    assert spread["direct"] < spread["importance"]


def test_the_effective_size_and_the_coverage_are_those_of_the_weights() -> None:
    found = _of_decisions(3)
    weights = np.where(
        (log_decisions(30).chosen == BEST[log_decisions(30).embeddings[:, :3].argmax(axis=1)]),
        1 / log_decisions(30).propensity,
        0.0,
    )
    assert found.num_decisions == len(weights) == 500
    assert found.effective_size == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert found.coverage == pytest.approx(weights.mean())


def test_doubly_robust_is_right_where_the_values_are_wrong() -> None:
    """With features that say nothing the direct method is of the logging policy."""
    rng = np.random.default_rng(0)
    size = 4000
    action = rng.integers(2, size=size)
    reward = (rng.random(size) < np.array([0.2, 0.9])[action]).astype(np.float64)
    blind = np.ones((size, 1, 1))
    found = estimate_value(
        Trajectories(
            ratio=np.where(action == 1, 2.0, 0.0)[:, None],
            reward=reward[:, None],
            taken=blind,
            expected=blind,
            penalty=np.array([1e-3]),
        ),
        num_resamples=200,
    )
    assert found.direct is not None
    assert found.direct.mean == pytest.approx(0.55, abs=0.03)
    assert found.doubly_robust is not None
    assert found.doubly_robust.mean == pytest.approx(0.9, abs=0.03)


def test_a_policy_that_does_what_was_never_tried_is_refused() -> None:
    """On the third topic the judged policy takes a pair that the log never drew."""
    logged = log_decisions(1, number=1000)
    rng = np.random.default_rng(0)
    logged = replace(logged, chosen=rng.integers(1, 3, size=1000), propensity=np.full(1000, 0.5))
    found = estimate("judged", TopicRule(), logged, 0.0, num_resamples=200)
    assert found.score is None
    assert found.doubly_robust is None
    assert found.effective_size > 30
    assert found.coverage < 0.8
    assert "could have done only" in str(found.reason)


def test_few_or_certain_requests_are_refused() -> None:
    few = estimate_trajectories("judged", EscalatingRule(), log_requests(0, number=40))
    assert few.score is None
    assert f"{few.effective_size:.1f} of this policy's" in str(few.reason)
    certain = replace(
        log_requests(0, number=50),
        steps=((LoggedStep(Action.ROUTE, PAIRS[0], 1.0),),) * 50,
    )
    nothing = estimate_trajectories("judged", EscalatingRule(), certain)
    assert nothing.num_decisions == 0
    assert "no logged request was explored" in str(nothing.reason)


def test_requests_of_one_decision_are_worth_what_the_decisions_are() -> None:
    logged = log_decisions(5)
    requests = LoggedTrajectories(
        encoder=logged.encoder,
        embeddings=logged.embeddings,
        pairs=PAIRS,
        available=(PAIRS,) * len(logged.score),
        limits=(LIMITS,) * len(logged.score),
        steps=tuple(
            (LoggedStep(Action.ROUTE, PAIRS[pair], propensity),)
            for pair, propensity in zip(logged.chosen, logged.propensity.tolist(), strict=True)
        ),
        score=logged.score,
    )

    class Once(OneByOne):
        def answer(self, request: RoutingRequest) -> Answer:
            return decided(PAIRS[BEST[topic_of(request)]])

    single = estimate("judged", TopicRule(), logged, 0.0, num_resamples=100)
    whole = estimate_trajectories("judged", Once(), requests, num_resamples=100)
    assert whole.score == single.score
    assert whole.importance == single.importance
    assert whole.effective_size == pytest.approx(single.effective_size)


def test_a_rule_that_decides_once_stops_at_the_first_answer() -> None:
    logged = log_requests(7, number=1500)
    found = estimate_trajectories("judged", ClusterRule(make_snapshot()), logged, num_resamples=200)
    known = float(SKILL.max(axis=1).mean())
    for interval in (found.score, found.importance, found.doubly_robust):
        assert interval is not None
        assert interval.low <= known <= interval.high
    assert found.effective_size == pytest.approx(1500 / 9, rel=0.25)


def test_a_rule_that_decides_once_goes_on_after_a_failure() -> None:
    first, second = (Seen(PAIRS[pair], None, None, 0, 1e-5) for pair in (2, 0))
    steps = (
        LoggedStep(Action.ROUTE, PAIRS[2], 0.5, first),
        LoggedStep(Action.ROUTE, PAIRS[0], 0.5, second),
    )
    logged = replace(
        log_requests(0, number=80),
        embeddings=np.tile(topics()[0], (80, 1)),
        steps=(steps,) * 80,
        score=np.ones(80),
    )
    found = estimate_trajectories("judged", ClusterRule(make_snapshot()), logged, num_resamples=50)
    assert found.effective_size == pytest.approx(80)
    assert found.coverage == pytest.approx(4.0)


class RefusingRule(EscalatingRule):
    """Refuses the queries of some topics."""

    def __init__(self, *topics: int) -> None:
        self._topics = topics

    def answer(self, request: RoutingRequest) -> Answer:
        if topic_of(request) in self._topics:
            return NoCandidate("not this one")
        return super().answer(request)


def test_a_request_that_would_be_refused_scores_nothing() -> None:
    logged = log_requests(3, number=1500)
    found = estimate_trajectories("judged", RefusingRule(0), logged, num_resamples=50)
    assert found.coverage == pytest.approx(2 / 3, abs=0.15)
    with pytest.raises(ConfigError, match="knows none of the 3 pairs"):
        estimate_trajectories("judged", RefusingRule(0, 1, 2), logged, num_resamples=50)


class ExploringRule(OneByOne):
    """Draws its first pair."""

    def answer(self, request: RoutingRequest) -> Answer:
        return decided(PAIRS[0], propensity=0.5)


def test_a_rule_that_explores_cannot_be_judged() -> None:
    with pytest.raises(ConfigError, match="judged policy explores"):
        estimate_trajectories("judged", ExploringRule(), log_requests(0, number=5))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (LoggedStep(Action.ROUTE, None, 0.5), "without running it"),
        (LoggedStep(Action.ANSWER, PAIRS[0], 0.5), "without running it"),
        (LoggedStep(Action.ROUTE, Pair("other", "none"), 0.5), "none of the 3 pairs"),
        (LoggedStep(Action.THINK, None, 0.0), "propensity"),
    ],
)
def test_a_log_of_requests_that_does_not_fit_is_refused(step: LoggedStep, message: str) -> None:
    def logged(*steps: LoggedStep) -> LoggedTrajectories:
        query = np.eye(1, DIM, dtype=np.float32)
        return LoggedTrajectories("e", query, PAIRS, (PAIRS,), (LIMITS,), (steps,), np.ones(1))

    with pytest.raises(ConfigError, match=message):
        logged(step)
    with pytest.raises(ConfigError, match="no step"):
        logged()


def test_the_topics_are_told_apart() -> None:
    """The tests' rules read the topic off the query."""
    queries = make_queries(np.arange(3), 0, spread=0.05)
    assert (queries[:, :3].argmax(axis=1) == np.arange(3)).all()
    assert topics().shape == (3, DIM)
