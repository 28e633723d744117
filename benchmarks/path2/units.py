"""One unit of a run: what the contenders reached on some test questions, kept in a file.

A unit is written when it is complete, and a run that finds its file does not do it again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.path2.baselines import (
    CASCADE,
    KNN,
    RIDGE,
    TOP_P,
    one_step_qualities,
    tuned_cascade,
)
from benchmarks.path2.data import Learnt
from rl.evaluate.policies import ask
from rl.ppo.replay import with_rule
from rl.ppo.rollout import PATH_2_ALONE, Chooser, GatedPolicy, Greedy, Requests, roll_out, run_once
from rl.ppo.table import ReplayTable
from rl.ppo.teacher import Teacher
from rl.ppo.torch_policy_net import TorchPolicyNet
from serve_app.router.policy.policy_net import PolicyNet
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.utility import normalised_cost, utility

Array = NDArray[np.float64]
Index = NDArray[np.intp]

ALPHAS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.9)
MAX_STEPS = 4

GATED, PATH_1, PATH_2, ONE_STEP = "gated", "path 1", "path 2", "path 2, one step"
ORACLE, BEST_SINGLE, HINDSIGHT = "oracle", "best single", "best single in hindsight"
COLD_START = "cold start"
"""The cards alone; only where there are cards."""
VOI, TEACHER = "voi", "teacher"
"""The rule that path 2 starts from, and the teacher of `rl.ppo.teacher`; only where answers were
kept."""
ONE_CHOICE = (PATH_1, KNN, RIDGE, TOP_P, BEST_SINGLE)
"""The contenders that choose once, by what they learnt."""
FIELDS = ("score", "costs_usd", "cost", "steps")


@dataclass(frozen=True)
class Unit:
    """What contenders reached; arrays (num_alphas, num_queries)."""

    reached: Mapping[str, Mapping[str, Array]]
    """Contender to `score`, `costs_usd`, `cost` and `steps`."""

    def utility(self, contender: str, alpha: float) -> Array:
        """(num_queries,) at one of `ALPHAS`."""
        of, row = self.reached[contender], ALPHAS.index(alpha)
        return utility(alpha, of["score"][row], of["cost"][row])

    def score(self, contender: str, alpha: float) -> Array:
        """(num_queries,) at one of `ALPHAS`."""
        score: Array = self.reached[contender]["score"][ALPHAS.index(alpha)]
        return score


def save_unit(unit: Unit, path: Path) -> None:
    """Write a unit; the file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{contender}|{name}": values.astype(np.float32)
        for contender, of in unit.reached.items()
        for name, values in of.items()
    }
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    os.replace(file.name, path)


def load_unit(path: Path) -> Unit:
    """Read a unit."""
    reached: dict[str, dict[str, Array]] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            contender, name = key.split("|")
            reached.setdefault(contender, {})[name] = arrays[key].astype(np.float64)
    return Unit(reached)


def contend(
    learnt: Learnt, rule: ClusterRule, test: ReplayTable, known: Mapping[float, int]
) -> Unit:
    """Let everyone answer the test questions.

    Args:
        learnt: The router.
        rule: Its path 1, as it serves.
        test: What the pairs answer, and the mean dollars that costs are counted in; what the router
            expects to pay is the rule's affair.
        known: Alpha to the column of the pair that was best on the training questions.
    """
    table = with_rule(test, rule)
    expected: dict[str, NDArray[np.float32]] = {}
    if learnt.train is not None and learnt.train.pairs == test.pairs:
        expected = one_step_qualities(learnt.train, test.embeddings, learnt.seed)
    if test.similarity.any():
        expected[COLD_START] = test.similarity
    policy = GatedPolicy(learnt.net, rule, learnt.threshold, table, MAX_STEPS)
    alone, once = policy.alone(), GatedPolicy(learnt.net, rule, PATH_2_ALONE, table, 1)
    choices = ask(PATH_1, rule, table.embeddings, table.encoder, table.pairs, ALPHAS)
    everyone: dict[str, list[Requests]] = {}
    for row, alpha in enumerate(ALPHAS):
        usd = test.pair_costs_usd
        utilities = _utilities(test, alpha)
        singles = {
            BEST_SINGLE: known[alpha],
            HINDSIGHT: int(utilities.mean(axis=0).argmax()),
        }
        found = {
            GATED: policy.answer(table, alpha, pair_costs_usd=usd),
            PATH_1: run_once(test, choices.chosen[row], choices.confidence[row]),
            PATH_2: alone.answer(table, alpha, pair_costs_usd=usd),
            ONE_STEP: once.answer(table, alpha, pair_costs_usd=usd),
            ORACLE: _run_once(test, utilities.argmax(axis=1)),
        }
        for name, quality in expected.items():
            by_name = _by_quality(test, alpha, quality.astype(np.float64))
            found[name] = _run_once(test, by_name.argmax(axis=1))
        for name, chooser in _choosers(learnt, table, alpha).items():
            found[name] = roll_out(chooser, table, alpha, max_steps=MAX_STEPS, pair_costs_usd=usd)
        found |= {
            name: _run_once(test, np.full(test.num_queries, column))
            for name, column in singles.items()
        }
        for name, requests in found.items():
            everyone.setdefault(name, []).append(requests)
    return Unit({name: _stacked(sweep) for name, sweep in everyone.items()})


def _choosers(learnt: Learnt, table: ReplayTable, alpha: float) -> dict[str, Chooser]:
    """The contenders that look at answers, beside path 2; none where no answers were kept."""
    train, evidence = learnt.train, learnt.evidence
    if table.judges is None:
        return {}
    untrained = PolicyNet(TorchPolicyNet(table.embeddings.shape[1]).to_tensors())
    found: dict[str, Chooser] = {VOI: Greedy(untrained)}
    if train is None or evidence is None or train.pairs != table.pairs:
        return found
    found[CASCADE] = tuned_cascade(train, evidence.alone[0], evidence.decided, alpha)
    judges = replace(table.judges, alone=evidence.alone)
    found[TEACHER] = Teacher(replace(train, judges=judges), table)
    return found


def best_known(
    train: ReplayTable, alphas: Sequence[float] = ALPHAS, columns: Sequence[int] | None = None
) -> dict[float, int]:
    """The column of the best pair on some questions, by alpha; only of those columns."""
    allowed = np.arange(train.num_pairs) if columns is None else np.asarray(columns)
    return {
        alpha: int(allowed[_utilities(train, alpha)[:, allowed].mean(axis=0).argmax()])
        for alpha in alphas
    }


def joined(units: Sequence[Unit]) -> Unit:
    """Units of different questions as one."""
    names = set.intersection(*(set(unit.reached) for unit in units))
    return Unit(
        {
            name: {
                field: np.concatenate([unit.reached[name][field] for unit in units], axis=1)
                for field in FIELDS
            }
            for name in sorted(names)
        }
    )


def _utilities(table: ReplayTable, alpha: float) -> Array:
    return _by_quality(table, alpha, table.score[0].astype(np.float64))


def _by_quality(table: ReplayTable, alpha: float, quality: Array) -> Array:
    utilities = utility(alpha, quality, normalised_cost(table.pair_costs_usd))
    return np.where(table.measured[0], utilities, -1.0)


def _run_once(table: ReplayTable, chosen: NDArray[np.intp]) -> Requests:
    return run_once(table, chosen, np.ones(len(chosen)))


def _stacked(sweep: Sequence[Requests]) -> dict[str, Array]:
    return {name: np.stack([getattr(of, name) for of in sweep]) for name in FIELDS}
