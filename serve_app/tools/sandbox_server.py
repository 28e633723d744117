"""The sandbox server: a small warm Python process that forks one confined child for each run.

Started by `serve_app.tools.sandbox`, which speaks to it over stdin and stdout in length-prefixed
JSON; end of input means its owner is gone: it kills the running child, removes its folder and
leaves. Standard library and sandlock only.

The server itself never reads a request: for each it forks a supervisor, which reads the request,
forks the confined child and answers. So no run can find another's code or output in its memory, and
there is no secret to find: the environment is empty from the start.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import select
import signal
import stat
import struct
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve_app.tools.sandbox_child import CONFINED, ConfinementError, Plan, die_with, run_child
else:
    # By file: importing them as parts of the package would import the package.
    for _name in ("sandbox_policy", "sandbox_child"):
        _spec = importlib.util.spec_from_file_location(
            _name, os.path.join(os.path.dirname(__file__), f"{_name}.py")
        )
        sys.modules[_name] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[_name])
    from sandbox_child import CONFINED, ConfinementError, Plan, die_with, run_child

PRELOADED = (
    *("bisect", "collections", "copy", "csv", "dataclasses", "datetime", "decimal", "enum"),
    *("encodings.ascii", "fractions", "functools", "heapq", "itertools", "json", "math"),
    *("operator", "random", "re", "socket", "statistics", "string", "textwrap", "time", "typing"),
)
SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo")
READABLE_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero")
POLL_S = 0.02
"""How often a running child's threads and files are counted."""
RUN_UID_BASE = 2_000_000_000


@dataclass
class Run:
    """One child and what is known about it."""

    pid: int
    pidfd: int
    workdir: str
    streams: dict[int, bytearray]
    """What was read from each of the child's pipes: stdout, stderr, status."""
    verdict: str = ""
    """Why the child was killed; empty while it was not."""
    open_pipes: set[int] = field(default_factory=set)


def _remove_tree(root: str) -> None:
    """Delete a folder whatever is in it: read-only, very deep, links to elsewhere.

    Nested folders are moved up to the root before they are emptied, so no path gets long and
    nothing recurses; links are removed, never followed.
    """
    counter = 0
    while True:
        try:
            names = os.listdir(root)
        except OSError:
            return
        if not names:
            break
        for name in names:
            path = os.path.join(root, name)
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                os.unlink(path)
                continue
            os.chmod(path, 0o700)
            for inner in os.listdir(path):
                source = os.path.join(path, inner)
                if stat.S_ISDIR(os.lstat(source).st_mode):
                    os.chmod(source, 0o700)
                    counter += 1
                    os.rename(source, os.path.join(root, f".{os.getpid()}-{counter}"))
                else:
                    os.unlink(source)
            os.rmdir(path)
    os.rmdir(root)


def _disk_use(root: str, max_files: int) -> tuple[int, int]:
    """Bytes and entries below a folder; stops counting once there are too many entries."""
    total, entries, pending = 0, 0, [root]
    while pending and entries <= max_files:
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as scan:
            for entry in scan:
                entries += 1
                if entries > max_files:
                    break
                with contextlib.suppress(OSError):
                    info = entry.stat(follow_symlinks=False)
                    total += info.st_blocks * 512
                    if stat.S_ISDIR(info.st_mode):
                        pending.append(entry.path)
    return total, entries


def _unlinked_bytes(pid: int) -> int:
    """Bytes of files the process holds open after deleting them."""
    total, folder = 0, f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                info = os.stat(os.path.join(folder, name))
                if stat.S_ISREG(info.st_mode) and info.st_nlink == 0:
                    total += info.st_blocks * 512
    return total


