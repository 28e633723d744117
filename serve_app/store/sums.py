"""Sums over requests and verdicts, added to in the transaction that writes what they sum up."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.schemas import Action
from serve_app.store.console_tables import (
    ChoiceDayRow,
    LatencyRow,
    ShadowDayRow,
    TrafficRow,
    UsageDayRow,
    VerdictDayRow,
)
from serve_app.store.tables import Base

TRAFFIC_S = 300
"""Width of the sums that show how traffic goes, in seconds."""
DAY_S = 86_400
WIN = 0.5
"""A verdict with this score or more is a win."""
NO_CLUSTER = -1
"""Stands for no cluster in a key."""

_STEPS_PER_DECADE = 20
"""Of the time that a request took: a step is 12% longer than the one before."""

_Sums = defaultdict[tuple[Any, ...], list[float]]


def step_of(seconds: float) -> int:
    """The step that a time belongs to; 0 is a millisecond or less."""
    return max(0, math.ceil(_STEPS_PER_DECADE * math.log10(max(seconds * 1000.0, 1e-3))))


def seconds_of(step: int) -> float:
    """The longest time of a step."""
    return float(10.0 ** (step / _STEPS_PER_DECADE) / 1000.0)


async def add_requests(
    connection: AsyncConnection,
    requests: Iterable[Mapping[str, Any]],
    shadows: Iterable[Mapping[str, Any]] = (),
) -> None:
    """Add requests to the sums.

    Args:
        connection: The transaction in which they are written.
        requests: Values of `RequestRow`.
        shadows: Values of `ShadowRow` of some of them.
    """
    traffic, latencies, usage = _Sums(_zeros(3)), _Sums(_zeros(1)), _Sums(_zeros(5))
    choices, shadowed = _Sums(_zeros(7)), _Sums(_zeros(5))
    ended = {}
    for request in requests:
        at, failed = request["created_unix_s"], int(request["error"] is not None)
        pair, cost = (request["model_id"], request["tool_id"]), request["cost_usd"]
        began = _floor(at, TRAFFIC_S)
        _add(traffic[began, *pair, request["path"]], 1, failed, cost)
        _add(latencies[began, step_of(request["seconds"])], 1)
        tokens = (request["prompt_tokens"], request["completion_tokens"])
        _add(usage[_floor(at, DAY_S), request["owner"], *pair], 1, failed, *tokens, cost)
        choice = choices[_choice(_floor(at, DAY_S), request)]
        _add(choice, 1, failed, cost, request["seconds"], request["confidence"])
        ended[request["request_id"]] = (_floor(at, DAY_S), pair)
    for shadow in shadows:
        day, pair = ended[shadow["request_id"]]
        would_be = (shadow["model_id"], shadow["tool_id"])
        key = (day, shadow["policy_version"], *would_be)
        _add(shadowed[key], 1, int(agrees(shadow, pair)), shadow["confidence"])
    for table, sums in (
        (TrafficRow, traffic),
        (LatencyRow, latencies),
        (UsageDayRow, usage),
        (ChoiceDayRow, choices),
        (ShadowDayRow, shadowed),
    ):
        await _write(connection, table, sums)


async def add_verdict(
    connection: AsyncConnection,
    request: Mapping[str, Any],
    shadow: Mapping[str, Any] | None,
    *,
    score: float,
    at_unix_s: float,
) -> None:
    """Add a verdict to the sums.

    Args:
        connection: The transaction in which it is written.
        request: Values of `RequestRow`, of the request that it is about.
        shadow: Values of `ShadowRow`, of the same one; `None`: no policy was in the shadow.
        score: In [0, 1].
        at_unix_s: When the verdict was given.
    """
    day, win = _floor(at_unix_s, DAY_S), int(score >= WIN)
    pair, confidence = (request["model_id"], request["tool_id"]), request["confidence"]
    tenth = min(9, max(0, int(confidence * 10)))
    await _write(connection, VerdictDayRow, {(day, *pair, tenth): [1, win, score, confidence]})
    await _write(connection, ChoiceDayRow, {_choice(day, request): [0, 0, 0, 0, 0, 1, win]})
    if shadow is not None and agrees(shadow, pair):
        key = (day, shadow["policy_version"], *pair)
        await _write(connection, ShadowDayRow, {key: [0, 0, 0, 1, win]})


def agrees(shadow: Mapping[str, Any], pair: tuple[str, str]) -> bool:
    """Whether the policy in the shadow would have sent a request where it went."""
    would_be = (shadow["model_id"], shadow["tool_id"])
    return bool(shadow["action"] == Action.ROUTE and would_be == pair)


def _choice(day: int, request: Mapping[str, Any]) -> tuple[Any, ...]:
    cluster = NO_CLUSTER if request["cluster"] is None else request["cluster"]
    pair = (request["model_id"], request["tool_id"])
    return day, request["policy_version"], cluster, *pair


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
