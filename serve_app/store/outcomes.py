"""Outcomes of finished requests: a queue beside the request path, and the batches it writes.

In come `Report`s, from `OutcomeLog.record`, which never waits; out go rows of `requests`,
`outcomes`, `spans`, and of `trajectories` and `shadow_decisions` where there is such a thing; the
requests are added to the console's sums. What
must stay true: a recorded report survives the death of this process, and a store that is slow or
away costs memory and disk up to a bound and then outcomes, never a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.errors import StoreError
from serve_app.schemas import Report
from serve_app.store.database import Store, is_transient
from serve_app.store.journal import Journal
from serve_app.store.leases import settle
from serve_app.store.rows import RequestRows, rows_of
from serve_app.store.sums import add_requests
from serve_app.store.tables import OutcomeRow, RequestRow, ShadowRow, TraceRow, TrajectoryRow
from serve_app.telemetry import (
    STORE_DROPPED,
    STORE_RECOVERED,
    STORE_SPILLED,
    STORE_WAITING,
    STORE_WRITTEN,
    MetricSink,
    NoMetrics,
)

logger = logging.getLogger(__name__)

Embed = Callable[[Sequence[str]], Awaitable[list[bytes]]]
"""Texts in, the (dim,) float32 little-endian embedding of each out."""

MAX_PENDING_BYTES = 128 << 20
"""Of reports in memory, whatever `max_pending` allows."""
MAX_UNEMBEDDED_BYTES = 16 << 20
"""Of queries that wait for an embedding; the oldest are let go, and keep none."""
MAX_RATED_UNEMBEDDED = 256
"""Rated queries of at most `MAX_QUERY_CHARS` that wait for an embedding; the oldest are let go."""

_BATCH = 500
_LINES_AT_ONCE = 50
"""Lines of the journal that are read before other work of the event loop gets a turn."""
_EMBEDDED_AT_ONCE = 16
"""Queries that share a call of the embedder, and a transaction."""
_EMBED_TIMEOUT_S = 3.0
_EMBED_PAUSE_S = 10.0
_EMBED_SHARE = 0.1
"""Share of the embedder's time that requests nobody waits for may take from those that wait."""
_WRITE_TIMEOUT_S = 30.0
_FIRST_BACKOFF_S = 0.1
_LAST_BACKOFF_S = 5.0
_COMPLAIN_EVERY_S = 10.0
_ADOPT_EVERY_S = 5.0


@dataclass(slots=True)
class _Waiting:
    """A report in the queue."""

    rows: RequestRows | bytes
    """As a line of the journal where it comes from there."""
    num_bytes: int
    """In memory, about."""
    in_journal: bool
    is_own: bool = True
    """Whether this process recorded it."""


