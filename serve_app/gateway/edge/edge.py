"""The edge: what every HTTP request passes before a handler sees it, as one pure ASGI middleware.

In comes a raw connection; out goes `scope["atlas"]`, an `Exchange` with the owner and the whole
body, within its limits. What must stay true: only a route of the table is called, by a caller that
its row lets in; each request is answered or its connection closed in time, each error leaves in
OpenAI's shape or, where a person looks, as a page, each request writes one log line, and nothing
the caller sends decides the request's id.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.config import LimitsConfig
from serve_app.errors import AtlasError, DeadlineExceeded, HeadersTooLarge, RateLimited
from serve_app.gateway.edge.admission import AdmissionLimit
from serve_app.gateway.edge.auth import Authenticator
from serve_app.gateway.edge.bodies import BodyReader, drain
from serve_app.gateway.edge.exchange import ClientLeft, Exchange, Reply, new_request_id
from serve_app.gateway.edge.hosts import HostCheck
from serve_app.gateway.edge.idempotency import HEADER, Idempotency, read_key
from serve_app.gateway.edge.proxy import body_held_back
from serve_app.gateway.edge.rate import RateLimiter
from serve_app.gateway.edge.routes import PUBLIC, Endpoint, RouteTable
from serve_app.gateway.edge.sessions import require_own_page, session_of
from serve_app.gateway.edge.shares import Shares
from serve_app.gateway.purses import Purses
from serve_app.schemas import PATTERN_PREFIX, StopReason
from serve_app.store.keys import ApiKey
from serve_app.store.keys import Scope as KeyScope
from serve_app.telemetry import (
    GATEWAY_ONGOING,
    GATEWAY_REQUESTS,
    GATEWAY_SECONDS,
    LIMITS_REFUSED,
    MetricSink,
    RequestLine,
)
from serve_app.telemetry.tracing import Tracing
from serve_app.trace_context import CURRENT

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""Logged as the status of a request whose client left before the end; nobody receives it."""

