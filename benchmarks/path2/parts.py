"""The parts of a run: which routers are learnt, and on what they are asked.

Every part yields units by name; a name tells part, variant and seed. What has been learnt for one
part is used again by the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from benchmarks.path2.data import Bench, Learnt, Lesson, learn, rule_of
from benchmarks.path2.units import (
    Unit,
    best_known,
    contend,
    load_unit,
    save_unit,
)
from rl.evaluate.verified import VerifierFigures
from rl.fit.selection import FitSettings
from rl.ppo.config import TrainConfig
from rl.ppo.randomise import EnvSettings
from rl.ppo.replay import with_rule
from rl.ppo.reward import RewardSettings
from rl.ppo.table import ReplayTable
from rl.ppo.verified import said_of
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.snapshots.snapshot import RouterSnapshot
from serve_app.schemas import NO_TOOL

Index = NDArray[np.intp]

BASE = "base"
NEWCOMERS = ("added", "without")
PRICE_FACTOR = 3.0
CLUSTERS = (4, 16)
"""Numbers of clusters that the ablation of K fits alone; the paper's are 4, 8 and 16."""


@dataclass
class Run:
    """A bench, the settings of its routers, and where everything is kept."""

    bench: Bench
    folder: Path
    seeds: Sequence[int]
    fit: FitSettings
    train: TrainConfig
    on_progress: Callable[[str], None]
    cpus_per_unit: float | None = None
    """Of the task on Ray that makes a unit, beside others; `None`: units are made here, in turn."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Of the test questions."""
        return tuple(sorted(set(self.bench.test.domains)))

    def units(self, makers: Mapping[str, Callable[[Run], Unit]]) -> dict[str, Unit]:
        """Units by name; made are those that are not there.

        Args:
            makers: What makes each, of this run. No two may learn the same router.
        """
        missing = {name: make for name, make in makers.items() if not self._file(name).is_file()}
        if self.cpus_per_unit is not None:
            self._make_on_ray(missing)
        else:
            for name, make in missing.items():
                self.on_progress(name)
                self.make(name, make)
        return {name: load_unit(self._file(name)) for name in makers}

    def make(self, name: str, make: Callable[[Run], Unit]) -> None:
        """Make a unit and keep it."""
        save_unit(make(self), self._file(name))

    def _file(self, name: str) -> Path:
        return self.folder / "units" / f"{name}.npz"

    def _make_on_ray(self, makers: Mapping[str, Callable[[Run], Unit]]) -> None:
        alone = ray.put(replace(self, cpus_per_unit=None, on_progress=_say_nothing))
        task = ray.remote(num_cpus=self.cpus_per_unit, max_retries=0)(Run.make)
        under_way = [task.remote(alone, name, make) for name, make in makers.items()]
        while under_way:
            made = len(makers) - len(under_way)
            self.on_progress(f"{made} of {len(makers)} made, from {next(iter(makers))}")
            done, under_way = ray.wait(under_way)
            ray.get(done)

    def learnt(
        self,
        name: str,
        seed: int,
        *,
        rows: Index | None = None,
        columns: Index | None = None,
        fit: FitSettings | None = None,
        train: TrainConfig | None = None,
    ) -> Learnt:
        """A router, learnt unless it is there; all questions and pairs where none are named."""
        table = self.bench.train
        lesson = Lesson(
            rows=np.arange(table.num_queries) if rows is None else rows,
            columns=np.arange(table.num_pairs) if columns is None else columns,
            seed=seed,
            fit=fit or self.fit,
            train=train or self.train,
        )
        folder = self.folder / "learnt" / f"{name}-{seed}"

        def told(what: str) -> None:
            self.on_progress(f"{name}, seed {seed}: {what}")

        return learn(self.bench, lesson, folder, told)

    def without(self, domain: str) -> Index:
        """Training questions of the other domains."""
        return np.flatnonzero(np.array(self.bench.train.domains) != domain)

    def of(self, domain: str) -> ReplayTable:
        """Test questions of a domain; costs are counted as over all of them."""
        return self.bench.test.select(
            queries=np.flatnonzero(np.array(self.bench.test.domains) == domain)
        )


def _say_nothing(what: str) -> None:
    """What a task does goes untold: many run at once."""


def in_distribution(run: Run, name: str = BASE, **lesson: object) -> list[Unit]:
    """Learnt from all, asked about all; one unit per seed."""

    def make(seed: int, run: Run) -> Unit:
        bench = run.bench
        learnt = run.learnt(name, seed, **lesson)  # type: ignore[arg-type]
        return contend(learnt, rule_of(bench, learnt), bench.test, best_known(bench.train))

    return list(run.units({f"{name}-{seed}": partial(make, seed) for seed in run.seeds}).values())


