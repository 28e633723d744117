"""Runs untrusted Python in a sandbox: no network, no foreign files, no processes, all bounded.

A run may be given files and folders of ours to read; it can write none of them, and links in them
lead nowhere else.

Each process that runs tools keeps one warm sandbox server per set of packages (`sandbox.server`),
which forks a confined child per run. There is no unconfined way: where Landlock, seccomp or
sandlock is missing, or the server's own probe gets out, every call fails with `ToolFailed`.

Where the kernel lets the server mount (as root with CAP_SYS_ADMIN, or in a user namespace), a run
has a root folder of its own (`sandbox.root`): the kernel bounds its files, and nothing else can be
looked at but the runtime's files, the size of the disk they are on, and what `uname` and `sysinfo`
say. Elsewhere its files are counted, not exactly (`sandbox.run`), and it can ask whether a file is
there, its size and its times, and where a link leads, as far as its user may, but open nothing:
Landlock does not cover these questions, and seccomp cannot see which file they are about.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from serve_app.errors import ToolFailed
from serve_app.tools.sandbox.process import START_TIMEOUT_S, ServerProcess

logger = logging.getLogger(__name__)

GRACE_S = 1.0
"""How long after the deadline the server may take to answer before it is killed with its child."""

Verdict = Literal["", "deadline", "output", "files", "disk", "threads", "uncounted"]


@dataclass(frozen=True)
class SandboxLimits:
    """What one run may use."""

    memory_mb: int = 256
    """Address space the code may add, in MiB."""

    cpu_seconds: int = 5
    """CPU time, all threads together."""

    max_threads: int = 16
    """Threads of the one process; it can start no other process."""

    max_output_bytes: int = 16384
    """Bytes kept of stdout and of stderr, each; a run that writes more is stopped."""

    max_file_bytes: int = 8 << 20
    """Size of one file."""

    max_disk_bytes: int = 32 << 20
    """Size of all files together."""

    max_files: int = 256
    """Files and folders at once."""

    max_open_files: int = 64
    """File descriptors."""


@dataclass(frozen=True)
class SandboxResult:
    """How a run ended."""

    stdout: str
    stderr: str
    exit_code: int
    """As `subprocess` has it: negative for a signal."""

    stopped_by: Verdict
    """The limit that stopped the run; empty when it ended by itself."""

    seconds: float

    @property
    def timed_out(self) -> bool:
        """Whether the deadline or the CPU limit ended the run."""
        return self.stopped_by == "deadline" or self.exit_code == -24

    @property
    def truncated(self) -> bool:
        """Whether output was cut."""
        return self.stopped_by == "output"

    @property
    def ok(self) -> bool:
        """Whether the code ran to its end without an error."""
        return self.exit_code == 0 and not self.stopped_by


class SandboxServer:
    """A warm server process and the connection to it; one run at a time, shared by threads."""

    def __init__(self, packages: tuple[str, ...] = (), module: str = "") -> None:
        """Prepare; the process starts with the first run.

        Args:
            packages: Importable packages beyond the standard library.
            module: A Python file of ours that runs can import by its name; loaded once, before the
                forks, so that they need not read it. Empty: none.
        """
        self._packages = packages
        self._module = module
        self._lock = threading.Lock()
        self._process: ServerProcess | None = None

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return self._process.pid if self._process is not None else None

    @property
    def base(self) -> str:
        """The server's folder, which holds the folders of its runs; empty before the start."""
        return self._process.base if self._process is not None else ""

    @property
    def private_root(self) -> bool:
        """Whether runs have a root folder of their own; else their files are counted."""
        return self._process is not None and self._process.private_root

    def start(self) -> None:
        """Start the server unless it runs; takes at most `START_TIMEOUT_S`, other runs included.

        Raises:
            ToolFailed: If confinement is not available here, or the time was not enough.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        with self._turn(deadline):
            if self._ensure_started(deadline) is None:
                raise ToolFailed("the sandbox is still starting")

    def run(
        self,
        code: str,
        limits: SandboxLimits,
        deadline_s: float,
        readable: Sequence[str] = (),
    ) -> SandboxResult:
        """Run code in a fresh confined child.

        Args:
            code: Python source.
            limits: What it may use.
            deadline_s: Seconds until it is killed, all together: waiting for this server's other
                runs, the server's start if it does not run, and the code. The answer comes at most
                `GRACE_S` later.
            readable: Absolute paths, without links, of files and folders that this run may read
                besides. `sys.argv[1:]` says where it sees them; one that is missing is left out.
                The user that runs the code (another than root, where the server is root) must be
                allowed to read them.

        Returns:
            How it ended.

        Raises:
            ToolFailed: If it could not be run confined, or not in time. It was then not run at all,
                or its server stopped.
        """
        begin = time.monotonic()
        request = {
            "code": code,
            "has_tests": False,
            "limits": asdict(limits),
            "readable": list(readable),
        }
        reply = self._ask(request, [], begin + deadline_s)
        return SandboxResult(
            stdout=reply["stdout"],
            stderr=reply["stderr"],
            exit_code=reply["exit_code"],
            stopped_by=reply["verdict"],
            seconds=time.monotonic() - begin,
        )

    def passes(
        self, code: str, tests: Sequence[str], limits: SandboxLimits, deadline_s: float
    ) -> bool:
        """Run tests on code, each in a fresh confined child; the code cannot see the tests.

        Args:
            code: Python source that defines functions.
            tests: Python source that calls these by name, with plain data (`sandbox.calls`).
            limits: What each child may use.
            deadline_s: As for `run`.

        Returns:
            Whether all tests ran to their end and neither child broke a limit.

        Raises:
            ToolFailed: As for `run`.
        """
        request = {"code": code, "has_tests": True, "limits": asdict(limits)}
        deadline = time.monotonic() + deadline_s
        reply = self._ask(request, [{"tests": list(tests)}], deadline)
        return bool(reply["passed"]) and not reply["verdict"]

    def close(self) -> None:
        """Stop the server and whatever it runs; a later run starts a new one."""
        with self._lock:
            self._stop()

    @contextmanager
    def _turn(self, deadline: float) -> Iterator[None]:
        """Wait for this thread's turn."""
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise ToolFailed("the sandbox is busy")
        try:
            yield
        finally:
            self._lock.release()

    def _ask(
        self, request: dict[str, Any], more: list[dict[str, Any]], deadline: float
    ) -> dict[str, Any]:
        with self._turn(deadline):
            process = self._ensure_started(deadline)
            left_s = deadline - time.monotonic()
            if process is None or left_s <= 0:
                raise ToolFailed("the sandbox is still starting")
            try:
                messages = [request | {"deadline_s": left_s}, *more]
                reply = process.exchange(messages, deadline + GRACE_S)
            except BaseException:
                # Also on an interrupt from outside: a half-read reply would answer the next run.
                self._stop()
                raise
        if reply["verdict"] == "unconfined":
            logger.error("sandbox: %s", reply["detail"])
            raise ToolFailed("the sandbox is not available: the code could not be confined")
        return reply

    def _ensure_started(self, deadline: float) -> ServerProcess | None:
        """The running server; `None` if it is still starting at the deadline, and goes on to."""
        try:
            if self._process is None or not self._process.alive:
                self._stop()
                self._process = ServerProcess(self._packages, asdict(SandboxLimits()), self._module)
            return self._process if self._process.wait_ready(deadline) else None
        except BaseException:
            self._stop()
            raise

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.stop()


_servers: dict[tuple[int, tuple[str, ...], str], SandboxServer] = {}
_servers_lock = threading.Lock()


def sandbox_server(packages: tuple[str, ...] = (), module: str = "") -> SandboxServer:
    """This process's sandbox server for a set of packages.

    Args:
        packages: Importable packages beyond the standard library.
        module: As in `SandboxServer`.

    Returns:
        The server, shared by all callers of this process.
    """
    # By process id: a forked copy of this process must not share the connection.
    key = (os.getpid(), packages, module)
    with _servers_lock:
        if key not in _servers:
            _servers[key] = SandboxServer(packages, module)
            atexit.register(_servers[key].close)
        return _servers[key]


def run_python(
    code: str,
    limits: SandboxLimits,
    deadline_s: float,
    packages: tuple[str, ...] = (),
) -> SandboxResult:
    """Run Python code in the sandbox.

    Args:
        code: Python source; its last expression is shown if nothing was printed.
        limits: What it may use.
        deadline_s: Seconds until it is killed.
        packages: Importable packages beyond the standard library.

    Returns:
        How it ended.

    Raises:
        ToolFailed: If it could not be run confined. It was then not run at all.
    """
    return sandbox_server(packages).run(code, limits, deadline_s)
