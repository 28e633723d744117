"""Runs tools as Ray tasks for one gateway replica: check, queue, dispatch, wait, give up in time.

Tools never run in the calling process. A call's arguments are checked against the tool's JSON
schema here, so a wrong call costs no task. A call past its deadline, or whose caller has gone, is
cancelled: interrupted first, which keeps the worker and what it has loaded, then by killing the
worker. Sandboxed code ends with either, and at its own deadline anyway. Calls of an MCP server's
functions go to the actor that has its session, and are cancelled there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions

from serve_app.config.tools import RetrievalConfig, ToolConfig, ToolsetConfig
from serve_app.errors import ConfigError, ToolFailed, ToolRetry, ToolTimeout, ToolWorkerDied
from serve_app.tools.base import Function, Tool, ToolResult
from serve_app.tools.builtin.toolset import functions_by_owner
from serve_app.tools.entry import CANCEL_AFTER_S, Entry, entry_of

if TYPE_CHECKING:
    from serve_app.tools.mcp.actor import SessionHandle

logger = logging.getLogger(__name__)

START_S = 20.0
"""How long a worker may take to start and load, beyond the time that a call itself may take."""
FORCE_AFTER_S = 1.0
"""How long a cancelled task may take to end before its worker is killed."""
KEEP_WARM_S = 0.6
"""Ray ends a worker that idles for a second while there are more than it likes; asked more often,
it stays."""

START_TIMEOUT_S = 60.0
"""How long `start` waits for a tool; a slow one goes on getting ready behind the first calls."""


class ToolRunner:
    """The gateway's way to its tools; one for each replica, used from one event loop.

    Invariants:
        - At most `max_concurrency` calls of a tool run and `max_queued` wait; more are refused.
        - Whatever ends a call (result, error, deadline, cancellation) gives its place back, and
          not before the call has ended on the cluster.
        - Messages of the errors raised hold no path and no stack trace.
    """

    def __init__(self, configs: Iterable[ToolConfig], cache_dir: Path | None = None) -> None:
        """Build the tools' schemas; nothing is started.

        Args:
            configs: Settings of every tool of the pool.
            cache_dir: Where tools keep what is slow to build, unless their settings say.
        """
        self._cache_dir = cache_dir
        self._entries: dict[str, Entry] = {}
        self._kept_warm: frozenset[str] = frozenset()
        for entry in self._take(configs):
            entry.read()
        self._keep_warm: asyncio.Task[None] | None = None
        self._endings: set[asyncio.Task[None]] = set()

    def use(self, configs: Iterable[ToolConfig]) -> None:
        """Take over a changed pool.

        Args:
            configs: Settings of every tool of it. A tool that is not among them stays callable, for
                the requests that chose it before, and is not kept warm. One that cannot be made is
                logged and left out: its calls fail.

        Where reading a tool's functions takes time, a thread does it; `ready` waits for that.
        """
        for entry in self._take(configs):
            if entry.tool.reads_functions:
                entry.reading = asyncio.create_task(entry.read_aside())
            else:
                entry.read()

    def _take(self, configs: Iterable[ToolConfig]) -> list[Entry]:
        """Make what is new; the functions of these are still to be read."""
        made = []
        settings = {config.tool_id: _with_cache_dir(config, self._cache_dir) for config in configs}
        for tool_id, config in settings.items():
            held = self._entries.get(tool_id)
            if held is None or held.config != config:
                self._entries.pop(tool_id, None)
                try:
                    self._entries[tool_id] = entry_of(config)
                    made.append(self._entries[tool_id])
                except ConfigError as error:
                    logger.error("a tool is left out: %s", error.message)
        self._kept_warm = frozenset(
            tool_id
            for tool_id, config in settings.items()
            if tool_id in self._entries and not isinstance(config, ToolsetConfig)
        )
        return made

    def __contains__(self, tool_id: str) -> bool:
        """Whether the pool has this tool."""
        return tool_id in self._entries

    def functions(self, tool_id: str) -> tuple[Function, ...]:
        """What a tool offers a model; nothing where it is a server that does not answer now.

        Args:
            tool_id: Its name.

        Returns:
            Those of a toolset are its members'; at least one.

        Raises:
            ToolFailed: If the pool has no such tool, it has no function, or it cannot tell.
        """
        entry = self._entry(tool_id)
        if entry.broken:
            raise ToolFailed(entry.broken)
        if not isinstance(entry.config, ToolsetConfig):
            return entry.functions
        return tuple(function for _, function in self._members_of(entry.config).values())

    def owner(self, tool_id: str, function: str) -> Tool:
        """The tool that a call goes to: of a toolset the member that has the function.

        Args:
            tool_id: The tool that was offered.
            function: One of its functions.

        Raises:
            ToolFailed: If the pool has no such tool.
        """
        return self._owner(tool_id, function).tool

    async def ready(self, tool_id: str, deadline_s: float) -> None:
        """Know a tool's functions: a server's, and those that are read from a file, take time.

        Args:
            tool_id: Its name.
            deadline_s: Seconds the caller can wait.

        Raises:
            ToolFailed: If the pool has no such tool, or its server offers nothing now.
            ToolTimeout: If its functions are not read in time.
        """
        entry = self._entry(tool_id)
        config = entry.config
        names = config.members if isinstance(config, ToolsetConfig) else (tool_id,)
        needed = [needed for name in names if (needed := self._entries.get(name))]
        servers = [server for server in needed if server.session and not server.functions]
        for server in servers:
            if server.warming is None and server.session is not None:
                server.warming = asyncio.create_task(self._ask_server(server, server.session))
        waited = [server.warming for server in servers if server.warming]
        waited += [one.reading for one in needed if one.reading and not one.is_read]
        if not waited:
            return
        await asyncio.wait(waited, timeout=deadline_s)
        if not entry.is_read:
            raise ToolTimeout(f"tool {tool_id!r} is still being read")
        if entry.session is not None and not entry.functions:
            raise ToolFailed(f"the server of the tool {tool_id!r} offers no function now")

    def tool(self, tool_id: str) -> Tool:
        """The tool's description and settings.

        Args:
            tool_id: Its name.

        Returns:
            The tool; its `run` is not for this process.

        Raises:
            ToolFailed: If the pool has no such tool.
        """
        return self._entry(tool_id).tool

    def load(self) -> dict[str, dict[str, int]]:
        """Calls running and waiting by tool, for metrics and `atlas status`."""
        return {
            tool_id: {"running": entry.running, "waiting": entry.waiting}
            for tool_id, entry in self._entries.items()
        }

    async def start(self, *, keep_warm: bool = True) -> None:
        """Load what first calls would wait for, and keep a worker alive that has it.

        Tools without a worker of their own share one.

        A tool that cannot be warmed is logged and left cold: its calls say what is wrong. One that
        takes longer than `START_TIMEOUT_S` is logged too, and gets ready in the background.

        Args:
            keep_warm: Whether to go on asking, so that Ray does not end idle workers.
        """
        await self._warm_all()
        for tool_id, entry in self._entries.items():
            if entry.warming is not None:
                logger.warning(
                    "tool %s: not warm after %.0f s; its first calls wait for it",
                    tool_id,
                    START_TIMEOUT_S,
                )
        if keep_warm and self._keep_warm is None:
            self._keep_warm = asyncio.create_task(self._warm_forever())

    def close(self) -> None:
        """Stop keeping workers warm; running calls end by themselves."""
        task, self._keep_warm = self._keep_warm, None
        if task is not None:
            task.cancel()
        for entry in self._entries.values():
            for under_way in (entry.warming, entry.reading):
                if under_way is not None:
                    under_way.cancel()

    def check(self, tool_id: str, arguments: Any, function: str | None = None) -> None:
        """Refuse a call that `run` would refuse at once.

        Args:
            tool_id: The tool.
            arguments: As the model wrote them, parsed from JSON.
            function: Which of its functions; `None`: the one that has the tool's name.

        Raises:
            ToolRetry: If the arguments do not fit the schema.
            ToolFailed: If there is no such tool or function.
        """
        called = function or tool_id
        _check(self._owner(tool_id, called), called, arguments)

    async def run(
        self, tool_id: str, arguments: Any, *, deadline_s: float, function: str | None = None
    ) -> ToolResult:
        """Run one call.

        Args:
            tool_id: The tool.
            arguments: As the model wrote them, parsed from JSON.
            deadline_s: Seconds the caller can wait, in the queue, for a worker and for the result;
                the tool's own `timeout_s` bounds the run.
            function: Which of its functions; `None`: the one that has the tool's name.

        Returns:
            The result, with its seconds and price.

        Raises:
            ToolRetry: If the arguments do not fit the schema, or others could succeed.
            ToolTimeout: If it did not finish in time.
            ToolWorkerDied: If its worker died.
            ToolFailed: If there is no such tool, it is busy, or it failed.
        """
        begin = time.monotonic()
        called = function or tool_id
        await self.ready(tool_id, deadline_s)
        entry = self._owner(tool_id, called)
        _check(entry, called, arguments)
        await self._take_place(entry, deadline_s - (time.monotonic() - begin))
        left_s = deadline_s - (time.monotonic() - begin)
        result = await self._dispatch(entry, called, arguments, left_s)
        return replace(
            result,
            seconds=time.monotonic() - begin,
            cost_usd=entry.config.price_usd_per_call,
        )

    def _entry(self, tool_id: str) -> Entry:
        try:
            return self._entries[tool_id]
        except KeyError:
            raise ToolFailed(f"no tool {tool_id!r}; tools: {sorted(self._entries)}") from None

    def _owner(self, tool_id: str, function: str) -> Entry:
        entry = self._entry(tool_id)
        if isinstance(entry.config, ToolsetConfig):
            members = self._members_of(entry.config)
            if function in members:
                return self._entry(members[function][0])
        return entry

    def _members_of(self, config: ToolsetConfig) -> dict[str, tuple[str, Function]]:
        """By name, each function of a toolset with the member that has it.

        A member that cannot be made, or cannot tell its functions, is left out.

        Raises:
            ToolFailed: If none is left, or two functions have one name.
        """
        there = [name for name in config.members if self._can_tell(name)]
        if not there:
            raise ToolFailed(f"toolset {config.tool_id!r} has no member that can be called")
        try:
            functions = {name: self.functions(name) for name in there}
            return functions_by_owner(config.tool_id, functions)
        except ConfigError as error:
            raise ToolFailed(error.message) from None

    def _can_tell(self, tool_id: str) -> bool:
        """Whether a tool is there, and its functions are known."""
        entry = self._entries.get(tool_id)
        return (
            entry is not None
            and not entry.broken
            and entry.is_read
            and (entry.session is None or bool(entry.functions))
        )

    async def _take_place(self, entry: Entry, deadline_s: float) -> None:
        """Wait for one of the tool's places, within bounds."""
        if entry.places.locked() and entry.waiting >= entry.config.max_queued:
            raise ToolFailed(f"tool {entry.tool.tool_id!r} is busy")
        entry.waiting += 1
        try:
            async with asyncio.timeout(deadline_s):
                await entry.places.acquire()
        except TimeoutError:
            raise ToolTimeout(f"tool {entry.tool.tool_id!r} is busy: no place in time") from None
        finally:
            entry.waiting -= 1
        entry.running += 1

    async def _dispatch(
        self, entry: Entry, function: str, arguments: Any, deadline_s: float
    ) -> ToolResult:
        """Run the task and give the place back, now or when a cancelled task has ended.

        The task bounds its own run; a worker that has to start first is waited for.
        """
        name, run_s = entry.tool.tool_id, min(deadline_s, entry.config.timeout_s)
        deadline_s = min(deadline_s, run_s + START_S)
        if deadline_s <= 0:
            entry.leave()
            raise ToolTimeout(f"tool {name!r} had no time left")
        begin = time.monotonic()
        reference = entry.begin(function, arguments, run_s)
        ending: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(deadline_s + CANCEL_AFTER_S):
                result: ToolResult = await reference
        except TimeoutError:
            ending = asyncio.create_task(_end(entry, reference))
            raise ToolTimeout(f"tool {name!r} did not finish in {deadline_s:.3g} s") from None
        except asyncio.CancelledError:
            ending = asyncio.create_task(_end(entry, reference))
            raise
        except ray.exceptions.RayTaskError as error:
            raise _unwrap(error, name) from None
        except ray.exceptions.RayError as error:
            seconds = time.monotonic() - begin
            logger.warning("tool %s: %s after %.3f s", name, type(error).__name__, seconds)
            if entry.session is not None and isinstance(error, ray.exceptions.ActorDiedError):
                entry.session.forget()
            # It happens when Ray ends an idle worker just as it is given work.
            raise ToolWorkerDied(f"tool {name!r} failed: its worker stopped") from None
        finally:
            if ending is None:
                entry.leave()
            else:
                # Somebody must hold on to the task: the event loop itself does not.
                self._endings.add(ending)
                ending.add_done_callback(self._endings.discard)
        return result

    async def _warm_forever(self) -> None:
        while True:
            await asyncio.sleep(KEEP_WARM_S)
            await self._warm_all()

    async def _warm_all(self) -> None:
        entries = [
            self._entries[tool_id]
            for tool_id in sorted(self._kept_warm)
            if self._entries[tool_id].tool.kind != "none"
        ]
        due: dict[str, list[Entry]] = {}
        for entry in entries:
            if entry.warming is not None or entry.tool.kind == "sampling":
                continue
            if entry.session is not None:  # its functions may change
                entry.warming = asyncio.create_task(self._ask_server(entry, entry.session))
            elif entry.running == 0:
                worker = entry.tool.tool_id if entry.config.dedicated_worker else ""
                due.setdefault(worker, []).append(entry)
        for group in due.values():
            warming = asyncio.create_task(self._warm(group))
            for entry in group:
                entry.warming = warming
        under_way = {entry.warming for entry in entries if entry.warming is not None}
        if under_way:
            await asyncio.wait(under_way, timeout=START_TIMEOUT_S)

    async def _warm(self, entries: list[Entry]) -> None:
        """Warm tools that share a worker."""
        try:
            said = await entries[0].warm.remote([entry.config_json for entry in entries])
        except ray.exceptions.RayError as error:
            said = [type(error).__name__] * len(entries)
        finally:
            for entry in entries:
                entry.warming = None
        for entry, what in zip(entries, said, strict=True):
            if what:
                logger.warning("tool %s: not warm: %s", entry.tool.tool_id, what)

    async def _ask_server(self, entry: Entry, session: SessionHandle) -> None:
        """Learn what an MCP server offers now."""
        try:
            entry.offer(await session.functions())
        except (ray.exceptions.RayError, ToolFailed, ToolRetry) as error:
            logger.warning("tool %s: not warm: %s", entry.tool.tool_id, type(error).__name__)
            entry.offer(())
        finally:
            entry.warming = None


