"""Retention: what is stored of requests and jobs is deleted after a time, or when a key expires.

Labelled questions, their outcomes, snapshots, policies, the pool and API keys stay: the router is
made of them. A request goes with all that hangs on it: outcomes, trajectory, shadow decision,
spans, feedback, and what the sums have of its day.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.errors import StoreError
from serve_app.store.console_tables import (
    ChoiceDayRow,
    LatencyRow,
    ShadowDayRow,
    TrafficRow,
    UsageDayRow,
    VerdictDayRow,
)
from serve_app.store.database import Store
from serve_app.store.jobs import OVER
from serve_app.store.sums import DAY_S
from serve_app.store.tables import (
    FeedbackRow,
    IdempotencyKeyRow,
    JobRow,
    KeyWindowRow,
    OutcomeRow,
    RequestRow,
    ShadowRow,
    TraceRow,
    TrajectoryRow,
)

logger = logging.getLogger(__name__)

_BATCH = 200
"""Requests, jobs or keys deleted in one transaction: milliseconds, which writers may wait for."""
_PAUSE_S = 0.1
"""Between two batches: nine tenths of the time belong to others."""
_LOCK = 20261
"""Number of PostgreSQL's advisory lock: one process at a time deletes."""
_SUMS = (TrafficRow, LatencyRow, UsageDayRow, VerdictDayRow, ChoiceDayRow, ShadowDayRow)


class Retention:
    """Deletes what is old, beside the request path.

    Invariants:
        - One process at a time deletes; another one's turn comes with its next look.
        - A store that is away costs a log line; the next look tries again.
    """

    def __init__(self, store: Store, days: float | None, *, interval_s: float = 3600.0) -> None:
        """Set the time; `start` begins.

        Args:
            store: Where the rows are.
            days: How long a request and a job that is over are kept; `None`: for ever. A key with
                its answer is kept as long as its row says.
            interval_s: Seconds between two looks.
        """
        self._store = store
        self._days = days
        self._interval_s = interval_s
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look; must be called in a running event loop."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="retention")

    async def close(self) -> None:
        """Stop; a batch under way is undone or done, never half."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        days = self._days
        while True:
            try:
                await delete_expired_keys(self._store)
                if days is not None:
                    count = await delete_old(self._store, time.time() - days * DAY_S)
                    if count:
                        logger.info("deleted %d requests and jobs older than %g days", count, days)
            except StoreError as error:
                logger.warning("nothing old was deleted: %r", error.__cause__ or error)
            except Exception:  # a driver's own error must not end it
                logger.exception("nothing old was deleted")
            await asyncio.sleep(self._interval_s)


async def delete_old(store: Store, before_unix_s: float) -> int:
    """Delete requests, jobs and periods of keys that were over before a time, in small batches.

    Returns:
        How many; 0 also where another process deletes just now.

    Raises:
        StoreError: If the store is away; what was deleted by then stays deleted.
    """

    async def one_batch(connection: AsyncConnection) -> int:
        count = await _delete_requests(connection, before_unix_s)
        count += await _delete_windows(connection, before_unix_s)
        return count + await _delete_jobs(connection, before_unix_s)

    async with store.begin() as connection:
        for table in _SUMS:
            is_old = table.began_unix_s < before_unix_s - DAY_S
            await connection.execute(delete(table).where(is_old))
    return await _in_batches(store, one_batch)


async def delete_expired_keys(store: Store) -> int:
    """Delete idempotency keys that have expired, with their answers; those in use stay.

    Returns:
        How many; 0 also where another process deletes just now.

    Raises:
        StoreError: If the store is away.
    """
    return await _in_batches(store, _delete_keys)


async def _in_batches(store: Store, one_batch: Callable[[AsyncConnection], Awaitable[int]]) -> int:
    """Delete batch by batch until nothing is left, or another process deletes; how many."""
    total = 0
    while True:
        async with store.begin() as connection:
            if not await _may_delete(connection):
                return total
            count = await one_batch(connection)
        if not count:
            return total
        total += count
        await asyncio.sleep(_PAUSE_S)


async def _may_delete(connection: AsyncConnection) -> bool:
    """Whether nobody else deletes; holds until the transaction ends."""
    if connection.dialect.name == "sqlite":
        await connection.exec_driver_sql("BEGIN IMMEDIATE")  # waits for whoever writes
        return True
    locked = await connection.exec_driver_sql(f"SELECT pg_try_advisory_xact_lock({_LOCK})")
    return bool(locked.scalar_one())


async def _delete_requests(connection: AsyncConnection, before_unix_s: float) -> int:
    oldest = (
        select(RequestRow.request_id)
        .where(RequestRow.created_unix_s < before_unix_s)
        .order_by(RequestRow.created_unix_s)
        .limit(_BATCH)
    )
    ids = list(await connection.scalars(oldest))
    if ids:
        for table in (FeedbackRow, OutcomeRow, TrajectoryRow, ShadowRow, TraceRow, RequestRow):
            await connection.execute(delete(table).where(table.request_id.in_(ids)))
    return len(ids)


async def _delete_windows(connection: AsyncConnection, before_unix_s: float) -> int:
    row = KeyWindowRow
    oldest = select(row.key_id, row.per, row.began_unix_s).where(row.ends_unix_s < before_unix_s)
    windows = (await connection.execute(oldest.limit(_BATCH))).all()
    for key_id, per, began_s in windows:
        this = (row.key_id == key_id, row.per == per, row.began_unix_s == began_s)
        await connection.execute(delete(row).where(*this))
    return len(windows)


async def _delete_jobs(connection: AsyncConnection, before_unix_s: float) -> int:
    oldest = (
        select(JobRow.job_id)
        .where(JobRow.created_unix_s < before_unix_s, JobRow.state.in_(OVER))
        .order_by(JobRow.created_unix_s)
        .limit(_BATCH)
    )
    ids = list(await connection.scalars(oldest))
    if ids:
        await connection.execute(delete(JobRow).where(JobRow.job_id.in_(ids)))
    return len(ids)


async def _delete_keys(connection: AsyncConnection) -> int:
    now_s, row = time.time(), IdempotencyKeyRow
    is_over = (row.expires_unix_s <= now_s, row.lease_until_unix_s <= now_s)
    oldest = select(row.owner, row.key_hash).where(*is_over).order_by(row.expires_unix_s)
    keys = (await connection.execute(oldest.limit(_BATCH))).all()
    for owner, key_hash in keys:
        # A key that was claimed anew meanwhile stays.
        this = (row.owner == owner, row.key_hash == key_hash)
        await connection.execute(delete(row).where(*this, *is_over))
    return len(keys)
