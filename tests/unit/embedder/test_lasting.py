"""Vectors of cards and utterances that a later start reads from disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from serve_app.config import AtlasConfig
from serve_app.embedder import lasting
from serve_app.embedder.deployment import Embedder
from serve_app.embedder.lasting import LastingVectors

TEXTS = ["what is 2 + 2?", "\ud800", "capital of Japan"]


def config_in(folder: Path, **embedder: int) -> AtlasConfig:
    model = {
        "type": "remote",
        "model_id": "m",
        "base_url": "http://127.0.0.1:1",
        "remote_model": "m",
    }
    settings = {"models": [model], "data_dir": str(folder), "embedder": embedder}
    return AtlasConfig.model_validate(settings)


def vectors(count: int, dim: int = 4) -> NDArray[np.float32]:
    return np.arange(count * dim, dtype=np.float32).reshape(count, dim)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "vectors.npz"


def test_vectors_are_there_again_after_a_start(file: Path) -> None:
    LastingVectors(file, 4).add(TEXTS, vectors(3))
    again = LastingVectors(file, 4)
    assert again.missing([*TEXTS, "new", "new"]) == ["new"]
    assert np.array_equal(again.of(TEXTS[::-1]), vectors(3)[::-1])
    assert again.of([]).shape == (0, 4)


def test_the_file_holds_no_text_and_is_private(file: Path) -> None:
    LastingVectors(file, 4).add(TEXTS, vectors(3))
    assert b"Japan" not in file.read_bytes()
    assert file.stat().st_mode & 0o077 == 0
    assert list(file.parent.iterdir()) == [file]


def test_two_processes_keep_what_the_other_one_made(file: Path) -> None:
    one, other = LastingVectors(file, 4), LastingVectors(file, 4)
    one.add(["a"], vectors(1))
    other.add(["b"], vectors(1))
    assert LastingVectors(file, 4).missing(["a", "b"]) == []


def test_only_the_last_texts_are_kept(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lasting, "MAX_KEPT", 2)
    kept = LastingVectors(file, 4)
    kept.add(["a", "b"], vectors(2))
    kept.add(["c"], vectors(1))
    assert LastingVectors(file, 4).missing(["a", "b", "c"]) == ["a"]


@pytest.mark.parametrize("fault", ["cut", "empty", "no archive", "dim", "not finite", "key"])
def test_a_damaged_file_counts_as_none(file: Path, fault: str) -> None:
    LastingVectors(file, 4).add(["a"], vectors(1))
    data = file.read_bytes()
    match fault:
        case "cut":
            file.write_bytes(data[: len(data) // 2])
        case "empty":
            file.write_bytes(b"")
        case "no archive":
            file.write_bytes(b"no archive")
        case "dim":
            LastingVectors(file, 3).add(["a"], vectors(1, 3))
        case "not finite":
            LastingVectors(file, 4).add(["a"], vectors(1) * np.nan)
        case "key":
            np.savez(file, digests=np.zeros((1, 16), np.uint8))
    kept = LastingVectors(file, 4)
    assert kept.missing(["a"]) == ["a"]
    kept.add(["a"], vectors(1))
    assert LastingVectors(file, 4).missing(["a"]) == []


def test_a_folder_that_cannot_be_written_costs_only_the_next_start(file: Path) -> None:
    file.parent.write_text("no folder")
    kept = LastingVectors(file, 4)
    kept.add(["a"], vectors(1))
    assert np.array_equal(kept.of(["a"]), vectors(1))


async def test_a_second_start_encodes_none_of_the_lasting_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path)
    first = await Embedder(config).embed_lasting(["a", "b", "a"])
    again = Embedder(config)
    monkeypatch.setattr(again, "_batcher", None)
    assert np.array_equal(await again.embed_lasting(["a", "b", "a"]), first)


async def test_another_length_of_texts_has_other_vectors(tmp_path: Path) -> None:
    long = "one two three four five six seven eight nine ten"
    for max_tokens in (8, 64):
        embedder = Embedder(config_in(tmp_path, max_tokens=max_tokens))
        made = await embedder.embed_lasting([long])
        assert np.allclose(made, await embedder.embed([long]), atol=1e-6)
