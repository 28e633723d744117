"""Gateways that share one store: real HTTP, edge, orchestrator, outcome log and purses in this
process, in front of engines that use what the request allows."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
import yaml
from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.config import AtlasConfig
from serve_app.gateway.app import build_api
from serve_app.gateway.purses import Purses
from serve_app.jobs import Jobs
from serve_app.models.protocol import ChatBody
from serve_app.orchestrator.orchestrator import Orchestrator
from serve_app.store import Journal, OutcomeLog, Store, create_key
from serve_app.store.tables import KeyLeaseRow, KeyWindowRow, RequestRow
from tests.gateway_fakes import IdleLauncher
from tests.path2_fakes import Controller, Engines, Handle, WordEmbedder

USD_PER_TOKEN = 0.5e-6
"""A request of 300,000 tokens costs 0.15 USD."""
PANEL = """
name: panel
do:
  - parallel:
      do:
        - ask: {pair: model, max_tokens: 4000}
        - ask: {pair: model, max_tokens: 6000}
  - ask: {pair: model, max_tokens: 2000}
"""


@dataclass
class Spender(Engines):
    """Engines that use up to the tokens they may, after a moment; they know what was truly spent.

    Attributes:
        tokens: Of all calls, finished or not.
        pause: Set: calls are answered.
        stalls: Whether streams stop after their first piece.
        share: Of the tokens that a call may write, those that it does write; `None`: at random.
    """

    tokens: int = 0
    pause: asyncio.Event = field(default_factory=asyncio.Event)
    stalls: bool = False
    share: float | None = 1.0
    random: random.Random = field(default_factory=lambda: random.Random(0))

    async def complete(
        self, model_id: str, body: ChatBody, deadline: Any, session: str = ""
    ) -> dict[str, Any]:
        used = self._asked(model_id, body)
        self.tokens += sum(used.values())
        await self.pause.wait()
        message = {"role": "assistant", "content": "so many"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return {"choices": [choice], "usage": used}

    async def stream(
        self, model_id: str, body: ChatBody, deadline: Any, session: str = ""
    ) -> AsyncGenerator[dict[str, Any], None]:
        """A stream that is left has used next to nothing."""
        used = self._asked(model_id, body)
        await self.pause.wait()
        for word, end in (("so ", None), ("many", "stop")):
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": end}
            yield {"choices": [choice]}
            if self.stalls:
                await asyncio.Event().wait()
        self.tokens += sum(used.values())
        yield {"choices": [], "usage": used}

    def _asked(self, model_id: str, body: ChatBody) -> dict[str, int]:
        """What a call uses."""
        self.bodies.append((model_id, body))
        share = self.random.random() if self.share is None else self.share
        return {"prompt_tokens": 10, "completion_tokens": int(body["max_tokens"] * share)}


class MortalStore(Store):
    """A gateway's way to the shared store, on which nothing begins any more once it is killed.

    What has begun ends first. A process that dies lets go of its locks; a task that is cancelled in
    this process, with a statement under way in a thread, may keep them.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store._engine, store._file)
        self._has_schema = True
        self.is_dead = False
        self.under_way = 0

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        if self.is_dead:
            await asyncio.Event().wait()
        self.under_way += 1
        try:
            async with super().begin() as connection:
                yield connection
        finally:
            self.under_way -= 1

    async def die(self) -> None:
        self.is_dead = True
        async with asyncio.timeout(60):
            while self.under_way:
                await asyncio.sleep(0.01)


@dataclass
class MoneyGateway:
    """One gateway."""

    url: str
    store: MortalStore
    outcomes: OutcomeLog
    purses: Purses
    journal: Journal
    server: uvicorn.Server
    serving: asyncio.Task[None]
    orchestrator: Orchestrator
    is_dead: bool = False

    async def kill(self) -> None:
        """Stop at once, as a killed process does: nothing is written, nothing is given back."""
        self.is_dead = True
        await self.store.die()
        for task in (self.outcomes._task, self.purses._task):
            if task is not None:
                task.cancel()
        self.outcomes._closed = True  # what its requests still report, nobody hears
        self.journal.close()
        self.server.force_exit = self.server.should_exit = True
        await self.serving
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()
        for work in list(self.server.server_state.tasks):
            work.cancel()

    async def stop(self) -> None:
        """End in order."""
        if self.is_dead:
            return
        self.server.should_exit = True
        await self.serving
        await self.purses.close()
        await self.outcomes.close()


