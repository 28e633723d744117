"""MCP servers as the controller sees them: which do not answer, and what each may offer.

Each server's session asks for nothing: the controller tells it which definitions are allowed, once
a second, so an actor that was made anew offers nothing before it was told.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from typing import TYPE_CHECKING

import ray.exceptions

from serve_app.config import AtlasConfig
from serve_app.config.tools import McpConfig
from serve_app.errors import StoreError
from serve_app.pool.allow_list import AllowList
from serve_app.store import Store, mcp_definitions, note_definitions
from serve_app.telemetry import TOOLS_MCP_CHANGED, MetricSink
from serve_app.tools.entry import session_handle
from serve_app.tools.mcp.state import SessionState

if TYPE_CHECKING:
    from serve_app.tools.mcp.actor import SessionHandle

logger = logging.getLogger(__name__)

_ASK_S = 5.0
"""A session that does not answer in this time is away."""


class McpServers:
    """Follows the servers of the pool; used from one event loop.

    Invariants:
        - A definition is allowed only where the store says that it was accepted; what the store
          said last holds while it is away.
    """

    def __init__(self, metrics: MetricSink) -> None:
        """Begin with none known.

        Args:
            metrics: Counts changed definitions.
        """
        self._metrics = metrics
        self._handles: dict[str, SessionHandle] = {}
        self._configs: dict[str, McpConfig] = {}
        self._noted: dict[str, dict[str, tuple[str, str]]] = {}
        """Of each server what the store knows that it lists."""
        self._pins: dict[str, dict[str, str]] = defaultdict(dict)
        self._offering: frozenset[str] = frozenset()

    def away(self, config: AtlasConfig) -> frozenset[str]:
        """Tools whose server does not answer, or may offer nothing.

        Args:
            config: The deployment with the pool as it is wanted.
        """
        servers = {tool.tool_id for tool in config.tools if isinstance(tool, McpConfig)}
        return frozenset(servers - self._offering)

    async def look(self, config: AtlasConfig, file: AtlasConfig, store: Store | None) -> None:
        """One round over all servers.

        Args:
            config: The deployment with the pool as it is wanted.
            file: As its file has it; a server that it names is accepted when it is first seen.
            store: Which definitions were accepted; `None`: not reached yet.
        """
        wanted = {t.tool_id: t for t in config.tools if isinstance(t, McpConfig)}
        for tool_id, settings in wanted.items():
            if self._configs.get(tool_id) != settings:
                self._handles[tool_id] = session_handle(settings)
                self._noted.pop(tool_id, None)
        self._configs = wanted
        self._handles = {t: h for t, h in self._handles.items() if t in wanted}
        if not wanted:
            self._offering = frozenset()
            return
        listed = dict(zip(wanted, await asyncio.gather(*map(self._ask, wanted)), strict=True))
        if store is not None:
            before = self._pins
            try:
                await self._sync(listed, AllowList(file), store)
            except StoreError as error:
                logger.warning("definitions of MCP servers are not read: %s", error.message)
            told = [tool_id for tool_id in wanted if before[tool_id] != self._pins[tool_id]]
            await asyncio.gather(*map(self._ask, told))
        self._offering = frozenset(
            tool_id for tool_id, state in listed.items() if self._offers(tool_id, state)
        )

    async def _ask(self, tool_id: str) -> SessionState:
        try:
            async with asyncio.timeout(_ASK_S):
                return await self._handles[tool_id].follow(self._pins[tool_id])
        except (TimeoutError, ray.exceptions.RayError) as error:
            logger.warning("tool %s: its session is away: %s", tool_id, type(error).__name__)
            return SessionState()

    def _offers(self, tool_id: str, state: SessionState) -> bool:
        pins = self._pins[tool_id]
        return state.is_up and any(pins.get(f) == d[0] for f, d in state.definitions.items())

    async def _sync(
        self, listed: dict[str, SessionState], allowed: AllowList, store: Store
    ) -> None:
        for tool_id, state in listed.items():
            if not state.is_up or self._noted.get(tool_id) == state.definitions:
                continue
            accept = allowed.is_of_file(self._configs[tool_id])
            refused = await note_definitions(store, tool_id, state.definitions, accept=accept)
            self._noted[tool_id] = state.definitions
            if refused:
                logger.warning(
                    "tool %s: changed or new, and not offered before an admin accepts them: %s",
                    tool_id,
                    ", ".join(refused),
                )
                self._metrics.record(TOOLS_MCP_CHANGED, len(refused), tool=tool_id)
            if state.left_out:
                logger.warning("tool %s: cannot be offered: %s", tool_id, state.left_out)
        pins: dict[str, dict[str, str]] = defaultdict(dict)
        for row in await mcp_definitions(store):
            if row.accepted is not None:
                pins[row.tool_id][row.function] = row.accepted
        self._pins = pins
