"""What path 2 sees of a request under way, as arrays: the same in training and in serving.

A state is a batch of requests over one padded set of pairs. Nothing in the encoding depends on
which pairs there are: each has a row of its own, and the order of the rows means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from serve_app.router.policy.worth import gains, worths
from serve_app.router.rules.utility import normalised, trade

Float = NDArray[np.float32]
Bool = NDArray[np.bool_]
Index = NDArray[np.intp]

MAX_STEPS = 8
"""Steps a request may take at most; counts are scaled by it."""
DESCRIPTOR_DIM = 32
"""Numbers that are left of a pair's descriptor."""
NUM_CONTEXT = 18
NUM_FEATURES = DESCRIPTOR_DIM + 23
"""New numbers are added at the end: a policy that was trained without them gives them no say."""
OPENING_QUANTILE = 0.9
"""Distance quantile of a query from which the cards choose the first of several runs."""
OPENING_MAX_ALPHA = 0.5
"""Alpha above which the cards never choose: a dear run may cost more than an answer is worth."""
LOG_SECONDS = DESCRIPTOR_DIM + 1
"""Column of a candidate's features that tells how long it takes: log10 of the seconds, over 3."""

NO_ANSWER = -1
"""Key of a step that gave no answer."""

_PROJECTION_SEED = 20260
_LEAST_LOGPROB = -4.0
_MOST_SPENT = 4.0
"""In pools of like prices a few runs are many times their range."""
_SCORE_SCALE = 4.0
"""Differences of scores and similarities are a few hundredths; the network reads them larger."""


@dataclass
class States:
    """Requests under way; B requests, P pairs."""

    embedding: Float
    """(B, dim) of the query."""
    alpha: Float
    """(B,) in [0, 1]."""
    steps_left: Float
    """(B,) runs of a pair or of the planner that are still allowed."""
    usd_left: Float
    """(B,) inf without a limit."""
    seconds_left: Float
    """(B,) inf without a limit."""
    can_think: Bool
    """(B,) there is a planner, and it has not spoken yet."""
    thought: Bool
    """(B,) the planner has spoken."""
    present: Bool
    """(B, P) ready and admitted by the caller; padding is not."""
    descriptors: Float
    """(P, DESCRIPTOR_DIM) or (B, P, DESCRIPTOR_DIM), as `project` gives them."""
    costs_usd: Float
    """(B, P) expected of one run."""
    seconds: Float
    """(B, P) expected of one run; 0 where unknown."""
    log_cost_range: NDArray[np.float64]
    """(B, 2) natural logarithms of the dollars that cost 0 and 1 stand for; see
    `utility.cost_range`."""
    quality: Float
    """(B, P) path 1's expected score in [0, 1]."""
    spread: Float
    """(B, P) its standard deviation."""
    overall: Float
    """(B, P) expected score over all queries in [0, 1]."""
    similarity: Float
    """(B, P) of the query to the pair's card in [0, 1]."""
    decided: Float
    """(B, P) expected score by which path 1 decides: settled, or by the cards; in [0, 1]."""
    chance: Float
    """(B, P) that the pair's answer is right; NaN for a pair without one."""
    judged: Bool
    """(B,) whether a verifier judges the answers."""
    rise: Float
    """(B, P) of the best chance held, expected of the pair's run; see `worth.expected_rises`."""
    distance_quantile: Float
    """(B,) as the gate has it, in [0, 1]."""
    confidence: Float
    """(B,) of path 1 in its best pair, in [0, 1]."""
    tried: Bool
    """(B, P) ran on this request."""
    failed: Bool
    """(B, P) ran, and gave no answer."""
    logprob: Float
    """(B, P) mean token log-probability of the pair's answer; NaN where unknown."""
    tool_errors: Float
    """(B, P) tool calls of the pair's run that failed."""
    agreement: Float
    """(B, P) share of the voters so far that say the same as the pair; 0 where it has no answer.
    Candidates that never differed in the profile are one voter."""
    last: Index
    """(B,) pair that ran last; -1 before the first."""
    last_answer: Float
    """(B, dim) embedding of the last answer; zeros before the first."""
    spent_usd: Float
    """(B,)"""

    @property
    def num_pairs(self) -> int:
        """P."""
        return int(self.present.shape[1])

    def rows(self, rows: Index) -> States:
        """Some of the requests, in the order given."""
        parts = {
            field.name: getattr(self, field.name)[rows]
            for field in fields(self)
            if field.name != "descriptors" or self.descriptors.ndim == 3
        }
        return replace(self, **parts)


def think_action(num_pairs: int) -> int:
    """Index of `think`; those below route to the pair of the same index."""
    return num_pairs


