"""Is what a first look decides as good, does it leave unknown kinds alone, how long does it take?

How: `python -m benchmarks.first_look --data DIR --out FILE.json`. On each outcome table a router
and its first look are fitted on `train`; on `test` the area under the frontier is compared with and
without the look. On the nano pool's questions each domain is left out of the look in turn. Results:
the JSON, and the targets on the terminal.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from benchmarks.routing.data import embeddings, find_tables, load_table
from benchmarks.routing.evaluation import Bench, problem_of
from benchmarks.routing.methods import fit_rule, rule_quality
from benchmarks.routing.metrics import Evaluation, figures, resamples
from benchmarks.routing.targets import REFERENCE_AIQ_LOG
from rl.fit.look import fit_look
from rl.fit.pareto import ALPHAS, sweep_choices
from serve_app.config import EmbedderConfig, load_config
from serve_app.embedder import TextEncoder, TokenTable
from serve_app.questions import read_questions
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.first_look import FirstLook
from serve_app.router.snapshots.build_rule import read_cards
from serve_app.router.snapshots.snapshot import load_snapshot

_NANO = Path("configs/nano.yaml")
_QUESTIONS = Path("configs/nano/questions.jsonl")
_MEAN_LOSS, _MOST_LOSS = 0.002, 0.005
_LEFT_TO_ENCODER = 0.95
_ALPHAS = (0.0, 0.1, 0.3)

Array = NDArray[np.float32]


def fitted_look(
    rule: ClusterRule, queries: Sequence[str], vectors: Array, table: TokenTable
) -> tuple[FirstLook, dict[str, float]] | None:
    """A first look as a router replica would read it, and what its fit expects."""
    fitted = fit_look(rule, queries, vectors, table)
    if fitted is None:
        return None
    return FirstLook(fitted[0], rule, table), fitted[1]


def looked(
    look: FirstLook, queries: Sequence[str], vectors: Array
) -> tuple[Array, NDArray[np.bool_], float]:
    """What queries are decided by, which of them the look decided, and microseconds per look."""
    seen, decided = vectors.copy(), np.zeros(len(queries), np.bool_)
    began_s = time.perf_counter()
    for row, text in enumerate(queries):
        vector = look.look(text)
        if vector is not None:
            seen[row], decided[row] = vector, True
    return seen, decided, (time.perf_counter() - began_s) / max(1, len(queries)) * 1e6


def on_table(bench: Bench, tokens: TokenTable) -> dict[str, Any]:
    """One table of outcomes: share, areas, and time."""
    table, rows = bench.table, bench.table.test
    rule = fit_rule(table, bench.embeddings, table.train, bench.encoder, bench.seed)
    train = [table.queries[row] for row in table.train]
    found = fitted_look(rule, train, bench.embeddings[table.train], tokens)
    _, evaluation = problem_of(bench, table.train, rows)
    encoder = _area(evaluation, rule, bench.embeddings[rows], bench.seed)
    if found is None:
        return {"share": 0.0, "aiq_log_encoder": encoder, "aiq_log": encoder, "difference": 0.0}
    look, expected = found
    seen, decided, took_us = looked(
        look, [table.queries[row] for row in rows], bench.embeddings[rows]
    )
    area = _area(evaluation, rule, seen, bench.seed)
    return {
        "expected": expected,
        "share": float(decided.mean()),
        "aiq_log_encoder": encoder,
        "aiq_log": area,
        "difference": area - encoder,
        "microseconds": took_us,
    }


def _area(evaluation: Evaluation, rule: ClusterRule, vectors: Array, seed: int) -> float:
    choices = sweep_choices(rule_quality(rule, vectors), rule.costs, ALPHAS)
    value = figures(evaluation, choices, resamples(len(vectors), seed))["aiq_log"].value
    assert value is not None
    return value


def on_nano(cache: Path) -> dict[str, Any]:
    """The nano pool: held-out questions, and each domain left out of the look."""
    config = load_config(_NANO)
    questions = [of for of in read_questions(_QUESTIONS) if of.domain]
    encoder, tokens = TextEncoder(config.embedder, cache), TokenTable(config.embedder)
    vectors = np.concatenate([encoder.encode([of.query]) for of in questions])
    texts = [of.query for of in questions]
    is_train = np.array([of.split == "train" for of in questions])
    domains = np.array([of.domain for of in questions])
    assert config.router.snapshot is not None
    prior = read_cards(config, encoder.encode).prior
    rule = ClusterRule(load_snapshot(Path(config.router.snapshot)), prior)

    def fitted(known: NDArray[np.bool_]) -> tuple[FirstLook, dict[str, float]] | None:
        rows = np.flatnonzero(known)
        return fitted_look(rule, [texts[row] for row in rows], vectors[rows], tokens)

    def seen_by(
        found: tuple[FirstLook, dict[str, float]] | None, rows: NDArray[np.intp]
    ) -> tuple[Array, NDArray[np.bool_], float]:
        if found is None:
            return vectors[rows], np.zeros(len(rows), np.bool_), 0.0
        return looked(found[0], [texts[row] for row in rows], vectors[rows])

    whole, held_out = fitted(is_train), np.flatnonzero(~is_train)
    seen, decided, took_us = seen_by(whole, held_out)
    left_out = {}
    for domain in np.unique(domains):
        without = fitted(is_train & (domains != domain))
        _, of_domain, _ = seen_by(without, held_out[domains[held_out] == domain])
        _, of_others, _ = seen_by(without, held_out[domains[held_out] != domain])
        left_out[str(domain)] = {
            "left_to_encoder": float(1 - of_domain.mean()),
            "others_decided": float(of_others.mean()),
        }
    return {
        "expected": None if whole is None else whole[1],
        "share": float(decided.mean()),
        "loss": _loss(rule, vectors[held_out], seen),
        "microseconds": took_us,
        "left_out": left_out,
        "left_to_encoder": float(np.mean([of["left_to_encoder"] for of in left_out.values()])),
    }


def _loss(rule: ClusterRule, vectors: Array, seen: Array) -> float:
    """Utility that the encoder's choices are expected to gain, in the mean over all queries."""
    believed, looked_at = rule_quality(rule, vectors), rule_quality(rule, seen)
    rows, lost = np.arange(len(vectors)), []
    for alpha in _ALPHAS:
        gained = (1 - alpha) * believed - alpha * rule.costs
        choice = ((1 - alpha) * looked_at - alpha * rule.costs).argmax(axis=1)
        lost.append(gained.max(axis=1) - gained[rows, choice])
    return float(np.mean(lost))


