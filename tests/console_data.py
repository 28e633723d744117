"""What a store of a busy deployment has, in small: requests of several keys, verdicts, policies."""

from __future__ import annotations

import math
import time
import uuid

from sqlalchemy import insert

from serve_app.config import AtlasConfig
from serve_app.orchestrator.decision_client import facts_of
from serve_app.schemas import (
    Action,
    Candidate,
    DecidedBy,
    Decision,
    Pair,
    Report,
    ShadowDecision,
    SpanKind,
    SpanRecord,
    Step,
    Usage,
)
from serve_app.store import (
    OutcomeLog,
    Store,
    add_feedback,
    note_definitions,
)
from serve_app.store.rows import rows_of
from serve_app.store.sums import add_requests
from serve_app.store.tables import RequestRow, TraceRow
from tests.console_learned import fill_learned, topic_embedding

HOSTILE = "<script>alert('query')</script><img src=x onerror=alert(1)>'\"{{7*7}}"
"""What must never become markup or code, wherever a page shows it."""


def report(
    number: int,
    *,
    owner: str = "local",
    query: str = "What is 6 times 7?",
    error: str | None = None,
) -> Report:
    """A finished request of one of two candidates."""
    pair = Pair(("small", "large")[number % 3 == 0], ("calculator", "none")[number % 2])
    path = (DecidedBy.CLUSTERS, DecidedBy.POLICY, DecidedBy.OUT_OF_DISTRIBUTION)[number % 3]
    seconds = 0.2 + 0.1 * math.sin(number) ** 2
    usage = Usage(40, 20, 0.0001 * (1 + number % 5))
    decision = Decision(
        (Candidate(pair, 0.7, 0.8, 0.1, 0.6, 0.9, 0.0003),),
        path,
        confidence=(number % 10) / 10,
        propensity=0.9,
        policy_version=3 if number % 10 == 3 else 2,
        pool_version=3,
        shadow=_shadow(number),
        cluster=None if path is DecidedBy.OUT_OF_DISTRIBUTION else number // 3 % 3,
    )
    step = Step(pair, path, 0.9, usage, seconds, answer="42", error=error)

    def span(
        span_id: int, above: int | None, kind: SpanKind, name: str, began_s: float, took_s: float
    ) -> SpanRecord:
        fault = error if kind is SpanKind.PAIR else None
        attributes = facts_of(decision) if kind is SpanKind.DECISION else {}
        return SpanRecord(
            span_id, above, kind, name, began_s, took_s, fault, 40, 20, usage.cost_usd, attributes
        )

    return Report(
        request_id=f"req_{uuid.uuid5(uuid.NAMESPACE_OID, f'{owner} {number}').hex}",
        decision=decision,
        steps=(step,),
        usage=usage,
        seconds=seconds,
        query=query,
        embedding=topic_embedding(number % 3),
        owner=owner,
        error=error,
        spans=(
            span(0, None, SpanKind.REQUEST, "request", 0.0, seconds),
            span(1, 0, SpanKind.DECISION, "router", 0.001, 0.01),
            span(2, 0, SpanKind.PAIR, str(pair), 0.012, seconds - 0.02),
            span(3, 2, SpanKind.MODEL, pair.model_id, 0.013, seconds / 2),
            span(4, 2, SpanKind.TOOL, pair.tool_id, 0.013 + seconds / 2, seconds / 4),
        ),
    )


def _shadow(number: int) -> ShadowDecision | None:
    """What policy 4 would have done with every third request."""
    if number % 3:
        return None
    pair = Pair("large", "none")
    return ShadowDecision(4, Action.ROUTE, pair, DecidedBy.CLUSTERS, 0.6, 1.0)


async def fill(
    store: Store,
    log: OutcomeLog,
    config: AtlasConfig,
    *,
    owner: str = "local",
    count: int = 60,
    hours: float = 0.0,
) -> str:
    """Write requests, of which the newest is hostile, and what goes with them.

    Args:
        store: Where they go.
        log: Takes the requests.
        config: The deployment.
        owner: Who asked.
        count: Requests, beside the hostile one.
        hours: Over which they are spread, up to now; 0: all of them are of now.

    Returns:
        Id of the hostile request.
    """
    await fill_learned(store, config)
    seen = {HOSTILE[:60]: ("a" * 64, HOSTILE), "search": ("b" * 64, "looks things up")}
    await note_definitions(store, "notes", seen, accept=False)
    rated = []
    for number in range(count):
        one = report(number, owner=owner, error="the engine failed" if number % 20 == 7 else None)
        if hours:
            await _write(store, one, time.time() - 3600 * hours * (1 - number / count))
        else:
            log.record(one, 0.1)
        if one.error is None and number % 2:
            rated.append((one.request_id, float(number % 4 == 1)))
    hostile = report(count, owner=owner, query=HOSTILE, error=f"the engine said {HOSTILE}")
    log.record(hostile, 0.1)
    await log.flush(20)
    for request_id, score in rated:
        await add_feedback(store, request_id, owner, score, HOSTILE)
    return hostile.request_id


async def _write(store: Store, one: Report, at_unix_s: float) -> None:
    """Write a request as the log does, of another time."""
    rows = rows_of(one, 0.1, at_unix_s)
    assert rows.trace is not None
    async with store.begin() as connection:
        await connection.execute(insert(RequestRow), [rows.request])
        await connection.execute(insert(TraceRow), [rows.trace])
        await add_requests(connection, [rows.request], [rows.shadow] if rows.shadow else [])
