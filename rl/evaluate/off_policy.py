"""What another policy would have scored on logged traffic, from decisions made by exploring.

In come the log, of single decisions or of whole requests of several, and the rule that is judged;
`rl.evaluate.importance_sampling` has the estimators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rl.evaluate.importance_sampling import OffPolicyEstimate, Trajectories, estimate_value
from rl.evaluate.policies import UNLIMITED_S, ask
from serve_app.errors import ConfigError, NoCandidate
from serve_app.router.policy.features import MAX_STEPS
from serve_app.router.rules.base import Deciding, RoutingRequest, decide_one
from serve_app.schemas import BY_STEPS, Action, Decision, Limits, Pair, Seen
from serve_app.store import RatedTrajectory

_NUM_COMPONENTS = 16
"""Leading principal components of the query embeddings that a pair's value is linear in."""
_NUM_STATE_COMPONENTS = 4
"""The same for the decisions of trajectories, which also know what the request has shown."""
_OWN_PENALTY = 2.0
"""Decisions that it takes to move a pair's value half way from what all pairs' data say."""
_SHARED_PENALTY = 1e-3
_PLANNER = "planner"
"""Stands for the planner that could be asked then, whichever it was."""

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class LoggedDecisions:
    """Decisions whose score is known. Every pair is taken to have been available to each."""

    encoder: str
    embeddings: NDArray[np.float32]
    """(num_decisions, dim)"""
    pairs: tuple[Pair, ...]
    chosen: NDArray[np.int64]
    """(num_decisions,) index into `pairs`."""
    propensity: NDArray[np.float64]
    """(num_decisions,) probability with which it was chosen, in (0, 1]."""
    score: NDArray[np.float64]
    """(num_decisions,) in [0, 1]."""

    def __post_init__(self) -> None:
        """Refuse columns that do not fit together.

        Raises:
            ConfigError: If a length, an index, a propensity or a score is wrong.
        """
        size = len(self.embeddings)
        if any(len(column) != size for column in (self.chosen, self.propensity, self.score)):
            raise ConfigError("the columns of the logged decisions differ in length")
        if not ((self.chosen >= 0) & (self.chosen < len(self.pairs))).all():
            raise ConfigError(f"a logged decision is of none of the {len(self.pairs)} pairs")
        if not ((self.propensity > 0) & (self.propensity <= 1)).all():
            raise ConfigError("a logged propensity is not in (0, 1]")
        if not ((self.score >= 0) & (self.score <= 1)).all():
            raise ConfigError("a logged score is not in [0, 1]")


@dataclass(frozen=True)
class LoggedStep:
    """One decision of a request, and what came of it."""

    action: Action
    pair: Pair | None
    """Who ran; `None` unless the action is to route."""
    propensity: float
    """Probability with which it was done, in (0, 1]."""
    seen: Seen | None = None
    """What it showed; `None` after `answer`."""
    answer: NDArray[np.float32] | None = None
    """(dim,) embedding of the step's answer; `None` where there is none."""
    can_think: bool = False
    """Whether there was a planner to ask."""
    seconds_left: float = UNLIMITED_S
    """Before the request's deadline."""