@dataclass
class Bank:
    """Some gateways, and what they share."""

    config: AtlasConfig
    store: Store
    engines: Spender
    gateways: list[MoneyGateway]
    client: httpx2.AsyncClient

    async def key(self, name: str = "a team") -> tuple[str, str]:
        return await create_key(self.store, name, ["chat"])

    async def ask(
        self, key: str, gateway: int = 0, path: str = "/v1/chat/completions", **body: Any
    ) -> httpx2.Response:
        wanted = {"model": "model", "messages": [{"role": "user", "content": "How many?"}]}
        return await self.client.post(
            self.gateways[gateway].url + path,
            json=wanted | body,
            headers={"authorization": f"Bearer {key}"},
        )

    @asynccontextmanager
    async def streaming(self, key: str, **body: Any) -> AsyncIterator[AsyncIterator[str]]:
        """The lines of a streamed answer; its client leaves with the block."""
        wanted = {"model": "model", "messages": [{"role": "user", "content": "How many?"}]}
        async with self.client.stream(
            "POST",
            self.gateways[0].url + "/v1/chat/completions",
            json=wanted | {"stream": True} | body,
            headers={"authorization": f"Bearer {key}"},
        ) as response:
            yield response.aiter_lines()

    async def usage(self, key: str, per: str = "day", gateway: int = 0) -> dict[str, Any]:
        """What the owner of a key is told of one period."""
        response = await self.client.get(
            self.gateways[gateway].url + "/v1/usage", headers={"authorization": f"Bearer {key}"}
        )
        found: dict[str, Any]
        (found,) = (period for period in response.json()["data"] if period["per"] == per)
        return found

    async def written(self, key_id: str) -> tuple[float, int, int]:
        """Dollars, tokens and number of a key's requests in the store."""
        row = RequestRow
        tokens = row.prompt_tokens + row.completion_tokens
        sums = select(
            func.coalesce(func.sum(row.cost_usd), 0.0),
            func.coalesce(func.sum(tokens), 0),
            func.count(),
        ).where(row.owner == key_id)
        async with self.store.begin() as connection:
            usd, number_of_tokens, count = (await connection.execute(sums)).one()
        return float(usd), int(number_of_tokens), int(count)

    async def window(self, key_id: str) -> Any:
        """The row of the only window of a key."""
        async with self.store.begin() as connection:
            rows = await connection.execute(
                select(KeyWindowRow.__table__).where(KeyWindowRow.key_id == key_id)
            )
            return rows.one()

    async def leases(self, key_id: str) -> list[Any]:
        async with self.store.begin() as connection:
            rows = await connection.execute(
                select(KeyLeaseRow.__table__).where(KeyLeaseRow.key_id == key_id)
            )
            return list(rows)

    async def until_given_back(self, key_id: str) -> None:
        """Wait until no gateway holds anything of a key."""
        async with asyncio.timeout(60):
            while await self.leases(key_id):
                await asyncio.sleep(0.05)

    async def until_given_back_by_the_living(self, key_id: str) -> None:
        """Wait until only killed gateways hold something of a key."""
        async with asyncio.timeout(60):
            while any(of.purses._opened for of in self.gateways if not of.is_dead):
                await asyncio.sleep(0.05)

    async def expire(self, key_id: str) -> None:
        """Let the time of all leases of a key be over."""
        over = update(KeyLeaseRow).where(KeyLeaseRow.key_id == key_id).values(expires_unix_s=1.0)
        async with self.store.begin() as connection:
            await connection.execute(over)

    async def start(self, folder: Path) -> MoneyGateway:
        """One more gateway."""
        gateway = await _gateway(self.config, self.store, self.engines, folder)
        self.gateways.append(gateway)
        return gateway


def money_config(folder: Path, store_url: str, patterns: Sequence[str] = ()) -> AtlasConfig:
    """One model, at half a dollar for a million tokens."""
    price = {
        "usd_per_1m_prompt_tokens": USD_PER_TOKEN * 1e6,
        "usd_per_1m_completion_tokens": USD_PER_TOKEN * 1e6,
    }
    return AtlasConfig.model_validate(
        {
            "models": [
                {
                    "type": "remote",
                    "model_id": "model",
                    "base_url": "http://127.0.0.1:1/v1",
                    "remote_model": "x",
                    "max_completion_tokens": 1_000_000,
                    "price": price,
                }
            ],
            "patterns": [yaml.safe_load(text) for text in patterns],
            "gateway": {
                "auth": {"mode": "required"},
                "limits": {"max_completion_tokens": 1_000_000, "max_deadline_s": 60},
            },
            "data_dir": str(folder),
            "store": {"url": store_url},
        }
    )


async def _gateway(
    config: AtlasConfig, shared: Store, engines: Spender, folder: Path
) -> MoneyGateway:
    store = MortalStore(shared)
    journal = Journal(folder / "journal", 1 << 20)
    outcomes = OutcomeLog(store, flush_interval_s=0.02, journal=journal)
    outcomes.start()
    nobody = Handle(object())
    orchestrator = Orchestrator(
        config, Handle(WordEmbedder()), nobody, Handle(Controller(config)), outcomes.record, engines
    )
    await orchestrator._watcher.first()
    purses = Purses(store, outcomes, config.gateway.limits.max_deadline_s, idle_s=0.2)
    jobs = Jobs(config, store, IdleLauncher())
    app = build_api(orchestrator, store, outcomes, jobs, config, purses=purses)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    options = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(options)
    serving = asyncio.create_task(server._serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    return MoneyGateway(url, store, outcomes, purses, journal, server, serving, orchestrator)


@asynccontextmanager
async def bank(
    folder: Path, store_url: str, gateways: int = 1, patterns: Sequence[str] = ()
) -> AsyncIterator[Bank]:
    """Gateways on one store."""
    config = money_config(folder, store_url, patterns)
    engines = Spender()
    engines.pause.set()
    async with AsyncExitStack() as stack:
        store = await Store.open(store_url)
        stack.push_async_callback(store.close)
        client = httpx2.AsyncClient(timeout=60)
        await stack.enter_async_context(client)
        running = Bank(config, store, engines, [], client)
        for _ in range(gateways):
            await running.start(folder)
        try:
            yield running
        finally:
            engines.pause.set()
            for gateway in running.gateways:
                await gateway.stop()
                gateway.orchestrator._watcher._task.cancel()
                gateway.orchestrator.close()
