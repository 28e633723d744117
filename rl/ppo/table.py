"""A profile as a policy meets it: what each pair answered on each query, and what path 1 believed.

Plain arrays, so that a process which only steps environments imports nothing of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rl.ppo.judges import Judges
from serve_app.schemas import Pair

Float = NDArray[np.float32]
Bool = NDArray[np.bool_]
Index = NDArray[np.intp]

_OUTCOMES = (
    "score",
    "costs_usd",
    "seconds",
    "logprob",
    "tool_errors",
    "measured",
    "answer_key",
    "answer_row",
)
"""Fields of a table whose axes are (T, N, P)."""


@dataclass(frozen=True)
class View:
    """Path 1's beliefs on the queries of a table, by one way of fitting.

    N queries, P pairs; fields as in `serve_app.router.rules.clusters.Beliefs`.
    """

    quality: Float
    """(N, P) expected scores in [0, 1]."""
    spread: Float
    """(N, P) their standard deviations."""
    overall: Float
    """(N, P) expected scores over all queries in [0, 1]."""
    outside: Float
    """(N, P) those by which path 1 decides outside the profiled distribution, in [0, 1]."""
    distance_quantile: Float
    """(N,) in [0, 1]."""
    confidence: Float
    """(N,) of path 1 in its best pair, in [0, 1]."""
    inside: Bool
    """(N,) whether path 1 knows this kind of query."""

    def select(self, queries: Index | slice, pairs: Index | slice) -> View:
        """Of some of the queries and pairs."""
        return View(
            self.quality[queries][:, pairs],
            self.spread[queries][:, pairs],
            self.overall[queries][:, pairs],
            self.outside[queries][:, pairs],
            self.distance_quantile[queries],
            self.confidence[queries],
            self.inside[queries],
        )


@dataclass(frozen=True)
class ReplayTable:
    """Outcomes of a profile as a policy sees them; N queries, P pairs.

    The first axis T of the outcomes is 1, or 2 where it was also recorded what the pairs did after
    the planner had spoken (index 1).
    """

    encoder: str
    pairs: tuple[Pair, ...]
    embeddings: Float
    """(N, dim) unit vectors."""
    domains: tuple[str, ...]
    """(N,) empty where unknown."""
    score: Float
    """(T, N, P) in [0, 1]; 0 where not measured."""
    costs_usd: Float
    """(T, N, P) the pair's mean where unknown."""
    seconds: Float
    """(T, N, P) NaN where unknown."""
    logprob: Float
    """(T, N, P) mean token log-probability of the answer; NaN where unknown."""
    tool_errors: Float
    """(T, N, P) tool calls that failed."""
    measured: Bool
    """(T, N, P) a pair without an outcome on a query is absent from its episodes."""
    answer_key: Index
    """(T, N, P) equal within a query for answers that say the same; `NO_ANSWER` for none."""
    answer_row: Index
    """(T, N, P) row of `answer_embeddings`; 0 for none."""
    answer_embeddings: Float
    """(U, dim) of the distinct answers; row 0 is zero."""
    similarity: Float
    """(N, P) of the queries to the pairs' cards in [0, 1]."""
    descriptors: Float
    """(P, DESCRIPTOR_DIM) as `features.project` gives them."""
    pair_costs_usd: Float
    """(P,) expected of one run."""
    pair_seconds: Float
    """(P,) expected of one run; 0 where unknown."""
    think_cost_usd: Float
    """(N,) of the planner, the mean where unknown; 0 where T is 1."""
    think_seconds: Float
    """(N,) of the planner, the mean where unknown; 0 where T is 1."""
    views: tuple[View, ...]
    """For training: fitted without the query's fold, fitted without its group. For evaluation: the
    snapshot's own."""
    queries: tuple[str, ...] = ()
    """(N,) texts; may be left out where nothing is run live."""
    new_models: View | None = None
    """For training: what path 1 would believe of the pairs of a model that has just joined, each
    model in its turn. Its verdicts say nothing."""
    new_tools: View | None = None
    """The same of tools."""
    signals: Float | None = None
    """(T, N, P, len(NUMBERS)) as `Signals.numbers`, NaN where not kept; `None`: none were."""
    judges: Judges | None = None
    """The verifiers that say how likely answers are right, by view; `None`: there are none."""
    caution: float = 0.0
    """Of path 1's snapshot, see `gate.settle`."""
    voters: Index | None = None
    """(P,) as of `serve_app.router.policy.features.voices`; `None`: each pair is one."""

    @property
    def num_queries(self) -> int:
        """N."""
        return len(self.embeddings)

    @property
    def num_pairs(self) -> int:
        """P."""
        return len(self.pairs)

    @property
    def has_thoughts(self) -> bool:
        """Whether outcomes after a thought are known."""
        return len(self.score) > 1

    def voter_of(self, pairs: Index) -> Index:
        """The voters of some pairs, of any shape; what is no pair votes for itself."""
        return pairs if self.voters is None else np.where(pairs < 0, pairs, self.voters[pairs])

    def without_thoughts(self) -> ReplayTable:
        """The same as if there were no planner: T is 1."""
        nothing = np.zeros(self.num_queries, np.float32)
        first = {name: getattr(self, name)[:1] for name in _OUTCOMES}
        signals = None if self.signals is None else self.signals[:1]
        return replace(
            self, think_cost_usd=nothing, think_seconds=nothing, signals=signals, **first
        )

    def select(
        self, *, queries: Sequence[int] | Index | None = None, pairs: Sequence[int] | Index = ()
    ) -> ReplayTable:
        """The same of some queries and pairs, in the order given.

        Args:
            queries: Rows; `None` takes all.
            pairs: Columns; none takes all.
        """
        rows = slice(None) if queries is None else np.asarray(queries, np.intp)
        columns = np.asarray(pairs, np.intp) if len(pairs) else np.arange(self.num_pairs)
        outcomes = {name: getattr(self, name)[:, rows][:, :, columns] for name in _OUTCOMES}
        places = range(self.num_queries) if queries is None else np.asarray(queries).tolist()
        return replace(
            self,
            pairs=tuple(self.pairs[column] for column in columns),
            embeddings=self.embeddings[rows],
            domains=tuple(self.domains[place] for place in places),
            queries=tuple(self.queries[place] for place in places) if self.queries else (),
            similarity=self.similarity[rows][:, columns],
            descriptors=self.descriptors[columns],
            pair_costs_usd=self.pair_costs_usd[columns],
            pair_seconds=self.pair_seconds[columns],
            think_cost_usd=self.think_cost_usd[rows],
            think_seconds=self.think_seconds[rows],
            views=tuple(view.select(rows, columns) for view in self.views),
            new_models=None if self.new_models is None else self.new_models.select(rows, columns),
            new_tools=None if self.new_tools is None else self.new_tools.select(rows, columns),
            signals=None if self.signals is None else self.signals[:, rows][:, :, columns],
            voters=None if self.voters is None else self.voters[columns],
            judges=None if self.judges is None else self.judges.select(rows, columns),
            **outcomes,
        )
