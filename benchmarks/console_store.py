"""A store of a million requests for `benchmarks.console`, with what learning leaves in it."""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import insert

from serve_app.config import AtlasConfig
from serve_app.router.snapshots.library import SnapshotLibrary
from serve_app.router.snapshots.snapshot import RouterSnapshot, Scale
from serve_app.store import (
    Amounts,
    Mode,
    Period,
    Store,
    add_snapshot,
    draw_lease,
    publish,
    set_limit,
)
from serve_app.store.sums import add_requests, add_verdict
from serve_app.store.tables import ApiKeyRow, ProfileOutcomeRow, ProfileQuestionRow, ShadowRow

DAYS = 30
_BATCH = 50_000
_DIMENSIONS = 384
_PATHS = ("clusters", "policy", "out_of_distribution", "pinned")
MODELS = tuple(f"model-{number}" for number in range(4))
TOOLS = ("none", "calculator", "retrieval")
_CLUSTERS = 32
_QUESTIONS = 2_000
_SHADOW = 7
"""Version of the policy in the shadow."""
SPANS = json.dumps(
    [
        {
            "span_id": 0, "parent_id": None, "kind": "request", "name": "req", "began_s": 0.0,
            "seconds": 1.0, "error": None, "prompt_tokens": 100, "completion_tokens": 50,
            "cost_usd": 0.001, "attributes": {}, "arguments": None, "text": None,
        }
    ]
)  # fmt: skip


def console_config(folder: Path) -> AtlasConfig:
    """A deployment whose snapshots lie in a folder."""
    models = [
        {
            "type": "remote",
            "model_id": name,
            "base_url": "http://127.0.0.1:1/v1",
            "remote_model": "x",
            "tools": list(TOOLS),
        }
        for name in MODELS
    ]
    tools = [{"type": "calculator", "tool_id": name} for name in TOOLS if name != "none"]
    settings = {"models": models, "tools": tools, "gateway": {"mcp": False}}
    return AtlasConfig.model_validate({**settings, "data_dir": str(folder)})


def request_rows(count: int, now_s: float) -> Iterator[dict[str, Any]]:
    """Values of `RequestRow` for requests of the last `DAYS`, the oldest first."""
    chance = random.Random(20)
    embedding = np.random.default_rng(20).standard_normal(_DIMENSIONS).astype("<f4").tobytes()
    keys = [f"key_{number:016x}" for number in range(10)]
    step_s = DAYS * 86_400 / count
    for number in range(count):
        yield {
            "request_id": f"req_{number:032x}",
            "owner": chance.choice(keys),
            "query": f"Question {number}: " + "what is the answer to this one? " * 4,
            "embedding": embedding,
            "model_id": chance.choice(MODELS),
            "tool_id": chance.choice(TOOLS),
            "path": chance.choice(_PATHS),
            "confidence": chance.random(),
            "propensity": 0.9,
            "alpha": 0.3,
            "policy_version": 1 + number * 5 // count,
            "cluster": chance.choice((None, *range(_CLUSTERS))),
            "pool_version": 1,
            "prompt_tokens": 100,
            "completion_tokens": 50,
            "cost_usd": chance.expovariate(1000),
            "seconds": chance.lognormvariate(0, 0.7),
            "error": "the engine failed" if chance.random() < 0.01 else None,
            "created_unix_s": now_s - (count - number) * step_s,
        }


async def fill(store: Store, path: Path, count: int) -> None:
    """Write the requests, and what the log would have summed up."""
    rows = request_rows(count, time.time())
    while batch := list(islice(rows, _BATCH)):
        await asyncio.to_thread(_insert, path, batch)
        shadows = {row["request_id"]: _shadow(row) for row in batch[::10]}
        async with store.begin() as connection:
            await connection.execute(insert(ShadowRow), list(shadows.values()))
            await add_requests(connection, batch, shadows.values())
            for row in batch[::10]:
                score = float(random.Random(row["request_id"]).random() < row["confidence"])
                shadow, at_unix_s = shadows[row["request_id"]], row["created_unix_s"]
                await add_verdict(connection, row, shadow, score=score, at_unix_s=at_unix_s)
    await _fill_learned(store, console_config(path.parent))


def _shadow(request: dict[str, Any]) -> dict[str, Any]:
    """Values of `ShadowRow` of a request."""
    return {
        "request_id": request["request_id"],
        "policy_version": _SHADOW,
        "action": "route",
        "model_id": MODELS[0],
        "tool_id": request["tool_id"],
        "path": "clusters",
        "confidence": 0.7,
        "propensity": 1.0,
    }


