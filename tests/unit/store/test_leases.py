"""Limits of keys and the leases on them, on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count

import pytest

from serve_app.errors import ConfigError, NotFound
from serve_app.schemas import Usage
from serve_app.store import (
    Amounts,
    Grant,
    OutcomeLog,
    Period,
    PeriodUsage,
    Refusal,
    Store,
    create_key,
    draw_lease,
    find_key,
    give_back_lease,
    hash_key,
    remove_limits,
    renew_leases,
    revoke_key,
    set_limit,
    usage_of,
)
from tests.unit.store.test_store import report

LONG_S = 600.0

_numbers = count()


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    opened = await Store.open(store_url)
    yield opened
    await opened.close()


async def limited(store: Store, per: str = "day", **amounts: float) -> str:
    """A key with limits."""
    key_id, _ = await create_key(store, "a team", ["chat"])
    await set_limit(store, key_id, per, amounts)
    return key_id


async def spend(store: Store, key_id: str, usd: float, lease_id: str | None = None) -> None:
    """Have the outcome of a request written."""
    outcomes = OutcomeLog(store, flush_interval_s=0.01)
    done = replace(report(f"req_{next(_numbers)}"), owner=key_id, lease_id=lease_id, seconds=0.0)
    outcomes.record(replace(done, usage=Usage(70, 30, usd)))
    assert await outcomes.flush(30)
    await outcomes.close()


async def day(store: Store, key_id: str) -> PeriodUsage:
    return next(usage for usage in await usage_of(store, key_id) if usage.per is Period.DAY)


async def drawn(
    store: Store, key_id: str, lease_id: str, usd: float, lease_s: float = LONG_S
) -> float:
    """Dollars that a draw adds; 0 where it is refused."""
    grant = await draw_lease(store, key_id, lease_id, Amounts(usd, 0, 0), lease_s)
    return grant.amounts.usd if isinstance(grant, Grant) else 0.0


async def test_what_is_drawn_together_is_never_more_than_the_limit(store: Store) -> None:
    key_id = await limited(store, usd=1.0)
    together = await asyncio.gather(
        *(drawn(store, key_id, f"lease_{number}", 0.3) for number in range(4))
    )
    assert sorted(together) == [0.0, 0.3, 0.3, 0.3]
    assert (await day(store, key_id)).held.usd == pytest.approx(0.9)


async def test_a_small_draw_is_a_slice_and_nothing_is_drawn_of_what_is_not_needed(
    store: Store,
) -> None:
    key_id = await limited(store, usd=1.0, tokens=1000, requests=10)
    grant = await draw_lease(store, key_id, "lease_1", Amounts(0.001, 0, 1), LONG_S)
    assert isinstance(grant, Grant)
    assert grant.amounts == pytest.approx((0.02, 0, 1))


async def test_the_narrowest_of_several_periods_holds(store: Store) -> None:
    key_id = await limited(store, "month", usd=10.0)
    await set_limit(store, key_id, "hour", {"usd": 0.5})
    assert await drawn(store, key_id, "lease_1", 0.4) == pytest.approx(0.4)
    refused = await draw_lease(store, key_id, "lease_2", Amounts(0.2), LONG_S)
    assert isinstance(refused, Refusal)
    assert (refused.per, refused.unit, refused.limit) == (Period.HOUR, "usd", 0.5)
    assert refused.resets_unix_s == Period.HOUR.window(time.time())[1]


async def test_an_outcome_turns_what_is_held_into_spent(store: Store) -> None:
    key_id = await limited(store, usd=1.0)
    await drawn(store, key_id, "lease_1", 0.5)
    await spend(store, key_id, 0.2, "lease_1")
    usage = await day(store, key_id)
    assert (usage.spent.usd, usage.held.usd) == pytest.approx((0.2, 0.3))
    assert usage.spent == pytest.approx((0.2, 100, 1))
    await give_back_lease(store, "lease_1")
    assert await drawn(store, key_id, "lease_2", 0.8) == pytest.approx(0.8)
    assert await drawn(store, key_id, "lease_3", 0.01) == 0.0


async def test_a_lease_blocks_what_it_holds_until_it_expires(store: Store) -> None:
    key_id = await limited(store, usd=1.0)
    await drawn(store, key_id, "dead", 0.7, lease_s=0.0)
    await drawn(store, key_id, "alive", 0.2)  # collects what has expired
    assert (await day(store, key_id)).held.usd == pytest.approx(0.2)
    assert await renew_leases(store, ["dead", "alive"], LONG_S) == {"alive"}
    await spend(store, key_id, 0.1, "dead")  # the journal tells it late
    usage = await day(store, key_id)
    assert (usage.spent.usd, usage.held.usd) == pytest.approx((0.1, 0.2))


async def test_what_was_spent_before_the_limit_counts(store: Store) -> None:
    key_id, _ = await create_key(store, "a team", ["chat"])
    await spend(store, key_id, 0.8)
    await set_limit(store, key_id, "day", {"usd": 1.0})
    assert await drawn(store, key_id, "lease_1", 0.3) == 0.0
    assert await drawn(store, key_id, "lease_1", 0.15) == pytest.approx(0.15)
    await spend(store, key_id, 0.05)  # of a gateway that did not know the limit yet
    assert (await day(store, key_id)).spent.usd == pytest.approx(0.85)


async def test_a_limit_below_what_is_spent_leaves_nothing(store: Store) -> None:
    key_id = await limited(store, usd=1.0)
    await drawn(store, key_id, "lease_1", 0.5)
    await spend(store, key_id, 0.5, "lease_1")
    await set_limit(store, key_id, "day", {"usd": 0.3})
    refused = await draw_lease(store, key_id, "lease_2", Amounts(), LONG_S)
    assert isinstance(refused, Refusal)
    assert (refused.limit, refused.spent) == pytest.approx((0.3, 0.5))


async def test_a_key_whose_limits_were_taken_away_has_none(store: Store) -> None:
    key_id, key = await create_key(store, "a team", ["chat"])
    await set_limit(store, key_id, "day", {"usd": 1.0})
    await set_limit(store, key_id, "month", {"usd": 1.0})
    await remove_limits(store, key_id, "day")
    found = await find_key(store, hash_key(key))
    assert found is not None
    assert found.limited_unix_s is not None
    await remove_limits(store, key_id)
    found = await find_key(store, hash_key(key))
    assert found is not None
    assert found.limited_unix_s is None
    grant = await draw_lease(store, key_id, "lease_1", Amounts(1e6, 1e9, 1), LONG_S)
    assert isinstance(grant, Grant)
    assert grant.amounts == (math.inf, math.inf, math.inf)


@pytest.mark.parametrize("usd", [0.0, -1.0, math.nan, math.inf])
async def test_a_limit_is_a_number_above_0(store: Store, usd: float) -> None:
    key_id, _ = await create_key(store, "a team", ["chat"])
    with pytest.raises(ConfigError, match="above 0"):
        await set_limit(store, key_id, "day", {"usd": usd})


async def test_only_a_key_in_use_can_be_limited(store: Store) -> None:
    key_id, _ = await create_key(store, "a team", ["chat"])
    await revoke_key(store, key_id)
    for of in (key_id, "key_0"):
        with pytest.raises(NotFound):
            await set_limit(store, of, "day", {"usd": 1.0})
        with pytest.raises(NotFound):
            await remove_limits(store, of)


def test_periods_follow_the_calendar() -> None:
    at = datetime(2028, 2, 29, 13, 45, 7, tzinfo=UTC).timestamp()

    def window(per: Period) -> list[str]:
        return [datetime.fromtimestamp(s, UTC).isoformat()[:13] for s in per.window(at)]

    assert window(Period.HOUR) == ["2028-02-29T13", "2028-02-29T14"]
    assert window(Period.DAY) == ["2028-02-29T00", "2028-03-01T00"]
    assert window(Period.WEEK) == ["2028-02-28T00", "2028-03-06T00"]
    assert window(Period.MONTH) == ["2028-02-01T00", "2028-03-01T00"]