_LINGER_S = 1.0
"""How long an unread body is drained after a refusal, so that the sender gets to read it."""
_MAX_LINGERING = 64
"""Refused senders that are waited for at once; others may find their connection reset."""
_BACKSTOP_S = 1.0
"""How long after the longest deadline the edge ends a request whose route did not."""
_LIMITS = {
    "BudgetExceeded": "cost",
    "ContextTooLong": "context",
    "DeadlineExceeded": "deadline",
    "HeadersTooLarge": "size",
    "QuotaExceeded": "quota",
    "RateLimited": "rate",
    "RequestTooLarge": "size",
}
"""By the class of the error that a limit ends a request with: what the metrics call the limit."""
_CLIENT_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class Edge:
    """Ids, limits, keys, errors and the log line around the handlers.

    Order of checks: path and method, header size, host, concurrency, key, the key's own limits,
    the idempotency key's form, type and declared length of the body, then the body while it is
    read, then the idempotency key, then load. The first that fails answers.

    Invariants:
        - At most `max_ongoing_requests` requests are past the edge at once, probes and the admin
          aside; the others are refused before their body is read. A request has no place before its
          key is known to be good, and Serve reads none of its body.
        - While several keys call, none of them holds all places.
        - Of the requests that models work for, no more are taken than `AdmissionLimit` says.
        - No request outlives `max_deadline_s` by more than a second; when the client leaves, its
          work is cancelled.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        routes: RouteTable,
        hosts: HostCheck,
        limits: LimitsConfig,
        authenticator: Authenticator,
        idempotency: Idempotency,
        purses: Purses,
        metrics: MetricSink,
        tracing: Tracing,
    ) -> None:
        """Stand before the handlers.

        Args:
            app: Takes the server's lifespan events; sees no request.
            routes: The handlers, and who may call them.
            hosts: Which callers and names are answered.
            limits: The bounds.
            authenticator: Turns a key into its owner.
            idempotency: Answers POSTs that come with an idempotency key.
            purses: Pay for the requests of keys with limits.
            metrics: Counts requests.
            tracing: Is told of requests, but for public routes.
        """
        self._app = app
        self._routes = routes
        self._hosts = hosts
        self._limits = limits
        self._authenticator = authenticator
        self._idempotency = idempotency
        self._purses = purses
        self._metrics = metrics
        self._tracing = tracing
        self._bodies = BodyReader(limits)
        self._ongoing = 0
        self._lingering = 0
        self._shares = Shares(limits.ongoing_requests_per_key)
        self._work_shares = Shares()
        per_minute = limits.requests_per_minute_per_key
        self._rate = None if per_minute is None else RateLimiter(per_minute)
        self._admission = AdmissionLimit(limits) if limits.adapt_to_load else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event; there are no WebSockets here."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(time.monotonic(), RequestLine(new_request_id(), scope["method"]))
        exchange.line.route = exchange.rule.name
        scope["atlas"] = exchange
        reply = Reply(send, exchange)
        try:
            await self._pass(scope, receive, reply, exchange)
        except ClientLeft:
            exchange.line.status, exchange.line.stop = CLIENT_LEFT, StopReason.LEFT
        except asyncio.CancelledError:
            exchange.line.status, exchange.line.stop = CLIENT_LEFT, StopReason.LEFT
            raise
        except Exception as error:
            exchange.line.error = type(error).__name__
            exchange.line.stop = error.stop if isinstance(error, AtlasError) else None
            if not isinstance(error, AtlasError):
                logger.exception("request_id=%s failed unexpectedly", exchange.request_id)
            if not reply.started:
                await self._refuse(error, receive, reply, exchange)
        finally:
            self._report(exchange)

    async def _pass(self, scope: Scope, receive: Receive, reply: Reply, exchange: Exchange) -> None:
        """Check, read, and hand on."""
        with body_held_back(scope):
            headers, endpoint = await self._let_in(scope, exchange)
            has_key = HEADER in headers and endpoint.method == "POST"
            key = read_key(scope) if has_key else None

        async def work(send: Send) -> None:
            with (
                self._work_place(reply, exchange),
                self._purses.of(exchange.key) as exchange.purse,
            ):
                await self._run(endpoint, scope, receive, reply, send)

        with self._place(exchange):
            if endpoint.rule.reads_body:
                await self._bodies.read(headers, receive, exchange)
            if key is None:
                await work(reply)
            else:
                await self._idempotency.answer(key, scope["path"], exchange, reply, work)

    async def _let_in(
        self, scope: Scope, exchange: Exchange
    ) -> tuple[dict[bytes, bytes], Endpoint]:
        """All that is checked before the body is looked at; headers and route."""
        headers, size = _read_headers(scope, exchange)
        endpoint, found = self._routes.find(scope)
        rule = exchange.rule = endpoint.rule
        exchange.line.route = rule.name
        if rule.access != PUBLIC:
            exchange.trace = self._tracing.begin(headers, exchange.request_id)
            if exchange.trace is not None:
                CURRENT.set(exchange.trace.carrier(0))
        if size > self._limits.max_header_bytes:
            raise HeadersTooLarge(
                f"address and headers have {size} bytes; at most "
                f"{self._limits.max_header_bytes} are read"
            )
        self._hosts.check(scope, is_probe=rule.is_probe)
        if not rule.is_urgent:
            self._check_room()
        if rule.access != PUBLIC:
            exchange.key = await self._caller(scope, headers, rule.access)
            exchange.line.owner = exchange.owner
        scope.update(found)
        return headers, endpoint

    async def _caller(self, scope: Scope, headers: dict[bytes, bytes], access: KeyScope) -> ApiKey:
        """The key that calls, by itself or through a browser's session."""
        authorization = headers.get(b"authorization")
        session = session_of(headers.get(b"cookie")) if authorization is None else None
        if session is not None:
            require_own_page(scope)
        return await self._authenticator.caller(authorization, access, session)

    def _check_room(self) -> None:
        if self._ongoing >= self._limits.max_ongoing_requests:
            raise RateLimited(
                f"{self._limits.max_ongoing_requests} requests are being worked on; try again"
            )

    @contextmanager
    def _place(self, exchange: Exchange) -> Iterator[None]:
        """One of the gateway's places, for a request whose key is good; admins need none.

        Nor do public routes, so that who has no key cannot take places from those who have one.

        Raises:
            RateLimited: If there is none, or the key has used up what is its own.
        """
        if exchange.rule.is_urgent or exchange.rule.access == PUBLIC:
            yield
            return
        owner = exchange.owner
        self._check_room()  # again: others may have come while the key was looked up
        if self._rate is not None and exchange.rule.is_work:
            self._rate.take(owner)
        self._shares.enter(owner, self._limits.max_ongoing_requests)
        self._ongoing += 1
        try:
            yield
        finally:
            self._ongoing -= 1
            self._shares.leave(owner)
            self._bodies.release(exchange)

    @contextmanager
    def _work_place(self, reply: Reply, exchange: Exchange) -> Iterator[None]:
        """One of the places that load leaves, for a request that models or the router work for.

        Raises:
            RateLimited: If there is none, or the key has its share of them.
        """
        if self._admission is None or not exchange.rule.is_work:
            yield
            return
        # Before the share: a key that is alone may hold all places, and the limit has to learn that
        # it was met.
        place = self._admission.enter()
        answered: bool | None = None
        try:
            self._work_shares.enter(exchange.owner, self._admission.limit)
            try:
                yield
                answered = _was_answered(exchange.line)
            except (DeadlineExceeded, ClientLeft, asyncio.CancelledError):
                answered = False
                raise
            finally:
                self._work_shares.leave(exchange.owner)
        finally:
            kind = (exchange.rule.name, worked_on(exchange.line), reply.is_stream)
            self._admission.leave(place, kind, answered=answered)

    async def _run(
        self, endpoint: Endpoint, scope: Scope, receive: Receive, reply: Reply, send: Send
    ) -> None:
        """Let the handler answer, until it is done, its time is up, or the client leaves.

        Args:
            endpoint: Its route.
            scope: What it is told of the request.
            receive: Says that the client left.
            reply: The way to the client.
            send: What it answers to.

        Raises:
            DeadlineExceeded: If the route did not keep to its own deadline.
            ClientLeft: If the client did.
        """
        handler = asyncio.current_task()
        assert handler is not None  # an ASGI app always runs in a task
        watcher = asyncio.create_task(_cancel_when_client_leaves(receive, handler, reply))
        try:
            async with asyncio.timeout(self._limits.max_deadline_s + _BACKSTOP_S) as backstop:
                await endpoint.app(scope, _nothing_more, send)
        except TimeoutError:
            if not backstop.expired():
                raise
            raise DeadlineExceeded("the request's time is up") from None
        except asyncio.CancelledError:
            if watcher.done() and not watcher.cancelled():
                handler.uncancel()
                raise ClientLeft from None
            raise
        finally:
            watcher.cancel()

    async def _refuse(
        self, error: Exception, receive: Receive, reply: Reply, exchange: Exchange
    ) -> None:
        """Answer with an error; where the body is not read, close politely behind the answer.

        A close with unread bytes resets the connection, and the answer may be lost on its way: so
        the rest of the body is drained for a moment, with the answer already sent.
        """
        response: Response = exchange.rule.refusal(error)
        start: Message = {
            "type": "http.response.start",
            "status": response.status_code,
            "headers": response.raw_headers,
        }
        with contextlib.suppress(OSError):
            await reply(start)
            if exchange.body_pending and self._lingering < _MAX_LINGERING:
                self._lingering += 1
                try:
                    await reply(_body(response.body, more=True))
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_LINGER_S):
                            await drain(receive)
                    await reply(_body(b"", more=False))
                finally:
                    self._lingering -= 1
            else:
                await reply(_body(response.body, more=False))

    def _report(self, exchange: Exchange) -> None:
        line = exchange.line
        line.seconds = exchange.elapsed_s()
        logger.log(logging.DEBUG if exchange.rule.is_probe else logging.INFO, "%s", line)
        self._metrics.record(GATEWAY_REQUESTS, 1, route=line.route, status=str(line.status))
        self._metrics.record(GATEWAY_SECONDS, line.seconds, route=line.route)
        self._metrics.record(GATEWAY_ONGOING, self._ongoing)
        if exchange.trace is not None:
            self._tracing.served(exchange.trace, line, exchange.verdict)
        if line.error in _LIMITS:
            self._metrics.record(LIMITS_REFUSED, limit=_LIMITS[line.error])


def _read_headers(scope: Scope, exchange: Exchange) -> tuple[dict[bytes, bytes], int]:
    """The headers by name, the first of each; and the size of address and headers in bytes."""
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
    return headers, size


def worked_on(line: RequestLine) -> str | None:
    """What a request is compared with: a pattern takes longer than a pair, whoever chose it."""
    is_pattern = line.pair is not None and line.pair.startswith(PATTERN_PREFIX)
    return line.pair if is_pattern else line.model


def _was_answered(line: RequestLine) -> bool | None:
    """Whether a request was answered whole; `None` where something else went wrong than time."""
    if line.error == DeadlineExceeded.__name__:
        return False
    return True if line.status == 200 and line.error is None else None


async def _cancel_when_client_leaves(
    receive: Receive, handler: asyncio.Task[None], reply: Reply
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


def _body(body: bytes | memoryview, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}
