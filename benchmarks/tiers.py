"""Whether further steps can pay on a pool, and what the learned rules make of that.

What: on the held-out questions of a profile, what the best single choice reaches at each price
(path 1, the best candidate of each domain, an oracle that knows how often each candidate is right),
what a cascade with a perfect verifier reaches, and what `atlas fit --voi` reaches.
How: profile the deployment with `--samples 2` or more, then `python -m benchmarks.tiers
--deployment configs/nano-tiers.yaml --out FILE.json`. The profile is read from the deployment's
store, which also keeps the snapshot.
Results: the JSON, a figure beside it, and the targets on the terminal.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.path2.units import ALPHAS
from benchmarks.serving import show_targets
from benchmarks.stats import Target
from rl.comparison import evaluate_snapshot
from rl.evaluate.evaluate import COLD_START, PATH_1, VOI, EvaluationReport
from rl.evaluate.policies import resampled_means
from rl.fit.dataset import Dataset, read_dataset
from rl.publish import fit_snapshot, keep_snapshot
from serve_app.config import AtlasConfig, load_config
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.utility import normalised, pool_range, utility
from serve_app.router.snapshots.build_rule import read_cards
from serve_app.router.snapshots.snapshot import RULE, RouterSnapshot
from serve_app.store import Store

MAX_STEPS = 4
WANTED_HEADROOM = 0.10
ONE_STEP, PER_DOMAIN, ORACLE = "path 1", "best of each domain", "oracle in expectation"
VERIFIED, VERIFIED_DOMAIN = "path 1 and a perfect verifier", "domain and a perfect verifier"
_RIGHT = 0.999
_RESAMPLES = 2000

Floats = NDArray[np.float64]
console = Console()


@dataclass(frozen=True)
class Samples:
    """Questions on which every candidate was run equally often."""

    scores: Floats
    """(num_samples, num_queries, num_pairs) in [0, 1]."""
    costs_usd: Floats
    """(num_samples, num_queries, num_pairs)"""
    domains: NDArray[np.str_]
    """(num_queries,)"""
    embeddings: NDArray[np.float32]
    """(num_queries, dim)"""

    @property
    def pair_costs_usd(self) -> Floats:
        """(num_pairs,) means."""
        means: Floats = self.costs_usd.mean(axis=(0, 1))
        return means


@dataclass(frozen=True)
class Frontier:
    """What a way to choose reaches, by ascending alpha."""

    costs_usd: Floats
    """(num_alphas, num_queries) of all runs."""
    scores: Floats
    """(num_alphas, num_queries)"""
    steps: Floats
    """(num_alphas, num_queries) runs."""

    def points(self) -> list[dict[str, float]]:
        """Means over the questions."""
        return [
            {"alpha": alpha, "usd": float(usd.mean()), "score": float(score.mean()),
             "steps": float(steps.mean())}
            for alpha, usd, score, steps in zip(
                ALPHAS, self.costs_usd, self.scores, self.steps, strict=True
            )
        ]  # fmt: skip


def read_samples(dataset: Dataset) -> Samples:
    """The questions of a profile on which every candidate has as many samples as any.

    Raises:
        ValueError: If there is none.
    """
    outcomes = dataset.outcomes
    shape = (len(outcomes.embeddings), len(outcomes.pairs))
    number = np.zeros(shape, np.intp)
    of_outcome = np.empty(len(outcomes.score), np.intp)
    for row, place in enumerate(zip(outcomes.query_index, outcomes.pair_index, strict=True)):
        of_outcome[row] = number[place]
        number[place] += 1
    most = int(number.max())
    whole = np.flatnonzero((number == most).all(axis=1))
    if not len(whole):
        raise ValueError("no question has every candidate's outcome")
    dense = np.full((2, most, *shape), np.nan)
    for layer, values in enumerate((outcomes.score, outcomes.costs_usd)):
        dense[layer, of_outcome, outcomes.query_index, outcomes.pair_index] = values
    scores, costs_usd = dense[:, :, whole]
    means = np.nanmean(costs_usd, axis=(0, 1))
    return Samples(
        scores,
        np.where(np.isfinite(costs_usd), costs_usd, means),
        np.array(dataset.domains)[whole],
        outcomes.embeddings[whole],
    )


def one_step(held_out: Samples, quality: Floats) -> Frontier:
    """Each question's candidate of the highest expected utility, once.

    Args:
        held_out: What the candidates answer.
        quality: (num_queries, num_pairs) expected scores.
    """
    cost = normalised(held_out.pair_costs_usd, pool_range(held_out.pair_costs_usd))
    rows = np.arange(quality.shape[0])
    scores, costs_usd = held_out.scores.mean(axis=0), held_out.costs_usd.mean(axis=0)
    chosen = [utility(alpha, quality, cost).argmax(axis=1) for alpha in ALPHAS]
    return Frontier(
        np.stack([costs_usd[rows, of] for of in chosen]),
        np.stack([scores[rows, of] for of in chosen]),
        np.ones((len(ALPHAS), len(rows))),
    )


def expected_oracle(held_out: Samples) -> Frontier:
    """Who knows how often each candidate is right on the question, judged on other runs.

    Each sample is judged by a choice that saw the others alone.
    """
    size = len(held_out.scores)
    parts = []
    for sample in range(size):
        others = [number for number in range(size) if number != sample] or [sample]
        alone = Samples(
            held_out.scores[[sample]],
            held_out.costs_usd[[sample]],
            held_out.domains,
            held_out.embeddings,
        )
        parts.append(one_step(alone, held_out.scores[others].mean(axis=0)))
    return _mean(parts)


def of_domains(held_out: Samples, train: Dataset) -> Floats:
    """(num_queries, num_pairs) mean scores on the training questions of each question's domain.

    Each candidate is judged on those of them that it was asked.
    """
    sums, counts = (of.toarray() for of in train.outcomes.matrices(train.outcomes.score))
    domains = np.array(train.domains)

    def means(rows: NDArray[np.bool_]) -> Floats:
        asked = counts[rows].sum(axis=0)
        found: Floats = sums[rows].sum(axis=0) / np.maximum(asked, 1)
        return found

    overall = means(np.ones(len(domains), np.bool_))
    known = {domain: means(domains == domain) for domain in set(train.domains)}
    return np.stack([known.get(domain, overall) for domain in held_out.domains.tolist()])


def perfect_cascade(held_out: Samples, quality: Floats) -> Frontier:
    """Who sees whether an answer is right, and asks on while it is not and that is worth its price.

    Args:
        held_out: What the candidates answer.
        quality: (num_queries, num_pairs) expected scores, the order in which candidates are asked.
    """
    usd = held_out.pair_costs_usd
    log_range = pool_range(usd)
    size, num_queries, _ = held_out.scores.shape
    shape = (size, len(ALPHAS), num_queries)
    costs_usd, scores, steps = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for row, alpha in enumerate(ALPHAS):
        for query in range(num_queries):
            order = list(_order(quality[query], usd, log_range, alpha))
            for sample in range(size):
                best = 0.0
                for pair in order:
                    best = max(best, held_out.scores[sample, query, pair])
                    costs_usd[sample, row, query] += held_out.costs_usd[sample, query, pair]
                    steps[sample, row, query] += 1
                    if best >= _RIGHT:
                        break
                scores[sample, row, query] = best
    return _mean([Frontier(*of) for of in zip(costs_usd, scores, steps, strict=True)])


def _order(quality: Floats, usd: Floats, log_range: Floats, alpha: float) -> Iterator[int]:
    """Candidates in the order in which they are asked, while none was right."""
    spent, left = 0.0, set(range(len(usd)))
    for step in range(min(MAX_STEPS, len(usd))):
        places = sorted(left)
        before = normalised(np.array([spent]), log_range) if step else np.zeros(1)
        rise = normalised(spent + usd[places], log_range) - before
        gained = utility(alpha, quality[places], rise)
        best = int(gained.argmax())
        if step and gained[best] <= 0:
            return
        yield places[best]
        left.remove(places[best])
        spent += float(usd[places[best]])


def _mean(parts: list[Frontier]) -> Frontier:
    return Frontier(
        np.mean([part.costs_usd for part in parts], axis=0),
        np.mean([part.scores for part in parts], axis=0),
        np.mean([part.steps for part in parts], axis=0),
    )


def headroom(cascade: Frontier, others: list[Frontier]) -> dict[str, float]:
    """How far the cascade is above the best of the others that costs no more; where it is farthest.

    Returns:
        The difference in mean score, its 95% interval over the questions, and what both cost.
    """
    best: dict[str, float] = {}
    for cost, score in zip(cascade.costs_usd, cascade.scores, strict=True):
        affordable = [
            (float(scores.mean()), float(usd.mean()), scores)
            for other in others
            for usd, scores in zip(other.costs_usd, other.scores, strict=True)
            if usd.mean() <= cost.mean()
        ]
        if not affordable:
            continue
        reached, usd, scores = max(affordable, key=lambda of: of[0])
        difference = score - scores
        if best and difference.mean() <= best["difference"]:
            continue
        draws = resampled_means(difference[:, None], _RESAMPLES, 0)
        low, high = np.percentile(draws, [2.5, 97.5])
        best = {
            "difference": float(difference.mean()),
            "low": float(low),
            "high": float(high),
            "score": float(score.mean()),
            "usd": float(cost.mean()),
            "one_step_score": reached,
            "one_step_usd": usd,
        }
    return best


async def _measured(
    config: AtlasConfig,
) -> tuple[Dataset, Dataset, RouterSnapshot, EvaluationReport]:
    store = await Store.open(config.store_url())
    try:
        train, held_out = [
            await read_dataset(config, store, split) for split in ("train", "held_out")
        ]
        with console.status("fitting"):
            snapshot_id, snapshot = await fit_snapshot(
                config, store, with_traffic=False, by_value=True
            )
        with console.status("evaluating"):
            once = {key: of for key, of in snapshot.metadata.items() if key != RULE}
            path_1 = await keep_snapshot(config, store, replace(snapshot, metadata=once))
            report = await evaluate_snapshot(config, store, snapshot_id, path_1)
    finally:
        await store.close()
    return train, held_out, snapshot, report


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--deployment", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    config = load_config(options.deployment)
    train_set, held_out_set, snapshot, report = asyncio.run(_measured(config))
    held_out = read_samples(held_out_set)
    rule = ClusterRule(snapshot, read_cards(config).prior)
    quality = np.stack([rule.beliefs(of).quality for of in held_out.embeddings]).astype(np.float64)
    by_domain = of_domains(held_out, train_set)
    frontiers = {
        ONE_STEP: one_step(held_out, quality),
        PER_DOMAIN: one_step(held_out, by_domain),
        ORACLE: expected_oracle(held_out),
        VERIFIED: perfect_cascade(held_out, quality),
        VERIFIED_DOMAIN: perfect_cascade(held_out, by_domain),
    }
    room = {
        "by path 1": headroom(frontiers[VERIFIED], [frontiers[ONE_STEP]]),
        "by domain": headroom(frontiers[VERIFIED_DOMAIN], [frontiers[PER_DOMAIN]]),
        "by domain, over the oracle": headroom(frontiers[VERIFIED_DOMAIN], [frontiers[ORACLE]]),
    }
    targets = _targets(room, report)
    record: dict[str, Any] = {
        "pairs": [str(pair) for pair in held_out_set.outcomes.pairs],
        "questions": len(held_out.scores[0]),
        "samples": len(held_out.scores),
        "domains": sorted(set(held_out.domains.tolist())),
        "frontiers": {name: of.points() for name, of in frontiers.items()},
        "headroom": room,
        "learned": _learned(report),
        "verifier": {name: asdict(of) for name, of in report.verifier.items()},
        "targets": [target.as_json() for target in targets],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    _draw(record, report, options.out.with_suffix(".png"))
    _show(record)
    show_targets(targets)


def _learned(report: EvaluationReport) -> dict[str, Any]:
    """Score, dollars and steps of what was fitted, at alpha 0 and the deployment's alpha."""
    names = (PATH_1, VOI, COLD_START)
    return {
        f"alpha {one.alpha:g}": {
            **{name: asdict(one.contenders[name]) for name in names if name in one.contenders},
            "voi over path 1": asdict(one.difference),
        }
        for one in report.at_alpha
        if one.alpha in (0.0, report.settings.default_alpha)
    }


