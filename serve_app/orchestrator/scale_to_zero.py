"""Models that are scaled to zero: who sleeps, and how one is woken without a request that stalls.

Serve starts a replica when a request is waiting for one. So a sleeping model is woken by a tiny
request in the background, while pairs that are awake answer; only a request that no other model
may answer waits for it, and not for ever.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

from serve_app.budget import Deadline
from serve_app.config import PoolConfig
from serve_app.errors import AtlasError, NoCandidate
from serve_app.models.clients import ModelClients
from serve_app.models.protocol import ChatBody
from serve_app.schemas import Decision, Limits, MemberState, Pair, PoolState

logger = logging.getLogger(__name__)

_TRUSTED_S = 30.0
"""A model that answered so lately is awake, whatever the pool's last state says."""
_GREETING: ChatBody = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 1}


class Waker:
    """Knows which models sleep, and wakes them; one per gateway replica.

    Invariants:
        - At most one request that wakes a model is under way, and it ends by `start_timeout_s`.
        - Nobody waits for a model longer than `cold_start_wait_s`, nor past the own deadline.
    """

    def __init__(self, config: PoolConfig, clients: ModelClients) -> None:
        """Begin with none woken.

        Args:
            config: How long a start may take, and be waited for.
            clients: Handles to the models.
        """
        self._config = config
        self._clients = clients
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._answered_s: dict[str, float] = {}

    def asleep(self, pool: PoolState) -> frozenset[str]:
        """Models of the pool that are ready and have no replica."""
        now_s = time.monotonic()
        return frozenset(
            member.model_id
            for member in pool.models
            if member.state is MemberState.READY
            and member.num_replicas == 0
            and now_s - self._answered_s.get(member.model_id, -_TRUSTED_S) >= _TRUSTED_S
        )

    def wake(self, model_id: str) -> asyncio.Task[None]:
        """Wake a model in the background; the task ends when it has answered, or cannot."""
        task = self._under_way.get(model_id)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._greet(model_id))
            self._under_way[model_id] = task
            task.add_done_callback(lambda done: self._woken(model_id, done))
        return task

    async def wait_for(self, model_id: str, deadline: Deadline) -> None:
        """Wake a model and wait until it answers.

        Raises:
            NoCandidate: If it does not in time.
            AtlasError: If it cannot start.
        """
        patience_s = min(deadline.remaining_s(), self._config.cold_start_wait_s)
        task = self.wake(model_id)
        try:
            async with asyncio.timeout(patience_s):
                await asyncio.shield(task)  # others wait for it too, and whoever comes next
        except TimeoutError:
            raise NoCandidate(f"the model {model_id!r} is starting; try again") from None

    def close(self) -> None:
        """Give up what is under way."""
        for task in self._under_way.values():
            task.cancel()

    async def _greet(self, model_id: str) -> None:
        logger.info("model %s sleeps; waking it", model_id)
        deadline = Deadline.after(self._config.start_timeout_s)
        await self._clients.complete(model_id, _GREETING, deadline)

    def _woken(self, model_id: str, task: asyncio.Task[None]) -> None:
        del self._under_way[model_id]
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._answered_s[model_id] = time.monotonic()
        elif isinstance(error, AtlasError):
            logger.warning("model %s cannot be woken: %s", model_id, error.message)
        else:
            logger.error("model %s cannot be woken: %r", model_id, error)


def awake_only(limits: Limits, pool: PoolState, asleep: frozenset[str]) -> Limits:
    """The limits without the models that sleep, and the patterns that need them."""
    models = frozenset(member.model_id for member in pool.models)
    patterns = frozenset(p.pair.model_id for p in pool.patterns)
    allowed = models | patterns if limits.models is None else limits.models
    awake = {Pair.of_pattern(name).model_id for name in pool.ready_patterns(asleep)}
    return replace(limits, models=allowed - asleep - (patterns - awake))


def sleepers_last(decision: Decision, asleep: frozenset[str]) -> Decision:
    """A decision whose choice is awake, with the fallbacks that sleep after the others."""
    ordered = sorted(decision.candidates, key=lambda c: c.pair.model_id in asleep)
    return replace(decision, candidates=tuple(ordered))
