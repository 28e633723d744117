"""The store on SQLite and on a PostgreSQL server: keys, outcomes, feedback, killed processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import select
from sqlalchemy.engine import Connection

from serve_app.errors import ConfigError, Conflict, NotFound, StoreError, Unauthorized
from serve_app.gateway.edge.auth import Authenticator
from serve_app.schemas import (
    Candidate,
    DecidedBy,
    Decision,
    Pair,
    Report,
    SpanKind,
    SpanRecord,
    Step,
    StopReason,
    ToolCall,
    Usage,
)
from serve_app.store import (
    OutcomeLog,
    Scope,
    Store,
    add_feedback,
    create_key,
    find_key,
    hash_key,
    list_keys,
    outcomes,
    read_trace,
    read_verdicts,
    revoke_key,
)
from serve_app.store.rows import MAX_QUERY_CHARS
from serve_app.store.tables import ApiKeyRow, Base, FeedbackRow, OutcomeRow, RequestRow

PAIR = Pair("small", "calculator")


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "atlas.db"


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    opened = await Store.open(store_url)
    yield opened
    await opened.close()


@pytest.fixture
async def sqlite_store(database: Path) -> AsyncIterator[Store]:
    opened = await Store.open(url_of(database))
    yield opened
    await opened.close()


def url_of(database: Path) -> str:
    return f"sqlite+aiosqlite:///{database}"


def report(request_id: str = "req_1", **changes: Any) -> Report:
    usage = Usage(7, 5, 0.25)
    call = ToolCall("calculator", {"x": 1}, True, "2", 0.5, function="sum")
    failed = Step(Pair("large", "none"), DecidedBy.COLD_START, 0.5, Usage(), 1.0, error="broke")
    answered = Step(PAIR, DecidedBy.FALLBACK, 1.0, usage, 2.0, (call,), mean_logprob=-0.5)
    decision = Decision(
        (Candidate(failed.pair, 0.9, 0.9, 0.1), Candidate(PAIR, 0.8, 0.8, 0.1)),
        DecidedBy.COLD_START,
        confidence=0.7,
        propensity=0.5,
        policy_version=2,
        pool_version=3,
    )
    whole = Report(
        request_id,
        decision,
        (failed, answered),
        usage,
        3.0,
        "what?",
        b"\1\2\3\4",
        "key_1",
        spans=spans(request_id),
    )
    return replace(whole, **changes)


def spans(request_id: str, error: str = "broke") -> tuple[SpanRecord, ...]:
    root = SpanRecord(0, None, SpanKind.REQUEST, request_id, 0.0, 3.0, None, 7, 5, 0.25, {})
    failed = SpanRecord(
        1, 0, SpanKind.PAIR, "large@none", 0.5, 1.0, error, 0, 0, 0.0, {"accepted": False, "n": 2}
    )
    return root, failed


async def rows(store: Store, table: type[Base]) -> list[Any]:
    async with store.begin() as connection:
        return list((await connection.execute(select(table))).mappings())


async def fast_log(store: Store, **options: Any) -> OutcomeLog:
    return OutcomeLog(store, flush_interval_s=0.01, **options)


# Keys.


async def test_a_key_is_shown_once_and_only_its_hash_is_stored(
    sqlite_store: Store, database: Path
) -> None:
    key_id, key = await create_key(sqlite_store, "ann", ["chat", "feedback"])
    assert key.startswith("atlas_")
    assert len(key) == len("atlas_") + 43
    found = await find_key(sqlite_store, hash_key(key))
    assert found is not None
    assert (found.key_id, found.name) == (key_id, "ann")
    assert found.scopes == {Scope.CHAT, Scope.FEEDBACK}
    files = [path.read_bytes() for path in database.parent.iterdir()]
    assert not any(key.encode() in content for content in files)
    assert (await rows(sqlite_store, ApiKeyRow))[0]["key_hash"] == hash_key(key)


async def test_a_revoked_key_is_listed_but_not_found(store: Store) -> None:
    key_id, key = await create_key(store, "ann", ["chat"])
    await create_key(store, "bob", ["admin"])
    await revoke_key(store, key_id)
    first = (await list_keys(store))[0].revoked_unix_s
    await revoke_key(store, key_id)
    assert await find_key(store, hash_key(key)) is None
    keys = await list_keys(store)
    assert [entry.name for entry in keys] == ["ann", "bob"]
    assert [entry.revoked_unix_s for entry in keys] == [first, None]


async def test_revoking_an_unknown_key_is_an_error(store: Store) -> None:
    with pytest.raises(NotFound):
        await revoke_key(store, "key_0")


@pytest.mark.parametrize(
    ("name", "scopes"),
    [("ann", []), ("ann", ["root"]), ("ann", ["chat", ""]), (" ", ["chat"]), ("x" * 201, ["chat"])],
)
async def test_a_key_needs_a_name_and_known_scopes(
    store: Store, name: str, scopes: list[str]
) -> None:
    with pytest.raises(ConfigError):
        await create_key(store, name, scopes)


async def test_the_gateway_asks_the_store_again_after_its_time(store: Store) -> None:
    now = [0.0]
    authenticator = Authenticator("required", store, ttl_s=3, clock=lambda: now[0])
    key_id, key = await create_key(store, "ann", ["chat"])
    header = f"Bearer {key}".encode()
    assert (await authenticator.caller(header, Scope.CHAT)).key_id == key_id
    await revoke_key(store, key_id)
    now[0] = 2.9
    assert (await authenticator.caller(header, Scope.CHAT)).key_id == key_id
    now[0] = 3.1
    with pytest.raises(Unauthorized):
        await authenticator.caller(header, Scope.CHAT)


async def test_many_wrong_keys_take_bounded_memory(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.gateway.edge.auth._MAX_UNKNOWN", 10)
    authenticator = Authenticator("required", store)
    for index in range(30):
        with pytest.raises(Unauthorized):
            await authenticator.caller(b"Bearer atlas_" + b"%043d" % index, Scope.CHAT)
    assert len(authenticator._unknown) == 10


# Outcomes.


async def test_a_report_becomes_a_request_and_its_steps(store: Store) -> None:
    log = await fast_log(store)
    log.record(report(), alpha=0.3)
    assert await log.flush()
    (request,) = await rows(store, RequestRow)
    assert (request["model_id"], request["tool_id"]) == ("large", "none")
    assert (request["owner"], request["query"], request["embedding"]) == (
        "key_1",
        "what?",
        b"\1\2\3\4",
    )
    assert (request["alpha"], request["propensity"], request["confidence"]) == (0.3, 0.5, 0.7)
    assert (request["policy_version"], request["pool_version"]) == (2, 3)
    first, second = await rows(store, OutcomeRow)
    assert (first["step_index"], first["error"], first["cost_usd"]) == (0, "broke", 0)
    assert (second["path"], second["mean_logprob"]) == ("fallback", -0.5)
    assert (second["prompt_tokens"], second["completion_tokens"]) == (7, 5)
    assert second["tool_calls"] == [
        {"tool_id": "calculator", "function": "sum", "ok": True, "seconds": 0.5}
    ]
    await log.close()


async def test_reports_are_written_without_being_asked(store: Store) -> None:
    log = await fast_log(store)
    for index in range(1200):
        log.record(report(f"req_{index}"))
    async with asyncio.timeout(10):
        while len(await rows(store, RequestRow)) < 1200:
            await asyncio.sleep(0.02)
    await log.close()


async def test_text_no_database_takes_is_made_storable(store: Store) -> None:
    log = await fast_log(store)
    log.record(report(query="a\0b\ud800c", error="\ud800"))
    assert await log.flush()
    assert (await rows(store, RequestRow))[0]["query"] == "a\ufffdb?c"
    await log.close()


class HeldEmbedder:
    """Embeds a text as its bytes, once it may."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.may_embed = asyncio.Event()

    async def __call__(self, texts: Sequence[str]) -> list[bytes]:
        self.asked.extend(texts)
        await self.may_embed.wait()
        return [text.encode() for text in texts]


