"""Does anybody notice when models, tools, processes and nodes come and go?

How to run: `python -m benchmarks.chaos --out FILE.json [--seconds 600] [--calm-requests 10000]
[--seed 0] [--rate N] [--vllm] [--soak MINUTES]`. It starts a Ray cluster of four nodes on this
machine, a PostgreSQL server, and the graph of `configs/bench/chaos.yaml` with two replicas of
everything; sends one constant open-loop load, whole and streamed, routed and pinned, with and
without a tool, never twice; and does one thing after another meanwhile. First what operators do
(models and tools added, changed and removed, policies promoted, the configuration file edited)
until `--calm-requests` were sent; then, for `--seconds`, that and faults: gateway, router,
embedder, engine, tool worker and controller killed, Ray Serve's controller killed, a node removed,
a node added, the store killed. With `--vllm` a real engine is in the pool too, and its process is
killed while it is the first choice of every routed request. With `--soak` nothing is done for so
long, and memory, descriptors, tasks and objects of every process are watched.

Results to expect: without faults no request fails; with them 99.9% are answered, and only those
fail that were in flight at a kill; everything is whole again within a minute. See
`benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console

from benchmarks.chaos.actions import CHANGES, FAULTS, VLLM_FAULTS, Script
from benchmarks.chaos.cluster import ChaosCluster, chaos_cluster
from benchmarks.chaos.load import Answer, ChaosLoad, Kind
from benchmarks.chaos.soak import soak, soak_targets, watched
from benchmarks.chaos.verdict import (
    FAILURES_SHOWN,
    Orphans,
    Phase,
    cut_streams,
    figures,
    targets,
)
from benchmarks.serving import machine, show_targets
from benchmarks.swap import ROOT
from serve_app.graph import APP_NAME

KINDS = (
    Kind("routed", "atlas", False),
    Kind("routed stream", "atlas", True),
    Kind("pinned", "instant", False),
    Kind("slow stream", "paced", True),
    Kind("with a tool", "paced@calculator", False),
    Kind("routed", "atlas", False),
    Kind("pinned stream", "instant@none", True),
    Kind("slow", "paced@none", False),
)
DEADLINE_S = 10.0
WARM_UP_S = 5.0
_TASKS_END_S = 15.0
"""How long after the last answer a tool's task may still run."""
_PROCESSES_END_S = 60.0

console = Console()


@dataclass
class Record:
    """What happened."""

    answers: list[Answer] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    soaked: dict[str, Any] | None = None
    orphans: Orphans = field(default_factory=lambda: Orphans((), (), ()))


@asynccontextmanager
async def running_load(
    running: ChaosCluster, rate: float, answers: list[Answer]
) -> AsyncIterator[None]:
    """Send the load from a process of its own while the block runs.

    Raises:
        RuntimeError: If that process fails.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.chaos.load",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    running.processes.leave_out(process.pid)
    assert process.stdin is not None
    assert process.stdout is not None
    load = ChaosLoad(running.port, rate, DEADLINE_S, KINDS)
    process.stdin.write(json.dumps(asdict(load)).encode() + b"\n")

    async def read(out: asyncio.StreamReader) -> None:
        async for line in out:
            answers.append(Answer(**json.loads(line)))

    reading = asyncio.create_task(read(process.stdout))
    try:
        yield
    finally:
        process.stdin.close()
        await reading
        if await process.wait():
            raise RuntimeError("the load generator failed")


async def measure(running: ChaosCluster, args: argparse.Namespace) -> Record:
    """The load, and everything that is done meanwhile."""
    record = Record()
    watching = asyncio.create_task(running.processes.watch())
    async with httpx.AsyncClient(base_url=running.url, timeout=15) as client:
        script = Script(running, client, args.seed)
        missing = await script.until_whole(300.0)
        if missing is not None:
            raise RuntimeError(f"the graph did not come up: {missing}")
        console.print("everything is up; sending the load")
        async with running_load(running, args.rate, record.answers):
            await asyncio.sleep(WARM_UP_S)
            if args.soak:
                names = await asyncio.to_thread(watched, running)
                record.soaked = await soak(names, args.soak * 60.0)
                failed = [asdict(answer) for answer in record.answers if answer.failed]
                record.soaked["requests"] = len(record.answers)
                record.soaked["failures"] = failed[:FAILURES_SHOWN]
            else:
                await _phases(script, args, record)
            await asyncio.sleep(1.0)
        applications = await _applications_left(running, script)
        tasks = await _tasks_left(running)
        record.orphans = Orphans(applications, tasks, ())
    watching.cancel()
    return record


async def _phases(script: Script, args: argparse.Namespace, record: Record) -> None:
    # One after another: a change between the faults.
    faults = (*FAULTS, *VLLM_FAULTS) if args.vllm else FAULTS
    mixed = [name for both in zip(faults, (*CHANGES, *CHANGES), strict=False) for name in both]
    calm_s = math.ceil(args.calm_requests / args.rate)
    plans = (("calm", calm_s, CHANGES), ("storm", args.seconds, args.actions or mixed))
    for name, seconds, actions in plans:
        if not seconds:
            continue
        phase = Phase(name, time.time())
        record.phases.append(phase)
        first = len(script.done)
        telling = asyncio.create_task(_tell(script, first))
        if args.once:
            await script.run(actions)
        else:
            await script.run_until(time.monotonic() + seconds, actions)
        await script.tidy()
        telling.cancel()
        phase.ended_unix_s, phase.actions = time.time(), script.done[first:]


async def _tell(script: Script, told: int) -> None:
    """Print each action when it is over."""
    while True:
        await asyncio.sleep(0.5)
        while told < len(script.done):
            action = script.done[told]
            if action.whole_s is None and not action.missing:
                break
            told += 1
            took = f"{action.whole_s:.1f} s" if action.whole_s is not None else action.missing
            console.print(f"  {action.name} ({action.what}): whole after {took}", highlight=False)


async def _applications_left(running: ChaosCluster, script: Script) -> tuple[str, ...]:
    missing = await script.until_whole(60.0)
    return () if missing is None else (missing,)


async def _tasks_left(running: ChaosCluster) -> tuple[str, ...]:
    """Tools' tasks that run although nobody asks any more."""
    ends_s = time.monotonic() + _TASKS_END_S
    while True:
        pid = await asyncio.to_thread(running.tool_worker)
        if pid is None:
            return ()
        if time.monotonic() > ends_s:
            return (f"pid {pid}",)
        await asyncio.sleep(0.5)


