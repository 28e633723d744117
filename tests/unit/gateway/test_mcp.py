"""The pool as an MCP server: clients of both eras, and raw messages, against a real gateway."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import mcp_types
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from pydantic import ValidationError

from serve_app.config.tools import BestOfConfig, CalculatorConfig
from serve_app.store import Scope, create_key, read_trace
from tests.gateway_fakes import PAIR, Loopback, eventually, running_gateway

ERAS = ("legacy", "auto", "2026-07-28")
TOOLS: list[dict[str, Any]] = [
    {"type": "calculator", "tool_id": "calculator", "exposed": True, "price_usd_per_call": 0.25},
    {"type": "calculator", "tool_id": "note", "exposed": True, "effects": "idempotent"},
    {"type": "calculator", "tool_id": "stamp", "exposed": True, "effects": "once"},
    {"type": "calculator", "tool_id": "hidden"},
    {"type": "calculator", "tool_id": "ask", "exposed": True},
]
DEADLINE_S = 30.0
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Nothing here is encrypted, and to read the system's certificates takes longer than a test."""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    limits = {"max_body_bytes": 8192, "default_deadline_s": DEADLINE_S, "max_deadline_s": 60}
    folder = tmp_path_factory.mktemp("mcp")
    with running_gateway(folder, tools=TOOLS, limits=limits) as loopback:
        yield loopback


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """A gateway that asks for keys, and serves one name."""
    folder = tmp_path_factory.mktemp("locked")
    with running_gateway(
        folder, auth={"mode": "required"}, allowed_hosts=["127.0.0.1"]
    ) as loopback:
        yield loopback


@pytest.fixture(autouse=True)
def _no_calls_before(gateway: Loopback) -> None:
    gateway.orchestrator.calls.clear()
    gateway.orchestrator.runner.calls.clear()


@asynccontextmanager
async def client(gateway: Loopback, era: str, key: str | None = None) -> AsyncIterator[Client]:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    async with httpx2.AsyncClient(headers=headers, timeout=60, verify=NO_TLS) as http:
        transport = streamable_http_client(f"{gateway.url}/mcp", http_client=http)
        async with Client(transport, mode=era) as connected:
            yield connected


async def call(
    gateway: Loopback, era: str, tool: str, arguments: dict[str, Any]
) -> mcp_types.CallToolResult:
    """Raises an MCPError only when the client is closed, which would put it in a group."""
    async with client(gateway, era) as connected:
        try:
            return await connected.call_tool(tool, arguments)
        except MCPError as error:
            refused = error
    raise refused


def text_of(called: mcp_types.CallToolResult) -> str:
    (content,) = called.content
    assert isinstance(content, mcp_types.TextContent)
    return content.text


def refusal_of(called: mcp_types.CallToolResult) -> str:
    """The text of a call that failed in a way that the model may mend."""
    assert called.is_error
    assert called.structured_content is None
    return text_of(called)


def key_with(gateway: Loopback, *scopes: Scope) -> str:
    return gateway.run(lambda: create_key(gateway.store, "someone", list(scopes)))[1]


# What clients see.


@pytest.mark.parametrize("era", ERAS)
async def test_a_client_of_either_era_sees_the_tools(gateway: Loopback, era: str) -> None:
    async with client(gateway, era) as connected:
        tools = (await connected.list_tools()).tools
    assert [tool.name for tool in tools] == ["ask", "route", "calculator", "note"]
    for tool in tools:
        assert tool.description
        assert tool.input_schema["type"] == "object"
        assert tool.input_schema["additionalProperties"] is False


@pytest.mark.parametrize("era", ERAS)
async def test_ask_answers_as_a_chat_does(gateway: Loopback, era: str) -> None:
    arguments = {"question": "who?", "model": "small", "alpha": 0.5, "max_cost_usd": 2}
    called = await call(gateway, era, "ask", arguments)
    assert not called.is_error
    assert text_of(called) == "who?"
    (asked,) = gateway.orchestrator.calls
    assert asked.model == "small"
    assert asked.messages == ({"role": "user", "content": "who?"},)
    assert (asked.limits.alpha, asked.limits.max_cost_usd) == (0.5, 2.0)
    assert called.structured_content == {
        "answer": "who?",
        "pair": str(PAIR),
        "path": "cold_start",
        "request_id": asked.request_id,
        "cost_usd": 0.25,
        "seconds": 0.02,
        "finish_reason": "stop",
        "partial": False,
        "stopped_by": None,
        "sources": [],
    }
    assert called.meta is not None
    assert called.meta["atlas/request_id"] == asked.request_id


