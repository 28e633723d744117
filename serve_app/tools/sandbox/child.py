"""What happens in the forked process of one run: confinement first, then the code that was sent.

Standard library and sandlock only; `sandbox.server` loads this file by its path. In this order the
process loses: inherited descriptors, unbounded resources, the rest of the file system (by a root of
its own, where the server has one), the root user (where the server is it) and every capability,
files (Landlock, by sandlock), system calls (seccomp). It can start no other process.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import fcntl
import io
import linecache
import os
import resource
import signal
import struct
import sys
import threading
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from serve_app.tools.sandbox import calls, policy
    from serve_app.tools.sandbox import root as private_root
else:
    # Put there by the server: importing them as parts of the package would import the package.
    import sandbox_calls as calls
    import sandbox_policy as policy
    import sandbox_root as private_root

SOURCE_NAME = "<python>"
CONFINED = b"confined"
"""What the child says on its status pipe before it runs anything."""
PASSED = b", passed"
"""What the child that runs tests says after the last one."""

Role = Literal["probe", "program", "candidate", "tests"]
"""What a child is for: proving the walls, one program, code under test, or the tests of it."""

_STATUS, _READS, _WRITES = 3, 4, 5
_PR_SET_PDEATHSIG = 1
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


class ConfinementError(Exception):
    """The child could not be confined; nothing was run."""


@dataclass(frozen=True)
class Plan:
    """How children are confined: all but `shown` is the same for every run of this server."""

    base: str
    """The server's own folder; each run gets one inside it."""
    readable: tuple[str, ...]
    """Folders and files a child may read."""
    run_uid: int | None
    """User id a child changes to; `None` keeps the server's."""
    has_private_root: bool
    """Whether `base` is a root folder for children; else each gets a folder in it."""
    shown: tuple[str, ...] = ()
    """Files and folders that a single run may read besides, by their paths outside."""

    @property
    def uid(self) -> int:
        """The user a child runs as."""
        return os.geteuid() if self.run_uid is None else self.run_uid


