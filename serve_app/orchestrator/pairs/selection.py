"""Which functions of a tool a model is offered: where there are many, those that fit the query.

Functions are ranked by their words (BM25) and by their meaning (cosine similarity of embeddings),
and the two ranks are fused by reciprocal rank. Without the embedder, or without the time for it,
the words alone decide.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from serve_app.budget import Deadline
from serve_app.errors import AtlasError
from serve_app.tools.base import Function
from serve_app.tools.builtin.corpus import words

logger = logging.getLogger(__name__)

Vectors = NDArray[np.float32]
Embed = Callable[[list[str], Deadline], Awaitable[Vectors]]
"""(num_texts, dim) unit vectors of texts."""

_RRF_K = 5
"""Reciprocal rank fusion (Cormack et al., 2009): rank r adds 1 / (k + r). The usual 60 is for lists
of a thousand: among tens of functions it makes all ranks nearly the same."""
_WORDS_WEIGHT = 0.25
"""Of the rank by words, against 1 for the rank by meaning. On 64 functions with a query each, the
right one was among the first 4 for 63 queries with this weight, 59 with weight 1 (57 with k = 60),
and 48 by words alone."""
_K1, _B = 1.5, 0.75
"""BM25's usual constants."""
_QUERY_CHARS = 2000
_DESCRIPTOR_CHARS = 1000
_WAIT_S = 1.0
"""How long a request waits for embeddings before words alone decide."""
_BATCH = 16
"""Functions embedded at once: what others embed meanwhile comes in between."""
_EMBED_WITHIN_S = 60.0
"""For all functions of a tool, in the background."""
_WORD_BORDER = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[_\W]+")


def descriptor(function: Function) -> str:
    """What a function is compared by: the words of its name, and its description."""
    name = " ".join(part for part in _WORD_BORDER.split(function.name) if part)
    return f"{name}: {function.description}"[:_DESCRIPTOR_CHARS]


class WordIndex:
    """BM25 over the functions of one tool (Robertson and Zaragoza, 2009, equation 3.15).

    The library that retrieval uses loads a compiler, for seconds, which a gateway should not.
    """

    def __init__(self, texts: list[str]) -> None:
        """Count the words of at least one text."""
        self._size = len(texts)
        counts = [Counter(words(text)) for text in texts]
        lengths = np.array([max(1, count.total()) for count in counts], np.float64)
        norms = _K1 * (1 - _B + _B * lengths / lengths.mean())
        having: dict[str, list[int]] = {}
        for place, count in enumerate(counts):
            for word in count:
                having.setdefault(word, []).append(place)
        self._weights: dict[str, tuple[list[int], NDArray[np.float64]]] = {}
        """By word: the texts that have it, and what it adds to the score of each."""
        for word, places in having.items():
            times = np.array([counts[place][word] for place in places], np.float64)
            rarity = np.log1p((len(texts) - len(places) + 0.5) / (len(places) + 0.5))
            self._weights[word] = places, rarity * times * (_K1 + 1) / (times + norms[places])

    def scores(self, query: str) -> NDArray[np.float64]:
        """(num_texts,) how well each fits; 0: it has no word of the query."""
        scores = np.zeros(self._size)
        for word in set(words(query)):
            if word in self._weights:
                places, weights = self._weights[word]
                scores[places] += weights
        return scores


@dataclass
class _Known:
    """The functions of one tool, indexed."""

    functions: tuple[Function, ...]
    by_words: WordIndex = field(init=False)
    embedding: asyncio.Task[Vectors | None] | None = None
    """Of the descriptors; gives `None` where the embedder failed."""

    def __post_init__(self) -> None:
        self.by_words = WordIndex([descriptor(function) for function in self.functions])


class FunctionSelector:
    """Selects functions; one per gateway replica. Knows the newest functions of each tool."""

    def __init__(self, embed: Embed | None) -> None:
        """Know no function yet.

        Args:
            embed: The deployment's encoder; `None`: words alone decide.
        """
        self._embed = embed
        self._known: dict[str, _Known] = {}

    async def select(
        self,
        tool_id: str,
        functions: tuple[Function, ...],
        top_k: int,
        query: str,
        deadline: Deadline,
        embedding: Vectors | None = None,
    ) -> tuple[Function, ...]:
        """The functions that fit a query.

        Args:
            tool_id: The tool.
            functions: All of its functions.
            top_k: How many are offered.
            query: What the caller wants.
            deadline: Of the request.
            embedding: (dim,) of the query, where it is known.

        Returns:
            At most `top_k`, best first; all of them, in their order, where they are no more.
        """
        if len(functions) <= top_k:
            return functions
        known = self._known.get(tool_id)
        if known is None or known.functions != functions:
            known = self._known[tool_id] = _Known(functions)
        query = query[:_QUERY_CHARS]
        by_words = known.by_words.scores(query)
        fused = np.where(by_words > 0, _WORDS_WEIGHT / (_RRF_K + _ranks(by_words)), 0.0)
        near = await self._similarity(tool_id, known, query, embedding, deadline)
        if near is not None:
            fused += 1 / (_RRF_K + _ranks(near))
        return tuple(functions[place] for place in np.argsort(-fused, kind="stable")[:top_k])

    async def _similarity(
        self,
        tool_id: str,
        known: _Known,
        query: str,
        embedding: Vectors | None,
        deadline: Deadline,
    ) -> Vectors | None:
        """(num_functions,) cosine similarities to the query; `None`: not to be had in time."""
        if self._embed is None:
            return None
        try:
            soon = deadline.sooner(_WAIT_S)
            async with asyncio.timeout(soon.remaining_s()):
                if embedding is None:
                    embedding = (await self._embed([query], soon))[0]
                vectors = await asyncio.shield(self._vectors(known, self._embed))
        except (AtlasError, TimeoutError) as error:
            logger.warning("tool %s: selected by words alone: %s", tool_id, type(error).__name__)
            return None
        return None if vectors is None else vectors @ embedding

    @staticmethod
    def _vectors(known: _Known, embed: Embed) -> asyncio.Task[Vectors | None]:
        """The embeddings of the descriptors, once for all requests; anew where that failed."""
        task = known.embedding
        if task is None or (task.done() and (task.cancelled() or task.result() is None)):
            texts = [descriptor(function) for function in known.functions]
            task = known.embedding = asyncio.create_task(_embedded(texts, embed))
        return task


async def _embedded(texts: list[str], embed: Embed) -> Vectors | None:
    """(len(texts), dim) vectors; `None`: the embedder failed."""
    deadline = Deadline.after(_EMBED_WITHIN_S)
    try:
        batches = [
            await embed(texts[start : start + _BATCH], deadline)
            for start in range(0, len(texts), _BATCH)
        ]
    except AtlasError as error:
        logger.warning("functions are not embedded: %s", error.message)
        return None
    return np.concatenate(batches)


def _ranks(scores: NDArray[np.float64] | Vectors) -> NDArray[np.intp]:
    """(num_scores,) the rank of each, the highest 1; equal ones by their place."""
    ranks = np.empty(len(scores), np.intp)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    return ranks
