"""Requests of several steps replayed, greedily, by the policy that would serve them.

In come a table of outcomes with what path 1 believes, and a network; out comes what every query's
request came to. The episodes are those of training without their draws, so that the network sees
the states it would see in serving. Many queries share one pass through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rl.evaluate.held_out import HeldOut
from rl.evaluate.policies import Reached, ask
from rl.ppo.episodes import Episodes
from rl.ppo.randomise import EnvSettings, as_unknown
from rl.ppo.replay import with_rule
from rl.ppo.table import ReplayTable, View
from serve_app.errors import ConfigError
from serve_app.router.policy.features import answer_action
from serve_app.router.policy.policy_net import PolicyNet
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.gate import POLICY_MAX_ALPHA, settle_rows
from serve_app.router.rules.policy_rule import LearnedRule
from serve_app.router.rules.utility import normalised, normalised_cost, pool_range, utility

PATH_1_ALONE, PATH_2_ALONE = 0.0, 1.01
"""Thresholds of the gate that leave every query to path 1, and every query to path 2."""
GATE_THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, PATH_2_ALONE)
"""Those that are tried. Few, because the finest choice is the luckiest one."""
GATE_ALPHAS = (0.0, 0.02, 0.1, 0.3, POLICY_MAX_ALPHA)
_BATCH = 1024


@dataclass(frozen=True)
class Requests:
    """What each query's request came to; all arrays (num_queries,)."""

    score: NDArray[np.float64]
    """Of the answer that was returned, in [0, 1]."""
    costs_usd: NDArray[np.float64]
    """US dollars of all steps, as observed."""
    cost: NDArray[np.float64]
    """The pairs' mean dollars together on the pool's scale; see `contenders.Reached`."""
    steps: NDArray[np.float64]
    """Runs of a pair or of the planner."""
    pair: NDArray[np.intp]
    """Column of the pair whose answer was returned; -1 for none."""
    confidence: NDArray[np.float64]
    """In [0, 1], stated with the first decision."""
    by_policy: NDArray[np.bool_]
    """Whether path 2 decided."""

    def utility(self, alpha: float) -> NDArray[np.float64]:
        """(num_queries,) `(1 - alpha) * score - alpha * cost`."""
        return utility(alpha, self.score, self.cost)


class Chooser(Protocol):
    """Says what episodes do next."""

    def choose(
        self, episodes: Episodes, rows: NDArray[np.intp]
    ) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """(n,) an action of each of some episodes, and (n,) how sure it is of it, in [0, 1]."""


@dataclass(frozen=True)
class Greedy:
    """Always a network's likeliest action."""

    net: PolicyNet

    def choose(
        self, episodes: Episodes, rows: NDArray[np.intp]
    ) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """See `Chooser`."""
        observation = {name: array[rows] for name, array in episodes.observe().items()}
        return _greedy(self.net, observation)


def roll_out(
    chooser: Chooser,
    table: ReplayTable,
    alpha: float,
    *,
    max_steps: int,
    view: int = 0,
    pair_costs_usd: NDArray[np.floating] | None = None,
) -> Requests:
    """Let a chooser answer every query of a table.

    Args:
        chooser: For example `Greedy` with path 2's network.
        table: What the pairs answered, and what path 1 believes. Every query has an outcome.
        alpha: Cost-quality dial in [0, 1].
        max_steps: Of a request.
        view: Which of the table's beliefs are shown.
        pair_costs_usd: (num_pairs,) mean dollars that the cost is counted in; `None` takes the
            table's.

    Raises:
        ConfigError: If a query has no outcome, or the table has no such view.
    """
    if not 0 <= view < len(table.views):
        raise ConfigError(f"the table has {len(table.views)} views, none at {view}")
    size = table.num_queries
    episodes = Episodes(table, size, EnvSettings(randomise=False))
    everyone = np.arange(size)
    episodes.reset(queries=everyone, alpha=alpha, max_steps=max_steps, view=view)
    score, pair, confidence = np.zeros(size), np.full(size, -1, np.intp), np.zeros(size)
    is_first = True
    while episodes.active.any():
        rows = np.flatnonzero(episodes.active)
        actions = np.full(size, answer_action(table.num_pairs), np.intp)
        actions[rows], chances = chooser.choose(episodes, rows)
        if is_first:
            confidence[rows], is_first = chances, False
        stepped = episodes.step(actions)
        ended = rows[stepped.done[rows]]
        score[ended] = stepped.info["score"][ended]
        pair[ended] = stepped.info["pair"][ended]
    means = table.pair_costs_usd if pair_costs_usd is None else pair_costs_usd
    thought = episodes.states.thought
    usd = episodes.states.tried @ means.astype(np.float64) + thought * table.think_cost_usd.mean()
    return Requests(
        score=score,
        costs_usd=episodes.states.spent_usd.astype(np.float64),
        cost=normalised(usd, pool_range(means)).astype(np.float64),
        steps=stepped.info["steps"].astype(np.float64),
        pair=pair,
        confidence=confidence,
        by_policy=np.ones(size, np.bool_),
    )