def _set_limits(limits: dict[str, Any], run_uid: int | None) -> None:
    with open("/proc/self/statm", encoding="ascii") as statm:
        in_use = int(statm.read().split()[0]) * resource.getpagesize()
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as f:
        f.write("1000")
    caps = {
        resource.RLIMIT_AS: in_use + limits["memory_mb"] * (1 << 20),
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_FSIZE: limits["max_file_bytes"],
        resource.RLIMIT_NOFILE: limits["max_open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if run_uid is not None:
        # Counted for each user id: exact only because nobody else has this one.
        caps[resource.RLIMIT_NPROC] = limits["max_threads"]
    for name, value in caps.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # A second more for the CPU's hard limit, whose signal would hide which limit it was.
        spare = int(name == resource.RLIMIT_CPU and value != hard)
        resource.setrlimit(name, (value, value + spare))


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends; at once if it has already."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def _drop_privileges(run_uid: int | None) -> None:
    """Become `run_uid`, without any capability."""
    if run_uid is not None:
        os.setgroups([])
        os.setresgid(run_uid, run_uid, run_uid)
        os.setresuid(run_uid, run_uid, run_uid)
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    if _libc.capset(header, bytes(24)) != 0:
        raise ConfinementError("capabilities cannot be dropped")


def _confine(plan: Plan, workdir: str, limits: dict[str, Any], parent_pid: int) -> list[str]:
    """Take everything away; the order matters, each step needs what the next one removes.

    Returns:
        Where the child sees what the plan shows it; a path that is missing is left out.
    """
    import sandlock

    os.setsid()
    os.umask(0o077)
    _set_limits(limits, plan.run_uid)
    shown = [path for path in plan.shown if os.path.exists(path)]
    if plan.has_private_root:
        shown = private_root.enter(plan.base, limits, plan.uid, shown)
    else:
        os.chdir(workdir)
    _drop_privileges(plan.run_uid)
    # After the change of user, which resets it.
    die_with(parent_pid)
    protection = sandlock.Protection
    sandlock.confine(
        sandlock.Sandbox(
            fs_readable=[*plan.readable, *shown],
            fs_writable=[workdir, "/dev/null"],
            # What an older kernel lacks of these, the system call filter refuses anyway.
            allow_degraded=[
                protection.NET_TCP,
                protection.FS_IOCTL_DEV,
                protection.SIGNAL_SCOPE,
                protection.ABSTRACT_UNIX_SOCKET_SCOPE,
            ],
        )
    )
    policy.install_seccomp()
    return shown


class _CountingFile(io.FileIO):
    """Standard output that knows whether anything was written to it."""

    written = 0

    def write(self, data: Any, /) -> int:
        self.written += len(data)
        return super().write(data)


def _report(error: BaseException) -> None:
    """Print an error as Python does, without the frames of files the caller does not know."""
    with contextlib.suppress(BaseException):
        seen = traceback.TracebackException.from_exception(error, limit=-50)
        chain: traceback.TracebackException | None = seen
        while chain is not None:
            chain.stack = traceback.StackSummary.from_list(
                [frame for frame in chain.stack if frame.filename == SOURCE_NAME]
            )
            chain = chain.__cause__ or chain.__context__
        sys.stderr.write("".join(seen.format()))


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code & 0xFF
    sys.stderr.write(f"{stop.code}\n")
    return 1


def _execute(code: str, stdout: _CountingFile, *, serves_calls: bool) -> int:
    """Run code as a fresh `__main__`; like a shell, show a last expression if nothing was shown."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    linecache.cache[SOURCE_NAME] = (len(code), None, code.splitlines(keepends=True), SOURCE_NAME)
    try:
        tree = ast.parse(code, SOURCE_NAME)
        last = None
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body.pop().value)  # type: ignore[attr-defined]
        exec(compile(tree, SOURCE_NAME, "exec"), module.__dict__)
        if last is not None:
            value = eval(compile(last, SOURCE_NAME, "eval"), module.__dict__)
            sys.stdout.flush()
            if value is not None and stdout.written == 0:
                sys.stdout.write(f"{value!r}\n")
        if serves_calls:
            calls.serve(module.__dict__, _READS, _WRITES)
        for thread in threading.enumerate():
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
    except SystemExit as stop:
        return _exit_code(stop)
    except BaseException as error:
        _report(error)
        return 1
    return 0


def _examine(tests: list[str]) -> int:
    """Run tests on the functions of the process at the other end of the two pipes."""
    try:
        if calls.examine(tests, _READS, _WRITES):
            os.write(_STATUS, PASSED)
    except BaseException as error:
        _report(error)
        return 1
    return 0


def _keep_only(descriptors: list[int]) -> None:
    """Make these the descriptors 0, 1, 2 and so on, and close all others."""
    # Out of the way first: one of them may have a number that another one gets.
    high = [fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, 100) for source in descriptors]
    for target, source in enumerate(high):
        os.dup2(source, target, inheritable=False)
    os.closerange(len(descriptors), 1 << 20)


def run_child(
    plan: Plan,
    workdir: str,
    role: Role,
    request: dict[str, Any],
    pipes: list[int],
    server: int,
) -> int:
    """Everything that happens in the forked process.

    Args:
        plan: How it is confined.
        workdir: Its folder.
        role: What it is for.
        request: `limits`, and `code` or `tests`.
        pipes: Descriptors of stdout, stderr and status; for code under test and its tests, also of
            the calls or results that it reads and those that it writes.
        server: The parent's process id.

    Returns:
        Its exit code.
    """
    _keep_only([os.open("/dev/null", os.O_RDONLY), *pipes])
    os.environ.clear()
    os.environ.update(HOME=workdir, TMPDIR=workdir, LANG="C.UTF-8", PATH="")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    try:
        shown = _confine(plan, workdir, request["limits"], server)
    except Exception as error:
        os.write(_STATUS, f"{type(error).__name__}: {error}".encode(errors="replace")[:500])
        return 1
    if role == "probe":
        os.write(_STATUS, _probe(plan).encode() or CONFINED)
        signal.pause()  # its parent still has to see that it can be counted, then kills it
    os.write(_STATUS, CONFINED)
    if role != "tests":
        os.close(_STATUS)
    raw = _CountingFile(1, "w")
    sys.stdin = io.TextIOWrapper(io.FileIO(0), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace")
    sys.stderr = io.TextIOWrapper(
        io.FileIO(2, "w"),
        "utf-8",
        "backslashreplace",
        write_through=True,
    )
    sys.argv = [SOURCE_NAME, *shown]
    sys.orig_argv[:] = ["python"]
    if role == "tests":
        code = _examine(request["tests"])
    else:
        code = _execute(request["code"], raw, serves_calls=role == "candidate")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    return code


def _probe(plan: Plan) -> str:
    """Try to get out; returns what succeeded, or nothing when the walls hold."""
    import socket

    def fork() -> None:
        if os.fork() == 0:
            os._exit(0)

    def look_outside() -> None:
        if plan.has_private_root:
            os.stat("/etc/passwd")
        else:
            raise OSError

    outside = os.path.join(plan.base, "probe")
    doors: dict[str, Callable[[], object]] = {
        "a foreign file was read": lambda: os.open("/etc/passwd", os.O_RDONLY),
        "a foreign file's size was read": look_outside,
        "the process table was read": lambda: os.open("/proc/self/environ", os.O_RDONLY),
        "a foreign file was written": lambda: os.open(outside, os.O_WRONLY | os.O_CREAT),
        "a TCP socket was made": lambda: socket.socket(socket.AF_INET),
        "a UNIX socket was made": lambda: socket.socket(socket.AF_UNIX),
        "a process was made": fork,
        "a program was started": lambda: os.execv(sys.executable, ["python", "-c", "0"]),
        "another process was signalled": lambda: os.kill(os.getppid(), 0),
    }
    for name, door in doors.items():
        with contextlib.suppress(OSError):
            door()
            return name
    try:
        with open("probe", "wb") as own:
            own.write(b"1")
        with open(os.__file__, "rb") as runtime:
            runtime.read(1)
    except OSError as error:
        return f"its own files are out of reach: {error.strerror}"
    return ""
