"""A clock that a test's own event loop turns: no real second passes, and none is lost."""

from __future__ import annotations

import asyncio
import selectors
import time
from typing import Any

import pytest


class LoopClock:
    """Time for one event loop: it stands still while there is work, and jumps to the next timer.

    What the loop runs sees the same clock as its timers, so a slow machine changes nothing. Threads
    and sockets of the loop are not waited for: while it waits for them, time passes.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, patch: pytest.MonkeyPatch) -> None:
        """Take over the loop's clock, and `time.monotonic`, until the patch is undone."""
        self._now_s = time.monotonic()
        selector: selectors.BaseSelector = loop._selector  # type: ignore[attr-defined]
        select = selector.select

        def jump(timeout: float | None = None) -> Any:
            """Look what is ready; if nothing is, the time that would be waited has passed."""
            if timeout is None:
                return select(None)
            ready = select(0)
            if not ready:
                self._now_s += timeout
            return ready

        patch.setattr(selector, "select", jump)
        patch.setattr(loop, "time", self)
        patch.setattr(time, "monotonic", self)

    def __call__(self) -> float:
        """Seconds of the clock."""
        return self._now_s
