"""From a run to the reader of its answer: pieces in their order, at most so many at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")

MAX_WAITING = 64
"""Pieces under way; a run waits for its reader beyond that."""
_ENDING_S = 1.0
"""How long a run that nobody reads any more may take to end."""


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[_T]):
    """A piece under way."""

    piece: _T
    holds_room: bool
    """Whether it takes one of the places."""


class Channel(Generic[_T]):
    """Carries the pieces of one run, which works in a task of its own.

    Invariants:
        - What was sent or offered is read in that order, all of it before the error that the run
          fails with is raised.
        - A reader that leaves ends the run, and goes on once the run has ended.
    """

    def __init__(self) -> None:
        """Begin empty."""
        self._pieces: asyncio.Queue[_Waiting[_T] | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(MAX_WAITING)

    async def send(self, piece: _T) -> None:
        """Send a piece; waits while too many are under way."""
        await self._room.acquire()
        self._pieces.put_nowait(_Waiting(piece, holds_room=True))

    def offer(self, piece: _T) -> None:
        """Send a piece without waiting, however many are under way; the caller bounds those."""
        self._pieces.put_nowait(_Waiting(piece, holds_room=False))

    async def read(self, work: Coroutine[Any, Any, Any]) -> AsyncGenerator[_T, None]:
        """Run the work that sends the pieces.

        Raises:
            BaseException: What the work fails with.
        """
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(lambda _: self._pieces.put_nowait(None))
        try:
            while (waiting := await self._pieces.get()) is not None:
                if waiting.holds_room:
                    self._room.release()
                yield waiting.piece
            await task
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=_ENDING_S)
            if task.done() and not task.cancelled():
                task.exception()  # seen
