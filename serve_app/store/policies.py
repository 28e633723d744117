"""Router snapshots and which of them serves: a list of publications that only grows.

A publication serves from then on, or is a trial beside what serves: a canary, which a share of the
requests gets, or a shadow, which is asked and not obeyed. A later publication that serves ends the
trials before it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Select, func, insert, select
from sqlalchemy.exc import IntegrityError

from serve_app.errors import InvalidRequest, NotFound, StoreError
from serve_app.store.database import Store
from serve_app.store.tables import PolicyRow, RollbackRow, SnapshotRow, TrialRow

_PUBLISH_TRIES = 20


class Mode(StrEnum):
    """What a publication is for."""

    SERVING = "serving"
    """Decides, until a later one does."""
    CANARY = "canary"
    """Decides for a share of the requests, by their ids."""
    SHADOW = "shadow"
    """Its decisions are logged, and not acted on."""


@dataclass(frozen=True, slots=True)
class Policy:
    """One publication of a snapshot."""

    policy_version: int
    snapshot_id: str | None
    """`None` is the cold-start rule."""
    reason: str
    created_unix_s: float
    mode: Mode = Mode.SERVING
    share: float = 1.0
    """Of the requests that it is asked for, in [0, 1]."""
    taken_back: int | None = None
    """Version of the publication that this one takes back; `None` for any other."""


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
    mode: Mode = Mode.SERVING,
    share: float = 1.0,
    take_back: int | None = None,
    if_newest: int | None = None,
) -> int | None:
    """Let a snapshot serve, or put it on trial, from now on.

    Args:
        store: Where it is said.
        snapshot_id: A snapshot that the store knows; `None` lets the cold-start rule serve.
        reason: Why, in a line.
        report: The evaluation that speaks for it.
        once: Do nothing if it ever served.
        mode: What for.
        share: Of the requests, in (0, 1]; 1 unless it is on trial.
        take_back: Version of the publication that this one takes back.
        if_newest: Do nothing unless this is the newest version of all, so that of several who want
            the same only one gets it; 0 is that there is none.

    Returns:
        The new policy version, above every earlier one; `None` if nothing was done.

    Raises:
        NotFound: If there is no such snapshot.
        InvalidRequest: If the share is out of range.
        StoreError: If the store is away.
    """
    if not 0 < share <= 1 or (mode is Mode.SERVING and share != 1):
        raise InvalidRequest(f"a {mode} policy cannot have a share of {share:g}")
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
                if if_newest is not None and (last or 0) != if_newest:
                    return None
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
                if mode is not Mode.SERVING:
                    trial = {"policy_version": version, "mode": str(mode), "share": share}
                    await connection.execute(insert(TrialRow).values(trial))
                if take_back is not None:
                    taken = {"policy_version": version, "taken_back": take_back}
                    await connection.execute(insert(RollbackRow).values(taken))
                return version
        except IntegrityError:  # somebody else took this version
            continue
    raise StoreError("policies are being published too fast; try again later")


async def serving_policies(store: Store, limit: int = 10) -> list[Policy]:
    """The last publications that serve or served, the newest first; empty before the first."""
    query = _policies().where(TrialRow.mode.is_(None)).limit(limit)
    return await _read(store, query)


async def trial_policies(store: Store) -> list[Policy]:
    """The trials under way, the newest first: those above the newest publication that serves."""
    serving = (
        select(func.max(PolicyRow.policy_version))
        .outerjoin(TrialRow, TrialRow.policy_version == PolicyRow.policy_version)
        .where(TrialRow.mode.is_(None))
        .scalar_subquery()
    )
    query = _policies().where(
        TrialRow.mode.is_not(None), PolicyRow.policy_version > func.coalesce(serving, 0)
    )
    return await _read(store, query)


async def list_policies(store: Store, limit: int = 10) -> list[Policy]:
    """The last publications of any kind, the newest first."""
    return await _read(store, _policies().limit(limit))


async def find_policy(store: Store, policy_version: int) -> Policy | None:
    """One publication; `None` if there is none of that version."""
    found = await _read(store, _policies().where(PolicyRow.policy_version == policy_version))
    return found[0] if found else None


def _policies() -> Select[*tuple[Any, ...]]:
    """Publications with what they are for, the newest first."""
    return (
        select(
            PolicyRow.policy_version,
            PolicyRow.snapshot_id,
            PolicyRow.reason,
            PolicyRow.created_unix_s,
            TrialRow.mode,
            TrialRow.share,
            RollbackRow.taken_back,
        )
        .outerjoin(TrialRow, TrialRow.policy_version == PolicyRow.policy_version)
        .outerjoin(RollbackRow, RollbackRow.policy_version == PolicyRow.policy_version)
        .order_by(PolicyRow.policy_version.desc())
    )


async def _read(store: Store, query: Select[*tuple[Any, ...]]) -> list[Policy]:
    async with store.begin() as connection:
        rows = (await connection.execute(query)).all()
    return [
        Policy(
            policy_version=row.policy_version,
            snapshot_id=row.snapshot_id,
            reason=row.reason,
            created_unix_s=row.created_unix_s,
            mode=Mode(row.mode or Mode.SERVING),
            share=1.0 if row.share is None else row.share,
            taken_back=row.taken_back,
        )
        for row in rows
    ]