async def test_what_was_asked_is_an_outcome_as_of_any_request(gateway: Loopback) -> None:
    called = await call(gateway, "auto", "ask", {"question": "who?"})
    assert called.structured_content is not None
    request_id = called.structured_content["request_id"]
    gateway.run(lambda: gateway.outcomes.flush(10))
    trace = gateway.run(lambda: read_trace(gateway.store, request_id, "local"))
    assert trace.request_id == request_id


@pytest.mark.parametrize("era", ERAS)
async def test_route_decides_as_its_route_does(gateway: Loopback, era: str) -> None:
    called = await call(gateway, era, "route", {"question": "who?"})
    body = {"model": "atlas", "messages": [{"role": "user", "content": "who?"}]}
    told = httpx2.post(f"{gateway.url}/v1/route", json=body).json()
    structured = called.structured_content
    assert structured is not None
    assert structured.pop("request_id") != told.pop("request_id")
    assert structured == told
    assert json.loads(text_of(called)) == structured | {
        "request_id": json.loads(text_of(called))["request_id"]
    }


@pytest.mark.parametrize("era", ERAS)
async def test_an_exposed_tool_is_called_without_a_model(gateway: Loopback, era: str) -> None:
    called = await call(gateway, era, "calculator", {"expression": "6 * 7"})
    assert not called.is_error
    assert text_of(called) == "42"
    assert gateway.orchestrator.runner.calls == [("calculator", {"expression": "6 * 7"})]
    assert gateway.orchestrator.calls == []


async def test_the_schema_of_a_tool_names_who_answers_now(gateway: Loopback) -> None:
    async with client(gateway, "auto") as connected:
        ask = (await connected.list_tools()).tools[0]
    told = ask.input_schema["properties"]["model"]["description"]
    assert "small, large, pattern:hello" in told
    assert "broken" not in told


@pytest.mark.parametrize(
    ("tool", "expected"),
    [
        ("ask", (False, False, True)),  # models may call `stamp`
        ("route", (True, True, False)),
        ("calculator", (True, True, False)),
        ("note", (False, True, True)),
    ],
)
async def test_hints_follow_from_the_effects(
    gateway: Loopback, tool: str, expected: tuple[bool, bool, bool]
) -> None:
    async with client(gateway, "auto") as connected:
        tools = {listed.name: listed for listed in (await connected.list_tools()).tools}
    hints = tools[tool].annotations
    assert hints is not None
    assert (hints.read_only_hint, hints.idempotent_hint, hints.destructive_hint) == expected


async def test_ask_only_reads_where_no_tool_of_the_pool_has_effects(locked: Loopback) -> None:
    async with client(locked, "auto", key_with(locked, Scope.CHAT)) as connected:
        (ask, _) = (await connected.list_tools()).tools
    assert ask.annotations is not None
    assert ask.annotations.read_only_hint


@pytest.mark.parametrize("tool", ["stamp", "hidden"])
@pytest.mark.parametrize("era", ["legacy", "auto"])
async def test_a_tool_that_is_not_listed_cannot_be_called(
    gateway: Loopback, era: str, tool: str
) -> None:
    with pytest.raises(MCPError, match=f"there is no tool '{tool}'") as raised:
        await call(gateway, era, tool, {"expression": "1"})
    assert raised.value.code == mcp_types.INVALID_PARAMS
    assert gateway.orchestrator.runner.calls == []


async def test_any_replica_answers_any_request(
    gateway: Loopback, locked: Loopback, tmp_path: Path
) -> None:
    """Each request of a client goes to another gateway, as behind a load balancer."""
    with running_gateway(tmp_path, tools=TOOLS) as other:
        urls = [gateway.url, other.url]

        async def alternate(request: httpx2.Request) -> None:
            urls.reverse()
            request.url = httpx2.URL(urls[0] + "/mcp")

        async with httpx2.AsyncClient(
            event_hooks={"request": [alternate]}, timeout=60, verify=NO_TLS
        ) as http:
            transport = streamable_http_client(f"{gateway.url}/mcp", http_client=http)
            async with Client(transport, mode="legacy") as connected:
                for _ in range(3):
                    called = await connected.call_tool("ask", {"question": "who?"})
                    assert text_of(called) == "who?"
        assert gateway.orchestrator.calls
        assert other.orchestrator.calls


# What goes wrong.


