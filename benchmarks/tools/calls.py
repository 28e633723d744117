"""What does a call of a tool cost beyond the client or library that it stands on?

Each way of calling is measured bare (the MCP SDK's own client over standard streams and over HTTP,
`duckdb` and `sqlite3` on an open connection) and through our runner (a Ray actor for MCP, a
sandboxed Ray task for `sql`), taking turns in one run, with one caller and with sixteen. A target
holds the difference of the medians.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import duckdb
import httpx2
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from rich.console import Console
from rich.table import Table

from benchmarks.ports import free_port
from benchmarks.stats import Target, percentile
from serve_app.config.tools import McpConfig, SqlConfig
from serve_app.tools.mcp.actor import SessionHandle
from serve_app.tools.runner import ToolRunner

CALLERS = (1, 16)
ROUNDS = 4
"""In which the ways take turns."""
ROWS = 2000
QUERY = "SELECT city, count(*) AS number FROM people GROUP BY city ORDER BY number DESC LIMIT 5"
MCP_MS = 5.0
SQL_MS = 25.0
_PATIENCE_S = 60.0

console = Console(width=120)

Call = Callable[[], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Pairing:
    """One way of calling, bare and through us; medians in milliseconds."""

    name: str
    callers: int
    bare_ms: float
    ours_ms: float

    @property
    def added_ms(self) -> float:
        """What we add."""
        return self.ours_ms - self.bare_ms


async def timed(call: Call, callers: int, num_calls: int) -> list[float]:
    """Milliseconds of each call, with so many callers at once."""
    took: list[float] = []

    async def ask() -> None:
        while len(took) < num_calls:
            began_s = time.perf_counter()
            await call()
            took.append((time.perf_counter() - began_s) * 1e3)

    await asyncio.gather(*(ask() for _ in range(callers)))
    return took


async def pairing(name: str, bare: Call, ours: Call, callers: int, num_calls: int) -> Pairing:
    """Both in turns."""
    took: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(ROUNDS):
        for is_ours, call in ((False, bare), (True, ours)):
            await timed(call, callers, callers)
            took[is_ours] += await timed(call, callers, num_calls // ROUNDS)
    medians = [percentile(took[is_ours], 50) or 0.0 for is_ours in (False, True)]
    return Pairing(name, callers, *medians)


def make_databases(folder: Path) -> tuple[Path, Path]:
    """The same table for DuckDB and for SQLite."""
    rows = [(number, f"name {number}", f"city {number % 37}") for number in range(ROWS)]
    duck, lite = folder / "people.duckdb", folder / "people.sqlite"
    with duckdb.connect(str(duck)) as connection:
        connection.execute("CREATE TABLE people (id INTEGER, name TEXT, city TEXT)")
        connection.executemany("INSERT INTO people VALUES (?, ?, ?)", rows)
    database = sqlite3.connect(lite)
    database.execute("CREATE TABLE people (id INTEGER, name TEXT, city TEXT)")
    database.executemany("INSERT INTO people VALUES (?, ?, ?)", rows)
    database.commit()
    database.close()
    for path in (duck, lite):
        path.chmod(0o644)
    return duck, lite


async def allowed(config: McpConfig) -> dict[str, str]:
    """Wait until a server's functions are known, and allow them, as the pool's controller does.

    Returns:
        The hashes that are allowed.
    """
    handle = SessionHandle(config)
    async with asyncio.timeout(_PATIENCE_S):
        while not (state := await handle.follow({})).is_up:
            await asyncio.sleep(0.1)
    pins = {name: sha256 for name, (sha256, _) in state.definitions.items()}
    await handle.follow(pins)
    return pins


async def measure(folder: Path, num_calls: int) -> list[Pairing]:
    """Every way of calling, with every number of callers."""
    duck, lite = make_databases(folder)
    port = free_port()
    command = (sys.executable, "-m", "benchmarks.tools.echo")
    stdio = McpConfig(
        tool_id="stdio",
        command=command[0],
        args=(*command[1:], "stdio"),
        env={"PYTHONPATH": os.getcwd()},
        num_cpus=0,
        effects="none",
        max_concurrency=64,
    )
    http = McpConfig(
        tool_id="http",
        url=f"http://127.0.0.1:{port}/mcp",
        num_cpus=0,
        effects="none",
        max_concurrency=64,
    )
    databases = [
        SqlConfig(tool_id=name, database=path, max_concurrency=64)
        for name, path in (("duckdb", duck), ("sqlite", lite))
    ]
    async with AsyncExitStack() as stack:
        server = subprocess.Popen([*command, "http", str(port)], stderr=subprocess.DEVNULL)
        stack.callback(server.wait)
        stack.callback(server.terminate)
        await _listening(port)
        runner = ToolRunner([stdio, http, *databases], folder / "cache")
        stack.callback(runner.close)
        for config in (stdio, http):
            await allowed(config)
        await runner.start()
        parameters = StdioServerParameters(
            command=stdio.command or "", args=list(stdio.args), env=dict(stdio.env)
        )
        bare_stdio = await stack.enter_async_context(Client(stdio_client(parameters)))
        bare_http = await stack.enter_async_context(Client(http.url or ""))
        open_duck = stack.enter_context(duckdb.connect(str(duck), read_only=True))
        open_lite = sqlite3.connect(lite)
        stack.callback(open_lite.close)

        def of_client(client: Client) -> Call:
            return lambda: client.call_tool("echo", {"text": "hello"})

        def of_mcp(tool_id: str) -> Call:
            return lambda: runner.run(
                tool_id, {"text": "hello"}, deadline_s=_PATIENCE_S, function=f"{tool_id}__echo"
            )

        def of_sql(tool_id: str) -> Call:
            return lambda: runner.run(tool_id, {"query": QUERY}, deadline_s=_PATIENCE_S)

        async def of_duckdb() -> Any:
            return open_duck.execute(QUERY).fetchall()

        async def of_sqlite() -> Any:
            return open_lite.execute(QUERY).fetchall()

        ways: list[tuple[str, Call, Call]] = [
            ("MCP, stdio", of_client(bare_stdio), of_mcp("stdio")),
            ("MCP, HTTP", of_client(bare_http), of_mcp("http")),
            ("sql, DuckDB", of_duckdb, of_sql("duckdb")),
            ("sql, SQLite", of_sqlite, of_sql("sqlite")),
        ]
        found = []
        for callers in CALLERS:
            for name, bare, ours in ways:
                found.append(await pairing(name, bare, ours, callers, num_calls))
                console.print(f"{name}, {callers} at once: {found[-1].added_ms:.1f} ms added")
        return found


async def _listening(port: int) -> None:
    async with asyncio.timeout(_PATIENCE_S), httpx2.AsyncClient() as client:
        while True:
            try:
                await client.get(f"http://127.0.0.1:{port}/mcp")
            except httpx2.HTTPError:
                await asyncio.sleep(0.1)
            else:
                return


def targets(found: list[Pairing]) -> list[Target]:
    """What is added to the median, against what may be."""
    return [
        Target(
            f"ms added, {pair.name}, {pair.callers} at once",
            round(pair.added_ms, 3),
            "<=",
            MCP_MS if pair.name.startswith("MCP") else SQL_MS,
        )
        for pair in found
    ]


def run(num_calls: int) -> tuple[dict[str, Any], list[Target]]:
    """Measure; Ray must be up."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        found = asyncio.run(measure(Path(folder), num_calls))
    table = Table("call", "at once", "bare p50 ms", "ours p50 ms", "added ms")
    for pair in found:
        figures = (pair.bare_ms, pair.ours_ms, pair.added_ms)
        table.add_row(pair.name, str(pair.callers), *(f"{figure:.2f}" for figure in figures))
    console.print(table)
    pairings = [asdict(pair) | {"added_ms": pair.added_ms} for pair in found]
    return {"calls": num_calls, "pairings": pairings}, targets(found)
