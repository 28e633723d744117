"""An MCP server's session in one Ray actor, which all gateways and the pool's controller share.

The actor is made by whoever needs it first, comes back when its process dies, and ends when nobody
has asked for it for `UNUSED_S`: then the tool has left the pool, or has other settings.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Mapping
from typing import Any

import ray
import ray.exceptions

from serve_app.config.tools import McpConfig
from serve_app.errors import ToolError, ToolFailed
from serve_app.tools.base import Function, ToolResult
from serve_app.tools.mcp.session import McpSession
from serve_app.tools.mcp.state import SessionState
from serve_app.trace_context import CURRENT, Carrier

logger = logging.getLogger(__name__)

UNUSED_S = 120.0
_LOOK_S = 10.0
_NAMESPACE = "atlas-mcp"


class SessionActor:
    """The actor; every method is a coroutine, so calls run side by side."""

    def __init__(self, config_json: str) -> None:
        """Prepare; the first method that is called connects."""
        # What it says of a bad message holds the message, and a traceback; ours say enough.
        logging.getLogger("mcp").setLevel(logging.CRITICAL)
        self._session = McpSession(McpConfig.model_validate_json(config_json))
        self._functions: tuple[Function, ...] = ()
        self._version = 0
        self._used_s = time.monotonic()
        self._end: asyncio.Task[None] | None = None

    async def functions(self, known_version: int) -> tuple[int, tuple[Function, ...] | None]:
        """What may be offered now, once a first try to connect has ended.

        Returns:
            A version, and the functions; `None` where the version is known.
        """
        self._use()
        await self._session.first_try()
        functions = self._session.functions()
        if self._version == 0 or functions != self._functions:
            self._functions = functions
            self._version = max(time.time_ns(), self._version + 1)  # also over a restart
        return self._version, None if self._version == known_version else functions

    async def follow(self, pins: Mapping[str, str]) -> SessionState:
        """Take over which definitions are allowed; tell how the session stands."""
        self._use()
        self._session.allow(pins)
        return self._session.state()

    async def call(
        self,
        function: str,
        arguments: dict[str, Any],
        deadline_s: float,
        carrier: Carrier | None = None,
    ) -> ToolResult:
        """See `McpSession.call`."""
        self._use()
        CURRENT.set(carrier)
        try:
            return await self._session.call(function, arguments, deadline_s)
        except ToolError:
            raise
        except Exception:
            # The text of an unforeseen error may hold paths; it stays in this process's log.
            logger.exception("tool %s failed", function)
            raise ToolFailed(f"tool {function!r} failed") from None

    def _use(self) -> None:
        self._used_s = time.monotonic()
        self._session.start()
        if self._end is None:
            self._end = asyncio.get_running_loop().create_task(self._end_when_unused())

    async def _end_when_unused(self) -> None:
        while time.monotonic() - self._used_s < UNUSED_S:
            await asyncio.sleep(_LOOK_S)
        await self._session.close()
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


class SessionHandle:
    """The way to a server's actor."""

    def __init__(self, config: McpConfig) -> None:
        """Of a server; its actor is made on first use.

        Args:
            config: The server; other settings are another actor.
        """
        self._config = config
        self._config_json = config.model_dump_json()
        digest = hashlib.sha256(self._config_json.encode()).hexdigest()
        self._name = f"{config.tool_id}-{digest[:16]}"
        self._held: Any = None
        self._version = 0
        self._functions: tuple[Function, ...] = ()

    async def functions(self) -> tuple[Function, ...]:
        """What may be offered now.

        Raises:
            RayError: If the actor does not answer.
        """
        try:
            actor = await asyncio.to_thread(self._actor)
            told: tuple[int, tuple[Function, ...] | None]
            told = await actor.functions.remote(self._version)
        except ray.exceptions.ActorDiedError:
            self.forget()
            raise
        self._version, functions = told
        if functions is not None:
            self._functions = functions
        return self._functions

    async def follow(self, pins: Mapping[str, str]) -> SessionState:
        """Say which definitions are allowed; how the session stands.

        Raises:
            RayError: If the actor does not answer.
        """
        try:
            actor = await asyncio.to_thread(self._actor)
            state: SessionState = await actor.follow.remote(dict(pins))
        except ray.exceptions.ActorDiedError:
            self.forget()
            raise
        return state

    def call(self, function: str, arguments: dict[str, Any], deadline_s: float) -> Any:
        """Begin a call.

        Returns:
            Ray's reference to its `ToolResult`.
        """
        return self._actor().call.remote(function, arguments, deadline_s, CURRENT.get())

    def forget(self) -> None:
        """Let the next use make the actor anew: this one has ended for good."""
        self._held = None

    def _actor(self) -> Any:
        if self._held is None:
            self._held = (
                ray.remote(SessionActor)
                .options(
                    name=self._name,
                    namespace=_NAMESPACE,
                    get_if_exists=True,
                    lifetime="detached",
                    max_restarts=-1,
                    max_task_retries=0,
                    max_concurrency=1000,
                    num_cpus=self._config.num_cpus,
                    memory=self._config.memory_bytes,
                    # The loop is asked each half second: Ray would remember all of that.
                    enable_task_events=False,
                )
                .remote(self._config_json)
            )
        return self._held
