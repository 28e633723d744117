"""Verdicts on finished requests, by their owners."""

from __future__ import annotations

import time

from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError

from serve_app.errors import Conflict, NotFound
from serve_app.store.database import Store
from serve_app.store.outcomes import storable_text
from serve_app.store.tables import FeedbackRow, RequestRow


async def add_feedback(
    store: Store, request_id: str, owner: str, score: float, comment: str | None = None
) -> None:
    """Keep a score for a request.

    Args:
        store: Where it is kept.
        request_id: The request's id, as its response said.
        owner: Who says so; must be who asked.
        score: In [0, 1].
        comment: Free text.

    Raises:
        NotFound: If there is no such request of this owner; whether another has it is not told.
        Conflict: If the request has its score.
        StoreError: If the store is away.
    """
    try:
        async with store.begin() as connection:
            known = await connection.scalar(
                select(RequestRow.request_id).where(
                    RequestRow.request_id == request_id, RequestRow.owner == owner
                )
            )
            if known is None:
                raise NotFound(f"no request {request_id!r}", "request_id")
            await connection.execute(
                insert(FeedbackRow).values(
                    request_id=request_id,
                    owner=owner,
                    score=score,
                    comment=None if comment is None else storable_text(comment),
                    created_unix_s=time.time(),
                )
            )
    except IntegrityError as error:
        raise Conflict(f"request {request_id!r} has its feedback already", "request_id") from error
