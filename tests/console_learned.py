"""What learning has left in a store: a profile, a snapshot, an evaluation, trials, a training."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from serve_app.config import AtlasConfig
from serve_app.router.snapshots.library import SnapshotLibrary
from serve_app.schemas import Pair
from serve_app.store import (
    Amounts,
    Mode,
    ProfileOutcome,
    ProfileQuestion,
    Store,
    add_job,
    add_outcomes,
    add_questions,
    add_snapshot,
    create_key,
    draw_lease,
    publish,
    set_limit,
    update_job,
)
from tests.router_data import make_snapshot

TRAINING = "job_training"
"""Id of a training under way, if the launcher says that it runs."""
PAIRS = (Pair("small", "calculator"), Pair("small", "none"), Pair("large", "none"))
EXAMPLES = (
    ("What is 17 times 23?", "How much is 15% of 80?"),
    ("Who wrote Middlemarch?", "Where does the Rhine end?"),
    ("Write a haiku about rain.",),
)
_COSTS_USD = (0.0001, 0.0001, 0.0006)
_SCORES = (0.61, 0.66, 0.75)


def _figures(mean: float, cost_usd: float) -> dict[str, Any]:
    interval = {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}
    cost = {"mean": cost_usd, "low": 0.0, "high": 2 * cost_usd}
    return {"utility": interval, "score": interval, "cost_usd": cost, "steps": 1.0}


def _sweep(best: float, worst: float) -> list[dict[str, float]]:
    """Points of a policy from quality to cost."""
    return [
        {
            "alpha": step / 6,
            "cost_usd": 0.0006 * (1 / 6) ** (step / 6),
            "score": best - (best - worst) * (step / 6) ** 2,
        }
        for step in range(7)
    ]


REPORT = {
    "settings": {"default_alpha": 0.1},
    "at_alpha": [
        {
            "alpha": 0.1,
            "contenders": {
                "serving": _figures(0.61, 0.0004),
                "candidate": _figures(0.68, 0.0003),
                "best_single": _figures(0.6, 0.0006),
            },
        }
    ],
    "frontiers": {
        "candidate": _sweep(0.82, 0.66),
        "serving": _sweep(0.76, 0.64),
        "oracle": _sweep(0.93, 0.8),
        "random": [{"alpha": None, "cost_usd": 0.00027, "score": 0.67}],
        **{
            str(pair): [{"alpha": None, "cost_usd": cost, "score": score}]
            for pair, cost, score in zip(PAIRS, _COSTS_USD, _SCORES, strict=True)
        },
    },
    "verdict": {"promote": True, "reason": "better by +0.070 [+0.010, +0.130]"},
}


def topic_embedding(topic: int) -> bytes:
    """A vector of one of three topics."""
    vector = np.full(4, 0.1, "<f4")
    vector[topic] = 1.0
    made: bytes = (vector / np.linalg.norm(vector)).astype("<f4").tobytes()
    return made


async def fill_learned(store: Store, config: AtlasConfig) -> None:
    """Write it all: policy 2 serves, 3 is a canary, 4 is in the shadow."""
    snapshot = replace(make_snapshot(), pairs=PAIRS, examples=EXAMPLES)
    snapshot_id = SnapshotLibrary(config.snapshots_path()).add(snapshot)
    await add_snapshot(store, "snap_one", {"kind": "clusters"})
    await add_snapshot(store, snapshot_id, {"kind": "clusters"})
    await publish(store, "snap_one", "the first")
    await publish(store, snapshot_id, "better", REPORT)
    await publish(store, snapshot_id, "a tenth of the requests", mode=Mode.CANARY, share=0.1)
    await publish(store, "snap_one", "watched", mode=Mode.SHADOW)
    await _fill_profile(store, config.embedder.model)
    key_id, _ = await create_key(store, "team blue", ["chat"])
    await set_limit(store, key_id, "day", {"usd": 2.0, "tokens": 50_000})
    await draw_lease(store, key_id, "lease_1", Amounts(0.5, 2_000, 1), 600)
    await add_job(store, TRAINING, "train", {}, "local")
    curve = [
        {"iteration": n, "mean_return": 0.9 - math.exp(-n / 8), "utility": 0.6 - math.exp(-n / 9)}
        for n in range(1, 25)
    ]
    progress = {"done": 24, "total": 60, "phase": "training", "mean_return": 0.85, "curve": curve}
    await update_job(store, TRAINING, state="running", progress=progress)


async def _fill_profile(store: Store, encoder: str) -> None:
    """Three questions of each topic; the scores are those of `_SCORES`, in thirds."""
    for number in range(9):
        topic, text = number % 3, EXAMPLES[number % 3][0]
        key = f"q{number}"
        question = ProfileQuestion(
            key, f"{text} ({number})", f"topic {topic}", "train", encoder, topic_embedding(topic)
        )
        await add_questions(store, [question])
        await add_outcomes(
            store,
            [
                ProfileOutcome(
                    key, *pair, "mark", float(place == topic or place == 2), 40, 20, cost_usd, 0.2,
                    None, 0, "42", None, None, 1.0,
                )
                for place, (pair, cost_usd) in enumerate(zip(PAIRS, _COSTS_USD, strict=True))
            ],
        )  # fmt: skip
