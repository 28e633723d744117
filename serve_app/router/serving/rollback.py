"""PolicyGuard: takes a policy back that users surely like less than the one before.

In come users' verdicts on requests that either policy served, out goes at most one publication.
The comparison is looked at again and again, so it rests on confidence sequences, which hold at all
times at once: the empirical Bernstein ones of Waudby-Smith and Ramdas, "Estimating means of bounded
random variables by betting" (JRSS B, 2024; arXiv 2010.09686), theorem 2.

Nobody takes a policy back alone. A key's verdicts count up to 30% of all that count, and the
newer policy must also be worse where any one key's verdicts are left out. So the error rate holds
whatever one key says: one of the comparisons leaves that key out, and which verdicts count in it
follows from the order of the others' verdicts and from nobody's score.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve_app.config import AtlasConfig
from serve_app.router.rules.utility import normalised, pool_range, utility
from serve_app.router.serving.follower import PolicyFollower
from serve_app.schemas import LOCAL_OWNER
from serve_app.store import (
    Mode,
    Policy,
    RatedRequest,
    Store,
    publish,
    rated_requests,
    serving_policies,
    trial_policies,
)

logger = logging.getLogger(__name__)

_MAX_BET = 0.5
"""Bound of the sequence's weights: keeps a run of like values from betting everything."""
_MAX_RATED = 20_000
"""The last verdicts on each policy that are looked at; earlier ones are forgotten."""
_SHARE = 0.3
"""Of the verdicts that count, at most from one API key."""
_MIN_KEYS = 4
"""Keys that it takes to reach the configured number of verdicts; one more, as any one is left
out."""


@dataclass(frozen=True)
class PolicyComparison:
    """A newer policy held against an older one."""

    newer: Policy
    older: Policy
    num_newer: int
    """Rated requests it served."""
    num_older: int
    difference: float
    """Mean utility of the newer one's requests minus the older one's."""
    high: float
    """Upper bound of the true difference, valid however often it is looked at."""

    @property
    def is_worse(self) -> bool:
        """Whether the newer policy surely is."""
        return self.high < 0

    def reason(self) -> str:
        """In a line."""
        kind = "canary" if self.newer.mode is Mode.CANARY else "policy"
        return (
            f"{kind} {self.newer.policy_version} taken back: users' utility {self.difference:+.3f} "
            f"(at most {self.high:+.3f}) against policy {self.older.policy_version}, "
            f"{self.num_newer} and {self.num_older} verdicts"
        )


class PolicyGuard:
    """Compares the newest policy with the one before, and publishes that again if it must.

    A canary is compared with what serves beside it, on the requests since it began. A policy that
    serves alone is compared with the requests that the one before it served in its time: then a
    change of the traffic looks like a change of the policy, which a canary does not suffer from.

    Invariants:
        - Of several replicas that see the same, one publishes: only on top of the version that was
          judged.
        - What took another policy back is not judged itself, nor is a shadow.
    """

    def __init__(self, config: AtlasConfig, follower: PolicyFollower) -> None:
        """Look after what a follower follows.

        Args:
            config: `router.rollback` has the settings.
            follower: Has the store, and what the pairs cost.
        """
        self._settings = config.router.rollback
        self._follower = follower

    async def watch(self) -> None:
        """Compare for ever."""
        while self._settings.enabled:
            await asyncio.sleep(self._settings.interval_s)
            store = self._follower.store
            if store is None:
                continue
            try:
                async with self._follower.at_work:
                    await self.check(store)
            except Exception as error:
                logger.warning("the serving policy cannot be judged now: %r", error)

    async def check(self, store: Store) -> int | None:
        """Compare once.

        Returns:
            Version of the older policy's new publication; `None` where the newer one stays, or
            somebody else was faster.

        Raises:
            StoreError: If the store is away.
        """
        pair = await self._newest(store)
        if pair is None:
            return None
        comparison = await self.compare(store, *pair)
        if comparison is None or not comparison.is_worse:
            return None
        newer, older = pair
        version = await publish(
            store,
            older.snapshot_id,
            comparison.reason(),
            take_back=newer.policy_version,
            if_newest=newer.policy_version,
        )
        if version is not None:
            logger.warning("policy %d: %s", version, comparison.reason())
        return version

    async def _newest(self, store: Store) -> tuple[Policy, Policy] | None:
        """The newer and the older policy to compare, if there are two to compare."""
        serving = await serving_policies(store, limit=2)
        trials = await trial_policies(store)
        canary = next((policy for policy in trials if policy.mode is Mode.CANARY), None)
        if canary is not None:
            return (canary, serving[0]) if serving else None
        if len(serving) < 2 or serving[0].taken_back is not None:
            return None
        return serving[0], serving[1]

    async def compare(self, store: Store, newer: Policy, older: Policy) -> PolicyComparison | None:
        """Hold a policy against another; `None` while too few verdicts are there.

        Raises:
            StoreError: If the store is away.
        """
        since_unix_s = newer.created_unix_s if newer.mode is Mode.CANARY else 0.0
        of_newer, of_older = [
            await rated_requests(
                store,
                policy.policy_version,
                since_unix_s,
                _MAX_RATED,
                per_key=round(_SHARE * _MAX_RATED),
            )
            for policy in (newer, older)
        ]
        return await asyncio.to_thread(self._hold, newer, older, of_newer, of_older)

    def _hold(
        self,
        newer: Policy,
        older: Policy,
        of_newer: Sequence[RatedRequest],
        of_older: Sequence[RatedRequest],
    ) -> PolicyComparison | None:
        """The comparison with all verdicts; if it is worse, the least sure one without some key."""
        compared = self._compare(newer, older, of_newer, of_older)
        if compared is None or not compared.is_worse:
            return compared
        keys = {of.owner for of in (*of_newer, *of_older)} - {LOCAL_OWNER}
        for key in sorted(keys):
            without = self._compare(
                newer,
                older,
                [of for of in of_newer if of.owner != key],
                [of for of in of_older if of.owner != key],
            )
            if without is None or not without.is_worse:
                return without
            compared = max(compared, without, key=lambda comparison: comparison.high)
        return compared

    def _compare(
        self,
        newer: Policy,
        older: Policy,
        of_newer: Sequence[RatedRequest],
        of_older: Sequence[RatedRequest],
    ) -> PolicyComparison | None:
        """One comparison; `None` while too few verdicts count."""
        least, costs = self._settings.min_verdicts, self._follower.costs_usd()
        utilities = []
        for rated in (of_newer, of_older):
            counted = counting(rated, least)
            if len(counted) < least:
                return None
            utilities.append(live_utility(counted, costs))
        rate = self._settings.error_rate / 2
        _, high_of_newer = bounds(utilities[0], rate)
        low_of_older, _ = bounds(utilities[1], rate)
        return PolicyComparison(
            newer=newer,
            older=older,
            num_newer=len(utilities[0]),
            num_older=len(utilities[1]),
            difference=float(utilities[0].mean() - utilities[1].mean()),
            high=float(high_of_newer - low_of_older),
        )