@dataclass(frozen=True)
class LoggedTrajectories:
    """Requests whose score is known, decision by decision."""

    encoder: str
    embeddings: NDArray[np.float32]
    """(num_requests, dim)"""
    pairs: tuple[Pair, ...]
    """All that were ever available."""
    available: tuple[tuple[Pair, ...], ...]
    """(num_requests,) those that were, throughout each request."""
    limits: tuple[Limits, ...]
    """(num_requests,) of each request; the seconds left are those of its steps."""
    steps: tuple[tuple[LoggedStep, ...], ...]
    """(num_requests,) none empty. An answer that nothing else was left than to give is no
    decision, and is not among them."""
    score: NDArray[np.float64]
    """(num_requests,) of the answer that was returned, in [0, 1]."""

    def __post_init__(self) -> None:
        """Refuse what does not fit together.

        Raises:
            ConfigError: If a length, a pair, a propensity or a score is wrong.
        """
        columns = (self.available, self.limits, self.steps, self.score)
        if any(len(column) != len(self.embeddings) for column in columns):
            raise ConfigError("the columns of the logged trajectories differ in length")
        if not all(self.steps):
            raise ConfigError("a logged trajectory has no step")
        known = set(self.pairs)
        if not known.issuperset(pair for pairs in self.available for pair in pairs):
            raise ConfigError(f"a pair was available that is none of the {len(self.pairs)} pairs")
        for step in (step for steps in self.steps for step in steps):
            if (step.action is Action.ROUTE) != (step.pair is not None):
                raise ConfigError("a logged step names a pair without running it, or runs none")
            if step.pair is not None and step.pair not in known:
                raise ConfigError(f"a logged step is of none of the {len(self.pairs)} pairs")
            if not 0 < step.propensity <= 1:
                raise ConfigError("a logged propensity is not in (0, 1]")
        if not ((self.score >= 0) & (self.score <= 1)).all():
            raise ConfigError("a logged score is not in [0, 1]")


def logged_trajectories(
    rated: Sequence[RatedTrajectory], pairs: tuple[Pair, ...], encoder: str
) -> LoggedTrajectories | None:
    """Rated requests as they can be judged.

    Left out are those that went on without the router for a while, and those that ran a pair which
    is not there any more.

    Args:
        rated: From the store.
        pairs: Those there are.
        encoder: Of the embeddings.

    Returns:
        `None` where nothing is left.
    """
    known = set(pairs)
    kept = [
        request
        for request in rated
        if all(
            made.path in BY_STEPS and (made.pair is None or made.pair in known)
            for made in request.decisions
        )
    ]
    if not kept:
        return None
    return LoggedTrajectories(
        encoder=encoder,
        embeddings=np.stack([np.frombuffer(request.embedding, "<f4") for request in kept]),
        pairs=pairs,
        available=tuple(tuple(pair for pair in of.pairs if pair in known) for of in kept),
        limits=tuple(
            Limits(of.alpha, UNLIMITED_S, max_cost_usd=of.max_cost_usd, max_steps=of.max_steps)
            for of in kept
        ),
        steps=tuple(_steps(request) for request in kept),
        score=np.array([request.score for request in kept]),
    )


def _steps(request: RatedTrajectory) -> tuple[LoggedStep, ...]:
    """Its decisions, without an answer that nothing else was left than to give."""
    decisions = request.decisions
    last = decisions[-1]
    if last.action is Action.ANSWER and last.propensity == 1 and len(decisions) > 1:
        decisions = decisions[:-1]
    return tuple(
        LoggedStep(
            action=made.action,
            pair=made.pair,
            propensity=made.propensity,
            seen=made.seen,
            answer=None if made.answer is None else np.frombuffer(made.answer, "<f4"),
            can_think=made.can_think,
            seconds_left=made.seconds_left,
        )
        for made in decisions
    )


