"""The sandbox server: a small warm Python process that forks one confined child for each run.

Started by `serve_app.tools.sandbox.client`, which speaks to it over stdin and stdout in
length-prefixed JSON; end of input means its owner is gone: it kills the running child, removes its
folder and leaves. Standard library and sandlock only.

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
import resource
import select
import struct
import sys
import sysconfig
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any


def _load(path: str, name: str) -> None:
    """Import a file by its path, as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


if TYPE_CHECKING:
    from serve_app.tools.sandbox import root as private_root
    from serve_app.tools.sandbox.child import CONFINED, PASSED, ConfinementError, Plan, die_with
    from serve_app.tools.sandbox.files import remove_tree
    from serve_app.tools.sandbox.run import ChildRun, started, watch
else:
    # By file: importing them as parts of the package would import the package.
    for _name in ("policy", "files", "root", "calls", "child", "run"):
        _load(os.path.join(os.path.dirname(__file__), f"{_name}.py"), f"sandbox_{_name}")
    import sandbox_root as private_root
    from sandbox_child import CONFINED, PASSED, ConfinementError, Plan, die_with
    from sandbox_files import remove_tree
    from sandbox_run import ChildRun, started, watch

PRELOADED = (
    *("bisect", "collections", "copy", "csv", "dataclasses", "datetime", "decimal", "enum"),
    *("encodings.ascii", "fractions", "functools", "heapq", "itertools", "json", "math"),
    *("operator", "random", "re", "socket", "statistics", "string", "textwrap", "time", "typing"),
)
SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo")
READABLE_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero")
RUN_UID_BASE = 2_000_000_000
PROBE_S = 10.0
CLEAR_UP_MS = 50
MAX_FOLDERS_LEFT = 4
"""Folders of ended runs that may still be there when the next run begins."""


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
        self._plan = Plan("", (), None, has_private_root=False)
        self._remover: int | None = None

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

    def start(self, hello: dict[str, Any]) -> bool:
        """Load what children need, then prove that confinement works before promising it.

        Args:
            hello: `site` folders, `packages` and the `module` file to load, the `base` folder.

        Returns:
            Whether children get a root folder of their own.

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
        if hello["module"]:
            name, _ = os.path.splitext(os.path.basename(hello["module"]))
            _load(hello["module"], name)
        sys.path[:] = [folder for folder in sys.path if folder not in folders]
        gc.collect()
        gc.freeze()
        base, readable = hello["base"], _readable(roots)
        os.chmod(base, 0o711)
        # Counting a child's files may take many descriptors; children get their own limit.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        shown = (*readable, "/dev/null")
        private = private_root.is_possible(base, shown)
        if private:
            private_root.build(base, shown)
        uids = [RUN_UID_BASE + os.getpid(), None] if os.geteuid() == 0 else [None]
        failures = []
        for uid in uids:
            self._plan = Plan(base, readable, uid, private)
            try:
                self._probe(hello["limits"])
            except OSError as error:  # a root that may not give files away, as in some containers
                failures.append(str(error))
            except ConfinementError as error:
                failures.append(str(error))
            else:
                return private
            finally:
                self._remove(self._left())
        raise ConfinementError(failures[-1])

    def _probe(self, limits: dict[str, Any]) -> None:
        """Have a child try to get out, and count it.

        Raises:
            ConfinementError: If it got out, or could not be counted.
        """
        with started(self._plan, "probe", {"limits": limits}) as run:
            status = run.descriptors[2]
            poller = select.poll()
            poller.register(status, select.POLLIN)
            if poller.poll(PROBE_S * 1000):
                run.take(status)
            if run.status != CONFINED:
                raise ConfinementError(run.status.decode(errors="replace") or "no answer")
            run.count()
            if run.verdict:
                raise ConfinementError("what a child uses cannot be counted")

    def serve(self) -> None:
        """Answer requests until the owner is gone."""
        poller = select.poll()
        poller.register(self._requests, select.POLLIN)
        server = os.getpid()
        while True:
            if not poller.poll(None if self._remover is None else CLEAR_UP_MS):
                self._clear_up(server)
                continue
            pid = os.fork()
            if pid == 0:
                code = 1
                with contextlib.suppress(BaseException):
                    code = self._supervise(server)
                os._exit(code)
            # Anything but a complete answer leaves the connection in an unknown state: stop.
            if os.waitpid(pid, 0)[1] != 0:
                return
            self._clear_up(server)

    def _clear_up(self, server_pid: int) -> None:
        """Have the folders of ended runs deleted, in a process of its own: no answer waits for it.

        One such process at a time; while too much is left for it, the next run waits.
        """
        left = self._left()
        if self._remover is not None:
            options = 0 if len(left) > MAX_FOLDERS_LEFT else os.WNOHANG
            if os.waitpid(self._remover, options)[0] == 0:
                return
            self._remover = None
        if left:
            self._remover = os.fork()
            if self._remover == 0:
                with contextlib.suppress(BaseException):
                    die_with(server_pid)
                    self._remove(left)
                os._exit(0)

    def _left(self) -> list[str]:
        """The folders of ended runs."""
        return [] if self._plan.has_private_root else os.listdir(self._plan.base)

    def _remove(self, names: list[str]) -> None:
        for name in names:
            remove_tree(os.path.join(self._plan.base, name))

    def _supervise(self, server_pid: int) -> int:
        """Read one request and answer it; 0 if another may follow."""
        die_with(server_pid)
        request = self.receive()
        if request is None:
            return 1
        deadline = time.monotonic() + request["deadline_s"]
        examine = request["has_tests"]
        result = (self._examine if examine else self._run)(request, deadline)
        if result["verdict"] == "abandoned":
            return 1
        self.reply(result)
        return 0

    def _run(self, request: dict[str, Any], deadline: float) -> dict[str, Any]:
        """Run one program, and say how it ended."""
        plan = replace(self._plan, shown=tuple(request["readable"]))
        with started(plan, "program", request) as run:
            watch([run], deadline, self._requests)
        return {
            "stdout": run.streams[0].decode(errors="replace"),
            "stderr": run.streams[1].decode(errors="replace"),
            "exit_code": run.exit_code,
            **_verdict([run]),
        }

    def _examine(self, request: dict[str, Any], deadline: float) -> dict[str, Any]:
        """Run code and the tests of it, each in a child of its own; say whether they passed.

        The child with the code is forked before the tests are read, so they and the values that
        they expect were never in its memory.
        """
        channel = [*os.pipe(), *os.pipe()]
        calls_read, calls_write, results_read, results_write = channel
        with started(self._plan, "candidate", request, (calls_read, results_write)) as candidate:
            tests = self.receive()
            if tests is None:
                return {"verdict": "abandoned"}
            tests["limits"] = request["limits"]
            with started(self._plan, "tests", tests, (results_read, calls_write)) as examiner:
                for descriptor in channel:
                    os.close(descriptor)
                watch([candidate, examiner], deadline, self._requests)
        passed = examiner.status == CONFINED + PASSED and examiner.exit_code == 0
        return {"passed": passed, **_verdict([candidate, examiner])}


def _verdict(runs: list[ChildRun]) -> dict[str, str]:
    """The first verdict on any of the children, and what one that was not confined said."""
    # One child that broke a limit may have had another killed before that one was confined.
    judged = sorted(
        (run for run in runs if run.verdict), key=lambda run: run.verdict == "unconfined"
    )
    if not judged:
        return {"verdict": "", "detail": ""}
    return {"verdict": judged[0].verdict, "detail": judged[0].status.decode(errors="replace")}


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
    found = [os.path.abspath(path) for path in (*paths, *packages)]
    return tuple(dict.fromkeys((*found, *map(os.path.realpath, found))))


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
            private = server.start(hello)
        except Exception as error:
            server.reply({"ready": False, "reason": f"{type(error).__name__}: {error}"})
            return
        server.reply({"ready": True, "private_root": private})
        server.serve()
    finally:
        private_root.leave(hello["base"])
        remove_tree(hello["base"])


if __name__ == "__main__":
    main()
