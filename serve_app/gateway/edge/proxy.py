"""What stands before Ray Serve's own HTTP code, in its proxies and its replicas' servers.

Serve obeys headers of anyone who sends them: they set its timeout, keep work running after the
client left, pick replicas, become its request id, and crash its parsing where they are not UTF-8.
None of that is a caller's business here. Serve calls `middlewares` in every process with an HTTP
server when its environment says so at start (`serve_app.environment`).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_CONTROL = re.compile(
    rb"serve[-_]multiplexed[-_]model[-_]id|x[-_]session[-_]id|x-request-timeout-seconds"
    rb"|x-request-disconnect-disabled|x-serve-.*",
    re.IGNORECASE,
)
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


BODY_GATE = "atlas.body_gate"
"""Key of a request's `BodyGate` in its scope."""


class BodyGate:
    """Holds a request's body back while the gateway does not know yet whether it wants it.

    Serve reads what a caller sends into a queue without a bound, as fast as it comes. What the gate
    holds back stays in the server's buffer of 64 KiB, and then with the caller: TCP waits.
    """

    def __init__(self, receive: Receive) -> None:
        """Stand before a request's messages, open; made in the server's event loop."""
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._opened = asyncio.Event()
        self._is_closed = False

    def close(self) -> None:
        """Let no more of the body through."""
        self._is_closed = True

    def open(self) -> None:
        """Let all through; may be called in another thread, where Serve runs handlers in one."""
        self._is_closed = False
        self._loop.call_soon_threadsafe(self._opened.set)

    async def receive(self) -> Message:
        """The next message; a piece of the body once the gate is open."""
        message = await self._receive()
        while self._is_closed and message["type"] == "http.request":
            self._opened.clear()
            if self._is_closed:  # still: nothing has opened it between the two lines above
                await self._opened.wait()
        return message

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """`None` in another process, where nothing could open the gate."""
        return type(None), ()


@contextmanager
def body_held_back(scope: Scope) -> Iterator[None]:
    """Let none of a request's body through in this block, where the server in front can wait."""
    gate = scope.get(BODY_GATE)
    if gate is None:
        yield
        return
    gate.close()
    try:
        yield
    finally:
        gate.open()


class ProxyEdge:
    """Takes Serve's control headers out of requests, and its request id out of responses.

    A request's body passes a `BodyGate`, which the gateway finds in the scope.

    The caller's `x-request-id` goes on as `x-client-request-id` (empty where there is none fit for
    it), so that Serve makes its own; of several `x-request-id` in a response the app's, which is
    the first, stays.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Wrap Serve's HTTP app."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Clean one request and its response."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = []
        client_request_id = b""
        for name, value in scope["headers"]:
            lowered = name.lower()
            if lowered in (b"x-request-id", b"x-client-request-id"):
                if _REQUEST_ID.fullmatch(value):
                    client_request_id = client_request_id or value
            elif not _CONTROL.fullmatch(lowered):
                headers.append((name, value))
        headers.append((b"x-client-request-id", client_request_id))

        async def send_one_request_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = _with_one_request_id(message.get("headers") or ())
            await send(message)

        gate = BodyGate(receive)
        inner = {**scope, "headers": headers, BODY_GATE: gate}
        await self._app(inner, gate.receive, send_one_request_id)


def _with_one_request_id(
    headers: list[tuple[bytes, bytes]] | tuple[()],
) -> list[tuple[bytes, bytes]]:
    kept, found = [], False
    for name, value in headers:
        is_request_id = name.lower() == b"x-request-id"
        if not (is_request_id and found):
            kept.append((name, value))
        found = found or is_request_id
    return kept


def middlewares() -> list[Middleware]:
    """What Serve's callback asks for."""
    return [Middleware(ProxyEdge)]
