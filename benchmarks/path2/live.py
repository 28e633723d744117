"""The policy of a run asked over HTTP, beside what replay says of the same questions.

The deployment has to be served from the configuration that the run reads. The policy serves there
while the questions are asked, and what served before serves again afterwards.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.loop import ROUTED, ask_each
from benchmarks.path2.data import Bench, Learnt, rule_of
from benchmarks.path2.summary import figure_of
from benchmarks.path2.units import MAX_STEPS
from benchmarks.swap import until_serves
from rl.ppo.replay import with_rule
from rl.ppo.rollout import GatedPolicy
from rl.publish import SERVING, keep_snapshot, promote, resolve
from serve_app.config import AtlasConfig
from serve_app.errors import ConfigError
from serve_app.questions import Question
from serve_app.router.snapshots.snapshot import RouterSnapshot
from serve_app.store import Store

ALPHA = 0.0
_RESAMPLES = 2000
Array = NDArray[np.float64]


def ask_live(
    bench: Bench,
    learnt: Learnt,
    questions: Sequence[Question],
    *,
    port: int,
    count: int,
    temperature: float,
    on_progress: Callable[[str], None],
) -> dict[str, Any]:
    """Ask a deployment some of the test questions, and replay the same ones.

    Only models that the replayed table knows may answer: a pattern or model that was left out of
    it is a candidate in service, by its card.

    Args:
        bench: The profile.
        learnt: The router that is to serve.
        questions: What is right; those of the bench's test questions among them are asked.
        port: Where the deployment listens on this machine.
        count: How many are asked at most.
        temperature: Of the answers; the profile's.
        on_progress: Told what is being done.

    Returns:
        Of both the mean `score`, `cost_usd` and `steps`, each difference live minus replay with its
        95% interval over questions, the share of questions answered by the same pair, requests that
        failed, and by which path the live ones went.

    Raises:
        ConfigError: If none of the questions is one of the bench's.
    """
    config = bench.config
    assert config is not None  # it was read from a store
    rows, asked = _drawn(bench, questions, count)
    rule = rule_of(bench, learnt)
    table = with_rule(bench.test, rule).select(queries=rows)
    policy = GatedPolicy(learnt.net, rule, learnt.threshold, table, MAX_STEPS)
    replayed = policy.answer(table, ALPHA)
    options = {
        "alpha": ALPHA,
        "max_steps": MAX_STEPS,
        "models": sorted({pair.model_id for pair in table.pairs}),
    }
    answers = asyncio.run(
        _served(config, learnt.snapshot, asked, options, port, temperature, on_progress)
    )
    seen = [extension for _, extension in answers]
    live = {
        "score": np.array([score for score, _ in answers]),
        "cost_usd": np.array([of.get("cost_usd", 0.0) for of in seen]),
        "steps": np.array([float(len(of.get("steps", ()))) for of in seen]),
    }
    predicted = {"score": replayed.score, "cost_usd": replayed.costs_usd, "steps": replayed.steps}
    pairs = [str(table.pairs[column]) if column >= 0 else None for column in replayed.pair]
    weights = np.random.default_rng(0).multinomial(
        len(rows), np.full(len(rows), 1 / len(rows)), _RESAMPLES
    ) / len(rows)  # fmt: skip
    return {
        "num_questions": len(rows),
        "alpha": ALPHA,
        "live": {name: float(of.mean()) for name, of in live.items()},
        "replay": {name: float(of.mean()) for name, of in predicted.items()},
        "live_minus_replay": {
            name: asdict(figure_of(_with_draws(of - predicted[name], weights)))
            for name, of in live.items()
        },
        "same_pair": float(
            np.mean([of.get("pair") == pair for of, pair in zip(seen, pairs, strict=True)])
        ),
        "failed": sum(not of for of in seen),
        "paths": dict(Counter(str(of["path"]) for of in seen if of)),
        "replay_by_policy": float(replayed.by_policy.mean()),
    }


def _drawn(
    bench: Bench, questions: Sequence[Question], count: int
) -> tuple[NDArray[np.intp], list[Question]]:
    """Rows of the bench's test questions, and the questions, in one random order."""
    place = {query: row for row, query in enumerate(bench.test.queries)}
    known = [question for question in questions if question.query in place]
    if not known:
        raise ConfigError("none of the questions is a held-out one of the profile")
    order = np.random.default_rng(0).permutation(len(known))[:count]
    chosen = [known[number] for number in order]
    return np.array([place[question.query] for question in chosen], np.intp), chosen


async def _served(
    config: AtlasConfig,
    snapshot: RouterSnapshot,
    questions: Sequence[Question],
    options: dict[str, Any],
    port: int,
    temperature: float,
    on_progress: Callable[[str], None],
) -> list[tuple[float, dict[str, Any]]]:
    """Scores and `atlas` objects while a snapshot serves."""
    store = await Store.open(config.store_url())
    try:
        before = await resolve(store, SERVING)
        kept = await keep_snapshot(config, store, snapshot)
        version = await promote(store, kept, "live requests against their replay")
        try:
            on_progress("the policy takes over")
            await until_serves(port, version)
            on_progress(f"{len(questions)} live requests")
            return await ask_each(
                f"http://127.0.0.1:{port}",
                ROUTED,
                questions,
                options,
                temperature=temperature,
            )
        finally:
            await promote(store, before, "live requests are over")
    finally:
        await store.close()


def _with_draws(values: Array, weights: Array) -> Array:
    """(1 + draws,) the plain mean and the resampled ones."""
    return np.concatenate([[values.mean()], weights @ values])
