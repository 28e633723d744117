"""Sessions by Streamable HTTP: the SDK's server in both eras, and servers that misbehave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from mcp.server.mcpserver import MCPServer
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from serve_app.config.tools import McpConfig
from serve_app.errors import ToolError, ToolFailed, ToolTimeout
from serve_app.tools.mcp import session as session_module
from serve_app.tools.mcp.session import McpSession
from tests.mcp_servers import SCHEMA
from tests.unit.tools.test_mcp_session import ECHO, LONG_S, until

Json = dict[str, Any]


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[str]:
    """An application on a loopback port, and its address."""
    options = {"port": 0, "log_level": "error", "lifespan": "on", "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(uvicorn.Config(app, **options))  # type: ignore[arg-type]
    task = asyncio.create_task(server.serve())
    try:
        await until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def session(url: str, **settings: Any) -> AsyncIterator[McpSession]:
    one = McpSession(McpConfig(tool_id="test", url=url, **settings))
    one.start()
    try:
        async with asyncio.timeout(LONG_S):
            await one.first_try()
        one.allow({name: sha256 for name, (sha256, _) in one.state().definitions.items()})
        yield one
    finally:
        await one.close()


def sdk_server() -> tuple[MCPServer, list[str]]:
    """A server of the SDK, and what became of calls of `wait`."""
    server, ends = MCPServer("test"), list[str]()

    @server.tool()
    async def echo(text: str) -> str:
        return text

    @server.tool()
    async def wait() -> str:
        ends.append("began")
        try:
            await asyncio.sleep(1000)
        except BaseException:
            ends.append("cancelled")
            raise
        return "done"

    return server, ends


def legacy(call: Callable[[Json], Awaitable[Response] | Response]) -> Starlette:
    """A server of 2025, written out; `call` answers a call."""

    async def post(request: Request) -> Response:
        message: Json = await request.json()
        method, request_id = message.get("method"), message.get("id")
        if request_id is None:
            return Response(status_code=202)
        result: Json
        if method == "initialize":
            result = {
                "protocolVersion": "2025-06-18",
                "capabilities": {"tools": {}},
                "serverInfo": {"name": "test", "version": "1"},
            }
        elif method == "tools/list":
            result = {"tools": [{"name": "echo", "inputSchema": SCHEMA}]}
        elif method == "tools/call":
            answer = call(message)
            return answer if isinstance(answer, Response) else await answer
        else:
            error = {"code": -32601, "message": "no such method"}
            return JSONResponse({"jsonrpc": "2.0", "id": request_id, "error": error}, 200)
        return JSONResponse({"jsonrpc": "2.0", "id": request_id, "result": result})

    return Starlette(routes=[Route("/mcp", post, methods=["POST"])])


def says(text: str) -> Callable[[Json], Response]:
    def call(message: Json) -> Response:
        result = {"content": [{"type": "text", "text": text}]}
        return JSONResponse({"jsonrpc": "2.0", "id": message["id"], "result": result})

    return call


async def test_the_sdk_s_server_answers_and_hears_of_a_call_that_is_given_up() -> None:
    server, ends = sdk_server()
    async with served(server.streamable_http_app()) as url, session(url) as one:
        assert one._client is not None
        assert one._client.protocol_version == "2026-07-28"
        assert (await one.call("test__echo", ECHO, LONG_S)).text.endswith("\nhello")
        call = asyncio.create_task(one.call("test__wait", {}, LONG_S))
        await until(lambda: ends == ["began"])
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: ends == ["began", "cancelled"])


async def test_a_server_of_the_earlier_era_answers() -> None:
    async with served(legacy(says("hello"))) as url, session(url) as one:
        assert one._client is not None
        assert one._client.protocol_version == "2025-06-18"
        assert (await one.call("test__echo", ECHO, LONG_S)).text.endswith("\nhello")


async def test_secret_headers_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "Bearer s3cret")
    heard: list[str | None] = []
    app = legacy(says("hello"))

    async def listening(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            heard.append(dict(scope["headers"]).get(b"authorization", b"").decode())
        await app(scope, receive, send)

    settings = {"headers_from": {"authorization": "THE_KEY"}}
    async with served(listening) as url, session(url, **settings) as one:
        await one.call("test__echo", ECHO, LONG_S)
    assert set(heard) == {"Bearer s3cret"}


async def silent(message: Json) -> Response:
    await asyncio.sleep(1000)
    return Response()


async def drip(message: Json) -> Response:
    async def pieces() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    return StreamingResponse(pieces(), media_type="application/json")


@pytest.mark.parametrize("call", [silent, drip])
async def test_a_server_that_does_not_come_to_an_end_is_left_at_the_deadline(call: Any) -> None:
    async with served(legacy(call)) as url, session(url) as one:
        with pytest.raises(ToolTimeout):
            await one.call("test__echo", ECHO, 0.3)


def huge(message: Json) -> Response:
    async def pieces() -> AsyncIterator[bytes]:
        yield json.dumps({"jsonrpc": "2.0", "id": message["id"]}).encode()[:-1]
        yield b',"result":{"content":[{"type":"text","text":"'
        for _ in range(100):
            yield b"a" * (1 << 20)
        yield b'"}]}}'

    return StreamingResponse(pieces(), media_type="application/json")


def packed(message: Json) -> Response:
    return Response(b"\x1f\x8b" + b"0" * 100, headers={"content-encoding": "gzip"})


def bad_utf8(message: Json) -> Response:
    return Response(b'{"jsonrpc":"2.0","id":1,"result":"\xff"}', media_type="application/json")


def elsewhere(message: Json) -> Response:
    return RedirectResponse("http://127.0.0.2:1/mcp", 307)


def broken(message: Json) -> Response:
    return Response("Traceback: /secret/path", 500)


@pytest.mark.parametrize("call", [huge, packed, bad_utf8, elsewhere, broken])
async def test_an_answer_that_is_none_fails_the_call_and_nothing_else(call: Any) -> None:
    async with served(legacy(call)) as url, session(url) as one:
        with pytest.raises(ToolFailed) as caught:
            await one.call("test__echo", ECHO, LONG_S)
        assert "secret" not in str(caught.value)
        await until(lambda: one.state().is_up)


async def test_a_server_that_goes_is_away_until_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session_module, "LONGEST_PAUSE_S", 0.5)
    async with served(legacy(says("one"))) as url:
        one = McpSession(McpConfig(tool_id="test", url=url))
        one.start()
        await until(lambda: one.state().is_up)
        one.allow({name: sha256 for name, (sha256, _) in one.state().definitions.items()})
    try:
        with pytest.raises(ToolError):
            await one.call("test__echo", ECHO, LONG_S)
        await until(lambda: not one.state().is_up)
        assert one.functions() == ()
        port = int(url.split(":")[2].partition("/")[0])
        server = uvicorn.Server(uvicorn.Config(legacy(says("two")), port=port, log_level="error"))
        task = asyncio.create_task(server.serve())
        await until(lambda: one.state().is_up)
        assert (await one.call("test__echo", ECHO, LONG_S)).text.endswith("\ntwo")
        server.should_exit = True
        await task
    finally:
        await one.close()
