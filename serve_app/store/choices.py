"""What policies chose and what came of it: sums by policy, by cluster, and of the shadow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, func, select

from serve_app.schemas import Pair
from serve_app.store.console_tables import ChoiceDayRow, ShadowDayRow
from serve_app.store.database import Store
from serve_app.store.sums import NO_CLUSTER
from serve_app.store.tables import PolicyRow


@dataclass(frozen=True, slots=True)
class Choices:
    """Requests that were decided alike, and the verdicts on them."""

    requests: int
    errors: int
    cost_usd: float
    seconds: float
    """Sum of the times that the requests took."""
    confidence: float
    """Sum of the confidences."""
    verdicts: int
    wins: int


@dataclass(frozen=True, slots=True)
class ClusterChoices:
    """What went to one candidate in one cluster."""

    cluster: int | None
    """`None`: outside of all."""
    pair: Pair
    choices: Choices


@dataclass(frozen=True, slots=True)
class ShadowChoices:
    """Requests for which a policy in the shadow would have chosen one candidate."""

    pair: Pair
    requests: int
    agreed: int
    """Requests that went there."""
    confidence: float
    """Mean of the shadow's confidences."""
    verdicts: int
    """On requests that went there."""
    wins: int


_SUMMED = [getattr(ChoiceDayRow, name) for name in Choices.__dataclass_fields__]


async def choices_by_policy(
    store: Store, since_unix_s: float, versions: Sequence[int]
) -> dict[int, Choices]:
    """What policies decided since a day began, by version.

    Raises:
        StoreError: If the store is away; so do all others here.
    """
    row = ChoiceDayRow
    query = (
        select(row.policy_version, *map(func.sum, _SUMMED))
        .where(row.began_unix_s >= since_unix_s, row.policy_version.in_(versions))
        .group_by(row.policy_version)
    )
    return {version: _choices(sums) for version, *sums in await _all(store, query)}


async def choices_by_cluster(
    store: Store, since_unix_s: float, versions: Sequence[int]
) -> list[ClusterChoices]:
    """What policies of one snapshot decided since a day began, by cluster and candidate."""
    row = ChoiceDayRow
    keys = (row.cluster, row.model_id, row.tool_id)
    query = (
        select(*keys, *map(func.sum, _SUMMED))
        .where(row.began_unix_s >= since_unix_s, row.policy_version.in_(versions))
        .group_by(*keys)
        .order_by(*keys)
    )
    return [
        ClusterChoices(
            None if cluster == NO_CLUSTER else cluster, Pair(model_id, tool_id), _choices(sums)
        )
        for cluster, model_id, tool_id, *sums in await _all(store, query)
    ]


async def shadow_choices(
    store: Store, since_unix_s: float, policy_version: int
) -> list[ShadowChoices]:
    """What a policy in the shadow would have decided since a day began, most requests first."""
    row = ShadowDayRow
    keys, requests = (row.model_id, row.tool_id), func.sum(row.requests)
    summed = (row.agreed, row.confidence, row.verdicts, row.wins)
    query = (
        select(*keys, requests, *map(func.sum, summed))
        .where(row.began_unix_s >= since_unix_s, row.policy_version == policy_version)
        .group_by(*keys)
        .having(requests > 0)
        .order_by(requests.desc(), *keys)
    )
    return [
        ShadowChoices(Pair(a, b), int(c), int(d), confidence / int(c), int(e), int(f))
        for a, b, c, d, confidence, e, f in await _all(store, query)
    ]


async def versions_of(store: Store, snapshot_id: str) -> list[int]:
    """Versions that a snapshot was published as."""
    query = select(PolicyRow.policy_version).where(PolicyRow.snapshot_id == snapshot_id)
    return [version for (version,) in await _all(store, query)]


def _choices(sums: Sequence[Any]) -> Choices:
    requests, errors, cost_usd, seconds, confidence, verdicts, wins = sums
    return Choices(
        int(requests), int(errors), cost_usd, seconds, confidence, int(verdicts), int(wins)
    )


async def _all(store: Store, query: Select[*tuple[Any, ...]]) -> Sequence[Any]:
    async with store.begin() as connection:
        return (await connection.execute(query)).all()
