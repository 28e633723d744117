"""The work of each kind of job; `serve_app.jobs` runs it in an actor of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from rl.comparison import evaluate_snapshot
from rl.fit.selection import FitSettings
from rl.profile.run import ProfileSettings, profile
from rl.publish import (
    fit_snapshot,
    promote_evaluated,
    resolve,
    roll_back,
    trial_of,
)
from serve_app.config import AtlasConfig
from serve_app.jobs import EvaluateJob, FitJob, JobRequest, ProfileJob, PromoteJob, TrainJob
from serve_app.pool.desired import DesiredPool
from serve_app.schemas import Pair
from serve_app.store import Store, update_job

logger = logging.getLogger(__name__)

_WRITE_EVERY_S = 1.0
"""Seconds between two writes of a job's progress."""
_NICENESS = 10
"""Of a training process, in the kernel's terms."""
MAX_POINTS = 200
"""Of a training's curve, as a job keeps it."""

Json = dict[str, Any]


class _HowFar(Protocol):
    """Progress of any kind of job."""

    @property
    def done(self) -> int: ...

    @property
    def total(self) -> int: ...

    def to_json(self) -> Json: ...


async def run(config: AtlasConfig, store: Store, job_id: str, request: JobRequest) -> Json:
    """Do a job.

    Args:
        config: The deployment it works on, as in its file.
        store: Takes its progress.
        job_id: Its row.
        request: What to do.

    Returns:
        Its result.

    Raises:
        AtlasError: If it cannot be done; the message is for the caller.
    """
    config = await DesiredPool(config, store).current()
    if isinstance(request, ProfileJob):
        return await _profile(config, store, job_id, request)
    if isinstance(request, FitJob):
        settings = FitSettings(seed=request.seed)
        snapshot_id, snapshot = await fit_snapshot(
            config,
            store,
            settings,
            with_traffic=request.with_traffic,
            by_value=request.voi,
        )
        return {"snapshot_id": snapshot_id, "about": dict(snapshot.metadata)}
    if isinstance(request, TrainJob):
        return await _train(config, store, job_id, request)
    if isinstance(request, EvaluateJob):
        candidate = await resolve(store, request.candidate)
        against = await resolve(store, request.against)
        return (await evaluate_snapshot(config, store, candidate, against)).to_json()
    if isinstance(request, PromoteJob):
        candidate = await resolve(store, request.candidate)
        mode, share = trial_of(request.canary, shadow=request.shadow)
        version, report = await promote_evaluated(
            config,
            store,
            candidate,
            force=request.force,
            mode=mode,
            share=share,
            expect_version=request.expect_version,
        )
        evaluation = None if report is None else report.to_json()
        return {"policy_version": version, "snapshot_id": candidate, "report": evaluation}
    version, before = await roll_back(store, request.expect_version)
    return {"policy_version": version, "snapshot_id": before}


async def _profile(config: AtlasConfig, store: Store, job_id: str, request: ProfileJob) -> Json:
    settings = ProfileSettings(
        models=None if request.models is None else frozenset(request.models),
        judge=None if request.judge is None else Pair.parse(request.judge),
        planner=request.planner,
        sample=request.sample,
        samples=request.samples,
        temperature=request.temperature,
        max_cost_usd=request.max_cost_usd,
        concurrency=request.concurrency,
        again=request.again,
        errors_again=request.errors_again,
    )
    async with _written(store, job_id) as on_progress:
        progress = await profile(config, request.read_questions(), store, settings, on_progress)
    return progress.to_json()


async def _train(config: AtlasConfig, store: Store, job_id: str, request: TrainJob) -> Json:
    # Not above: the other jobs do without RLlib.
    from rl.ppo.config import parse_train_config
    from rl.training import train

    settings = parse_train_config(request.settings)
    # The process is this job's own; whatever serves on the same machine goes first.
    os.nice(_NICENESS)
    curve = TrainingCurve()
    async with _written(store, job_id) as on_progress:
        trained = await train(
            config,
            store,
            settings,
            lambda progress: on_progress(curve.with_progress(progress)),
            questions=request.read_questions(),
        )
    return trained.to_json()


class _Iteration(_HowFar, Protocol):
    """Progress of a training."""

    @property
    def mean_return(self) -> float | None: ...

    @property
    def held_out_utility(self) -> float | None: ...


@dataclass(frozen=True)
class _Drawn:
    """How far a training is, with its curve so far."""

    done: int
    total: int
    plain: Json

    def to_json(self) -> Json:
        return self.plain


class TrainingCurve:
    """The return and the utility of a training by iteration, in at most `MAX_POINTS` points."""

    def __init__(self) -> None:
        """Begin with none."""
        self._points: list[Json] = []
        self._every = 1

    def with_progress(self, progress: _Iteration) -> _HowFar:
        """Take in how far training is.

        Returns:
            The same, with `curve` in its JSON.
        """
        is_new = not self._points or self._points[-1]["iteration"] < progress.done
        if progress.mean_return is not None and is_new and progress.done % self._every == 0:
            self._points.append(
                {
                    "iteration": progress.done,
                    "mean_return": round(progress.mean_return, 4),
                    "utility": None
                    if progress.held_out_utility is None
                    else round(progress.held_out_utility, 4),
                }
            )
        if len(self._points) > MAX_POINTS:
            self._every *= 2
            self._points = [p for p in self._points if p["iteration"] % self._every == 0]
        plain = progress.to_json() | {"curve": list(self._points)}
        return _Drawn(progress.done, progress.total, plain)


@asynccontextmanager
async def _written(store: Store, job_id: str) -> AsyncIterator[Callable[[_HowFar], None]]:
    """Gives a callback; what it is called with goes into the job's row, now and then."""
    latest: list[_HowFar] = []
    began_s = time.monotonic()

    async def write() -> None:
        if not latest:
            return
        progress = latest[-1]
        elapsed_s = time.monotonic() - began_s
        left = progress.total - progress.done
        eta_s = elapsed_s / progress.done * left if progress.done else None
        await update_job(store, job_id, progress={"eta_s": eta_s} | progress.to_json())

    async def keep_writing() -> None:
        while True:
            await asyncio.sleep(_WRITE_EVERY_S)
            try:
                await write()
            except Exception as error:  # progress is not worth failing for
                logger.warning("job %s: progress not written: %r", job_id, error)

    def keep(progress: _HowFar) -> None:
        latest[:] = [progress]

    task = asyncio.create_task(keep_writing())
    try:
        yield keep
        await write()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
