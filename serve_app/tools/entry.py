"""One tool as a runner sees it: its places, and how a call of it begins on the cluster."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

import ray
from pydantic import TypeAdapter

from serve_app.config.tools import McpConfig, ToolConfig, ToolSettings
from serve_app.errors import ToolFailed, ToolRetry, ToolTimeout
from serve_app.tools.arguments import ArgumentsCheck
from serve_app.tools.base import Function, Tool, ToolResult
from serve_app.tools.registry import build_tool
from serve_app.trace_context import CURRENT, Carrier

if TYPE_CHECKING:
    from serve_app.tools.mcp.actor import SessionHandle

logger = logging.getLogger(__name__)

CANCEL_AFTER_S = 0.5
"""How long past its time a call may take to end by itself before it is interrupted."""

_CONFIG: TypeAdapter[ToolConfig] = TypeAdapter(ToolConfig)
_built: dict[str, Tool] = {}
"""Tools of this worker process by their settings: the second call finds the index loaded."""


def _tool(config_json: str) -> Tool:
    """The tool in this process. The first time, the tool loads here, outside the time of its call.

    Raises:
        ToolFailed: If it cannot be loaded.
    """
    if config_json not in _built:
        tool = build_tool(_CONFIG.validate_json(config_json))
        tool.warm()
        _built[config_json] = tool
    return _built[config_json]


def run_tool(
    config_json: str,
    function: str,
    arguments: dict[str, Any],
    deadline_s: float,
    carrier: Carrier | None = None,
) -> ToolResult:
    """The Ray task: one call of one tool."""
    CURRENT.set(carrier)
    try:
        tool = _tool(config_json)
        with _ended_after(deadline_s + CANCEL_AFTER_S, tool.tool_id):
            return tool.call(function, arguments, deadline_s)
    except (ToolRetry, ToolFailed):
        raise
    except Exception:
        # The text of an unforeseen error may hold paths; it stays in this worker's log.
        tool_id = json.loads(config_json)["tool_id"]
        logger.exception("tool %s failed", tool_id)
        raise ToolFailed(f"tool {tool_id!r} failed") from None


@contextmanager
def _ended_after(seconds: float, tool_id: str) -> Iterator[None]:
    """Interrupt a call that should have ended by itself; one that cannot be is the runner's to end.

    Raises:
        ToolTimeout: In the block, when its time is over.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise ToolTimeout(f"tool {tool_id!r} did not finish in {seconds:.3g} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


def _warm_tools(config_jsons: list[str]) -> list[str]:
    """The Ray task that keeps a worker, with what its tools load, ready.

    Returns:
        What is wrong with each tool; empty: nothing.
    """
    said = []
    for config_json in config_jsons:
        try:
            _tool(config_json).warm()
            said.append("")
        except (ToolRetry, ToolFailed) as error:
            said.append(type(error).__name__)
        except Exception as error:
            logger.exception("a tool cannot be warmed")
            said.append(type(error).__name__)
    return said


@dataclass
class Entry:
    """One tool as the runner sees it."""

    config: ToolSettings
    config_json: str
    tool: Tool
    places: asyncio.Semaphore
    call: Any
    warm: Any
    """Warms this tool, and others whose tasks the same workers take."""
    session: SessionHandle | None = None
    """Of an MCP server's tool: it tells the functions, and makes the calls."""
    broken: str = ""
    """Why the functions cannot be read; empty where they were."""
    functions: tuple[Function, ...] = ()
    checks: dict[str, ArgumentsCheck] = field(default_factory=dict)
    """By the name of the function."""
    waiting: int = 0
    running: int = 0
    warming: asyncio.Task[None] | None = None
    """The warm-up under way; there is never a second one beside it."""
    reading: asyncio.Task[None] | None = None
    """Reads the functions in a thread; they are not known before it is done."""

    def read(self) -> None:
        """Learn what may be called; a server's functions are told by its session."""
        try:
            self.offer(self.tool.functions())
        except ToolFailed as error:
            self._is_broken(error)

    async def read_aside(self) -> None:
        """As `read`, in a thread."""
        try:
            self.offer(await asyncio.to_thread(self.tool.functions))
        except ToolFailed as error:
            self._is_broken(error)

    def _is_broken(self, error: ToolFailed) -> None:
        logger.error("%s", error.message)
        self.broken = error.message

    @property
    def is_read(self) -> bool:
        """Whether its functions are known."""
        return self.reading is None or self.reading.done()

    def offer(self, functions: tuple[Function, ...]) -> None:
        """Say what may be called."""
        if functions is not self.functions:
            self.functions = functions
            self.checks = {f.name: ArgumentsCheck(f.name, f.parameters) for f in functions}

    def begin(self, function: str, arguments: dict[str, Any], deadline_s: float) -> Any:
        """Begin a call; Ray's reference to its result."""
        if self.session is not None:
            return self.session.call(function, arguments, deadline_s)
        return self.call.remote(self.config_json, function, arguments, deadline_s, CURRENT.get())

    def leave(self) -> None:
        """Give a place back."""
        self.running -= 1
        self.places.release()


def entry_of(config: ToolConfig) -> Entry:
    """Prepare a tool; nothing is started, and its functions are not read yet.

    Args:
        config: Its settings.
    """
    tool = build_tool(config)
    # A call whose worker died is made again where the orchestrator's table says so, not by Ray.
    options: dict[str, Any] = {"num_cpus": config.num_cpus, "max_retries": 0}
    if config.memory_bytes is not None:
        options["memory"] = config.memory_bytes
    # Workers are shared by what has the same environment: a variable of its own keeps a tool whose
    # state is slow to load on workers that have it.
    runtime_env = {"env_vars": {"ATLAS_TOOL": config.tool_id}} if config.dedicated_worker else None
    if runtime_env is not None:
        options["runtime_env"] = runtime_env
    return Entry(
        config=config,
        config_json=config.model_dump_json(),
        tool=tool,
        places=asyncio.Semaphore(config.max_concurrency),
        call=ray.remote(run_tool).options(name=f"tool:{config.tool_id}", **options),
        warm=ray.remote(_warm_tools).options(
            name=f"warm:{config.tool_id if config.dedicated_worker else '*'}",
            num_cpus=0,
            max_retries=0,
            runtime_env=runtime_env,
            enable_task_events=False,  # one each half second: Ray would remember them all
        ),
        session=session_handle(config) if isinstance(config, McpConfig) else None,
    )


def session_handle(config: McpConfig) -> SessionHandle:
    """The way to the actor of a server."""
    from serve_app.tools.mcp.actor import SessionHandle  # loads the SDK

    return SessionHandle(config)
