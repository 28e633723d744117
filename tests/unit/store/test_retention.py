"""Retention on SQLite and PostgreSQL: what is old goes, whole; what the router is made of stays."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from serve_app.store import OutcomeLog, Retention, Store, add_feedback, delete_old, retention
from serve_app.store.tables import (
    Base,
    FeedbackRow,
    JobRow,
    OutcomeRow,
    PolicyRow,
    ProfileOutcomeRow,
    ProfileQuestionRow,
    RequestRow,
    ShadowRow,
    SnapshotRow,
    TraceRow,
    TrajectoryRow,
)
from tests.unit.store.test_store import report

DAY_S = 86_400.0


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    opened = await Store.open(store_url)
    yield opened
    await opened.close()


async def ids(store: Store, table: type[Base], column: str = "request_id") -> set[Any]:
    async with store.begin() as connection:
        return set(await connection.scalars(select(getattr(table, column))))


async def fill(store: Store, old: int, new: int) -> None:
    """Requests of 100 days ago and of now, each with all that can hang on one."""
    log = OutcomeLog(store, flush_interval_s=0.01)
    names = [f"old_{n}" for n in range(old)] + [f"new_{n}" for n in range(new)]
    for name in names:
        log.record(report(name))
    assert await log.flush(60)
    await log.close()
    async with store.begin() as connection:
        await connection.execute(
            insert(TrajectoryRow), [{"request_id": name, "decisions": []} for name in names]
        )
        shadow = {"policy_version": 1, "action": "route", "model_id": "m", "tool_id": "t"}
        shadow |= {"path": "clusters", "confidence": 1.0, "propensity": 1.0}
        await connection.execute(
            insert(ShadowRow), [{"request_id": name, **shadow} for name in names]
        )
        await connection.execute(
            update(RequestRow)
            .where(RequestRow.request_id.like("old%"))
            .values(created_unix_s=time.time() - 100 * DAY_S)
        )
    for name in (names[0], names[-1]):
        await add_feedback(store, name, "key_1", 1.0, None)


async def fill_other(store: Store) -> None:
    """Old rows that the router is made of, and jobs."""
    then = time.time() - 100 * DAY_S
    question: dict[str, Any] = {"question_key": "q", "query": "?", "domain": "d", "split": "train"}
    question |= {"encoder": "e", "embedding": b""}
    outcome: dict[str, Any] = {
        "question_key": "q",
        "model_id": "m",
        "tool_id": "t",
        "fingerprint": "f",
    }
    outcome |= {"score": 1.0, "prompt_tokens": 1, "completion_tokens": 1, "cost_usd": 0.0}
    outcome |= {"seconds": 1.0, "tool_errors": 0, "propensity": 1.0, "created_unix_s": then}
    job = {"kind": "fit", "settings": {}, "progress": {}, "owner": "o", "updated_unix_s": then}
    async with store.begin() as connection:
        await connection.execute(insert(ProfileQuestionRow).values(question))
        await connection.execute(insert(ProfileOutcomeRow).values(outcome))
        snapshot = {"snapshot_id": "s", "about": {}, "created_unix_s": then}
        await connection.execute(insert(SnapshotRow).values(snapshot))
        policy = {"policy_version": 1, "snapshot_id": "s", "reason": "r", "created_unix_s": then}
        await connection.execute(insert(PolicyRow).values(policy))
        for name, state, created in (
            ("old_over", "failed", then),
            ("old_running", "running", then),
            ("new_over", "succeeded", time.time()),
        ):
            row = job | {"job_id": name, "state": state, "created_unix_s": created}
            await connection.execute(insert(JobRow).values(row))


async def test_what_is_old_goes_whole_and_the_rest_stays(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_BATCH", 3)
    monkeypatch.setattr(retention, "_PAUSE_S", 0.0)
    await fill(store, old=10, new=2)
    await fill_other(store)
    assert await delete_old(store, time.time() - 90 * DAY_S) == 11
    for table in (RequestRow, OutcomeRow, TrajectoryRow, ShadowRow, TraceRow):
        assert await ids(store, table) == {"new_0", "new_1"}
    assert await ids(store, FeedbackRow) == {"new_1"}
    assert await ids(store, JobRow, "job_id") == {"old_running", "new_over"}
    assert await ids(store, ProfileOutcomeRow, "question_key") == {"q"}
    assert await ids(store, PolicyRow, "policy_version") == {1}
    assert await ids(store, SnapshotRow, "snapshot_id") == {"s"}
    assert await delete_old(store, time.time() - 90 * DAY_S) == 0


async def test_several_may_try_at_once_and_writers_go_on(
    store_url: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_BATCH", 5)
    monkeypatch.setattr(retention, "_PAUSE_S", 0.001)
    await fill(store, old=40, new=1)
    other = await Store.open(store_url)
    log = OutcomeLog(store, flush_interval_s=0.001)
    before = time.time() - 90 * DAY_S
    deleting = [asyncio.create_task(delete_old(each, before)) for each in (store, other)]
    for number in range(20):
        log.record(report(f"new_{number + 1}"))
    assert await log.flush(60)
    await log.close()
    total = sum(await asyncio.gather(*deleting))
    total += await delete_old(store, before)  # one may have left it to the other
    await other.close()
    assert total == 40
    assert log.dropped == 0
    assert await ids(store, RequestRow) == {f"new_{n}" for n in range(21)}


async def test_it_looks_by_itself_and_stops_when_told(store: Store) -> None:
    await fill(store, old=2, new=1)
    keeper = Retention(store, None)
    keeper.start()
    await keeper.close()
    assert len(await ids(store, RequestRow)) == 3
    keeper = Retention(store, 90.0, interval_s=0.01)
    keeper.start()
    async with asyncio.timeout(60):
        while len(await ids(store, RequestRow)) > 1:
            await asyncio.sleep(0.01)
    await keeper.close()
    assert await ids(store, RequestRow) == {"new_0"}
