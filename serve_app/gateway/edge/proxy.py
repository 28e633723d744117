"""What stands before Ray Serve's own HTTP code, in its proxies and its replicas' servers.

Serve obeys headers of anyone who sends them: they set its timeout, keep work running after the
client left, pick replicas, become its request id, and crash its parsing where they are not UTF-8.
None of that is a caller's business here. Serve calls `middlewares` in every process with an HTTP
server when its environment says so at start (`serve_app.environment`).
"""

from __future__ import annotations

import re

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_CONTROL = re.compile(
    rb"serve[-_]multiplexed[-_]model[-_]id|x[-_]session[-_]id|x-request-timeout-seconds"
    rb"|x-request-disconnect-disabled|x-serve-.*",
    re.IGNORECASE,
)
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class ProxyEdge:
    """Takes Serve's control headers out of requests, and its request id out of responses.

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

        await self._app({**scope, "headers": headers}, receive, send_one_request_id)


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
