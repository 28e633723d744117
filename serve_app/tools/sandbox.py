"""Runs untrusted Python in a sandbox: no network, no foreign files, no processes, all bounded.

Each process that runs tools keeps one warm sandbox server per set of packages (`sandbox_server`),
which forks a confined child per run. There is no unconfined way: where Landlock, seccomp or
sandlock is missing, or the server's own probe gets out, every call fails with `ToolFailed`.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import importlib.util
import json
import logging
import os
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from serve_app.errors import ToolFailed

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0
"""Longest start of a sandbox server; packages may be slow to import."""
GRACE_S = 1.0
"""How long after the deadline the server may take to answer before it is killed with its child."""
CANCEL_POLL_S = 0.05
"""How often a wait for the server looks up, so that a cancelled call ends soon."""
MAX_REPLY_BYTES = 64 << 20
BASE_PREFIX = "atlas-sandbox-"
STALE_AFTER_S = 60.0
"""Age from which a folder that nobody holds is taken for left over, not for just made."""

Verdict = Literal["", "deadline", "output", "files", "disk", "threads", "unconfined", "abandoned"]


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

    def __init__(self, packages: tuple[str, ...] = ()) -> None:
        """Prepare; the process starts with the first run.

        Args:
            packages: Importable packages beyond the standard library.
        """
        self._packages = packages
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._base = ""

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return self._process.pid if self._process is not None else None

    @property
    def base(self) -> str:
        """The server's folder, which holds the folders of its runs; empty before the start."""
        return self._base

    def start(self) -> None:
        """Start the server unless it runs.

        Raises:
            ToolFailed: If confinement is not available here.
        """
        with self._lock:
            self._ensure_started()

    def run(self, code: str, limits: SandboxLimits, deadline_s: float) -> SandboxResult:
        """Run code in a fresh confined child.

        Args:
            code: Python source.
            limits: What it may use.
            deadline_s: Seconds until it is killed; waiting for this server's other runs counts.

        Returns:
            How it ended.

        Raises:
            ToolFailed: If it could not be run confined. It was then not run at all.
        """
        begin = time.monotonic()
        if not self._lock.acquire(timeout=max(0.0, deadline_s)):
            raise ToolFailed("the sandbox is busy")
        try:
            self._ensure_started()
            request = {"code": code, "limits": asdict(limits), "deadline_s": deadline_s}
            reply = self._exchange(request, deadline_s + GRACE_S)
        except BaseException:
            # Also on an interrupt from outside: a half-read reply would answer the next run.
            self._stop()
            raise
        finally:
            self._lock.release()
        if reply["verdict"] in ("unconfined", "abandoned"):
            logger.error("sandbox: %s", reply["detail"])
            raise ToolFailed("the sandbox is not available: the code could not be confined")
        return SandboxResult(
            stdout=reply["stdout"],
            stderr=reply["stderr"],
            exit_code=reply["exit_code"],
            stopped_by=reply["verdict"],
            seconds=time.monotonic() - begin,
        )

    def close(self) -> None:
        """Stop the server and whatever it runs; a later run starts a new one."""
        with self._lock:
            self._stop()

    def _ensure_started(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._stop()
        self._base, lock = _make_base()
        # Where this interpreter finds its shared libraries, if somebody had to tell it.
        loader = {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-B",
                "-P",
                "-s",
                "-S",
                str(Path(__file__).with_name("sandbox_server.py")),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._base,
            # Hashes are fixed so that the same code prints the same; nothing of ours is passed on.
            env={"HOME": self._base, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **loader},
            start_new_session=True,
            pass_fds=(lock,),
        )
        os.close(lock)
        hello = {
            "site": _site_folders(("sandlock", *self._packages)),
            "packages": self._packages,
            "base": self._base,
            "limits": asdict(SandboxLimits()),
        }
        try:
            reply = self._exchange(hello, START_TIMEOUT_S)
        except BaseException:
            self._stop()
            raise
        if not reply["ready"]:
            self._stop()
            logger.error("sandbox: %s", reply["reason"])
            raise ToolFailed(
                "the sandbox is not available on this machine; code is not run without it"
            )

    def _exchange(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise ToolFailed("the sandbox has stopped")
        body = json.dumps(message).encode()
        try:
            process.stdin.write(struct.pack("!I", len(body)) + body)
            process.stdin.flush()
        except OSError:
            raise ToolFailed("the sandbox has stopped") from None
        deadline = time.monotonic() + timeout_s
        descriptor = process.stdout.fileno()
        size = struct.unpack("!I", _read(descriptor, 4, deadline))[0]
        if size > MAX_REPLY_BYTES:
            raise ToolFailed("the sandbox gave no valid answer")
        return dict(json.loads(_read(descriptor, size, deadline)))

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            # The child dies with its parent: the kernel sends it the same signal.
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        if self._base:
            shutil.rmtree(self._base, ignore_errors=True)
            self._base = ""


def _make_base() -> tuple[str, int]:
    """A new folder for a server, and a locked descriptor of it that the server inherits.

    Folders whose lock nobody holds are left over from servers that were killed; they are removed.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{BASE_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.geteuid() and _age_s(folder) > STALE_AFTER_S:
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(descriptor)
    base = tempfile.mkdtemp(prefix=BASE_PREFIX)
    lock = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return base, lock


def _age_s(folder: Path) -> float:
    return time.time() - folder.stat().st_mtime


def _read(descriptor: int, size: int, deadline: float) -> bytes:
    data = b""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    while len(data) < size:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise ToolFailed("the sandbox did not answer in time")
        # In slices: a cancelled Ray task learns of it between two system calls, not in one.
        if not poller.poll(min(left_s, CANCEL_POLL_S) * 1000):
            continue
        part = os.read(descriptor, size - len(data))
        if not part:
            raise ToolFailed("the sandbox has stopped")
        data += part
    return data


def _site_folders(packages: tuple[str, ...]) -> list[str]:
    """The folders that hold these packages, found without importing them."""
    folders = []
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ToolFailed(f"the sandbox is not available: package {name!r} is not installed")
        origin = Path(spec.origin)
        is_package = spec.submodule_search_locations is not None
        folders.append(str(origin.parent.parent if is_package else origin.parent))
    return list(dict.fromkeys(folders))


_servers: dict[tuple[int, tuple[str, ...]], SandboxServer] = {}
_servers_lock = threading.Lock()


def sandbox_server(packages: tuple[str, ...] = ()) -> SandboxServer:
    """This process's sandbox server for a set of packages.

    Args:
        packages: Importable packages beyond the standard library.

    Returns:
        The server, shared by all callers of this process.
    """
    # By process id: a forked copy of this process must not share the connection.
    key = (os.getpid(), packages)
    with _servers_lock:
        if key not in _servers:
            _servers[key] = SandboxServer(packages)
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
