"""Who calls: a bearer key in, its owner's id out."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Literal

from serve_app.errors import Forbidden, Unauthorized
from serve_app.store.database import Store
from serve_app.store.keys import ApiKey, Scope, find_key, hash_key

LOCAL_OWNER = "local"
"""Owner of everything where no key is asked for."""

_BEARER = re.compile(rb"bearer +(atlas_[A-Za-z0-9_-]{43})", re.IGNORECASE)
_MAX_UNKNOWN = 1024


class Authenticator:
    """Looks keys up in the store, and remembers the answer for a moment.

    Invariants:
        - A revoked key stops working within `ttl_s`.
        - Unknown keys, however many are tried, take bounded memory and push no known key out.
    """

    def __init__(
        self,
        mode: Literal["open", "required"],
        store: Store,
        *,
        ttl_s: float = 3.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make one.

        Args:
            mode: `open` lets everyone do everything as `local`; `required` asks for a key.
            store: Where the keys are.
            ttl_s: Seconds an answer of the store is used for.
            clock: Seconds, monotonic.
        """
        self._mode = mode
        self._store = store
        self._ttl_s = ttl_s
        self._clock = clock
        self._known: dict[str, tuple[float, ApiKey]] = {}
        self._unknown: dict[str, float] = {}

    async def owner(self, authorization: bytes | None, scope: Scope) -> str:
        """The id of the calling key.

        Args:
            authorization: The header's value; `None` where there is none.
            scope: What the call needs.

        Raises:
            Unauthorized: If there is no key, or it is unknown or revoked.
            Forbidden: If it lacks the scope.
            StoreError: If the store is away.
        """
        if self._mode == "open":
            return LOCAL_OWNER
        if authorization is None:
            raise Unauthorized("send your API key as 'authorization: Bearer atlas_…'")
        match = _BEARER.fullmatch(authorization.strip())
        key = None if match is None else await self._find(match.group(1).decode("ascii"))
        if key is None:
            raise Unauthorized("the API key is not known here, or was revoked")
        if scope not in key.scopes:
            raise Forbidden(f"this API key lacks the scope {scope.value!r}")
        return key.key_id

    async def _find(self, key: str) -> ApiKey | None:
        key_hash = hash_key(key)
        now = self._clock()
        remembered = self._known.get(key_hash)
        if remembered is not None and now < remembered[0]:
            return remembered[1]
        if now < self._unknown.get(key_hash, now):
            return None
        found = await find_key(self._store, key_hash)
        if found is not None:
            self._unknown.pop(key_hash, None)
            self._known[key_hash] = (now + self._ttl_s, found)
        else:
            self._known.pop(key_hash, None)
            self._unknown.pop(key_hash, None)
            self._unknown[key_hash] = now + self._ttl_s
            if len(self._unknown) > _MAX_UNKNOWN:
                del self._unknown[next(iter(self._unknown))]
        return found