@pytest.mark.parametrize("era", ["legacy", "auto"])
@pytest.mark.parametrize(
    ("tool", "arguments", "told"),
    [
        ("ask", {}, "question: this field is required"),
        ("ask", {"question": ""}, "question: "),
        ("ask", {"question": 5}, "question: "),
        ("ask", {"question": "x", "colour": 1}, "unknown parameter 'colour'"),
        ("ask", {"question": "x", "alpha": 2}, "alpha: "),
        ("ask", {"question": "x", "alpha": True}, "alpha: "),
        ("ask", {"question": "x", "deadline_s": 61}, "deadline_s: at most 60 here, got 61"),
        ("ask", {"question": "x", "model": "nobody"}, "the model 'nobody' does not exist"),
        ("ask", {"question": "x", "model": "broken"}, "broken"),
        ("ask", {"question": "!fail"}, "the engine failed"),
        ("ask", {"question": "!busy"}, "the engine asks for a pause (try again in 42 s)"),
        ("route", {"question": "!fail"}, "the engine failed"),
        ("route", {"question": "x", "query": "x"}, "unknown parameter 'query'"),
        ("calculator", {}, "'expression' is a required property"),
        ("calculator", {"expression": "2 *"}, "'2 *' is not an arithmetic expression"),
        ("calculator", {"expression": "!fail"}, "tool 'calculator' failed"),
    ],
)
async def test_what_the_model_could_mend_is_a_result_that_says_so(
    gateway: Loopback, era: str, tool: str, arguments: dict[str, Any], told: str
) -> None:
    text = refusal_of(await call(gateway, era, tool, arguments))
    assert told in text
    assert not text.startswith("atlas.")


@pytest.mark.parametrize("era", ["legacy", "auto"])
@pytest.mark.parametrize(
    ("tool", "arguments"), [("ask", {"question": "!bug"}), ("calculator", {"expression": "!bug"})]
)
async def test_an_error_of_the_servers_own_tells_nothing_but_the_request(
    gateway: Loopback, era: str, tool: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(MCPError, match=r"the server had an error; name req_\w{32} ") as raised:
        await call(gateway, era, tool, arguments)
    assert raised.value.code == mcp_types.INTERNAL_ERROR
    assert raised.value.data is None


async def test_a_tool_whose_worker_died_is_called_once_more(gateway: Loopback) -> None:
    called = await call(gateway, "auto", "calculator", {"expression": "!die-once"})
    assert "not an arithmetic expression" in refusal_of(called)
    assert len(gateway.orchestrator.runner.calls) == 2


async def test_a_tool_whose_workers_keep_dying_is_given_up(gateway: Loopback) -> None:
    called = await call(gateway, "auto", "calculator", {"expression": "!die"})
    assert "its worker stopped" in refusal_of(called)
    assert len(gateway.orchestrator.runner.calls) == 2


@pytest.mark.parametrize("era", ["legacy", "auto"])
async def test_the_deadline_of_a_question_holds(gateway: Loopback, era: str) -> None:
    called = await call(gateway, era, "ask", {"question": "!hang", "deadline_s": 0.2})
    assert " s are up; deadline_s sets them" in refusal_of(called)


@pytest.mark.parametrize("era", ["legacy", "auto"])
async def test_an_exposed_tool_has_the_gateways_deadline(tmp_path: Path, era: str) -> None:
    limits = {"default_deadline_s": 0.2}
    with running_gateway(tmp_path, tools=TOOLS, limits=limits) as hurried:
        called = await call(hurried, era, "calculator", {"expression": "!hang"})
        assert " s are up" in refusal_of(called)
        assert hurried.orchestrator.runner.cancelled == 1


@pytest.mark.parametrize("era", ["legacy", "auto"])
async def test_the_work_for_a_client_that_leaves_is_cancelled(gateway: Loopback, era: str) -> None:
    before = len(gateway.orchestrator.cancelled)
    async with client(gateway, era) as connected:
        asking = asyncio.create_task(connected.call_tool("ask", {"question": "!hang"}))
        while not gateway.orchestrator.calls:
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    left = [call.request_id for call in gateway.orchestrator.calls]
    assert await asyncio.to_thread(
        lambda: eventually(lambda: gateway.orchestrator.cancelled[before:] == left, 20)
    )


# Who may call.


@pytest.mark.parametrize("era", ["legacy", "auto"])
async def test_a_key_that_may_chat_may_call(locked: Loopback, era: str) -> None:
    async with client(locked, era, key_with(locked, Scope.CHAT)) as connected:
        called = await connected.call_tool("ask", {"question": "who?"})
    assert text_of(called) == "who?"


PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
ACCEPT = "application/json, text/event-stream"


def post(gateway: Loopback, body: Any = PING, **headers: str) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"content-type": "application/json", "accept": ACCEPT}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    url = f"{gateway.url}/mcp"
    return httpx2.post(url, content=content, headers=sent, timeout=60, verify=NO_TLS)


