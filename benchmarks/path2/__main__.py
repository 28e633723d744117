"""What path 2 is worth.

What: the router of both paths in distribution and on a domain it never saw, four steps against
one, a pool that grows, shrinks, breaks and gets dearer, the reward's parts, real outcome tables,
and live requests beside their replay.
How: `python -m benchmarks.path2 --deployment configs/nano.yaml --out FILE.json [--seeds 5]
[--iterations 60] [--data DIR] [--questions FILE]`; the profile is read from the deployment's store.
Live requests need the deployment served, and its questions. Every router and every result is kept
in `FILE_run/` as soon as it is there, and the same command goes on from them.
Results: the JSON, figures beside it, and the targets on the terminal.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks.path2.data import complete, read_bench
from benchmarks.path2.encoders import TOKEN_MEAN, TokenMean
from benchmarks.path2.figure import draw_frontiers
from benchmarks.path2.live import ask_live
from benchmarks.path2.parts import (
    NEWCOMERS,
    Run,
    ablations,
    changes,
    growth,
    in_distribution,
    leave_one_domain_out,
    lessons,
    verifier_of,
)
from benchmarks.path2.summary import (
    MIN_AUC,
    as_text,
    changed,
    growth_share,
    over_domains,
    section,
    targets,
)
from benchmarks.path2.tables import TASK_TABLES, open_tables
from benchmarks.path2.units import GATED, PATH_1, PATH_2
from rl.fit.selection import FitSettings
from rl.ppo.config import TrainConfig
from serve_app.config import load_config
from serve_app.errors import ConfigError
from serve_app.questions import read_questions

PARTS = (
    "in_distribution",
    "leave_one_domain_out",
    "growth",
    "changes",
    "ablations",
    "tables",
    "live",
)
DEFAULT_PARTS = tuple(part for part in PARTS if part != "ablations")
"""Ablations learn seven times as many routers as all else."""


def main() -> None:
    """Measure, write, print the targets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deployment", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--other-seeds", type=int, default=1, help="of the parts that ask or learn many times"
    )
    parser.add_argument("--workers", type=int, default=2, help="units made at once")
    parser.add_argument("--iterations", type=int, default=60, help="of each training")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=DEFAULT_PARTS)
    parser.add_argument("--data", type=Path, help="folder of outcome tables")
    parser.add_argument("--tables", nargs="*", default=["llmrouter", "gsm8k_modeltool"])
    parser.add_argument("--questions", type=Path, help="of the profile, for live requests")
    parser.add_argument("--live-questions", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0, help="of the profile's answers")
    parser.add_argument("--port", type=int, default=8000, help="where the deployment listens")
    options = parser.parse_args()
    logging.getLogger("ray").setLevel(logging.ERROR)
    config = load_config(options.deployment)
    train = TrainConfig(iterations=options.iterations)
    folder = options.out.with_name(f"{options.out.stem}_run")
    folder.mkdir(parents=True, exist_ok=True)
    began_s = time.perf_counter()
    ray.init(
        address="local", num_cpus=options.workers, include_dashboard=False, log_to_driver=False
    )
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("the profile", total=None)

        def told(what: str) -> None:
            progress.update(task, description=what)

        run = Run(
            complete(read_bench(config)),
            folder,
            range(options.seeds),
            FitSettings(),
            train,
            told,
            cpus_per_unit=1.0,
        )
        fewer = replace(run, seeds=run.seeds[: options.other_seeds])
        _check_profile(folder, run.bench.mark)
        result: dict[str, Any] = {}
        for part in options.parts:
            needed = {"tables": options.data, "live": options.questions}
            if part in needed and needed[part] is None:
                continue
            if part == "tables":
                result[part] = _tables(
                    options, config.embedder.model, folder, train, progress, told
                )
            else:
                result[part] = _PARTS[part](run if part == "in_distribution" else fewer, options)
            result["settings"] = {
                "iterations": options.iterations,
                "seeds": options.seeds,
                "other_seeds": options.other_seeds,
                "encoder": config.embedder.model,
                "seconds": time.perf_counter() - began_s,
            }
            result["targets"] = targets(result)
            options.out.write_text(json.dumps(result, indent=1, allow_nan=False))
    if "leave_one_domain_out" in result and "in_distribution" in result:
        draw_frontiers(
            {
                "profiled domains": in_distribution(run),
                "domain absent from fit and training": over_domains(leave_one_domain_out(fewer)),
            },
            run.bench.test,
            options.out.with_suffix(".png"),
        )
    sys.stdout.write(as_text(result))


