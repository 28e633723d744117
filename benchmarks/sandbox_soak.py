"""Does the sandbox still answer after 1,000 hostile programs and killed servers, and what is left?

    python -m benchmarks.sandbox_soak --out FILE.json [--programs N] [--seed S]

Programs of `sandbox_programs` in random order, in turn on a server whose runs have a root folder of
their own and on one that counts files. Every few programs the server, the supervisor of a run or
the run itself is killed or stopped at a random moment. After each such event, and after every
tenth program, the server has to answer a plain program. At the end nothing may be left of it: no
process, nothing in the temporary folder, no file outside. About 10 minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.sandbox_programs import HOSTILE, start_counted
from benchmarks.stats import Target, percentile
from serve_app.cli.console import console
from serve_app.errors import ToolFailed
from serve_app.tools.sandbox.client import GRACE_S, SandboxLimits, SandboxServer

LIMITS = SandboxLimits(cpu_seconds=2)
DEADLINE_S = 0.6
FOUND_OUT_S = 2.0
"""Deadline of the first plain program after an attack: a stopped server uses it up."""
ANSWER_S = 60.0
"""Deadline of the second one, with a new start of its server before it."""
ATTACK_SHARE = 0.15
"""Of the programs, so many are disturbed."""
LEFT_S = 120.0
"""How long what is left at the end may take to go."""
ESCAPED = (Path("/tmp/atlas-sandbox-escape"), Path("/dev/shm/atlas-sandbox-escape"))


@dataclass
class Soak:
    """What happened."""

    programs: int = 0
    ends: dict[str, Counter[str]] = field(default_factory=dict)
    """By program: how its runs ended, and how often."""
    attacks: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    checks: int = 0
    silent: int = 0
    """Checks that the tool did not answer, or not rightly."""
    why_silent: list[list[str]] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    """Of each program, how long after its deadline the answer came, stops of servers included."""
    answer_s: list[float] = field(default_factory=list)
    """Of each check."""
    most_bytes: int = 0
    """Most bytes in the temporary folder at the end of a program."""


def attack(server: SandboxServer, kind: str, delay_s: float) -> threading.Thread:
    """Kill or stop something of a server's in a moment."""

    def act() -> None:
        time.sleep(delay_s)
        pid = server.pid
        if pid is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            process = psutil.Process(pid)
            family = process.children(recursive=True)
            if kind == "server stopped":
                os.kill(pid, signal.SIGSTOP)
            elif kind == "server killed" or not family:
                os.kill(pid, signal.SIGKILL)
            elif kind == "supervisor killed":
                family[0].kill()
            else:
                family[-1].kill()

    thread = threading.Thread(target=act)
    thread.start()
    return thread


ATTACKS = ("server killed", "server stopped", "supervisor killed", "run killed")


def soak(folder: Path, programs: int, seed: int, deadline_s: float) -> Soak:
    """Run programs and attacks on two servers.

    Args:
        folder: The temporary folder of both servers; must be `tempfile.tempdir`.
        programs: How many.
        seed: Of their order, and of the attacks.
        deadline_s: Of each.

    Returns:
        What happened; both servers are closed.
    """
    record, rng = Soak(), random.Random(seed)
    # What an earlier soak left there would count for this one.
    for path in ESCAPED:
        path.unlink(missing_ok=True)
    servers = [SandboxServer(), SandboxServer()]
    names = list(HOSTILE)
    order = [names[i % len(names)] for i in range(programs)]
    rng.shuffle(order)
    last: list[int | None] = [None, None]
    for number, name in enumerate(order):
        which = number % 2
        server = servers[which]
        if which and (server.private_root or server.pid is None):
            # What replaced a killed server has a root folder of its own again.
            server.close()
            start_counted(server)
        record.restarts += last[which] not in (None, server.pid)
        last[which] = server.pid
        attacker = None
        if rng.random() < ATTACK_SHARE:
            kind = rng.choice(ATTACKS)
            record.attacks[kind] += 1
            attacker = attack(server, kind, rng.uniform(0.0, deadline_s))
        begin = time.monotonic()
        try:
            result = server.run(HOSTILE[name], LIMITS, deadline_s)
            end = result.stopped_by or f"exit {result.exit_code}"
        except ToolFailed as error:
            end = str(error)
        record.late_s.append(max(0.0, time.monotonic() - begin - deadline_s))
        record.ends.setdefault(name, Counter())[end] += 1
        record.programs += 1
        record.most_bytes = max(record.most_bytes, bytes_in(folder))
        if attacker is not None:
            attacker.join()
        if attacker is not None or number % 10 == 9:
            check(server, record)
    for server in servers:
        check(server, record)
        server.close()
    return record