def answer_action(num_pairs: int) -> int:
    """Index of `answer`, the last one."""
    return num_pairs + 1


def encode(states: States, legal: Bool | None = None) -> dict[str, NDArray[np.float32]]:
    """What the network reads.

    Args:
        states: Requests under way.
        legal: As of `legal_actions`, where that is known.

    Returns:
        `query` and `answer` (B, dim), `context` (B, NUM_CONTEXT), `candidates` (B, P,
        NUM_FEATURES), `worth` (B, P + 2) of each action to the rule `voi`, and `mask` (B, P + 2),
        1 where an action is open.
    """
    shape = states.present.shape
    legal = legal_actions(states) if legal is None else legal
    answers = states.tried & ~states.failed
    num_answers = answers.sum(axis=1)
    cost = normalised(states.costs_usd, states.log_cost_range[:, None, :])
    spent = normalised(states.spent_usd, states.log_cost_range)
    has_logprob = answers & np.isfinite(states.logprob)
    logprob = np.where(has_logprob, states.logprob, 0.0).clip(_LEAST_LOGPROB, 0.0)
    certainty = np.where(has_logprob, np.exp(logprob), 0.0)
    is_last = np.arange(shape[1]) == states.last[:, None]
    has_chance = answers & np.isfinite(states.chance)
    chance = np.where(has_chance, states.chance, 0.0)
    worth = worth_of(states, legal)
    columns = (
        cost,
        np.log10(np.maximum(states.seconds, 1e-3)) / 3,
        states.quality,
        states.spread,
        states.overall,
        states.similarity,
        _below_best(states.quality, states.present),
        _below_best(states.overall, states.present),
        _below_best(states.similarity, states.present),
        states.tried,
        states.failed,
        logprob / _LEAST_LOGPROB,
        certainty,
        has_logprob,
        np.minimum(states.tool_errors, 4.0) / 4,
        np.where(answers, states.agreement, 0.0),
        is_last,
        legal[:, : shape[1]],
        states.decided,
        has_chance,
        chance,
        states.rise,
        worth[:, : shape[1]].clip(-1.0, 1.0),
    )
    candidates = np.empty((*shape, NUM_FEATURES), np.float32)
    candidates[:, :, :DESCRIPTOR_DIM] = states.descriptors
    for place, column in enumerate(columns, DESCRIPTOR_DIM):
        candidates[:, :, place] = column
    candidates *= states.present[:, :, None]
    numbers = (
        states.alpha,
        trade(states.alpha),
        states.steps_left / MAX_STEPS,
        states.steps_left <= 1,
        np.isfinite(states.usd_left),
        _log_room(states.usd_left, np.exp(states.log_cost_range[:, 1])),
        np.isfinite(states.seconds_left),
        _log_room(states.seconds_left, np.full(shape[0], 10.0)),
        states.distance_quantile,
        states.confidence,
        num_answers / MAX_STEPS,
        np.where(num_answers > 1, np.where(answers, states.agreement, 0.0).max(axis=1), 0.0),
        certainty.max(axis=1),
        np.where(states.spent_usd > 0, np.minimum(spent, _MOST_SPENT), 0.0),
        states.thought,
        states.can_think,
        np.log10(np.maximum(states.present.sum(axis=1), 1)) / 2,
        chance.max(axis=1),
    )
    context = np.empty((shape[0], NUM_CONTEXT), np.float32)
    for place, number in enumerate(numbers):
        context[:, place] = number
    return {
        "query": states.embedding.astype(np.float32, copy=False),
        "answer": states.last_answer.astype(np.float32, copy=False),
        "context": context,
        "candidates": candidates,
        "worth": worth,
        "mask": open_actions(states, legal).astype(np.float32),
    }


def worth_of(states: States, legal: Bool) -> Float:
    """(B, P + 2) what each action is worth beside answering, in utility; see `worth.worths`."""
    gained = gains(
        states.alpha, states.rise, states.costs_usd, states.spent_usd, states.log_cost_range
    )
    holds = np.any(states.tried & ~states.failed, axis=1)
    return worths(gained, states.rise, holds, legal)


def legal_actions(states: States) -> Bool:
    """(B, P + 2) what may be done next; never nothing.

    A pair may run once, while steps, dollars and seconds last. `think` needs a step beside its own.
    `answer` needs an answer, or that nothing else is left.
    """
    room = (states.steps_left >= 1)[:, None]
    affordable = states.costs_usd <= states.usd_left[:, None]
    in_time = states.seconds <= states.seconds_left[:, None]
    route = states.present & ~states.tried & room & affordable & in_time
    # Before the first answer a request tries what it can, whatever the estimates say.
    none_yet = ~np.any(states.tried & ~states.failed, axis=1)
    hopeless = none_yet & ~np.any(route, axis=1)
    route |= hopeless[:, None] & states.present & ~states.tried & room & affordable
    may_route = np.any(route, axis=1)
    think: Bool = states.can_think & (states.steps_left >= 2) & may_route
    answer: Bool = ~none_yet | ~may_route
    return np.concatenate([route, think[:, None], answer[:, None]], axis=1)


