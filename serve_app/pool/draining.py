"""Applications that nobody wants any more, and when they may go."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

from ray.serve.schema import ApplicationStatus

from serve_app.pool.applications import ModelApplication, delete_application, ongoing_requests

logger = logging.getLogger(__name__)

LONG_POLL_S = 20.0
"""How long a watcher waits for news of the pool before it asks again."""
_WATCHER_GONE_S = 3 * LONG_POLL_S
"""A watcher that has not asked for so long is no more."""
_SETTLE_S = 2.0
"""From when every watcher knows that an application is not to be used, to its end at the earliest:
a request may be between its decision and its call."""


@dataclass
class _Drain:
    """An application that nobody wants any more."""

    pool_version: int
    """From this version on nobody is sent there."""
    until_s: float
    """It goes by then, whatever it does; monotonic clock."""
    unused_since_s: float | None = None


class Draining:
    """Ends applications.

    Invariant: one is deleted only when no gateway or router can choose it any more and it has
    nothing under way, or the longest deadline has passed.
    """

    def __init__(self) -> None:
        """Nothing goes, nobody watches."""
        self._drains: dict[str, _Drain] = {}
        self._watchers: dict[str, tuple[int, float]] = {}
        """Watcher to the version it knows, and when it said so."""

    def __bool__(self) -> bool:
        return bool(self._drains)

    def knows(self, watcher: str, pool_version: int) -> None:
        """A watcher says which version of the pool it has."""
        self._watchers[watcher] = (pool_version, time.monotonic())

    def note(
        self, unwanted: Iterable[ModelApplication], pool_version: int, longest_s: float
    ) -> None:
        """Note which applications nobody wants; what is wanted again stays.

        Args:
            unwanted: All of them.
            pool_version: From this version on nobody is sent to those that are new here.
            longest_s: The longest that a request may take.
        """
        until_s = time.monotonic() + longest_s
        self._drains = {
            a.name: self._drains.get(a.name) or _Drain(pool_version, until_s) for a in unwanted
        }

    async def end(self, unwanted: Iterable[ModelApplication]) -> None:
        """Delete those that were noted and that nobody can choose or waits for."""
        now_s = time.monotonic()
        for application in unwanted:
            drain = self._drains[application.name]
            if application.status is ApplicationStatus.DELETING:
                continue
            if not self._all_know(drain.pool_version):
                drain.unused_since_s = None
            elif drain.unused_since_s is None:
                drain.unused_since_s = now_s
            is_free = (
                drain.unused_since_s is not None
                and now_s - drain.unused_since_s > _SETTLE_S
                and not await asyncio.to_thread(ongoing_requests, application.replicas)
            )
            if is_free or now_s > drain.until_s:
                logger.info("application %s: deleted", application.name)
                await asyncio.to_thread(delete_application, application.name)

    def _all_know(self, pool_version: int) -> bool:
        """Whether every watcher that is alive has this version or a later one."""
        now_s = time.monotonic()
        self._watchers = {
            name: (version, seen_s)
            for name, (version, seen_s) in self._watchers.items()
            if now_s - seen_s < _WATCHER_GONE_S
        }
        return all(version >= pool_version for version, _ in self._watchers.values())
