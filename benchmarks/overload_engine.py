"""A scripted engine of fixed capacity, so that the load it sustains is known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from benchmarks.engines import chunks, completion
from serve_app.models.protocol import ChatBody


class SlotModel:
    """Works on so many requests at once, each at its own pace; the others wait in their order."""

    def __init__(self, slots: int, seconds_per_token: float) -> None:
        """Set the capacity.

        Args:
            slots: Requests worked on at once.
            seconds_per_token: Time of each token of `max_tokens`, whatever is said in it.
        """
        self._slots = asyncio.Semaphore(slots)
        self._seconds_per_token = seconds_per_token

    async def complete(self, body: ChatBody) -> dict[str, Any]:
        """See `ModelServer.complete`."""
        async with self._slots:
            await asyncio.sleep(self._seconds_per_token * body["max_tokens"])
        return completion()

    async def stream(self, body: ChatBody) -> AsyncIterator[list[dict[str, Any]]]:
        """See `ModelServer.stream`: word after word at an even pace."""
        pieces = chunks()
        async with self._slots:
            for piece in pieces:
                await asyncio.sleep(self._seconds_per_token * body["max_tokens"] / len(pieces))
                yield [piece]