def test_without_a_key_it_is_a_401(locked: Loopback) -> None:
    refused = post(locked)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"]["code"] == "invalid_api_key"


def test_a_key_without_the_scope_is_a_403(locked: Loopback) -> None:
    key = key_with(locked, Scope.ADMIN, Scope.FEEDBACK)
    assert post(locked, authorization=f"Bearer {key}").status_code == 403


def test_the_same_rate_holds_as_for_chats(tmp_path: Path) -> None:
    with running_gateway(tmp_path, limits={"requests_per_minute_per_key": 1}) as slow:
        assert post(slow).status_code == 200
        refused = post(slow)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1


def test_a_host_that_is_not_served_is_a_421(gateway: Loopback, locked: Loopback) -> None:
    key = key_with(locked, Scope.CHAT)
    assert post(gateway, host="evil.example").status_code == 421
    assert post(locked, host="evil.example", authorization=f"Bearer {key}").status_code == 421
    assert post(locked, authorization=f"Bearer {key}").status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1.evil.example"])
def test_a_page_of_another_site_is_a_403(gateway: Loopback, locked: Loopback, origin: str) -> None:
    key = key_with(locked, Scope.CHAT)
    assert post(gateway, origin=origin).status_code == 403
    assert post(locked, origin=origin, authorization=f"Bearer {key}").status_code == 403


def test_a_page_of_the_gateways_own_host_is_answered(gateway: Loopback) -> None:
    assert post(gateway, origin="http://localhost:6274").status_code == 200


def test_any_page_is_answered_with_a_key_where_any_host_is(tmp_path: Path) -> None:
    with running_gateway(tmp_path, auth={"mode": "required"}) as anywhere:
        key = key_with(anywhere, Scope.CHAT)
        sent = {"authorization": f"Bearer {key}", "origin": "https://app.example"}
        assert post(anywhere, **sent).status_code == 200


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    with running_gateway(tmp_path, mcp=False) as off:
        assert post(off).status_code == 404


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT"])
def test_there_is_no_session_to_listen_to_or_to_end(gateway: Loopback, method: str) -> None:
    refused = httpx2.request(
        method, f"{gateway.url}/mcp", headers={"accept": ACCEPT}, verify=NO_TLS
    )
    assert refused.status_code == 405
    assert refused.headers["allow"] == "POST"


# Messages that are none.


def modern(method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
    meta = {
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    params = {**(params or {}), "_meta": meta}
    return {"jsonrpc": "2.0", "id": 7, "method": method, "params": params}


@pytest.mark.parametrize("version", [None, "2025-11-25", "2026-07-28"])
@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", mcp_types.PARSE_ERROR),
        (b"not json", mcp_types.PARSE_ERROR),
        (b'{"id": NaN}', mcp_types.PARSE_ERROR),
        (b'{"method": "\xff"}', mcp_types.PARSE_ERROR),
        (b'{"method": "\\ud800"}', mcp_types.PARSE_ERROR),
        (b"[" * 4000, mcp_types.PARSE_ERROR),
        (b'{"a":' * 40 + b"1" + b"}" * 40, mcp_types.INVALID_REQUEST),
        (json.dumps([PING, PING]).encode(), mcp_types.INVALID_REQUEST),
        (b"[]", mcp_types.INVALID_REQUEST),
        (b"5", mcp_types.INVALID_REQUEST),
        (b"null", mcp_types.INVALID_REQUEST),
        (b"{}", mcp_types.INVALID_REQUEST),
        (b'{"jsonrpc": "1.0", "id": 1, "method": "ping"}', mcp_types.INVALID_REQUEST),
        (b'{"jsonrpc": "2.0", "id": [], "method": "ping"}', mcp_types.INVALID_REQUEST),
        (b'{"jsonrpc": "2.0", "id": true, "method": "ping"}', mcp_types.INVALID_REQUEST),
        (b'{"jsonrpc": "2.0", "id": null, "method": "ping"}', mcp_types.INVALID_REQUEST),
        (b'{"jsonrpc": "2.0", "id": 1, "method": 5}', mcp_types.INVALID_REQUEST),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "ping", "params": []}', mcp_types.INVALID_REQUEST),
        (b'{"jsonrpc": "2.0", "id": 1, "result": {}}', mcp_types.INVALID_REQUEST),
    ],
)
def test_what_is_no_message_is_a_400(
    gateway: Loopback, version: str | None, body: bytes, code: int
) -> None:
    headers = {} if version is None else {"mcp_protocol_version": version}
    refused = post(gateway, body, **headers)
    assert refused.status_code == 400
    assert refused.headers["x-request-id"].startswith("req_")
    told = refused.json()
    assert told["id"] is None
    assert told["error"]["code"] == code
    assert len(refused.content) < 300


