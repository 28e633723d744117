"""Sandbox servers for tests: of both kinds, and what is left of them afterwards."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import psutil
import pytest

from benchmarks.sandbox_programs import start_counted
from serve_app.tools.sandbox.client import SandboxLimits, SandboxResult, SandboxServer

LIMITS = SandboxLimits()
KINDS = ("private root", "counted")
"""Files bounded by the kernel, in a root folder of the run's own; files counted."""

Run = Callable[..., SandboxResult]


@contextmanager
def server_of(kind: str) -> Iterator[SandboxServer]:
    """A warm server; afterwards nothing of it may be left."""
    server = SandboxServer()
    try:
        if kind == "counted":
            start_counted(server)
        else:
            server.start()
            if not server.private_root:
                pytest.skip("this kernel or container lets nobody mount")
        assert server.private_root is (kind == "private root")
        pid, base = server.pid, server.base
        yield server
    finally:
        server.close()
    assert pid is not None
    assert not psutil.pid_exists(pid)
    wait_until(lambda: not os.path.lexists(base))


@contextmanager
def runs_on(server: SandboxServer) -> Iterator[Run]:
    """Run code; afterwards nothing of it may be left."""

    def run_code(
        code: str, deadline_s: float = 10, readable: Sequence[str] = (), **limits: int
    ) -> SandboxResult:
        return server.run(textwrap.dedent(code), replace(LIMITS, **limits), deadline_s, readable)

    yield run_code
    assert server.pid is not None
    wait_until(lambda: psutil.Process(server.pid).children(recursive=True) == [])
    wait_until(lambda: os.listdir(server.base) == [])


def wait_until(claim: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Give what happens in other processes a moment."""
    deadline = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
