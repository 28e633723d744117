"""`Idempotency-Key`: the same POST, sent again, is done once and answered the same way.

In comes a request whose body is read; it is worked on if it is the first with its key, and else
gets the first one's answer. A key belongs to one API key. What a stream said is kept as one piece
(`chat.whole_stream`), any other answer as it was sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import Message, Scope, Send

from serve_app.config import IdempotencyConfig
from serve_app.errors import AnswerNotKept, DeadlineExceeded, InvalidRequest, StoreError
from serve_app.gateway.chat.parsing import parse_json
from serve_app.gateway.edge.errors import error_response, error_status
from serve_app.gateway.edge.exchange import EVENT_STREAM, Exchange
from serve_app.gateway.edge.held_key import HeldKey
from serve_app.store import (
    Claim,
    KeptAnswer,
    KeyTimes,
    Store,
    claim_key,
)
from serve_app.store import Scope as KeyScope

HEADER = b"idempotency-key"
MAX_KEY_CHARS = 255
REPLAYED = (b"idempotent-replayed", b"true")

_KEY = re.compile(rb"[\x21-\x7e]{1,%d}" % MAX_KEY_CHARS)
_CLAIM_TIMEOUT_S = 5.0
_PATIENCE_S = 5.0
"""How long an answer waits until it is kept, at most."""
_GRACE_S = 0.2
"""How long after the request's deadline it waits, at most."""

Work = Callable[[Send], Awaitable[None]]


def read_key(scope: Scope) -> bytes:
    """The request's idempotency key.

    Raises:
        InvalidRequest: If there are several, or it is none.
    """
    values: list[bytes] = [value for name, value in scope["headers"] if name == HEADER]
    if len(values) > 1 or not _KEY.fullmatch(values[0]):
        raise InvalidRequest(
            f"Idempotency-Key: send it once, with 1 to {MAX_KEY_CHARS} visible ASCII characters",
            "Idempotency-Key",
        )
    return values[0]


class Idempotency:
    """Has the work for a key done once, whichever gateway is asked.

    Invariants:
        - Of requests with one key, at any time at most one may act.
        - An answer is kept before its last byte is sent, unless the store takes too long.
        - A request that ends without an answer to keep frees its key only if it began no effect.
    """

    def __init__(self, store: Store, settings: IdempotencyConfig, max_json_depth: int) -> None:
        """Keep keys in a store.

        Args:
            store: That all gateways share.
            settings: How much is kept, and for how long.
            max_json_depth: Of a request's body.
        """
        self._store = store
        self._settings = settings
        self._times = KeyTimes(settings.lease_s, settings.keep_s)
        self._max_json_depth = max_json_depth

    async def answer(
        self, key: bytes, path: str, exchange: Exchange, send: Send, work: Work
    ) -> None:
        """Answer a request that came with a key.

        Args:
            key: As sent.
            path: Of the request.
            exchange: The request, with its body.
            send: Takes the response.
            work: Does what is asked, and sends the response to what it is given.

        Raises:
            InvalidRequest: If the body is no JSON object.
            KeyReused, KeyInFlight, OutcomeUnknown, AnswerNotKept, RateLimited, StoreError: Why the
                request is neither done nor answered; see `store.idempotency.claim_key`.
            DeadlineExceeded: If its time is up before its key is claimed.
            Exception: What the work fails with.
        """
        said = parse_json(exchange.body, self._max_json_depth)
        claim = Claim(
            owner=exchange.owner,
            key_hash=hashlib.sha256(key).hexdigest(),
            claim_id=exchange.request_id,
            request_hash=_request_hash(path, said),
        )
        kept = await self._claim(claim, _deadline_s(said) - exchange.elapsed_s())
        if kept is not None:
            await _replay(kept, send)
            return
        is_admin = exchange.rule.access is KeyScope.ADMIN
        held = HeldKey(self._store, claim, self._settings, lambda: _patience_s(exchange))
        ending = _Ending(held, keeps_refusals=not is_admin)
        exchange.held_key = held
        try:
            if is_admin:  # a refusal comes before a change; all else may be one
                await held.begin_effect()
            await work(_Recorder(send, ending))
        except Exception as error:
            response = error_response(error)
            headers = [(n.decode(), v.decode()) for n, v in response.raw_headers]
            await ending.with_answer(error_status(error), headers, bytes(response.body))
            raise
        finally:
            await held.give_up()

    async def _claim(self, claim: Claim, left_s: float) -> KeptAnswer | None:
        """Claim the key in time; see `claim_key`."""
        try:
            async with asyncio.timeout(min(_CLAIM_TIMEOUT_S, left_s)):
                return await claim_key(self._store, claim, self._times, self._settings.max_keys)
        except TimeoutError as error:
            if left_s < _CLAIM_TIMEOUT_S:
                raise DeadlineExceeded("the request's time is up") from error
            raise StoreError("the store is not available; try again later") from error


