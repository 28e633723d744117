"""Sums by policy, by cluster and of the shadow, on both databases."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import create_engine

from serve_app.schemas import Pair
from serve_app.store import OutcomeLog, Store, add_feedback, delete_old
from serve_app.store.choices import choices_by_cluster, choices_by_policy, shadow_choices
from serve_app.store.migrations import configuration
from serve_app.store.rows import RequestRows, rows_of
from serve_app.store.sums import DAY_S
from tests.console_data import report


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    store = await Store.open(store_url)
    yield store
    await store.close()


async def write(store: Store, count: int) -> None:
    log = OutcomeLog(store)
    for number in range(count):
        log.record(report(number, error="no" if number % 5 == 4 else None), 0.1)
    assert await log.flush(20)
    await log.close()


async def test_requests_and_verdicts_are_summed_by_policy(store: Store) -> None:
    await write(store, 40)
    for number in (3, 13, 4, 5):
        await add_feedback(store, report(number).request_id, "local", float(number != 13))
    found = await choices_by_policy(store, 0, [2, 3])
    assert {version: of.requests for version, of in found.items()} == {2: 36, 3: 4}
    assert {version: of.errors for version, of in found.items()} == {2: 8, 3: 0}
    assert {version: (of.verdicts, of.wins) for version, of in found.items()} == {
        2: (2, 2),
        3: (2, 1),
    }
    assert found[3].confidence == pytest.approx(4 * 0.3)
    assert found[3].seconds == pytest.approx(sum(report(n).seconds for n in (3, 13, 23, 33)))
    assert await choices_by_policy(store, time.time() + DAY_S, [2, 3]) == {}


async def test_requests_are_summed_by_cluster_and_those_outside_apart(store: Store) -> None:
    await write(store, 45)
    await add_feedback(store, report(0).request_id, "local", 1.0)
    found = await choices_by_cluster(store, 0, [2, 3])
    by_cluster: dict[int | None, int] = {}
    for one in found:
        by_cluster[one.cluster] = by_cluster.get(one.cluster, 0) + one.choices.requests
    assert by_cluster == {None: 15, 0: 10, 1: 10, 2: 10}
    rated = [(one.cluster, one.pair) for one in found if one.choices.verdicts]
    assert rated == [(0, Pair("large", "calculator"))]


async def test_what_the_shadow_would_have_chosen_is_summed_with_whether_it_went_there(
    store: Store,
) -> None:
    await write(store, 48)
    for number, score in ((3, 1.0), (9, 0.0), (6, 1.0)):  # the last one went elsewhere
        await add_feedback(store, report(number).request_id, "local", score)
    (one,) = await shadow_choices(store, 0, 4)
    assert (one.pair, one.requests, one.agreed) == (Pair("large", "none"), 16, 8)
    assert one.confidence == pytest.approx(0.6)
    assert (one.verdicts, one.wins) == (2, 1)
    assert await shadow_choices(store, 0, 3) == []


async def test_sums_of_choices_go_with_the_requests(store: Store) -> None:
    await write(store, 8)
    await delete_old(store, time.time() + 3 * DAY_S)
    assert await choices_by_policy(store, 0, [2, 3]) == {}
    assert await shadow_choices(store, 0, 4) == []


def test_a_line_of_the_journal_from_before_there_were_clusters_is_read() -> None:
    rows = rows_of(report(0), 0.1, 1.0)
    del rows.request["cluster"]
    assert RequestRows.from_line(rows.to_line()).request["cluster"] is None


async def test_a_store_from_before_is_summed_up(tmp_path: Path) -> None:
    path = tmp_path / "atlas.db"
    url = f"sqlite+aiosqlite:///{path}"
    store = await Store.open(url)
    await write(store, 30)
    await add_feedback(store, report(3).request_id, "local", 1.0)
    kept = await choices_by_policy(store, 0, [2, 3]), await shadow_choices(store, 0, 4)
    await store.close()
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        command.downgrade(configuration(connection), "0010")
    engine.dispose()
    store = await Store.open(url)
    found = await choices_by_policy(store, 0, [2, 3]), await shadow_choices(store, 0, 4)
    clusters = {one.cluster for one in await choices_by_cluster(store, 0, [2, 3])}
    await store.close()
    assert found[0].keys() == kept[0].keys()
    for version, of in found[0].items():
        assert of.requests == kept[0][version].requests
        assert of.cost_usd == pytest.approx(kept[0][version].cost_usd)
        assert (of.verdicts, of.wins) == (kept[0][version].verdicts, kept[0][version].wins)
    assert [one.requests for one in found[1]] == [one.requests for one in kept[1]]
    assert clusters == {None}
