"""The parts of the benchmark: every method on a table, unseen tasks, a new arm, calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.routing.data import Table
from benchmarks.routing.methods import METHODS, Problem, fit_rule, outcomes_of, rule_quality
from benchmarks.routing.metrics import Evaluation, Figure, figures, mean_figure, resamples, sweep
from rl.fit.fit import fit
from rl.fit.pareto import ALPHAS, sweep_choices
from rl.fit.selection import FitSettings
from serve_app.router.rules.beliefs import Prior
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.gate import NEAR_ORACLE
from serve_app.router.rules.utility import normalised_cost
from serve_app.schemas import LOCAL_OWNER, Pair

Array = NDArray[np.float32]
Index = NDArray[np.intp]
Choices = dict[str, Index]

OURS = "atlas"
MIN_TASK_QUERIES = 20
"""Test queries a task needs to be held out as a whole."""
NEW_ARM_LABELS = (0, 10, 30, 100)
_NUM_BINS = 5


@dataclass(frozen=True)
class Bench:
    """A table with its embeddings, and how it is fitted."""

    table: Table
    embeddings: Array
    encoder: str
    seed: int


def problem_of(bench: Bench, train: Index, test: Index) -> tuple[Problem, Evaluation]:
    """Dense training side and evaluation of some rows of a table."""
    table = bench.table
    means = np.nan_to_num(np.nanmean(table.scores[train], axis=0))
    costs_usd = np.nanmean(table.costs_usd[train], axis=0)
    costs_usd = np.where(np.isfinite(costs_usd), costs_usd, np.nanmean(costs_usd))
    known = np.isfinite(table.scores)
    problem = Problem(
        train=bench.embeddings[train],
        scores=np.where(known[train], table.scores[train], means).astype(np.float64),
        train_costs_usd=np.where(known[train], table.costs_usd[train], costs_usd),
        costs_usd=costs_usd,
        test=bench.embeddings[test],
        seed=bench.seed,
    )
    evaluation = Evaluation(
        scores=np.nan_to_num(table.scores[test]).astype(np.float64),
        costs_usd=np.where(known[test], table.costs_usd[test], costs_usd),
        train_costs_usd=costs_usd,
        best_single=int(means.argmax()),
    )
    return problem, evaluation


def references(bench: Bench, problem: Problem, evaluation: Evaluation, test: Index) -> Choices:
    """The choices of routers that need no model: arms, tasks, chance and hindsight."""
    num_queries, num_pairs = evaluation.scores.shape
    choices = {
        str(pair): np.full((1, num_queries), position)
        for position, pair in enumerate(bench.table.pairs)
    }
    choices["single_arm_envelope"] = np.repeat(np.arange(num_pairs)[:, None], num_queries, axis=1)
    rng = np.random.default_rng(bench.seed)
    choices["random"] = rng.integers(num_pairs, size=(1, num_queries))
    oracle = evaluation.scores.astype(np.float32)
    choices["oracle"] = sweep_choices(oracle, problem.cost, ALPHAS)
    tasks, train = bench.table.tasks, bench.table.train
    quality = np.empty(oracle.shape, np.float32)
    for task in np.unique(tasks[test]):
        seen = problem.scores[tasks[train] == task] if len(train) == len(problem.train) else ()
        quality[tasks[test] == task] = (
            np.mean(seen, axis=0) if len(seen) else problem.scores.mean(axis=0)
        )
    choices["best_arm_per_task"] = sweep_choices(quality, problem.cost, ALPHAS)
    return choices


def learned(
    bench: Bench, problem: Problem, train: Index, advance: Callable[[str], None]
) -> tuple[Choices, ClusterRule]:
    """The choices of every learned router, ours last, and our rule."""
    choices: Choices = {}
    for name, method in METHODS.items():
        advance(name)
        choices[name] = sweep_choices(method(problem), problem.cost, ALPHAS)
    advance(OURS)
    rule = fit_rule(bench.table, bench.embeddings, train, bench.encoder, bench.seed)
    choices[OURS] = sweep_choices(rule_quality(rule, problem.test), rule.costs, ALPHAS)
    return choices, rule


def all_figures(
    evaluation: Evaluation, choices: Choices, seed: int
) -> dict[str, dict[str, Figure]]:
    """Figures by method, with the same resamples for all."""
    weights = resamples(len(evaluation.scores), seed)
    return {method: figures(evaluation, chosen, weights) for method, chosen in choices.items()}


def frontier(evaluation: Evaluation, choices: Index) -> tuple[list[float], list[float]]:
    """Costs and scores of a sweep's best points, ascending: what the figure draws."""
    whole = np.full((1, choices.shape[1]), 1 / choices.shape[1])
    scores, costs_usd = (part[0] for part in sweep(evaluation, np.unique(choices, axis=0), whole))
    order = np.argsort(costs_usd, kind="stable")
    best = np.maximum.accumulate(scores[order])
    keep = np.concatenate([[True], np.diff(best) > 0])
    return costs_usd[order][keep].tolist(), best[keep].tolist()