def _with_cache_dir(config: ToolConfig, cache_dir: Path | None) -> ToolConfig:
    if isinstance(config, RetrievalConfig) and config.cache_dir is None:
        return config.model_copy(update={"cache_dir": cache_dir})
    return config


def _check(entry: Entry, function: str, arguments: Any) -> None:
    """Refuse arguments that do not fit the schema, saying what to change."""
    if entry.tool.kind in ("none", "sampling"):
        raise ToolFailed(f"tool {entry.tool.tool_id!r} cannot be called")
    if function not in entry.checks:
        raise ToolFailed(f"tool {entry.tool.tool_id!r} has no function {function!r}")
    entry.checks[function].check(arguments)


async def _end(entry: Entry, reference: Any) -> None:
    """End a task nobody waits for any more, then give its place back."""
    try:
        for force in (False, True):
            with contextlib.suppress(ray.exceptions.RayError, ValueError):
                ray.cancel(reference, force=force)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FORCE_AFTER_S):
                    await reference
                return
    except ray.exceptions.RayError:
        return
    finally:
        entry.leave()


def _unwrap(error: ray.exceptions.RayTaskError, name: str) -> ToolRetry | ToolFailed:
    """The tool's own error out of Ray's wrapper, which carries the worker's stack trace."""
    cause = error.cause
    if isinstance(cause, ToolRetry | ToolFailed):
        return type(cause)(*cause.args)
    logger.error("tool %s: unexpected %s", name, type(cause).__name__)
    return ToolFailed(f"tool {name!r} failed")
