"""Can a key overspend? Five dear requests at once, and a storm with kills, over four gateways.

How to run: `python -m benchmarks.quota --out FILE.json [--requests N]`. Each gateway is a process:
real HTTP, edge, orchestrator, outcome log and journal on one store, in front of an engine that
counts in a file what it was truly asked for. First the test of BerriAI/litellm#40002: five requests
of 300,000 tokens, 0.15 USD each, at once on a key of 0.45 USD. Then a storm: whole, streamed and
inside a pattern, callers that leave, and gateways that are killed (SIGKILL) and started again.

Results to expect: see `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from rich.console import Console
from sqlalchemy import func, select, update

from benchmarks.ports import free_port
from benchmarks.serving import machine, show_targets
from benchmarks.stats import Target, percentile
from serve_app.budget import Deadline
from serve_app.config import AtlasConfig
from serve_app.gateway.app import build_api
from serve_app.gateway.purses import Purses
from serve_app.jobs import Jobs, RayLauncher
from serve_app.models.clients import ModelClients
from serve_app.models.protocol import ChatBody
from serve_app.orchestrator.orchestrator import Orchestrator
from serve_app.schemas import MemberState, ModelMember, PoolState
from serve_app.store import Journal, OutcomeLog, Store, create_key, set_limit
from serve_app.store.tables import KeyLeaseRow, KeyWindowRow, RequestRow

GATEWAYS = 4
USD_PER_TOKEN = 0.5e-6
FIVE_USD = 0.45
STORM_USD = 0.60
REQUESTS = 400
KILLS = 6
SPEED_CALLS = 300
_PATIENCE_S = 60.0

console = Console(width=120)

CONFIG: dict[str, Any] = {
    "models": [
        {
            "type": "remote",
            "model_id": "model",
            "base_url": "http://127.0.0.1:1/v1",
            "remote_model": "x",
            "max_completion_tokens": 1_000_000,
            "price": {
                "usd_per_1m_prompt_tokens": USD_PER_TOKEN * 1e6,
                "usd_per_1m_completion_tokens": USD_PER_TOKEN * 1e6,
            },
        }
    ],
    "patterns": [
        {
            "name": "panel",
            "do": [
                {
                    "parallel": {
                        "do": [
                            {"ask": {"pair": "model", "max_tokens": 4000}},
                            {"ask": {"pair": "model", "max_tokens": 6000}},
                        ]
                    }
                },
                {"ask": {"pair": "model", "max_tokens": 2000}},
            ],
        }
    ],
    "gateway": {
        "auth": {"mode": "required"},
        "limits": {"max_completion_tokens": 1_000_000, "max_deadline_s": 60},
    },
}


class CountingEngine(ModelClients):
    """Uses a share of the tokens that a call may use, and notes them before it answers."""

    def __init__(self, ledger: Path) -> None:
        """Append to a file that all gateways share."""
        super().__init__(lambda model_id: None)
        self._ledger = os.open(ledger, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o600)

    def use(self, applications: Any) -> None:
        """Whatever answers for a model, it is this object."""

    async def complete(
        self, model_id: str, body: ChatBody, deadline: Deadline, session: str = ""
    ) -> dict[str, Any]:
        """A whole completion; one that is cut off has used a part of it."""
        text, began_s = body["messages"][-1]["content"], time.monotonic()
        share = 1.0 if "all" in text else random.random()
        seconds = 0.0 if "now" in text else 0.001 + random.random() * 0.2
        used = {"prompt_tokens": 10, "completion_tokens": int(body["max_tokens"] * share)}
        done = 1.0
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            done = min(1.0, (time.monotonic() - began_s) / seconds)
            raise
        finally:
            self._note(10 + int(used["completion_tokens"] * done))
        message = {"role": "assistant", "content": "so many"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return {"choices": [choice], "usage": used | {"total_tokens": sum(used.values())}}

    async def stream(
        self, model_id: str, body: ChatBody, deadline: Deadline, session: str = ""
    ) -> AsyncGenerator[dict[str, Any], None]:
        """A token at a time, at most 200 of them."""
        number = min(200, int(body["max_tokens"] * random.random()))
        self._note(10)
        for _ in range(number):
            self._note(1)
            choice = {"index": 0, "delta": {"content": "word "}, "finish_reason": None}
            yield {"choices": [choice]}
            await asyncio.sleep(0.001)
        yield {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        used = {"prompt_tokens": 10, "completion_tokens": number, "total_tokens": 10 + number}
        yield {"choices": [], "usage": used}

    def _note(self, tokens: int) -> None:
        os.write(self._ledger, b"%d\n" % tokens)


class _Pool:
    """A controller whose pool is ready."""

    def __init__(self, config: AtlasConfig) -> None:
        from serve_app.config.patterns.check import members_of_patterns

        self._state = PoolState(
            pool_version=1,
            models=tuple(ModelMember(m.model_id, MemberState.READY) for m in config.models),
            tools=("none",),
            pairs=config.all_pairs(),
            config=config,
            patterns=members_of_patterns(config),
        )

    @property
    def state(self) -> Any:
        """As a handle's method."""
        return self

    async def remote(self, known_version: int = -1, watcher: str | None = None) -> PoolState:
        """The pool; waits for ever where it is known."""
        if known_version == self._state.pool_version:
            await asyncio.Event().wait()
        return self._state


