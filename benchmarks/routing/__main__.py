"""Routing quality on real outcome tables.

What: every method on every table, tasks never seen, a new arm, the gate's calibration, and what a
decision costs. How: `python -m benchmarks.routing --data DIR [--heldout DIR] --out FILE.json`; fits
on `train` and reports on `test`, or fits on all of DIR and reports on the held-out folder. Results:
the JSON, one figure per table beside it, and a summary table on the terminal.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.routing import decision
from benchmarks.routing.data import embeddings, find_tables, load_table
from benchmarks.routing.evaluation import (
    OURS,
    Bench,
    all_figures,
    calibration,
    frontier,
    learned,
    leave_one_task_out,
    new_arm,
    problem_of,
    references,
)
from benchmarks.routing.figure import draw_frontiers, draw_reliability
from benchmarks.routing.targets import summary, targets
from serve_app.config import EmbedderConfig

TASK_TABLES = ("llmrouter",)
"""Tables of many tasks that are held out one by one."""


def run_table(
    bench: Bench, out: Path, progress: Progress, result: dict[str, Any], task: Any
) -> None:
    """Everything about one table; writes its figure and fills `result`."""
    table = bench.table

    def advance(what: str) -> None:
        progress.update(task, description=f"{table.name}: {what}")

    problem, evaluation = problem_of(bench, table.train, table.test)
    choices = references(bench, problem, evaluation, table.test)
    ours, rule = learned(bench, problem, table.train, advance)
    choices |= ours
    advance("intervals")
    result["tables"][table.name] = all_figures(evaluation, choices, bench.seed)
    draw_frontiers(
        table.name,
        {name: frontier(evaluation, chosen) for name, chosen in choices.items()},
        out.with_name(f"{out.stem}_{table.name}.png"),
    )
    result["fitted"][table.name] = {
        "num_train": len(table.train),
        "num_test": len(table.test),
        "num_pairs": len(table.pairs),
        "coverage": table.coverage,
        "scales": rule.snapshot.scales,
        "head_weight": rule.snapshot.head_weight,
        **rule.snapshot.metadata,
    }
    result["calibration"][table.name] = calibration(rule, problem, evaluation)
    if len(table.pairs) > 2 and table.coverage > 0.9:
        advance("new arm")
        arm = int(np.argmax(problem.scores.mean(axis=0)))
        result["new_arm"][table.name] = new_arm(bench, arm, table.train, table.test)
    if table.name in TASK_TABLES:
        result["leave_one_task_out"][table.name] = leave_one_task_out(bench, advance)


def main() -> None:
    """Measure, write, print the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--heldout", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoder", default=EmbedderConfig().model)
    parser.add_argument("--cache", type=Path, default=Path("build/embeddings"))
    parser.add_argument("--tables", nargs="*", help="only these; all by default")
    parser.add_argument("--skip-decision", action="store_true", help="leave out the timings")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tables = find_tables(options.data)
    heldout = find_tables(options.heldout) if options.heldout else {}
    names = [
        name
        for name in options.tables or tables
        if name in tables and (not options.heldout or name in heldout)
    ]
    sections = ("tables", "fitted", "calibration", "new_arm", "leave_one_task_out")
    result: dict[str, Any] = {section: {} for section in sections}
    began_s = time.perf_counter()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        task = progress.add_task("tables", total=len(names))
        for name in names:
            progress.update(task, description=name)
            table = load_table(name, tables[name], heldout.get(name))
            vectors = embeddings(table, options.encoder, options.cache, progress)
            bench = Bench(table, vectors, options.encoder, options.seed)
            run_table(bench, options.out, progress, result, task)
            options.out.write_text(json.dumps(result, indent=1, default=_plain))
            progress.advance(task)
        if not options.skip_decision:
            result["decision"] = decision.measure(
                options.seed, lambda what: progress.update(task, description=f"decision: {what}")
            )
    draw_reliability(
        result["calibration"], options.out.with_name(f"{options.out.stem}_reliability.png")
    )
    result["settings"] = {
        "encoder": options.encoder,
        "seed": options.seed,
        "heldout": options.heldout is not None,
        "seconds": time.perf_counter() - began_s,
    }
    result["targets"] = targets(result, OURS)
    options.out.write_text(json.dumps(result, indent=1, default=_plain))
    sys.stdout.write(summary(result, OURS))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value.item()  # numpy's numbers


if __name__ == "__main__":
    main()