def estimate(
    name: str,
    rule: Deciding,
    logged: LoggedDecisions,
    alpha: float,
    *,
    epsilon: float = 0.0,
    num_resamples: int = 2000,
    seed: int = 0,
) -> OffPolicyEstimate:
    """Estimate what a policy of one step would have scored.

    Args:
        name: Of the policy, for messages.
        rule: Its exploration is off.
        logged: What another policy did.
        alpha: Cost-quality dial that the policy decides at.
        epsilon: Probability in [0, 1] with which it would draw a pair uniformly instead.
        num_resamples: Of the intervals.
        seed: Of the intervals.

    Raises:
        ConfigError: If the rule is of another encoder, knows none of the pairs, or explores.
    """
    explored = np.flatnonzero(logged.propensity < 1)
    if not len(explored):
        return _nothing_explored("decision")
    embeddings, num_pairs = logged.embeddings[explored], len(logged.pairs)
    choices = ask(name, rule, embeddings, logged.encoder, logged.pairs, [alpha])
    target = np.full((len(explored), num_pairs), epsilon / num_pairs)
    target[np.arange(len(explored)), choices.chosen[0]] += 1 - epsilon
    chosen = logged.chosen[explored]
    kind = _with_one(_components(embeddings, _NUM_COMPONENTS))
    done = np.eye(num_pairs)[chosen]
    trajectories = Trajectories(
        ratio=(target[np.arange(len(explored)), chosen] / logged.propensity[explored])[:, None],
        reward=logged.score[explored][:, None],
        taken=_crossed(kind, done, kind)[:, None],
        expected=_crossed(kind, target, kind)[:, None],
        penalty=_penalties(kind.shape[1], num_pairs * kind.shape[1]),
    )
    return estimate_value(trajectories, num_resamples=num_resamples, seed=seed)


