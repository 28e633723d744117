"""The real time server behind a plain function, called through the pool's own MCP client.

One process serves all calls of this interpreter; it ends with the interpreter.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import sys
import threading
from collections.abc import Coroutine, Mapping
from functools import cache
from typing import Any, TypeVar

from benchmarks.nano.clock_tasks import FUNCTIONS, HEAD, TOOL
from serve_app.config.tools import McpConfig
from serve_app.errors import AtlasError
from serve_app.tools.mcp.session import McpSession

T = TypeVar("T")
_START_S = 60.0
_CALL_S = 30.0


class ClockServer:
    """A session with `mcp-server-time`, on a thread of its own.

    Raises:
        RuntimeError: If the server does not start, or lacks a function.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        args = ("-m", "mcp_server_time", "--local-timezone", "UTC")
        config = McpConfig(tool_id=TOOL, command=sys.executable, args=args, effects="none")
        self._session = McpSession(config)
        try:
            self._run(self._connect(), _START_S)
        except BaseException:
            self.close()
            raise

    def call(self, function: str, arguments: Mapping[str, Any]) -> str:
        """The text of a call's result, as the pool shows it; an error comes back as text."""
        try:
            asked = self._session.call(function, dict(arguments), _CALL_S)
            return self._run(asked, 2 * _CALL_S).text
        except AtlasError as error:
            return f"Error: {error}"

    def result(self, function: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What the server answers to a right call."""
        head, _, body = self.call(function, arguments).partition("\n")
        if head != HEAD:
            raise RuntimeError(f"the time server answers {head!r} to {dict(arguments)!r}")
        result: dict[str, Any] = json.loads(body)
        return result

    def close(self) -> None:
        """End the session, its process and the thread."""
        if self._thread.is_alive():
            self._run(self._session.close(), _START_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _connect(self) -> None:
        self._session.start()
        await self._session.first_try()
        state = self._session.state()
        self._session.allow({name: sha256 for name, (sha256, _) in state.definitions.items()})
        names = {function.name for function in self._session.functions()}
        if names != set(FUNCTIONS):
            raise RuntimeError(f"the time server offers {sorted(names)!r}: {state.reason}")

    def _run(self, work: Coroutine[Any, Any, T], limit_s: float) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(limit_s)


@cache
def clock_server() -> ClockServer:
    """The one server of this interpreter."""
    server = ClockServer()
    atexit.register(server.close)
    return server
