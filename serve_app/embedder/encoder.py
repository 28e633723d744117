"""Text in, unit vectors out, in the process that asks.

Vectors are those of sentence-transformers for the same weights, cut at `max_tokens`. With the
`onnx` backend neither torch nor transformers is imported: the graph is built once from the weights,
kept in a cache on disk that several processes may use at once, and mapped into memory from there.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from serve_app.config import EmbedderConfig
from serve_app.embedder.onnx_export import (
    GRAPH_FILE,
    export_encoder,
    is_intact,
    read_spec,
    source_key,
)
from serve_app.errors import ConfigError, InvalidRequest
from serve_app.private_files import make_private_folder

logger = logging.getLogger(__name__)

TokenIds = list[int]

_MAX_CHARS_PER_TOKEN = 64
"""Text past this many characters per allowed token is not looked at: it would only cost time."""
_RUN_TOKENS = 128
"""Tokens up to which texts run together; beyond, attention over all of them costs more than it
saves."""
_OTHER_TEXT = -1e4
"""Added to the attention score between tokens of different texts; its exponential is 0."""


class Network(Protocol):
    """What turns padded token ids into vectors."""

    dim: int

    def run(self, token_ids: Sequence[TokenIds]) -> NDArray[np.float32]:
        """Token ids of texts to unit vectors (batch, dim)."""
        ...


class TextTokenizer:
    """Cuts texts into an encoder's tokens. Thread-safe."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        """Load the tokenizer.

        Args:
            folder: Of the encoder.
            max_tokens: Longer texts are cut; never more than the network takes.
        """
        from tokenizers import Tokenizer

        network_config = json.loads((folder / "config.json").read_text())
        self._max_tokens = min(
            max_tokens, network_config.get("max_position_embeddings", max_tokens)
        )
        self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self._max_tokens)

    def tokenize(self, text: str) -> TokenIds:
        """Token ids of a text, special tokens included, at most `max_tokens`.

        Raises:
            InvalidRequest: If it is no text that can be encoded (not a string, a lone surrogate).
        """
        try:
            ids: TokenIds = self._tokenizer.encode(
                text.strip()[: self._max_tokens * _MAX_CHARS_PER_TOKEN]
            ).ids
        except (AttributeError, TypeError, UnicodeError) as error:
            raise InvalidRequest("the text to embed is not valid Unicode text") from error
        return ids


class TextEncoder:
    """A sentence encoder. Thread-safe; one call uses `num_threads` threads."""

    def __init__(self, config: EmbedderConfig, cache_dir: Path) -> None:
        """Load the model; the `onnx` backend builds its graph if `cache_dir` has no intact one.

        Args:
            config: What to load and how.
            cache_dir: Folder of built graphs; made when missing.

        Raises:
            ConfigError: If the model cannot be found, or is not one the backend can run.
        """
        folder = find_model(config.model)
        self._tokenizer = TextTokenizer(folder, config.max_tokens)
        self._network: Network
        if config.backend == "onnx":
            self._network = _OnnxNetwork(folder, cache_dir, config.num_threads)
        else:
            self._network = _TorchNetwork(folder, config.num_threads)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._network.dim

    def tokenize(self, text: str) -> TokenIds:
        """Token ids of a text, as of `TextTokenizer.tokenize`."""
        return self._tokenizer.tokenize(text)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode texts.

        Returns:
            (batch, dim) float32, L2-normalised, in the order of `texts`.

        Raises:
            InvalidRequest: If one of them is no valid text.
        """
        return self.encode_tokens([self.tokenize(text) for text in texts])

    def encode_tokens(self, token_ids: Sequence[TokenIds]) -> NDArray[np.float32]:
        """As `encode`, for texts that are tokenised already; short ones run together."""
        vectors = np.empty((len(token_ids), self.dim), np.float32)
        for run in runs_of([len(ids) for ids in token_ids]):
            vectors[run] = self._network.run(token_ids[run])
        return vectors


def runs_of(lengths: Sequence[int]) -> list[slice]:
    """Cut texts, in their order, into runs of at most `_RUN_TOKENS` tokens or one text.

    Args:
        lengths: Tokens of each text.

    Returns:
        Slices of the texts, one behind the other.
    """
    runs: list[slice] = []
    start = total = 0
    for index, length in enumerate(lengths):
        if index > start and total + length > _RUN_TOKENS:
            runs.append(slice(start, index))
            start, total = index, 0
        total += length
    if start < len(lengths):
        runs.append(slice(start, len(lengths)))
    return runs


