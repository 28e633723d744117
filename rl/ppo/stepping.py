"""Requests of several steps, replayed by the very rule that would serve them.

In come a rule, and what every candidate answered on the held-out questions; out comes what each
request came to. The rule is asked as a router replica is, with what its steps showed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rl.evaluate.held_out import HeldOut
from rl.evaluate.policies import UNLIMITED_S, Reached
from rl.ppo.table import ReplayTable
from serve_app.errors import AtlasError, ConfigError
from serve_app.router.policy.features import NO_ANSWER
from serve_app.router.rules.base import Batch, Deciding, RoutingRequest
from serve_app.router.rules.utility import normalised, pool_range
from serve_app.schemas import Action, Decision, Limits, Pair, Seen

_BATCH = 256
"""Requests that are asked about at once."""


@dataclass
class _Request:
    """One replayed request under way."""

    query: int
    """Row of the table."""
    asked: RoutingRequest
    ran: list[int]
    """Columns, in their order."""
    first: Decision | None = None
    answer_step: int | None = None
    is_over: bool = False


@dataclass(frozen=True)
class ReplayedRule:
    """A rule of several steps on held-out queries; it never thinks."""

    rule: Deciding
    table: ReplayTable
    """Of all held-out queries; its views do not matter."""
    max_steps: int

    def reach(self, held_out: HeldOut, alphas: Sequence[float]) -> Reached:
        """Answer every held-out query at every alpha.

        Raises:
            ConfigError: If the table is of other queries or pairs, or the rule cannot decide.
        """
        if self.table.pairs != held_out.pairs or len(self.table.embeddings) <= max(held_out.rows):
            raise ConfigError("the replayed table is of other pairs or fewer queries")
        table = self.table.select(queries=held_out.rows)
        shape = (len(alphas), table.num_queries)
        score, costs_usd, cost, steps, confidence = (np.zeros(shape) for _ in range(5))
        inside = np.ones(shape, np.bool_)
        usual = pool_range(held_out.pair_costs_usd)
        for row, alpha in enumerate(alphas):
            for request in self.answer(table, alpha):
                query, ran = request.query, request.ran
                answered = request.answer_step
                if answered is not None:
                    score[row, query] = table.score[0, query, ran[answered]]
                costs_usd[row, query] = table.costs_usd[0, query, ran].sum()
                together = np.array(held_out.pair_costs_usd[ran].sum())
                cost[row, query] = float(normalised(together, usual))
                steps[row, query] = len(ran)
                assert request.first is not None
                confidence[row, query] = request.first.confidence
        return Reached(score, costs_usd, cost, steps, inside, confidence)

    def answer(self, table: ReplayTable, alpha: float) -> list[_Request]:
        """What the queries of a table come to at one alpha.

        Raises:
            ConfigError: If the rule refuses a request, or explores.
        """
        limits = Limits(alpha=alpha, deadline_s=UNLIMITED_S, max_steps=self.max_steps)
        requests = [
            _Request(query, RoutingRequest(embedding, limits), [])
            for query, embedding in enumerate(table.embeddings)
        ]
        while under_way := [request for request in requests if not request.is_over]:
            for start in range(0, len(under_way), _BATCH):
                self._step(table, under_way[start : start + _BATCH])
        return requests

    def _step(self, table: ReplayTable, requests: Sequence[_Request]) -> None:
        batch = Batch(tuple(request.asked for request in requests), table.pairs, 0)
        for request, decision in zip(requests, self.rule.decide(batch), strict=True):
            if isinstance(decision, AtlasError):
                raise ConfigError(f"the rule refuses a replayed request: {decision.message}")
            if decision.propensity < 1:
                raise ConfigError("the rule explores: switch it off to evaluate it")
            request.first = request.first or decision
            if decision.action is not Action.ROUTE:
                request.answer_step, request.is_over = decision.answer_step, True
                continue
            self._run(table, request, decision.pair)

    def _run(self, table: ReplayTable, request: _Request, pair: Pair) -> None:
        """Let a request see what a candidate answered."""
        query, column = request.query, table.pairs.index(pair)
        key = int(table.answer_key[0, query, column])
        logprob = float(table.logprob[0, query, column])
        vector: NDArray[np.float32] | None = None
        if row := int(table.answer_row[0, query, column]):
            vector = table.answer_embeddings[row]
        signals = () if table.signals is None else tuple(table.signals[0, query, column].tolist())
        seen = Seen(
            pair=pair,
            answer_key=None if key == NO_ANSWER else str(key),
            mean_logprob=None if np.isnan(logprob) else logprob,
            tool_errors=int(table.tool_errors[0, query, column]),
            cost_usd=float(table.costs_usd[0, query, column]),
            signals=signals,
        )
        asked = request.asked
        request.ran.append(column)
        request.asked = replace(
            asked,
            history=(*asked.history, seen),
            last_answer=vector,
            answers=(*asked.answers, vector),
        )
