"""Who calls: a bearer key or a browser's session in, what is known of the key out."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from serve_app.errors import Forbidden, RateLimited, StoreError, Unauthorized
from serve_app.schemas import LOCAL_OWNER
from serve_app.store.database import Store
from serve_app.store.keys import ApiKey, Scope, find_key, hash_key

logger = logging.getLogger(__name__)

EVERYBODY = ApiKey(LOCAL_OWNER, LOCAL_OWNER, frozenset(Scope), 0.0)
"""Stands for a key where none is asked for."""

_BEARER = re.compile(rb"bearer +(atlas_[A-Za-z0-9_-]{43})", re.IGNORECASE)
_MAX_UNKNOWN = 1024
_LOOKUP_TIMEOUT_S = 2.0
_MAX_LOOKUPS = 2
"""Unknown keys that the store is asked for at once; fewer than its connections."""
_MAX_WAITING = 64
"""Requests with unknown keys that wait for their turn."""


@dataclass(slots=True)
class _Known:
    """A key as the store last had it."""

    key: ApiKey
    asked_s: float
    """When the store said so, on the authenticator's clock."""


class Authenticator:
    """Looks keys up in the store, and remembers the answer for a moment.

    Invariants:
        - A revoked key stops working within `ttl_s`; while the store cannot be asked, within
          `grace_s` of the last time that it said the key is good.
        - Only requests that find the store away wait for it, 2 s at most: later ones are answered
          from what is remembered, while it is asked again beside them.
        - Unknown keys, however many are tried, take bounded memory and push no known key out. The
          store is asked for two of them at once, and 64 requests wait; more are refused. Requests
          with known keys do not wait for them.
    """

    def __init__(
        self,
        mode: Literal["open", "required"],
        store: Store,
        *,
        ttl_s: float = 3.0,
        grace_s: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make one.

        Args:
            mode: `open` lets everyone do everything as `local`; `required` asks for a key.
            store: Where the keys are.
            ttl_s: Seconds an answer of the store is used for.
            grace_s: Seconds a good key is taken for while the store is away.
            clock: Seconds, monotonic.
        """
        self._mode = mode
        self._store = store
        self._ttl_s = ttl_s
        self._clock = clock
        self._grace_s = grace_s
        self._known: dict[str, _Known] = {}
        self._unknown: dict[str, float] = {}
        """Hash to when it is asked for again."""
        self._is_away = False
        self._away_until_s = clock()
        """Until then nobody waits for the store: it was away a moment ago."""
        self._asking: asyncio.Task[None] | None = None
        self._lookups = asyncio.Semaphore(_MAX_LOOKUPS)
        self._waiting = 0

    async def caller(
        self, authorization: bytes | None, scope: Scope, session: str | None = None
    ) -> ApiKey:
        """The calling key.

        Args:
            authorization: The header's value; `None` where there is none.
            scope: What the call needs.
            session: Token of a browser's session, which counts where there is no `authorization`.

        Raises:
            Unauthorized: If there is no key, or it is unknown or revoked.
            Forbidden: If it lacks the scope.
            RateLimited: If it is unknown, and too many unknown keys are being looked up.
            StoreError: If the store is away.
        """
        if self._mode == "open":
            return EVERYBODY
        if authorization is not None:
            match = _BEARER.fullmatch(authorization.strip())
            key = None if match is None else await self._find(match.group(1).decode("ascii"))
            if key is None:
                raise Unauthorized("the API key is not known here, or was revoked")
        elif session is not None:
            key = await self._find(session)
            if key is None:
                raise Unauthorized("the session has ended, or its API key was revoked")
        else:
            raise Unauthorized("send your API key as 'authorization: Bearer atlas_…'")
        if scope not in key.scopes:
            raise Forbidden(f"this API key lacks the scope {scope.value!r}")
        return key

    async def _find(self, key: str) -> ApiKey | None:
        key_hash = hash_key(key)
        if self._is_remembered(key_hash) or key_hash in self._known:
            return await self._current(key_hash)
        async with self._turn():
            return await self._current(key_hash)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Wait until an unknown key may be looked up.

        Raises:
            RateLimited: If too many wait already, or its turn does not come in time.
        """
        busy = "too many unknown API keys are being looked up; try again"
        if self._waiting >= _MAX_WAITING:
            raise RateLimited(busy)
        self._waiting += 1
        try:
            async with asyncio.timeout(_LOOKUP_TIMEOUT_S):
                await self._lookups.acquire()
        except TimeoutError:
            raise RateLimited(busy) from None
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._lookups.release()

    def _is_remembered(self, key_hash: str) -> bool:
        """Whether the store need not be asked about a key now."""
        now_s = self._clock()
        known = self._known.get(key_hash)
        is_fresh = known is not None and now_s < known.asked_s + self._ttl_s
        return is_fresh or now_s < self._unknown.get(key_hash, now_s)

    async def _current(self, key_hash: str) -> ApiKey | None:
        """A key as it is now: as remembered, or as the store says."""
        known = self._known.get(key_hash)
        if self._is_remembered(key_hash):
            return None if known is None else known.key
        now_s = self._clock()
        if now_s >= self._away_until_s:
            try:
                return await self._ask(key_hash)
            except StoreError:
                if known is None:
                    raise
        elif self._asking is None:
            self._asking = asyncio.get_running_loop().create_task(self._ask_beside(key_hash))
        if known is None or now_s >= known.asked_s + self._grace_s:
            raise StoreError("the store is not available; try again later")
        return known.key

    async def _ask_beside(self, key_hash: str) -> None:
        """See whether the store is back, while nobody waits for it."""
        try:
            await self._ask(key_hash)
        except StoreError:
            return
        finally:
            self._asking = None

    async def _ask(self, key_hash: str) -> ApiKey | None:
        """What the store says of a key, remembered.

        Raises:
            StoreError: If it is away.
        """
        now_s = self._clock()
        try:
            async with asyncio.timeout(_LOOKUP_TIMEOUT_S):
                found = await find_key(self._store, key_hash)
        except (StoreError, TimeoutError) as error:
            if not self._is_away:
                logger.warning("keys cannot be looked up (%r); those known go on", error)
            self._is_away = True
            self._away_until_s = self._clock() + self._ttl_s
            raise StoreError("the store is not available; try again later") from error
        self._is_away = False
        self._away_until_s = now_s
        self._unknown.pop(key_hash, None)
        if found is not None:
            self._known[key_hash] = _Known(found, now_s)
        else:
            self._known.pop(key_hash, None)
            self._unknown[key_hash] = now_s + self._ttl_s
            if len(self._unknown) > _MAX_UNKNOWN:
                del self._unknown[next(iter(self._unknown))]
        return found
