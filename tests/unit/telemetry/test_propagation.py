"""Calls of others are told which trace they are part of: models, tool tasks, APIs, MCP servers."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.config import RemoteModelConfig
from serve_app.config.tools import McpConfig, OpenApiConfig
from serve_app.models.clients import ModelClients
from serve_app.models.remote import RemoteModel
from serve_app.tools.entry import entry_of
from serve_app.tools.mcp.session import McpSession
from serve_app.tools.openapi.tool import OpenApiTool
from serve_app.trace_context import CURRENT, TraceContext, begin_trace
from tests import mcp_servers
from tests.otlp_collector import collector
from tests.path2_fakes import Handle
from tests.telemetry_fakes import observed
from tests.unit.telemetry.test_tracing import CALLER, TRACE_ID, root_of, traced_config
from tests.web_fakes import Site, running_site

ANSWER = {
    "id": "x",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
    ],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}
TRACE = TraceContext("req_1", TRACE_ID, None, True, "vendor=1")


@pytest.fixture
def site() -> Iterator[Site]:
    with running_site() as running:
        running.page("/v1/chat/completions", json.dumps(ANSWER), "application/json")
        yield running


@pytest.fixture(autouse=True)
def _nothing_is_traced_afterwards() -> Iterator[None]:
    yield
    CURRENT.set(None)


def clients_of(site: Site) -> ModelClients:
    """The gateway's way to a remote model whose endpoint is the site."""
    config = RemoteModelConfig(
        type="remote", model_id="small", base_url=f"{site.url}/v1", remote_model="x"
    )
    clients = ModelClients()
    clients._handles = {"application": Handle(RemoteModel(config))}
    clients._applications = {"small": "application", "large": "application"}
    clients.use = lambda applications: None  # type: ignore[method-assign]
    return clients


async def test_a_remote_model_is_told_the_span_of_its_call(tmp_path: Path, site: Site) -> None:
    with collector() as at:
        async with observed(traced_config(tmp_path, at), clients_of(site)) as gateway:
            response = await gateway.ask(model="small", headers=CALLER)
            assert response.status_code == 200, response.text
        (request,) = site.requests
        chat = at.named("chat small")
    assert request.headers["traceparent"] == f"00-{TRACE_ID}-{chat.span_id}-01"
    assert request.headers["tracestate"] == "vendor=1"
    assert "trace" not in json.loads(request.body)


async def test_where_nothing_is_traced_a_model_is_told_nothing(tmp_path: Path, site: Site) -> None:
    with collector() as at:
        config = traced_config(tmp_path, at)
        config = config.model_copy(update={"telemetry": type(config.telemetry)()})
        async with observed(config, clients_of(site)) as gateway:
            await gateway.ask(model="small", headers=CALLER)
    assert "traceparent" not in site.requests[0].headers


async def test_a_tool_task_is_told_the_span_of_its_call(tmp_path: Path) -> None:
    class Task:
        def __init__(self) -> None:
            self.arguments: tuple[Any, ...] = ()

        def remote(self, *arguments: Any) -> None:
            self.arguments = arguments

    with collector() as at:
        calculator = traced_config(tmp_path, at).tools[0]
    entry, task = entry_of(calculator), Task()
    entry.call = task
    CURRENT.set(TRACE.carrier(7))
    entry.begin("calculator", {}, 1.0)
    assert task.arguments[-1] == TRACE.carrier(7)


def test_an_api_is_told_of_the_trace(tmp_path: Path, site: Site) -> None:
    site.page("/x", "{}", "application/json")
    document = {
        "openapi": "3.1.0",
        "servers": [{"url": site.url}],
        "paths": {"/x": {"get": {"operationId": "op"}}},
    }
    path = tmp_path / "openapi.json"
    path.write_text(json.dumps(document))
    config = OpenApiConfig(
        tool_id="api",
        description="An API.",
        spec=path,
        allow=["127.0.0.1"],
        ports=[site.port],
    )
    CURRENT.set(TRACE.carrier(7))
    OpenApiTool(config).call("api__op", {}, 30.0)
    assert site.requests[0].headers["traceparent"] == TRACE.carrier(7)["traceparent"]


async def test_an_mcp_server_is_told_of_the_trace(tmp_path: Path) -> None:
    args = (mcp_servers.__file__, "Meta", str(tmp_path))
    session = McpSession(McpConfig(tool_id="test", command=sys.executable, args=args))
    session.start()
    try:
        async with asyncio.timeout(60):
            await session.first_try()
        session.allow({name: sha for name, (sha, _) in session.state().definitions.items()})
        CURRENT.set(TRACE.carrier(7))
        result = await session.call("test__echo", {"text": "x"}, 60.0)
    finally:
        await session.close()
    told = json.loads(result.text.partition("\n")[2])
    assert {name: told[name] for name in TRACE.carrier(7)} == TRACE.carrier(7)


async def test_an_mcp_clients_question_joins_its_trace(tmp_path: Path) -> None:
    question = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": "ask", "arguments": {"question": "How many?"}},
    }
    with collector() as at:
        async with observed(traced_config(tmp_path, at)) as gateway:
            response = await gateway.client.post(
                f"{gateway.url}/mcp",
                json=question,
                headers=CALLER | {"accept": "application/json, text/event-stream"},
            )
            assert response.status_code == 200, response.text
        root = root_of(at.spans)
        assert (root.name, root.trace_id) == ("POST /mcp", TRACE_ID)
        assert "chat small" in {span.name for span in at.spans}


def test_ids_of_spans_are_known_before_the_spans_are_and_differ() -> None:
    ids = {TRACE.span_id(number) for number in range(1000)}
    assert len(ids) == 1000
    assert TRACE.span_id(3) == TRACE.span_id(3)


@pytest.mark.parametrize("state", ["x" * 513, "\x00", "\u00e9"])
def test_a_tracestate_that_is_none_is_left_out(state: str) -> None:
    headers = {
        b"traceparent": CALLER["traceparent"].encode(),
        b"tracestate": state.encode("latin-1"),
    }
    found = begin_trace(headers, "req_" + "0" * 31 + "1", 0.0, follow_caller=True)
    assert (found.trace_id, found.tracestate) == (TRACE_ID, "")


def test_the_share_that_is_traced_is_about_the_ratio() -> None:
    ids = [f"req_{number * 0x9E3779B97F4A7C15 % (1 << 128):032x}" for number in range(2000)]
    sampled = [begin_trace({}, of, 0.25, follow_caller=True).is_sampled for of in ids]
    assert 0.2 < sum(sampled) / len(sampled) < 0.3