async def serve_gateway(folder: Path, port: int) -> None:
    """One gateway, until it is killed or told to end."""
    config = _config(folder)
    store = await Store.open(config.store_url())
    journal = Journal(config.journal_path(), config.store.max_journal_bytes)
    outcomes = OutcomeLog(store, flush_interval_s=config.store.flush_interval_s, journal=journal)
    outcomes.start()
    nobody: Any = None
    pool: Any = _Pool(config)
    engine = CountingEngine(folder / "ledger")
    orchestrator = Orchestrator(config, nobody, nobody, pool, outcomes.record, engine)
    await orchestrator._watcher.first()
    purses = Purses(store, outcomes, config.gateway.limits.max_deadline_s)
    jobs = Jobs(config, store, RayLauncher())
    app = build_api(orchestrator, store, outcomes, jobs, config, purses=purses)
    options = uvicorn.Config(
        app, host="127.0.0.1", port=port, log_config=None, access_log=False, lifespan="off"
    )
    await uvicorn.Server(options).serve()
    await purses.close()
    await outcomes.close()
    await store.close()


def _config(folder: Path) -> AtlasConfig:
    url = f"sqlite+aiosqlite:///{folder / 'atlas.db'}"
    return AtlasConfig.model_validate(CONFIG | {"data_dir": str(folder), "store": {"url": url}})


@dataclass
class Gateways:
    """The processes, and what their callers need."""

    folder: Path
    store: Store
    client: httpx2.AsyncClient
    ports: list[int] = field(default_factory=list)
    processes: list[asyncio.subprocess.Process] = field(default_factory=list)

    async def start(self, number: int | None = None) -> None:
        """One more, or a killed one again, on its port."""
        port = free_port() if number is None else self.ports[number]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.quota", "--serve", str(self.folder), str(port)
        )
        if number is None:
            self.ports.append(port)
            self.processes.append(process)
        else:
            self.processes[number] = process
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                with suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    return
                await asyncio.sleep(0.05)

    async def end(self, number: int, how: signal.Signals) -> None:
        """End one."""
        self.processes[number].send_signal(how)
        await self.processes[number].wait()

    async def ask(self, key: str, number: int, text: str, **body: Any) -> int:
        """Status of one request; 0: the connection was lost."""
        wanted = {"model": "model", "messages": [{"role": "user", "content": text}]}
        try:
            response = await self.client.post(
                f"http://127.0.0.1:{self.ports[number]}/v1/chat/completions",
                json=wanted | body,
                headers={"authorization": f"Bearer {key}"},
            )
        except (httpx2.HTTPError, OSError):
            return 0
        return response.status_code

    def truly_spent_usd(self) -> float:
        """What engines were asked for, heard of or not."""
        lines = (self.folder / "ledger").read_text().split()
        return sum(map(int, lines)) * USD_PER_TOKEN

    async def new_key(self, usd: float | None) -> tuple[str, str]:
        """A key, with a limit per month: no period ends meanwhile but at a month's end."""
        (self.folder / "ledger").write_text("")
        key_id, key = await create_key(self.store, "the benchmark", ["chat"])
        if usd is not None:
            await set_limit(self.store, key_id, "month", {"usd": usd})
        return key_id, key

    async def books(self, key_id: str) -> dict[str, float]:
        """What the store says of a key when nobody holds anything: its window, its requests."""
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                async with self.store.begin() as connection:
                    held = await connection.scalar(
                        select(func.count())
                        .select_from(KeyLeaseRow)
                        .where(KeyLeaseRow.key_id == key_id)
                    )
                if not held:
                    break
                await asyncio.sleep(0.1)
        async with self.store.begin() as connection:
            window = (
                await connection.execute(
                    select(KeyWindowRow.__table__).where(KeyWindowRow.key_id == key_id)
                )
            ).one()
            usd, count = (
                await connection.execute(
                    select(func.coalesce(func.sum(RequestRow.cost_usd), 0.0), func.count()).where(
                        RequestRow.owner == key_id
                    )
                )
            ).one()
        return {
            "spent_usd": window.spent_usd,
            "requests_usd": float(usd),
            "requests": count,
            "counted": window.spent_requests,
            "held_usd": window.leased_usd,
        }

    async def expire(self, key_id: str) -> None:
        """Let the time of all leases be over, as a minute and a half later."""
        over = update(KeyLeaseRow).where(KeyLeaseRow.key_id == key_id).values(expires_unix_s=1.0)
        async with self.store.begin() as connection:
            await connection.execute(over)


async def five_at_once(gateways: Gateways) -> dict[str, Any]:
    """The test that other gateways fail."""
    key_id, key = await gateways.new_key(FIVE_USD)
    asked = (
        gateways.ask(key, number % GATEWAYS, "all of it", max_tokens=299_800) for number in range(5)
    )
    statuses = Counter(await asyncio.gather(*asked))
    books = await gateways.books(key_id)
    return {
        "limit_usd": FIVE_USD,
        "answered": statuses[200],
        "refused": statuses[429],
        "truly_spent_usd": gateways.truly_spent_usd(),
        **books,
    }


