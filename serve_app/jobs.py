"""Jobs of the learning loop over HTTP: what can be asked for, and the actor that does it.

A job is a row in the store and a detached Ray actor, so it outlives the gateway replica that took
it. The work itself is in `rl.jobs`, which is imported by name and only in the actor's process:
serving never loads the learning part, but for the types of a training's settings.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import time
import uuid
from typing import Annotated, Any, Literal, Protocol, Self

import ray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    RootModel,
    ValidationError,
    model_validator,
)

from serve_app.config import AtlasConfig
from serve_app.errors import (
    AtlasError,
    ConfigError,
    Conflict,
    InvalidRequest,
    RateLimited,
    failure_reason,
)
from serve_app.questions import Question
from serve_app.store import (
    Job,
    Store,
    add_job,
    get_job,
    jobs_under_way,
    list_jobs,
    update_job,
)

logger = logging.getLogger(__name__)

_WORK_MODULE = "rl.jobs"
_SETTINGS_MODULE = "rl.ppo.config"
_NAMESPACE = "atlas-jobs"
_START_S = 60.0
"""Age from which a queued job without a process counts as never started."""

PairName = Annotated[str, Field(pattern=r"^[^@\s]{1,64}@[^@\s]{1,64}$")]
SnapshotName = Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ProfileJob(_Request):
    """Measure every ready pair on labelled questions."""

    kind: Literal["profile"]
    questions: Annotated[list[dict[str, Any]], Field(min_length=1, fail_fast=True)]
    """Objects with `id`, `query`, `gold`, `metric` and, if wanted, `domain` and `split`."""
    models: Annotated[list[str], Field(min_length=1, fail_fast=True)] | None = None
    """Models whose pairs are measured; all that are ready where none is named."""
    judge: PairName | None = None
    """`model_id@tool_id` that judges answers to questions of the metric `judge`."""
    planner: Annotated[str, Field(pattern=r"^[^@\s]{1,64}$")] | None = None
    """Model that thinks once about each question; every pair runs a second time with its thought.
    The deployment's where none is named; training reads what that one thought."""
    sample: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the pairs that each training question is given to; held-out ones get all."""
    samples: Annotated[int, Field(ge=1, le=100)] = 1
    """Runs of each pair on each question; all of them count."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Of the models' answers."""
    max_cost_usd: Annotated[float, Field(ge=0)] | None = None
    concurrency: Annotated[int, Field(ge=1, le=256)] = 4
    """Questions under way at once."""
    again: bool = False
    """Measure also what is measured already."""
    errors_again: bool = False
    """Measure anew what ended in an error, for example in a tool that did not finish in time."""

    def read_questions(self) -> tuple[Question, ...]:
        """The questions, checked.

        Raises:
            InvalidRequest: Naming the first wrong field.
        """
        return _read_questions(self.questions)


def _read_questions(questions: list[dict[str, Any]]) -> tuple[Question, ...]:
    """Labelled questions out of a job's body.

    Raises:
        InvalidRequest: Naming the first wrong field.
    """
    read = []
    for index, fields in enumerate(questions):
        try:
            read.append(Question.model_validate(fields))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            path = ".".join([f"questions[{index}]", *map(str, first["loc"])])
            raise InvalidRequest(f"{path}: {first['msg'][:300]}", path[:200]) from None
    return tuple(read)


