"""Reading a request's body: its type, its size, its time, and the memory of all bodies together."""

from __future__ import annotations

import asyncio
import re

from starlette.types import Receive

from serve_app.config import LimitsConfig
from serve_app.errors import (
    InvalidRequest,
    RateLimited,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedMediaType,
)
from serve_app.gateway.edge.exchange import ClientLeft, Exchange

_JSON_TYPE = re.compile(rb'application/json\s*+(;\s*+charset\s*+=\s*+"?utf-?8"?\s*+)?;?\s*+', re.I)
"""Possessive: 16 KB of blanks would take more than a second."""


class BodyReader:
    """Reads bodies within the limits.

    Invariants:
        - A body is read within `body_timeout_s` of the request's arrival, and never kept beyond
          `max_body_bytes`.
        - The bodies of all requests under way, those of admins aside, have at most
          `max_bodies_bytes` together.
    """

    def __init__(self, limits: LimitsConfig) -> None:
        """Hold no body yet."""
        self._limits = limits
        self._held_bytes = 0

    async def read(self, headers: dict[bytes, bytes], receive: Receive, exchange: Exchange) -> None:
        """Read the whole body into the exchange; `release` lets go of it.

        Raises:
            UnsupportedMediaType: If it is not plain JSON by its headers.
            RequestTooLarge: As soon as it is known to be over the limit.
            RequestTimeout: If its last byte is not there in time.
            RateLimited: As soon as there is no room for it.
            ClientLeft: If it never comes.
        """
        self._check_headers(headers)
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_timeout_s - exchange.elapsed_s()):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeft
                    piece = message.get("body", b"")
                    more = message.get("more_body", False)
                    self._check_size(len(body) + len(piece))
                    self._hold(len(piece), exchange)
                    body += piece
        except TimeoutError:
            raise RequestTimeout(
                f"the body did not arrive within {self._limits.body_timeout_s:g} s"
            ) from None
        exchange.body_pending = False
        exchange.body = bytes(body)
        if not exchange.body:
            raise InvalidRequest("the body is empty; send a JSON object")

    def release(self, exchange: Exchange) -> None:
        """Forget a body."""
        exchange.body = b""
        self._held_bytes -= exchange.held_bytes
        exchange.held_bytes = 0

    def _check_headers(self, headers: dict[bytes, bytes]) -> None:
        if not _JSON_TYPE.fullmatch(headers.get(b"content-type", b"")):
            raise UnsupportedMediaType("send the body as 'content-type: application/json'")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise UnsupportedMediaType("send the body without content-encoding")
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit():
            self._check_size(int(declared) if len(declared) <= 18 else 10**18)

    def _check_size(self, size: int) -> None:
        if size > self._limits.max_body_bytes:
            raise RequestTooLarge(f"the body has more than {self._limits.max_body_bytes} bytes")

    def _hold(self, size: int, exchange: Exchange) -> None:
        """Count one piece of a body."""
        if exchange.rule.is_urgent:
            return
        if self._held_bytes + size > self._limits.max_bodies_bytes:
            raise RateLimited("too many large requests are being worked on; try again")
        self._held_bytes += size
        exchange.held_bytes += size


async def drain(receive: Receive) -> None:
    """Read the rest of a body and forget it."""
    more = True
    while more:
        message = await receive()
        more = message["type"] == "http.request" and message.get("more_body", False)
