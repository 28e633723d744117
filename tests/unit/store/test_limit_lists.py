"""Every limit in one look, on both databases: as `usage_of` tells of each key."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from serve_app.store import (
    Amounts,
    OutcomeLog,
    Store,
    create_key,
    draw_lease,
    revoke_key,
    set_limit,
    usage_of,
)
from serve_app.store.limit_lists import limited_usage
from tests.console_data import report


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    store = await Store.open(store_url)
    yield store
    await store.close()


async def test_limits_spent_and_reserved_are_those_of_each_key(store: Store) -> None:
    busy, _ = await create_key(store, "busy", ["chat"])
    idle, _ = await create_key(store, "idle", ["chat"])
    gone, _ = await create_key(store, "gone", ["chat"])
    log = OutcomeLog(store)
    for number in range(12):
        log.record(report(number, owner=busy), 0.1)
    assert await log.flush(20)
    await log.close()
    for key_id in (busy, idle, gone):
        await set_limit(store, key_id, "month", {"usd": 1.0})
        await set_limit(store, key_id, "hour", {"tokens": 100_000, "requests": 50})
    await revoke_key(store, gone)
    before = await limited_usage(store)
    await draw_lease(store, busy, "lease", Amounts(0.1, 1000, 1), 600)
    after = await limited_usage(store)
    for listed in (before, after):
        assert [(key_id, str(usage.per)) for key_id, usage in listed] == sorted(
            (key_id, per) for key_id in (busy, idle) for per in ("hour", "month")
        )
    assert {tuple(usage.spent) for key_id, usage in before if key_id == idle} == {(0, 0, 0)}
    for listed in (before, after):
        of_busy = {str(usage.per): usage for key_id, usage in listed if key_id == busy}
        assert of_busy["month"].spent.requests == 12
        assert of_busy["hour"].spent.tokens == 12 * 60
    known = {usage.per: usage for usage in await usage_of(store, busy)}
    for key_id, usage in after:
        if key_id == busy:
            assert usage.held == known[usage.per].held
            assert usage.limit == known[usage.per].limit
            assert usage.held.usd >= (0.1 if str(usage.per) == "month" else 0)
