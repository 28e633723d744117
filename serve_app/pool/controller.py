"""PoolController: brings the cluster to the wanted pool, and tells what can be chosen of it.

Level-triggered: each round compares what the store wants with what Serve runs and takes the next
step for each model, so it converges from any half-done state, after any crash. Every set of
settings has a Serve application of its own, so a changed model comes up beside the old one and
takes over when it is warm. Gateways and routers follow by long poll (`PoolWatcher`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.serve.schema import ApplicationStatus

from serve_app.budget import Deadline
from serve_app.config import AtlasConfig, LocalModelConfig, ModelConfig, load_config
from serve_app.config.patterns.check import members_of_patterns
from serve_app.errors import AtlasError, ConfigError, failure_reason
from serve_app.models.clients import ModelClients
from serve_app.models.deploy import DeployerProcess, application_name
from serve_app.orchestrator.pairs.runner import PairRunner
from serve_app.pool.applications import (
    ModelApplication,
    delete_application,
    model_applications,
    ongoing_requests,
)
from serve_app.pool.desired import DesiredPool
from serve_app.pool.draining import LONG_POLL_S, Draining
from serve_app.pool.mcp_servers import McpServers
from serve_app.pool.progress import ModelProgress
from serve_app.pool.warm_up import WARM_UP_TIMEOUT_S, compile_logprobs, greet, why_silent
from serve_app.schemas import (
    MemberState,
    ModelMember,
    Pair,
    PoolLoad,
    PoolState,
)
from serve_app.store import Store
from serve_app.telemetry import RayMetrics

logger = logging.getLogger(__name__)

_ROUND_S = 1.0
_PROBE_TIMEOUT_S = 10.0
_STORE_PATIENCE_S = 10.0
_COMPLAIN_EVERY_S = 30.0


class PoolController:
    """Keeps the wanted pool running; one replica.

    Invariants:
        - `pool_version` rises with every change that a router or gateway can see, and never falls.
        - A pair is chosen only after its model's application runs and has answered it once.
        - An application is deleted only when no gateway or router can choose it any more and it
          has nothing under way, or the longest deadline has passed.
        - A model that fails never delays or harms another.
    """

    def __init__(self, config: AtlasConfig, path: str | None = None) -> None:
        """Begin with what runs; the first round is at once.

        Args:
            config: The deployment.
            path: Its file, followed for changes of the pool; `None` follows none.
        """
        self._file = config
        self._path = None if path is None else Path(path)
        self._file_mark = _mark(self._path)
        self._config = config
        self._store: Store | None = None
        self._revision: int | None = None
        """Newest revision of the pool taken over; `None` before the store answered."""
        self._models: dict[str, ModelProgress] = {}
        self._deployer = DeployerProcess()
        self._draining = Draining()
        # Versions start at the clock so that they also rise when this replica is replaced.
        self._state = PoolState(int(time.time()), (), (), ())
        self._changed = asyncio.Condition()
        self._looked_at_s = 0.0
        self._next_complaint_s = 0.0
        self._wake = asyncio.Event()
        self._first_round = asyncio.Event()
        self._servers = McpServers(RayMetrics())
        self._loop_task = asyncio.get_running_loop().create_task(self._reconcile_forever())
        self._servers_task = asyncio.get_running_loop().create_task(self._follow_servers())

    async def state(self, known_version: int = -1, watcher: str | None = None) -> PoolState:
        """The pool; waits up to 20 s for a version other than `known_version`.

        Args:
            known_version: What the caller has.
            watcher: Who asks, if what it has keeps an application alive.
        """
        await self._first_round.wait()
        if watcher is not None:
            self._draining.knows(watcher, known_version)
        async with self._changed:
            try:
                async with asyncio.timeout(LONG_POLL_S):
                    await self._changed.wait_for(lambda: self._state.pool_version != known_version)
            except TimeoutError:
                pass
            return self._state

    async def load(self) -> PoolLoad:
        """What the pool has to do now; asks every replica of every model."""
        applications = (await asyncio.to_thread(model_applications)).values()
        counts = await asyncio.gather(
            *(asyncio.to_thread(ongoing_requests, of.replicas) for of in applications)
        )
        ongoing: dict[str, int] = {}
        for application, count in zip(applications, counts, strict=True):
            ongoing[application.model_id] = ongoing.get(application.model_id, 0) + count
        return PoolLoad(ongoing, self._servers.away(self._config))

    async def suspect(self, model_id: str) -> None:
        """Somebody saw a model fail: it is probed at once."""
        model = self._models.get(model_id)
        if model is not None:
            model.suspected = True
            self._wake.set()

    async def check_health(self) -> None:
        """Serve's health check: the reconcile loop must be alive."""
        if self._loop_task.done() or self._servers_task.done():
            raise RuntimeError("a loop of the controller has ended")

    # The loop.

    async def _reconcile_forever(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._reconcile()
            except Exception:
                logger.exception("a reconcile round failed; trying again")
            try:
                async with asyncio.timeout(_ROUND_S):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _follow_servers(self) -> None:
        """Pairs with a tool whose server is away leave the candidates, and come back with it."""
        while True:
            before = self._servers.away(self._config)
            try:
                await self._servers.look(self._config, self._file, self._store)
            except Exception:
                logger.exception("MCP servers could not be looked at; trying again")
            if self._servers.away(self._config) != before:
                self._looked_at_s = 0.0
                self._wake.set()
            await asyncio.sleep(_ROUND_S)

    async def _reconcile(self) -> None:
        """One round: what is wanted, then the next step of every model."""
        await self._follow_desired()
        away = self._servers.away(self._config)
        is_settled = not self._draining and all(m.is_settled(away) for m in self._models.values())
        now_s = time.monotonic()
        if is_settled and now_s - self._looked_at_s < self._config.pool.health_interval_s:
            return
        self._looked_at_s = now_s
        applications = await asyncio.to_thread(model_applications)
        if not self._first_round.is_set():
            self._take_over(applications)
        for model in self._models.values():
            self._step(model, applications.get(model.application), applications)
        await self._publish(applications)
        await self._end_unwanted(applications)
        self._first_round.set()

    async def _follow_desired(self) -> None:
        """Take over the pool that the file and the store want."""
        mark = _mark(self._path)
        if self._path is not None and mark is not None and mark != self._file_mark:
            self._file_mark = mark
            try:
                self._file = await asyncio.to_thread(load_config, self._path)
                logger.info("the configuration file has changed")
            except ConfigError as error:
                logger.error("the changed configuration is refused: %s", error.message)
        try:
            async with asyncio.timeout(_STORE_PATIENCE_S):
                if self._store is None:
                    self._store = await Store.open(self._config.store_url(), must_answer=False)
                desired = DesiredPool(self._file, self._store)
                newest = await desired.apply_file()
        except (AtlasError, TimeoutError) as error:
            if time.monotonic() >= self._next_complaint_s:
                self._next_complaint_s = time.monotonic() + _COMPLAIN_EVERY_S
                logger.warning("the store does not say which pool is wanted: %r", error)
            if not self._models:
                self._want(self._config)
            return
        if newest.revision != self._revision:
            logger.info("pool revision %d: %s", newest.revision, newest.change)
            self._want(desired.of(newest))
            self._revision = newest.revision

    def _want(self, config: AtlasConfig) -> None:
        """Take a desired pool over."""
        self._config = config
        now = time.time()
        wanted = {}
        for settings in config.models:
            model = self._models.get(settings.model_id)
            if model is None:
                member = ModelMember(settings.model_id, MemberState.STARTING, None, now)
                model = ModelProgress(settings, member)
            elif application_name(settings) != model.application:
                previous = model.member.application or model.previous
                model = ModelProgress(settings, model.member, previous=previous)
            else:
                model.config = settings
            wanted[settings.model_id] = model
        for model_id, model in self._models.items():
            if wanted.get(model_id) is not model and model.task is not None:
                model.task.cancel()
        self._models = wanted
        self._looked_at_s = 0.0

    def _take_over(self, applications: dict[str, ModelApplication]) -> None:
        """A new controller goes on with the applications that its predecessor admitted."""
        running = {name: a for name, a in applications.items() if a.is_up}
        for model in self._models.values():
            own = running.get(model.application) or next(
                (a for a in running.values() if a.model_id == model.config.model_id), None
            )
            if own is not None:
                model.warm = set(model.config.tools)
                model.set(MemberState.READY, None, own.name)

    # One model.

    def _step(
        self,
        model: ModelProgress,
        application: ModelApplication | None,
        applications: dict[str, ModelApplication],
    ) -> None:
        """Take one model one step towards ready."""
        self._check_serving(model, applications)
        if model.task is not None and model.task.done():
            model.task = None
        now_s = time.monotonic()
        status = application.status if application else None
        if model.task is not None:
            pass
        elif application is None:
            if now_s >= model.retry_at_s and self._may_start(model):
                model.began_s, model.retry_unix_s = now_s, None
                self._do(model, self._start(model))
        elif status is ApplicationStatus.RUNNING:
            model.began_s = None
            cold = not model.serves or not model.is_warm(self._servers.away(self._config))
            if model.suspected or (cold and now_s >= model.retry_at_s):
                model.retry_unix_s = None
                self._do(model, self._warm_up(model))
        elif status is ApplicationStatus.DEPLOY_FAILED:
            self._failed(model, failure_reason(application.message), delete=True)
        if model.began_s and now_s - model.began_s > self._config.pool.start_timeout_s:
            self._failed(model, "the model did not start in time", delete=True)

    def _check_serving(
        self, model: ModelProgress, applications: dict[str, ModelApplication]
    ) -> None:
        """A model whose application died leaves the candidates at once."""
        member = model.member
        if member.application is None:
            previous = applications.get(model.previous or "")
            if previous and previous.replicas and previous.is_up:
                model.set(MemberState.READY, member.reason, previous.name)
            return
        serving = applications.get(member.application)
        needs_replica = model.config.autoscaling.min_replicas > 0
        if serving is None:
            model.set(MemberState.STARTING, None, None)
        elif serving.is_down:
            model.set(MemberState.FAILED, failure_reason(serving.message), None)
        elif needs_replica and not serving.replicas:
            model.set(MemberState.FAILED, "none of its replicas answers", None)

    def _may_start(self, model: ModelProgress) -> bool:
        """Whether the starts under way, and the free memory, leave room for another."""
        starts = [
            other
            for other in self._models.values()
            if other is not model and other.began_s is not None
        ]
        if len(starts) >= self._config.pool.max_parallel_starts:
            return False
        single_node = sum(node["Alive"] for node in ray.nodes()) == 1
        free_gib = psutil.virtual_memory().available / 2**30
        reserved_gib = sum(_startup_memory_gib(other.config) for other in starts)
        needed_gib = _startup_memory_gib(model.config)
        return not (starts and single_node and free_gib - reserved_gib < needed_gib)

    def _do(self, model: ModelProgress, work: Coroutine[Any, Any, None]) -> None:
        def done(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception() is not None:
                logger.error("model %s: %r", model.config.model_id, task.exception())
            self._wake.set()

        model.task = asyncio.get_running_loop().create_task(work)
        model.task.add_done_callback(done)

    async def _start(self, model: ModelProgress) -> None:
        """Hand the application to Serve."""
        logger.info("model %s: starting", model.config.model_id)
        try:
            await self._deployer.deploy(model.config)
        except Exception as error:
            logger.exception("model %s: cannot be deployed", model.config.model_id)
            self._failed(model, failure_reason(str(error)), delete=False)

    async def _warm_up(self, model: ModelProgress) -> None:
        """Ask the model, then each of its pairs that has not answered yet.

        A model that serves and is suspected is asked too: it leaves the candidates if it does not
        answer, and comes back when it does.
        """
        config, application = model.config, model.application
        clients = ModelClients()
        clients.use({config.model_id: application})
        timeout_s = _PROBE_TIMEOUT_S if model.serves else WARM_UP_TIMEOUT_S
        if config.autoscaling.min_replicas == 0:
            timeout_s = self._config.pool.start_timeout_s
        model.suspected = False
        try:
            await greet(clients, config.model_id, Deadline.after(timeout_s))
            if not model.serves and config.role == "chat":
                await compile_logprobs(clients, config.model_id)
        except AtlasError as error:
            logger.warning("model %s: it does not answer: %s", config.model_id, error.message)
            self._failed(model, failure_reason(error.message), delete=False)
            # It needs no new start, so it is asked again soon.
            model.failures, model.retry_unix_s = 0, None
            model.retry_at_s = time.monotonic() + self._config.pool.health_interval_s
            return
        pairs = PairRunner(self._config, clients)
        reached = model.warm | self._servers.away(self._config)
        cold = [tool_id for tool_id in model.config.tools if tool_id not in reached]
        answered = await asyncio.gather(
            *(why_silent(pairs, Pair(config.model_id, tool_id)) for tool_id in cold)
        )
        model.warm |= {tool for tool, error in zip(cold, answered, strict=True) if error is None}
        reasons = [
            f"with {tool}: {error}" for tool, error in zip(cold, answered, strict=True) if error
        ]
        if model is not self._models.get(config.model_id):
            return
        if reasons:
            model.put_off(self._config.pool)
        else:
            model.failures, model.previous = 0, None
        model.set(MemberState.READY, "; ".join(reasons) or None, application)

    def _failed(self, model: ModelProgress, reason: str, *, delete: bool) -> None:
        """Note a failure; the next try comes after a pause that doubles."""
        model.began_s = None
        model.put_off(self._config.pool)
        if delete:
            self._do(model, asyncio.to_thread(delete_application, model.application))
        serving = model.member.application
        if serving is None or serving == model.application:
            model.set(MemberState.FAILED, reason, None)
        else:  # the one before it goes on
            model.set(MemberState.READY, f"the update failed: {reason}", serving)

    # What everybody sees.

    async def _publish(self, applications: dict[str, ModelApplication]) -> None:
        """Tell of the pool if it differs from what was told last."""
        members, away = [], self._servers.away(self._config)
        for model in self._models.values():
            serving = applications.get(model.member.application or "")
            members.append(
                replace(
                    model.member,
                    num_replicas=len(serving.replicas) if serving else None,
                    cold_tools=frozenset(model.config.tools) - (model.warm - away),
                    updating=model.member.application not in (None, model.application),
                    retry_unix_s=model.retry_unix_s,
                    waits_for=model.waits_for(applications.get(model.application)),
                )
            )
        known = {member.model_id for member in members}
        since = {member.model_id: member for member in self._state.models}
        for application in applications.values():
            if application.model_id in known:
                continue
            known.add(application.model_id)
            before = since.get(application.model_id)
            if before is None or before.state is not MemberState.DRAINING:
                before = ModelMember(
                    application.model_id, MemberState.DRAINING, None, time.time(), application.name
                )
            members.append(before)
        state = replace(
            self._state,
            models=tuple(members),
            tools=tuple(tool.tool_id for tool in self._config.tools),
            pairs=self._config.all_pairs(),
            patterns=members_of_patterns(self._config),
            config=self._config,
            revision=self._revision,
        )
        if state != self._state:
            async with self._changed:
                self._state = replace(state, pool_version=state.pool_version + 1)
                self._changed.notify_all()

    async def _end_unwanted(self, applications: dict[str, ModelApplication]) -> None:
        """Delete what nobody wants, can choose, or waits for."""
        in_use = {model.application for model in self._models.values()}
        for model in self._models.values():
            in_use |= {model.member.application or "", model.previous or ""}
        unwanted = [a for name, a in applications.items() if name not in in_use]
        longest_s = self._config.gateway.limits.max_deadline_s
        self._draining.note(unwanted, self._state.pool_version, longest_s)
        if self._revision is not None:  # until the store has answered, what is wanted is a guess
            await self._draining.end(unwanted)


def _startup_memory_gib(config: ModelConfig) -> float:
    return config.startup_memory_gib if isinstance(config, LocalModelConfig) else 0.0


def _mark(path: Path | None) -> tuple[int, int] | None:
    """What changes when a file does; `None` without one."""
    try:
        status = path.stat() if path else None
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size) if status else None
