"""How long does a page of the console take with a million requests in the store?

How to run: `python -m benchmarks.console --out FILE.json [--requests N] [--store FILE.db]`. The
requests are written by bulk insert into a SQLite file of thirty days, ten keys, twelve candidates
and four paths, with a verdict on every tenth and the sums that the outcome log would have kept;
then each page is asked for over loopback, again and again. A file named by `--store` is kept, and
used as it is where it is there.

Results to expect: see `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import socket
import sqlite3
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
import uvicorn

from benchmarks.serving import show_targets
from benchmarks.stats import Target, percentile
from serve_app.config import AtlasConfig
from serve_app.gateway.app import build_api
from serve_app.jobs import Jobs
from serve_app.orchestrator.direct import DirectTools
from serve_app.schemas import ChatCall, Decision, MemberState, ModelMember, PoolState, Report
from serve_app.store import OutcomeLog, Store
from serve_app.store.sums import add_requests, add_verdict

REQUESTS = 1_000_000
DAYS = 30
LIMIT_MS = 300.0
ROUNDS = 20
PAGES = {
    "overview, last day": "/console",
    "overview, last 7 days": "/console?window=7d",
    "requests": "/console/requests",
    "requests that failed": "/console/requests?status=failed",
    "requests of a key and a candidate": (
        "/console/requests?owner=key_0000000000000001&candidate=model-1@none"
    ),
    "requests, none found": "/console/requests?min_usd=1000",
    "requests of a key, none found": "/console/requests?owner=key_0000000000000001&min_usd=1000",
    "one request": "/console/requests/req_00000000000000000000000000000001",
    "routing, last year": "/console/routing?window=365d",
    "policies": "/console/policies",
    "pool": "/console/pool",
    "spend, last year": "/console/spend?window=365d",
    "ask": "/console/ask",
}
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


def request_rows(count: int, now_s: float) -> Iterator[dict[str, Any]]:
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
    rows = request_rows(count, time.time())
    while batch := list(islice(rows, _BATCH)):
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


class _Idle:
    """An orchestrator that has a pool and answers nothing."""

    def __init__(self, config: AtlasConfig) -> None:
        members = tuple(ModelMember(m.model_id, MemberState.READY) for m in config.models)
        self._pool = PoolState(1, members, _TOOLS, config.all_pairs(), config)

    def pool(self) -> PoolState:
        return self._pool

    def ready(self) -> tuple[bool, dict[str, Any]]:
        return True, {}

    def breakers(self) -> dict[str, str]:
        return {}

    @property
    def tools(self) -> DirectTools:
        raise NotImplementedError

    async def complete(self, call: ChatCall) -> tuple[dict[str, Any], Report]:
        raise NotImplementedError

    def stream(self, call: ChatCall) -> AsyncGenerator[dict[str, Any] | Report, None]:
        raise NotImplementedError

    async def decide(self, call: ChatCall) -> Decision:
        raise NotImplementedError


class _NoJobs:
    """Runs no job."""

    def start(self, config: AtlasConfig, job_id: str) -> None:
        raise NotImplementedError

    def is_running(self, job_id: str) -> bool:
        return False

    def stop(self, job_id: str) -> None:
        raise NotImplementedError


def _config() -> AtlasConfig:
    models = [
        {
            "type": "remote",
            "model_id": name,
            "base_url": "http://127.0.0.1:1/v1",
            "remote_model": "x",
            "tools": list(_TOOLS),
        }
        for name in _MODELS
    ]
    tools = [{"type": "calculator", "tool_id": name} for name in _TOOLS if name != "none"]
    return AtlasConfig.model_validate({"models": models, "tools": tools, "gateway": {"mcp": False}})


@dataclass
class Took:
    """Milliseconds that a page took, each time."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Of this process: gateway, store and client. What else the machine does is not in it."""

    def as_json(self) -> dict[str, float | None]:
        """As the results hold it."""
        return {
            "p50": percentile(self.wall, 50),
            "p95": percentile(self.wall, 95),
            "max": max(self.wall),
            "cpu_p50": percentile(self.cpu, 50),
            "cpu_p95": percentile(self.cpu, 95),
        }


async def measure(store: Store) -> dict[str, Took]:
    """What each page took."""
    config = _config()
    jobs, outcomes = Jobs(config, store, _NoJobs()), OutcomeLog(store)
    app = build_api(_Idle(config), store, outcomes, jobs, config)
    listener = socket.create_server(("127.0.0.1", 0))
    options = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")
    server = uvicorn.Server(options)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    took = {name: Took() for name in PAGES}
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
        for _ in range(ROUNDS):
            for name, path in PAGES.items():
                began_s, began_cpu_s = time.perf_counter(), time.process_time()
                (await client.get(path)).raise_for_status()
                took[name].wall.append(1000 * (time.perf_counter() - began_s))
                took[name].cpu.append(1000 * (time.process_time() - began_cpu_s))
    server.should_exit = True
    await serving
    await outcomes.close()
    return took


async def run(path: Path, count: int) -> tuple[float, dict[str, Took]]:
    """Fill a store, where it is not there, and ask for each page.

    Returns:
        Seconds that it took to fill, and what `measure` gives.
    """
    is_there = path.exists()
    store = await Store.open(f"sqlite+aiosqlite:///{path}")
    try:
        began_s = time.perf_counter()
        if not is_there:
            await fill(store, path, count)
        return time.perf_counter() - began_s, await measure(store)
    finally:
        await store.close()


def main() -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--store", type=Path)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        path = options.store or Path(folder) / "atlas.db"
        filled_s, took = asyncio.run(run(path, options.requests))
        size = path.stat().st_size
    targets = [
        Target(f"{name}, ms at p95", percentile(times.wall, 95) or 0.0, "<=", LIMIT_MS)
        for name, times in took.items()
    ]
    record = {
        "requests": options.requests,
        "store_bytes": size,
        "filled_s": filled_s,
        "machine": {
            "cores": os.cpu_count(),
            "load_average_1min": os.getloadavg()[0],
            "python": platform.python_version(),
        },
        "pages_ms": {name: times.as_json() for name, times in took.items()},
        "targets": [target.as_json() for target in targets],
    }
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    show_targets(targets)


if __name__ == "__main__":
    main()
