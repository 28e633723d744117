"""The owner's end of a sandbox server: its process, its folder, and the messages to and fro.

Every wait has a deadline on the monotonic clock. Nothing is left behind: the folder goes with the
process, and what a killed owner left is removed by a later start on the machine. What takes long to
remove is removed by a thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import logging
import os
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from serve_app.errors import ToolFailed
from serve_app.tools.sandbox.files import remove_tree

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0
"""Longest start of a sandbox server; packages may be slow to import."""
CANCEL_POLL_S = 0.05
"""How often a wait for the server looks up, so that a cancelled call ends soon."""
REMOVE_S = 0.5
"""How long a stop waits for the removal of the folder, before it leaves that to a thread."""
END_S = 30.0
"""How long the thread tries, while processes of a killed server may still end."""
MAX_REPLY_BYTES = 64 << 20
BASE_PREFIX = "atlas-sandbox-"
STALE_AFTER_S = 60.0
"""Age from which a folder that nobody holds is taken for left over, not for just made."""


class ServerProcess:
    """One running sandbox server."""

    def __init__(self, packages: tuple[str, ...], limits: dict[str, Any], module: str = "") -> None:
        """Start it; `wait_ready` says when it is there.

        Args:
            packages: Importable packages beyond the standard library.
            limits: For the runs by which it proves itself.
            module: A Python file of ours that it loads beside them; empty: none.

        Raises:
            ToolFailed: If it cannot be started.
        """
        site = _site_folders(("sandlock", *packages))
        self.base, lock = _make_base()
        self.private_root = False
        self._started_at = time.monotonic()
        self._ready = False
        self._inbox = b""
        # Where this interpreter finds its shared libraries, if somebody had to tell it.
        loader = {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}
        script = str(Path(__file__).with_name("server.py"))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-B", "-P", "-s", "-S", script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=self.base,
                # Hashes are fixed so that the same code prints the same; nothing of ours is passed.
                env={"HOME": self.base, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **loader},
                start_new_session=True,
                pass_fds=(lock,),
            )
        except OSError as error:
            remove_tree(self.base)
            raise ToolFailed(f"the sandbox cannot be started: {error.strerror}") from None
        finally:
            os.close(lock)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests = self._process.stdin.fileno()
        self._replies = self._process.stdout.fileno()
        os.set_blocking(self._requests, False)
        self._hello: dict[str, Any] | None = {
            "site": site,
            "packages": packages,
            "base": self.base,
            "limits": limits,
            "module": module,
        }

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def wait_ready(self, deadline: float) -> bool:
        """Wait until it has proved that it confines what it runs.

        Args:
            deadline: Until when to wait.

        Returns:
            False if it is still starting at the deadline; another call may then wait further.

        Raises:
            ToolFailed: If confinement is not available here, or the start took too long.
        """
        if self._ready:
            return True
        last = self._started_at + START_TIMEOUT_S
        if self._hello is not None:
            hello, self._hello = self._hello, None
            self._send(hello, last)
        reply = self._receive(min(deadline, last))
        if reply is None:
            if time.monotonic() < last:
                return False
            raise ToolFailed("the sandbox did not start in time")
        if not reply["ready"]:
            logger.error("sandbox: %s", reply["reason"])
            raise ToolFailed(
                "the sandbox is not available on this machine; code is not run without it"
            )
        self._ready = True
        self.private_root = reply["private_root"]
        if not self.private_root:
            logger.warning("sandbox: no private root folder here; files are counted instead")
        return True

    def exchange(self, messages: list[dict[str, Any]], deadline: float) -> dict[str, Any]:
        """Send a request and wait for its reply.

        Args:
            messages: The request.
            deadline: Until when to wait.

        Raises:
            ToolFailed: If there is no valid reply in time; the process is then of no more use.
        """
        for message in messages:
            self._send(message, deadline)
        reply = self._receive(deadline)
        if reply is None:
            raise ToolFailed("the sandbox did not answer in time")
        return reply

    def stop(self) -> None:
        """Kill it with all that it runs, and remove its folder."""
        # The child dies with its parent: the kernel sends it the same signal.
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if not remove_tree(self.base, REMOVE_S):
            threading.Thread(target=_remove, args=(self.base,), daemon=True).start()

    def _send(self, message: dict[str, Any], deadline: float) -> None:
        body = json.dumps(message).encode()
        data = memoryview(struct.pack("!I", len(body)) + body)
        while data:
            if not _ready(self._requests, select.POLLOUT, deadline):
                raise ToolFailed("the sandbox did not answer in time")
            try:
                data = data[os.write(self._requests, data) :]
            except BlockingIOError:
                continue
            except OSError:
                raise ToolFailed("the sandbox has stopped") from None

    def _receive(self, deadline: float) -> dict[str, Any] | None:
        """The next message, or `None` at the deadline; what came of it by then is kept."""
        while True:
            header, body = self._inbox[:4], self._inbox[4:]
            size = struct.unpack("!I", header)[0] if len(header) == 4 else None
            if size is not None and size > MAX_REPLY_BYTES:
                raise ToolFailed("the sandbox gave no valid answer")
            if size is not None and len(body) >= size:
                self._inbox = body[size:]
                return dict(json.loads(body[:size]))
            if not _ready(self._replies, select.POLLIN, deadline):
                return None
            part = os.read(self._replies, 1 << 20)
            if not part:
                raise ToolFailed("the sandbox has stopped")
            self._inbox += part


def _ready(descriptor: int, event: int, deadline: float) -> bool:
    """Wait until a descriptor can be read or written; False at the deadline."""
    poller = select.poll()
    poller.register(descriptor, event)
    while True:
        left_s = deadline - time.monotonic()
        # In slices: a cancelled Ray task learns of it between two system calls, not in one.
        if poller.poll(max(0.0, min(left_s, CANCEL_POLL_S)) * 1000):
            return True
        if left_s <= 0:
            return False


def _remove(folder: str) -> None:
    deadline = time.monotonic() + END_S
    while not remove_tree(folder, END_S):
        if time.monotonic() > deadline:
            logger.warning("sandbox: %s could not be removed; a later start tries again", folder)
            return
        time.sleep(CANCEL_POLL_S)


def _make_base() -> tuple[str, int]:
    """A new folder for a server, and a locked descriptor of it that the server inherits."""
    threading.Thread(target=_sweep, args=(tempfile.gettempdir(),), daemon=True).start()
    base = tempfile.mkdtemp(prefix=BASE_PREFIX)
    lock = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return base, lock


def _sweep(temporary: str) -> None:
    """Remove folders whose lock nobody holds: they are left over from servers that were killed.

    What cannot be removed is skipped.
    """
    for folder in Path(temporary).glob(f"{BASE_PREFIX}*"):
        with contextlib.suppress(OSError):
            info = folder.lstat()
            if info.st_uid == os.geteuid() and time.time() - info.st_mtime > STALE_AFTER_S:
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove_tree(str(folder))
                finally:
                    os.close(descriptor)


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