async def test_missing_embeddings_are_filled_in_once_the_outcomes_are_written(store: Store) -> None:
    embed = HeldEmbedder()
    log = await fast_log(store, embed=embed)
    log.record(report("req_1"))
    log.record(report("req_2", embedding=None, query="two"))
    log.record(report("req_3", embedding=None, query=""))
    log.record(report("req_4", embedding=None, query="failed", error="broke"))
    assert await log.flush()
    written = {row["request_id"]: row["embedding"] for row in await rows(store, RequestRow)}
    none = {"req_3": None, "req_4": None}
    assert written == {"req_1": b"\1\2\3\4", "req_2": None, **none}
    embed.may_embed.set()
    async with asyncio.timeout(10):
        while written["req_2"] is None:
            await asyncio.sleep(0.01)
            written = {row["request_id"]: row["embedding"] for row in await rows(store, RequestRow)}
    assert written == {"req_1": b"\1\2\3\4", "req_2": b"two", **none}
    assert embed.asked == ["two"]
    await log.close()


async def test_a_rated_query_is_embedded_before_those_that_nobody_rated(store: Store) -> None:
    embed = HeldEmbedder()
    log = await fast_log(store, embed=embed)
    for number in range(60):
        name = f"req_{number}"
        log.record(report(name, embedding=None, query=name))
    assert await log.flush()
    rated = await add_feedback(store, "req_59", "key_1", 1.0)
    assert rated.unembedded == "req_59"
    log.embed_rated("req_59", rated.unembedded)
    embed.may_embed.set()
    async with asyncio.timeout(10):
        while not await read_verdicts(store, ["req_59"]):
            await asyncio.sleep(0.01)
    assert embed.asked.index("req_59") <= 16
    await log.close()


