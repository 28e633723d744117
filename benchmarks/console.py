"""How long does a page of the console take with a million requests in the store?

How to run: `python -m benchmarks.console --out FILE.json [--requests N] [--store FILE.db]`. The
requests are written by bulk insert into a SQLite file of thirty days, ten keys, twelve candidates,
four paths and 32 clusters, with a verdict on every tenth and the sums that the outcome log would
have kept; every tenth was looked at by a policy in the shadow. Beside them are a profile of 2,000
questions, a snapshot that serves, its evaluation, two trials, and limits of every key. Then each
page is asked for over loopback, again and again. A file named by `--store` is kept, and used as it
is where it is there; its snapshot lies beside it.

Results to expect: see `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
import uvicorn

from benchmarks.console_store import MODELS, TOOLS, console_config, fill
from benchmarks.serving import show_targets
from benchmarks.stats import Target, percentile
from serve_app.config import AtlasConfig
from serve_app.gateway.app import build_api
from serve_app.jobs import Jobs
from serve_app.orchestrator.answer import Answer
from serve_app.orchestrator.direct import DirectTools
from serve_app.orchestrator.run import Piece
from serve_app.schemas import (
    ChatCall,
    Decision,
    Drift,
    MemberState,
    ModelMember,
    PoolLoad,
    PoolState,
    Report,
)
from serve_app.store import OutcomeLog, Store

REQUESTS = 1_000_000
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
    "routing, a cluster": "/console/routing?cluster=7",
    "policies": "/console/policies",
    "policies, an evaluation": "/console/policies?version=5",
    "pool": "/console/pool",
    "spend, last year": "/console/spend?window=365d",
    "ask": "/console/ask",
}


class _Idle:
    """An orchestrator that has a pool and answers nothing."""

    def __init__(self, config: AtlasConfig) -> None:
        members = tuple(ModelMember(m.model_id, MemberState.READY) for m in config.models)
        self._pool = PoolState(1, members, TOOLS, config.all_pairs(), config)

    def pool(self) -> PoolState:
        return self._pool

    def ready(self) -> tuple[bool, dict[str, Any]]:
        return True, {}

    async def load(self) -> PoolLoad | None:
        return PoolLoad(dict.fromkeys(MODELS, 3), frozenset())

    def breakers(self) -> dict[str, str]:
        return {}

    async def drifts(self) -> tuple[Drift, ...]:
        return ()

    @property
    def tools(self) -> DirectTools:
        raise NotImplementedError

    async def complete(self, call: ChatCall) -> tuple[Answer, Report]:
        raise NotImplementedError

    def stream(self, call: ChatCall) -> AsyncGenerator[Piece | Report, None]:
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


async def measure(store: Store, folder: Path) -> dict[str, Took]:
    """What each page took; the folder has the snapshot."""
    config = console_config(folder)
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
        return time.perf_counter() - began_s, await measure(store, path.parent)
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
