"""The protocol's own servers in JavaScript, of the SDK before ours, through our client.

Needs Node and `npm ci --prefix tests/npm`; skipped where either is missing.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tools.servers import missing_of_node, node_server
from serve_app.config.tools import McpConfig
from serve_app.errors import ToolFailed, ToolRetry, ToolTimeout
from serve_app.tools.mcp.session import McpSession

LONG_S = 120.0

pytestmark = pytest.mark.skipif(missing_of_node() is not None, reason=str(missing_of_node()))


@asynccontextmanager
async def session(config: McpConfig) -> AsyncIterator[McpSession]:
    """A session with a server, all of whose functions are allowed."""
    one = McpSession(config)
    one.start()
    try:
        async with asyncio.timeout(LONG_S):
            while not (state := one.state()).is_up:
                await asyncio.sleep(0.1)
        assert state.left_out == {}
        one.allow({name: sha256 for name, (sha256, _) in state.definitions.items()})
        yield one
    finally:
        await one.close()


async def said(one: McpSession, function: str, **arguments: Any) -> str:
    return (await one.call(function, arguments, LONG_S)).text


async def test_everything(tmp_path: Path) -> None:
    async with session(node_server("everything", tmp_path)) as one:
        assert len(one.functions()) == 13
        assert "42" in await said(one, "everything__get-sum", a=40, b=2)
        image = await said(one, "everything__get-tiny-image")
        assert "[image of type image/png, left out]" in image
        links = await said(one, "everything__get-resource-links", count=2)
        assert links.count("[link to a resource: ") == 2
        environment = await said(one, "everything__get-env")
        told = json.loads(environment[environment.index("{") :])
        assert set(told) <= {"PATH", "HOME", "LANG"}
        with pytest.raises(ToolTimeout):
            await one.call("everything__trigger-long-running-operation", {"duration": 60}, 0.5)
        assert "still here" in await said(one, "everything__echo", message="still here")


async def test_what_asks_for_a_form_gets_none(tmp_path: Path) -> None:
    async with session(node_server("everything", tmp_path)) as one:
        arguments = {"topic": "python", "ambiguous": True}
        with pytest.raises((ToolFailed, ToolRetry)):
            await one.call("everything__simulate-research-query", arguments, LONG_S)
        assert "still here" in await said(one, "everything__echo", message="still here")


async def test_memory_remembers(tmp_path: Path) -> None:
    ada = {"name": "Ada", "entityType": "person", "observations": ["likes chess"]}
    for _ in range(2):  # another process reads what the first has kept
        async with session(node_server("memory", tmp_path)) as one:
            await said(one, "memory__create_entities", entities=[ada])
            found = await said(one, "memory__search_nodes", query="chess")
            assert found.count('"Ada"') == 1


@pytest.mark.parametrize("sandboxed", [False, True])
async def test_filesystem_stays_below_its_root(tmp_path: Path, sandboxed: bool) -> None:
    root, outside = tmp_path / "root", tmp_path / "secret.txt"
    root.mkdir()
    outside.write_text("secret")
    (root / "notes.txt").write_text("hello")
    config = node_server("filesystem", root)
    if sandboxed:
        modules = str(Path(config.args[0]).parents[4])
        node = str(Path(shutil.which("node") or "").resolve().parent)
        places = {"read": [modules, node], "write": [str(root)]}
        config = McpConfig.model_validate(config.model_dump() | {"sandbox": places})
    async with session(config) as one:
        notes = str(root / "notes.txt")
        assert "hello" in await said(one, "filesystem__read_text_file", path=notes)
        await said(one, "filesystem__write_file", path=str(root / "new.txt"), content="new")
        assert (root / "new.txt").read_text() == "new"
        for path in (str(outside), str(root / "../secret.txt"), "/etc/passwd"):
            with pytest.raises((ToolFailed, ToolRetry)):
                await said(one, "filesystem__read_text_file", path=path)