def leave_one_domain_out(run: Run, name: str = BASE, **lesson: object) -> dict[str, list[Unit]]:
    """Learnt without a domain, asked about it alone; per domain one unit per seed."""

    def make(domain: str, seed: int, run: Run) -> Unit:
        bench, rows = run.bench, run.without(domain)
        learnt = run.learnt(f"{name}-without-{domain}", seed, rows=rows, **lesson)  # type: ignore[arg-type]
        known = best_known(bench.train.select(queries=rows))
        return contend(learnt, rule_of(bench, learnt), run.of(domain), known)

    return _by_group(run, run.domains, f"{name}-without-{{}}", make)


def _by_group(
    run: Run, groups: Iterable[str], name: str, make: Callable[[str, int, Run], Unit]
) -> dict[str, list[Unit]]:
    """Per group one unit per seed; `name` has the group's place in it."""
    names = {group: [f"{name.format(group)}-{seed}" for seed in run.seeds] for group in groups}
    makers = {
        of: partial(make, group, seed)
        for group, own in names.items()
        for seed, of in zip(run.seeds, own, strict=True)
    }
    units = run.units(makers)
    return {group: [units[of] for of in own] for group, own in names.items()}


def verifier_of(run: Run, learnt: Learnt, domain: str) -> VerifierFigures | None:
    """How well a router's verifier tells the answers of a domain apart; `None`: it has none."""
    if not learnt.snapshot.verifier:
        return None
    table = with_rule(run.of(domain), rule_of(run.bench, learnt))
    return said_of(table, learnt.snapshot).figures()


def newcomers(table: ReplayTable) -> dict[str, Index]:
    """Each model with a tool, as they would join: the columns of the pairs of either.

    The tool is the one that the model does best with, so the newcomers matter.
    """
    joining = {}
    scores = table.score[0].mean(axis=0)
    for model_id in sorted({pair.model_id for pair in table.pairs}):
        own = [
            column
            for column, pair in enumerate(table.pairs)
            if pair.model_id == model_id and pair.tool_id != NO_TOOL
        ]
        tool_id = table.pairs[max(own, key=lambda column: scores[column])].tool_id
        joining[f"{model_id}+{tool_id}"] = np.array(
            [
                column
                for column, pair in enumerate(table.pairs)
                if pair.model_id == model_id or pair.tool_id == tool_id
            ]
        )
    return joining


def growth(run: Run) -> dict[str, dict[str, list[Unit]]]:
    """A model and a tool that training never saw, added by their cards alone.

    Returns:
        Newcomers to `without` them and with them `added`, one unit per seed each.
    """
    joining = newcomers(run.bench.train)

    def learnt_before(name: str, seed: int, run: Run) -> tuple[Learnt, Index]:
        old = np.setdiff1d(np.arange(run.bench.train.num_pairs), joining[name])
        return run.learnt(f"before-{name}", seed, columns=old), old

    def without(name: str, seed: int, run: Run) -> Unit:
        bench, (learnt, old) = run.bench, learnt_before(name, seed, run)
        # The smaller pool's costs are counted on the whole pool's scale, so that gains compare.
        test = bench.test.select(pairs=old)
        unit = contend(_own(learnt), rule_of(bench, learnt), test, _renumbered(bench, old))
        return _on_scale(unit, bench.test, old)

    def added(name: str, seed: int, run: Run) -> Unit:
        bench, (learnt, _) = run.bench, learnt_before(name, seed, run)
        known = best_known(bench.train)
        return contend(_own(learnt), rule_of(bench, learnt), bench.test, known)

    # Each router is learnt for the first of its units.
    units = {
        kind: _by_group(run, joining, f"growth-{{}}-{kind}", make)
        for kind, make in (("without", without), ("added", added))
    }
    return {name: {kind: units[kind][name] for kind in NEWCOMERS} for name in joining}


def _own(learnt: Learnt) -> Learnt:
    """The router without what methods that are learnt beside it would learn from."""
    return replace(learnt, train=None)


def changes(run: Run) -> dict[str, list[Unit]]:
    """The pool changed under routers that learnt from all of it; per change one unit per seed.

    A model leaves; a pair breaks down and answers as its model does without the tool; a model
    becomes three times as dear, and the router is told so.
    """
    bench = run.bench
    makers: dict[str, Callable[[Learnt], Unit]] = {}
    for model_id in sorted({pair.model_id for pair in bench.test.pairs}):
        of_model = np.array([pair.model_id == model_id for pair in bench.test.pairs])
        makers[f"without {model_id}"] = partial(_shrunk, bench, np.flatnonzero(~of_model))
        factors = np.where(of_model, PRICE_FACTOR, 1.0)
        makers[f"{model_id} three times as dear"] = partial(_dearer, bench, factors)
    for column, plain in _breakable(bench.train).items():
        makers[f"{bench.test.pairs[column]} broken"] = partial(_degraded, bench, column, plain)

    for seed in run.seeds:
        run.learnt(BASE, seed)

    def make(name: str, seed: int, run: Run) -> Unit:
        return makers[name](_own(run.learnt(BASE, seed)))

    return _by_group(run, makers, "change-{}", make)