def _threads(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/stat", "rb") as f:
        return int(f.read().rpartition(b")")[2].split()[17])
    return 0


class Server:
    """Serves runs one after another until its owner closes the connection.

    Invariants:
        - At most one supervisor and one child at a time; each dies with its parent.
        - The memory a child is forked from has seen no request but its own.
    """

    def __init__(self, requests: int, replies: int) -> None:
        """Keep the two ends.

        Args:
            requests: Descriptor requests are read from.
            replies: Descriptor replies are written to.
        """
        self._requests = requests
        self._replies = replies
        self._plan = Plan("", (), None)

    def receive(self) -> dict[str, Any] | None:
        """The next message, or `None` when the owner is gone."""
        header = self._read(4)
        body = self._read(struct.unpack("!I", header)[0]) if header else None
        return None if body is None else dict(json.loads(body))

    def _read(self, size: int) -> bytes | None:
        data = b""
        while len(data) < size:
            part = os.read(self._requests, size - len(data))
            if not part:
                return None
            data += part
        return data

    def reply(self, message: dict[str, Any]) -> None:
        """Send one message."""
        body = json.dumps(message).encode()
        data = struct.pack("!I", len(body)) + body
        while data:
            data = data[os.write(self._replies, data) :]

    def start(self, hello: dict[str, Any]) -> None:
        """Load what children need, then prove that confinement works before promising it.

        Args:
            hello: `site` folders, `packages` to load and the `base` folder.

        Raises:
            ConfinementError: If no way of confining a child passes the probe.
        """
        folders = [folder for folder in hello["site"] if folder not in sys.path]
        sys.path.extend(folders)
        importlib.import_module("sandlock")
        roots = []
        for name in (*PRELOADED, *hello["packages"]):
            module = importlib.import_module(name)
            if name in hello["packages"]:
                roots += list(getattr(module, "__path__", None) or [module.__file__])
        sys.path[:] = [folder for folder in sys.path if folder not in folders]
        gc.collect()
        gc.freeze()
        base, readable = hello["base"], _readable(roots)
        os.chmod(base, 0o711)
        uids = [RUN_UID_BASE + os.getpid(), None] if os.geteuid() == 0 else [None]
        failures = []
        for uid in uids:
            self._plan = Plan(base, readable, uid)
            probe = {"code": "", "probe": True, "limits": hello["limits"]}
            try:
                result = self.run(probe, deadline_s=10)
            except OSError as error:  # a root that may not give files away, as in some containers
                failures.append(str(error))
                continue
            if result["verdict"] == "":
                return
            failures.append(str(result["detail"]))
        raise ConfinementError(failures[-1])

    def serve(self) -> None:
        """Answer requests until the owner is gone."""
        poller = select.poll()
        poller.register(self._requests, select.POLLIN)
        while True:
            poller.poll()
            server = os.getpid()
            pid = os.fork()
            if pid == 0:
                code = 1
                with contextlib.suppress(BaseException):
                    code = self._supervise(server)
                os._exit(code)
            # Anything but a complete answer leaves the connection in an unknown state: stop.
            if os.waitpid(pid, 0)[1] != 0:
                return

    def _supervise(self, server_pid: int) -> int:
        """Read one request and answer it; 0 if another may follow."""
        die_with(server_pid)
        request = self.receive()
        if request is None:
            return 1
        result = self.run(request, request["deadline_s"])
        if result["verdict"] == "abandoned":
            return 1
        self.reply(result)
        return 0

    def run(self, request: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        """Fork a confined child, watch it, and say how it ended.

        Args:
            request: `code` and `limits`.
            deadline_s: Seconds until the child is killed.

        Returns:
            The reply: output, exit code, and the verdict when the child did not end by itself.
        """
        deadline = time.monotonic() + deadline_s
        workdir = os.path.join(self._plan.base, str(os.getpid()))
        os.mkdir(workdir, 0o700)
        try:
            if self._plan.run_uid is not None:
                os.chown(workdir, self._plan.run_uid, self._plan.run_uid)
            run = self._fork(workdir, request)
            try:
                self._watch(run, request["limits"], deadline)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(run.pidfd, signal.SIGKILL)
                status = os.waitpid(run.pid, 0)[1]
                os.close(run.pidfd)
                self._drain(run, request["limits"])
        finally:
            _remove_tree(workdir)
        stdout, stderr, confined = (bytes(data) for data in run.streams.values())
        if confined != CONFINED and not run.verdict:
            run.verdict = "unconfined"
        return {
            "stdout": stdout.decode(errors="replace"),
            "stderr": stderr.decode(errors="replace"),
            "exit_code": os.waitstatus_to_exitcode(status),
            "verdict": run.verdict,
            "detail": confined.decode(errors="replace") if run.verdict == "unconfined" else "",
        }

    def _fork(self, workdir: str, request: dict[str, Any]) -> Run:
        pipes = [os.pipe() for _ in range(3)]
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                code = run_child(
                    self._plan, workdir, request, [write for _, write in pipes], server
                )
            os._exit(code)
        for read, write in pipes:
            os.close(write)
            os.set_blocking(read, False)
        streams = {read: bytearray() for read, _ in pipes}
        return Run(pid, os.pidfd_open(pid), workdir, streams, open_pipes=set(streams))

    def _watch(self, run: Run, limits: dict[str, Any], deadline: float) -> None:
        """Read the child's output until it ends or breaks a limit; sets the verdict if it did."""
        poller = select.poll()
        for descriptor in (run.pidfd, *run.open_pipes):
            poller.register(descriptor, select.POLLIN)
        poller.register(self._requests, select.POLLHUP | select.POLLRDHUP)
        next_count = time.monotonic() + POLL_S
        while not run.verdict:
            now = time.monotonic()
            if now >= deadline:
                run.verdict = "deadline"
                return
            if now >= next_count:
                run.verdict = self._over_limit(run, limits)
                # Counting many files must not take all of a core.
                next_count = time.monotonic() + max(POLL_S, 5 * (time.monotonic() - now))
                continue
            wait_s = min(deadline, next_count) - now
            ready = {descriptor for descriptor, _ in poller.poll(wait_s * 1000 + 1)}
            if self._requests in ready:
                run.verdict = "abandoned"
            for descriptor in ready & run.open_pipes:
                if not self._take(run, descriptor, limits["max_output_bytes"]):
                    poller.unregister(descriptor)
                    run.open_pipes.discard(descriptor)
            if run.pidfd in ready:
                return

    def _take(self, run: Run, descriptor: int, limit: int) -> bool:
        """Read once from a pipe, keeping at most `limit` bytes; False at its end."""
        try:
            data = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return True
        kept = run.streams[descriptor]
        if len(kept) + len(data) > limit:
            run.verdict = run.verdict or "output"
        kept += data[: limit - len(kept)]
        return bool(data)

    def _drain(self, run: Run, limits: dict[str, Any]) -> None:
        """Take what the ended child left in its pipes, then close them."""
        for descriptor in run.streams:
            if descriptor in run.open_pipes:
                with contextlib.suppress(OSError):
                    for _ in range(64):
                        before = len(run.streams[descriptor])
                        self._take(run, descriptor, limits["max_output_bytes"])
                        if len(run.streams[descriptor]) == before:
                            break
            os.close(descriptor)

    def _over_limit(self, run: Run, limits: dict[str, Any]) -> str:
        used, entries = _disk_use(run.workdir, limits["max_files"])
        if entries > limits["max_files"]:
            return "files"
        if used + _unlinked_bytes(run.pid) > limits["max_disk_bytes"]:
            return "disk"
        if _threads(run.pid) > limits["max_threads"]:
            return "threads"
        return ""


def _readable(packages: list[str]) -> tuple[str, ...]:
    """What a child may read: system libraries, the standard library, the packages asked for.

    The standard library's folder is granted entry by entry, without third-party packages, so it
    cannot be listed from inside; its listing is therefore cached here, before the fork.
    """
    paths = [path for path in (*SYSTEM_LIBRARIES, *READABLE_FILES) if os.path.exists(path)]
    for key in ("stdlib", "platstdlib"):
        folder = sysconfig.get_path(key)
        for entry in os.scandir(folder) if os.path.isdir(folder) else ():
            if entry.name not in ("site-packages", "dist-packages"):
                paths.append(entry.path)
    for folder in sys.path:
        finder = sys.path_importer_cache.get(folder)
        fill = getattr(finder, "_fill_cache", None)
        if fill is not None:
            fill()
            finder._path_mtime = os.stat(folder).st_mtime  # type: ignore[union-attr]
    return tuple(dict.fromkeys(os.path.realpath(path) for path in (*paths, *packages)))


def main() -> None:
    """Say hello, then serve until the owner is gone."""
    server = Server(os.dup(0), os.dup(1))
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    hello = server.receive()
    if hello is None:
        return
    try:
        try:
            server.start(hello)
        except Exception as error:
            server.reply({"ready": False, "reason": f"{type(error).__name__}: {error}"})
            return
        server.reply({"ready": True})
        server.serve()
    finally:
        with contextlib.suppress(OSError):
            _remove_tree(hello["base"])


if __name__ == "__main__":
    main()
