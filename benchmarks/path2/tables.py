"""Path 2 on real outcome tables, beside path 1 and guarded kNN, with and without the task.

The tables hold no answers and no log-probabilities, so a second step has nothing to go by: what is
measured there is one decision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from rich.progress import Progress

from benchmarks.path2.data import Bench
from benchmarks.path2.parts import Run
from benchmarks.path2.units import Index, Unit, best_known, contend
from benchmarks.routing.data import Table, embeddings, find_tables, load_table
from benchmarks.routing.evaluation import MIN_TASK_QUERIES
from benchmarks.routing.methods import outcomes_of
from rl.fit.dataset import Dataset
from rl.fit.selection import FitSettings
from rl.ppo.config import TrainConfig
from rl.ppo.replay import make_table
from rl.ppo.table import ReplayTable
from serve_app.router.rules.clusters import ClusterRule

TASK_TABLES = ("llmrouter",)
"""Tables of many tasks that are left out one by one."""


class TableRun:
    """One table, and the routers that are learnt from it."""

    def __init__(
        self,
        table: Table,
        vectors: np.ndarray[tuple[int, int], np.dtype[np.float32]],
        encoder: str,
        folder: Path,
        seeds: Sequence[int],
        train: TrainConfig,
        on_progress: Callable[[str], None],
    ) -> None:
        """Lay the table out as a bench."""
        self.table, self._vectors, self._encoder = table, vectors, encoder
        bench = bench_of(table, vectors, encoder)
        env = replace(train.env, max_pairs=max(train.env.max_pairs, len(table.pairs)))
        settings = train.model_copy(update={"env": env})
        self.run = Run(bench, folder / table.name, seeds, FitSettings(), settings, on_progress)

    def in_distribution(self) -> list[Unit]:
        """One unit per seed."""
        everything = np.arange(len(self.table.train))
        return self._units("all", everything, self.run.bench.test)

    def leave_one_task_out(self) -> dict[str, list[Unit]]:
        """Per task one unit per seed; tasks with few test questions are left out."""
        table, units = self.table, {}
        for task in np.unique(table.tasks):
            rows = np.flatnonzero(table.tasks[table.train] != task)
            asked = np.flatnonzero(table.tasks[table.test] == task)
            if len(asked) < MIN_TASK_QUERIES or not len(rows):
                continue
            test = self.run.bench.test.select(queries=asked)
            units[str(task)] = self._units(f"without-{task}", rows, test)
        return units

    def _units(self, name: str, rows: Index, test: ReplayTable) -> list[Unit]:
        def make(seed: int, run: Run) -> Unit:
            learnt = run.learnt(name, seed, rows=rows)
            rule = ClusterRule(learnt.snapshot)
            known = best_known(run.bench.train.select(queries=rows))
            return contend(learnt, rule, test, known)

        makers = {f"{name}-{seed}": partial(make, seed) for seed in self.run.seeds}
        return list(self.run.units(makers).values())


def open_tables(
    data: Path,
    names: Sequence[str],
    encoder: str,
    folder: Path,
    seeds: Sequence[int],
    train: TrainConfig,
    progress: Progress,
    on_progress: Callable[[str], None],
) -> dict[str, TableRun]:
    """The named tables of a folder; those it does not have are left out."""
    files = find_tables(data)
    runs = {}
    for name in names:
        if name in files:
            table = load_table(name, files[name])
            vectors = embeddings(table, encoder, Path("build/embeddings"), progress)
            runs[name] = TableRun(table, vectors, encoder, folder, seeds, train, on_progress)
    return runs


def bench_of(
    table: Table, vectors: np.ndarray[tuple[int, int], np.dtype[np.float32]], encoder: str
) -> Bench:
    """A table as a bench; its pairs are described by their prices alone."""
    outcomes = outcomes_of(table, vectors, table.train, encoder)
    usd = np.nanmean(table.costs_usd[table.train], axis=0)
    usd = np.where(np.isfinite(usd) & (usd > 0), usd, np.nanmean(usd[usd > 0]))
    descriptors = np.log(usd).astype(np.float32)[:, None]

    def laid_out(rows: Index) -> ReplayTable:
        part = outcomes_of(table, vectors, rows, encoder)
        tasks = tuple(str(task) for task in table.tasks[rows])
        return make_table(Dataset(part, tasks), descriptors)

    return Bench(outcomes, laid_out(table.train), laid_out(table.test), None, descriptors, None)