def estimate_trajectories(
    name: str,
    rule: Deciding,
    logged: LoggedTrajectories,
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> OffPolicyEstimate:
    """Estimate what a policy of several steps would have scored, by every request's own limits.

    A request whose first decision is not path 2's ends with the first pair that answers, as it does
    in serving.

    Args:
        name: Of the policy, for messages.
        rule: Its exploration is off.
        logged: What another policy did, decision by decision. Requests without an explored decision
            are left out.
        num_resamples: Of the intervals.
        seed: Of the intervals.

    Raises:
        ConfigError: If the rule knows none of the pairs, or explores.
    """
    explored = [
        row for row, steps in enumerate(logged.steps) if any(step.propensity < 1 for step in steps)
    ]
    if not explored:
        return _nothing_explored("request")
    num_pairs = len(logged.pairs)
    num_steps = max(len(logged.steps[row]) for row in explored)
    shape = (len(explored), num_steps)
    ratio, present = np.ones(shape), np.zeros(shape)
    done, wanted = (np.zeros((*shape, num_pairs + 2)) for _ in range(2))
    state = np.zeros((*shape, _NUM_STATE))
    for place, row in enumerate(explored):
        history: tuple[Seen, ...] = ()
        targets = _targets(name, rule, logged, row)
        for number, (step, target) in enumerate(zip(logged.steps[row], targets, strict=True)):
            action = _index(logged.pairs, step.action, step.pair)
            ratio[place, number] = (target == action) / step.propensity
            done[place, number, action] = 1.0
            if target is not None:
                wanted[place, number, target] = 1.0
            state[place, number] = _state(history)
            present[place, number] = 1.0
            if step.seen is not None:
                history = (*history, step.seen)
    if not wanted.any():
        raise ConfigError(f"the {name} policy knows none of the {num_pairs} pairs that were logged")
    reward = np.zeros(shape)
    ends = present.sum(axis=1).astype(np.intp) - 1
    reward[np.arange(len(explored)), ends] = logged.score[explored]
    components = _components(logged.embeddings[explored], _NUM_STATE_COMPONENTS)
    spread = np.broadcast_to(components[:, None], (*shape, components.shape[1]))
    known = _with_one(np.concatenate([state, spread], axis=2))
    trajectories = Trajectories(
        ratio=ratio,
        reward=reward,
        taken=_crossed(known, done, known) * present[:, :, None],
        expected=_crossed(known, wanted, known) * present[:, :, None],
        penalty=_penalties(known.shape[2], done.shape[2] * known.shape[2]),
    )
    return estimate_value(trajectories, num_resamples=num_resamples, seed=seed)


def _nothing_explored(what: str) -> OffPolicyEstimate:
    reason = f"no logged {what} was explored: all were certain"
    return OffPolicyEstimate(None, 0.0, 0, reason)


def _targets(name: str, rule: Deciding, logged: LoggedTrajectories, row: int) -> list[int | None]:
    """What the rule would do at each decision of a request, as `_index` has it.

    `None` where it would refuse the request.
    """
    targets: list[int | None] = []
    history: tuple[Seen, ...] = ()
    last_answer: NDArray[np.float32] | None = None
    answers: tuple[NDArray[np.float32] | None, ...] = ()
    first: Decision | None = None
    for step in logged.steps[row]:
        if first is not None and first.path not in BY_STEPS:
            decision = _next_best(first, history)
        else:
            try:
                decision = decide_one(
                    rule,
                    RoutingRequest(
                        logged.embeddings[row],
                        replace(logged.limits[row], deadline_s=step.seconds_left),
                        history,
                        last_answer,
                        answers,
                    ),
                    logged.available[row],
                    planner=_PLANNER if step.can_think else None,
                )
            except NoCandidate:
                return [None] * len(logged.steps[row])
        first = first or decision
        if decision.propensity < 1:
            raise ConfigError(f"the {name} policy explores: switch it off to evaluate it")
        pair = decision.pair if decision.action is Action.ROUTE else None
        targets.append(_index(logged.pairs, decision.action, pair))
        if step.seen is not None:
            history, answers = (*history, step.seen), (*answers, step.answer)
        if step.action is Action.ROUTE:  # a thought leaves the last answer what it was
            last_answer = step.answer
    return targets


def _next_best(first: Decision, history: tuple[Seen, ...]) -> Decision:
    """What follows a decision that was not path 2's: its next-best pair where none has answered."""
    tried = {seen.pair for seen in history}
    left = tuple(candidate for candidate in first.candidates if candidate.pair not in tried)
    answered = any(seen.answer_key is not None for seen in history)
    action = Action.ANSWER if answered or not left else Action.ROUTE
    return replace(first, candidates=left, action=action)


def _index(pairs: tuple[Pair, ...], action: Action, pair: Pair | None) -> int:
    """Pairs by their place, then `think`, then `answer`."""
    if pair is not None:
        return pairs.index(pair)
    return len(pairs) + (action is Action.ANSWER)


_NUM_STATE = 4


def _state(history: tuple[Seen, ...]) -> list[float]:
    """What the values know of a request under way, each in [0, 1]."""
    answers = [seen for seen in history if seen.answer_key is not None]
    if not answers:
        return [len(history) / MAX_STEPS, 0.0, 0.0, 0.0]
    keys = [seen.answer_key for seen in answers]
    certainty = max(
        (
            math.exp(min(seen.mean_logprob, 0.0))
            for seen in answers
            if seen.mean_logprob is not None
        ),
        default=0.0,
    )
    agreeing = max(keys.count(key) for key in keys)
    return [len(history) / MAX_STEPS, 1.0, certainty, (agreeing - 1) / MAX_STEPS]


def _components(embeddings: NDArray[np.float32], number: int) -> _Array:
    """(num_queries, at most number) leading principal components, of unit variance."""
    centred = (embeddings - embeddings.mean(axis=0)).astype(np.float64)
    values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    kept = [place for place in np.argsort(-values)[:number] if values[place] > 1e-9]
    components: _Array = centred @ vectors[:, kept] / np.sqrt(values[kept])
    return components


def _with_one(columns: _Array) -> _Array:
    return np.concatenate([np.ones((*columns.shape[:-1], 1)), columns], axis=-1)


def _crossed(shared: _Array, actions: _Array, own: _Array) -> _Array:
    """Features that all actions share, and those each has of its own, on the last axis."""
    products = actions[..., :, None] * own[..., None, :]
    return np.concatenate([shared, products.reshape(*products.shape[:-2], -1)], axis=-1)


def _penalties(num_shared: int, num_own: int) -> _Array:
    """A pair's own part is held back, so that one that was seldom tried is valued like the rest."""
    return np.repeat([_SHARED_PENALTY, _OWN_PENALTY], [num_shared, num_own])