def _check_profile(folder: Path, mark: str) -> None:
    """Refuse to go on where another profile was learnt from: its routers would count as this one's.

    Raises:
        ConfigError: If it was.
    """
    file = folder / "profile.txt"
    if file.is_file() and file.read_text() != mark:
        raise ConfigError(f"{folder} holds routers of another profile; name another --out")
    file.write_text(mark)


def _in_distribution(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    learnt = [run.learnt("base", seed) for seed in run.seeds]
    return section(in_distribution(run), run.bench.test.domains) | {
        "thresholds": [of.threshold for of in learnt]
    }


def _leave_one_domain_out(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    units = leave_one_domain_out(run)
    sections = {domain: section(of_domain) for domain, of_domain in units.items()}
    groups = [domain for domain, of in units.items() for _ in range(of[0].score(PATH_1, 0.0).size)]
    verifiers = {
        domain: verifier_of(run, run.learnt(f"base-without-{domain}", run.seeds[0]), domain)
        for domain in units
    }
    told = [
        domain
        for domain, of in verifiers.items()
        if of is not None and (of.auc_within_candidate or 0.0) >= MIN_AUC
    ]
    result = {
        "all": section(over_domains(units), groups),
        "domains": sections,
        "verifier": {name: asdict(of) for name, of in verifiers.items() if of is not None},
    }
    if told:
        kept = [group for group in groups if group in told]
        result["told_apart"] = section(over_domains({name: units[name] for name in told}), kept)
    return result


def _growth(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    again = in_distribution(run)
    result = {}
    for name, units in growth(run).items():
        added, without = (units[kind] for kind in NEWCOMERS)
        result[name] = {
            "share": asdict(growth_share(without, added, again, GATED)),
            "share_path_2": asdict(growth_share(without, added, again, PATH_2)),
            "added": section(added),
            "without": section(without),
        }
    return result


def _changes(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    return {name: section(units) for name, units in changes(run).items()}


def _ablations(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    config = run.bench.config
    assert config is not None  # it was read from a store
    encoders = {TOKEN_MEAN: complete(read_bench(config, TokenMean(config.embedder)))}
    whole = in_distribution(run), over_domains(leave_one_domain_out(run))
    units = {"nothing": whole} | {
        name: (inside, over_domains(unseen))
        for name, (inside, unseen) in ablations(run, lessons(run), encoders).items()
    }
    return {
        name: {
            where: section(of) | {"less_the_whole": changed(of, of_whole)}
            for where, of, of_whole in zip(
                ("in_distribution", "unseen_domain"), both, whole, strict=True
            )
        }
        for name, both in units.items()
    }


def _live(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    return ask_live(
        run.bench,
        run.learnt("base", run.seeds[0]),
        read_questions(options.questions),
        port=options.port,
        count=options.live_questions,
        temperature=options.temperature,
        on_progress=run.on_progress,
    )


def _tables(
    options: argparse.Namespace,
    encoder: str,
    folder: Path,
    train: TrainConfig,
    progress: Progress,
    told: Any,
) -> dict[str, Any]:
    seeds = range(options.other_seeds)
    runs = open_tables(
        options.data, options.tables, encoder, folder / "tables", seeds, train, progress, told
    )
    result: dict[str, Any] = {}
    for name, run in runs.items():
        result[name] = {"in_distribution": section(run.in_distribution())}
        if name in TASK_TABLES:
            units = run.leave_one_task_out()
            result[name]["leave_one_task_out"] = {
                "all": section(over_domains(units)),
                "tasks": {task: section(of_task) for task, of_task in units.items()},
            }
    return result


_PARTS = {
    "in_distribution": _in_distribution,
    "leave_one_domain_out": _leave_one_domain_out,
    "growth": _growth,
    "changes": _changes,
    "ablations": _ablations,
    "live": _live,
}

if __name__ == "__main__":
    main()
