"""What is shown of money: what is left of limits, and what routing saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve_app.schemas import Pair
from serve_app.store import UNITS, PeriodUsage
from serve_app.store.traffic import ProfileMean, UsageTotals

MAX_LIMITS = 100
"""Limits that a page shows: the fullest ones."""
_LEAST_PROFILED = 0.5
"""Share of the most measured pair's questions that a pair needs to be called the best."""


@dataclass(frozen=True, slots=True)
class LimitLeft:
    """One limit of one key, in the period that runs."""

    key_id: str
    per: str
    unit: str
    limit: float
    spent: float
    reserved: float
    """Held by gateways, for requests under way and the next ones."""
    resets_unix_s: float

    @property
    def left(self) -> float:
        """What may still be reserved."""
        return max(0.0, self.limit - self.spent - self.reserved)


def limits_left(usages: Sequence[tuple[str, PeriodUsage]]) -> list[LimitLeft]:
    """Every limit, the fullest first."""
    found = [
        LimitLeft(
            key_id,
            str(usage.per),
            unit,
            usage.limit[unit],
            getattr(usage.spent, unit),
            getattr(usage.held, unit),
            usage.resets_unix_s,
        )
        for key_id, usage in usages
        for unit in UNITS
        if unit in usage.limit
    ]
    return sorted(found, key=lambda one: one.left / one.limit)


@dataclass(frozen=True, slots=True)
class Saving:
    """What the traffic cost, and what it would have cost at one pair."""

    best: Pair
    """The pair with the best mean score on the profile's questions, the cheaper one of equals."""
    requests: int
    """Of candidates that were profiled; the others are left out."""
    paid_usd: float
    at_best_usd: float
    """As many times as much as `best` cost on the profile's questions beside what was chosen."""
    score: float
    """Mean on the profile's questions of what was chosen, in the same shares."""
    best_score: float
    """The same of `best`."""

    @property
    def saved_usd(self) -> float:
        """Below 0: routing cost more."""
        return self.at_best_usd - self.paid_usd


def saving(
    candidates: Sequence[UsageTotals], means: Mapping[Pair, ProfileMean], pairs: frozenset[Pair]
) -> Saving | None:
    """What routing saved against the best single pair; `None` where that is not known.

    The traffic's questions are not the profile's, and may be longer. So what was paid is scaled by
    how the prices stand to each other on the profile's questions.

    Args:
        candidates: What went to each candidate.
        means: What each candidate reached on the profile's questions.
        pairs: Those of the pool; the best is one of them.
    """
    most = max((mean.questions for mean in means.values()), default=0)
    able = [
        pair
        for pair in pairs
        if pair in means and means[pair].questions >= _LEAST_PROFILED * most and not pair.is_pattern
    ]
    if not able:
        return None
    best = min(able, key=lambda pair: (-means[pair].score, means[pair].cost_usd, str(pair)))
    known = [
        (used, means[pair])
        for used in candidates
        for pair in [Pair.parse(used.of)]
        if pair in means
    ]
    requests = sum(used.requests for used, _ in known)
    chosen_usd = sum(used.requests * mean.cost_usd for used, mean in known)
    if not chosen_usd:
        return None
    paid_usd = sum(used.cost_usd for used, _ in known)
    return Saving(
        best,
        requests,
        paid_usd,
        paid_usd * requests * means[best].cost_usd / chosen_usd,
        sum(used.requests * mean.score for used, mean in known) / requests,
        means[best].score,
    )
