"""`POST /mcp`: the pool as an MCP server over Streamable HTTP, for both eras of the protocol.

In comes a request that the edge has let in, with its whole body; out goes the answer to one
JSON-RPC message. What must stay true: no request needs another one's state, so any replica answers
any request; an error that the calling model could mend is a tool result with `isError`, every other
one a JSON-RPC error; neither holds a path, a secret or a stack trace.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mcp.server import Server, ServerRequestContext
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.shared.exceptions import MCPError
from mcp_types import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    PARSE_ERROR,
    CallToolRequestParams,
    CallToolResult,
    ListToolsResult,
    PaginatedRequestParams,
    TextContent,
)
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from serve_app.config import AtlasConfig
from serve_app.errors import AtlasError, InvalidRequest
from serve_app.gateway.chat.parsing import parse_json
from serve_app.gateway.edge.errors import JsonResponse
from serve_app.gateway.edge.exchange import Exchange
from serve_app.gateway.edge.hosts import HostCheck
from serve_app.gateway.handlers import Handlers, RequestRunner
from serve_app.gateway.mcp.exposed import ExposedTools
from serve_app.gateway.mcp.questions import OPTIONS, Questions
from serve_app.gateway.mcp.tool import REQUEST_ID, ExposedTool, Json
from serve_app.gateway.openapi import package_version
from serve_app.telemetry import MetricSink

logger = logging.getLogger(__name__)

_INSTRUCTIONS = (
    "A pool of language models behind a router. `ask` answers a question with the model, tool or "
    "pattern that fits it; `route` says which that would be. Other tools are the pool's own."
)

# The library tells of the start and end of each session, which here are those of a request.
logging.getLogger("mcp.server").setLevel(logging.WARNING)


class McpServer:
    """Answers MCP clients with the pool; one per gateway replica."""

    def __init__(
        self,
        api: Handlers,
        orchestrator: RequestRunner,
        config: AtlasConfig,
        hosts: HostCheck,
        metrics: MetricSink,
    ) -> None:
        """Serve a gateway's pool.

        Args:
            api: Answers and decides.
            orchestrator: Knows the pool and runs its tools.
            config: The deployment.
            hosts: Which names are served; the edge's own.
            metrics: Where costs go.
        """
        self._orchestrator = orchestrator
        self._config = config
        self._hosts = hosts
        deadline_s = config.gateway.limits.default_deadline_s
        self._questions = Questions(api)
        self._exposed = ExposedTools(orchestrator, deadline_s, metrics)
        self._server: Server[Any] = Server(
            "atlas-serve",
            version=package_version(),
            instructions=_INSTRUCTIONS,
            get_tool_input_schema=self._input_schema,
            on_list_tools=self._list,
            on_call_tool=self._call,
        )

    async def handle(self, request: Request) -> Response:
        """`POST /mcp`."""
        exchange: Exchange = request.scope["atlas"]
        self._hosts.check_origin(request.scope)
        try:
            _check_message(parse_json(exchange.body, self._config.gateway.limits.max_json_depth))
        except InvalidRequest as error:
            exchange.line.error = type(error).__name__
            is_json = not isinstance(error.__cause__, ValueError)
            told = {"code": INVALID_REQUEST if is_json else PARSE_ERROR, "message": error.message}
            return JsonResponse({"jsonrpc": "2.0", "id": None, "error": told}, 400)
        return _McpReply(self._server, exchange.body)

    def _tools(self) -> dict[str, ExposedTool]:
        """Every tool by name; where two have one name, the first counts."""
        pool = self._orchestrator.pool()
        configs = (pool.config or self._config).tools
        own = self._questions.tools(pool, self._exposed.strongest(configs))
        found: dict[str, ExposedTool] = {}
        for tool in (*own, *self._exposed.tools(configs)):
            found.setdefault(tool.listed.name, tool)
        return found

    def _input_schema(self, name: str) -> Json | None:
        tool = self._tools().get(name)
        return None if tool is None else tool.listed.input_schema

    async def _list(
        self, context: ServerRequestContext[Any, Request], params: PaginatedRequestParams | None
    ) -> ListToolsResult:
        with _undisclosed(_exchange_of(context)):
            return ListToolsResult(tools=[tool.listed for tool in self._tools().values()])

    async def _call(
        self, context: ServerRequestContext[Any, Request], params: CallToolRequestParams
    ) -> CallToolResult:
        exchange = _exchange_of(context)
        with _undisclosed(exchange):
            tool = self._tools().get(params.name)
            if tool is None:
                told = f"there is no tool {params.name[:80]!r}; see tools/list"
                raise MCPError(INVALID_PARAMS, told)
            try:
                return await tool.call(exchange, params.arguments or {})
            except AtlasError as error:
                exchange.line.error, exchange.line.stop = type(error).__name__, error.stop
                return _failed(exchange, error)


def _exchange_of(context: ServerRequestContext[Any, Request]) -> Exchange:
    assert context.request is not None  # over HTTP there always is one
    exchange: Exchange = context.request.scope["atlas"]
    return exchange


@contextmanager
def _undisclosed(exchange: Exchange) -> Iterator[None]:
    """Keep the text of an unforeseen error, which may hold paths, in the log.

    Raises:
        MCPError: In the place of such an error, with the request's id.
    """
    try:
        yield
    except MCPError:
        raise
    except Exception as error:
        exchange.line.error = type(error).__name__
        logger.exception("request_id=%s failed unexpectedly", exchange.request_id)
        told = f"the server had an error; name {exchange.request_id} when you report it"
        raise MCPError(INTERNAL_ERROR, told) from None


def _check_message(message: Json) -> None:
    """Refuse what is no request and no notification, before the library describes it at length.

    Raises:
        InvalidRequest: If the message is neither.
    """
    for is_right, problem in (
        (message.get("jsonrpc") == "2.0", "jsonrpc: has to be '2.0'"),
        (isinstance(message.get("method"), str), "method: has to be a string"),
        (type(message.get("id", 0)) in (int, str), "id: has to be a string or an integer"),
        (isinstance(message.get("params", {}), dict), "params: has to be an object"),
    ):
        if not is_right:
            raise InvalidRequest(problem)


def _failed(exchange: Exchange, error: AtlasError) -> CallToolResult:
    """The result of a call that failed, in the words of the tool's arguments."""
    message = error.message
    for name in OPTIONS:
        message = message.replace(f"atlas.{name}", name)
    if error.retry_after_s is not None:
        message += f" (try again in {math.ceil(error.retry_after_s)} s)"
    return CallToolResult(
        content=[TextContent(text=message)],
        is_error=True,
        _meta={REQUEST_ID: exchange.request_id, "atlas/code": error.code},
    )


class _McpReply(Response):
    """Has the MCP library answer one message, with a session manager that ends with the request.

    So nothing is left of a request whose client leaves, and no request waits for another's.
    """

    def __init__(self, server: Server[Any], body: bytes) -> None:
        """Answer this body."""
        super().__init__()
        self._server = server
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Replay the body, which the edge has read, and send the answer."""
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": self._body, "more_body": False}

        manager = StreamableHTTPSessionManager(
            self._server,
            json_response=True,
            stateless=True,
            max_request_body_size=len(self._body),
        )
        async with manager.run():
            await manager.handle_request(scope, replay, send)
