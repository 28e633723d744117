"""The watchdog ends what a run left, and nothing else; on plain processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from serve_app import watchdog

SLEEP = "import time; print(flush=True); time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
PARENT = f"""
import os, subprocess, sys
# The child has no mark, as a process whose environment was emptied, and a session of its own.
child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}], env={{}}, start_new_session=True)
print(child.pid, flush=True)
child.wait()
"""
RUN = f"""
import signal, subprocess, sys, time
from serve_app.watchdog import watched
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what runs these tests may ignore it, as `nohup` does
with watched():
    command = [sys.executable, "-c", {SLEEP!r}]
    left = [subprocess.Popen(command, start_new_session=True) for _ in "ab"]
    print(*(process.pid for process in left), flush=True)
    time.sleep(float(sys.argv[1]))
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a Python program that says something when it is ready; ends it after the test."""
    started = []

    def run(program: str, *arguments: str, run_id: str | None = None) -> subprocess.Popen[str]:
        environment = dict(os.environ)
        environment.pop(watchdog.MARK, None)
        if run_id is not None:
            environment[watchdog.MARK] = run_id
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def is_gone(pid: int) -> bool:
    return watchdog._parent_and_start(pid) is None


def wait_until_gone(*pids: int) -> None:
    ends_s = time.monotonic() + 60
    while not all(map(is_gone, pids)):
        assert time.monotonic() < ends_s, f"still there: {[p for p in pids if not is_gone(p)]}"
        time.sleep(0.05)


def new_run_id() -> str:
    return os.urandom(16).hex()


def test_only_processes_of_the_run_are_ended(start: Callable[..., subprocess.Popen[str]]) -> None:
    run_id = new_run_id()
    own = start(SLEEP, run_id=run_id)
    other, unmarked = start(SLEEP, run_id=new_run_id()), start(SLEEP)
    for process in (own, other, unmarked):
        said(process)
    assert watchdog.end_processes(run_id, grace_s=0) == [own.pid]
    assert own.wait(10) == -signal.SIGTERM
    assert (other.poll(), unmarked.poll()) == (None, None)


def test_what_does_not_heed_sigterm_is_killed(start: Callable[..., subprocess.Popen[str]]) -> None:
    run_id = new_run_id()
    process = start(STUBBORN, run_id=run_id)
    said(process)
    watchdog.end_processes(run_id, grace_s=0, term_s=0.2)
    assert process.wait(10) == -signal.SIGKILL


def test_a_descendant_without_the_mark_is_ended_too(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    run_id = new_run_id()
    parent = start(PARENT, run_id=run_id)
    child = int(said(parent))
    assert set(watchdog.processes_of(run_id)) == {parent.pid, child}
    watchdog.end_processes(run_id, grace_s=0)
    wait_until_gone(parent.pid, child)


def test_what_ends_in_the_grace_time_gets_no_signal(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    run_id = new_run_id()
    process = start("import time; print(flush=True); time.sleep(0.5)", run_id=run_id)
    said(process)
    assert watchdog.end_processes(run_id, grace_s=60) == []
    assert process.wait(10) == 0


def test_a_process_id_that_was_given_anew_gets_no_signal(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    process = start(SLEEP)
    said(process)
    seen = watchdog._parent_and_start(process.pid)
    assert seen is not None
    watchdog._send((process.pid, seen[1] - 1), signal.SIGKILL)
    assert process.poll() is None
    watchdog._send((process.pid, seen[1]), signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_ended_by_a_signal_leaves_nothing(
    start: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    run = start(RUN, "600")
    left = [int(pid) for pid in said(run).split()]
    os.killpg(run.pid, number)
    wait_until_gone(*left)


def test_a_run_that_ends_waits_for_what_it_started(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    run = start(RUN, "0")
    left = [int(pid) for pid in said(run).split()]
    assert run.wait(60) == 0
    assert all(map(is_gone, left))


def test_a_run_goes_on_without_its_watchdog(start: Callable[..., subprocess.Popen[str]]) -> None:
    before = dict(os.environ)
    earlier = set(own_watchdogs())  # that of the session's graph
    with watchdog.watched():
        assert os.environ[watchdog.MARK] != before.get(watchdog.MARK)
        pid = started_watchdog(earlier)
        os.kill(pid, signal.SIGKILL)
        wait_until_gone(pid)
    assert dict(os.environ) == before


def started_watchdog(earlier: set[int]) -> int:
    """The watchdog that this process has just started: a program that begins has no words yet."""
    ends_s = time.monotonic() + 60
    while not (new := set(own_watchdogs()) - earlier):
        assert time.monotonic() < ends_s, "there is no watchdog"
        time.sleep(0.01)
    (pid,) = new
    return pid


def own_watchdogs() -> list[int]:
    return [pid for pid in children_of(os.getpid()) if watchdog.__file__ in command_line(pid)]


def children_of(parent: int) -> list[int]:
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    found = {pid: watchdog._parent_and_start(pid) for pid in pids}
    return [pid for pid, seen in found.items() if seen is not None and seen[0] == parent]


def command_line(pid: int) -> list[str]:
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read().split("\0")
    except OSError:
        return []
