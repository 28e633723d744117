"""Retrieval: sentences of a corpus by BM25 and by embeddings, fused by reciprocal rank.

The index (sentences, embeddings) is built once, kept on disk under a hash of the corpus and the
encoder, and held in the worker process. A cached index that cannot be read, or is not whole, is
built anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from serve_app.config.tools import EncoderConfig, RetrievalConfig
from serve_app.errors import ConfigError, InvalidRequest, ToolFailed, ToolRetry
from serve_app.private_files import make_private_folder
from serve_app.tools.base import Tool, ToolResult
from serve_app.tools.builtin.corpus import Sentence, read_corpus, words

logger = logging.getLogger(__name__)

INDEX_FORMAT = 1
MAX_QUERY_CHARS = 2000
NO_SOURCES = "No sources found."
PROBE = "The quick brown fox jumps over the lazy dog."


def query_line(query: str) -> str:
    """The end of a result: what was looked for, so that it stands next to the model's answer."""
    return f"\nQuery: {query.strip()}"


def with_question(result: str, question: str) -> str:
    """A prompt of a result as context; the question, and so the name asked for, comes last."""
    return f"Sources:\n{result.removesuffix(query_line(question))}\n\nQuestion: {question}"


class Encoder(Protocol):
    """Anything that turns texts into unit vectors."""

    def encode(self, texts: list[str]) -> NDArray[np.float32]:
        """Encode.

        Args:
            texts: Any number of texts.

        Returns:
            (len(texts), dim) float32, each row of length 1.
        """


class SharedEncoder:
    """The encoder that the router's queries use too, on a bounded number of sentences at once."""

    def __init__(self, config: EncoderConfig, cache_dir: Path) -> None:
        """Load the model.

        Args:
            config: Which model, and how.
            cache_dir: Folder of built graphs.

        Raises:
            ConfigError: If there is no such model.
        """
        # Here and not above: with no encoder configured, no network library is needed.
        from serve_app.config import EmbedderConfig
        from serve_app.embedder import TextEncoder

        self._batch_size = config.batch_size
        self._encoder = TextEncoder(
            EmbedderConfig(
                model=config.model, backend=config.backend, num_threads=config.num_threads
            ),
            cache_dir,
        )

    def encode(self, texts: list[str]) -> NDArray[np.float32]:
        """Encode.

        Args:
            texts: Any number of texts.

        Returns:
            (len(texts), dim) float32, each row of length 1.
        """
        size = self._batch_size
        batches = [texts[i : i + size] for i in range(0, len(texts), size)]
        return np.concatenate([self._encoder.encode(batch) for batch in batches])


class Index:
    """A searchable corpus.

    Invariants:
        - `embeddings` is (len(sentences), dim) float32 with rows of length 1, or `None`.
        - The same corpus, encoder and query give the same answer: ties go to the earlier sentence.
    """

    def __init__(
        self,
        sentences: Sequence[Sentence],
        embeddings: NDArray[np.float32] | None,
    ) -> None:
        """Index the sentences' words.

        Args:
            sentences: At least one.
            embeddings: Their vectors, or `None` to rank by words alone.
        """
        import bm25s

        self.sentences = list(sentences)
        self.embeddings = embeddings
        tokens = [words(f"{s.title} {s.text}") for s in self.sentences]
        self._vocabulary = {word for sentence in tokens for word in sentence}
        self._bm25 = bm25s.BM25()
        self._bm25.index(tokens, show_progress=False)

    def search(
        self, query: str, vector: NDArray[np.float32] | None, config: RetrievalConfig
    ) -> list[tuple[Sentence, float, float | None]]:
        """Rank by words and by meaning, and fuse: score = sum of 1 / (rrf_k + rank).

        Args:
            query: What to look for.
            vector: (dim,) the query's embedding, where the index has embeddings.
            config: How many, and the fusion's constants.

        Returns:
            At most `top_k` sentences, best first, with their scores and their cosine similarities
            to the query; `None` without embeddings.
        """
        scores: dict[int, float] = {}
        known = [word for word in dict.fromkeys(words(query)) if word in self._vocabulary]
        if known:
            lexical = np.asarray(self._bm25.get_scores(known), dtype=np.float32)
            for rank, i in enumerate(_best(lexical, config.candidates), start=1):
                if lexical[i] > 0:
                    scores[i] = 1 / (config.rrf_k + rank)
        if vector is not None and self.embeddings is not None:
            similarity = self.embeddings @ vector
            for rank, i in enumerate(_best(similarity, config.candidates), start=1):
                if i in scores or similarity[i] >= config.min_similarity:
                    scores[i] = scores.get(i, 0.0) + 1 / (config.rrf_k + rank)
        order = sorted(scores, key=lambda i: (-scores[i], i))[: config.top_k]
        near = None if vector is None or self.embeddings is None else self.embeddings @ vector
        return [
            (self.sentences[i], scores[i], None if near is None else round(float(near[i]), 6))
            for i in order
        ]


def _best(scores: NDArray[np.float32], count: int) -> list[int]:
    """Positions of the highest scores, best first, ties by position."""
    return [int(i) for i in np.argsort(-scores, kind="stable")[:count]]