def find_model(model: str) -> Path:
    """The folder of a model: a folder, a package that carries weights in `model/`, or a hub id.

    Raises:
        ConfigError: If there is none.
    """
    if model.startswith(("/", ".", "~")):
        folder = Path(model).expanduser()
        if not (folder / "config.json").is_file():
            raise ConfigError(f"embedder.model {model!r} is no folder with a config.json")
        return folder
    if "/" not in model:
        spec = importlib.util.find_spec(model.replace("-", "_").replace(".", "_"))
        for place in (spec and spec.submodule_search_locations) or ():
            if (Path(place) / "model" / "config.json").is_file():
                return Path(place) / "model"
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*/config.json", "vocab.txt"]
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(
            f"embedder.model {model!r} is no folder, no installed package with weights, and the "
            "hub did not give it; install the package or name a folder"
        ) from error


def cached_graph(folder: Path, cache_dir: Path) -> Path:
    """The built graph of the model in `folder`, from the cache when it is there and intact.

    Any number of processes may call this at once: one builds while the others wait, a graph appears
    under its name only when it is complete, and a damaged one is replaced.
    """
    export = cache_dir / f"encoder-{source_key(folder)}"
    if is_intact(export):
        return export
    make_private_folder(cache_dir)
    with (cache_dir / "encoder.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_intact(export):
            return export
        if export.exists():
            logger.warning("rebuilding the encoder graph: the cached one is damaged")
        fresh = Path(tempfile.mkdtemp(prefix="encoder-building-", dir=cache_dir))
        try:
            export_encoder(folder, fresh)
            shutil.rmtree(export, ignore_errors=True)
            os.rename(fresh, export)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
    return export


class _OnnxNetwork:
    """onnxruntime on the CPU."""

    def __init__(self, folder: Path, cache_dir: Path, num_threads: int) -> None:
        import onnxruntime

        export = cached_graph(folder, cache_dir)
        self._pools_first = read_spec(folder).pooling == "cls"

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        # The arena keeps what one long batch took, and spinning threads take the core from others.
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session: Any = onnxruntime.InferenceSession(
            str(export / GRAPH_FILE), options, providers=["CPUExecutionProvider"]
        )
        self.dim: int = self._session.get_outputs()[0].shape[1]

    def run(self, token_ids: Sequence[TokenIds]) -> NDArray[np.float32]:
        """See `Network.run`."""
        lengths = [len(ids) for ids in token_ids]
        text_of = np.repeat(np.arange(len(lengths)), lengths)
        positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        pooling = np.arange(len(lengths))[:, None] == text_of
        if self._pools_first:
            pooling &= positions == 0
        bias = np.where(text_of[:, None] == text_of, np.float32(0), np.float32(_OTHER_TEXT))
        vectors: NDArray[np.float32] = self._session.run(
            None,
            {
                "input_ids": np.concatenate(token_ids, dtype=np.int32, casting="unsafe")[None],
                "positions": positions[None],
                "attention_bias": bias[None, None],
                "pooling": pooling.astype(np.float32),
            },
        )[0]
        return vectors


class _TorchNetwork:
    """sentence-transformers: any network it can load, more memory and time."""

    def __init__(self, folder: Path, num_threads: int) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(num_threads)
        self._torch = torch
        self._model = SentenceTransformer(str(folder), device="cpu").eval()
        self.dim = int(self._model.get_embedding_dimension() or 0)

    def run(self, token_ids: Sequence[TokenIds]) -> NDArray[np.float32]:
        """See `Network.run`."""
        torch = self._torch
        lengths = np.array([len(ids) for ids in token_ids])
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        input_ids = np.zeros(mask.shape, np.int64)
        input_ids[mask == 1] = np.concatenate(token_ids)
        features = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(mask),
        }
        with torch.inference_mode():
            embedding = self._model(features)["sentence_embedding"]
            vectors: NDArray[np.float32] = torch.nn.functional.normalize(embedding, dim=1).numpy()
        return vectors
