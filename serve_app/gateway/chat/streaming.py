"""Completions as server-sent events, in the shape OpenAI's clients read.

In come chunk objects and, last, the report; out go `data:` events. The first chunk is there before
the status is sent, so a failure before it is an HTTP error, and one after it an error event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve_app.errors import AtlasError
from serve_app.gateway.edge.errors import error_body, json_bytes
from serve_app.gateway.edge.exchange import Exchange
from serve_app.schemas import Report

logger = logging.getLogger(__name__)

Json = dict[str, Any]
Items = AsyncGenerator[Json | Report, None]

_LAST_WORD_S = 1.0
"""How long a client that stopped reading gets to take the error event."""


class ChunkShaper:
    """Puts usage and the `atlas` object where clients expect them.

    With `include_usage`, both ride on a last chunk without choices, as OpenAI sends it. Without,
    every chunk has a choice, because clients index it: so the object rides on the last of those,
    and a chunk that may be the last is held back until the next one shows that it was not. An
    event, which the caller asked for, has no choice, and passes at once.
    """

    def __init__(self, *, include_usage: bool) -> None:
        """Shape one stream."""
        self._include_usage = include_usage
        self._held: Json | None = None
        self._usage: Json | None = None
        self._head: Json = {}

    def feed(self, chunk: Json) -> Iterator[Json]:
        """Take a chunk; give those that can be sent now."""
        used = chunk.pop("usage", None)
        if used:
            self._usage = used
        if not chunk.get("choices"):
            if "event" in chunk.get("atlas", {}):
                self._head = self._head or _head_of(chunk)
                yield chunk
            return
        self._head = _head_of(chunk)
        if self._include_usage:
            chunk["usage"] = None
            yield chunk
            return
        if self._held is not None:
            yield self._held
            self._held = None
        if any(choice.get("finish_reason") for choice in chunk["choices"]):
            self._held = chunk
        else:
            yield chunk

    def finish(self, extension: Json) -> Json:
        """The last chunk."""
        if self._include_usage:
            used = self._usage or extension["usage"]
            return {**self._head, "choices": [], "usage": used, "atlas": extension}
        last = self._held
        if last is None:
            choice = {"index": 0, "delta": {}, "finish_reason": None}
            last = {**self._head, "choices": [choice]}
        last["atlas"] = extension
        return last


def _head_of(chunk: Json) -> Json:
    return {name: chunk[name] for name in ("id", "object", "created", "model") if name in chunk}


class EventStream(Response):
    """Sends a stream that has begun."""

    media_type = "text/event-stream"

    def __init__(
        self,
        first: Json,
        items: Items,
        *,
        exchange: Exchange,
        shaper: ChunkShaper,
        deadline: Callable[[], AbstractAsyncContextManager[None]],
        finish: Callable[[Report], Json],
    ) -> None:
        """Make the response.

        Args:
            first: The first chunk.
            items: The rest, and the report.
            exchange: The request.
            shaper: Where things go.
            deadline: Ends its block with `DeadlineExceeded` when the request's time is up.
            finish: Takes the report; returns the `atlas` object.
        """
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        begun = first.get("atlas") or {}
        for name, value in (
            ("x-atlas-pair", begun.get("pair") or first.get("model")),
            ("x-atlas-path", begun.get("path")),
        ):
            if value:
                headers[name] = str(value)
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._first = first
        self._items = items
        self._exchange = exchange
        self._shaper = shaper
        self._deadline = deadline
        self._finish = finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything; the deadline holds for a client that reads too slowly as well."""
        try:
            async with self._deadline():
                await self._send_all(send)
        except Exception as error:
            self._exchange.line.error = type(error).__name__
            self._exchange.line.stop = error.stop if isinstance(error, AtlasError) else None
            if not isinstance(error, AtlasError):
                logger.exception("request_id=%s failed in its stream", self._exchange.request_id)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORD_S):
                    await _send_event(send, error_body(error))
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._items.aclose()

    async def _send_all(self, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        for chunk in self._shaper.feed(self._first):
            await _send_event(send, chunk)
        async for item in self._items:
            if isinstance(item, Report):
                await _send_event(send, self._shaper.finish(self._finish(item)))
                break
            for chunk in self._shaper.feed(item):
                await _send_event(send, chunk)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def _send_event(send: Send, event: Json) -> None:
    body = b"data: " + json_bytes(event) + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})
