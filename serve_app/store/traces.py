"""Traces of finished requests, for their owners and for admins."""

from __future__ import annotations

from dataclasses import dataclass

import orjson
from sqlalchemy import select

from serve_app.errors import NotFound
from serve_app.schemas import (
    BY_STEPS,
    Action,
    DecidedBy,
    Pair,
    Replay,
    Route,
    SpanKind,
    SpanRecord,
    StopReason,
    Usage,
)
from serve_app.store.database import Store
from serve_app.store.tables import FeedbackRow, RequestRow, TraceRow


@dataclass(frozen=True, slots=True)
class StoredTrace:
    """What happened in one finished request."""

    request_id: str
    created_unix_s: float
    """When it ended."""
    pair: Pair
    """The candidate that was chosen first."""
    path: DecidedBy
    """What made that choice: a rule, or the caller."""
    confidence: float
    propensity: float
    policy_version: int
    pool_version: int
    usage: Usage
    seconds: float
    error: str | None
    """Why it failed; `None`: it was answered."""
    stop: StopReason
    """Why nothing more was done."""
    spans: tuple[SpanRecord, ...]
    """Each after the one it is part of; never empty."""
    num_dropped: int
    """Spans that were not kept."""
    owner: str
    query: str
    """The last user message, as far as it is kept."""
    alpha: float | None
    """The cost-quality dial it ran with."""
    score: float | None
    """The owner's verdict in [0, 1]; `None`: there is none."""

    def choices(self) -> Replay:
        """What was chosen, so that it can be chosen again."""
        kinds = {SpanKind.PAIR: Action.ROUTE, SpanKind.THOUGHT: Action.THINK}
        steps = tuple(
            (kinds[span.kind], Pair.parse(span.name)) for span in self.spans if span.kind in kinds
        )
        return Replay(
            self.request_id,
            steps or ((Action.ROUTE, self.pair),),
            self.path in BY_STEPS,
            self._routes(),
            self._answer_step(),
        )

    def _answer_step(self) -> int | None:
        """The step whose answer the router chose last."""
        chosen = [span.attributes.get("answer_step") for span in self.spans if span.parent_id == 0]
        steps = [step for step in chosen if isinstance(step, int)]
        return steps[-1] if steps else None

    def _routes(self) -> dict[Route, tuple[tuple[Pair, ...], ...]]:
        """What the router chose for nodes of patterns."""
        spans = {span.span_id: span for span in self.spans}
        routes: dict[Route, list[list[Pair]]] = {}
        for span in self.spans:
            above = None if span.parent_id is None else spans[span.parent_id]
            if above is None or above.kind is SpanKind.REQUEST:
                continue
            names: list[str] = []
            while above.parent_id is not None:
                names.insert(0, above.name)
                above = spans[above.parent_id]
            chosen = span.attributes.get("pair")
            if span.kind is SpanKind.DECISION and isinstance(chosen, str):
                routes.setdefault(tuple(names), []).append([Pair.parse(chosen)])
            elif span.kind is SpanKind.CALL and tuple(names) in routes:
                ran = routes[tuple(names)][-1]
                ran += [pair for pair in [Pair.parse(span.name)] if pair not in ran]
        return {route: tuple(map(tuple, chosen)) for route, chosen in routes.items()}


async def read_trace(store: Store, request_id: str, owner: str | None) -> StoredTrace:
    """What happened in a request.

    Args:
        store: Where it is kept.
        request_id: The request's id, as its response said.
        owner: Id of the key that reads; only the key that made the request finds the trace.
            `None` finds everybody's: for admins.

    Raises:
        NotFound: If there is no such request of this owner; whether another has it is not told.
        StoreError: If the store is away.
    """
    query = (
        select(
            RequestRow.created_unix_s,
            RequestRow.model_id,
            RequestRow.tool_id,
            RequestRow.path,
            RequestRow.confidence,
            RequestRow.propensity,
            RequestRow.policy_version,
            RequestRow.pool_version,
            RequestRow.prompt_tokens,
            RequestRow.completion_tokens,
            RequestRow.cost_usd,
            RequestRow.seconds,
            RequestRow.error,
            RequestRow.query,
            TraceRow.stop,
            TraceRow.spans,
            TraceRow.num_dropped,
            RequestRow.owner,
            RequestRow.query,
            RequestRow.alpha,
            FeedbackRow.score,
        )
        .join(TraceRow, TraceRow.request_id == RequestRow.request_id)
        .outerjoin(FeedbackRow, FeedbackRow.request_id == RequestRow.request_id)
        .where(RequestRow.request_id == request_id)
    )
    if owner is not None:
        query = query.where(RequestRow.owner == owner)
    async with store.begin() as connection:
        row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise NotFound(f"no request {request_id!r}", "request_id")
    return StoredTrace(
        request_id=request_id,
        created_unix_s=row.created_unix_s,
        pair=Pair(row.model_id, row.tool_id),
        path=DecidedBy(row.path),
        confidence=row.confidence,
        propensity=row.propensity,
        policy_version=row.policy_version,
        pool_version=row.pool_version,
        usage=Usage(row.prompt_tokens, row.completion_tokens, row.cost_usd),
        seconds=row.seconds,
        error=row.error,
        stop=StopReason(row.stop),
        spans=tuple(
            SpanRecord(**span | {"kind": SpanKind(span["kind"])})
            for span in orjson.loads(row.spans)
        ),
        num_dropped=row.num_dropped,
        owner=row.owner,
        query=row.query,
        alpha=row.alpha,
        score=row.score,
    )
