"""A tool whose functions take time to read holds nobody else; files and sandbox are real."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import duckdb
import pytest

from serve_app.config.tools import CalculatorConfig, OpenApiConfig, SqlConfig, ToolsetConfig
from serve_app.errors import ToolFailed, ToolTimeout
from serve_app.tools.builtin.sql import SqlTool
from serve_app.tools.openapi.tool import OpenApiTool
from serve_app.tools.runner import ToolRunner

LONG_S = 120.0


def database(folder: Path) -> SqlConfig:
    path = folder / "shop.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE items (name TEXT)")
    path.chmod(0o644)
    return SqlConfig(tool_id="shop", database=path)


def large_file(folder: Path) -> OpenApiConfig:
    paths = {
        f"/things/{number}": {"get": {"operationId": f"get{number}", "responses": {}}}
        for number in range(256)
    }
    spec = folder / "api.json"
    info = {"title": "Things", "version": "1"}
    spec.write_text(json.dumps({"openapi": "3.0.0", "info": info, "paths": paths}))
    return OpenApiConfig(
        tool_id="crm", description="Things.", spec=spec, server="https://crm.internal"
    )


@pytest.mark.parametrize(("make", "tool"), [(database, SqlTool), (large_file, OpenApiTool)])
async def test_the_loop_goes_on_while_a_tool_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, tool: type[SqlTool | OpenApiTool]
) -> None:
    config, may_go_on, readers = make(tmp_path), threading.Event(), []
    functions = tool.functions

    def waits(self: Any) -> Any:
        readers.append(threading.current_thread())
        assert may_go_on.wait(LONG_S)
        return functions(self)

    monkeypatch.setattr(tool, "functions", waits)
    runner = ToolRunner([])
    runner.use([config])
    asking = asyncio.create_task(runner.ready(config.tool_id, LONG_S))
    for _ in range(100):
        await asyncio.sleep(0)  # each is a turn of the loop, which reads nothing
    assert threading.main_thread() not in readers
    assert not asking.done()
    may_go_on.set()
    await asking
    assert len(runner.functions(config.tool_id)) == (1 if tool is SqlTool else 256)
    assert len(readers) == 1
    runner.close()


async def test_who_cannot_wait_for_a_tool_that_is_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()

    def waits(self: Any) -> Any:
        assert may_go_on.wait(LONG_S)
        return ()

    monkeypatch.setattr(SqlTool, "functions", waits)
    runner = ToolRunner([])
    both = ToolsetConfig(tool_id="both", description="Both.", members=("calculator", "shop"))
    runner.use([database(tmp_path), CalculatorConfig(tool_id="calculator"), both])
    with pytest.raises(ToolTimeout, match="'shop' is still being read"):
        await runner.ready("shop", 0.01)
    await runner.ready("both", 0.01)
    assert [function.name for function in runner.functions("both")] == ["calculator"]
    may_go_on.set()
    runner.close()


async def test_a_file_that_cannot_be_read_fails_the_calls(tmp_path: Path) -> None:
    runner = ToolRunner([])
    missing = OpenApiConfig(tool_id="crm", description="Things.", spec=tmp_path / "no.json")
    runner.use([missing])
    await runner.ready("crm", LONG_S)
    with pytest.raises(ToolFailed):
        runner.functions("crm")
    runner.close()
