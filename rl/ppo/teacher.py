"""A teacher for the policy: dynamic programming over what a profile says of like questions.

In come the states of episodes, out goes what each action is worth. The teacher holds a belief: the
profiled questions that are like the one asked, weighted by likeness. What answers were seen makes
those questions likelier on which the same candidates gave answers of like chances; path 1 says how
good each candidate is, and the belief how that shifts. It looks two runs ahead. It knows the
outcomes of other questions only, so what it reaches is a ceiling for what such signals allow, as
the clairvoyant oracle is not (Bellman, 1957; particle beliefs as in Thrun, 1999).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rl.ppo.episodes import Episodes
from rl.ppo.table import ReplayTable
from serve_app.router.policy.features import States
from serve_app.router.policy.worth import gains, prospects, repeats, worths

Float = NDArray[np.float32]
Bool = NDArray[np.bool_]
Index = NDArray[np.intp]

_LEVELS = 4
"""Chances that an answer to come is thought to have."""
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class TeacherSettings:
    """How much it takes into account."""

    num_like: int = 200
    """Questions of a belief."""
    width: float = 0.2
    """Cosine similarity by which a question counts 2.7 times less."""
    chance_width: float = 0.3
    """Difference of two chances at which they say little of each other."""
    least_match: float = 0.3
    """What a question still counts on which a candidate did something else."""
    looked_at: int = 6
    """Candidates whose consequences are worked out; the others are taken to end the request."""
    trust: float = 0.5
    """Share of what the best run after a run is expected to add that counts: the largest of many
    estimates is too large."""


class Teacher:
    """Knows what each action of an episode over a table is worth.

    Invariant: what it says of a question never rests on that question's own outcomes, nor in the
    last of several views on any of its domain.
    """

    def __init__(
        self,
        table: ReplayTable,
        asked: ReplayTable | None = None,
        settings: TeacherSettings | None = None,
    ) -> None:
        """Find each question's like ones.

        Args:
            table: What it knows, with judges of training: their chances of each answer alone are
                what the belief compares.
            asked: What the episodes are of, with judges; `None`: of the same table.
            settings: How much it takes into account.

        Raises:
            ValueError: If a table has no such judges.
        """
        if table.judges is None or table.judges.alone is None:
            raise ValueError("a teacher compares chances, and the table it knows has none")
        self._settings = settings or TeacherSettings()
        known = table if asked is None else asked
        if known.judges is None:
            raise ValueError("a teacher compares chances, and the asked table has no verifier")
        self._judges = known.judges
        self._alone = table.judges.alone
        self._outlooks = known.judges.outlooks()
        self._voters = table.voter_of(np.arange(table.num_pairs))
        measured = table.measured[0]
        # What was not profiled is as the pair usually is: it shifts little.
        usual = table.score[0].sum(axis=0) / np.maximum(measured.sum(axis=0), 1)
        self._score = np.where(measured, table.score[0], usual).astype(np.float32)
        self._like, self._weight = self._neighbours(table, asked)

    def values(self, episodes: Episodes, rows: Index) -> Float:
        """(n, P + 2) what each action of some episodes is worth beside answering, in utility."""
        legal = episodes.legal()[rows]
        parts = [
            self._values(
                _part(episodes, rows[start : start + _ROWS_AT_ONCE]),
                legal[start : start + _ROWS_AT_ONCE],
            )
            for start in range(0, len(rows), _ROWS_AT_ONCE)
        ]
        return np.concatenate(parts)

    def choose(self, episodes: Episodes, rows: Index) -> tuple[Index, NDArray[np.float64]]:
        """The best legal action of each of some episodes, and 1; see `rollout.Chooser`."""
        values = np.where(episodes.legal()[rows], self.values(episodes, rows), -np.inf)
        return values.argmax(axis=1), np.ones(len(rows))

    def _neighbours(self, table: ReplayTable, asked: ReplayTable | None) -> tuple[Index, Float]:
        """(V, N, M) questions like each one asked, by view, and their weights, which sum to 1."""
        of = table if asked is None else asked
        likeness = of.embeddings @ table.embeddings.T
        same = np.array(of.domains)[:, None] == np.array(table.domains)[None, :]
        if asked is None:
            np.fill_diagonal(likeness, -np.inf)
        number = min(self._settings.num_like, table.num_queries - 1)
        like, weight = [], []
        for view in range(len(of.views)):
            is_unknown = 0 < view == len(of.views) - 1 and not same.all()
            closeness = np.where(same, -np.inf, likeness) if is_unknown else likeness
            nearest = np.argpartition(-closeness, number - 1, axis=1)[:, :number]
            close = np.take_along_axis(closeness, nearest, axis=1)
            shares = np.exp((close - close.max(axis=1, keepdims=True)) / self._settings.width)
            like.append(nearest)
            weight.append(shares / shares.sum(axis=1, keepdims=True))
        return np.stack(like), np.stack(weight).astype(np.float32)

    def _values(self, part: _Part, legal: Bool) -> Float:
        states = part.states
        place = (part.view, part.query)
        like, prior = self._like[place], self._weight[place]
        score = self._score[like]
        alone = self._alone[np.minimum(part.view, len(self._alone) - 1)[:, None], like]
        outlook = self._outlooks[self._judges.of[place]]
        answered = np.isfinite(states.chance)
        holds: Bool = np.any(answered, axis=1)
        best = np.where(answered, states.chance, 0.0).max(axis=1, initial=0.0).astype(np.float32)
        posterior = prior * self._matches(alone, states)
        posterior /= np.maximum(posterior.sum(axis=1, keepdims=True), 1e-12)
        level = self._shifted(states.decided, prior, posterior, score)
        again = repeats(answered, self._voters)
        rise = np.where(holds[:, None], prospects(outlook, level, best), level)
        rise = np.where(again, 0.0, rise).astype(np.float32)
        gained = gains(
            states.alpha, rise, states.costs_usd, states.spent_usd, states.log_cost_range
        )
        worth = worths(gained, rise, holds, legal)
        self._look_further(
            worth, legal, states, level, best, again, outlook, alone, posterior, score
        )
        return worth

    def _matches(self, alone: Float, states: States) -> Float:
        """(B, M) how well each like question goes with what was seen of this one."""
        matches = np.ones(alone.shape[:2], np.float32)
        seen_none = states.tried & states.failed
        for pair in np.flatnonzero(states.tried.any(axis=0)):
            there = alone[:, :, pair]
            chance = states.chance[:, None, pair]
            match = self._kernel(there, chance)
            match = np.where(seen_none[:, None, pair], self._kernel_of_none(there), match)
            matches *= np.where(states.tried[:, None, pair], match, 1.0)
        return matches

    def _kernel(self, there: Float, chance: Float) -> Float:
        width, least = self._settings.chance_width, self._settings.least_match
        match = np.exp(-(((there - chance) / width) ** 2) / 2)
        return np.where(np.isfinite(match), np.maximum(match, least), least).astype(np.float32)

    def _kernel_of_none(self, there: Float) -> Float:
        least = self._settings.least_match
        return np.where(np.isfinite(there), least, 1.0).astype(np.float32)

    @staticmethod
    def _shifted(decided: Float, prior: Float, posterior: Float, score: Float) -> Float:
        """(B, P) expected scores: path 1's, shifted as what was seen shifts the like questions'."""
        shift = np.einsum("bm,bmp->bp", posterior - prior, score)
        shifted: Float = np.clip(decided + shift, 0.005, 0.995).astype(np.float32)
        return shifted

    def _look_further(
        self,
        worth: Float,
        legal: Bool,
        states: States,
        level: Float,
        best: Float,
        again: Bool,
        outlook: Float,
        alone: Float,
        posterior: Float,
        score: Float,
    ) -> None:
        """Add to the likeliest runs what the best run after them is expected to add."""
        num_pairs = level.shape[1]
        may = legal[:, :num_pairs] & (states.steps_left >= 2)[:, None]
        order = np.argsort(-np.where(may, worth[:, :num_pairs], -np.inf), axis=1)
        rows = np.arange(len(level))
        same = self._voters[:, None] == self._voters[None, :]
        for rank in range(min(self._settings.looked_at, num_pairs)):
            pair = order[:, rank]
            spent = states.spent_usd + states.costs_usd[rows, pair]
            left = states.usd_left - states.costs_usd[rows, pair]
            after = may & ~again & ~same[pair] & (states.costs_usd <= left[:, None])
            there = alone[rows, :, pair]
            following = np.zeros(len(level))
            for chance in self._chances_of(outlook, level[rows, pair]).T:
                belief = posterior * self._kernel(there, chance[:, None])
                belief /= np.maximum(belief.sum(axis=1, keepdims=True), 1e-12)
                further = np.clip(
                    level + np.einsum("bm,bmp->bp", belief - posterior, score), 0.005, 0.995
                )
                held = np.maximum(best, chance).astype(np.float32)
                rises = prospects(outlook, further.astype(np.float32), held)
                value = gains(states.alpha, rises, states.costs_usd, spent, states.log_cost_range)
                value = np.where(after, value, 0.0).max(axis=1, initial=0.0)
                following += np.maximum(value, 0.0) / _LEVELS
            goes = may[rows, pair]
            worth[rows[goes], pair[goes]] += (self._settings.trust * following[goes]).astype(
                np.float32
            )

    @staticmethod
    def _chances_of(outlook: Float, level: Float) -> Float:
        """(B, _LEVELS) chances, equally likely, of an answer whose pair is believed so good."""
        levels, quantiles = outlook.shape[1:]
        nearest = np.clip(np.round(level * (levels - 1)), 0, levels - 1).astype(np.intp)
        of_level = outlook[np.arange(len(level)), nearest]
        edges = np.linspace(0, quantiles, _LEVELS + 1).astype(np.intp)
        means: Float = np.stack(
            [of_level[:, low:high].mean(axis=1) for low, high in pairwise(edges)],
            axis=1,
        )
        return means


@dataclass(frozen=True)
class _Part:
    """Some episodes."""

    states: States
    query: Index
    view: Index


def _part(episodes: Episodes, rows: Index) -> _Part:
    return _Part(episodes.states.rows(rows), episodes.query[rows], episodes.view[rows])
