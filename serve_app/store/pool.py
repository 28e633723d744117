"""The desired pool: a list of revisions that only grows, each a whole pool.

A revision is written only on top of the one it was made from, so of two changes at once the later
one is made again on what the first left.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import RowMapping, delete, insert, select
from sqlalchemy.exc import IntegrityError

from serve_app.store.database import Store
from serve_app.store.tables import PoolRevisionRow

Json = dict[str, Any]

_KEPT = 500
"""Revisions that are kept, for whoever asks who changed what."""


@dataclass(frozen=True, slots=True)
class PoolRevision:
    """What the pool should be."""

    revision: int
    """From 1; only rises."""
    models: tuple[Json, ...]
    """Settings of every model, as in the configuration."""
    tools: tuple[Json, ...]
    """Settings of every tool."""
    from_file: Json
    """`models`, `tools` and `patterns` of the configuration file when it was last applied, by id,
    and the hash of its `rules`."""
    change: str
    """What this revision changed, in a line."""
    created_unix_s: float
    patterns: tuple[Json, ...] = ()
    """Every pattern as it is written."""
    rules: tuple[Json, ...] = ()
    """Every rule in its order."""


async def newest_pool(store: Store) -> PoolRevision | None:
    """The pool that is wanted now; `None` before the first.

    Raises:
        StoreError: If the store is away.
    """
    query = select(PoolRevisionRow.__table__).order_by(PoolRevisionRow.revision.desc()).limit(1)
    async with store.begin() as connection:
        row = (await connection.execute(query)).mappings().first()
    if row is None:
        return None
    return _revision(row)


async def pool_history(store: Store) -> list[PoolRevision]:
    """Every revision that is kept, the oldest first.

    Raises:
        StoreError: If the store is away.
    """
    query = select(PoolRevisionRow.__table__).order_by(PoolRevisionRow.revision)
    async with store.begin() as connection:
        rows = (await connection.execute(query)).mappings().all()
    return [_revision(row) for row in rows]


async def add_pool(
    store: Store,
    revision: int,
    *,
    models: tuple[Json, ...],
    tools: tuple[Json, ...],
    patterns: tuple[Json, ...] = (),
    rules: tuple[Json, ...] = (),
    from_file: Json,
    change: str,
) -> PoolRevision | None:
    """Write a revision.

    Returns:
        The revision; `None` if there is one of that number.

    Raises:
        StoreError: If the store is away.
    """
    row = PoolRevision(revision, models, tools, from_file, change, time.time(), patterns, rules)
    try:
        async with store.begin() as connection:
            await connection.execute(insert(PoolRevisionRow).values(asdict(row)))
            await connection.execute(
                delete(PoolRevisionRow).where(PoolRevisionRow.revision <= revision - _KEPT)
            )
    except IntegrityError:
        return None
    return row


def _revision(row: RowMapping) -> PoolRevision:
    lists = {name: tuple(row[name] or ()) for name in ("models", "tools", "patterns", "rules")}
    return PoolRevision(**{**row, **lists})
