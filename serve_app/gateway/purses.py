"""The purses of one gateway: for each key with limits what this gateway may spend of them.

A purse is drawn from the store in slices, and renewed while it is used; what is left goes back
when no request of the key has been under way for a moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from serve_app.errors import QuotaUnknown, StoreError
from serve_app.purse import Purse
from serve_app.store import (
    Amounts,
    ApiKey,
    Grant,
    OutcomeLog,
    Refusal,
    Store,
    draw_lease,
    give_back_lease,
    renew_leases,
)
from serve_app.store.database import is_transient

logger = logging.getLogger(__name__)

_STORE_TIMEOUT_S = 5.0
_DRAW_TRIES = 3
_RENEW_S = 20.0
_SAFE_S = 60.0
"""How long a purse may be used without being renewed: a store that is away for a moment costs
nothing."""
_SETTLE_TIMEOUT_S = 5.0


@dataclass(eq=False, slots=True)
class _Open:
    """A purse, and what it was opened for."""

    purse: Purse
    key_id: str
    limited_unix_s: float | None
    """When the key's limits were changed last."""


class Purses:
    """Opens purses, keeps their leases, and gives them back.

    Invariants:
        - A key without limits has no purse, and costs nothing.
        - A lease outlives every request that is paid from it, as far as the store can be reached
          within a minute.
        - A lease is given back only when the outcomes of its requests are written.
    """

    def __init__(
        self, store: Store, outcomes: OutcomeLog, max_deadline_s: float, *, idle_s: float = 2.0
    ) -> None:
        """Begin with no purse.

        Args:
            store: Where the leases are.
            outcomes: Writes what the requests have cost.
            max_deadline_s: The longest that a request takes.
            idle_s: A purse that no request uses is given back after this time.
        """
        self._store = store
        self._outcomes = outcomes
        self._lease_s = max_deadline_s + _SAFE_S
        self._idle_s = idle_s
        self._current: dict[str, _Open] = {}
        """By key: the purse of its next request."""
        self._opened: list[_Open] = []
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def of(self, key: ApiKey) -> Iterator[Purse | None]:
        """What a request of a key is paid from, while the request is under way.

        Args:
            key: The key as it is now.

        Yields:
            The purse; `None`: nothing limits the key.
        """
        if key.limited_unix_s is None:
            yield None
            return
        held = self._current.get(key.key_id)
        if (
            held is None
            or held.limited_unix_s != key.limited_unix_s
            or time.time() >= held.purse.ends_unix_s
        ):
            held = self._open(key)
        held.purse.users += 1
        try:
            yield held.purse
        finally:
            held.purse.users -= 1
            held.purse.used_s = time.monotonic()

    async def close(self) -> None:
        """Give all leases back; no request may be under way."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for held in list(self._opened):
            await self._give_back(held)

    def _open(self, key: ApiKey) -> _Open:
        async def draw(lease_id: str, needed: Amounts) -> Grant | Refusal:
            try:
                async with asyncio.timeout(_STORE_TIMEOUT_S):
                    return await self._draw(key.key_id, lease_id, needed)
            except (StoreError, TimeoutError) as error:
                logger.warning("nothing is drawn for %s: %r", key.key_id, error)
                raise QuotaUnknown(
                    "the store cannot say what the limits of this API key leave; try again later"
                ) from error

        purse = Purse(f"lease_{uuid.uuid4().hex}", draw, _SAFE_S)
        held = _Open(purse, key.key_id, key.limited_unix_s)
        self._current[key.key_id] = held
        self._opened.append(held)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._keep(), name="purses")
        return held

    async def _draw(self, key_id: str, lease_id: str, needed: Amounts) -> Grant | Refusal:
        """Draw; again where the store gave up, as it does where writers wait for one another."""
        for _ in range(_DRAW_TRIES - 1):
            try:
                return await draw_lease(self._store, key_id, lease_id, needed, self._lease_s)
            except StoreError as error:
                if not is_transient(error):
                    raise
        return await draw_lease(self._store, key_id, lease_id, needed, self._lease_s)

    async def _keep(self) -> None:
        """Renew leases, and give back what is not used, while there are any."""
        while self._opened:
            await asyncio.sleep(self._idle_s / 4)
            now_s = time.monotonic()
            for held in list(self._opened):
                is_last = self._current.get(held.key_id) is held
                if not held.purse.users and (
                    not is_last or now_s > held.purse.used_s + self._idle_s
                ):
                    await self._give_back(held)
            await self._renew()

    async def _renew(self) -> None:
        now_s = time.time()
        due = {
            held.purse.lease_id: held.purse
            for held in self._opened
            if 0 < held.purse.renewed_s < now_s - _RENEW_S
        }
        if not due:
            return
        try:
            async with asyncio.timeout(_STORE_TIMEOUT_S):
                renewed = await renew_leases(self._store, due, self._lease_s)
        except (StoreError, TimeoutError) as error:
            logger.warning("leases of API keys are not renewed: %r", error)
            return
        for lease_id in renewed:
            due[lease_id].renewed_s = now_s

    async def _give_back(self, held: _Open) -> None:
        """End a purse, once all that was paid from it is written; tried again if that fails."""
        if self._current.get(held.key_id) is held:
            del self._current[held.key_id]  # from now on a request opens another one
        try:
            if held.purse.renewed_s:
                if not await self._outcomes.flush(_SETTLE_TIMEOUT_S):
                    return
                async with asyncio.timeout(_STORE_TIMEOUT_S):
                    await give_back_lease(self._store, held.purse.lease_id)
        except (StoreError, TimeoutError) as error:
            logger.warning("the lease of %s is not given back: %r", held.key_id, error)
            return
        self._opened.remove(held)
