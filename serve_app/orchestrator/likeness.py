"""How like texts are to a question: by their words (BM25) and by their meaning (embeddings)."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serve_app.budget import Deadline
from serve_app.errors import AtlasError
from serve_app.orchestrator.pairs.selection import Embed, Vectors, WordIndex

logger = logging.getLogger(__name__)

_TEXT_CHARS = 1000
"""Of a text, that is embedded."""
_MAX_EMBEDDED = 128
"""Texts that are embedded for one question: the most like by words, and the newest."""
_BATCH = 16
"""Texts embedded at once: what others embed meanwhile comes in between."""
_WAIT_S = 1.0
"""How long a request waits for embeddings before words alone decide."""
_MAX_KEPT = 4096
"""Vectors that are kept; of a conversation only what is new is embedded."""
_MAX_SENTENCE_CHARS = 400
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")

Floats = NDArray[np.float64]


def sentences(text: str) -> list[str]:
    """The sentences of a text, long ones cut."""
    found = [part.strip()[:_MAX_SENTENCE_CHARS] for part in _SENTENCE_END.split(text)]
    return [part for part in found if part]


class TextLikeness:
    """Compares texts with questions; one per gateway replica."""

    def __init__(self, embed: Embed | None) -> None:
        """Know no vector yet.

        Args:
            embed: The deployment's encoder; `None`: words alone decide.
        """
        self._embed = embed
        self._vectors: OrderedDict[bytes, Vectors] = OrderedDict()

    @staticmethod
    def by_words(question: str, texts: Sequence[str]) -> Floats:
        """(num_texts,) in [0, 1]; 1 the most like one, 0 without a word of the question."""
        if not texts:
            return np.zeros(0)
        scores = WordIndex(list(texts)).scores(question)
        return scores / max(float(scores.max()), 1e-9)

    async def scores(self, question: str, texts: Sequence[str], deadline: Deadline) -> Floats:
        """(num_texts,) the likeness by words, plus the cosine similarity where it is to be had.

        Args:
            question: What the texts are compared with.
            texts: In the order in which they were said.
            deadline: Of the request.
        """
        scores = await asyncio.to_thread(self.by_words, question, texts)
        if self._embed is None or not texts:
            return scores
        newest = np.arange(len(texts)) / len(texts)
        asked = np.argsort(-(scores + 0.5 * newest), kind="stable")[:_MAX_EMBEDDED]
        try:
            soon = deadline.sooner(_WAIT_S)
            async with asyncio.timeout(soon.remaining_s()):
                vectors = await self._embedded([question, *(texts[n] for n in asked)], soon)
        except (AtlasError, TimeoutError) as error:
            logger.warning("turns are compared by words alone: %s", type(error).__name__)
            return scores
        scores[asked] += vectors[1:] @ vectors[0]
        return scores

    async def _embedded(self, texts: Sequence[str], deadline: Deadline) -> Vectors:
        """(num_texts, dim) unit vectors, those of texts that were seen before from memory."""
        assert self._embed is not None
        short = [text[-_TEXT_CHARS:] or "." for text in texts]
        keys = [
            hashlib.blake2b(t.encode("utf-8", "replace"), digest_size=16).digest() for t in short
        ]
        found = {key: self._vectors[key] for key in keys if key in self._vectors}
        new = {key: text for key, text in zip(keys, short, strict=True) if key not in found}
        for start in range(0, len(new), _BATCH):
            part = list(new)[start : start + _BATCH]
            found |= zip(part, await self._embed([new[key] for key in part], deadline), strict=True)
            self._vectors |= {key: found[key] for key in part}
        while len(self._vectors) > _MAX_KEPT:
            self._vectors.popitem(last=False)
        return np.stack([found[key] for key in keys])