def counting(rated: Sequence[RatedRequest], min_verdicts: int) -> list[RatedRequest]:
    """The rated requests that count: of no API key more than 30%, once there are many.

    Whether a verdict counts is known before its score is, so what a confidence sequence says of
    those that count is as sure as ever.

    Args:
        rated: In the order of the verdicts.
        min_verdicts: The first ones of each key always count, up to a quarter of this.
    """
    always = math.ceil(min_verdicts / _MIN_KEYS)
    given: Counter[str] = Counter()
    counted: list[RatedRequest] = []
    for request in rated:
        owner = request.owner
        if owner == LOCAL_OWNER or given[owner] + 1 <= max(always, _SHARE * (len(counted) + 1)):
            given[owner] += 1
            counted.append(request)
    return counted


def live_utility(
    rated: Sequence[RatedRequest], costs_usd: NDArray[np.float32]
) -> NDArray[np.float64]:
    """(num_rated,) `(1 - alpha) * score - alpha * cost` in [-1, 1], in the order of the verdicts.

    A request's dollars are those that were paid, on the scale of today's prices: after a change of
    prices the requests from before it keep the old ones. A canary and the policy beside it are
    compared on requests of the same time, so the change strikes both alike.

    Args:
        rated: Requests with their users' scores.
        costs_usd: (num_pairs,) expected of a run of each pair: the scale on which a request's
            dollars count from 0 to 1; more count as 1.
    """
    alpha = np.array([request.alpha for request in rated])
    score = np.array([request.score for request in rated])
    dollars = np.array([request.cost_usd for request in rated])
    cost = np.minimum(normalised(dollars, pool_range(costs_usd)), 1.0)
    return utility(alpha, score, cost)


def bounds(values: NDArray[np.float64], error_rate: float) -> tuple[float, float]:
    """A lower and an upper bound of the mean, each wrong at any time with at most `error_rate`.

    Args:
        values: (num_values,) in [-1, 1], in the order they came.
        error_rate: In (0, 1), of either bound.

    Returns:
        Bounds in [-1, 1].
    """
    x = (values + 1) / 2
    count = np.arange(1, len(x) + 1)
    mean = (0.5 + np.cumsum(x)) / (count + 1)
    variance = (0.25 + np.cumsum((x - mean) ** 2)) / (count + 1)
    # Everything that weighs a value is known before it.
    mean_before = np.concatenate([[0.5], mean[:-1]])
    variance_before = np.concatenate([[0.25], variance[:-1]])
    log_rate = math.log(1 / error_rate)
    bet = np.minimum(
        np.sqrt(2 * log_rate / (variance_before * count * np.log(1 + count))), _MAX_BET
    )
    spent = ((x - mean_before) ** 2 * (-np.log1p(-bet) - bet)).sum()
    centre, reach = (bet * x).sum() / bet.sum(), (log_rate + spent) / bet.sum()
    low, high = max(centre - reach, 0.0), min(centre + reach, 1.0)
    return 2 * low - 1, 2 * high - 1
