"""Completions as server-sent events, in the shape OpenAI's clients read.

In come pieces and, last, the report; out go `data:` events. The first piece is there before
the status is sent, so a failure before it is an HTTP error, and one after it an error event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve_app.errors import AtlasError
from serve_app.gateway.chat.chunk_shaper import DONE, ChunkShaper, event_bytes
from serve_app.gateway.chat.whole_stream import WholeStream
from serve_app.gateway.chat.writing import ChunkWriter
from serve_app.gateway.edge.errors import error_body
from serve_app.gateway.edge.exchange import Exchange
from serve_app.orchestrator.run import Piece
from serve_app.schemas import Report

logger = logging.getLogger(__name__)

Json = dict[str, Any]
Items = AsyncGenerator[Piece | Report, None]

_LAST_WORD_S = 1.0
"""How long a client that stopped reading gets to take the error event."""


class EventStream(Response):
    """Sends a stream that has begun."""

    media_type = "text/event-stream"

    def __init__(
        self,
        first: Piece,
        items: Items,
        *,
        exchange: Exchange,
        writer: ChunkWriter,
        shaper: ChunkShaper,
        deadline: Callable[[], AbstractAsyncContextManager[None]],
        finish: Callable[[Report], Json],
    ) -> None:
        """Make the response.

        Args:
            first: The first piece.
            items: The rest, and the report.
            exchange: The request.
            writer: Writes chunks.
            shaper: Where things go.
            deadline: Ends its block with `DeadlineExceeded` when the request's time is up.
            finish: Takes the report; returns the `atlas` object.
        """
        headers = {
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            "x-atlas-pair": str(first.pair),
            "x-atlas-path": first.path.value,
        }
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._first = first
        self._items = items
        self._exchange = exchange
        self._writer = writer
        self._shaper = shaper
        self._deadline = deadline
        self._finish = finish
        self._whole = None if exchange.held_key is None else WholeStream(first)
        """What is kept for the request's idempotency key."""

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
        await self._send_piece(send, self._first)
        async for item in self._items:
            if isinstance(item, Report):
                extension = self._finish(item)
                await self._keep(extension)
                await _send_event(send, self._shaper.finish(extension))
                break
            await self._send_piece(send, item)
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _send_piece(self, send: Send, piece: Piece) -> None:
        if self._whole is not None:
            self._whole.add(piece)
        for chunk in self._writer.chunks(piece):
            for shaped in self._shaper.feed(chunk):
                await _send_event(send, shaped)

    async def _keep(self, extension: Json) -> None:
        """Keep the answer, before its end is sent, for a request that comes again."""
        held_key = self._exchange.held_key
        if held_key is not None and self._whole is not None:
            body = self._whole.body(self._writer, self._shaper.anew(), extension)
            await held_key.keep(self.status_code, self.headers.items(), body)


async def _send_event(send: Send, event: Json) -> None:
    await send({"type": "http.response.body", "body": event_bytes(event), "more_body": True})