def openings(states: States, legal: Bool) -> Index:
    """(B,) the pair that the cards have run first; -1 where what was learned decides.

    On a query at the edge of the profile, or beyond, what was learned of like ones may be of
    another kind. Where further runs may follow and answers are judged, a first run of the pair
    whose card speaks for it costs little, and is there to be returned. Its price does not count:
    likeness to a card is no score that dollars could be held against.

    Args:
        states: Requests under way.
        legal: (B, P + 2) as of `legal_actions`.
    """
    routes = legal[:, : states.num_pairs]
    alone = states.similarity * routes
    is_open = (
        states.judged
        & (states.distance_quantile >= OPENING_QUANTILE)
        & (states.steps_left >= 2)
        & (states.alpha <= OPENING_MAX_ALPHA)
        & ~np.any(states.tried, axis=1)
        & np.any(alone > 0, axis=1)
    )
    return np.where(is_open, alone.argmax(axis=1), -1)


def open_actions(states: States, legal: Bool) -> Bool:
    """(B, P + 2) the legal actions of which one is taken: no other run where the cards choose."""
    chosen = openings(states, legal)
    rows = np.flatnonzero(chosen >= 0)
    if not len(rows):
        return legal
    found = legal.copy()
    found[rows, : states.num_pairs] = False
    found[rows, chosen[rows]] = True
    return found


def voices(keys: Index, voters: Index) -> Float:
    """(B, steps) what each step's vote counts: steps of one voter that say the same share a vote.

    Args:
        keys: (B, steps) equal for equal answers, `NO_ANSWER` for none.
        voters: (B, steps) who gave each; candidates that never differed are one voter.
    """
    given = keys != NO_ANSWER
    same = (keys[:, :, None] == keys[:, None, :]) & (voters[:, :, None] == voters[:, None, :])
    return np.where(given, 1 / np.maximum((same & given[:, None, :]).sum(axis=2), 1), 0.0).astype(
        np.float32
    )


def best_answers(keys: Index, voters: Index | None = None) -> Index:
    """(B,) the step whose answer is returned: the last that most agree on; `NO_ANSWER` if none.

    Args:
        keys: (B, steps) equal for equal answers, `NO_ANSWER` for none.
        voters: As of `voices`; `None`: each step is another's.
    """
    if voters is None:
        voters = np.broadcast_to(np.arange(keys.shape[1]), keys.shape)
    same = keys[:, :, None] == keys[:, None, :]
    votes = np.round((same * voices(keys, voters)[:, None, :]).sum(axis=2), 4)
    votes = np.where(keys != NO_ANSWER, votes, 0.0)
    last = votes.shape[1] - 1 - votes[:, ::-1].argmax(axis=1)
    return np.where(votes.max(axis=1, initial=0) > 0, last, NO_ANSWER)


def project(descriptors: Float) -> Float:
    """(num_pairs, DESCRIPTOR_DIM) descriptors in fewer numbers, by one fixed random projection.

    It nearly keeps the angles between them (Johnson and Lindenstrauss, 1984).

    Args:
        descriptors: (num_pairs, dim) as `cold_start.pair_descriptors` gives them, price last; the
            price is left out.
    """
    projected: Float = descriptors[:, :-1] @ _projection(descriptors.shape[1] - 1)
    return projected


@cache
def _projection(dim: int) -> Float:
    rng = np.random.default_rng(_PROJECTION_SEED)
    drawn = rng.standard_normal((dim, DESCRIPTOR_DIM), np.float32)
    return drawn / np.float32(np.sqrt(DESCRIPTOR_DIM))


def _below_best(values: Float, present: Bool) -> Float:
    """Each value minus the best of the present ones, in [-1, 0]."""
    best = np.where(present, values, -np.inf).max(axis=1, initial=-1.0)
    below: Float = (_SCORE_SCALE * (values - best[:, None])).clip(-1.0, 0.0)
    return below


def _log_room(left: Float, unit: Float) -> Float:
    """What is left as a multiple of a unit, on a log scale in [-1, 1]; 1 without a limit."""
    share = np.log10(np.maximum(np.where(np.isfinite(left), left, 1e30) / unit, 1e-3)) / 3
    room: Float = share.clip(-1.0, 1.0)
    return room
