"""One run of sandboxed code, seen from its supervisor: fork a confined child, watch it, end it.

Standard library only; the sandbox server loads this file by its path.

The kernel bounds what a child writes where it has a root of its own (`sandbox.root`), and its
threads where it has a user id of its own. Elsewhere both are counted every `POLL_S`, from outside,
and the child is killed when it is over a limit or cannot be counted. Counting is not exact: between
two counts a child may write as much as the disk takes in that time (in files of at most
`max_file_bytes`), and files moved about during a count may be counted twice or not at all in it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve_app.tools.sandbox.child import CONFINED, Plan, Role, run_child
    from serve_app.tools.sandbox.files import deleted_bytes, disk_use
    from serve_app.tools.sandbox.root import WORKDIR
else:
    # Put there by the server: importing them as parts of the package would import the package.
    from sandbox_child import CONFINED, Plan, Role, run_child
    from sandbox_files import deleted_bytes, disk_use
    from sandbox_root import WORKDIR

POLL_S = 0.02
"""How often a running child's threads and files are counted."""


@dataclass
class ChildRun:
    """One child and what is known about it."""

    pid: int
    pidfd: int
    workdir: str
    """Its folder, to be counted; empty where the kernel does that."""
    limits: dict[str, Any]
    streams: list[bytearray]
    """What was read of stdout, stderr and status."""
    pipes: dict[int, bytearray]
    """Those of them that are open, by descriptor."""
    descriptors: tuple[int, ...]
    verdict: str = ""
    """Why the child was killed; empty while it was not."""
    exit_code: int = 0
    next_count: float = field(default_factory=lambda: time.monotonic() + POLL_S)

    @property
    def status(self) -> bytes:
        """What the child said on its status pipe."""
        return bytes(self.streams[2])

    @property
    def confined(self) -> bool:
        """Whether the child said that it is confined; it has run nothing before."""
        return self.status.startswith(CONFINED)

    def take(self, descriptor: int) -> None:
        """Read once from a pipe, keeping at most `max_output_bytes` of it."""
        try:
            data = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            del self.pipes[descriptor]
            return
        kept, limit = self.pipes[descriptor], self.limits["max_output_bytes"]
        if len(kept) + len(data) > limit:
            self.verdict = self.verdict or "output"
        kept += data[: limit - len(kept)]

    def count(self) -> None:
        """Set the verdict if the child uses more than it may, or that cannot be found out."""
        begin = time.monotonic()
        try:
            self.verdict = self.verdict or self._over_limit()
        except OSError:
            self.verdict = "uncounted"
        # Counting many files must not take all of a core.
        now = time.monotonic()
        self.next_count = now + max(POLL_S, 2 * (now - begin))

    def _over_limit(self) -> str:
        limits = self.limits
        if _threads(self.pid) > limits["max_threads"]:
            return "threads"
        if not self.workdir:
            return ""
        used, entries = disk_use(self.workdir, limits["max_files"])
        if entries > limits["max_files"]:
            return "files"
        used += deleted_bytes(self.pid, self.workdir, limits["max_file_bytes"])
        return "disk" if used > limits["max_disk_bytes"] else ""

    def end(self) -> None:
        """Kill the child if it still runs, and take what is left in its pipes."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self.exit_code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        for descriptor in tuple(self.pipes):
            read = -1
            while descriptor in self.pipes and len(self.pipes[descriptor]) != read:
                read = len(self.pipes[descriptor])
                self.take(descriptor)
        for descriptor in (self.pidfd, *self.descriptors):
            os.close(descriptor)
        if not self.confined and not self.verdict:
            self.verdict = "unconfined"


def _threads(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            return int(f.read().rpartition(b")")[2].split()[17])
    except (FileNotFoundError, ProcessLookupError):
        return 0


@contextmanager
def started(
    plan: Plan, role: Role, request: dict[str, Any], channel: Sequence[int] = ()
) -> Iterator[ChildRun]:
    """A forked, confined child, which is ended at the end of the context; its folder stays.

    Args:
        plan: How it is confined.
        role: What it is for.
        request: `limits`, and `code` or `tests`.
        channel: Descriptors that a candidate or its tests read and write calls and results on.
    """
    parent = os.getpid()
    workdir = "" if plan.has_private_root else os.path.join(plan.base, f"{parent}-{role}")
    if workdir:
        os.mkdir(workdir, 0o700)
        if plan.run_uid is not None:
            os.chown(workdir, plan.run_uid, plan.run_uid)
    pipes = [os.pipe() for _ in range(3)]
    writes = [write for _, write in pipes]
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            code = run_child(plan, workdir or WORKDIR, role, request, [*writes, *channel], parent)
        os._exit(code)
    reads = tuple(read for read, _ in pipes)
    for read, write in pipes:
        os.close(write)
        os.set_blocking(read, False)
    streams = [bytearray() for _ in reads]
    run = ChildRun(
        pid=pid,
        pidfd=os.pidfd_open(pid),
        workdir=workdir,
        limits=request["limits"],
        streams=streams,
        pipes=dict(zip(reads, streams, strict=True)),
        descriptors=reads,
    )
    try:
        yield run
    finally:
        run.end()


def watch(runs: Sequence[ChildRun], deadline: float, owner: int) -> None:
    """Wait until the last of the children ends or any breaks a limit; sets its verdict then.

    Args:
        runs: The children; the end of any but the last does not matter.
        deadline: On the monotonic clock.
        owner: Descriptor whose other end closes when nobody wants the answer any more.
    """
    last = runs[-1]
    while not any(run.verdict for run in runs):
        now = time.monotonic()
        if now >= deadline:
            last.verdict = "deadline"
            return
        due = [run for run in runs if now >= run.next_count]
        for run in due:
            run.count()
        if due:
            continue
        poller = select.poll()
        poller.register(owner, select.POLLHUP | select.POLLRDHUP)
        poller.register(last.pidfd, select.POLLIN)
        for run in runs:
            for descriptor in run.pipes:
                poller.register(descriptor, select.POLLIN)
        wait_s = min(deadline, *(run.next_count for run in runs)) - now
        ready = {descriptor for descriptor, _ in poller.poll(wait_s * 1000 + 1)}
        if owner in ready:
            last.verdict = "abandoned"
        for run in runs:
            for descriptor in ready.intersection(run.pipes):
                run.take(descriptor)
        if last.pidfd in ready:
            return