def index_key(sentences: Sequence[Sentence], probe: NDArray[np.float32]) -> str:
    """Name of a cached index: changes with any sentence and with what the encoder computes.

    Args:
        sentences: The corpus.
        probe: (1, dim) the encoder's vector of a fixed text; two decimals of it count, so that
            another processor's last digits do not build the index again.

    Returns:
        A hexadecimal hash.
    """
    digest = hashlib.sha256(f"{INDEX_FORMAT}\0".encode())
    digest.update(np.rint(probe * 100).astype(np.int16).tobytes())
    for sentence in sentences:
        digest.update(f"{sentence.source_id}\0{sentence.title}\0{sentence.text}\0".encode())
    return digest.hexdigest()


def cached_embeddings(
    sentences: Sequence[Sentence], encoder: Encoder, file: Path | None
) -> NDArray[np.float32]:
    """The sentences' vectors, from disk if they are there and whole.

    Args:
        sentences: The corpus.
        encoder: What encodes them otherwise.
        file: Where they are kept; `None` keeps nothing.

    Returns:
        (len(sentences), dim) float32, rows of length 1.
    """
    if file is not None and file.exists():
        try:
            with np.load(file, allow_pickle=False) as stored:
                vectors = np.asarray(stored["vectors"], dtype=np.float32)
                whole = hashlib.sha256(vectors.tobytes()).hexdigest() == str(stored["digest"])
            if whole and vectors.ndim == 2 and len(vectors) == len(sentences):
                return vectors
            logger.warning("retrieval: cached index is not whole; building it anew")
        except Exception as error:  # a torn file fails in many ways, all with the same remedy
            logger.warning("retrieval: cached index unreadable (%s)", type(error).__name__)
    vectors = encoder.encode([f"{s.title}: {s.text}" if s.title else s.text for s in sentences])
    if file is not None:
        try:
            _write_whole(file, vectors)
        except OSError as error:
            logger.warning("retrieval: index not cached: %s", error.strerror)
    return vectors


def _write_whole(file: Path, vectors: NDArray[np.float32]) -> None:
    """Write beside the target and rename: a reader sees all of it or nothing."""
    make_private_folder(file.parent)
    descriptor, name = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as out:
            digest = hashlib.sha256(vectors.tobytes()).hexdigest()
            np.savez(out, vectors=vectors, digest=np.array(digest))
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _default_cache_dir() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "atlas-serve"


class Retrieval(Tool):
    """Looks sentences up; the index lives as long as the worker process."""

    config: RetrievalConfig

    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "query": {
                "type": "string",
                "description": "What to look for, in words.",
                "maxLength": MAX_QUERY_CHARS,
            }
        },
        "required": ["query"],
        "additionalProperties": False,
    }

    def __init__(
        self,
        config: RetrievalConfig,
        make_encoder: Callable[[EncoderConfig, Path], Encoder] = SharedEncoder,
    ) -> None:
        """Keep the settings; corpus and encoder are loaded by `warm` or the first call.

        Args:
            config: The tool's settings.
            make_encoder: Builds the encoder from its settings and a cache folder.
        """
        super().__init__(config)
        self._make_encoder = make_encoder
        self._encoder: Encoder | None = None
        self._index: Index | None = None

    def warm(self) -> None:
        """Load the index and the encoder."""
        self._loaded()

    def run(self, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        """Search.

        Args:
            arguments: `query`.
            deadline_s: Unused: a search takes milliseconds, and the runner bounds the loading.

        Returns:
            Lines `[1] sentence` and, where it fits, `query_line`; `data["sources"]` has id, title,
            score, similarity and text of each.

        Raises:
            ToolRetry: If the query has no words.
            ToolFailed: If there is no usable corpus or encoder.
        """
        query = str(arguments["query"]).strip()
        if not words(query):
            raise ToolRetry("the query is empty; say in words what to look for")
        index = self._loaded()
        try:
            vector = self._encoder.encode([query])[0] if self._encoder is not None else None
        except InvalidRequest as error:
            raise ToolRetry("the query is not valid text") from error
        found = index.search(query, vector, self.config)
        if not found:
            return ToolResult(NO_SOURCES, {"sources": []})
        lines = [f"[{i}] {sentence.text}" for i, (sentence, _, _) in enumerate(found, start=1)]
        sources = [
            {
                "id": sentence.source_id,
                "title": sentence.title or sentence.source_id.rpartition("#")[0],
                "score": round(score, 6),
                "similarity": similarity,
                "text": sentence.text,
            }
            for sentence, score, similarity in found
        ]
        text = "\n".join(lines)
        with_query = text + query_line(query)
        fits = len(with_query) <= self.config.max_result_chars
        return ToolResult(with_query if fits else self.clip(text), {"sources": sources})

    def _loaded(self) -> Index:
        if self._index is None:
            sentences = read_corpus(self.config)
            embeddings = None
            if self.config.encoder is not None:
                embeddings = self._embed(sentences, self.config.encoder)
            self._index = Index(sentences, embeddings)
        return self._index

    def _embed(self, sentences: list[Sentence], config: EncoderConfig) -> NDArray[np.float32]:
        cache_dir = self.config.cache_dir or _default_cache_dir()
        try:
            encoder = self._make_encoder(config, cache_dir)
            key = index_key(sentences, encoder.encode([PROBE]))
        except (ConfigError, ImportError, OSError, RuntimeError, ValueError) as error:
            logger.exception("retrieval: no encoder")
            raise ToolFailed(f"the encoder {config.model!r} cannot be loaded") from error
        self._encoder = encoder
        return cached_embeddings(sentences, encoder, cache_dir / f"retrieval-{key}.npz")
