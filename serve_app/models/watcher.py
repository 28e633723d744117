"""A process's own copy of the pool, kept fresh by long poll and in the controller's absence."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Protocol

from serve_app.schemas import PoolState

logger = logging.getLogger(__name__)

_RETRY_S = 1.0
_POLL_TIMEOUT_S = 60.0


class _State(Protocol):
    def remote(self, known_version: int, watcher: str, /) -> Awaitable[PoolState]: ...


class PoolHandle(Protocol):
    """What is called on the `PoolController` deployment to follow it."""

    @property
    def state(self) -> _State:
        """Answers with the pool once it is another than the known one."""
        ...


class PoolWatcher:
    """Follows the controller; `state` is the last pool it told of."""

    def __init__(
        self, controller: PoolHandle, on_change: Callable[[PoolState], None] | None = None
    ) -> None:
        """Start following in the running event loop.

        Args:
            controller: Handle of the `PoolController` deployment.
            on_change: Called with every new state, from the event loop.
        """
        self._controller = controller
        self._on_change = on_change
        self._name = uuid.uuid4().hex
        self.state = PoolState(pool_version=-1, models=(), tools=(), pairs=())
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def first(self) -> PoolState:
        """The pool as soon as the controller has told of one."""
        while self.state.pool_version < 0:
            await asyncio.sleep(0.02)
        return self.state

    async def _follow(self) -> None:
        while True:
            try:
                state: PoolState = await asyncio.wait_for(
                    self._controller.state.remote(self.state.pool_version, self._name),
                    _POLL_TIMEOUT_S,
                )
            except Exception as error:
                logger.warning(
                    "the pool controller does not answer (%s); keeping the pool known", error
                )
                await asyncio.sleep(_RETRY_S)
                continue
            if state.pool_version != self.state.pool_version:
                self.state = state
                if self._on_change is not None:
                    self._on_change(state)
