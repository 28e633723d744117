"""Texts that wait share a batch.

Batching waits for nobody: while one batch runs, the texts that arrive form the next one. A lone
text goes at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from serve_app.embedder.encoder import TokenIds

logger = logging.getLogger(__name__)

_Waiting = tuple[TokenIds, asyncio.Future[NDArray[np.float32]], bool]
"""Ids, who waits, and whether the text has a batch of its own."""


class MicroBatcher:
    """Collects token ids from many coroutines and encodes them together in one worker thread.

    Invariants:
        - At most one batch runs at a time; what waits is taken in the order of arrival.
        - A caller that went away is dropped before its batch starts.
        - A batch that fails is run again text by text, so a text fails only by itself.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[TokenIds]], NDArray[np.float32]],
        *,
        max_batch_size: int,
        batch_wait_timeout_s: float = 0.0,
    ) -> None:
        """Keep the settings; nothing runs until the first `submit`.

        Args:
            encode: Blocking; token ids of a batch to (batch, dim).
            max_batch_size: Texts in one batch at most.
            batch_wait_timeout_s: Time a batch that is not full waits for more; 0 sends it at once.
        """
        self._encode = encode
        self._max_batch_size = max_batch_size
        self._batch_wait_timeout_s = batch_wait_timeout_s
        self._waiting: deque[_Waiting] = deque()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoder")
        self._drain: asyncio.Task[None] | None = None

    async def submit(self, token_ids: TokenIds, *, alone: bool = False) -> NDArray[np.float32]:
        """Encode one text; (dim,).

        Args:
            token_ids: The text.
            alone: Whether in a batch of its own: the last bits depend on what shares the batch.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[NDArray[np.float32]] = loop.create_future()
        self._waiting.append((token_ids, future, alone))
        if self._drain is None or self._drain.done():
            self._drain = loop.create_task(self._run_batches())
        return await future

    async def _run_batches(self) -> None:
        while self._waiting:
            if self._batch_wait_timeout_s and len(self._waiting) < self._max_batch_size:
                await asyncio.sleep(self._batch_wait_timeout_s)
            batch: list[_Waiting] = []
            while self._waiting and len(batch) < self._max_batch_size:
                if batch and (self._waiting[0][2] or batch[-1][2]):
                    break
                entry = self._waiting.popleft()
                if not entry[1].done():
                    batch.append(entry)
            if not batch:
                continue
            try:
                await self._run(batch)
            except Exception:
                if len(batch) > 1:
                    logger.exception(
                        "a batch of %d texts failed; running them one by one", len(batch)
                    )
                for entry in batch:
                    await self._run_alone(entry)

    async def _run_alone(self, entry: _Waiting) -> None:
        try:
            await self._run([entry])
        except Exception as error:
            if not entry[1].done():
                entry[1].set_exception(error)

    async def _run(self, batch: list[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        vectors = await loop.run_in_executor(
            self._worker, self._encode, [token_ids for token_ids, _, _ in batch]
        )
        for vector, (_, future, _) in zip(vectors, batch, strict=True):
            if not future.done():
                future.set_result(vector)
