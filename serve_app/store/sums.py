"""Sums over requests and verdicts, added to in the transaction that writes what they sum up."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.store.console_tables import LatencyRow, TrafficRow, UsageDayRow, VerdictDayRow
from serve_app.store.tables import Base

TRAFFIC_S = 300
"""Width of the sums that show how traffic goes, in seconds."""
DAY_S = 86_400
WIN = 0.5
"""A verdict with this score or more is a win."""

_STEPS_PER_DECADE = 20
"""Of the time that a request took: a step is 12% longer than the one before."""

_Sums = defaultdict[tuple[Any, ...], list[float]]


def step_of(seconds: float) -> int:
    """The step that a time belongs to; 0 is a millisecond or less."""
    return max(0, math.ceil(_STEPS_PER_DECADE * math.log10(max(seconds * 1000.0, 1e-3))))


def seconds_of(step: int) -> float:
    """The longest time of a step."""
    return float(10.0 ** (step / _STEPS_PER_DECADE) / 1000.0)


async def add_requests(connection: AsyncConnection, requests: Iterable[Mapping[str, Any]]) -> None:
    """Add requests to the sums.

    Args:
        connection: The transaction in which they are written.
        requests: Values of `RequestRow`.
    """
    traffic, latencies, usage = _Sums(_zeros(3)), _Sums(_zeros(1)), _Sums(_zeros(5))
    for request in requests:
        at, failed = request["created_unix_s"], int(request["error"] is not None)
        pair, cost = (request["model_id"], request["tool_id"]), request["cost_usd"]
        began = _floor(at, TRAFFIC_S)
        _add(traffic[began, *pair, request["path"]], 1, failed, cost)
        _add(latencies[began, step_of(request["seconds"])], 1)
        tokens = (request["prompt_tokens"], request["completion_tokens"])
        _add(usage[_floor(at, DAY_S), request["owner"], *pair], 1, failed, *tokens, cost)
    for table, sums in ((TrafficRow, traffic), (LatencyRow, latencies), (UsageDayRow, usage)):
        await _write(connection, table, sums)


async def add_verdict(
    connection: AsyncConnection,
    pair: tuple[str, str],
    *,
    score: float,
    confidence: float,
    at_unix_s: float,
) -> None:
    """Add a verdict to the sums.

    Args:
        connection: The transaction in which it is written.
        pair: Model and tool that were chosen first.
        score: In [0, 1].
        confidence: With which they were chosen.
        at_unix_s: When the verdict was given.
    """
    tenth = min(9, max(0, int(confidence * 10)))
    key = (_floor(at_unix_s, DAY_S), *pair, tenth)
    values = [1, int(score >= WIN), score, confidence]
    await _write(connection, VerdictDayRow, {key: values})


def _zeros(count: int) -> Any:
    return lambda: [0] * count


def _add(sums: list[float], *values: float) -> None:
    for index, value in enumerate(values):
        sums[index] += value


def _floor(at_unix_s: float, width_s: int) -> int:
    return int(at_unix_s // width_s) * width_s


async def _write(
    connection: AsyncConnection, table: type[Base], sums: Mapping[tuple[Any, ...], list[float]]
) -> None:
    if not sums:
        return
    names = [column.name for column in table.__table__.columns]
    # In one order for everybody: two gateways that add to the same rows wait, and never deadlock.
    rows = [dict(zip(names, (*key, *values), strict=True)) for key, values in sorted(sums.items())]
    await connection.execute(_addition(table), rows)


def _addition(table: type[Base]) -> TextClause:
    """Adds to a row, or makes it; SQLite and PostgreSQL write that alike."""
    columns = table.__table__.columns
    name = table.__tablename__
    keys = [column.name for column in columns if column.primary_key]
    sums = [column.name for column in columns if not column.primary_key]
    names = [*keys, *sums]
    return text(
        f"INSERT INTO {name} ({', '.join(names)}) VALUES ({', '.join(f':{n}' for n in names)}) "
        f"ON CONFLICT ({', '.join(keys)}) DO UPDATE SET "
        + ", ".join(f"{n} = {name}.{n} + excluded.{n}" for n in sums)
    )