def test_a_large_body_is_a_413(gateway: Loopback) -> None:
    body = modern("tools/call", {"name": "ask", "arguments": {"question": "x" * 9000}})
    assert post(gateway, body).status_code == 413


def test_another_content_type_is_a_415(gateway: Loopback) -> None:
    assert post(gateway, content_type="text/plain").status_code == 415


def test_a_client_that_takes_no_json_is_a_406(gateway: Loopback) -> None:
    assert post(gateway, accept="text/html").status_code == 406


@pytest.mark.parametrize("method", ["nonsense", "resources/list", "prompts/list", "tasks/list"])
def test_an_unknown_method_is_a_json_rpc_error(gateway: Loopback, method: str) -> None:
    told = post(gateway, {"jsonrpc": "2.0", "id": "a", "method": method, "params": {}}).json()
    assert told["id"] == "a"
    assert told["error"]["code"] == mcp_types.METHOD_NOT_FOUND


def test_an_unknown_method_is_a_404_in_the_later_era(gateway: Loopback) -> None:
    headers = {"mcp_protocol_version": "2026-07-28", "mcp_method": "resources/list"}
    refused = post(gateway, modern("resources/list"), **headers)
    assert refused.status_code == 404
    assert refused.json()["error"]["code"] == mcp_types.METHOD_NOT_FOUND


@pytest.mark.parametrize("version", ["1999-01-01", "nonsense", "2026-07-29", ""])
def test_a_version_that_is_not_spoken_is_a_400(gateway: Loopback, version: str) -> None:
    refused = post(gateway, modern("tools/list"), mcp_protocol_version=version)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] in (
        mcp_types.UNSUPPORTED_PROTOCOL_VERSION,
        mcp_types.HEADER_MISMATCH,
    )


def test_headers_that_contradict_the_body_are_a_400(gateway: Loopback) -> None:
    headers = {"mcp_protocol_version": "2026-07-28", "mcp_method": "ping"}
    refused = post(gateway, modern("tools/list"), **headers)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == mcp_types.HEADER_MISMATCH


@pytest.mark.parametrize("version", ["2025-06-18", "2026-07-28"])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"name": 5},
        {"name": "ask", "arguments": []},
        {"name": "ask", "arguments": "question"},
        {"name": "x" * 4000},
    ],
)
def test_a_call_of_the_wrong_shape_is_a_json_rpc_error(
    gateway: Loopback, version: str, params: dict[str, Any]
) -> None:
    headers = {"mcp_protocol_version": version, "mcp_method": "tools/call"}
    if isinstance(params.get("name"), str):
        headers["mcp_name"] = params["name"]
    refused = post(gateway, modern("tools/call", params), **headers)
    assert refused.json()["error"]["code"] in (
        mcp_types.INVALID_PARAMS,
        mcp_types.HEADER_MISMATCH,
    )
    assert len(refused.content) < 2000


def test_a_notification_is_taken_and_changes_nothing(gateway: Loopback) -> None:
    body = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}}
    for version in ("2025-11-25", "2026-07-28"):
        assert post(gateway, body, mcp_protocol_version=version).status_code == 202


def test_the_log_line_tells_of_the_call(
    gateway: Loopback, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "serve_app.gateway.edge.edge")
    arguments = {"expression": "1 + 1"}
    body = {"name": "calculator", "arguments": arguments}
    answered = post(gateway, {**PING, "method": "tools/call", "params": body})
    assert answered.json()["result"]["content"] == [{"type": "text", "text": "2"}]
    request_id = answered.headers["x-request-id"]
    assert eventually(lambda: f"request_id={request_id}" in caplog.text)
    (line,) = [text for text in caplog.messages if request_id in text]
    assert "route=/mcp status=200" in line
    assert "model=tool:calculator" in line
    assert "cost_usd=0.250000" in line


# What the configuration refuses.


def test_only_a_function_can_be_exposed() -> None:
    with pytest.raises(ValidationError, match="only tools of kind 'function'"):
        BestOfConfig.model_validate({"type": "best_of", "tool_id": "best", "exposed": True})
    assert not CalculatorConfig(type="calculator", tool_id="calculator").exposed