def check(server: SandboxServer, record: Soak) -> None:
    """Ask for a plain answer."""
    record.checks += 1
    begin = time.monotonic()
    answered, errors = False, []
    # A server that was stopped or killed a moment ago is found out by one call, and replaced.
    for deadline_s in (FOUND_OUT_S, ANSWER_S):
        try:
            answered = answered or server.run("print(6 * 7)", LIMITS, deadline_s).stdout == "42\n"
        except ToolFailed as error:
            errors.append(str(error))
    if not answered:
        record.why_silent.append(errors)
    record.silent += not answered
    record.answer_s.append(time.monotonic() - begin)


def bytes_in(folder: Path) -> int:
    """Bytes on disk below a folder, as far as they can be seen while it changes."""
    total = 0
    for _, folders, files, descriptor in os.fwalk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(OSError):
                total += os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_blocks * 512
    return total


def left(folder: Path, before: set[psutil.Process]) -> dict[str, int]:
    """What there still is at the end, after giving it time to go.

    Args:
        folder: The temporary folder of the servers.
        before: Processes below this one that are none of theirs.
    """
    deadline = time.monotonic() + LEFT_S
    while True:
        entries = len(os.listdir(folder))
        processes = len(set(psutil.Process().children(recursive=True)) - before)
        if time.monotonic() > deadline or (entries == 0 and processes == 0):
            outside = sum(path.exists() for path in ESCAPED)
            return {"entries": entries, "processes": processes, "files_outside": outside}
        time.sleep(0.05)


def judge(record: Soak, remains: dict[str, int], programs: int) -> list[Target]:
    """The figures against what they have to be."""
    return [
        Target("hostile programs run", record.programs, ">=", programs),
        Target("plain programs not answered in between", record.silent, "<=", 0),
        Target("entries left in the temporary folder", remains["entries"], "<=", 0),
        Target("processes left", remains["processes"], "<=", 0),
        Target("files made outside", remains["files_outside"], "<=", 0),
        Target("latest answer after its deadline, s", max(record.late_s), "<=", GRACE_S + 2.0),
    ]


def run(programs: int, seed: int, deadline_s: float = DEADLINE_S) -> tuple[Soak, dict[str, int]]:
    """A soak in a temporary folder of its own."""
    before = tempfile.tempdir
    others = set(psutil.Process().children(recursive=True))
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        try:
            record = soak(Path(folder), programs, seed, deadline_s)
            return record, left(Path(folder), others)
        finally:
            tempfile.tempdir = before


def main() -> None:
    """Soak, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    begin = time.monotonic()
    record, remains = run(args.programs, args.seed)
    from benchmarks.serving import machine, show_targets

    held = judge(record, remains, args.programs)
    show_targets(held)
    figures: dict[str, Any] = {
        "seed": args.seed,
        "seconds": time.monotonic() - begin,
        "attacks": dict(record.attacks),
        "server_restarts": record.restarts,
        "checks": record.checks,
        "why_silent": record.why_silent,
        "answer_s": {"p50": percentile(record.answer_s, 50), "max": max(record.answer_s)},
        "late_s": {"p99": percentile(record.late_s, 99), "max": max(record.late_s)},
        "most_bytes_in_the_temporary_folder": record.most_bytes,
        "left": remains,
        "ends": {name: dict(ends) for name, ends in sorted(record.ends.items())},
    }
    written = {
        "machine": machine(),
        **figures,
        "targets": [target.as_json() for target in held],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(written, indent=2) + "\n")
    console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