@pytest.mark.parametrize("is_pinned", [False, True])
async def test_a_verdict_asks_for_no_embedding_that_is_there_or_teaches_nothing(
    store: Store, is_pinned: bool
) -> None:
    log = await fast_log(store)
    told = report()
    if is_pinned:
        assert told.decision is not None
        pinned = replace(told.decision, path=DecidedBy.PINNED)
        told = replace(told, decision=pinned, embedding=None)
    log.record(told)
    assert await log.flush()
    assert (await add_feedback(store, "req_1", "key_1", 1.0)).unembedded is None
    await log.close()


async def test_an_embedder_that_fails_costs_only_the_embedding(store: Store) -> None:
    async def embed(texts: Sequence[str]) -> list[bytes]:
        raise RuntimeError("away")

    log = await fast_log(store, embed=embed)
    log.record(report(embedding=None))
    assert await log.flush()
    assert (await rows(store, RequestRow))[0]["embedding"] is None
    await log.close()


@pytest.mark.parametrize(
    "bad", [{"seconds": "no number"}, {"usage": Usage(10**30, 0)}, {"owner": None}], ids=str
)
async def test_one_bad_row_does_not_take_the_batch_with_it(
    store: Store, bad: dict[str, Any]
) -> None:
    log = await fast_log(store)
    log.record(report("req_1"))
    log.record(report("req_2", **bad))
    log.record(report("req_3"))
    assert await log.flush()
    assert [row["request_id"] for row in await rows(store, RequestRow)] == ["req_1", "req_3"]
    assert log.dropped == 1
    await log.close()


async def test_a_row_that_is_there_already_is_no_loss(store: Store) -> None:
    log = await fast_log(store)
    log.record(report("req_1"))
    assert await log.flush()
    log.record(report("req_1"))
    log.record(report("req_2"))
    assert await log.flush()
    assert len(await rows(store, RequestRow)) == 2
    assert log.dropped == 0
    await log.close()


