"""The encoder and its batching as a Serve deployment."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serve_app.config import AtlasConfig
from serve_app.embedder.batcher import MicroBatcher
from serve_app.embedder.encoder import TextEncoder
from serve_app.embedder.lasting import LastingVectors


class Embedder:
    """Query encoder as a Serve deployment; every replica holds the whole model."""

    def __init__(self, config: AtlasConfig) -> None:
        """Load the model; built graphs and lasting vectors are kept under the data folder."""
        cache = config.data_path() / "cache"
        self._encoder = TextEncoder(config.embedder, cache)
        first = self._encoder.encode(["the first run of a shape is slower"])
        self._lasting = LastingVectors(
            cache / f"vectors-{_encoder_key(first, config.embedder.max_tokens)}.npz",
            self._encoder.dim,
        )
        self._batcher = MicroBatcher(
            self._encoder.encode_tokens,
            max_batch_size=config.embedder.max_batch_size,
            batch_wait_timeout_s=config.embedder.batch_wait_timeout_s,
        )

    async def embed(self, texts: Sequence[str], alone: bool = False) -> NDArray[np.float32]:
        """Vectors (batch, dim) of texts, L2-normalised, in their order; long text is cut.

        Args:
            texts: The texts.
            alone: Whether each has a batch of its own, and so the same vector to the last bit.

        Raises:
            InvalidRequest: If one of them is no valid text.
        """
        token_ids = [self._encoder.tokenize(text) for text in texts]
        if not token_ids:
            return np.empty((0, self._encoder.dim), np.float32)
        works = [self._batcher.submit(ids, alone=alone) for ids in token_ids]
        return np.stack(await asyncio.gather(*works))

    async def embed_lasting(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """As `embed`, for texts of the configuration: a later start reads their vectors from disk.

        Raises:
            InvalidRequest: If one of them is no valid text.
        """
        if missing := self._lasting.missing(texts):
            self._lasting.add(missing, await self.embed(missing))
        return self._lasting.of(texts)


def _encoder_key(vector: NDArray[np.float32], max_tokens: int) -> str:
    """Names an encoder by what it makes of a text, and by where it cuts one."""
    return hashlib.blake2b(vector.tobytes() + str(max_tokens).encode(), digest_size=8).hexdigest()
