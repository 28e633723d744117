"""How long does a page of the console take with a million requests in the store?

How to run: `python -m benchmarks.console --out FILE.json [--requests N]`. The requests are written
by bulk insert into a SQLite file of thirty days, ten keys, twelve candidates and four paths, with a
verdict on every tenth and the sums that the outcome log would have kept; then each page is asked
for over loopback, again and again.

Results to expect: see `benchmarks/README.md`.
"""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
import time
from pathlib import Path
from typing import Any

from serve_app.store import Store
from serve_app.store.sums import add_requests, add_verdict

REQUESTS = 1_000_000
DAYS = 30
_BATCH = 50_000
_DIMENSIONS = 384
_PATHS = ("clusters", "policy", "out_of_distribution", "pinned")
_MODELS = tuple(f"model-{number}" for number in range(4))
_TOOLS = ("none", "calculator", "retrieval")
_SPANS = json.dumps(
    [
        {
            "span_id": 0, "parent_id": None, "kind": "request", "name": "req", "began_s": 0.0,
            "seconds": 1.0, "error": None, "prompt_tokens": 100, "completion_tokens": 50,
            "cost_usd": 0.001, "attributes": {}, "arguments": None, "text": None,
        }
    ]
)  # fmt: skip


def request_rows(count: int, now_s: float) -> Any:
    """Values of `RequestRow` for requests of the last `DAYS`, the oldest first."""
    chance = random.Random(20)
    embedding = chance.randbytes(4 * _DIMENSIONS)
    keys = [f"key_{number:016x}" for number in range(10)]
    step_s = DAYS * 86_400 / count
    for number in range(count):
        yield {
            "request_id": f"req_{number:032x}",
            "owner": chance.choice(keys),
            "query": f"Question {number}: " + "what is the answer to this one? " * 4,
            "embedding": embedding,
            "model_id": chance.choice(_MODELS),
            "tool_id": chance.choice(_TOOLS),
            "path": chance.choice(_PATHS),
            "confidence": chance.random(),
            "propensity": 0.9,
            "alpha": 0.3,
            "policy_version": 1 + number * 5 // count,
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
    rows, batch = request_rows(count, time.time()), []
    done = False
    while not done:
        batch = [row for _, row in zip(range(_BATCH), rows, strict=False)]
        done = len(batch) < _BATCH
        await asyncio.to_thread(_insert, path, batch)
        async with store.begin() as connection:
            await add_requests(connection, batch)
            for row in batch[::10]:
                pair = (row["model_id"], row["tool_id"])
                score = float(random.Random(row["request_id"]).random() < row["confidence"])
                await add_verdict(
                    connection,
                    pair,
                    score=score,
                    confidence=row["confidence"],
                    at_unix_s=row["created_unix_s"],
                )


def _insert(path: Path, batch: list[dict[str, Any]]) -> None:
    with sqlite3.connect(path) as connection:
        if not batch:
            return
        names = list(batch[0])
        marks = ", ".join(f":{name}" for name in names)
        connection.executemany(f"INSERT INTO requests ({', '.join(names)}) VALUES ({marks})", batch)
        connection.executemany(
            "INSERT INTO spans VALUES (?, 'answered', 0, ?)",
            [(row["request_id"], _SPANS) for row in batch],
        )
        connection.executemany(
            "INSERT INTO feedback VALUES (?, ?, 1.0, NULL, ?)",
            [(r["request_id"], r["owner"], r["created_unix_s"]) for r in batch[::10]],
        )
