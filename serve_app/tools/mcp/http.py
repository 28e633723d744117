"""An MCP server by Streamable HTTP: the SDK's transport over a client with bounds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from types import TracebackType

import httpx2
from mcp.client._transport import TransportStreams
from mcp.client.streamable_http import streamable_http_client

from serve_app.config.tools import McpConfig
from serve_app.tools.mcp.child import MAX_MESSAGE_BYTES, secrets_of

_CONNECT_S = 10.0
_GOODBYE_S = 2.0
"""How long ending a session at the server may take."""


class HttpLink:
    """One connection to a server by its address; entered once."""

    is_dead = False
    """There is no process to lose: whether the server answers is found out by asking."""

    def __init__(self, config: McpConfig, lost: asyncio.Event) -> None:
        """Prepare.

        Args:
            config: Has a url.
            lost: Set when the server could not be reached, or knows its session no more.
        """
        self._config = config
        self._lost = lost
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> TransportStreams:
        """Get ready; the first message connects.

        Raises:
            ToolFailed: If a secret header is not in the environment.
        """
        config = self._config
        assert config.url is not None
        client = httpx2.AsyncClient(
            headers={**config.headers, **secrets_of(config.headers_from)},
            timeout=httpx2.Timeout(_CONNECT_S, read=None),  # each call has its own deadline
            transport=_Bounded(self._lost),
        )
        client.headers["accept-encoding"] = "identity"
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(client)
            streams = await stack.enter_async_context(
                streamable_http_client(
                    config.url, http_client=client, max_sse_event_size=MAX_MESSAGE_BYTES
                )
            )
            self._stack = stack.pop_all()
        return streams

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        """Close."""
        return await self._stack.__aexit__(kind, error, trace)


class _Bounded(httpx2.AsyncBaseTransport):
    """Bounds each answer, and turns a broken connection into an answer.

    The SDK would end every call of a session where one connection breaks.
    """

    def __init__(self, lost: asyncio.Event) -> None:
        self._inner = httpx2.AsyncHTTPTransport()
        self._lost = lost

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.method == "DELETE":
            request.extensions["timeout"] = httpx2.Timeout(_GOODBYE_S).as_dict()
        try:
            response = await self._inner.handle_async_request(request)
        except httpx2.TransportError:
            self._lost.set()
            return httpx2.Response(502)
        if response.status_code == 404 and "mcp-session-id" in request.headers:
            self._lost.set()
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            return httpx2.Response(502)
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _BoundedStream(response.stream, self._lost)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class _BoundedStream(httpx2.AsyncByteStream):
    """An answer's body that ends with an error past `MAX_MESSAGE_BYTES`."""

    def __init__(self, inner: httpx2.AsyncByteStream, lost: asyncio.Event) -> None:
        self._inner = inner
        self._lost = lost

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        try:
            async for part in self._inner:
                size += len(part)
                if size > MAX_MESSAGE_BYTES:
                    raise httpx2.StreamError(f"more than {MAX_MESSAGE_BYTES} bytes")
                yield part
        except httpx2.TransportError:
            self._lost.set()
            raise httpx2.StreamError("the connection broke") from None

    async def aclose(self) -> None:
        await self._inner.aclose()
