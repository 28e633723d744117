"""Requests in lists, the newest first, by what is known of them."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, func, select, tuple_

from serve_app.schemas import Pair
from serve_app.store.database import Store
from serve_app.store.tables import RequestRow

MAX_LISTED_QUERY_CHARS = 200
MAX_SEARCHED = 10_000
"""Requests that one look at a list goes through."""


@dataclass(frozen=True, slots=True)
class RequestFilter:
    """Which requests are listed; `None` lists them whatever it is."""

    since_unix_s: float = 0.0
    pair: Pair | None = None
    path: str | None = None
    owner: str | None = None
    has_failed: bool | None = None
    min_cost_usd: float | None = None
    before: tuple[float, str] | None = None
    """End and id of the last request of the page before."""


@dataclass(frozen=True, slots=True)
class ListedRequest:
    """A request in a list."""

    request_id: str
    created_unix_s: float
    owner: str
    query: str
    """Cut."""
    pair: Pair
    path: str
    confidence: float
    policy_version: int
    cost_usd: float
    seconds: float
    error: str | None


async def listed_requests(
    store: Store, wanted: RequestFilter, limit: int
) -> tuple[list[ListedRequest], tuple[float, str] | None]:
    """Requests, the newest first.

    At most `MAX_SEARCHED` of one key, of one candidate, or of all are looked through, so that a
    search for what is rare ends in time, and can go on from where it stopped.

    Returns:
        The requests, and `before` of the filter that finds those after them; `None`: there are
        none.
    """
    row = RequestRow
    place, rest = _conditions(wanted)
    async with store.begin() as connection:
        order = (row.created_unix_s.desc(), row.request_id.desc())
        seen = select(row.created_unix_s).where(*place).order_by(row.created_unix_s.desc())
        horizon = await connection.scalar(seen.offset(MAX_SEARCHED).limit(1))
        if horizon is not None:
            rest = [*rest, row.created_unix_s >= horizon]
        columns = [getattr(row, name) for name in _LISTED]
        text = func.substr(row.query, 1, MAX_LISTED_QUERY_CHARS)
        query = select(*columns, text, row.model_id, row.tool_id).where(*place, *rest)
        rows = (await connection.execute(query.order_by(*order).limit(limit))).all()
    found = [
        ListedRequest(**dict(zip(_LISTED, listed, strict=True)), query=text, pair=Pair(*pair))
        for *listed, text, model_id, tool_id in rows
        for pair in [(model_id, tool_id)]
    ]
    if len(found) == limit:
        return found, (found[-1].created_unix_s, found[-1].request_id)
    # No id is before this one: those of the horizon's own moment were looked at.
    return found, None if horizon is None else (horizon, "")


_LISTED = (
    "request_id",
    "created_unix_s",
    "owner",
    "path",
    "confidence",
    "policy_version",
    "cost_usd",
    "seconds",
    "error",
)


def _conditions(
    wanted: RequestFilter,
) -> tuple[list[ColumnElement[bool]], list[ColumnElement[bool]]]:
    """What an index finds, and what has to be looked at row by row."""
    row = RequestRow
    place = [row.created_unix_s >= wanted.since_unix_s]
    if wanted.before is not None:
        at, request_id = wanted.before
        is_before = tuple_(row.created_unix_s, row.request_id) < (at, request_id)
        place += [row.created_unix_s <= at, is_before]
    rest: list[ColumnElement[bool]] = []
    if wanted.pair is not None:
        is_pair = [row.model_id == wanted.pair.model_id, row.tool_id == wanted.pair.tool_id]
        (place if wanted.owner is None else rest).extend(is_pair)
    if wanted.owner is not None:
        place.append(row.owner == wanted.owner)
    if wanted.path is not None:
        rest.append(row.path == wanted.path)
    if wanted.has_failed is not None:
        rest.append(row.error.is_not(None) if wanted.has_failed else row.error.is_(None))
    if wanted.min_cost_usd is not None:
        rest.append(row.cost_usd >= wanted.min_cost_usd)
    return place, rest