class OutcomeLog:
    """Takes reports at once and writes them soon.

    Algorithm:
        A report goes to the journal, a file, and to the queue, in memory. A task wakes every
        `flush_interval_s`, or at once for `flush`, and writes what is queued in batches, each in
        one transaction; the journal forgets what is written. A full queue leaves newer reports to
        the journal alone, and they are read back when it is empty. A store that is away is tried
        again with growing pauses up to 5 s, and the batch stays first. A batch with a row the store
        will not take is written row by row, so that only that row is lost. A request without an
        embedding (the caller named the pair, or a first look decided) gets it later, by a second
        task that runs a tenth of the time; a request that was rated gets it before the others,
        because its verdict teaches nothing until then. What the journal of an ended process still
        holds is written as if it came last.

    Invariants:
        - A report that `record` took is written, by this process or, after its death, by the next
          that uses the journal's folder; those of a request that was written already are not
          written twice.
        - At most `max_pending` reports of `MAX_PENDING_BYTES`, or one file of the journal, are in
          memory. What neither takes is dropped, counted and logged.
        - Of a query the first `MAX_QUERY_CHARS` are kept, in memory, on disk and in the store.
        - Reports are written in the order they were recorded.
        - A journal that cannot be written costs these guarantees, never a report that memory takes.
    """

    def __init__(
        self,
        store: Store,
        *,
        flush_interval_s: float = 0.2,
        max_pending: int = 50_000,
        journal: Journal | None = None,
        embed: Embed | None = None,
        metrics: MetricSink | None = None,
    ) -> None:
        """Make a log; its task starts with `start` or the first `record`, in the calling loop.

        Args:
            store: Where the rows go.
            flush_interval_s: Seconds a report waits at most while the store keeps up.
            max_pending: Reports held in memory while it does not.
            journal: Holds what is not written yet; `None` holds it in memory only.
            embed: Makes the embedding of reports that have none; what it fails for keeps none.
            metrics: Counts what is written, spilled and dropped.
        """
        self._store = store
        self._flush_interval_s = flush_interval_s
        self._max_pending = max_pending
        self._journal = journal
        self._embed = embed
        self._metrics = metrics or NoMetrics()
        self._queue: deque[_Waiting] = deque()
        self._queue_bytes = 0
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._recorded = 0
        self._settled = 0
        self._settled_changed = asyncio.Condition()
        self._dropped = 0
        self._next_complaint = 0.0
        self._next_adoption_s = 0.0
        self._without_embedding: deque[tuple[str, str]] = deque()
        self._without_embedding_bytes = 0
        self._rated: deque[tuple[str, str]] = deque(maxlen=MAX_RATED_UNEMBEDDED)
        self._embed_task: asyncio.Task[None] | None = None

    @property
    def pending(self) -> int:
        """Reports recorded here and not yet written."""
        return self._recorded - self._settled

    @property
    def dropped(self) -> int:
        """Reports lost since the start."""
        return self._dropped

    def start(self) -> None:
        """Begin to write what ended processes left; must be called in a running event loop."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="outcome-log")

    def record(self, report: Report, alpha: float | None = None) -> None:
        """Queue a report; never waits and never raises for the store's sake.

        Args:
            report: A finished request, answered or failed.
            alpha: The cost-quality dial it ran with.
        """
        if self._closed:
            self._drop(1, "the log is closed")
            return
        rows = rows_of(report, alpha, time.time())
        size = rows.num_bytes()
        has_room = (
            len(self._queue) < self._max_pending and self._queue_bytes + size <= MAX_PENDING_BYTES
        )
        in_memory = has_room and not (self._journal is not None and self._journal.has_unread)
        in_journal = self._append(rows, in_memory=in_memory)
        if in_memory or (has_room and not in_journal):
            self._queue.append(_Waiting(rows, size, in_journal))
            self._queue_bytes += size
        elif in_journal:
            self._metrics.record(STORE_SPILLED)
        else:
            self._drop(1, f"{len(self._queue)} are waiting already, and the journal is full")
            return
        self._recorded += 1
        self.start()

    def _append(self, rows: RequestRows, *, in_memory: bool) -> bool:
        """Put a report into the journal, if there is one and it takes it."""
        if self._journal is None:
            return False
        try:
            line = rows.to_line()
        except TypeError:  # the store will not take it either, and says so in its own time
            return False
        if self._journal.append(line, in_memory=in_memory):
            return True
        self._complain("the journal takes no more: %d bytes", self._journal.num_bytes)
        return False

    async def flush(self, timeout_s: float = 5.0) -> bool:
        """Wait until everything recorded so far is written (or dropped as bad).

        Returns:
            Whether that was reached within `timeout_s`.
        """
        target = self._recorded
        if self._settled >= target:
            return True
        self._wake.set()
        try:
            async with asyncio.timeout(timeout_s), self._settled_changed:
                await self._settled_changed.wait_for(lambda: self._settled >= target)
        except TimeoutError:
            return False
        return True

    async def close(self, timeout_s: float = 5.0) -> None:
        """Write what is left, for at most `timeout_s`, and stop."""
        if self._closed:
            return
        flushed = await self.flush(timeout_s)
        self._closed = True
        for task in (self._task, self._embed_task):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if not flushed:
            lost = sum(entry.is_own and not entry.in_journal for entry in self._queue)
            if lost:
                self._drop(lost, "the store did not take them before the end")
            if self.pending > lost:
                self._metrics.record(STORE_SPILLED, self.pending - lost)
                logger.warning("%d outcomes wait for the next process", self.pending - lost)
        self._queue.clear()
        self._queue_bytes = 0
        if self._journal is not None:
            self._journal.close()

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._flush_interval_s):
                    await self._wake.wait()
            self._wake.clear()
            while await self._refill():
                batch = [self._queue[i] for i in range(min(_BATCH, len(self._queue)))]
                await self._write(batch)
                for _ in batch:
                    self._queue_bytes -= self._queue.popleft().num_bytes
                if self._journal is not None:
                    self._journal.commit(sum(entry.in_journal for entry in batch))
                await self._settle(sum(entry.is_own for entry in batch))
                self._metrics.record(STORE_WAITING, self.pending)

    async def _settle(self, count: int) -> None:
        """So many more reports of this process need not wait any more."""
        async with self._settled_changed:
            self._settled += count
            self._settled_changed.notify_all()

    def _adopt(self) -> None:
        """Take over, now and then, what the journals of ended processes hold."""
        if self._journal is None or time.monotonic() < self._next_adoption_s:
            return
        self._next_adoption_s = time.monotonic() + _ADOPT_EVERY_S
        if adopted := self._journal.adopt():
            logger.info("taking over %d files of outcomes that other processes left", adopted)

    async def _refill(self) -> bool:
        """Take over what others left, and read from the journal where the queue is empty.

        Returns:
            Whether there is something in the queue.
        """
        self._adopt()
        while not self._queue and self._journal is not None:
            reading = self._journal.read_next()
            if reading is None:
                break
            self._queue.extend(
                _Waiting(line, len(line), in_journal=True, is_own=reading.is_own)
                for line in reading.lines
            )
            self._queue_bytes += sum(map(len, reading.lines))
            if reading.num_lost:
                self._drop(reading.num_lost, "the journal does not have them any more")
                await self._settle(reading.num_lost)
        return bool(self._queue)

    async def _write(self, batch: list[_Waiting]) -> None:
        """Write a batch, however long the store is away."""
        rows: list[RequestRows] = []
        for entry in batch:
            if isinstance(entry.rows, bytes):
                try:
                    rows.append(RequestRows.from_line(entry.rows))
                except (ValueError, TypeError, KeyError) as error:
                    self._drop(1, f"a line of the journal is damaged: {error}")
                if len(rows) % _LINES_AT_ONCE == 0:
                    await asyncio.sleep(0)
            else:
                rows.append(entry.rows)
        adopted = sum(not entry.is_own for entry in batch)
        try:
            written = await self._insert(rows, may_be_there=adopted > 0)
        except Exception:  # whatever a driver makes of a bad value, the task must live on
            logger.warning(
                "a batch of %d outcomes was refused; writing them one by one",
                len(rows),
                exc_info=True,
            )
            written = 0
            for row in rows:
                try:
                    written += await self._insert([row], may_be_there=True)
                except Exception:
                    self._drop(1, f"the store refused the row of {row.request['request_id']}")
        if adopted:
            self._metrics.record(STORE_RECOVERED, min(written, adopted))
        self._embed_later(rows)

    async def _insert(self, rows: list[RequestRows], *, may_be_there: bool) -> int:
        """Insert in one transaction, again and again while the store is away.

        Args:
            rows: Of at most `_BATCH` requests.
            may_be_there: Whether some may have been written before, by a try whose answer was lost
                or by a process that ended; those are left out.

        Returns:
            How many requests are new.

        Raises:
            Exception: If the store is there and refuses the rows.
        """
        backoff_s = _FIRST_BACKOFF_S
        while True:
            try:
                async with asyncio.timeout(_WRITE_TIMEOUT_S), self._store.begin() as connection:
                    new = await _missing(connection, rows) if may_be_there else rows
                    for table, added in (
                        (RequestRow, [row.request for row in new]),
                        (OutcomeRow, [outcome for row in new for outcome in row.outcomes]),
                        (TrajectoryRow, [row.trajectory for row in new if row.trajectory]),
                        (ShadowRow, [row.shadow for row in new if row.shadow]),
                        (TraceRow, [row.trace for row in new if row.trace]),
                    ):
                        if added:
                            await connection.execute(insert(table), added)
                    await settle(connection, new)
                    await add_requests(
                        connection,
                        [row.request for row in new],
                        [row.shadow for row in new if row.shadow],
                    )
            except (StoreError, TimeoutError) as error:
                if not is_transient(error):
                    raise
                self._complain(
                    "the store is away (%r); %d outcomes wait",
                    error.__cause__ or error,
                    self.pending,
                )
                self._metrics.record(STORE_WAITING, self.pending)
                if self._journal is not None:
                    await asyncio.to_thread(self._journal.sync())
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
            else:
                self._metrics.record(STORE_WRITTEN, len(new))
                return len(new)

    def _embed_later(self, batch: list[RequestRows]) -> None:
        if self._embed is None:
            return
        for rows in batch:
            request = rows.request
            # A failed request teaches nothing.
            if request["embedding"] is None and request["query"] and request["error"] is None:
                self._without_embedding.append((request["request_id"], request["query"]))
                self._without_embedding_bytes += sys.getsizeof(request["query"])
        while self._without_embedding_bytes > MAX_UNEMBEDDED_BYTES:
            self._next_without_embedding()
        self._start_embedding(self._embed)

    def embed_rated(self, request_id: str, query: str) -> None:
        """Have the query of a stored request embedded before those that nobody rated.

        Args:
            request_id: Of the request; its row has no embedding.
            query: As it is stored.
        """
        if self._embed is not None and not self._closed:
            self._rated.append((request_id, query))
            self._start_embedding(self._embed)

    def _start_embedding(self, embed: Embed) -> None:
        is_at_work = self._embed_task is not None and not self._embed_task.done()
        if (self._rated or self._without_embedding) and not is_at_work:
            self._embed_task = asyncio.get_running_loop().create_task(
                self._fill_in(embed), name="outcome-embeddings"
            )

    def _next_without_embedding(self) -> tuple[str, str]:
        request_id, query = self._without_embedding.popleft()
        self._without_embedding_bytes -= sys.getsizeof(query)
        return request_id, query

    async def _fill_in(self, embed: Embed) -> None:
        """Embed what was stored without, a few texts at a time, until nothing is left."""
        while self._rated or self._without_embedding:
            if self._rated:
                size = min(_EMBEDDED_AT_ONCE, len(self._rated))
                await self._fill([self._rated.popleft() for _ in range(size)], embed)
                continue
            size = min(_EMBEDDED_AT_ONCE, len(self._without_embedding))
            waiting = [self._next_without_embedding() for _ in range(size)]
            began_s = time.monotonic()
            await self._fill(waiting, embed)
            await asyncio.sleep((time.monotonic() - began_s) * (1 / _EMBED_SHARE - 1))

    async def _fill(self, waiting: Sequence[tuple[str, str]], embed: Embed) -> None:
        """Embed the queries of some requests, and write that; each by itself where one fails."""
        try:
            async with asyncio.timeout(_EMBED_TIMEOUT_S):
                embeddings = await embed([query for _, query in waiting])
            async with asyncio.timeout(_WRITE_TIMEOUT_S), self._store.begin() as connection:
                for (request_id, _), embedding in zip(waiting, embeddings, strict=True):
                    await connection.execute(
                        update(RequestRow)
                        .where(RequestRow.request_id == request_id)
                        .values(embedding=embedding)
                    )
        except Exception as error:  # whoever's fault it is, the outcomes themselves are stored
            if len(waiting) > 1:
                for entry in waiting:
                    await self._fill([entry], embed)
                return
            self._complain("no embedding for request %s: %r", waiting[0][0], error)
            await asyncio.sleep(_EMBED_PAUSE_S)

    def _drop(self, count: int, why: str) -> None:
        self._dropped += count
        self._metrics.record(STORE_DROPPED, count)
        self._complain("dropped %d outcomes (%d since the start): %s", count, self._dropped, why)

    def _complain(self, message: str, *args: Any) -> None:
        """Log a warning, but not a flood of them."""
        now = time.monotonic()
        if now >= self._next_complaint:
            self._next_complaint = now + _COMPLAIN_EVERY_S
            logger.warning(message, *args)


async def _missing(connection: AsyncConnection, rows: list[RequestRows]) -> list[RequestRows]:
    """Those whose request the store does not have, each once."""
    by_id = {row.request["request_id"]: row for row in rows}
    query = select(RequestRow.request_id).where(RequestRow.request_id.in_(by_id))
    there = set(await connection.scalars(query))
    return [row for request_id, row in by_id.items() if request_id not in there]
