"""Outcomes of finished requests: a queue beside the request path, and the batches it writes.

In come `Report`s, from `OutcomeLog.record`, which never waits; out go rows of `requests`,
`outcomes`, and of `trajectories` and `shadow_decisions` where there is such a thing. What must stay
true: a store that is slow or away costs memory up to a bound and then outcomes, never a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert, select, update

from serve_app.errors import StoreError
from serve_app.schemas import Action, Report
from serve_app.store.database import Store, is_transient
from serve_app.store.tables import OutcomeRow, RequestRow, ShadowRow, TrajectoryRow
from serve_app.telemetry import STORE_DROPPED, STORE_WRITTEN, MetricSink, NoMetrics

logger = logging.getLogger(__name__)

Embed = Callable[[str], Awaitable[bytes]]
"""A text in, its (dim,) float32 little-endian embedding out."""

_BATCH = 500
_EMBED_TIMEOUT_S = 3.0
_EMBED_PAUSE_S = 10.0
_EMBED_SHARE = 0.1
"""Share of the embedder's time that requests nobody waits for may take from those that wait."""
_WRITE_TIMEOUT_S = 30.0
_FIRST_BACKOFF_S = 0.1
_LAST_BACKOFF_S = 5.0
_COMPLAIN_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class _Entry:
    report: Report
    alpha: float | None
    created_unix_s: float


class OutcomeLog:
    """Takes reports at once and writes them soon.

    Algorithm:
        A task wakes every `flush_interval_s`, or at once for `flush`, and writes what is queued in
        batches, each in one transaction. A store that is away is tried again with growing pauses
        up to 5 s, and the batch stays first in the queue. A batch with a row the store will not
        take is written row by row, so that only that row is lost. A request without an embedding
        (the caller named the pair) gets it later, by a second task that runs a tenth of the time.

    Invariants:
        - At most `max_pending` reports are held; newer ones are dropped, counted and logged.
        - Reports are written in the order they were recorded.
    """

    def __init__(
        self,
        store: Store,
        *,
        flush_interval_s: float = 0.2,
        max_pending: int = 50_000,
        embed: Embed | None = None,
        metrics: MetricSink | None = None,
    ) -> None:
        """Make a log; its task starts with the first `record`, in the loop that calls it.

        Args:
            store: Where the rows go.
            flush_interval_s: Seconds a report waits at most while the store keeps up.
            max_pending: Reports held while it does not.
            embed: Makes the embedding of reports that have none; what it fails for keeps none.
            metrics: Counts what is written and dropped.
        """
        self._store = store
        self._flush_interval_s = flush_interval_s
        self._max_pending = max_pending
        self._embed = embed
        self._metrics = metrics or NoMetrics()
        self._queue: deque[_Entry] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._recorded = 0
        self._settled = 0
        self._settled_changed = asyncio.Condition()
        self._dropped = 0
        self._next_complaint = 0.0
        self._without_embedding: deque[tuple[str, str]] = deque(maxlen=max_pending)
        self._embed_task: asyncio.Task[None] | None = None

    @property
    def pending(self) -> int:
        """Reports not yet written."""
        return len(self._queue)

    @property
    def dropped(self) -> int:
        """Reports lost since the start."""
        return self._dropped

    def record(self, report: Report, alpha: float | None = None) -> None:
        """Queue a report; never waits and never raises for the store's sake.

        Args:
            report: A finished request, answered or failed.
            alpha: The cost-quality dial it ran with.
        """
        if self._closed or len(self._queue) >= self._max_pending:
            self._drop(
                1,
                "the log is closed" if self._closed else f"{self._max_pending} are waiting already",
            )
            return
        self._queue.append(_Entry(report, alpha, time.time()))
        self._recorded += 1
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="outcome-log")

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
        if not flushed and self._queue:
            self._drop(len(self._queue), "the store did not take them before the end")
            self._queue.clear()

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._flush_interval_s):
                    await self._wake.wait()
            self._wake.clear()
            while self._queue:
                batch = [self._queue[i] for i in range(min(_BATCH, len(self._queue)))]
                await self._write(batch)
                for _ in batch:
                    self._queue.popleft()
                async with self._settled_changed:
                    self._settled += len(batch)
                    self._settled_changed.notify_all()

    async def _write(self, batch: list[_Entry]) -> None:
        """Write a batch, however long the store is away."""
        rows = [_rows(entry) for entry in batch]
        try:
            await self._insert(rows)
        except Exception:  # whatever a driver makes of a bad value, the task must live on
            logger.warning(
                "a batch of %d outcomes was refused; writing them one by one",
                len(rows),
                exc_info=True,
            )
            for row in rows:
                try:
                    await self._insert([row])
                except Exception:
                    request_id = row.request["request_id"]
                    if not await self._written_before(request_id):
                        self._drop(1, f"the store refused the row of {request_id}")
        self._embed_later(batch)

    async def _written_before(self, request_id: str) -> bool:
        """Whether an earlier try got through although its answer was lost."""
        query = select(RequestRow.request_id).where(RequestRow.request_id == request_id)
        try:
            async with asyncio.timeout(_WRITE_TIMEOUT_S), self._store.begin() as connection:
                return await connection.scalar(query) is not None
        except (StoreError, TimeoutError):
            return False

    async def _insert(self, rows: list[_Rows]) -> None:
        """Insert in one transaction, again and again while the store is away.

        Raises:
            Exception: If the store is there and refuses the rows.
        """
        backoff_s = _FIRST_BACKOFF_S
        while True:
            try:
                async with asyncio.timeout(_WRITE_TIMEOUT_S), self._store.begin() as connection:
                    await connection.execute(insert(RequestRow), [row.request for row in rows])
                    for table, added in (
                        (OutcomeRow, [outcome for row in rows for outcome in row.outcomes]),
                        (TrajectoryRow, [row.trajectory for row in rows if row.trajectory]),
                        (ShadowRow, [row.shadow for row in rows if row.shadow]),
                    ):
                        if added:
                            await connection.execute(insert(table), added)
            except (StoreError, TimeoutError) as error:
                if not is_transient(error):
                    raise
                self._complain(
                    "the store is away (%r); %d outcomes wait",
                    error.__cause__ or error,
                    len(self._queue),
                )
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
            else:
                self._metrics.record(STORE_WRITTEN, len(rows))
                return

    def _embed_later(self, batch: list[_Entry]) -> None:
        if self._embed is None:
            return
        self._without_embedding.extend(
            (entry.report.request_id, storable_text(entry.report.query))
            for entry in batch
            if entry.report.embedding is None and entry.report.query
        )
        if self._without_embedding and (self._embed_task is None or self._embed_task.done()):
            self._embed_task = asyncio.get_running_loop().create_task(
                self._fill_in(self._embed), name="outcome-embeddings"
            )

    async def _fill_in(self, embed: Embed) -> None:
        """Embed what was stored without, one text at a time, until nothing is left."""
        while self._without_embedding:
            request_id, query = self._without_embedding.popleft()
            began_s = time.monotonic()
            try:
                async with asyncio.timeout(_EMBED_TIMEOUT_S):
                    embedding = await embed(query)
                async with asyncio.timeout(_WRITE_TIMEOUT_S), self._store.begin() as connection:
                    await connection.execute(
                        update(RequestRow)
                        .where(RequestRow.request_id == request_id)
                        .values(embedding=embedding)
                    )
            except Exception as error:  # whoever's fault it is, the outcome itself is stored
                self._complain("no embedding for request %s: %r", request_id, error)
                await asyncio.sleep(_EMBED_PAUSE_S)
            else:
                await asyncio.sleep((time.monotonic() - began_s) * (1 / _EMBED_SHARE - 1))

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


_Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Values of the rows of one request."""

    request: _Values
    outcomes: list[_Values]
    trajectory: _Values | None
    shadow: _Values | None


def storable_text(text: str) -> str:
    """The text as every database takes it: PostgreSQL has no NUL, and none has lone surrogates."""
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def _rows(entry: _Entry) -> _Rows:
    report = entry.report
    decision = report.decision
    request = {
        "request_id": report.request_id,
        "owner": report.owner,
        "query": storable_text(report.query),
        "embedding": report.embedding,
        "model_id": decision.pair.model_id,
        "tool_id": decision.pair.tool_id,
        "path": str(decision.path),
        "confidence": decision.confidence,
        "propensity": decision.propensity,
        "alpha": entry.alpha,
        "policy_version": decision.policy_version,
        "pool_version": decision.pool_version,
        "prompt_tokens": report.usage.prompt_tokens,
        "completion_tokens": report.usage.completion_tokens,
        "cost_usd": report.usage.cost_usd,
        "seconds": report.seconds,
        "error": None if report.error is None else storable_text(report.error),
        "created_unix_s": entry.created_unix_s,
    }
    outcomes = [
        {
            "request_id": report.request_id,
            "step_index": index,
            "model_id": step.pair.model_id,
            "tool_id": step.pair.tool_id,
            "path": str(step.path),
            "propensity": step.propensity,
            "prompt_tokens": step.usage.prompt_tokens,
            "completion_tokens": step.usage.completion_tokens,
            "cost_usd": step.usage.cost_usd,
            "seconds": step.seconds,
            "mean_logprob": step.mean_logprob,
            "tool_calls": [
                {"tool_id": call.tool_id, "ok": call.ok, "seconds": call.seconds}
                for call in step.tool_calls
            ],
            "error": None if step.error is None else storable_text(step.error),
        }
        for index, step in enumerate(report.steps)
    ]
    return _Rows(request, outcomes, _trajectory(report), _shadow(report))


def _trajectory(report: Report) -> _Values | None:
    if not report.decisions:
        return None
    decisions = [
        {
            "action": str(decision.action),
            "pair": str(decision.pair) if decision.action is Action.ROUTE else None,
            "propensity": decision.propensity,
        }
        for decision in report.decisions
    ]
    return {
        "request_id": report.request_id,
        "decisions": decisions,
        "answer_step": report.answer_step,
    }


def _shadow(report: Report) -> _Values | None:
    shadow = report.decision.shadow
    if shadow is None:
        return None
    return {
        "request_id": report.request_id,
        "policy_version": shadow.policy_version,
        "action": str(shadow.action),
        "model_id": shadow.pair.model_id,
        "tool_id": shadow.pair.tool_id,
        "path": str(shadow.path),
        "confidence": shadow.confidence,
        "propensity": shadow.propensity,
    }
