"""Text in, pooled token vectors out: what a first look at a query sees, in microseconds.

The vectors are the input embeddings of the encoder itself, mapped from its weights file, so nothing
more is downloaded and processes of one machine share the pages. No network runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve_app.config import EmbedderConfig
from serve_app.embedder.encoder import TextTokenizer, find_model
from serve_app.errors import ConfigError, InvalidRequest

Tokens = NDArray[np.int64]
"""(num_tokens,) ids of a text without special tokens, at least one."""

_TABLE_NAMES = ("word_embeddings.weight", "embed_tokens.weight")
_DTYPES = {"F32": np.float32, "F16": np.float16}


class TokenTable:
    """The input embeddings of an encoder's tokens. Thread-safe."""

    def __init__(self, config: EmbedderConfig) -> None:
        """Map the table.

        Args:
            config: The encoder.

        Raises:
            ConfigError: If the encoder has no table that can be mapped.
        """
        folder = find_model(config.model)
        self._tokenizer = TextTokenizer(folder, config.max_tokens)
        self._vectors = _mapped(folder)

    @property
    def dim(self) -> int:
        """Length of a token's vector."""
        return int(self._vectors.shape[1])

    @property
    def size(self) -> int:
        """Tokens of the vocabulary."""
        return int(self._vectors.shape[0])

    def tokens(self, text: str) -> Tokens:
        """The tokens of a text, cut as the encoder cuts it.

        Raises:
            InvalidRequest: If it is no text that can be encoded.
        """
        ids = np.asarray(self._tokenizer.tokenize(text), np.int64)
        inner = ids[1:-1] if len(ids) > 2 else ids
        if int(inner.max(initial=0)) >= self.size:
            raise InvalidRequest("the text has a token that the encoder does not know")
        return inner

    def pooled(self, tokens: Tokens, idf: NDArray[np.float32]) -> NDArray[np.float32]:
        """(4 * dim,) idf-weighted mean, plain mean, first and last vector of a text's tokens.

        Args:
            tokens: Of the text.
            idf: (size,) weight of each token, above 0.
        """
        vectors = np.asarray(self._vectors[tokens], np.float32)
        weights = idf[tokens]
        return np.concatenate(
            [weights @ vectors / weights.sum(), vectors.mean(axis=0), vectors[0], vectors[-1]]
        )

    def inverse_frequencies(self, texts: Sequence[Tokens]) -> NDArray[np.float32]:
        """(size,) smoothed inverse document frequencies of the tokens over some texts."""
        found = np.zeros(self.size)
        for tokens in texts:
            found[np.unique(tokens)] += 1
        return (np.log((len(texts) + 1) / (found + 1)) + 0.1).astype(np.float32)


def _mapped(folder: Path) -> NDArray[np.floating]:
    """(size, dim) the table of input embeddings, mapped from a safetensors file."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, about in header.items():
            if name.endswith(_TABLE_NAMES) and about["dtype"] in _DTYPES:
                return np.memmap(
                    path,
                    _DTYPES[about["dtype"]],
                    mode="r",
                    offset=8 + length + about["data_offsets"][0],
                    shape=tuple(about["shape"]),
                )
    raise ConfigError(f"the encoder {folder.name!r} has no table of token vectors to map")
