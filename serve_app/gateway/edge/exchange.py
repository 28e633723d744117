"""One request at the edge: what is known of it, and the way its response leaves."""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.types import Message, Send

from serve_app.gateway.edge.auth import EVERYBODY
from serve_app.gateway.edge.routes import UNKNOWN_ROUTE, RouteRule
from serve_app.schemas import AccessLists
from serve_app.store import ApiKey
from serve_app.telemetry import RequestLine

if TYPE_CHECKING:
    from serve_app.gateway.edge.held_key import HeldKey
    from serve_app.purse import Purse
    from serve_app.telemetry.projection import VerdictView
    from serve_app.trace_context import TraceContext

_REQUEST_ID = re.compile(r"req_[0-9a-f]{32}")
EVENT_STREAM = b"text/event-stream"


@dataclass(slots=True)
class Exchange:
    """One request at the edge, from its first byte to its last."""

    started_s: float
    """Monotonic time of arrival."""
    line: RequestLine
    rule: RouteRule = UNKNOWN_ROUTE
    """The rule of its route, once that is found."""
    ends_s: float = 0.0
    """Monotonic time of the request's deadline, once the body has named it."""
    key: ApiKey = EVERYBODY
    """The calling key, once it is known."""
    purse: Purse | None = None
    """What it is paid from while it is worked on; `None`: nothing limits its key."""
    trace: TraceContext | None = None
    """The W3C trace that it belongs to; `None`: it is not traced."""
    verdict: VerdictView | None = None
    """What it says of an earlier request."""
    first_piece_s: float | None = None
    """Seconds from arrival to the first piece of a streamed answer."""
    body: bytes = b""
    held_bytes: int = 0
    """Bytes of the body that count in the gateway's budget until the request ends."""
    body_pending: bool = False
    """Whether part of the body was not read; the connection cannot be used again then."""
    held_key: HeldKey | None = None
    """Its idempotency key, while it is worked on; `None`: it came without one."""

    @property
    def owner(self) -> str:
        """Id of the calling key."""
        return self.key.key_id

    @property
    def lists(self) -> AccessLists:
        """Models and tools that the calling key may use."""
        return self.key.lists

    @property
    def request_id(self) -> str:
        """The id made for this request."""
        return self.line.request_id

    def elapsed_s(self) -> float:
        """Seconds since arrival."""
        return time.monotonic() - self.started_s


def new_request_id() -> str:
    """A fresh id."""
    return f"req_{uuid.uuid4().hex}"


def looks_like_request_id(text: str) -> bool:
    """Whether `new_request_id` could have made it."""
    return _REQUEST_ID.fullmatch(text) is not None


class ClientLeft(Exception):
    """The connection was closed by the other side."""


class Reply:
    """The way back to the client: adds the headers of every response, and remembers its state."""

    def __init__(self, send: Send, exchange: Exchange) -> None:
        """Answer one request.

        Args:
            send: The server's.
            exchange: The request; its log line gets the status.
        """
        self._send = send
        self._exchange = exchange
        self.started = False
        self.complete = False
        self.is_stream = False

    async def __call__(self, message: Message) -> None:
        """Send one ASGI message."""
        if message["type"] == "http.response.start":
            self.started = True
            line = self._exchange.line
            line.status = message["status"]
            headers = message["headers"] = list(message.get("headers") or ())
            self.is_stream = any(value.startswith(EVENT_STREAM) for _, value in headers)
            headers.append((b"x-request-id", line.request_id.encode()))
            if line.client_request_id is not None:
                headers.append((b"x-client-request-id", line.client_request_id.encode()))
            if self._exchange.body_pending:
                headers.append((b"connection", b"close"))
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True
        await self._send(message)