def run_once(
    table: ReplayTable,
    chosen: NDArray[np.intp],
    confidence: NDArray[np.floating],
    *,
    pair_costs_usd: NDArray[np.floating] | None = None,
) -> Requests:
    """Requests of one step each.

    Args:
        table: What the pairs answered.
        chosen: (num_queries,) columns of the pairs.
        confidence: (num_queries,) stated, in [0, 1].
        pair_costs_usd: As of `roll_out`.
    """
    rows = np.arange(table.num_queries)
    means = table.pair_costs_usd if pair_costs_usd is None else pair_costs_usd
    return Requests(
        score=table.score[0, rows, chosen].astype(np.float64),
        costs_usd=table.costs_usd[0, rows, chosen].astype(np.float64),
        cost=normalised_cost(means).astype(np.float64)[chosen],
        steps=np.ones(len(rows)),
        pair=chosen,
        confidence=np.asarray(confidence, np.float64),
        by_policy=np.zeros(len(rows), np.bool_),
    )


def gated(first: Requests, second: Requests, keeps: NDArray[np.bool_]) -> Requests:
    """Each query by the path that the gate sends it to.

    Args:
        first: By path 1.
        second: By path 2.
        keeps: (num_queries,) whether path 1 keeps it.
    """
    return Requests(
        *(
            np.where(keeps, getattr(first, name), getattr(second, name))
            for name in Requests.__dataclass_fields__
        )
    )


def choose_gate(
    net: PolicyNet,
    table: ReplayTable,
    *,
    caution: float,
    max_steps: int,
    alphas: Sequence[float] = GATE_ALPHAS,
) -> float:
    """The confidence from which path 1 should keep a request.

    The highest threshold whose mean utility, over the table's views and the alphas, is within one
    standard error of the best one's (Breiman et al., 1984; the error is that of the difference, on
    the same queries).
    The views make it count both what path 1 knows of queries like the profiled ones and what it
    only seems to know of a kind that was not profiled. Path 2 was trained on those kinds, so there
    it is shown scrambled queries, as in its validation. The highest, because path 1 has to have
    shown that such a confidence is worth it: only path 2 sees the answer and can still change its
    mind.

    Args:
        net: Path 2.
        table: Queries that path 2 was not trained on say most; never those it is evaluated on.
        caution: The snapshot's; decides for path 1 where its beliefs leave doubt.
        max_steps: Of a request.
        alphas: Cost-quality dials in [0, 1].

    Returns:
        One of `GATE_THRESHOLDS`.
    """
    gains = np.zeros((len(GATE_THRESHOLDS), table.num_queries))
    unknown = as_unknown(table)
    for number, view in enumerate(table.views):
        kept = [view.confidence >= threshold for threshold in GATE_THRESHOLDS]
        chosen = path_1_choices(view, table, caution, alphas)
        for alpha, choice in zip(alphas, chosen, strict=True):
            first = run_once(table, choice, view.confidence).utility(alpha)
            second = np.mean(
                [
                    roll_out(Greedy(net), seen, alpha, max_steps=max_steps, view=number).utility(
                        alpha
                    )
                    for seen in (unknown if number else [table])
                ],
                axis=0,
            )
            gains += [np.where(keeps, first, second) for keeps in kept]
    lost = gains[gains.mean(axis=1).argmax()] - gains
    error = lost.std(axis=1) / np.sqrt(table.num_queries)
    good = np.flatnonzero(lost.mean(axis=1) <= error + 1e-9)
    return GATE_THRESHOLDS[int(good[-1])]