def _targets(room: dict[str, dict[str, float]], report: EvaluationReport) -> list[Target]:
    free = next(one for one in report.at_alpha if one.alpha == 0.0)
    least = min(room[name].get("difference", 0.0) for name in ("by path 1", "by domain"))
    gain = free.difference.score
    return [
        Target("a perfect verifier over one choice of equal cost", least, ">=", WANTED_HEADROOM),
        Target("voi over path 1 in score, alpha 0", gain.mean, ">=", 0.03),
        Target("the lower end of its interval", gain.low, ">=", 0.0),
    ]


def _show(record: dict[str, Any]) -> None:
    table = Table("alpha", *record["frontiers"], title="score at $ per 1,000 (steps)")
    for row, alpha in enumerate(ALPHAS):
        points = [points[row] for points in record["frontiers"].values()]
        cells = [f"{of['score']:.3f} {1000 * of['usd']:.4f} ({of['steps']:.2f})" for of in points]
        table.add_row(f"{alpha:g}", *cells)
    console.print(table)
    for name, room in record["headroom"].items():
        console.print(name, {key: round(value, 7) for key, value in room.items()})
    for alpha, of in record["learned"].items():
        for name, figures in of.items():
            score, usd = figures["score"], figures["cost_usd"]["mean"]
            console.print(
                f"{alpha}: {name}: {score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}] "
                f"at {1000 * usd:.4f} in {figures['steps']:.2f} steps",
                highlight=False,
            )


def _draw(record: dict[str, Any], report: EvaluationReport, path: Path) -> None:
    from matplotlib.figure import Figure

    styles = (
        ("#0077bb", "-"),
        ("#33bbee", "-"),
        ("#aaaaaa", "-"),
        ("#0077bb", ":"),
        ("#33bbee", ":"),
    )
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for (name, points), (colour, line) in zip(record["frontiers"].items(), styles, strict=True):
        usd, score = ([1000 * of["usd"] for of in points], [of["score"] for of in points])
        axes.plot(usd, score, line, marker=".", color=colour, label=name)
    swept = report.frontiers[VOI]
    usd, score = [1000 * of.cost_usd for of in swept], [of.score for of in swept]
    axes.plot(usd, score, ".-", color="#cc3311", label="value of information, fitted")
    axes.set(xscale="log", xlabel="US dollars per 1,000 questions", ylabel="mean score")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, format="png", dpi=130)


if __name__ == "__main__":
    main()
