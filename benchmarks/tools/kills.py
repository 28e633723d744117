"""What does kill -9 of an MCP server's process, or of its Ray actor, do to other requests?

Under load on three tools (a second MCP server, the calculator, and the server that is killed), its
child and its actor are killed in turns. Callers call through `DirectTools`, which has the table of
recovery; the pool's controller is a loop that allows the definitions, as it does each second.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import ray.exceptions
from rich.console import Console

from benchmarks.stats import Target
from benchmarks.tools.calls import allowed
from serve_app.budget import Deadline
from serve_app.config.tools import CalculatorConfig, McpConfig
from serve_app.errors import AtlasError
from serve_app.orchestrator.direct import DirectTools
from serve_app.tools.mcp.actor import SessionHandle
from serve_app.tools.runner import ToolRunner

CALLERS = 4
"""On each tool."""
_PAUSE_S = 0.1
"""Of a caller after each call: all of them together leave the machine room to start a process."""
BACK_S = 10.0
_CALM_S = 12.0
"""Between kills: longer than a connection has to last to count as good."""
_LOST_S = 120.0
_CALL_S = 30.0
_CONTROLLER_EVERY_S = 1.0
_MARK = "ATLAS_BENCHMARK"

console = Console(width=120)


def _echo(tool_id: str, mark: str) -> McpConfig:
    return McpConfig(
        tool_id=tool_id,
        command=sys.executable,
        args=("-m", "benchmarks.tools.echo", "stdio"),
        env={"PYTHONPATH": str(Path(__file__).parents[2]), _MARK: mark},
        num_cpus=0,
        effects="none",
        max_concurrency=64,
    )


def _child(mark: str) -> psutil.Process:
    """The server's process, by its environment."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_server = "benchmarks.tools.echo" in process.cmdline()
            if is_server and process.environ().get(_MARK) == mark:
                return process
    raise SystemExit("the server's process is not there")


class _Load:
    """Calls on each tool, and how they end."""

    def __init__(self, direct: DirectTools) -> None:
        self._direct = direct
        self.ended: Counter[tuple[str, bool]] = Counter()
        self.last_good_s: dict[str, float] = {}
        self.failures: list[str] = []

    async def call_forever(self, tool_id: str, arguments: dict[str, Any]) -> None:
        while True:
            began_s = time.monotonic()
            try:
                (function,) = self._direct.functions(tool_id)
                await self._direct.call(tool_id, function, arguments, Deadline.after(_CALL_S))
            except (AtlasError, ValueError) as error:  # no function: the server is away
                self.ended[tool_id, False] += 1
                if tool_id != "killed":
                    self.failures.append(f"{tool_id}: {error}")
                await asyncio.sleep(_PAUSE_S)
            else:
                self.ended[tool_id, True] += 1
                self.last_good_s[tool_id] = began_s
                await asyncio.sleep(_PAUSE_S)

    async def back_after_s(self) -> float:
        """Seconds until a call that begins now or later succeeds on the server that was killed."""
        killed_s = time.monotonic()
        async with asyncio.timeout(_LOST_S):
            while self.last_good_s.get("killed", 0.0) <= killed_s:
                await asyncio.sleep(0.01)
        return time.monotonic() - killed_s


async def measure(folder: Path, num_kills: int) -> dict[str, Any]:
    """Kill the child and the actor so often, in turns."""
    killed, other = _echo("killed", str(folder)), _echo("other", f"{folder}-other")
    runner = ToolRunner([killed, other, CalculatorConfig(tool_id="calculator", max_concurrency=64)])
    pins = {config.tool_id: await allowed(config) for config in (killed, other)}
    handles = [SessionHandle(config) for config in (killed, other)]

    async def control() -> None:
        while True:
            for handle, config in zip(handles, (killed, other), strict=True):
                with contextlib.suppress(ray.exceptions.RayError):
                    await handle.follow(pins[config.tool_id])
            await asyncio.sleep(_CONTROLLER_EVERY_S)

    await runner.start()
    load, back = _Load(DirectTools(runner)), {"child": [], "actor": []}  # type: ignore[var-annotated]
    tasks = [asyncio.create_task(control())]
    for tool_id, arguments in (
        ("killed", {"text": "hello"}),
        ("other", {"text": "hello"}),
        ("calculator", {"expression": "20 * 5"}),
    ):
        tasks += [
            asyncio.create_task(load.call_forever(tool_id, arguments)) for _ in range(CALLERS)
        ]
    try:
        for number in range(2 * num_kills):
            await asyncio.sleep(_CALM_S)
            which = "actor" if number % 2 else "child"
            child = await asyncio.to_thread(_child, str(folder))
            process = child if which == "child" else child.parent()
            assert process is not None
            process.kill()
            back[which].append(await load.back_after_s())
            console.print(f"{which} killed: back after {back[which][-1]:.2f} s")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        runner.close()
    return {
        "kills": 2 * num_kills,
        "calls": {
            tool_id: {"good": load.ended[tool_id, True], "failed": load.ended[tool_id, False]}
            for tool_id in ("killed", "other", "calculator")
        },
        "failures_of_others": load.failures[:10],
        "back_after_s": back,
    }


def run(num_kills: int) -> tuple[dict[str, Any], list[Target]]:
    """Kill under load; Ray must be up."""
    with tempfile.TemporaryDirectory() as folder:
        record = asyncio.run(measure(Path(folder), num_kills))
    console.print(record["calls"])
    others = record["calls"]["other"]["failed"] + record["calls"]["calculator"]["failed"]
    found = [Target("kills: other requests that failed", others, "<=", 0)]
    for which, seconds in record["back_after_s"].items():
        name = f"kills: seconds until back, {which}, at most"
        found.append(Target(name, round(max(seconds), 2), "<=", BACK_S))
    return record, found
