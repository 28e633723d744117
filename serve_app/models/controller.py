"""PoolController: brings the models up, watches them, tells everybody what can be chosen.

Level-triggered: each round compares what is configured with what Serve runs and takes the next step
for each model, so it converges from any half-done state. Gateways and routers follow it by long
poll (`PoolWatcher`).
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from dataclasses import dataclass, replace

import psutil
import ray
from ray import serve
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from serve_app.config import AtlasConfig, LocalModelConfig, ModelConfig
from serve_app.models.deploy import deploy_model, deployment_name
from serve_app.models.protocol import application_name
from serve_app.schemas import MemberState, ModelMember, PoolState

logger = logging.getLogger(__name__)

_WARM_UP_TIMEOUT_S = 60.0
_LONG_POLL_S = 20.0


@dataclass
class _Start:
    """A start under way."""

    began_s: float
    """Monotonic clock."""
    reserved_gib: float


class PoolController:
    """Keeps the configured pool running; one replica.

    Invariants:
        - `pool_version` rises with every change that a router or gateway can see, and never falls.
        - A model is `ready` only after its application runs and has answered a warm-up request.
        - A model that fails never delays or harms another.
    """

    def __init__(self, config: AtlasConfig) -> None:
        """Begin with every model starting; the first round runs at once."""
        self._config = config
        now = time.time()
        # Versions start at the clock so that they also rise when this replica is replaced.
        self._state = PoolState(
            pool_version=int(now),
            models=tuple(
                ModelMember(m.model_id, MemberState.STARTING, None, now) for m in config.models
            ),
            tools=tuple(tool.tool_id for tool in config.tools),
            pairs=config.all_pairs(),
        )
        self._changed = asyncio.Condition()
        self._starts: dict[str, _Start] = {}
        self._loop_task = asyncio.get_running_loop().create_task(self._reconcile_forever())

    async def state(self, known_version: int = -1) -> PoolState:
        """The pool; waits up to 20 s for a version other than `known_version`."""
        async with self._changed:
            try:
                async with asyncio.timeout(_LONG_POLL_S):
                    await self._changed.wait_for(lambda: self._state.pool_version != known_version)
            except TimeoutError:
                pass
            return self._state

    async def check_health(self) -> None:
        """Serve's health check: the reconcile loop must be alive."""
        if self._loop_task.done():
            raise RuntimeError("the reconcile loop has ended")

    async def _reconcile_forever(self) -> None:
        while True:
            try:
                await self._reconcile()
            except Exception:
                logger.exception("a reconcile round failed; trying again")
            starting = any(member.state is MemberState.STARTING for member in self._state.models)
            await asyncio.sleep(1.0 if starting else self._config.pool.health_interval_s)

    async def _reconcile(self) -> None:
        """One round: the next step of every model."""
        applications = (await asyncio.to_thread(serve.status)).applications
        await asyncio.gather(
            *(
                self._step(member, applications.get(application_name(member.model_id)))
                for member in self._state.models
            )
        )

    async def _step(
        self, member: ModelMember, application: ApplicationStatusOverview | None
    ) -> None:
        """Take one model one step towards ready."""
        config = self._config.model(member.model_id)
        status = application.status if application else None
        outdated = (
            application is not None and deployment_name(config) not in application.deployments
        )
        if application is None or (outdated and status is not ApplicationStatus.DEPLOYING):
            if member.model_id not in self._starts and member.state is not MemberState.FAILED:
                await self._start(config)
        elif status is ApplicationStatus.RUNNING:
            self._starts.pop(member.model_id, None)
            if member.state is not MemberState.READY:
                await self._warm_up(config)
        elif status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            self._starts.pop(member.model_id, None)
            await self._set(
                member.model_id, MemberState.FAILED, failure_reason(application.message)
            )
        start = self._starts.get(member.model_id)
        if start and time.monotonic() - start.began_s > self._config.pool.start_timeout_s:
            self._starts.pop(member.model_id)
            await self._set(member.model_id, MemberState.FAILED, "the model did not start in time")

    async def _start(self, config: ModelConfig) -> None:
        """Deploy a model's application, if starts under way and free memory allow."""
        needed_gib = config.startup_memory_gib if isinstance(config, LocalModelConfig) else 0.0
        reserved_gib = sum(start.reserved_gib for start in self._starts.values())
        single_node = sum(node["Alive"] for node in ray.nodes()) == 1
        free_gib = psutil.virtual_memory().available / 2**30
        if len(self._starts) >= self._config.pool.max_parallel_starts:
            return
        if self._starts and single_node and free_gib - reserved_gib < needed_gib:
            return
        self._starts[config.model_id] = _Start(time.monotonic(), needed_gib)
        logger.info("model %s: starting", config.model_id)
        try:
            await ray.remote(num_cpus=0, max_calls=1)(deploy_model).remote(config)
        except Exception as error:
            self._starts.pop(config.model_id, None)
            logger.exception("model %s: cannot be deployed", config.model_id)
            await self._set(config.model_id, MemberState.FAILED, failure_reason(str(error)))

    async def _warm_up(self, config: ModelConfig) -> None:
        """Send one small request; ready if it is answered."""
        body = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 1}
        try:
            handle = serve.get_app_handle(application_name(config.model_id))
            await asyncio.wait_for(handle.complete.remote(body), _WARM_UP_TIMEOUT_S)
        except Exception as error:
            logger.warning("model %s: warm-up request failed: %s", config.model_id, error)
            await self._set(config.model_id, MemberState.FAILED, failure_reason(str(error)))
        else:
            await self._set(config.model_id, MemberState.READY, None)

    async def _set(self, model_id: str, state: MemberState, reason: str | None) -> None:
        """Record a member's state; a change raises the version and wakes the watchers."""
        members = {member.model_id: member for member in self._state.models}
        if (members[model_id].state, members[model_id].reason) == (state, reason):
            return
        logger.info("model %s: %s%s", model_id, state.value, f" ({reason})" if reason else "")
        members[model_id] = ModelMember(model_id, state, reason, time.time())
        async with self._changed:
            self._state = replace(
                self._state,
                pool_version=self._state.pool_version + 1,
                models=tuple(members.values()),
            )
            self._changed.notify_all()


def failure_reason(message: str) -> str:
    """The one line of a message or traceback that says why, without the server's paths."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    errors = [
        line for line in lines if re.match(r"^[\w.]*(Error|Exception|Refused|Failed)\w*:", line)
    ]
    line = (errors or lines or ["unknown"])[-1]
    return re.sub(r"(?<![\w.])/[\w./@+-]+", "<path>", line)[:300]
