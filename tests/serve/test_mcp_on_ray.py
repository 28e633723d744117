"""The real time server in its actor: a pair answers through it, and kills heal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import ray.exceptions

from serve_app.budget import Budget, Deadline
from serve_app.config import AtlasConfig
from serve_app.config.tools import McpConfig
from serve_app.errors import ToolFailed
from serve_app.orchestrator.answer import text_of
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.pairs.runner import PairRunner
from serve_app.orchestrator.trace import Trace
from serve_app.schemas import ChatCall, Limits, Pair
from serve_app.tools.mcp.actor import SessionHandle
from serve_app.tools.mcp.state import SessionState
from serve_app.tools.runner import ToolRunner
from tests.executor_fakes import USAGE, reply
from tests.path2_fakes import Engines

LONG_S = 120.0
CONVERT = {"source_timezone": "Asia/Tokyo", "time": "12:00", "target_timezone": "Africa/Lagos"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """The session's cluster if it runs, else one of two CPUs."""
    if ray.is_initialized():
        yield
        return
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


def clock(tmp_path: Path) -> McpConfig:
    """The time server, which tells its processes by the test's folder in their environment."""
    return McpConfig(
        tool_id="clock",
        command=sys.executable,
        args=("-m", "mcp_server_time", "--local-timezone", "UTC"),
        env={"OF_TEST": str(tmp_path)},
        num_cpus=0,
        effects="none",
    )


def child_of(tmp_path: Path) -> psutil.Process:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("OF_TEST") == str(tmp_path) and process.is_running():
                found.append(process)
    (child,) = found
    return child


async def told(handle: SessionHandle, pins: dict[str, str]) -> SessionState:
    """How the session stands once it is up and allows these."""
    async with asyncio.timeout(LONG_S):
        while True:
            with contextlib.suppress(ray.exceptions.RayError):
                state = await handle.follow(pins)
                if state.is_up:
                    return state
            await asyncio.sleep(0.1)


async def answered(tools: ToolRunner) -> str:
    """The time server's answer, once it gives one."""
    async with asyncio.timeout(LONG_S):
        while True:
            try:
                called = "clock__convert_time"
                result = await tools.run("clock", CONVERT, deadline_s=30, function=called)
            except ToolFailed:
                await asyncio.sleep(0.1)
            else:
                return result.text


def calls(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    }
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    return {"choices": [choice], "usage": USAGE}


@pytest.mark.usefixtures("cluster")
async def test_a_pair_answers_through_the_actor_and_killed_processes_come_back(
    tmp_path: Path,
) -> None:
    settings = clock(tmp_path)
    model = {"type": "remote", "base_url": "http://127.0.0.1:1/v1", "remote_model": "x"}
    config = AtlasConfig.model_validate(
        {
            "models": [model | {"model_id": "m", "tools": ["none", "clock"]}],
            "tools": [settings.model_dump(mode="json")],
            "data_dir": str(tmp_path),
        }
    )
    handle, tools = SessionHandle(settings), ToolRunner(config.tools)
    await told(handle, {})
    with pytest.raises(ToolFailed, match="offers no function now"):
        await tools.ready("clock", LONG_S)
    state = await told(handle, {})
    pins = {name: sha256 for name, (sha256, _) in state.definitions.items()}
    await told(handle, pins)

    replies = [calls("clock__convert_time", CONVERT), reply("04:00")]
    engines = Engines(says={"m": lambda body: replies.pop(0)})
    pairs = PairRunner(config, engines, tools)
    call = ChatCall(
        request_id="req_1",
        model="m@clock",
        messages=({"role": "user", "content": "When?"},),
        sampling={},
        limits=Limits(alpha=0.0, deadline_s=LONG_S),
    )
    trace = Trace("req_1")
    work = PairWork(Pair("m", "clock"), call, Budget(Deadline.after(LONG_S)), trace.root)
    assert text_of(await pairs.run(work)) == "04:00"
    (called,) = trace.root.tool_calls()
    assert called.ok
    assert "04:00:00+01:00" in called.text

    child = child_of(tmp_path)
    actor = child.parent()
    assert actor is not None
    assert actor.pid != psutil.Process().pid
    child.kill()
    assert "04:00:00+01:00" in await answered(tools)
    assert child_of(tmp_path).pid != child.pid

    actor.kill()
    await told(handle, pins)  # as the controller does each second
    assert "04:00:00+01:00" in await answered(tools)
    psutil.wait_procs([child], timeout=30)
    assert child_of(tmp_path).parent() != actor
    tools.close()
    ray.kill(handle._actor(), no_restart=True)
