"""Is a call that must happen once made twice, where gateways are killed while they make it?

Three gateways (`gateway`) on one SQLite store, before a real MCP server that counts (`counter`).
Each order is a POST with an `Idempotency-Key`, sent to one gateway after another until it is
answered; of the gateways, one is killed (-9) and started again after every few orders.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console

from benchmarks.ports import free_port
from benchmarks.stats import Target
from benchmarks.tools.gateway import MODEL

GATEWAYS = 3
CALLERS = 8
ORDERS_PER_KILL = 20
_START_S = 300.0
_ORDER_S = 300.0
_PAUSE_S = 0.2
ROOT = Path(__file__).parents[2]

console = Console(width=120)


class Gateways:
    """The processes; each keeps its port when it is started again."""

    def __init__(self, folder: Path, number: int = GATEWAYS) -> None:
        """Prepare; `start` starts them and the counting server.

        Args:
            folder: Of their store, and of the book of orders.
            number: How many there are.
        """
        self._folder = folder
        self.book = folder / "book"
        self.ports = [free_port() for _ in range(number)]
        self._counter_port = free_port()
        self._counter: subprocess.Popen[bytes] | None = None
        self._gateways: dict[int, subprocess.Popen[bytes]] = {}

    def url(self, port: int) -> str:
        """Where a gateway listens."""
        return f"http://127.0.0.1:{port}"

    async def start(self) -> None:
        """Start all, one after the other: the first makes the store."""
        self._counter = _process("counter", str(self._counter_port), str(self.book))
        await _answers(f"http://127.0.0.1:{self._counter_port}/mcp")
        for port in self.ports:
            await self.start_one(port)

    async def start_one(self, port: int) -> None:
        """Start a gateway, and wait until it answers."""
        arguments = (str(port), str(self._counter_port), str(self._folder))
        self._gateways[port] = _process("gateway", *arguments)
        await _answers(f"{self.url(port)}/healthz")

    def kill(self, port: int) -> None:
        """Kill a gateway, as a machine that loses its power does."""
        self._gateways[port].kill()
        self._gateways[port].wait()

    def orders(self) -> Counter[str]:
        """How often each order was charged."""
        return Counter(self.book.read_text().split()) if self.book.exists() else Counter()

    def close(self) -> None:
        """End all."""
        for process in (*self._gateways.values(), self._counter):
            if process is not None:
                process.kill()
                process.wait()


def _process(module: str, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", f"benchmarks.tools.{module}", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


async def _answers(url: str) -> None:
    async with asyncio.timeout(_START_S), httpx2.AsyncClient() as client:
        while True:
            try:
                await client.get(url)
            except httpx2.HTTPError:
                await asyncio.sleep(0.05)
            else:
                return


def order_body(order: str) -> dict[str, Any]:
    """The request that has an order charged."""
    return {"model": MODEL, "messages": [{"role": "user", "content": order}]}


async def send_order(client: httpx2.AsyncClient, gateways: Gateways, order: str) -> str:
    """Send one order until it is answered.

    Returns:
        `done`, or `unknown` where the gateways say that nobody knows whether it was charged.
    """
    deadline_s = time.monotonic() + _ORDER_S
    port = random.choice(gateways.ports)
    while time.monotonic() < deadline_s:
        url = f"{gateways.url(port)}/v1/chat/completions"
        headers = {"idempotency-key": order}
        try:
            response = await client.post(url, json=order_body(order), headers=headers)
        except httpx2.HTTPError:
            port = random.choice(gateways.ports)
            await asyncio.sleep(_PAUSE_S)
            continue
        if response.status_code == 200:
            return "done"
        if response.json()["error"]["code"] == "outcome_unknown":
            return "unknown"
        await asyncio.sleep(_PAUSE_S)
    return "not answered"


async def measure(folder: Path, num_orders: int) -> dict[str, Any]:
    """All orders, with gateways killed in between."""
    gateways = Gateways(folder)
    outcomes: dict[str, str] = {}
    orders = [f"order-{number}" for number in range(num_orders)]
    kills = 0

    async def caller(client: httpx2.AsyncClient, waiting: list[str]) -> None:
        while waiting:
            order = waiting.pop()
            outcomes[order] = await send_order(client, gateways, order)

    async def killer() -> None:
        nonlocal kills
        killed_at = 0
        while True:
            await asyncio.sleep(0.01)
            if len(outcomes) - killed_at < ORDERS_PER_KILL:
                continue
            killed_at = len(outcomes)
            port = gateways.ports[kills % len(gateways.ports)]
            gateways.kill(port)
            kills += 1
            await gateways.start_one(port)

    try:
        await gateways.start()
        waiting = list(orders)
        async with httpx2.AsyncClient(timeout=60) as client:
            killing = asyncio.create_task(killer())
            await asyncio.gather(*(caller(client, waiting) for _ in range(CALLERS)))
            killing.cancel()
        charged = gateways.orders()
    finally:
        gateways.close()
    said = Counter(outcomes.values())
    return {
        "orders": num_orders,
        "gateways": GATEWAYS,
        "kills": kills,
        "answered": said["done"],
        "outcome_unknown": said["unknown"],
        "unknown_but_charged": sum(charged[o] for o, out in outcomes.items() if out == "unknown"),
        "not_answered": said["not answered"],
        "answered_but_not_charged": sum(
            charged[order] == 0 for order, outcome in outcomes.items() if outcome == "done"
        ),
        "charged_twice": sum(number > 1 for number in charged.values()),
    }


def run(num_orders: int) -> tuple[dict[str, Any], list[Target]]:
    """Send the orders, kill, count."""
    with tempfile.TemporaryDirectory() as folder:
        record = asyncio.run(measure(Path(folder), num_orders))
    console.print(record)
    return record, [
        Target("once: calls made twice", record["charged_twice"], "<=", 0),
        Target("once: answered and not made", record["answered_but_not_charged"], "<=", 0),
        Target("once: not answered", record["not_answered"], "<=", 0),
    ]
