"""Another query encoder, for the ablation: what the router loses without the trained one.

`TokenMean` has the vocabulary and the input embeddings of the deployment's encoder and nothing else
of it: no layer of the transformer, so no word knows of another. It needs no download.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.config import EmbedderConfig
from serve_app.embedder import find_model

Float = NDArray[np.float32]

TOKEN_MEAN = "token mean"
_WEIGHTS = "embeddings.word_embeddings.weight"


class TokenMean:
    """The mean of the static embeddings of a text's tokens, L2-normalised."""

    name = TOKEN_MEAN

    def __init__(self, config: EmbedderConfig) -> None:
        """Read the embeddings of an encoder's tokens.

        Args:
            config: The encoder.

        Raises:
            ConfigError: If it cannot be found.
        """
        from safetensors import safe_open
        from tokenizers import Tokenizer

        folder = find_model(config.model)
        self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(config.max_tokens)
        with safe_open(str(folder / "model.safetensors"), framework="numpy") as tensors:
            name = next(key for key in tensors.keys() if key.endswith(_WEIGHTS))  # noqa: SIM118
            self._vectors: Float = tensors.get_tensor(name).astype(np.float32)

    def __call__(self, texts: Sequence[str]) -> Float:
        """(num_texts, dim) unit vectors; what frames a text counts only where nothing else is."""
        rows = []
        for text in texts:
            inside = self._tokenizer.encode(text.strip(), add_special_tokens=False).ids
            ids = inside or self._tokenizer.encode("").ids
            rows.append(self._vectors[ids].mean(axis=0))
        means = np.stack(rows)
        unit: Float = means / np.linalg.norm(means, axis=1, keepdims=True)
        return unit