async def storm(gateways: Gateways, requests: int, seed: int) -> dict[str, Any]:
    """Everything at once, with gateways that die and come back."""
    chance = random.Random(seed)
    key_id, key = await gateways.new_key(STORM_USD)
    alive = set(range(GATEWAYS))
    statuses: Counter[int] = Counter()

    async def one() -> None:
        await asyncio.sleep(chance.random() * 20)
        body: dict[str, Any] = {"max_tokens": chance.choice((500, 2_000, 8_000, 30_000))}
        if chance.random() < 0.3:
            body["model"] = "pattern:panel"
        if chance.random() < 0.4:
            body["stream"] = True
        number = chance.choice(sorted(alive))
        patience_s = 0.1 if chance.random() < 0.15 else _PATIENCE_S
        try:
            async with asyncio.timeout(patience_s):
                statuses[await gateways.ask(key, number, "How many?", **body)] += 1
        except TimeoutError:
            statuses[499] += 1

    async def killer() -> None:
        for _ in range(KILLS):
            await asyncio.sleep(1 + chance.random() * 2)
            number = chance.choice(sorted(alive))
            alive.discard(number)
            await gateways.end(number, signal.SIGKILL)
            await gateways.start(number)
            alive.add(number)

    await asyncio.gather(killer(), *(one() for _ in range(requests)))
    truly = gateways.truly_spent_usd()
    await asyncio.sleep(3)  # the living give back what they hold
    await gateways.expire(key_id)
    for number in range(GATEWAYS):
        await gateways.ask(key, number, "now", max_tokens=1)  # collects what the dead ones held
    await asyncio.sleep(6)  # journals of the dead ones are taken over every 5 s
    books = await gateways.books(key_id)
    return {
        "limit_usd": STORM_USD,
        "kills": KILLS,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "truly_spent_usd": truly,
        **books,
    }


async def speed(gateways: Gateways) -> dict[str, Any]:
    """What a limit costs a request: keys with and without one take turns."""
    _, free = await gateways.new_key(None)
    _, limited = await gateways.new_key(1000.0)
    took: dict[str, list[float]] = {free: [], limited: []}
    for number in range(2 * SPEED_CALLS):
        key = (free, limited)[number % 2]
        began_s = time.perf_counter()
        status = await gateways.ask(key, 0, "now", max_tokens=100)
        took[key].append((time.perf_counter() - began_s) * 1000)
        if status != 200:
            raise RuntimeError(f"a request got {status}")
    plain, paid = (percentile(took[key][20:], 50) or 0.0 for key in (free, limited))
    return {"without_limit_ms": plain, "with_limit_ms": paid, "added_ms": paid - plain}


def targets_of(results: dict[str, Any]) -> list[Target]:
    """What has to hold."""
    five, wild, fast = results["five_at_once"], results["storm"], results["speed"]
    return [
        Target("five at once: answered", five["answered"], ">=", 3),
        Target("five at once: truly spent, USD", five["truly_spent_usd"], "<=", FIVE_USD),
        Target(
            "five at once: store against requests, USD",
            abs(five["spent_usd"] - five["requests_usd"]),
            "<=",
            1e-9,
        ),
        Target("storm: truly spent, USD", wild["truly_spent_usd"], "<=", STORM_USD),
        Target("storm: spent in the store, USD", wild["spent_usd"], "<=", STORM_USD),
        Target(
            "storm: store against requests, USD",
            abs(wild["spent_usd"] - wild["requests_usd"]),
            "<=",
            1e-9,
        ),
        Target("storm: held in the end, USD", abs(wild["held_usd"]), "<=", 1e-9),
        Target("a limit adds to a request, ms", fast["added_ms"], "<=", 1.0),
    ]


async def run(requests: int, seed: int) -> dict[str, Any]:
    """All of it, on gateways of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = await Store.open(_config(folder).store_url())
        async with httpx2.AsyncClient(timeout=_PATIENCE_S) as client:
            gateways = Gateways(folder, store, client)
            try:
                for _ in range(GATEWAYS):
                    await gateways.start()
                results = {
                    "five_at_once": await five_at_once(gateways),
                    "storm": await storm(gateways, requests, seed),
                    "speed": await speed(gateways),
                }
            finally:
                for number in range(len(gateways.processes)):
                    with suppress(ProcessLookupError):
                        await gateways.end(number, signal.SIGKILL)
                await store.close()
    return results


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", nargs=2, metavar=("FOLDER", "PORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        folder, port = arguments.serve
        asyncio.run(serve_gateway(Path(folder), int(port)))
        return
    results = asyncio.run(run(arguments.requests, arguments.seed))
    targets = targets_of(results)
    record = {"machine": machine(), **results, "targets": [t.as_json() for t in targets]}
    console.print_json(json.dumps(results))
    show_targets(targets)
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
