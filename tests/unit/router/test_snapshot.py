"""The snapshot on disk: what was written comes back, and nothing else is believed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from serve_app.errors import SnapshotError
from serve_app.router.snapshots.snapshot import (
    DOCUMENT_FILE,
    TENSORS_FILE,
    RouterSnapshot,
    Scale,
    load_snapshot,
    save_snapshot,
)
from tests.router_data import make_snapshot


@pytest.fixture
def snapshot() -> RouterSnapshot:
    return make_snapshot()


def test_a_snapshot_comes_back_as_it_was_written(snapshot: RouterSnapshot, tmp_path: Path) -> None:
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    written = replace(snapshot, policy={"encoder.weight": weights})
    save_snapshot(written, tmp_path / "s1")
    read = load_snapshot(tmp_path / "s1")
    assert read.pairs == written.pairs
    assert read.scales == written.scales
    assert read.examples == written.examples
    assert read.metadata == written.metadata
    assert (read.version, read.encoder, read.head_gamma) == (
        written.version,
        written.encoder,
        written.head_gamma,
    )
    np.testing.assert_array_equal(read.centroids, written.centroids)
    np.testing.assert_array_equal(read.head_out, written.head_out)
    np.testing.assert_array_equal(read.policy["encoder.weight"], weights)


def test_writing_leaves_only_the_snapshot_and_never_replaces_one(
    snapshot: RouterSnapshot, tmp_path: Path
) -> None:
    save_snapshot(snapshot, tmp_path / "s1")
    before = (tmp_path / "s1" / DOCUMENT_FILE).read_bytes()
    with pytest.raises(SnapshotError, match="never change"):
        save_snapshot(replace(snapshot, version=9), tmp_path / "s1")
    assert (tmp_path / "s1" / DOCUMENT_FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["s1"]


@pytest.mark.parametrize("file", [TENSORS_FILE, DOCUMENT_FILE])
@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "empty"])
def test_a_damaged_file_is_refused(
    file: str, damage: str, snapshot: RouterSnapshot, tmp_path: Path
) -> None:
    save_snapshot(snapshot, tmp_path / "s1")
    path = tmp_path / "s1" / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(SnapshotError):
        load_snapshot(tmp_path / "s1")


def test_a_foreign_folder_and_another_schema_are_refused_by_name(
    snapshot: RouterSnapshot, tmp_path: Path
) -> None:
    save_snapshot(snapshot, tmp_path / "s1")
    path = tmp_path / "s1" / DOCUMENT_FILE
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"kind": "something-else"}))
    with pytest.raises(SnapshotError, match="not a router snapshot"):
        load_snapshot(tmp_path / "s1")
    path.write_text(json.dumps(document | {"schema_version": 99}))
    with pytest.raises(SnapshotError, match="schema 99"):
        load_snapshot(tmp_path / "s1")
    path.write_text(json.dumps(document | {"version": 7}))
    with pytest.raises(SnapshotError, match="does not match its hash"):
        load_snapshot(tmp_path / "s1")


@pytest.mark.parametrize(
    ("about", "shown"),
    [({"num_verdicts": 0}, True), ({"num_verdicts": 3}, False), ({}, False)],
)
def test_examples_that_may_be_of_callers_are_not_read(
    about: dict[str, int], shown: bool, snapshot: RouterSnapshot, tmp_path: Path
) -> None:
    """A document that does not say where its examples are from was fitted on traffic, or not."""
    save_snapshot(replace(snapshot, metadata=about), tmp_path / "s1")
    path = tmp_path / "s1" / DOCUMENT_FILE
    document = json.loads(path.read_text())
    del document["sha256"], document["examples_from"]
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(document | {"sha256": digest}))
    read = load_snapshot(tmp_path / "s1")
    assert read.examples == (snapshot.examples if shown else ((), (), ()))
    save_snapshot(read, tmp_path / "again")
    assert load_snapshot(tmp_path / "again").examples == read.examples


def test_the_shipped_snapshot_shows_its_examples() -> None:
    examples = load_snapshot(Path("configs/nano/snapshot")).examples
    assert all(examples)
    assert max(len(text) for texts in examples for text in texts) <= 200


def test_tensors_of_another_snapshot_are_refused(snapshot: RouterSnapshot, tmp_path: Path) -> None:
    save_snapshot(snapshot, tmp_path / "s1")
    path = tmp_path / "s1" / TENSORS_FILE
    tensors = load(path.read_bytes())
    path.write_bytes(save(tensors | {"centroids": tensors["centroids"] + 1}))
    with pytest.raises(SnapshotError, match="does not match its hash"):
        load_snapshot(tmp_path / "s1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"centroids": s.centroids[:, :-1]}, "landmarks has shape"),
        (lambda s: {"score_alpha": s.score_alpha[:-1]}, "score_alpha has shape"),
        (lambda s: {"pair_costs_usd": s.pair_costs_usd.astype(np.float64)}, "not float32"),
        (lambda s: {"centroids": np.full_like(s.centroids, np.nan)}, "not finite"),
        (lambda s: {"head_out": np.full_like(s.head_out, np.inf)}, "not finite"),
        (lambda s: {"score_beta": np.zeros_like(s.score_beta)}, "not above 0"),
        (lambda s: {"costs_usd": -np.ones_like(s.costs_usd)}, "below 0"),
        (lambda s: {"distance_quantiles": s.distance_quantiles[::-1].copy()}, "ascend"),
        (lambda s: {"scales": (Scale(1, 1, 1.0),)}, "do not fit"),
        (lambda s: {"scales": (Scale(3, 4, 1.0),)}, "do not fit"),
        (lambda s: {"head_weight": float("nan")}, "head_weight"),
        (lambda s: {"trusted_quantile": 1.5}, "trusted_quantile"),
        (lambda s: {"caution": -1.0}, "caution"),
        (lambda s: {"gate_head": s.gate_head[:-1]}, "gate_head has shape"),
        (lambda s: {"pairs": (s.pairs[0],) * 3}, "twice"),
        (lambda s: {"version": 0}, "version"),
        (lambda s: {"examples": ()}, "examples"),
    ],
)
def test_what_cannot_work_is_refused(
    change: Callable[[RouterSnapshot], dict[str, object]],
    message: str,
    snapshot: RouterSnapshot,
) -> None:
    with pytest.raises(SnapshotError, match=message):
        replace(snapshot, **change(snapshot))  # type: ignore[arg-type]
