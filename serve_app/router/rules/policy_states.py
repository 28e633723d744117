"""From requests and what path 1 believes of them to the states that the network reads.

`router.policy.features` says what a state is and encodes it, in training and in serving alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.router.policy.features import (
    DESCRIPTOR_DIM,
    MAX_STEPS,
    NO_ANSWER,
    States,
    best_answers,
    project,
)
from serve_app.router.policy.worth import expected_rises
from serve_app.router.rules.admission import Admission
from serve_app.router.rules.base import Batch, RoutingRequest
from serve_app.router.rules.beliefs import Beliefs, Prior
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.gate import settle_rows
from serve_app.router.rules.judge import Judge
from serve_app.router.rules.utility import cost_range
from serve_app.schemas import Pair, Seen

_ROOMY_RUNS = 5.0
"""A deadline longer than so many runs of the slowest pair counts as none: the policy learned from
limits that bind."""


class PolicyStates:
    """Lays out requests over the pairs of a rule.

    Invariant: one thread at a time.
    """

    def __init__(
        self, clusters: ClusterRule, prior: Prior | None, judge: Judge | None = None
    ) -> None:
        """Lay out what never changes.

        Args:
            clusters: Path 1 of the same snapshot.
            prior: Has the pairs' descriptors.
            judge: Of the answers; `None`: an answer is as likely right as its pair.
        """
        self._clusters = clusters
        self._judge = judge
        self._num_profiled = len(clusters.snapshot.pairs)
        self._index = {pair: i for i, pair in enumerate(clusters.pairs)}
        self._admission = Admission(clusters.pairs)
        self._descriptors = _lay_out_descriptors(clusters.pairs, prior)
        self._voters = clusters.voters
        self._thinks = clusters.snapshot.thinks

    def columns(
        self, requests: Sequence[RoutingRequest], available: tuple[Pair, ...]
    ) -> NDArray[np.intp]:
        """Which pairs have a row: those that answer now, and those that ran on a request.

        Args:
            requests: Those that path 2 decides.
            available: Pairs that answer now.
        """
        columns = self._admission.available(available)
        ran = {
            self._index[seen.pair]
            for request in requests
            for seen in request.history
            if seen.pair in self._index
        }
        gone = sorted(ran - set(columns.tolist())) if ran else []
        return np.concatenate([columns, np.array(gone, np.intp)]) if gone else columns

    def chances(self, request: RoutingRequest, beliefs: Beliefs) -> tuple[float | None, ...]:
        """Of each step the chance that its answer is right; empty where nothing judges."""
        return () if self._judge is None else self._judge.chances(request, beliefs)

    def of(
        self,
        requests: Sequence[RoutingRequest],
        batch: Batch,
        beliefs: Sequence[Beliefs],
        columns: NDArray[np.intp],
        chances: Sequence[tuple[float | None, ...]],
    ) -> States:
        """What the network reads of the requests, before it is encoded.

        Args:
            requests: Those that path 2 decides.
            batch: What they came with.
            beliefs: Path 1's, of each.
            columns: As `columns` gives them.
            chances: Of each request, as `chances` gives them.
        """
        size, num_pairs = len(requests), len(columns)
        place = {pair: column for column, pair in enumerate(columns.tolist())}
        num_available = len(self._admission.available(batch.available))
        present = np.zeros((size, num_pairs), np.bool_)
        tried = np.zeros((size, num_pairs), np.bool_)
        failed = np.zeros((size, num_pairs), np.bool_)
        logprob = np.full((size, num_pairs), np.nan, np.float32)
        tool_errors = np.zeros((size, num_pairs), np.float32)
        agreement = np.zeros((size, num_pairs), np.float32)
        chance = np.full((size, num_pairs), np.nan, np.float32)
        last = np.full(size, -1, np.intp)
        for row, asked in enumerate(requests):
            present[row, :num_available] = self._admission.admits(
                asked.limits, columns[:num_available], batch.abilities
            )
            runs = [(place[self._index[seen.pair]], seen) for seen in asked.history
                    if seen.pair in self._index]  # fmt: skip
            said = [(self._voters[columns[c]], of.answer_key) for c, of in runs if of.answer_key]
            for column, seen in runs:
                present[row, column] = tried[row, column] = True
                failed[row, column] = seen.answer_key is None
                if seen.mean_logprob is not None:
                    logprob[row, column] = seen.mean_logprob
                tool_errors[row, column] = seen.tool_errors
                if seen.answer_key is not None:
                    agreeing = {voter for voter, key in said if key == seen.answer_key}
                    agreement[row, column] = len(agreeing) / len(set(said))
                last[row] = column
            for seen, known in zip(asked.history, chances[row], strict=False):
                if known is not None and seen.pair is not None:
                    chance[row, place[self._index[seen.pair]]] = known
        thought = np.array([any(seen.pair is None for seen in a.history) for a in requests])
        spent_usd = np.array([sum(seen.cost_usd for seen in a.history) for a in requests])
        limits_usd = [a.limits.max_cost_usd for a in requests]
        max_usd = np.array([np.inf if usd is None else usd for usd in limits_usd])
        steps_left = np.array(
            [min(a.limits.max_steps, MAX_STEPS) - len(a.history) for a in requests]
        )
        costs_usd = np.broadcast_to(self._clusters.costs_usd[columns], (size, num_pairs))
        seconds = np.broadcast_to(self._clusters.seconds[columns], (size, num_pairs))
        dearest_usd = steps_left * np.where(present, costs_usd, 0.0).max(axis=1)
        slowest_s = np.where(present, seconds, 0.0).max(axis=1)
        nothing = np.zeros(self._clusters.snapshot.dim, np.float32)
        quality, spread, overall, outside = (
            np.stack([getattr(of, name)[columns] for of in beliefs])
            for name in ("quality", "spread", "overall", "outside")
        )
        admitted = present & (columns < self._num_profiled)
        settled = settle_rows(quality, spread, overall, admitted, self._clusters.snapshot.caution)
        inside = np.array([of.place.inside for of in beliefs])
        decided = np.where(inside[:, None], settled, outside)
        if self._judge is None:
            chance = np.where(tried & ~failed, decided, np.nan)
        outlook = None if self._judge is None else self._judge.verifier.outlook
        return States(
            embedding=np.stack([a.embedding for a in requests]).astype(np.float32, copy=False),
            alpha=_row([a.limits.alpha for a in requests]),
            steps_left=_row(steps_left),
            usd_left=_unless_roomy(np.maximum(max_usd - spent_usd, 0.0), dearest_usd),
            seconds_left=_unless_roomy(
                np.array([a.limits.deadline_s for a in requests]), _ROOMY_RUNS * slowest_s
            ),
            can_think=~thought & np.array([self._thinks and batch.can_think(a) for a in requests]),
            thought=thought,
            present=present,
            descriptors=self._descriptors[columns],
            costs_usd=costs_usd,
            seconds=seconds,
            log_cost_range=cost_range(costs_usd, present),
            quality=quality,
            spread=spread,
            overall=overall,
            similarity=np.stack([b.similarity[columns] for b in beliefs]),
            decided=decided,
            chance=chance,
            judged=np.full(size, self._judge is not None),
            rise=expected_rises(decided, chance, self._voters[columns], outlook),
            distance_quantile=_row([b.verdict.distance_quantile for b in beliefs]),
            confidence=_row([b.verdict.confidence for b in beliefs]),
            tried=tried,
            failed=failed,
            logprob=logprob,
            tool_errors=tool_errors,
            agreement=agreement,
            last=last,
            last_answer=np.stack(
                [nothing if a.last_answer is None else a.last_answer for a in requests]
            ).astype(np.float32, copy=False),
            spent_usd=_row(spent_usd),
        )


def most_agreed(history: Sequence[Seen], clusters: ClusterRule) -> int | None:
    """The step whose answer most voters agree on; `None`: there is no answer.

    Args:
        history: What the steps showed.
        clusters: Knows who is one voter with whom.
    """
    if not history:
        return None
    index = {pair: i for i, pair in enumerate(clusters.pairs)}
    number = {key: n for n, key in enumerate({seen.answer_key: 0 for seen in history})}
    keys = [NO_ANSWER if of.answer_key is None else number[of.answer_key] for of in history]
    voter = clusters.voters
    voters = [
        voter[index[of.pair]] if of.pair in index else -1 - step for step, of in enumerate(history)
    ]
    best = int(best_answers(np.array([keys], np.intp), np.array([voters], np.intp))[0])
    return None if best == NO_ANSWER else best


def _lay_out_descriptors(pairs: tuple[Pair, ...], prior: Prior | None) -> NDArray[np.float32]:
    """(num_pairs, DESCRIPTOR_DIM); zeros for a pair without a card."""
    laid_out = np.zeros((len(pairs), DESCRIPTOR_DIM), np.float32)
    if prior is None or prior.descriptors is None:
        return laid_out
    projected = project(prior.descriptors)
    place = {pair: row for row, pair in enumerate(prior.pairs)}
    for row, pair in enumerate(pairs):
        if pair in place:
            laid_out[row] = projected[place[pair]]
    return laid_out


def _unless_roomy(
    left: NDArray[np.floating[Any]], needed: NDArray[np.floating[Any]]
) -> NDArray[np.float32]:
    """What is left, or inf where that is more than can be needed."""
    return _row(np.where(left > needed, np.inf, left))


def _row(values: Any) -> NDArray[np.float32]:
    return np.asarray(values, np.float32)
