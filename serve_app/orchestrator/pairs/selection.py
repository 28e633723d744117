"""Which functions of a tool a model is offered: where there are many, those that fit the query.

A function is known by its descriptor (name and description) and by phrases, which say how users ask
for it. Its score is the sum of three parts, each standardised over the functions: what a linear map
that is fitted to the embeddings of all these texts gives for the query, the cosine similarity to
the descriptor, and the words in common (BM25). Without the embedder, or without the time for it,
the words alone decide.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from serve_app.budget import Deadline
from serve_app.errors import AtlasError
from serve_app.orchestrator.pairs.reading import as_read
from serve_app.tools.base import Function
from serve_app.tools.builtin.corpus import words

logger = logging.getLogger(__name__)

Vectors = NDArray[np.float32]
Embed = Callable[[list[str], Deadline], Awaitable[Vectors]]
"""(num_texts, dim) unit vectors of texts."""

_RIDGE = 0.5
_NEAR_WEIGHT = 0.8
_WORDS_WEIGHT = 0.8
"""Of the similarity and of the words, against 1 for the fitted map. These three numbers were chosen
on 50 queries and on 600 phrases, each left out in turn; see `benchmarks/README.md`, `tools`."""
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
_NO_PHRASES: Mapping[str, Sequence[str]] = {}
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


@dataclass(frozen=True)
class _Meaning:
    """What the embeddings of a tool's functions tell of a query."""

    descriptors: Vectors
    """(num_functions, dim) unit vectors."""
    mean: Vectors
    """(dim,) of all texts."""
    weights: Vectors
    """(dim, num_functions) the map."""

    def scores(self, query: Vectors) -> Vectors:
        """(num_functions,) how well each fits an embedded query."""
        fitted = _standard((query - self.mean) @ self.weights)
        return fitted + _NEAR_WEIGHT * _standard(self.descriptors @ query)


def _fit(vectors: Vectors, owners: NDArray[np.intp]) -> _Meaning:
    """Ridge regression from a text to the function that it belongs to.

    W = (X'X + k I)^-1 X'Y, where X are the centred vectors, and Y is 1 for a text's function.

    Args:
        vectors: (num_texts, dim) of the descriptors, in order, then of the phrases.
        owners: (num_texts,) the place of each text's function.
    """
    num_functions = int(owners.max()) + 1
    mean = vectors.mean(axis=0)
    centred = vectors - mean
    belongs = np.eye(num_functions, dtype=np.float32)[owners] - 1 / num_functions
    square = centred.T @ centred + _RIDGE * np.eye(vectors.shape[1], dtype=np.float32)
    weights = np.linalg.solve(square, centred.T @ belongs)
    return _Meaning(vectors[:num_functions], mean, weights)


@dataclass
class _Known:
    """The functions of one tool, indexed."""

    functions: tuple[Function, ...]
    phrases: Mapping[str, Sequence[str]]
    texts: list[str] = field(init=False)
    """The descriptors, in order, then the phrases."""
    owners: NDArray[np.intp] = field(init=False)
    """Of each text, the place of its function."""
    by_words: WordIndex = field(init=False)
    meaning: asyncio.Task[_Meaning | None] | None = None
    """Gives `None` where the embedder failed."""

    def __post_init__(self) -> None:
        described = [descriptor(function) for function in self.functions]
        asked = [
            [as_read(phrase) for phrase in self.phrases.get(function.name, ())]
            for function in self.functions
        ]
        self.texts = described + [phrase for phrases in asked for phrase in phrases]
        places = np.arange(len(described))
        self.owners = np.concatenate([places, np.repeat(places, [len(p) for p in asked])])
        self.by_words = WordIndex(
            [" ".join((text, *phrases)) for text, phrases in zip(described, asked, strict=True)]
        )


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
        phrases: Mapping[str, Sequence[str]] = _NO_PHRASES,
    ) -> tuple[Function, ...]:
        """The functions that fit a query.

        Args:
            tool_id: The tool.
            functions: All of its functions.
            top_k: How many are offered.
            query: What the caller wants.
            deadline: Of the request.
            embedding: (dim,) of the query, where it is known.
            phrases: How users ask for a function, by its name.

        Returns:
            At most `top_k`, best first; all of them, in their order, where they are no more.
        """
        if len(functions) <= top_k:
            return functions
        known = self._known.get(tool_id)
        if known is None or known.functions != functions or known.phrases != phrases:
            known = self._known[tool_id] = _Known(functions, phrases)
        query = query[:_QUERY_CHARS]
        read = as_read(query)
        scores = known.by_words.scores(read)
        # The embedding that is there is of the query as it came.
        there = embedding if read == query else None
        meant = await self._meant(tool_id, known, read, there, deadline)
        if meant is not None:
            scores = meant + _WORDS_WEIGHT * _standard(scores)
        return tuple(functions[place] for place in np.argsort(-scores, kind="stable")[:top_k])

    async def _meant(
        self,
        tool_id: str,
        known: _Known,
        query: str,
        embedding: Vectors | None,
        deadline: Deadline,
    ) -> Vectors | None:
        """(num_functions,) how well each fits by its meaning; `None`: not to be had in time."""
        if self._embed is None:
            return None
        try:
            soon = deadline.sooner(_WAIT_S)
            async with asyncio.timeout(soon.remaining_s()):
                if embedding is None:
                    embedding = (await self._embed([query], soon))[0]
                meaning = await asyncio.shield(self._meaning(known, self._embed))
        except (AtlasError, TimeoutError) as error:
            logger.warning("tool %s: selected by words alone: %s", tool_id, type(error).__name__)
            return None
        return None if meaning is None else meaning.scores(embedding)

    @staticmethod
    def _meaning(known: _Known, embed: Embed) -> asyncio.Task[_Meaning | None]:
        """What the texts mean, once for all requests; anew where that failed."""
        task = known.meaning
        if task is None or (task.done() and (task.cancelled() or task.result() is None)):
            task = known.meaning = asyncio.create_task(_embedded(known, embed))
        return task


async def _embedded(known: _Known, embed: Embed) -> _Meaning | None:
    """What the texts of a tool's functions mean; `None`: the embedder failed."""
    deadline = Deadline.after(_EMBED_WITHIN_S)
    texts = known.texts
    try:
        batches = [
            await embed(texts[start : start + _BATCH], deadline)
            for start in range(0, len(texts), _BATCH)
        ]
    except AtlasError as error:
        logger.warning("functions are not embedded: %s", error.message)
        return None
    return await asyncio.to_thread(_fit, np.concatenate(batches), known.owners)


def _standard(scores: NDArray[np.floating]) -> NDArray[np.float32]:
    """(num_scores,) with mean 0 and deviation 1; all 0 where they are alike."""
    centred = np.asarray(scores - scores.mean(), np.float32)
    standard: NDArray[np.float32] = centred / (centred.std() + np.float32(1e-9))
    return standard