def path_1_choices(
    view: View, table: ReplayTable, caution: float, alphas: Sequence[float]
) -> NDArray[np.intp]:
    """(num_alphas, num_queries) columns that path 1 would choose.

    As `ClusterRule.decide` does, from its beliefs: the best utility, where inside the profiled
    distribution the pair that is best overall has the benefit of the doubt.
    """
    measured = table.measured[0]
    settled = settle_rows(view.quality, view.spread, view.overall, measured, caution)
    quality = np.where(view.inside[:, None], settled, view.outside).astype(np.float32)
    cost = normalised_cost(table.pair_costs_usd)
    utilities = [utility(alpha, quality, cost) for alpha in alphas]
    return np.stack([np.where(measured, of, -np.inf).argmax(axis=1) for of in utilities])


@dataclass(frozen=True)
class GatedPolicy:
    """A snapshot with a policy, on the held-out queries: the gate, path 1 and path 2 together.

    The table is of all held-out queries, and its one view is what `rule` believes of them.
    """

    net: PolicyNet
    rule: ClusterRule
    """Path 1, with what it learned since."""
    threshold: float
    table: ReplayTable
    max_steps: int
    max_alpha: float = POLICY_MAX_ALPHA
    """Path 1 keeps every request above it."""

    def alone(self) -> GatedPolicy:
        """Path 2 without the gate."""
        return replace(self, threshold=PATH_2_ALONE, max_alpha=1.0)

    def reach(self, held_out: HeldOut, alphas: Sequence[float]) -> Reached:
        """Answer every held-out query at every alpha.

        Raises:
            ConfigError: If the table is of other queries or pairs, or path 1 cannot decide.
        """
        if self.table.pairs != held_out.pairs or len(self.table.embeddings) <= max(held_out.rows):
            raise ConfigError(
                "the replayed table is of other pairs or fewer queries than the outcomes"
            )
        table = self.table.select(queries=held_out.rows)
        if not np.array_equal(table.embeddings, held_out.embeddings):
            raise ConfigError("the replayed table is of other queries than the held-out outcomes")
        by_alpha = [
            self.answer(table, alpha, pair_costs_usd=held_out.pair_costs_usd) for alpha in alphas
        ]
        (view,) = table.views
        columns = {
            name: np.stack([getattr(requests, name) for requests in by_alpha])
            for name in ("score", "costs_usd", "cost", "steps", "confidence")
        }
        inside = np.broadcast_to(view.inside, columns["score"].shape)
        return Reached(inside=inside, **columns)

    def answer(
        self,
        table: ReplayTable,
        alpha: float,
        *,
        pair_costs_usd: NDArray[np.floating] | None = None,
    ) -> Requests:
        """What the queries of a table come to at one alpha, each by the path that it is sent to.

        Args:
            table: Its one view is what `rule` believes.
            alpha: Cost-quality dial in [0, 1].
            pair_costs_usd: As of `roll_out`.
        """
        (view,) = table.views
        keeps = (view.confidence >= self.threshold) | (alpha > self.max_alpha)
        second = roll_out(
            Greedy(self.net),
            table,
            alpha,
            max_steps=self.max_steps,
            pair_costs_usd=pair_costs_usd,
        )
        if not keeps.any():
            return second
        choices = ask("path 1", self.rule, table.embeddings, table.encoder, table.pairs, [alpha])
        first = run_once(
            table, choices.chosen[0], choices.confidence[0], pair_costs_usd=pair_costs_usd
        )
        return gated(first, second, keeps)


def gated_policy(rule: ClusterRule, table: ReplayTable, max_steps: int) -> GatedPolicy:
    """The policy of a rule's snapshot, as it serves.

    Args:
        rule: Path 1, with what it learned since.
        table: What the pairs answered on the held-out queries; its views do not matter, nor does
            what they did after a thought where the policy never learned to think.
        max_steps: Of a request.

    Raises:
        SnapshotError: If the policy's tensors are wrong.
        ConfigError: If the rule does not know one of the table's pairs.
    """
    loaded = LearnedRule(rule.snapshot)
    table = table if loaded.thinks else table.without_thoughts()
    return GatedPolicy(loaded.net, rule, loaded.threshold, with_rule(table, rule), max_steps)


def _greedy(
    net: PolicyNet, observation: dict[str, NDArray[np.float32]]
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """(n,) the likeliest actions, and how likely they are."""
    size = len(observation["mask"])
    actions, chances = np.empty(size, np.intp), np.empty(size)
    for start in range(0, size, _BATCH):
        part = slice(start, start + _BATCH)
        logits = net.logits({name: array[part] for name, array in observation.items()})
        actions[part] = logits.argmax(axis=1)
        chances[part] = 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
    return actions, chances
