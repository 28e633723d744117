"""What happens to requests when five times as many come as can be answered?

How to run: `python -m benchmarks.overload --out FILE.json [--seconds S]`. It starts Ray and the
graph of `configs/bench/overload.yaml` (a scripted engine of 24 slots; answers take 0.64 s, each
tenth 2.56 s), and sends open-loop load, whole and streamed: light, to learn what an idle deployment
takes; more than it can answer, to learn what it sustains; five times that; light again.

Results to expect: of five times the load a fifth is answered, with a p99 at most twice that of the
idle deployment; the rest is refused with 429 and Retry-After in less than 100 ms; the gateway's
memory does not grow; latency is back in seconds. See `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from benchmarks.overload_load import LENGTHS, Answer, OverloadLoad
from benchmarks.ports import free_port
from benchmarks.serving import machine, show_targets
from benchmarks.stats import Target, percentile

ROOT = Path(__file__).parent.parent
FACTOR = 5.0
LIGHT = 0.3
"""Light load, as a share of what the engine can do."""
WARM_UP_S = 5.0
MAX_SLOWDOWN = 2.0
_MEMORY_EVERY_S = 0.5

console = Console()


@dataclass
class Record:
    """The answers of each phase, and the gateway's memory."""

    idle: list[Answer]
    rush: list[Answer]
    surge: list[Answer]
    after: list[Answer]
    rush_s: float
    memory_before: int
    """Bytes of all gateway replicas."""
    memory_peak: int
    memory_after: int


def gateway_memory() -> int:
    """Resident bytes of the gateway replicas on this machine."""
    total = 0
    for process in psutil.process_iter(["cmdline", "memory_info"]):
        command = " ".join(process.info["cmdline"] or ())
        if command.startswith("ray::ServeReplica:atlas:Gateway") and process.info["memory_info"]:
            total += process.info["memory_info"].rss
    return total


async def run_load(load: OverloadLoad) -> list[Answer]:
    """Run a load in a process of its own.

    Raises:
        RuntimeError: If that process fails.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.overload_load",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    out, _ = await process.communicate(json.dumps(asdict(load)).encode())
    if process.returncode:
        raise RuntimeError("the load generator failed")
    return [Answer(**fields) for fields in json.loads(out)]


async def measure(port: int, engine_rate: float, seconds: float) -> Record:
    """Light, too much, far too much, light.

    Args:
        port: Of the gateway.
        engine_rate: Requests per second that the engine can answer.
        seconds: Of each phase.
    """
    light = LIGHT * engine_rate
    await run_load(OverloadLoad(port, light, WARM_UP_S))
    idle = await run_load(OverloadLoad(port, light, seconds))
    console.print(f"idle: {len(idle)} requests at {light:.1f}/s")
    rush = await run_load(OverloadLoad(port, 1.5 * engine_rate, seconds))
    sustained = len(answered(rush)) / seconds
    console.print(f"sustained: {sustained:.1f}/s")
    before = gateway_memory()
    peak = before
    surging = asyncio.create_task(run_load(OverloadLoad(port, FACTOR * sustained, seconds)))
    while not surging.done():
        peak = max(peak, gateway_memory())
        await asyncio.wait({surging}, timeout=_MEMORY_EVERY_S)
    surge = await surging
    console.print(f"surge: {len(answered(surge))} of {len(surge)} answered")
    after = await run_load(OverloadLoad(port, light, seconds))
    return Record(idle, rush, surge, after, seconds, before, peak, gateway_memory())


def answered(answers: Sequence[Answer]) -> list[Answer]:
    """Those with an answer."""
    return [answer for answer in answers if answer.status == 200]


def judge(record: Record) -> tuple[dict[str, Any], list[Target]]:
    """The figures, and what they are held against."""

    def latency(answers: Sequence[Answer]) -> dict[str, float | None]:
        taken = [answer.latency_ms for answer in answers]
        return {f"p{share}_ms": percentile(taken, share) for share in (50, 99)}

    idle, surge = latency(answered(record.idle)), latency(answered(record.surge))
    refused = [answer for answer in record.surge if answer.status in (429, 503)]
    other = len(record.surge) - len(refused) - len(answered(record.surge))
    bound_ms = MAX_SLOWDOWN * (idle["p99_ms"] or 0.0)
    bad = [a for a in record.after if a.status != 200 or a.latency_ms > bound_ms]
    figures = {
        "requests": {
            name: len(getattr(record, name)) for name in ("idle", "rush", "surge", "after")
        },
        "sustained_per_s": len(answered(record.rush)) / record.rush_s,
        "idle": idle,
        "surge": surge,
        "surge_answered_share": len(answered(record.surge)) / len(record.surge),
        "refused": latency(refused) | {"with_retry_after": sum(a.says_when for a in refused)},
        "after": latency(answered(record.after)),
        "gateway_memory_mib": {
            "before": record.memory_before / 2**20,
            "peak": record.memory_peak / 2**20,
            "after": record.memory_after / 2**20,
        },
    }
    slowdown = (surge["p99_ms"] or float("inf")) / max(idle["p99_ms"] or 0.0, 1e-9)
    goodput = len(answered(record.surge)) / max(len(answered(record.rush)), 1)
    growth = record.memory_peak / max(record.memory_before, 1)
    silent = sum(not answer.says_when for answer in refused)
    targets = [
        Target("p99 at 5 times the load over the idle one", slowdown, "<=", MAX_SLOWDOWN),
        Target("answered at 5 times the load over the sustained", goodput, ">=", 0.9),
        Target("p99 of the refusals, ms", latency(refused)["p99_ms"] or 0.0, "<=", 100.0),
        Target("refusals without Retry-After", float(silent), "<=", 0.0),
        Target("requests neither answered nor refused", float(other), "<=", 0.0),
        Target("gateway memory, peak over before", growth, "<=", 1.2),
        Target("latency back after, s", max((a.due_s for a in bad), default=0.0), "<=", 10.0),
    ]
    return figures, targets


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each of the 4 phases")
    args = parser.parse_args()
    from serve_app.config import CustomModelConfig, load_config
    from serve_app.running import running_graph

    path = ROOT / "configs/bench/overload.yaml"
    (model,) = load_config(path).models
    assert isinstance(model, CustomModelConfig)
    mean_s = model.settings["seconds_per_token"] * sum(LENGTHS) / len(LENGTHS)
    port = free_port()
    with ExitStack() as stack:
        # A store of its own: what other runs left behind must not count.
        os.environ["ATLAS_DATA_DIR"] = stack.enter_context(tempfile.TemporaryDirectory())
        console.print(f"starting the graph of {path.name} …")
        graph = stack.enter_context(running_graph(path, port=port))
        for state in graph.wait_for_pool():
            console.print(*(f"  {m.model_id}: {m.state.value}" for m in state.models))
        record = asyncio.run(measure(port, model.settings["slots"] / mean_s, args.seconds))
        about = machine()
    figures, held = judge(record)
    console.print_json(json.dumps(figures))
    show_targets(held)
    written = {
        "machine": about,
        "config": path.name,
        "phase_s": args.seconds,
        **figures,
        "targets": [target.as_json() for target in held],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(written, indent=2) + "\n")
    console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
