"""A small process that ends what a run leaves behind, however the run ends.

`watched()` marks every process that this one starts from then on, by an environment variable, and
starts the watchdog in a session of its own: no signal to the run's process group, and no closed
terminal, reaches it. When this process is gone, or leaves the block, the watchdog lets the marked
processes end by themselves for a moment, and then ends what is left: SIGTERM, then SIGKILL. Only
processes with this run's mark, and their descendants, are ever ended.

The watchdog runs this file as a script: it imports nothing but the standard library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

MARK = "ATLAS_RUN_ID"
"""Environment variable that names the run a process belongs to."""
_KEEP_ENVIRONMENT = "SPT_NOENV"
"""`setproctitle`, which Ray and vLLM name their processes with, overwrites the environment that
the kernel shows of a process, unless this variable is set."""

_GRACE_S = 5.0
"""How long the run's processes may take to end by themselves."""
_TERM_S = 5.0
"""How long they may take after SIGTERM."""
_KILL_S = 5.0
"""How long the kernel may take to end them after SIGKILL."""
_LOOK_S = 0.1
_WAIT_S = _GRACE_S + _TERM_S + _KILL_S + 5.0
"""Longest time from the end of a run to the end of its watchdog."""


@contextmanager
def watched() -> Iterator[None]:
    """Leave no process behind that is started in this block; Linux only.

    Returns when all of them have ended. Should the watchdog itself be killed, the block goes on and
    ends as it would without one.
    """
    run_id = os.urandom(16).hex()
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    watchdog = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, run_id],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment,
        cwd="/",
        start_new_session=True,
    )
    before = {name: os.environ.get(name) for name in (MARK, _KEEP_ENVIRONMENT)}
    os.environ.update({MARK: run_id, _KEEP_ENVIRONMENT: "1"})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        assert watchdog.stdin is not None
        watchdog.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            watchdog.wait(_WAIT_S)


def processes_of(run_id: str) -> dict[int, int]:
    """The processes of a run: those with its mark, and the descendants of those.

    Returns:
        Process id to start time, which together name a process for as long as the machine runs.
        Without this process.
    """
    children: dict[int, list[int]] = {}
    started: dict[int, int] = {}
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        seen = _parent_and_start(int(name))
        if seen is None:
            continue
        parent, started[int(name)] = seen
        children.setdefault(parent, []).append(int(name))
        if _has_mark(int(name), run_id):
            found.append(int(name))
    of_run = {}
    while found:
        pid = found.pop()
        if pid not in of_run:
            of_run[pid] = started[pid]
            found += children.get(pid, ())
    of_run.pop(os.getpid(), None)
    return of_run


def end_processes(
    run_id: str, grace_s: float = _GRACE_S, term_s: float = _TERM_S, kill_s: float = _KILL_S
) -> list[int]:
    """End all processes of a run.

    Args:
        run_id: The run.
        grace_s: Seconds in which they may end by themselves.
        term_s: Seconds in which they may end after SIGTERM.
        kill_s: Seconds in which the kernel may end them after SIGKILL.

    Returns:
        Process ids of those that got a signal.
    """
    signalled: dict[tuple[int, int], signal.Signals] = {}
    for number, patience_s in ((None, grace_s), (signal.SIGTERM, term_s), (signal.SIGKILL, kill_s)):
        ends_s = time.monotonic() + patience_s
        while left := processes_of(run_id):
            for process in left.items():
                if number is not None and signalled.get(process) is not number:
                    signalled[process] = number
                    _send(process, number)
            if time.monotonic() > ends_s:
                break
            time.sleep(_LOOK_S)
    return [pid for pid, _ in signalled]


def _send(process: tuple[int, int], number: signal.Signals) -> None:
    """Send a signal to a process, unless another one has its id by now."""
    pid, started = process
    seen = _parent_and_start(pid)
    if seen is not None and seen[1] == started:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _parent_and_start(pid: int) -> tuple[int, int] | None:
    """A process's parent and start time in clock ticks; `None` if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name, in brackets, may hold blanks and brackets; the fields follow the last one.
            state, *fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in (b"Z", b"X") else (int(fields[0]), int(fields[18]))


def _has_mark(pid: int, run_id: str) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return f"{MARK}={run_id}".encode() in file.read().split(b"\0")
    except OSError:  # it has ended, or is another user's
        return False


def main(run_id: str) -> None:
    """Wait until the run has ended, and end what it left."""
    # It outlives the run by seconds at most, and nothing else may end it before.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()  # returns when the run's end of the pipe is closed, by whatever end
    ended = end_processes(run_id)
    if ended:
        with suppress(OSError):  # the terminal may be closed
            print(f"atlas: ended {len(ended)} processes that were left behind", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1])
