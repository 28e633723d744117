"""Snapshots in a folder and in an object store: fsspec's own, in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from serve_app.config import AtlasConfig, SnapshotsPlace
from serve_app.errors import SnapshotError
from serve_app.router.snapshots.library import SnapshotLibrary
from serve_app.router.snapshots.snapshot import DOCUMENT_FILE, TENSORS_FILE
from tests.router_data import make_snapshot

URL = "memory://bucket/snapshots"


@pytest.fixture
def bucket() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    yield files
    if files.exists("/bucket"):
        files.rm("/bucket", recursive=True)


def library(folder: Path) -> SnapshotLibrary:
    return SnapshotLibrary(SnapshotsPlace(folder, URL))


def names(bucket: Any) -> list[str]:
    return [Path(path).name for path in bucket.find("/bucket")]


def configured(snapshots_dir: str, data_dir: Path) -> SnapshotsPlace:
    model = {
        "type": "remote",
        "model_id": "m",
        "base_url": "http://127.0.0.1:1",
        "remote_model": "x",
    }
    settings = {"models": [model], "store": {"snapshots_dir": snapshots_dir}}
    return AtlasConfig.model_validate(settings | {"data_dir": str(data_dir)}).snapshots_path()


def test_a_snapshot_is_read_on_a_machine_that_never_saw_it(tmp_path: Path, bucket: Any) -> None:
    snapshot_id = library(tmp_path / "here").add(make_snapshot())
    read = library(tmp_path / "there").load(snapshot_id, policy_version=7)
    assert (read.version, read.pairs) == (7, make_snapshot().pairs)


def test_equal_snapshots_are_one(tmp_path: Path, bucket: Any) -> None:
    added = {library(tmp_path / name).add(make_snapshot()) for name in ("here", "there")}
    assert len(added) == 1
    assert sorted(names(bucket)) == [DOCUMENT_FILE, TENSORS_FILE]


def test_the_document_is_written_last(
    tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    pipe_file = type(bucket).pipe_file

    def noting(self: Any, path: str, *args: Any, **kwargs: Any) -> None:
        written.append(Path(path).name)
        pipe_file(self, path, *args, **kwargs)

    monkeypatch.setattr(type(bucket), "pipe_file", noting)
    library(tmp_path).add(make_snapshot())
    assert written == [TENSORS_FILE, DOCUMENT_FILE]


def test_half_an_upload_is_no_snapshot_and_is_done_again(tmp_path: Path, bucket: Any) -> None:
    snapshot_id = library(tmp_path / "here").add(make_snapshot())
    bucket.rm(f"/bucket/snapshots/{snapshot_id}/{DOCUMENT_FILE}")
    with pytest.raises(SnapshotError, match="not in the object store"):
        library(tmp_path / "there").load(snapshot_id, policy_version=1)
    library(tmp_path / "here").add(make_snapshot())
    assert library(tmp_path / "there").load(snapshot_id, policy_version=1)


def test_what_was_read_once_is_there_while_the_object_store_is_away(
    tmp_path: Path, bucket: Any
) -> None:
    snapshot_id = library(tmp_path / "here").add(make_snapshot())
    library(tmp_path / "there").load(snapshot_id, policy_version=1)
    bucket.rm("/bucket/snapshots", recursive=True)
    assert library(tmp_path / "there").load(snapshot_id, policy_version=1)


def test_a_damaged_copy_is_fetched_again(tmp_path: Path, bucket: Any) -> None:
    snapshot_id = library(tmp_path).add(make_snapshot())
    (tmp_path / snapshot_id / TENSORS_FILE).write_bytes(b"torn")
    assert library(tmp_path).load(snapshot_id, policy_version=1).pairs == make_snapshot().pairs


def test_what_is_damaged_in_the_object_store_is_refused(tmp_path: Path, bucket: Any) -> None:
    snapshot_id = library(tmp_path / "here").add(make_snapshot())
    bucket.pipe_file(f"/bucket/snapshots/{snapshot_id}/{TENSORS_FILE}", b"torn")
    with pytest.raises(SnapshotError, match="damaged"):
        library(tmp_path / "there").load(snapshot_id, policy_version=1)


def test_a_driver_that_fails_is_a_snapshot_error(
    tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class DriverError(Exception):
        pass

    def fail(*args: Any, **kwargs: Any) -> None:
        raise DriverError("endpoint and bucket")

    monkeypatch.setattr(type(bucket), "pipe_file", fail)
    with pytest.raises(SnapshotError, match=r"failed: DriverError$"):
        library(tmp_path).add(make_snapshot())


def test_an_unknown_kind_of_url_says_what_is_wrong(tmp_path: Path) -> None:
    place = SnapshotsPlace(tmp_path, "nonsense://bucket")
    with pytest.raises(SnapshotError, match=r"snapshots_dir: 'nonsense' cannot be used"):
        SnapshotLibrary(place).add(make_snapshot())


def test_a_folder_needs_no_object_store(tmp_path: Path) -> None:
    place = SnapshotsPlace(tmp_path / "snapshots")
    snapshot_id = SnapshotLibrary(place).add(make_snapshot())
    other = SnapshotLibrary(place).add(replace(make_snapshot(), head_gamma=2.0))
    assert sorted(path.name for path in place.folder.iterdir()) == sorted([snapshot_id, other])


def test_the_configuration_names_a_folder_or_a_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ATLAS_DATA_DIR", raising=False)
    monkeypatch.setenv("BUCKET", "b")
    kept = tmp_path / "snapshots"
    assert configured("snapshots", tmp_path) == SnapshotsPlace(kept)
    assert configured("/shared/s", tmp_path) == SnapshotsPlace(Path("/shared/s"))
    assert configured("file:///shared/s", tmp_path) == SnapshotsPlace(Path("/shared/s"))
    assert configured("s3://${BUCKET}/p/", tmp_path) == SnapshotsPlace(kept, "s3://b/p")