class _Ending:
    """What an answer means for its key."""

    def __init__(self, held: HeldKey, *, keeps_refusals: bool) -> None:
        """Of a key.

        Args:
            held: The key.
            keeps_refusals: Whether a 4xx that comes after an effect is the answer to keep.
        """
        self._held = held
        self._keeps_refusals = keeps_refusals

    async def with_answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        """Keep an answer, or forget the key, or leave the outcome unknown."""
        is_refusal = 400 <= status < 500
        if status < 400 or (is_refusal and self._held.has_acted and self._keeps_refusals):
            kept = [(name, value) for name, value in headers if name != "content-length"]
            await self._held.keep(status, kept, body)
        else:
            await self._held.give_up(did_nothing=is_refusal)


class _Recorder:
    """Sends a response when it is kept; a stream at once, because its handler keeps it."""

    def __init__(self, send: Send, ending: _Ending) -> None:
        self._send = send
        self._ending = ending
        self._start: Message | None = None
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        """Take one ASGI message."""
        if message["type"] == "http.response.start":
            headers = message.get("headers") or ()
            if any(value.startswith(EVENT_STREAM) for _, value in headers):
                await self._send(message)
            else:
                self._start = message
            return
        if self._start is None or message["type"] != "http.response.body":
            await self._send(message)
            return
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        start, self._start = self._start, None
        headers = [(name.decode(), value.decode("latin-1")) for name, value in start["headers"]]
        await self._ending.with_answer(start["status"], headers, bytes(self._body))
        await self._send(start)
        await self._send({**message, "body": bytes(self._body)})


async def _replay(kept: KeptAnswer, send: Send) -> None:
    """Answer as before.

    Raises:
        AnswerNotKept: If the answer was too large.
    """
    if kept.body is None:
        raise AnswerNotKept(
            f"the request with this Idempotency-Key was done and answered with {kept.status}; the "
            "answer was too large to keep, so it cannot be given again",
            "Idempotency-Key",
        )
    headers = [(name.encode(), value.encode("latin-1")) for name, value in kept.headers]
    headers += [(b"content-length", str(len(kept.body)).encode()), REPLAYED]
    await send({"type": "http.response.start", "status": kept.status, "headers": headers})
    await send({"type": "http.response.body", "body": kept.body, "more_body": False})


def _request_hash(path: str, said: dict[str, Any]) -> str:
    """The same for bodies that differ in spaces, and in the order of names, alone."""
    canonical = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"POST {path}\n{canonical}".encode()).hexdigest()


def _deadline_s(said: dict[str, Any]) -> float:
    """The deadline that a body sets, which is not validated yet; infinity: none, or a wrong one."""
    options = said.get("atlas")
    deadline_s = options.get("deadline_s") if isinstance(options, dict) else None
    return deadline_s if isinstance(deadline_s, int | float) and deadline_s > 0 else math.inf


def _patience_s(exchange: Exchange) -> float:
    """How long the end of a request may wait for the store."""
    if not exchange.ends_s:
        return _PATIENCE_S
    return min(_PATIENCE_S, exchange.ends_s + _GRACE_S - time.monotonic())