def lessons(run: Run) -> dict[str, dict[str, Any]]:
    """How routers are learnt without one part of the reward, later steps, or other clusters."""

    def trained(env: EnvSettings) -> TrainConfig:
        return run.train.model_copy(update={"env": env})

    def rewarded(reward: RewardSettings) -> TrainConfig:
        return trained(replace(run.train.env, reward=reward))

    changed: dict[str, dict[str, Any]] = {
        "no R_sel": {"train": rewarded(RewardSettings(selection_penalty=0.0))},
        "no R_fmt": {"train": rewarded(RewardSettings(format_penalty=0.0))},
        "no cost": {"train": rewarded(RewardSettings(cost_weight=0.0))},
        "one step": {"train": trained(replace(run.train.env, max_steps=1))},
    }
    for size in CLUSTERS:
        changed[f"K {size}"] = {"fit": replace(run.fit, clusterings=((size, 1),))}
    return changed


def ablations(
    run: Run, taught: Mapping[str, Mapping[str, Any]], encoders: Mapping[str, Bench]
) -> dict[str, tuple[list[Unit], dict[str, list[Unit]]]]:
    """What each part of the reward, the number of clusters, and the encoder is worth.

    Args:
        run: Of the seeds that are wanted.
        taught: `lessons`, or some of them.
        encoders: Name of another encoder to the same profile seen with it.

    Returns:
        What is changed, to the units in distribution and those out of it.
    """
    units = {
        name: (in_distribution(run, name, **lesson), leave_one_domain_out(run, name, **lesson))
        for name, lesson in taught.items()
    }
    for name, bench in encoders.items():
        other = replace(run, bench=bench)
        units[f"encoder: {name}"] = in_distribution(other, name), leave_one_domain_out(other, name)
    return units


def _renumbered(bench: Bench, columns: Index) -> dict[float, int]:
    return best_known(bench.train.select(pairs=columns))


def _on_scale(unit: Unit, whole: ReplayTable, columns: Index) -> Unit:
    """A smaller pool's unit with costs on the scale of the whole one."""
    of_part, of_whole = (
        np.log(np.maximum(part[part > 0], 1e-30))
        for part in (whole.pair_costs_usd[columns], whole.pair_costs_usd)
    )
    width = (of_part.max() - of_part.min()) / (of_whole.max() - of_whole.min())
    offset = (of_part.min() - of_whole.min()) / (of_whole.max() - of_whole.min())
    return Unit(
        {name: {**of, "cost": offset + width * of["cost"]} for name, of in unit.reached.items()}
    )


def _breakable(table: ReplayTable) -> dict[int, int]:
    """Columns of each model's best pair with a tool, to that of the model alone."""
    scores = table.score[0].mean(axis=0)
    index = {pair: column for column, pair in enumerate(table.pairs)}
    found = {}
    for model_id in sorted({pair.model_id for pair in table.pairs}):
        own = [column for column, pair in enumerate(table.pairs) if pair.model_id == model_id]
        best = max(own, key=lambda column: scores[column])
        plain = index.get(table.pairs[best]._replace(tool_id=NO_TOOL))
        if plain is not None and plain != best:
            found[best] = plain
    return found


def _broken(table: ReplayTable, column: int, plain: int) -> ReplayTable:
    """The pair answers as the model alone, and still costs what it did."""
    changed = {}
    for name in ("score", "logprob", "answer_key", "answer_row", "measured"):
        values = getattr(table, name).copy()
        values[:, :, column] = values[:, :, plain]
        changed[name] = values
    return replace(table, **changed)


def _shrunk(bench: Bench, staying: Index, learnt: Learnt) -> Unit:
    test = bench.test.select(pairs=staying)
    return contend(learnt, rule_of(bench, learnt), test, _renumbered(bench, staying))


def _degraded(bench: Bench, column: int, plain: int, learnt: Learnt) -> Unit:
    test, train = (_broken(table, column, plain) for table in (bench.test, bench.train))
    return contend(learnt, rule_of(bench, learnt), test, best_known(train))


def _dearer(bench: Bench, factors: NDArray[np.floating], learnt: Learnt) -> Unit:
    """All dollars times a factor per pair; the router's prices too."""

    def priced(table: ReplayTable) -> ReplayTable:
        return replace(
            table,
            costs_usd=(table.costs_usd * factors).astype(np.float32),
            pair_costs_usd=(table.pair_costs_usd * factors).astype(np.float32),
        )

    snapshot: RouterSnapshot = replace(
        learnt.snapshot,
        costs_usd=(learnt.snapshot.costs_usd * factors).astype(np.float32),
        pair_costs_usd=(learnt.snapshot.pair_costs_usd * factors).astype(np.float32),
    )
    rule = ClusterRule(snapshot, bench.prior)
    return contend(learnt, rule, priced(bench.test), best_known(priced(bench.train)))
