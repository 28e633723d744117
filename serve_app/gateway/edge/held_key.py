"""An idempotency key that this gateway holds while it works on the key's request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from serve_app.config import IdempotencyConfig
from serve_app.errors import EffectRefused, StoreError
from serve_app.store import (
    Claim,
    KeptAnswer,
    Store,
    begin_effect,
    give_up_claim,
    keep_answer,
    renew_claim,
)

logger = logging.getLogger(__name__)

_RENEWALS_PER_LEASE = 3
_settling: set[asyncio.Task[None]] = set()
"""Last writes about keys that nobody waits for any more; the event loop itself holds no task."""


class HeldKey:
    """Renews the claim on a key until the request has ended, and puts on record how it ended.

    Invariants:
        - `begin_effect` returns only while the key is held, and not before the record is durable.
        - Once the request has ended, no effect begins under it.
        - A request that may have acted never frees its key.
    """

    def __init__(
        self,
        store: Store,
        claim: Claim,
        settings: IdempotencyConfig,
        patience_s: Callable[[], float],
    ) -> None:
        """Hold a key that was claimed just now; must be called in a running event loop.

        Args:
            store: Where the claim is.
            claim: The claim.
            settings: Of keys.
            patience_s: Seconds that the answer may wait for the last write.
        """
        self._store = store
        self._claim = claim
        self._settings = settings
        self._patience_s = patience_s
        self._recording = asyncio.Lock()
        self.has_acted = False
        """Whether an effect may have happened."""
        self._is_settled = False
        self._renewing = asyncio.get_running_loop().create_task(self._renew())

    async def begin_effect(self) -> None:
        """Put on record that something begins that must not happen twice.

        Raises:
            EffectRefused: If that cannot be done, or the key is held no more: it must not begin.
        """
        async with self._recording:
            if self.has_acted and not self._is_settled:
                return
            try:
                is_held = await begin_effect(self._store, self._claim, self._settings.lease_s)
            except StoreError as error:
                raise EffectRefused(
                    "the store is not available, so nothing was begun; try again later"
                ) from error
            if self._is_settled or not is_held:
                raise EffectRefused(
                    "the request has ended here, or another gateway has taken its Idempotency-Key; "
                    "nothing was begun"
                )
            self.has_acted = True

    async def keep(self, status: int, headers: Iterable[tuple[str, str]], body: bytes) -> None:
        """End with an answer that later tries get; a body that is too large is left out.

        Args:
            status: Of the answer.
            headers: Those that the answer's meaning needs.
            body: The whole of it.
        """
        kept = body if len(body) <= self._settings.max_answer_bytes else None
        answer = KeptAnswer(status, tuple(headers), kept)
        await self._settle(lambda: keep_answer(self._store, self._claim, answer))

    async def give_up(self, *, did_nothing: bool = False) -> None:
        """End without an answer to keep, where there was none before.

        Args:
            did_nothing: Whether the request was refused before it did anything, whatever was put
                on record.
        """

        async def write() -> None:
            has_acted = self.has_acted and not did_nothing
            await give_up_claim(self._store, self._claim, has_acted=has_acted)

        await self._settle(write)

    async def _settle(self, write: Callable[[], Awaitable[object]]) -> None:
        """The last write; goes on by itself where it takes longer than the answer may wait."""
        if self._is_settled:
            return
        self._is_settled = True
        self._renewing.cancel()
        task = asyncio.get_running_loop().create_task(self._write(write))
        _settling.add(task)
        task.add_done_callback(_settling.discard)
        await asyncio.wait({task}, timeout=max(0.0, self._patience_s()))

    async def _write(self, write: Callable[[], Awaitable[object]]) -> None:
        try:
            async with self._recording:  # an effect that is being recorded counts
                await write()
        except StoreError as error:
            # What was begun is on record; the key is free, or its outcome unknown, after its lease.
            logger.warning("%s: its end is not on record: %r", self._claim.claim_id, error)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._settings.lease_s / _RENEWALS_PER_LEASE)
            try:
                if not await renew_claim(self._store, self._claim, self._settings.lease_s):
                    return
            except StoreError as error:
                logger.warning("%s: its key is not renewed: %r", self._claim.claim_id, error)
