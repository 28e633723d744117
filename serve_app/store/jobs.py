"""Jobs of the learning loop: their rows."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import insert, select, update

from serve_app.errors import NotFound
from serve_app.store.database import Store
from serve_app.store.rows import storable_text
from serve_app.store.tables import JobRow

JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
OVER: tuple[JobState, ...] = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Job:
    """One job; fields as in `JobRow`."""

    job_id: str
    kind: str
    state: JobState
    settings: dict[str, Any]
    progress: dict[str, Any]
    result: dict[str, Any] | None
    error: str | None
    owner: str
    created_unix_s: float
    updated_unix_s: float

    @property
    def is_over(self) -> bool:
        """Whether it will never change again."""
        return self.state in OVER


async def add_job(
    store: Store, job_id: str, kind: str, settings: Mapping[str, Any], owner: str
) -> Job:
    """Keep a new job, queued.

    Raises:
        StoreError: If the store is away.
    """
    now = time.time()
    job = Job(job_id, kind, "queued", dict(settings), {}, None, None, owner, now, now)
    async with store.begin() as connection:
        values = {name: getattr(job, name) for name in Job.__dataclass_fields__}
        await connection.execute(insert(JobRow).values(values))
    return job


async def get_job(store: Store, job_id: str) -> Job:
    """One job.

    Raises:
        NotFound: If there is none of that id.
        StoreError: If the store is away.
    """
    query = select(JobRow.__table__).where(JobRow.job_id == job_id)
    async with store.begin() as connection:
        row = (await connection.execute(query)).mappings().one_or_none()
    if row is None:
        raise NotFound(f"no job {job_id!r}")
    return Job(**row)


async def list_jobs(store: Store, limit: int = 100) -> list[Job]:
    """The last jobs, the newest first."""
    query = select(JobRow.__table__).order_by(JobRow.created_unix_s.desc()).limit(limit)
    async with store.begin() as connection:
        return [Job(**row) for row in (await connection.execute(query)).mappings()]


async def jobs_under_way(store: Store, limit: int = 1000) -> list[Job]:
    """Every job that is not over, the newest first."""
    query = (
        select(JobRow.__table__)
        .where(JobRow.state.not_in(OVER))
        .order_by(JobRow.created_unix_s.desc())
        .limit(limit)
    )
    async with store.begin() as connection:
        return [Job(**row) for row in (await connection.execute(query)).mappings()]


async def update_job(
    store: Store,
    job_id: str,
    *,
    state: JobState | None = None,
    progress: Mapping[str, Any] | None = None,
    result: Mapping[str, Any] | None = None,
    error: str | None = None,
) -> bool:
    """Change a job that is not over.

    Returns:
        Whether it was changed; a job that is over stays as it is.
    """
    changes: dict[str, Any] = {"updated_unix_s": time.time()}
    for name, value in (("state", state), ("progress", progress), ("result", result)):
        if value is not None:
            changes[name] = value
    if error is not None:
        changes["error"] = storable_text(error)
    query = update(JobRow).where(JobRow.job_id == job_id, JobRow.state.not_in(OVER)).values(changes)
    async with store.begin() as connection:
        return (await connection.execute(query)).rowcount > 0
