"""The edge: what every HTTP request passes before a route sees it, as one pure ASGI middleware.

In comes a raw connection; out goes `scope["atlas"]`, an `Exchange` with the owner and the whole
body, within its limits. What must stay true: each request is answered or its connection closed in
time, each error leaves in OpenAI's shape, each request writes one log line, and nothing the caller
sends decides the request's id.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.config import LimitsConfig
from serve_app.errors import (
    AtlasError,
    DeadlineExceeded,
    HeadersTooLarge,
    InvalidRequest,
    RateLimited,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedMediaType,
)
from serve_app.gateway.admission import AdmissionLimit
from serve_app.gateway.auth import Authenticator
from serve_app.gateway.errors import error_response
from serve_app.store.keys import Scope as KeyScope
from serve_app.telemetry import (
    GATEWAY_ONGOING,
    GATEWAY_REQUESTS,
    GATEWAY_SECONDS,
    MetricSink,
    RequestLine,
)

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""Logged as the status of a request whose client left before the end; nobody receives it."""

_LINGER_S = 1.0
"""How long an unread body is drained after a refusal, so that the sender gets to read it."""
_BACKSTOP_S = 1.0
"""How long after the longest deadline the edge ends a request whose route did not."""
_REQUEST_ID = re.compile(r"req_[0-9a-f]{32}")
_CLIENT_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_EVENT_STREAM = b"text/event-stream"
_JSON_TYPE = re.compile(rb'application/json\s*(;\s*charset\s*=\s*"?utf-?8"?\s*)?;?\s*', re.I)


@dataclass(frozen=True, slots=True)
class RouteRule:
    """What the edge must know of a route."""

    name: str
    """The path as declared; the tag of its metrics."""
    scope: KeyScope | None = None
    """Scope a key needs; `None` asks for no key."""
    reads_body: bool = False
    is_probe: bool = False
    """Answers however busy the gateway is, and is not worth a line in the log."""

    @property
    def is_urgent(self) -> bool:
        """Whether it is let in however busy the gateway is: who mends things must get in."""
        return self.is_probe or self.scope is KeyScope.ADMIN

    @property
    def is_work(self) -> bool:
        """Whether models or the router work for it: what load is measured by."""
        return self.scope is KeyScope.CHAT and self.reads_body


UNKNOWN_ROUTE = RouteRule("other")
"""Of paths and methods that do not exist."""


@dataclass(slots=True)
class Exchange:
    """One request at the edge, from its first byte to its last."""

    started_s: float
    """Monotonic time of arrival."""
    line: RequestLine
    rule: RouteRule
    ends_s: float = 0.0
    """Monotonic time of the request's deadline, once the body has named it."""
    owner: str = ""
    body: bytes = b""
    body_pending: bool = False
    """Whether part of the body was not read; the connection cannot be used again then."""

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


class _ClientLeft(Exception):
    """The connection was closed by the other side."""


