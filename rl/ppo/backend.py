"""What runs the pairs of an episode: a profile's record, or the pool itself (`rl.ppo.live`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rl.ppo.table import ReplayTable
from serve_app.router.policy.features import NO_ANSWER
from serve_app.signals import NUMBERS

Float = NDArray[np.float32]
Bool = NDArray[np.bool_]
Index = NDArray[np.intp]


@dataclass(frozen=True)
class StepBatch:
    """What runs of pairs showed; n runs."""

    score: Float
    """(n,) in [0, 1]."""
    cost_usd: Float
    """(n,)"""
    seconds: Float
    """(n,) 0 where unknown."""
    logprob: Float
    """(n,) NaN where unknown."""
    tool_errors: Float
    """(n,)"""
    answer_key: Index
    """(n,) equal within an episode for answers that say the same; `NO_ANSWER` for none."""
    answer_embedding: Float
    """(n, dim) zeros for none."""
    signals: Float
    """(n, len(NUMBERS)) as `Signals.numbers`, NaN where not kept."""


@dataclass(frozen=True)
class ThoughtBatch:
    """What the planner's runs took; n runs."""

    cost_usd: Float
    """(n,)"""
    seconds: Float
    """(n,)"""


class Backend(Protocol):
    """Runs pairs and the planner for episodes that are told apart by their row."""

    @property
    def table(self) -> ReplayTable:
        """The queries, the pairs and what is believed of them; outcomes where they are known."""

    @property
    def can_run(self) -> Bool:
        """(N, P) pairs that may be run on a query; an episode needs one."""

    @property
    def can_think(self) -> Bool:
        """(N,) queries on which the planner may speak."""

    def start(self, rows: Index, queries: Index) -> None:
        """Forget what was said in some episodes: others begin in their rows.

        Args:
            rows: (n,) the episodes, each at most once.
            queries: (n,) rows of the table.
        """

    def run(self, rows: Index, queries: Index, pairs: Index, thought: Bool) -> StepBatch:
        """Run one pair each for some episodes.

        Args:
            rows: (n,) the episodes, each at most once.
            queries: (n,) rows of the table.
            pairs: (n,) columns of the table.
            thought: (n,) whether the planner has spoken in the episode.
        """

    def think(self, rows: Index, queries: Index) -> ThoughtBatch:
        """Run the planner for some episodes; its text joins what their later runs read.

        Args:
            rows: (n,) the episodes, each at most once.
            queries: (n,) rows of the table.
        """


class ReplayBackend:
    """Answers from the record; the same run always shows the same.

    A thought was recorded before any answer; one that comes after some is taken to say the same.
    """

    def __init__(self, table: ReplayTable) -> None:
        """Take over the record."""
        self._table = table
        self._seconds = np.nan_to_num(table.seconds, nan=0.0)
        nothing = np.full((*table.score.shape, len(NUMBERS)), np.nan, np.float32)
        self._signals = nothing if table.signals is None else table.signals
        self._can_think: Bool = np.zeros(table.num_queries, np.bool_)
        if table.has_thoughts:
            # A thought must not take pairs away.
            self._can_think = (table.measured[1] | ~table.measured[0]).all(axis=1)

    @property
    def table(self) -> ReplayTable:
        """The record."""
        return self._table

    @property
    def can_run(self) -> Bool:
        """(N, P) pairs whose outcome on a query is known."""
        measured: Bool = self._table.measured[0]
        return measured

    @property
    def can_think(self) -> Bool:
        """(N,) queries whose outcomes after a thought are known."""
        return self._can_think

    def start(self, rows: Index, queries: Index) -> None:
        """Nothing to forget."""

    def run(self, rows: Index, queries: Index, pairs: Index, thought: Bool) -> StepBatch:
        """Look the runs up."""
        table = self._table
        place = (thought.astype(np.intp), queries, pairs)
        return StepBatch(
            score=table.score[place],
            cost_usd=table.costs_usd[place],
            seconds=self._seconds[place],
            logprob=table.logprob[place],
            tool_errors=table.tool_errors[place],
            answer_key=np.where(table.measured[place], table.answer_key[place], NO_ANSWER),
            answer_embedding=table.answer_embeddings[table.answer_row[place]],
            signals=self._signals[place],
        )

    def think(self, rows: Index, queries: Index) -> ThoughtBatch:
        """Look the thoughts up."""
        return ThoughtBatch(self._table.think_cost_usd[queries], self._table.think_seconds[queries])
