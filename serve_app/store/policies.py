"""Router snapshots and which of them serves: a list of publications that only grows."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, insert, select
from sqlalchemy.exc import IntegrityError

from serve_app.errors import NotFound, StoreError
from serve_app.store.database import Store
from serve_app.store.tables import PolicyRow, SnapshotRow

_PUBLISH_TRIES = 20


@dataclass(frozen=True, slots=True)
class Policy:
    """One publication of a snapshot."""

    policy_version: int
    snapshot_id: str | None
    """`None` is the cold-start rule."""
    reason: str
    created_unix_s: float


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """One snapshot that the store knows."""

    snapshot_id: str
    about: dict[str, Any]
    created_unix_s: float


async def add_snapshot(store: Store, snapshot_id: str, about: Mapping[str, Any]) -> None:
    """Make a snapshot known; one that is known stays as it is.

    Raises:
        StoreError: If the store is away.
    """
    row = {"snapshot_id": snapshot_id, "about": dict(about), "created_unix_s": time.time()}
    try:
        async with store.begin() as connection:
            await connection.execute(insert(SnapshotRow).values(row))
    except IntegrityError:
        return


async def list_snapshots(store: Store) -> list[SnapshotInfo]:
    """Every snapshot, the newest first."""
    query = select(SnapshotRow.__table__).order_by(SnapshotRow.created_unix_s.desc())
    async with store.begin() as connection:
        return [SnapshotInfo(**row) for row in (await connection.execute(query)).mappings()]


async def publish(
    store: Store,
    snapshot_id: str | None,
    reason: str,
    report: Mapping[str, Any] | None = None,
    *,
    once: bool = False,
) -> int | None:
    """Let a snapshot serve from now on.

    Args:
        store: Where it is said.
        snapshot_id: A snapshot that the store knows; `None` lets the cold-start rule serve.
        reason: Why, in a line.
        report: The evaluation that speaks for it.
        once: Do nothing if it ever served.

    Returns:
        The new policy version, above every earlier one; `None` if nothing was done.

    Raises:
        NotFound: If there is no such snapshot.
        StoreError: If the store is away.
    """
    for _ in range(_PUBLISH_TRIES):
        try:
            async with store.begin() as connection:
                known = select(SnapshotRow.snapshot_id).where(
                    SnapshotRow.snapshot_id == snapshot_id
                )
                if snapshot_id is not None and await connection.scalar(known) is None:
                    raise NotFound(f"no snapshot {snapshot_id!r}")
                served = select(PolicyRow.policy_version).where(
                    PolicyRow.snapshot_id == snapshot_id
                )
                if once and await connection.scalar(served.limit(1)) is not None:
                    return None
                last = await connection.scalar(select(func.max(PolicyRow.policy_version)))
                version = (last or 0) + 1
                await connection.execute(
                    insert(PolicyRow).values(
                        policy_version=version,
                        snapshot_id=snapshot_id,
                        reason=reason[:300],
                        report=None if report is None else dict(report),
                        created_unix_s=time.time(),
                    )
                )
                return version
        except IntegrityError:  # somebody else took this version
            continue
    raise StoreError("policies are being published too fast; try again later")


async def serving_policies(store: Store, limit: int = 10) -> list[Policy]:
    """The last publications, the serving one first; empty before the first."""
    query = (
        select(
            PolicyRow.policy_version,
            PolicyRow.snapshot_id,
            PolicyRow.reason,
            PolicyRow.created_unix_s,
        )
        .order_by(PolicyRow.policy_version.desc())
        .limit(limit)
    )
    async with store.begin() as connection:
        return [Policy(**row) for row in (await connection.execute(query)).mappings()]