def targets(tables: dict[str, Any], nano: dict[str, Any]) -> list[dict[str, Any]]:
    """What is wanted, and whether it holds."""
    differences = [of["difference"] for of in tables.values()]
    rows = [
        ("aiq_log, mean over the tables, minus the encoder's", float(np.mean(differences)),
         -_MEAN_LOSS),
        ("aiq_log, the worst table, minus the encoder's", min(differences), -_MOST_LOSS),
        ("nano: share of an unknown domain left to the encoder", nano["left_to_encoder"],
         _LEFT_TO_ENCODER),
        ("nano: utility on held-out questions minus the encoder's, expected", -nano["loss"],
         -_MEAN_LOSS),
    ]  # fmt: skip
    return [
        {"name": name, "value": value, "target": target, "holds": value >= target}
        for name, value, target in rows
    ]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("build/embeddings"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    encoder = EmbedderConfig().model
    found, tokens = find_tables(options.data), TokenTable(EmbedderConfig())
    names = [name for name in REFERENCE_AIQ_LOG if name in found]
    result: dict[str, Any] = {"tables": {}}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(names) + 1)
        for name in names:
            progress.update(task, description=name)
            table = load_table(name, found[name])
            vectors = embeddings(table, encoder, options.cache, progress)
            bench = Bench(table, vectors, encoder, options.seed)
            result["tables"][name] = on_table(bench, tokens)
            progress.advance(task)
        progress.update(task, description="nano")
        result["nano"] = on_nano(options.cache)
    result["targets"] = targets(result["tables"], result["nano"])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["targets"]:
        sign = "holds " if row["holds"] else "MISSED"
        sys.stdout.write(f"{sign} {row['name']}: {row['value']:.4f} (target {row['target']})\n")


if __name__ == "__main__":
    main()
