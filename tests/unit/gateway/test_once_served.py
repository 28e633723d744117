"""A tool that acts once, asked over HTTP: the real gateway, orchestrator and store; only the engine
and the tool do as they are told."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn

from serve_app.errors import EngineError, ToolFailed
from serve_app.gateway.app import build_api
from serve_app.jobs import Jobs
from serve_app.orchestrator.orchestrator import Orchestrator
from serve_app.store import OutcomeLog, Store
from tests.executor_fakes import Bench, reply
from tests.gateway_fakes import IdleLauncher
from tests.path2_fakes import Controller, Handle

CALL = '{"expression": "20 * 5"}'


@dataclass
class Served:
    """A deployment with one model and a calculator that acts once."""

    bench: Bench
    url: str

    async def ask(self, key: str | None, **fields: Any) -> httpx2.Response:
        """Have the model call the tool."""
        messages = [{"role": "user", "content": "What is 20 * 5?"}]
        headers = {} if key is None else {"idempotency-key": key}
        async with httpx2.AsyncClient(timeout=60) as client:
            return await client.post(
                f"{self.url}/v1/chat/completions",
                json={"model": "m@calculator", "messages": messages, **fields},
                headers=headers,
            )

    @property
    def num_effects(self) -> int:
        return len(self.bench.tools.arguments)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    bench = Bench(tmp_path, reply(calls=(CALL,)), reply("It is 100."), effects="once")
    store = await Store.open(bench.config.store_url())
    outcomes = OutcomeLog(store, flush_interval_s=0.05)
    nobody, controller = Handle(None), Handle(Controller(bench.config))
    orchestrator = Orchestrator(
        bench.config, nobody, nobody, controller, outcomes.record, bench.engines
    )
    orchestrator._pairs._runner = orchestrator._pairs.parts.tools._runner = bench.tools
    await orchestrator._watcher.first()
    jobs = Jobs(bench.config, store, IdleLauncher())
    api = build_api(orchestrator, store, outcomes, jobs, bench.config)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(api, log_config=None, access_log=False, lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    yield Served(bench, f"http://127.0.0.1:{listener.getsockname()[1]}")
    server.should_exit = True
    await serving
    orchestrator._watcher._task.cancel()
    await outcomes.close()
    await store.close()


@pytest.mark.parametrize("fields", [{}, {"stream": True}], ids=["whole", "streamed"])
async def test_without_a_key_it_is_a_400_that_names_the_header(
    served: Served, fields: dict[str, Any]
) -> None:
    response = await served.ask(None, **fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("idempotency_key_required", "Idempotency-Key")
    assert "Idempotency-Key" in error["message"]
    assert served.num_effects == 0


@pytest.mark.parametrize("fields", [{}, {"stream": True}], ids=["whole", "streamed"])
async def test_with_a_key_it_acts_once_however_often_it_is_asked(
    served: Served, fields: dict[str, Any]
) -> None:
    first = await served.ask("key", **fields)
    assert "is 100." in first.text
    again = await served.ask("key", **fields)
    assert again.headers["idempotent-replayed"] == "true"
    assert "It is 100." in again.text
    assert served.num_effects == 1


@pytest.mark.parametrize("fails", ["tool", "engine"])
async def test_a_failure_after_it_acted_is_never_tried_again(served: Served, fails: str) -> None:
    if fails == "tool":
        served.bench.tools.says = ToolFailed("half done")
    else:
        served.bench.replies[:] = [reply(calls=(CALL,)), EngineError("no")]
    assert (await served.ask("key")).status_code >= 500
    for _ in range(2):
        again = await served.ask("key")
        assert (again.status_code, again.json()["error"]["code"]) == (409, "outcome_unknown")
    assert served.num_effects == 1


async def test_a_failure_before_it_acted_frees_the_key(served: Served) -> None:
    served.bench.replies[:] = [EngineError("no"), reply(calls=(CALL,)), reply("It is 100.")]
    assert (await served.ask("key")).status_code == 502
    assert served.num_effects == 0
    again = await served.ask("key")
    assert again.status_code == 200
    assert served.num_effects == 1
