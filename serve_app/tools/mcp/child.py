"""An MCP server as a child process: newline-delimited JSON-RPC over its standard streams.

Unlike the SDK's own transport it bounds a message's size, gives the child only the environment that
is named, skips what is no message, and leaves no process behind: the child ends with this process,
and its process group ends with the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import signal
import sys
from pathlib import Path
from types import TracebackType

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from mcp.client._transport import TransportStreams
from mcp.shared.message import SessionMessage
from mcp_types import jsonrpc_message_adapter

from serve_app.config.tools import McpConfig
from serve_app.errors import ToolFailed
from serve_app.tools.sandbox import policy

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 16 << 20
"""Longest message of a server; a longer one ends the connection."""
MAX_GARBAGE_LINES = 100
"""Lines of one connection that may be no message."""
_GRACE_S = 1.0
"""How long the child may take to end when its input is closed, and again after SIGTERM."""
_LOOK_S = 0.02
_LOOK_IDLE_S = 0.25
_TAIL_BYTES = 2000
_INHERITED = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/", "LANG": "C.UTF-8"}
"""What a child gets of our environment, and the value where we have none."""
_LAUNCH = str(Path(__file__).with_name("launch.py"))


class ChildLink:
    """One child and the streams to it; entered once.

    Invariants:
        - Once left, neither the child nor anything of its process group runs.
        - Writing never waits for the child: what it does not read is bounded.
    """

    def __init__(self, config: McpConfig, lost: asyncio.Event) -> None:
        """Prepare; the child starts on entry.

        Args:
            config: Has a command.
            lost: Set when the child can answer no more.
        """
        self._config = config
        self._lost = lost
        self.is_dead = False
        """Whether only a new child can answer."""
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._tail = b""

    @property
    def pid(self) -> int | None:
        """The child's process id."""
        return self._process.pid if self._process is not None else None

    async def __aenter__(self) -> TransportStreams:
        """Start the child.

        Raises:
            ToolFailed: If it cannot be started.
        """
        command = self._config.command
        assert command is not None
        environment = _environment(self._config)
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", _LAUNCH, _plan(self._config)),
                *(command, *self._config.args),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd=self._config.cwd or environment["HOME"],
                env=environment,
                start_new_session=True,
                limit=MAX_MESSAGE_BYTES,
            )
        except OSError as error:
            raise ToolFailed(f"the command cannot be started: {error.strerror}") from None
        self._process = process
        to_session, from_server = anyio.create_memory_object_stream[SessionMessage | Exception]()
        to_server, from_session = anyio.create_memory_object_stream[SessionMessage]()
        for work in (
            self._read(process, to_session),
            self._write(process, from_session),
            self._keep_tail(process),
            self._notice_the_end(process),
        ):
            self._tasks.append(asyncio.create_task(work))
        return from_server, to_server

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the child and its group."""
        process = self._process
        assert process is not None
        try:
            with anyio.CancelScope(shield=True):
                await self._end(process)
        finally:
            _signal_group(process, signal.SIGKILL)
            for task in self._tasks:
                task.cancel()
            process._transport.close()  # type: ignore[attr-defined]  # a descendant may hold a pipe

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        if process.stdin is not None:
            process.stdin.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            if await _has_ended(process, _GRACE_S):
                break
            _signal_group(process, number)
        await _has_ended(process, _GRACE_S)
        if process.returncode and self._tail:
            said = self._tail.decode(errors="replace").strip()
            logger.warning("tool %s: its server ended: %s", self._config.tool_id, said)

    async def _read(
        self,
        process: asyncio.subprocess.Process,
        to_session: MemoryObjectSendStream[SessionMessage | Exception],
    ) -> None:
        assert process.stdout is not None
        garbage = 0
        try:
            async with to_session:
                while garbage <= MAX_GARBAGE_LINES and (line := await process.stdout.readline()):
                    try:
                        message = jsonrpc_message_adapter.validate_json(line, by_name=False)
                    except ValueError:
                        garbage += bool(line.strip())
                        await asyncio.sleep(0)  # a flood of lines must not hold the loop
                        continue
                    await to_session.send(SessionMessage(message))
            logger.info("tool %s: its server closed, or talks garbage", self._config.tool_id)
        except ValueError:
            logger.warning(
                "tool %s: its server sent a message of more than %d bytes",
                self._config.tool_id,
                MAX_MESSAGE_BYTES,
            )
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError):
            pass
        finally:
            self._die()

    async def _write(
        self,
        process: asyncio.subprocess.Process,
        from_session: MemoryObjectReceiveStream[SessionMessage],
    ) -> None:
        assert process.stdin is not None
        async with from_session:
            async for sent in from_session:
                text = sent.message.model_dump_json(by_alias=True, exclude_unset=True)
                process.stdin.write(text.encode() + b"\n")
                if process.stdin.transport.get_write_buffer_size() > MAX_MESSAGE_BYTES:
                    logger.warning("tool %s: its server reads nothing", self._config.tool_id)
                    self._die()
                    return

    async def _keep_tail(self, process: asyncio.subprocess.Process) -> None:
        """Keep the end of what the child says on its standard error, for the log."""
        assert process.stderr is not None
        while part := await process.stderr.read(1 << 16):
            self._tail = (self._tail + part)[-_TAIL_BYTES:]

    def _die(self) -> None:
        self.is_dead = True
        self._lost.set()

    async def _notice_the_end(self, process: asyncio.subprocess.Process) -> None:
        """The child's end counts, even where a descendant of it keeps the streams open."""
        while process.returncode is None:
            await asyncio.sleep(_LOOK_IDLE_S)
        self._die()


def _plan(config: McpConfig) -> str:
    """What `launch.py` is to do before it becomes the command."""
    sandbox = None
    if config.sandbox is not None:
        spec = importlib.util.find_spec("sandlock")
        if spec is None or spec.origin is None:
            raise ToolFailed("the sandbox is not available: 'sandlock' is not installed")
        sandbox = config.sandbox.model_dump(mode="json")
        sandbox |= {"packages": [str(Path(spec.origin).parents[1])], "policy": policy.__file__}
    return json.dumps({"parent": os.getpid(), "sandbox": sandbox})


def _environment(config: McpConfig) -> dict[str, str]:
    """The child's whole environment; programs beside this Python are found after all others.

    Raises:
        ToolFailed: If a variable that holds a secret is not set.
    """
    inherited = {name: os.environ.get(name, value) for name, value in _INHERITED.items()}
    inherited["PATH"] += f"{os.pathsep}{Path(sys.executable).parent}"
    return inherited | config.env | secrets_of(config.env_from)


def secrets_of(names: dict[str, str]) -> dict[str, str]:
    """Values of environment variables.

    Args:
        names: What each value is for, to the variable that has it.

    Raises:
        ToolFailed: If a variable is not set.
    """
    for variable in names.values():
        if not os.environ.get(variable):
            raise ToolFailed(f"the environment variable {variable!r} is not set")
    return {name: os.environ[variable] for name, variable in names.items()}


def _signal_group(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


async def _has_ended(process: asyncio.subprocess.Process, timeout_s: float) -> bool:
    """Whether the child ends in time; descendants that keep its streams open do not matter."""
    try:
        async with asyncio.timeout(timeout_s):
            while process.returncode is None:
                await asyncio.sleep(_LOOK_S)
    except TimeoutError:
        return False
    return True
