"""The console's sums and lists, on both databases."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import create_engine, text

from serve_app.schemas import Pair
from serve_app.store import OutcomeLog, Store, add_feedback, delete_old, publish, request_lists
from serve_app.store.migrations import configuration
from serve_app.store.request_lists import RequestFilter, listed_requests
from serve_app.store.sums import DAY_S, seconds_of, step_of
from serve_app.store.traffic import (
    calibration,
    latency_over_time,
    policy_changes,
    traffic_by_candidate,
    traffic_over_time,
    usage_by,
    win_rates,
)
from tests.console_data import report


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    store = await Store.open(store_url)
    yield store
    await store.close()


async def write(store: Store, count: int, owner: str = "local") -> None:
    log = OutcomeLog(store)
    for number in range(count):
        log.record(report(number, owner=owner, error="no" if number % 5 == 4 else None), 0.1)
    assert await log.flush(20)
    await log.close()


async def test_sums_are_of_all_requests_however_they_were_written(store: Store) -> None:
    await write(store, 30, "key_1")
    await write(store, 20, "key_2")
    seen = await traffic_over_time(store, 0, DAY_S)
    assert sum(row.requests for row in seen) == 50
    assert sum(row.errors for row in seen) == 10
    assert sum(row.out_of_distribution for row in seen) == 16
    owners = await usage_by(store, 0, "owner")
    assert {row.of: row.requests for row in owners} == {"key_1": 30, "key_2": 20}
    assert sum(row.prompt_tokens for row in owners) == 50 * 40
    days = await usage_by(store, 0, "day")
    candidates = await traffic_by_candidate(store, 0)
    assert sum(row.requests for row in days) == sum(row.requests for row in candidates) == 50
    cost = sum(row.cost_usd for row in candidates)
    assert cost == pytest.approx(sum(row.cost_usd for row in owners))
    assert cost == pytest.approx(sum(row.cost_usd for row in await usage_by(store, 0, "candidate")))


async def test_a_request_that_is_written_twice_counts_once(store: Store) -> None:
    log = OutcomeLog(store)
    log.record(report(1), 0.1)
    await log.flush(20)
    log.record(report(1), 0.1)
    await log.flush(20)
    await log.close()
    assert [row.requests for row in await traffic_over_time(store, 0, DAY_S)] == [1]


async def test_half_and_95_percent_of_the_requests_took_no_longer(store: Store) -> None:
    log = OutcomeLog(store)
    for number in range(100):
        log.record(replace(report(number), seconds=0.1 if number < 90 else 2.0), 0.1)
    await log.flush(20)
    await log.close()
    _, took = await latency_over_time(store, 0, DAY_S)
    assert took is not None
    assert took.median_s == pytest.approx(0.1, rel=0.13)
    assert took.p95_s == pytest.approx(2.0, rel=0.13)


@pytest.mark.parametrize("seconds", [0.0, 0.0005, 0.001, 0.1, 3.7, 600.0])
def test_a_step_holds_its_times(seconds: float) -> None:
    assert seconds <= seconds_of(step_of(seconds)) <= max(0.001, seconds * 1.13)


async def test_verdicts_are_summed_by_candidate_and_by_confidence(store: Store) -> None:
    await write(store, 40)
    for number in range(40):
        await add_feedback(store, report(number).request_id, "local", float(number % 10 >= 5))
    rates = await win_rates(store, 0)
    assert sum(rate.verdicts for rate in rates) == 40
    assert sum(rate.wins for rate in rates) == 20
    tenths = await calibration(store, 0)
    assert [one.verdicts for one in tenths] == [4] * 10
    assert [one.score for one in tenths] == [0.0] * 5 + [1.0] * 5
    assert [round(one.confidence, 3) for one in tenths] == [n / 10 for n in range(10)]


async def test_a_search_for_what_is_rare_ends_and_goes_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_lists, "MAX_SEARCHED", 10)
    await write(store, 45)
    wanted, found, looks = RequestFilter(min_cost_usd=0.0005), [], 0
    while True:
        rows, after = await listed_requests(store, wanted, 50)
        found += rows
        looks += 1
        if after is None:
            break
        wanted = replace(wanted, before=after)
    assert len(found) == len({row.request_id for row in found}) == 9
    assert looks >= 4


async def test_the_requests_of_a_key_are_found_behind_many_others(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_lists, "MAX_SEARCHED", 10)
    await write(store, 3, "key_rare")
    await write(store, 40, "key_busy")
    rows, after = await listed_requests(store, RequestFilter(owner="key_rare"), 50)
    assert (len(rows), after) == (3, None)
    rows, _ = await listed_requests(
        store, RequestFilter(owner="key_rare", pair=Pair("large", "calculator")), 50
    )
    assert [row.pair for row in rows] == [Pair("large", "calculator")]


async def test_sums_go_with_the_requests(store: Store) -> None:
    await write(store, 5)
    await delete_old(store, time.time() + 3 * DAY_S)
    assert await traffic_over_time(store, 0, DAY_S) == []
    assert await usage_by(store, 0, "day") == []


async def test_policies_that_began_to_serve_are_told_with_their_time(store: Store) -> None:
    began_s = time.time()
    await publish(store, None, "the first")
    changes = await policy_changes(store, began_s - 1)
    assert [version for version, _ in changes] == [1]
    assert await policy_changes(store, time.time() + 60) == []


async def test_a_store_from_before_is_summed_up(tmp_path: Path) -> None:
    path = tmp_path / "atlas.db"
    url = f"sqlite+aiosqlite:///{path}"
    store = await Store.open(url)
    await write(store, 25)
    await add_feedback(store, report(3).request_id, "local", 1.0)
    kept = await usage_by(store, 0, "owner"), await win_rates(store, 0)
    await store.close()
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        command.downgrade(configuration(connection), "0007")
        assert connection.execute(text("SELECT COUNT(*) FROM requests")).scalar() == 25
    engine.dispose()
    store = await Store.open(url)
    found = await usage_by(store, 0, "owner"), await win_rates(store, 0)
    await store.close()
    assert [(row.of, row.requests, row.errors) for row in found[0]] == [("local", 25, 5)]
    assert [row.requests for row in kept[0]] == [25]
    assert found[1] == kept[1]