async def _fill_learned(store: Store, config: AtlasConfig) -> None:
    """A profile, the snapshot that serves with its evaluation, two trials, and limits."""
    snapshot_id = SnapshotLibrary(config.snapshots_path()).add(_snapshot(config))
    await add_snapshot(store, snapshot_id, {"kind": "clusters"})
    for version in range(1, 6):
        await publish(store, snapshot_id, f"the {version}. evaluation", _report(config))
    await publish(store, snapshot_id, "a tenth", mode=Mode.CANARY, share=0.1)
    await publish(store, snapshot_id, "watched", mode=Mode.SHADOW)
    chance = np.random.default_rng(20)
    vectors = chance.standard_normal((_QUESTIONS, _DIMENSIONS)).astype("<f4")
    questions = [
        {
            "question_key": f"q{number:05}",
            "query": f"Profiled question {number}",
            "domain": f"domain {number % 8}",
            "split": "train",
            "encoder": config.embedder.model,
            "embedding": vector.tobytes(),
        }
        for number, vector in enumerate(vectors)
    ]
    outcomes = [
        {
            "question_key": f"q{number:05}",
            "model_id": pair.model_id,
            "tool_id": pair.tool_id,
            "fingerprint": "settings",
            "score": float(chance.random() < 0.6),
            "prompt_tokens": 100,
            "completion_tokens": 50,
            "cost_usd": 0.001,
            "seconds": 1.0,
            "tool_errors": 0,
            "propensity": 1.0,
            "created_unix_s": 0.0,
        }
        for number in range(_QUESTIONS)
        for pair in config.all_pairs()
    ]
    keys = [f"key_{number:016x}" for number in range(10)]
    async with store.begin() as connection:
        await connection.execute(insert(ProfileQuestionRow), questions)
        await connection.execute(insert(ProfileOutcomeRow), outcomes)
        for key_id in keys:
            await connection.execute(insert(ApiKeyRow).values(_key(key_id)))
    for key_id in keys:
        for per in Period:
            await set_limit(store, key_id, per, {"usd": 1000.0, "tokens": 1e9})
    for key_id in keys[5:]:
        await draw_lease(store, key_id, f"lease of {key_id}", Amounts(1.0, 1000, 1), 86_400)


def _key(key_id: str) -> dict[str, Any]:
    named = {"key_id": key_id, "key_hash": key_id, "name": key_id}
    return named | {"scopes": "chat", "created_unix_s": 0.0}


def _snapshot(config: AtlasConfig) -> RouterSnapshot:
    """Clusters of random questions."""
    chance, pairs = np.random.default_rng(20), config.all_pairs()
    shape = (_CLUSTERS, len(pairs))

    def some(*sizes: int) -> NDArray[np.float32]:
        return chance.random(sizes, np.float32) + np.float32(0.5)

    return RouterSnapshot(
        version=1,
        encoder=config.embedder.model,
        pairs=pairs,
        centroids=some(_CLUSTERS, _DIMENSIONS),
        scales=(Scale(_CLUSTERS, 1, 1.0),),
        temperature=0.1,
        score_alpha=20 * some(*shape),
        score_beta=20 * some(*shape),
        tokens=some(*shape),
        seconds=some(*shape),
        costs_usd=some(*shape),
        pair_alpha=some(len(pairs)),
        pair_beta=some(len(pairs)),
        pair_costs_usd=some(len(pairs)),
        landmarks=some(1000, _DIMENSIONS),
        head_in=some(1000, 16),
        head_out=some(16, len(pairs)),
        head_gamma=1.0,
        head_weight=0.5,
        card_weight=0.0,
        outside_card_weight=0.0,
        caution=1.0,
        prior_weights=some(0),
        prior_bias=0.5,
        distance_quantiles=np.linspace(0, 1, 101, dtype=np.float32),
        trusted_quantile=0.99,
        gate_head=some(1000),
        gate_weights=some(5),
        examples=tuple(
            tuple(f"Profiled question {number} of cluster {cluster}" for number in range(5))
            for cluster in range(_CLUSTERS)
        ),
    )


def _report(config: AtlasConfig) -> dict[str, Any]:
    """An evaluation of as many contenders as `atlas evaluate` has of these pairs."""
    policies = ("candidate", "serving", "path_1", "path_2", "cold_start", "oracle")
    names = [*policies, "best_single", "random", *map(str, config.all_pairs())]
    mean = {"mean": 0.6, "low": 0.5, "high": 0.7}
    figures = {"score": mean, "utility": mean, "cost_usd": mean, "steps": 1.0}
    sweep = [{"alpha": a / 18, "cost_usd": 0.001 / (1 + a), "score": 0.9} for a in range(19)]
    alphas = (0.0, 0.02, 0.1, 0.3, 0.6, 0.9)
    return {
        "settings": {"default_alpha": 0.1},
        "at_alpha": [{"alpha": a, "contenders": dict.fromkeys(names, figures)} for a in alphas],
        "frontiers": {
            name: sweep if name in policies else sweep[:1]
            for name in names
            if name != "best_single"
        },
        "verdict": {"promote": True, "reason": "utility +0.070 [+0.010, +0.130] at alpha 0.1"},
    }


def _insert(path: Path, batch: list[dict[str, Any]]) -> None:
    with sqlite3.connect(path) as connection:
        names = list(batch[0])
        marks = ", ".join(f":{name}" for name in names)
        connection.executemany(f"INSERT INTO requests ({', '.join(names)}) VALUES ({marks})", batch)
        connection.executemany(
            "INSERT INTO spans VALUES (?, 'answered', 0, ?)",
            [(row["request_id"], SPANS) for row in batch],
        )
        connection.executemany(
            "INSERT INTO feedback VALUES (?, ?, 1.0, NULL, ?)",
            [(r["request_id"], r["owner"], r["created_unix_s"]) for r in batch[::10]],
        )