class Edge:
    """Ids, limits, keys, errors and the log line around an ASGI app.

    Order of checks: header size, concurrency, key, type and declared length of the body, then the
    body while it is read, then load. The first that fails answers.

    Invariants:
        - At most `max_ongoing_requests` requests are past the edge at once, probes and the admin
          aside; the others are refused before their body is read.
        - Of the requests that models work for, no more are taken than `AdmissionLimit` says.
        - A body is read within `body_timeout_s`, and never kept beyond `max_body_bytes`.
        - No request outlives `max_deadline_s` by more than a second; when the client leaves, its
          work is cancelled.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: LimitsConfig,
        authenticator: Authenticator,
        find_rule: Callable[[str, str], RouteRule],
        metrics: MetricSink,
    ) -> None:
        """Wrap an app.

        Args:
            app: Answers the requests that pass.
            limits: The bounds.
            authenticator: Turns a key into its owner.
            find_rule: The rule of a method and a path; `UNKNOWN_ROUTE` where there is none.
            metrics: Counts requests.
        """
        self._app = app
        self._limits = limits
        self._authenticator = authenticator
        self._find_rule = find_rule
        self._metrics = metrics
        self._ongoing = 0
        self._admission = AdmissionLimit(limits) if limits.adapt_to_load else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event; the app alone sees what is not HTTP."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method, path = scope["method"], _route_path(scope)
        exchange = Exchange(
            started_s=time.monotonic(),
            line=RequestLine(new_request_id(), method),
            rule=self._find_rule(method, path),
        )
        exchange.line.route = exchange.rule.name
        scope["atlas"] = exchange
        reply = _Reply(send, exchange)
        counted = 0 if exchange.rule.is_probe else 1
        self._ongoing += counted
        try:
            await self._pass(scope, receive, reply, exchange)
        except _ClientLeft:
            exchange.line.status = CLIENT_LEFT
        except asyncio.CancelledError:
            exchange.line.status = CLIENT_LEFT
            raise
        except Exception as error:
            exchange.line.error = type(error).__name__
            if not isinstance(error, AtlasError):
                logger.exception("request_id=%s failed unexpectedly", exchange.request_id)
            if not reply.started:
                await self._refuse(error, receive, reply, exchange)
        finally:
            self._ongoing -= counted
            self._report(exchange)

    async def _pass(
        self, scope: Scope, receive: Receive, reply: _Reply, exchange: Exchange
    ) -> None:
        """Check, read, and hand on."""
        headers = self._read_headers(scope, exchange)
        if self._ongoing > self._limits.max_ongoing_requests and not exchange.rule.is_urgent:
            busy = f"{self._limits.max_ongoing_requests} requests are being worked on; try again"
            raise RateLimited(busy)
        if exchange.rule.scope is not None:
            authorization = headers.get(b"authorization")
            exchange.owner = await self._authenticator.owner(authorization, exchange.rule.scope)
            exchange.line.owner = exchange.owner
        if exchange.rule.reads_body:
            await self._read_body(headers, receive, exchange)
        if self._admission is None or not exchange.rule.is_work:
            await self._run(scope, receive, reply, exchange)
            return
        place = self._admission.enter()
        answered: bool | None = None
        try:
            await self._run(scope, receive, reply, exchange)
            answered = _was_answered(exchange.line)
        except (DeadlineExceeded, _ClientLeft, asyncio.CancelledError):
            answered = False
            raise
        finally:
            kind = (exchange.rule.name, exchange.line.model, reply.is_stream)
            self._admission.leave(place, kind, answered=answered)

    def _read_headers(self, scope: Scope, exchange: Exchange) -> dict[bytes, bytes]:
        """The headers by name, the first of each.

        Raises:
            HeadersTooLarge: If names and values together are over the limit.
        """
        size = len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            size += len(name) + len(value)
            headers.setdefault(name, value)
        length = headers.get(b"content-length", b"0")
        exchange.body_pending = b"transfer-encoding" in headers or length.strip(b"0") != b""
        for name in (b"x-client-request-id", b"x-request-id"):
            if name in headers:
                if _CLIENT_REQUEST_ID.fullmatch(headers[name]):
                    exchange.line.client_request_id = headers[name].decode("ascii")
                break
        if size > self._limits.max_header_bytes:
            raise HeadersTooLarge(
                f"address and headers have {size} bytes; at most "
                f"{self._limits.max_header_bytes} are read"
            )
        return headers

    async def _read_body(
        self, headers: dict[bytes, bytes], receive: Receive, exchange: Exchange
    ) -> None:
        """Read the whole body into the exchange.

        Raises:
            UnsupportedMediaType: If it is not plain JSON by its headers.
            RequestTooLarge: As soon as it is known to be over the limit.
            RequestTimeout: If its last byte is not there in time.
            _ClientLeft: If it never comes.
        """
        if not _JSON_TYPE.fullmatch(headers.get(b"content-type", b"")):
            raise UnsupportedMediaType("send the body as 'content-type: application/json'")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise UnsupportedMediaType("send the body without content-encoding")
        most = self._limits.max_body_bytes
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and (len(declared) > 18 or int(declared) > most):
            raise RequestTooLarge(f"the body has more than {most} bytes")
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.body_timeout_s - exchange.elapsed_s()):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientLeft
                    chunk = message.get("body", b"")
                    more = message.get("more_body", False)
                    size += len(chunk)
                    if size > most:
                        raise RequestTooLarge(f"the body has more than {most} bytes")
                    chunks.append(chunk)
        except TimeoutError:
            raise RequestTimeout(
                f"the body did not arrive within {self._limits.body_timeout_s:g} s"
            ) from None
        exchange.body_pending = False
        exchange.body = b"".join(chunks)
        if not exchange.body:
            raise InvalidRequest("the body is empty; send a JSON object")

    async def _run(self, scope: Scope, receive: Receive, reply: _Reply, exchange: Exchange) -> None:
        """Let the app answer, until it is done, its time is up, or the client leaves.

        Raises:
            DeadlineExceeded: If the route did not keep to its own deadline.
            _ClientLeft: If the client did.
        """
        handler = asyncio.current_task()
        assert handler is not None  # an ASGI app always runs in a task
        watcher = asyncio.create_task(_cancel_when_client_leaves(receive, handler, reply))
        try:
            async with asyncio.timeout(self._limits.max_deadline_s + _BACKSTOP_S) as backstop:
                await self._app(scope, _nothing_more, reply)
        except TimeoutError:
            if not backstop.expired():
                raise
            raise DeadlineExceeded("the request's time is up") from None
        except asyncio.CancelledError:
            if watcher.done() and not watcher.cancelled():
                handler.uncancel()
                raise _ClientLeft from None
            raise
        finally:
            watcher.cancel()

    async def _refuse(
        self, error: Exception, receive: Receive, reply: _Reply, exchange: Exchange
    ) -> None:
        """Answer with an error; where the body is not read, close politely behind the answer.

        A close with unread bytes resets the connection, and the answer may be lost on its way: so
        the rest of the body is drained for a moment, with the answer already sent.
        """
        response: Response = error_response(error)
        start: Message = {
            "type": "http.response.start",
            "status": response.status_code,
            "headers": response.raw_headers,
        }
        with contextlib.suppress(OSError):
            await reply(start)
            if exchange.body_pending:
                await reply(_body(response.body, more=True))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LINGER_S):
                        await _drain(receive)
                await reply(_body(b"", more=False))
            else:
                await reply(_body(response.body, more=False))

    def _report(self, exchange: Exchange) -> None:
        line = exchange.line
        line.seconds = exchange.elapsed_s()
        logger.log(logging.DEBUG if exchange.rule.is_probe else logging.INFO, "%s", line)
        self._metrics.record(GATEWAY_REQUESTS, 1, route=line.route, status=str(line.status))
        self._metrics.record(GATEWAY_SECONDS, line.seconds, route=line.route)
        self._metrics.record(GATEWAY_ONGOING, self._ongoing)


class _Reply:
    """The way back to the client: adds the headers of every response, and remembers its state."""

    def __init__(self, send: Send, exchange: Exchange) -> None:
        self._send = send
        self._exchange = exchange
        self.started = False
        self.complete = False
        self.is_stream = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            line = self._exchange.line
            line.status = message["status"]
            headers = message["headers"] = list(message.get("headers") or ())
            self.is_stream = any(value.startswith(_EVENT_STREAM) for _, value in headers)
            headers.append((b"x-request-id", line.request_id.encode()))
            if line.client_request_id is not None:
                headers.append((b"x-client-request-id", line.client_request_id.encode()))
            if self._exchange.body_pending:
                headers.append((b"connection", b"close"))
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True
        await self._send(message)


def _was_answered(line: RequestLine) -> bool | None:
    """Whether a request was answered whole; `None` where something else went wrong than time."""
    if line.error == DeadlineExceeded.__name__:
        return False
    return True if line.status == 200 and line.error is None else None


async def _cancel_when_client_leaves(
    receive: Receive, handler: asyncio.Task[None], reply: _Reply
) -> None:
    """Wait for the disconnect; the one servers send after a complete response is no news."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if reply.complete:
        # Only a disconnect that cancelled may look like one.
        raise asyncio.CancelledError
    handler.cancel()


async def _nothing_more() -> Message:
    """What a route gets that asks for more: it has the body, and leaving is the edge's matter."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


def _route_path(scope: Scope) -> str:
    """The path below the prefix the app is mounted at."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if root and path.startswith(root + "/") else path


async def _drain(receive: Receive) -> None:
    more = True
    while more:
        message = await receive()
        more = message["type"] == "http.request" and message.get("more_body", False)


def _body(body: bytes | memoryview, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}