async def test_reports_wait_while_the_store_is_locked(
    sqlite_store: Store, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.store.database._SQLITE_BUSY_TIMEOUT_MS", 50)
    await sqlite_store.close()  # so that the next connection has the shorter patience
    blocker = sqlite3.connect(database)
    blocker.execute("BEGIN IMMEDIATE")
    log = await fast_log(sqlite_store)
    log.record(report())
    assert not await log.flush(timeout_s=0.4)
    assert log.pending == 1
    blocker.rollback()
    blocker.close()
    assert await log.flush()
    assert len(await rows(sqlite_store, RequestRow)) == 1
    assert log.dropped == 0
    await log.close()


async def test_too_many_waiting_reports_are_dropped_counted_and_logged(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    log = OutcomeLog(store, flush_interval_s=60, max_pending=10)
    for index in range(15):
        log.record(report(f"req_{index}"))
    assert (log.pending, log.dropped) == (10, 5)
    assert "dropped 1 outcomes" in caplog.text
    await log.close()
    assert len(await rows(store, RequestRow)) == 10


async def test_reports_in_memory_are_bounded_in_bytes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "MAX_PENDING_BYTES", 1 << 20)
    log = OutcomeLog(store, flush_interval_s=60)
    for index in range(100):
        log.record(report(f"req_{index}", query="\N{GRINNING FACE}" * 100_000))
    kept = log.pending
    assert 1 <= kept <= 16  # 64 KiB of each query at least
    assert kept + log.dropped == 100
    assert await log.flush()
    log.record(report("req_100"))  # there is room again
    assert log.pending == 1
    await log.close()
    written = {row["request_id"]: row["query"] for row in await rows(store, RequestRow)}
    assert len(written) == kept + 1
    assert written["req_0"] == "\N{GRINNING FACE}" * MAX_QUERY_CHARS


async def test_queries_that_wait_for_an_embedding_are_bounded_in_bytes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "MAX_UNEMBEDDED_BYTES", 100_000)
    asked: list[str] = []
    never = asyncio.Event()

    async def embed(texts: Sequence[str]) -> list[bytes]:
        asked.extend(texts)
        await never.wait()
        return []

    log = await fast_log(store, embed=embed)
    for index in range(50):
        log.record(report(f"req_{index}", embedding=None, query=f"{index:02d}" + "x" * 10_000))
    assert await log.flush()
    async with asyncio.timeout(10):
        while not asked:
            await asyncio.sleep(0.01)
    waiting = [*asked, *(query for _, query in log._without_embedding)]
    assert len(waiting) <= 9
    assert waiting[-1].startswith("49")
    assert log._without_embedding_bytes <= 100_000
    await log.close()


async def test_closing_writes_what_waits_and_ends_the_task(store: Store) -> None:
    log = OutcomeLog(store, flush_interval_s=60)
    log.record(report())
    await log.close()
    await log.close()
    assert len(await rows(store, RequestRow)) == 1
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "outcome-log"]
    log.record(report("req_2"))
    assert log.dropped == 1


async def test_closing_gives_up_on_a_store_that_stays_away(
    sqlite_store: Store, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.store.database._SQLITE_BUSY_TIMEOUT_MS", 50)
    await sqlite_store.close()  # so that the next connection has the shorter patience
    blocker = sqlite3.connect(database)
    blocker.execute("BEGIN IMMEDIATE")
    log = await fast_log(sqlite_store)
    log.record(report())
    await log.close(timeout_s=0.2)
    assert log.dropped == 1
    blocker.rollback()
    blocker.close()


# Feedback.


async def test_feedback_is_kept_once_and_only_from_the_owner(store: Store) -> None:
    log = await fast_log(store)
    log.record(report())
    await log.close()
    with pytest.raises(NotFound):
        await add_feedback(store, "req_1", "key_2", 1.0)
    with pytest.raises(NotFound):
        await add_feedback(store, "req_9", "key_1", 1.0)
    await add_feedback(store, "req_1", "key_1", 0.5, "so\0so")
    with pytest.raises(Conflict):
        await add_feedback(store, "req_1", "key_1", 0.5)
    (kept,) = await rows(store, FeedbackRow)
    assert (kept["score"], kept["comment"], kept["owner"]) == (0.5, "so\ufffdso", "key_1")


async def test_of_feedback_given_twice_at_once_one_is_kept(store: Store) -> None:
    log = await fast_log(store)
    log.record(report())
    await log.close()
    given = [add_feedback(store, "req_1", "key_1", 0.1 * index) for index in range(8)]
    results = await asyncio.gather(*given, return_exceptions=True)
    assert sum(isinstance(result, Conflict) for result in results) == 7
    assert sum(isinstance(result, Exception) for result in results) == 7


# The database.


async def test_sqlite_runs_with_a_log_foreign_keys_and_synced_commits(sqlite_store: Store) -> None:
    async with sqlite_store.begin() as connection:
        found = {
            name: (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "foreign_keys", "synchronous", "busy_timeout")
        }
    assert found == {
        "journal_mode": "wal",
        "foreign_keys": 1,
        "synchronous": 2,
        "busy_timeout": 5000,
    }


async def test_the_steps_of_the_schema_end_at_the_tables(store: Store) -> None:
    def differences(connection: Connection) -> list[Any]:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, Base.metadata))

    async with store.begin() as connection:
        assert await connection.run_sync(differences) == []