def leave_one_task_out(
    bench: Bench, advance: Callable[[str], None]
) -> dict[str, dict[str, Figure | float | int]]:
    """Per task: fit on every other one, route this one's test queries.

    Returns:
        task -> the figures of ours, `best_single` (that of the other tasks), their difference at
        the best point of the sweep and at alpha 0, and how often the gate raised its hand.
    """
    table = bench.table
    results: dict[str, dict[str, Figure | float | int]] = {}
    for task in np.unique(table.tasks):
        train = table.train[table.tasks[table.train] != task]
        test = table.test[table.tasks[table.test] == task]
        if len(test) < MIN_TASK_QUERIES or not len(train):
            continue
        advance(f"without {task}")
        problem, evaluation = problem_of(bench, train, test)
        rule = fit_rule(table, bench.embeddings, train, bench.encoder, bench.seed)
        choices = sweep_choices(rule_quality(rule, problem.test), rule.costs, ALPHAS)
        weights = resamples(len(test), bench.seed)
        of_ours = figures(evaluation, choices, weights)
        single = evaluation.scores[:, evaluation.best_single]
        at_zero = evaluation.scores[np.arange(len(test)), choices[0]]
        best_score = of_ours["max_score"].value or 0.0
        raised = np.mean([not rule.judge(query).inside for query in problem.test])
        results[str(task)] = {
            **of_ours,
            "num_queries": len(test),
            "best_single_score": float(single.mean()),
            "max_score_minus_best_single": best_score - float(single.mean()),
            "alpha_0_minus_best_single": mean_figure(at_zero - single, weights),
            "gate_raised": float(raised),
        }
    return results


def new_arm(
    bench: Bench, arm: int, train: Index, test: Index
) -> dict[str, dict[str, float | None] | str]:
    """Hide one arm in training, add it to the running rule, and label a few queries.

    The few labels go through the rule's own online learning; the arm's price is known from the
    start. `recovered` is the share of the full-label gain in `aiq_log` over never having the arm;
    `None` where the arm gains less than a tenth of a point.
    """
    table = bench.table
    problem, evaluation = problem_of(bench, train, test)
    kept = [position for position in range(len(table.pairs)) if position != arm]
    without = Table(
        name=table.name,
        queries=table.queries,
        tasks=table.tasks,
        is_test=table.is_test,
        pairs=tuple(table.pairs[position] for position in kept),
        scores=table.scores[:, kept],
        tokens=table.tokens[:, kept],
        costs_usd=table.costs_usd[:, kept],
    )
    prices = np.log(problem.costs_usd).astype(np.float32)[:, None]
    outcomes = outcomes_of(without, bench.embeddings, train, bench.encoder)
    snapshot = fit(outcomes, FitSettings(seed=bench.seed), descriptors=prices[kept])
    new_pair = table.pairs[arm]
    prior = Prior(
        pairs=(new_pair,),
        costs_usd=problem.costs_usd[[arm]].astype(np.float32),
        similarities=lambda embedding: np.zeros(1, np.float32),
        descriptors=prices[[arm]],
    )

    def area(rule: ClusterRule) -> float:
        quality = rule_quality(rule, problem.test)
        return _area(evaluation, table.pairs, rule.pairs, quality, problem.costs_usd)

    whole = fit_rule(table, bench.embeddings, train, bench.encoder, bench.seed)
    floor, ceiling = area(ClusterRule(snapshot)), area(whole)
    labelled = np.random.default_rng(bench.seed).permutation(train)
    recovered: dict[str, float | None] = {}
    areas: dict[str, float | None] = {"without": floor, "full": ceiling}
    rule = ClusterRule(snapshot, prior)
    given = 0
    for number in NEW_ARM_LABELS:
        for row in labelled[given:number]:
            if np.isfinite(table.scores[row, arm]):
                score = float(table.scores[row, arm])
                rule.update(bench.embeddings[row], new_pair, score, LOCAL_OWNER)
        given = number
        areas[str(number)] = area(rule)
        gain = ceiling - floor
        recovered[str(number)] = (area(rule) - floor) / gain if gain >= 0.001 else None
    return {"arm": str(new_pair), "aiq_log": areas, "recovered": recovered}


def calibration(rule: ClusterRule, problem: Problem, evaluation: Evaluation) -> dict[str, object]:
    """Reliability of the gate's confidence on the evaluated queries at alpha 0.

    Returns:
        Per fifth of the queries by confidence: the mean confidence and the share of decisions
        within `NEAR_ORACLE` of the oracle pair; and their rank correlation over queries.
    """
    chosen = rule_quality(rule, problem.test).argmax(axis=1)
    confidence = np.array([rule.judge(query).confidence for query in problem.test])
    reached = evaluation.scores[np.arange(len(chosen)), chosen]
    is_right = reached >= evaluation.scores.max(axis=1) - NEAR_ORACLE
    bins = np.array_split(np.argsort(confidence, kind="stable"), _NUM_BINS)
    shares = [float(is_right[rows].mean()) for rows in bins]
    means = [float(confidence[rows].mean()) for rows in bins]
    return {
        "confidence": means,
        "share_near_oracle": shares,
        "expected_calibration_error": float(np.abs(np.subtract(shares, means)).mean()),
        "rises": bool(shares[-1] > shares[0]),
        "correlation": float(np.corrcoef(confidence, is_right)[0, 1])
        if is_right.any() and not is_right.all() and confidence.std() > 0
        else None,
    }


def _area(
    evaluation: Evaluation,
    all_pairs: tuple[Pair, ...],
    pairs: tuple[Pair, ...],
    quality: Array,
    costs_usd: NDArray[np.float64],
) -> float:
    """`aiq_log` of qualities whose pairs are some of the table's, in another order."""
    place = np.array([all_pairs.index(pair) for pair in pairs])
    cost = normalised_cost(costs_usd)[place]
    choices = place[sweep_choices(quality, cost, ALPHAS)]
    whole = np.full((1, choices.shape[1]), 1 / choices.shape[1])
    return figures(evaluation, choices, whole)["aiq_log"].value or 0.0