class FitJob(_Request):
    """Fit a snapshot on the outcomes in the store."""

    kind: Literal["fit"]
    with_traffic: bool = True
    """Whether rated requests count too."""
    voi: bool = False
    """Whether the rule `voi` is to serve it: another candidate runs where it is worth its price."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class TrainJob(_Request):
    """Train the learned policy, and keep a snapshot with it.

    On the outcomes in the store, or with the setting `live` on the pool.
    """

    kind: Literal["train"]
    settings: dict[str, Any] = {}
    """As in configs/rl/*.yaml, without `deployment` and `questions`; what is not named is the
    default."""
    questions: Annotated[list[dict[str, Any]], Field(fail_fast=True)] = []
    """What is right, for training with `live`: objects as of a profile job. Those that were not
    profiled are left out."""

    def read_questions(self) -> tuple[Question, ...]:
        """The questions, checked.

        Raises:
            InvalidRequest: Naming the first wrong field.
        """
        return _read_questions(self.questions)

    def check_settings(self) -> None:
        """See that training would take them.

        Raises:
            InvalidRequest: Naming the first wrong one, or that learning is not installed.
        """
        self.read_questions()
        try:
            # Only the settings' types: they need nothing of what learning needs.
            read: Any = importlib.import_module(_SETTINGS_MODULE)
            settings = read.parse_train_config(self.settings)
        except ModuleNotFoundError as error:
            raise InvalidRequest(f"training is not installed here: no {error.name}") from None
        except ConfigError as error:
            raise InvalidRequest(error.message, "settings") from None
        if settings.live is not None and not self.questions:
            raise InvalidRequest("live training needs the labelled questions", "questions")


class EvaluateJob(_Request):
    """Hold a snapshot against another on the held-out questions."""

    kind: Literal["evaluate"]
    candidate: SnapshotName = "newest"
    """A snapshot id, `newest`, `serving` or `cold-start`."""
    against: SnapshotName = "serving"


class PromoteJob(_Request):
    """Evaluate a snapshot against the serving one, and let it serve if it is not worse."""

    kind: Literal["promote"]
    candidate: SnapshotName = "newest"
    force: bool = False
    """Promote whatever the evaluation says."""
    canary: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the requests that it gets, by their ids, beside what serves; `null` gives it all."""
    shadow: bool = False
    """Have its decisions logged, and not acted on."""
    expect_version: Annotated[int, Field(ge=0)] | None = None
    """The serving policy that it takes the place of, 0 for none; refused if another serves. `null`
    takes whichever serves when the job begins."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.shadow and self.canary is not None:
            raise ValueError("a policy is a canary or in the shadow, not both")
        return self


class RollbackJob(_Request):
    """Let what served before the serving policy serve again."""

    kind: Literal["rollback"]
    expect_version: Annotated[int, Field(ge=1)] | None = None
    """The policy to take back; refused if another would be. `null` takes back whichever serves, but
    not what a rollback published: the same request sent twice goes back once."""


JobRequest = ProfileJob | FitJob | TrainJob | EvaluateJob | PromoteJob | RollbackJob


class JobSubmission(RootModel[Annotated[JobRequest, Field(discriminator="kind")]]):
    """The body of `POST /v1/admin/jobs`."""


class Launcher(Protocol):
    """Where jobs run. Its calls block."""

    def start(self, config: AtlasConfig, job_id: str) -> None:
        """Begin a job."""
        ...

    def is_running(self, job_id: str) -> bool:
        """Whether its process is there."""
        ...

    def stop(self, job_id: str) -> None:
        """End it at once, if it is there."""
        ...


class JobRunner:
    """The actor of one job."""

    async def run(self, config: AtlasConfig, job_id: str) -> None:
        """Do the work and put its end on record."""
        try:
            await do_job(config, job_id)
        finally:
            # Whatever happened, or a detached actor stays for ever.
            ray.actor.exit_actor()


async def do_job(config: AtlasConfig, job_id: str) -> None:
    """Do a job and put its end on record.

    Raises:
        StoreError: If the store is away; `Jobs` sees that the process is gone.
    """
    store = await Store.open(config.store_url())
    try:
        job = await get_job(store, job_id)
        if await update_job(store, job_id, state="running"):
            await _work(config, store, job)
    finally:
        await store.close()


async def _work(config: AtlasConfig, store: Store, job: Job) -> None:
    try:
        work: Any = importlib.import_module(_WORK_MODULE)
        request = JobSubmission.model_validate(job.settings).root
        result = await work.run(config, store, job.job_id, request)
    except AtlasError as error:
        await update_job(store, job.job_id, state="failed", error=error.message)
    except Exception as error:
        logger.exception("job %s failed", job.job_id)
        reason = failure_reason(f"{type(error).__name__}: {error}")
        await update_job(store, job.job_id, state="failed", error=reason)
    else:
        await update_job(store, job.job_id, state="succeeded", result=result)


class RayLauncher:
    """Runs each job as a detached actor that reserves nothing for itself."""

    def start(self, config: AtlasConfig, job_id: str) -> None:
        """Begin a job."""
        actor = ray.remote(JobRunner).options(
            name=job_id, namespace=_NAMESPACE, lifetime="detached", num_cpus=0
        )
        actor.remote().run.remote(config, job_id)

    def is_running(self, job_id: str) -> bool:
        """Whether its process is there."""
        return self._find(job_id) is not None

    def stop(self, job_id: str) -> None:
        """End it at once; its Ray tasks end with it."""
        actor = self._find(job_id)
        if actor is not None:
            ray.kill(actor)

    @staticmethod
    def _find(job_id: str) -> Any | None:
        try:
            return ray.get_actor(job_id, namespace=_NAMESPACE)
        except ValueError:
            return None


class Jobs:
    """Takes, shows and cancels jobs; the store is the truth."""

    def __init__(self, config: AtlasConfig, store: Store, launcher: Launcher) -> None:
        """Use a store.

        Args:
            config: The deployment that jobs work on.
            store: Where their rows are.
            launcher: Runs them.
        """
        self._config = config
        self._store = store
        self._launcher = launcher
        self._max_jobs = config.gateway.limits.max_jobs
        self._taking = asyncio.Lock()

    async def submit(self, request: JobRequest, owner: str) -> Job:
        """Start a job.

        Raises:
            InvalidRequest: If a setting cannot work.
            RateLimited: If as many jobs are under way as there may be.
            StoreError: If the store is away.
        """
        if isinstance(request, ProfileJob):
            await asyncio.to_thread(request.read_questions)
        elif isinstance(request, TrainJob):
            await asyncio.to_thread(request.check_settings)
        settings = request.model_dump(mode="json")
        job_id = f"job_{uuid.uuid4().hex[:16]}"
        async with self._taking:
            await self._leave_room()
            job = await add_job(self._store, job_id, request.kind, settings, owner)
        try:
            await asyncio.to_thread(self._launcher.start, self._config, job_id)
        except Exception:
            logger.exception("job %s cannot be started", job_id)
            await update_job(self._store, job_id, state="failed", error="it could not be started")
            return await get_job(self._store, job_id)
        return job

    async def list(self) -> list[Job]:
        """The last jobs as they are, the newest first."""
        return [await self._as_it_is(job) for job in await list_jobs(self._store)]

    async def get(self, job_id: str) -> Job:
        """A job as it is; one whose process is gone has failed.

        Raises:
            NotFound: If there is none of that id.
        """
        return await self._as_it_is(await get_job(self._store, job_id))

    async def cancel(self, job_id: str) -> Job:
        """End a job and free what it holds.

        Raises:
            NotFound: If there is none of that id.
            Conflict: If it is over.
        """
        await get_job(self._store, job_id)
        if not await update_job(self._store, job_id, state="cancelled"):
            raise Conflict(f"job {job_id!r} is over", "job_id")
        await asyncio.to_thread(self._launcher.stop, job_id)
        return await get_job(self._store, job_id)

    async def _leave_room(self) -> None:
        """See that one more may be under way.

        Raises:
            RateLimited: If not.
        """
        known = await jobs_under_way(self._store)
        if len(known) < self._max_jobs:
            return
        under_way = [job for job in known if not (await self._as_it_is(job)).is_over]
        if len(under_way) >= self._max_jobs:
            raise RateLimited(
                f"{len(under_way)} jobs are under way, and gateway.limits.max_jobs is "
                f"{self._max_jobs}; wait for one to end, or cancel one"
            )

    async def _as_it_is(self, job: Job) -> Job:
        """A job; one whose process is gone has failed."""
        # A new one may be seen before its process is there.
        is_new = job.state == "queued" and time.time() - job.created_unix_s < _START_S
        if job.is_over or is_new or await asyncio.to_thread(self._launcher.is_running, job.job_id):
            return job
        reason = "its process ended" if job.state == "running" else "it was never started"
        # It may have ended between the two looks; then this changes nothing.
        await update_job(self._store, job.job_id, state="failed", error=reason)
        return await get_job(self._store, job.job_id)