async def test_a_database_of_before_the_steps_keeps_what_it_has(store_url: str) -> None:
    store = await Store.open(store_url)
    await create_key(store, "ann", ["chat"])
    async with store.begin() as connection:
        for table in reversed(Base.metadata.sorted_tables):
            if table.name != ApiKeyRow.__tablename__:
                await connection.run_sync(table.drop)
        await connection.exec_driver_sql("DROP TABLE alembic_version")
        await connection.exec_driver_sql("ALTER TABLE api_keys DROP COLUMN lists")  # of v0008
        await connection.exec_driver_sql("ALTER TABLE api_keys DROP COLUMN limited_unix_s")
    await store.close()
    store = await Store.open(store_url)
    assert [key.name for key in await list_keys(store)] == ["ann"]
    assert await rows(store, RequestRow) == []
    await store.close()


async def test_several_processes_may_open_a_new_store_at_once(store_url: str) -> None:
    stores = await asyncio.gather(*(Store.open(store_url) for _ in range(6)))
    for store in stores:
        await store.close()


@pytest.mark.parametrize(
    "url", ["nonsense", "sqlite:///x.db", "mysql+nodriver://x/y", "sqlite+aiosqlite://["]
)
async def test_a_url_that_cannot_work_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigError):
        await Store.open(url)


async def test_a_store_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError):
        await Store.open(url_of(tmp_path / "file" / "atlas.db"))
    (tmp_path / "garbage.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreError):
        await Store.open(url_of(tmp_path / "garbage.db"))


CHILD = """
import asyncio, sys, time
from tests.unit.store.test_store import report
from serve_app.store import OutcomeLog, Store, create_key

async def main():
    store = await Store.open(sys.argv[1])
    log = OutcomeLog(store, flush_interval_s=60)
    for index in range(300):
        log.record(report(f"req_{index}"))
    assert await log.flush()
    await create_key(store, "ann", ["chat"])
    for index in range(1000, 1300):
        log.record(report(f"req_{index}"))
    sys.stdout.write("flushed\\n")
    sys.stdout.flush()
    time.sleep(60)

asyncio.run(main())
"""


async def test_a_killed_process_loses_nothing_it_had_acknowledged(store_url: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, store_url],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        assert child.stdout is not None
        line = await asyncio.to_thread(child.stdout.readline)
        assert line == b"flushed\n"
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    store = await Store.open(store_url)
    assert len(await rows(store, RequestRow)) == 300
    assert len(await rows(store, OutcomeRow)) == 600
    assert [key.name for key in await list_keys(store)] == ["ann"]
    log = await fast_log(store)
    log.record(report("req_new"))
    assert await log.flush()
    await log.close()
    await store.close()


# Traces.


async def test_a_trace_is_read_as_it_was_reported_by_its_owner(store: Store) -> None:
    log = await fast_log(store)
    recorded = report(stop=StopReason.STEPS, num_dropped=4)
    log.record(recorded)
    assert await log.flush()
    trace = await read_trace(store, "req_1", "key_1")
    assert (trace.spans, trace.stop, trace.num_dropped) == (recorded.spans, StopReason.STEPS, 4)
    assert (trace.usage, trace.seconds, trace.error) == (recorded.usage, 3.0, None)
    assert (trace.pair, trace.path) == (recorded.decision.pair, recorded.decision.path)
    await log.close()


async def test_a_trace_of_another_owner_is_as_unknown_as_one_that_is_not(store: Store) -> None:
    log = await fast_log(store)
    log.record(report())
    assert await log.flush()
    for request_id, owner in (("req_1", "key_2"), ("req_2", "key_1")):
        with pytest.raises(NotFound) as caught:
            await read_trace(store, request_id, owner)
        assert caught.value.args == (f"no request {request_id!r}", "request_id")
    await log.close()


async def test_a_trace_with_text_that_no_database_takes_is_stored_without_it(store: Store) -> None:
    log = await fast_log(store)
    log.record(report(spans=spans("req_1", "a\0b\ud800c")))
    assert await log.flush()
    assert (await read_trace(store, "req_1", "key_1")).spans[1].error == "a\0b?c"
    await log.close()
