"""A job as server-sent events: what it looks like now, then every change, until it is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve_app.errors import AtlasError
from serve_app.gateway.edge.errors import error_body, json_bytes
from serve_app.store import Job

Json = dict[str, Any]

_POLL_S = 0.5
_QUIET_S = 10.0
"""After so long without a change a comment is sent, so that nothing on the way gives up."""


class JobEvents(Response):
    """Sends a job's changes; `[DONE]` follows the last one.

    A stream that ends without it was cut off, or its time was up: the client asks again.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        job: Job,
        look: Callable[[], Awaitable[Job]],
        show: Callable[[Job], Json],
        *,
        max_s: float,
    ) -> None:
        """Make the response.

        Args:
            job: As it is now.
            look: Gives it as it is then.
            show: What is sent of it.
            max_s: Seconds after which the stream ends anyway.
        """
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._job = job
        self._look = look
        self._show = show
        self._max_s = max_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the job is over; the edge cancels when the client leaves."""
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        try:
            await self._send_changes(send)
        except AtlasError as error:
            await _send(send, _event(error_body(error)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_changes(self, send: Send) -> None:
        job, ends_s = self._job, time.monotonic() + self._max_s
        await _send(send, _event(self._show(job)))
        sent_s = time.monotonic()
        while not job.is_over and time.monotonic() < ends_s:
            await asyncio.sleep(_POLL_S)
            before, job = job, await self._look()
            if job != before:
                await _send(send, _event(self._show(job)))
                sent_s = time.monotonic()
            elif time.monotonic() - sent_s > _QUIET_S:
                await _send(send, b": still running\n\n")
                sent_s = time.monotonic()
        if job.is_over:
            await _send(send, b"data: [DONE]\n\n")


def _event(content: Json) -> bytes:
    return b"data: " + json_bytes(content) + b"\n\n"


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
