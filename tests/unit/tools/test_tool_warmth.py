"""A tool that is slow to get ready delays nothing for ever; only the Ray task is scripted."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from serve_app.config.tools import CalculatorConfig, PythonConfig
from serve_app.tools import runner
from serve_app.tools.runner import ToolRunner


class Slow:
    """A Ray task that ends when it is told to."""

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.calls = 0

    def remote(self, *arguments: Any) -> Any:
        self.calls += 1
        return self.end()

    async def end(self) -> list[str]:
        await self.done.wait()
        return [""]


async def test_a_slow_tool_holds_a_start_up_for_a_limited_time_and_is_warmed_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runner, "START_TIMEOUT_S", 0.05)
    monkeypatch.setattr(runner, "KEEP_WARM_S", 0.001)
    tools, slow = ToolRunner([CalculatorConfig(tool_id="slow")]), Slow()
    entry = tools._entries["slow"]
    entry.warm = slow
    with caplog.at_level(logging.WARNING):
        await tools.start()
    assert "tool slow: not warm" in caplog.text
    await asyncio.sleep(0.1)
    assert slow.calls == 1  # however often it is asked for
    slow.done.set()
    async with asyncio.timeout(10):
        while slow.calls == 1:
            await asyncio.sleep(0.01)
    tools.close()


async def test_tools_without_a_worker_of_their_own_are_warmed_in_one() -> None:
    class Heard:
        def __init__(self) -> None:
            self.asked: list[list[str]] = []

        async def remote(self, config_jsons: list[str]) -> list[str]:
            self.asked.append(config_jsons)
            return ["ToolFailed", ""][: len(config_jsons)]

    tools = ToolRunner(
        [
            CalculatorConfig(tool_id="a"),
            PythonConfig(tool_id="b"),
            PythonConfig(tool_id="c", packages=("json",)),
        ]
    )
    heard = Heard()
    for entry in tools._entries.values():
        entry.warm = heard
    await tools.start(keep_warm=False)
    asked = [[json.loads(config)["tool_id"] for config in one] for one in heard.asked]
    assert asked == [["a", "b"], ["c"]]


async def test_closing_gives_up_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "START_TIMEOUT_S", 0.05)
    tools, slow = ToolRunner([CalculatorConfig(tool_id="slow")]), Slow()
    tools._entries["slow"].warm = slow
    await tools.start(keep_warm=False)
    tools.close()
    async with asyncio.timeout(10):
        while tools._entries["slow"].warming is not None:
            await asyncio.sleep(0.01)
