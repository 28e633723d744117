"""What episodes are like: alpha, prices, the pairs that are there and limits, drawn anew for each.

One policy is to serve every preference and to survive a changed pool, so training shows it many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from rl.ppo.reward import RewardSettings
from rl.ppo.table import ReplayTable
from serve_app.router.policy.features import DESCRIPTOR_DIM, MAX_STEPS
from serve_app.schemas import Pair

Float = NDArray[np.float32]
Bool = NDArray[np.bool_]
Index = NDArray[np.intp]

_DOLLAR_ROOM = 3.0
"""Times the dearest pair's price that a limit in dollars is at most."""
_TIME_ROOM = 5.0
"""Times the slowest pair's seconds that a limit in seconds is at most."""


SECONDS_BLUR = 0.3
"""Of the pairs' seconds where a state is scrambled; in orders of magnitude over 3, as `features`
scales them."""
_NUM_SCRAMBLED = 4
"""Ways in which queries stand for those of an unknown kind."""


@dataclass(frozen=True)
class EnvSettings:
    """What episodes are like. Ranges are of draws anew for every episode."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    max_pairs: int = 32
    """Rows that the padded observations of `rl.ppo.env` have."""
    max_steps: int = 4
    """Runs of pairs and of the planner at most; drawn from 1 to this."""
    randomise: bool = True
    """Whether anything but the query is drawn. If not: `alpha`, `max_steps`, every pair that can
    run, the profile's prices, no limits, the first view."""
    alpha: float = 0.3
    """Cost-quality dial where nothing is drawn."""
    zero_alpha: float = 0.15
    """Probability of alpha 0."""
    alpha_odds: tuple[float, float] = (0.005, 2.0)
    """Else alpha / (1 - alpha) is log-uniform between these."""
    price_jitter: float = 0.5
    """Standard deviation of the logarithm of each model's and of each tool's price factor."""
    drop_pairs: tuple[float, float] = (0.0, 0.5)
    """Share of the pairs that is left out, uniform between these; one pair always stays."""
    drop_members: float = 0.1
    """Probability of each model, and of each tool, to be away with all its pairs."""
    newcomers: float = 0.1
    """Probability of each model, and of each tool, to have just joined: path 1 knows its pairs by
    their cards alone, where the table says what it then believes."""
    usd_limits: float = 0.1
    """Probability of a limit in dollars: log-uniform from the cheapest pair's price to three times
    the dearest's."""
    seconds_limits: float = 0.1
    """Probability of a limit in seconds: log-uniform from the fastest pair's to five times the
    slowest's."""
    no_planner: float = 0.2
    """Probability that there is no planner, where the profile knows of one."""
    view_weights: tuple[float, ...] = ()
    """Of the table's views; empty takes them equally often."""
    reward: RewardSettings = field(default_factory=RewardSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn.

        Raises:
            ValueError: If a number is out of its range.
        """
        bounds: tuple[tuple[str, float, float], ...] = (
            ("max_pairs", 1, 100_000),
            ("max_steps", 1, MAX_STEPS),
            ("alpha", 0, 1),
            ("zero_alpha", 0, 1),
            ("price_jitter", 0, 10),
            ("drop_members", 0, 0.99),
            ("newcomers", 0, 1),
            ("usd_limits", 0, 1),
            ("seconds_limits", 0, 1),
            ("no_planner", 0, 1),
        )
        for name, low, high in bounds:
            if not low <= getattr(self, name) <= high:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be in [{low}, {high}]"
                )
        for name, low, high in (("alpha_odds", 1e-9, 1e9), ("drop_pairs", 0, 1)):
            first, last = getattr(self, name)
            if not low <= first <= last <= high:
                raise ValueError(
                    f"{name} is {(first, last)!r}; it must rise within [{low}, {high}]"
                )
        if self.view_weights and not (min(self.view_weights) >= 0 < sum(self.view_weights)):
            raise ValueError(f"view_weights is {self.view_weights!r}; weights are not negative")


class Draws:
    """Draws episodes of one pool."""

    def __init__(self, settings: EnvSettings, pairs: Sequence[Pair], num_views: int) -> None:
        """Take over what is drawn from.

        Raises:
            ValueError: If there are not as many view weights as views.
        """
        weights = np.array(settings.view_weights or [1.0] * num_views)
        if len(weights) != num_views:
            raise ValueError(f"{len(weights)} view weights do not fit {num_views} views")
        self._settings = settings
        self._view_shares = np.cumsum(weights / weights.sum())
        self._members = (
            _members([pair.model_id for pair in pairs]),
            _members([pair.tool_id for pair in pairs]),
        )
        self.seed(settings.seed)

    def seed(self, seed: int) -> None:
        """Start anew."""
        self._random = np.random.default_rng(seed)

    def queries(self, usable: Index, size: int) -> Index:
        """(size,) of the usable queries, each as likely."""
        return usable[self._random.integers(len(usable), size=size)]

    def alpha(self, size: int) -> Float:
        """(size,) in [0, 1]."""
        settings = self._settings
        if not settings.randomise:
            return np.full(size, settings.alpha, np.float32)
        low, high = np.log(settings.alpha_odds)
        odds = np.exp(self._random.uniform(low, high, size))
        alpha = np.where(self._random.random(size) < settings.zero_alpha, 0.0, odds / (1 + odds))
        return alpha.astype(np.float32)

    def max_steps(self, size: int) -> Index:
        """(size,) from 1."""
        most = self._settings.max_steps
        least = 1 if self._settings.randomise else most
        return self._random.integers(least, most, size=size, endpoint=True).astype(np.intp)

    def view(self, size: int) -> Index:
        """(size,) indices; the first where nothing is drawn."""
        if not self._settings.randomise:
            return np.zeros(size, np.intp)
        drawn = self._view_shares.searchsorted(self._random.random(size), side="right")
        return np.minimum(drawn, len(self._view_shares) - 1)

    def has_planner(self, size: int) -> Bool:
        """(size,) whether the planner is there, if there is one."""
        if not self._settings.randomise:
            return np.ones(size, np.bool_)
        return self._random.random(size) >= self._settings.no_planner

    def pool(self, can_run: Bool) -> tuple[Bool, Float]:
        """Which pairs are there, and what their prices are multiplied by.

        Args:
            can_run: (n, P) the pairs that may be there; at least one in each row.

        Returns:
            (n, P) each; at least one pair of each row is there.
        """
        size, num_pairs = can_run.shape
        settings, random = self._settings, self._random
        if not settings.randomise:
            return can_run, np.ones(can_run.shape, np.float32)
        share = random.uniform(*settings.drop_pairs, size=(size, 1))
        kept = random.random((size, num_pairs)) >= share
        logs = np.zeros((size, num_pairs))
        for number, member_of in self._members:
            there = random.random((size, number)) >= settings.drop_members
            kept &= there[:, member_of]
            logs += (settings.price_jitter * random.standard_normal((size, number)))[:, member_of]
        # One always stays, and each may be the one.
        order = np.where(can_run, random.random((size, num_pairs)), -1.0)
        kept[np.arange(size), order.argmax(axis=1)] = True
        return can_run & kept, np.exp(logs).astype(np.float32)

    def newcomers(self, size: int) -> tuple[Bool, Bool]:
        """(size, P) whether the model of each pair has just joined, and whether its tool has."""
        chance = self._settings.newcomers if self._settings.randomise else 0.0
        new_model, new_tool = (
            (self._random.random((size, number)) < chance)[:, member_of]
            for number, member_of in self._members
        )
        return new_model, new_tool

    def limits(self, costs_usd: Float, seconds: Float, present: Bool) -> tuple[Float, Float]:
        """Dollars and seconds that are left at the start, inf without a limit.

        Args:
            costs_usd: (n, P) expected of one run.
            seconds: (P,) or (n, P) expected of one run.
            present: (n, P) at least one in each row.

        Returns:
            (n,) each; the cheapest pair fits into the one, the fastest into the other.
        """
        settings = self._settings
        if not settings.randomise:
            without = np.full(len(present), np.inf, np.float32)
            return without, without
        return (
            self._limit(settings.usd_limits, costs_usd, present, _DOLLAR_ROOM),
            self._limit(settings.seconds_limits, seconds, present, _TIME_ROOM),
        )

    def _limit(self, probability: float, price: Float, present: Bool, room: float) -> Float:
        size = len(present)
        # Rounding must not take away what the limit admits.
        low = 1.0001 * np.where(present, price, np.inf).min(axis=1)
        high = room * np.where(present, price, 0.0).max(axis=1)
        limited = (self._random.random(size) < probability) & (low > 0)
        low = np.where(limited, low, 1.0)
        drawn = low * (np.maximum(high, low) / low) ** self._random.random(size)
        return np.where(limited, drawn, np.inf).astype(np.float32)


def _members(names: list[str]) -> tuple[int, Index]:
    """How many different names there are, and which one each is."""
    different, index = np.unique(np.array(names), return_inverse=True)
    return len(different), index.astype(np.intp)


def scrambled(table: ReplayTable, seed: int = 0) -> ReplayTable:
    """A table as `sampling.augmented` scrambles it, with the same signs for all queries."""
    rng = np.random.default_rng(seed)

    def signs(size: int) -> Float:
        return (2.0 * rng.integers(0, 2, size) - 1.0).astype(np.float32)

    of_texts = signs(table.embeddings.shape[1])
    blur = rng.standard_normal(table.num_pairs)
    return replace(
        table,
        embeddings=table.embeddings * of_texts,
        answer_embeddings=table.answer_embeddings * of_texts,
        descriptors=table.descriptors * signs(DESCRIPTOR_DIM),
        pair_seconds=(table.pair_seconds * 1000 ** (SECONDS_BLUR * blur)).astype(np.float32),
    )


def as_unknown(table: ReplayTable) -> list[ReplayTable]:
    """A table scrambled in several ways, as a network meets a kind of query that it never saw."""
    return [scrambled(table, seed) for seed in range(_NUM_SCRAMBLED)]