def processes_left(running: ChaosCluster) -> tuple[str, ...]:
    """Processes of the cluster that outlive it."""
    ends_s = time.monotonic() + _PROCESSES_END_S
    while True:
        left = running.processes.alive()
        if not left or time.monotonic() > ends_s:
            break
        time.sleep(1.0)
    shown = []
    for process in left:
        try:
            shown.append(f"{process.pid}: {' '.join(process.cmdline())[:120]}")
        except psutil.Error:
            continue
    return tuple(shown)


def _actions(text: str) -> list[str]:
    """The names of actions in an argument.

    Raises:
        argparse.ArgumentTypeError: If there is no such action.
    """
    names = [name.strip() for name in text.split(",")]
    known = (*FAULTS, *VLLM_FAULTS, *CHANGES)
    unknown = sorted({*names} - {*known})
    if unknown:
        raise argparse.ArgumentTypeError(f"no action {unknown[0]!r}; {known}")
    return names


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--seconds", type=float, default=600.0, help="of the part with faults")
    parser.add_argument("--calm-requests", type=int, default=10_000,
                        help="of the part without")  # fmt: skip
    parser.add_argument("--rate", type=float, default=20.0, help="requests per second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--actions", type=_actions, metavar="NAME,NAME",
                        help="of the part with faults, in this order [all]")  # fmt: skip
    parser.add_argument("--once", action="store_true", help="do each action once")
    parser.add_argument("--workers", type=int, default=3, help="nodes beside the head")
    parser.add_argument("--vllm", action="store_true", help="a real engine in the pool too")
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES",
                        help="do nothing but watch for so long")  # fmt: skip
    args = parser.parse_args()
    with chaos_cluster(args.workers, vllm=args.vllm) as running:
        about = machine()
        record = asyncio.run(measure(running, args))
    orphans = Orphans(record.orphans.applications, record.orphans.tasks, processes_left(running))
    parts = {phase.name: figures(phase, record.answers, DEADLINE_S) for phase in record.phases}
    actions = [action for phase in record.phases for action in phase.actions]
    calm, storm = parts.get("calm"), parts.get("storm")
    if record.soaked is None:
        held = targets(calm, storm, record.phases, record.answers, orphans, args.calm_requests)
    else:
        held = soak_targets(record.soaked, record.answers)
    show_targets(held)
    written = {
        "machine": about,
        "application": APP_NAME,
        "seed": args.seed,
        "rate": args.rate,
        "vllm": args.vllm,
        "deadline_s": DEADLINE_S,
        "phases": list(parts.values()),
        "soak": record.soaked,
        "streams_cut_with_their_writer": cut_streams(record.answers, actions)[0],
        "orphans": asdict(orphans),
        "targets": [target.as_json() for target in held],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(written, indent=2) + "\n")
    console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
