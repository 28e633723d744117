"""Who may read what a deployment keeps."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.config import DATA_FOLDER, SnapshotsPlace
from serve_app.private_files import make_private_file, make_private_folder, tighten
from serve_app.ray_cluster import _make_token
from serve_app.router.snapshots.library import SnapshotLibrary
from serve_app.store import Store
from serve_app.store.journal import Journal
from tests.router_data import make_snapshot


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    """The mask that lets everybody read what is made without a thought."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_folders_are_made_private_up_to_one_that_is_there(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir(mode=0o755)
    make_private_folder(there / "one" / "two")
    assert mode(there / "one" / "two") == mode(there / "one") == 0o700
    assert mode(there) == 0o755


def test_a_file_keeps_its_content_and_loses_other_users_rights(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("content")
    assert mode(file) == 0o644
    make_private_file(file)
    assert mode(file) == 0o600
    assert file.read_text() == "content"


def test_what_is_for_all_users_or_missing_is_left_alone(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    tighten(shared)
    assert mode(shared) == 0o1777
    tighten(tmp_path / "missing")


async def test_a_new_database_is_private(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "data"
    store = await Store.open(f"sqlite+aiosqlite:///{folder / 'atlas.db'}")
    files = list(folder.iterdir())
    assert {file.name for file in files} >= {"atlas.db", "atlas.db-wal", "atlas.db-shm"}
    assert {mode(file) for file in files} == {0o600}
    assert mode(folder) == mode(folder.parent) == 0o700
    await store.close()


@pytest.mark.parametrize(("name", "then"), [(DATA_FOLDER, 0o700), ("srv", 0o755)])
async def test_an_open_database_is_tightened_and_a_folder_of_the_default_name_too(
    tmp_path: Path, name: str, then: int
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    file = folder / "atlas.db"
    file.touch()
    assert (mode(folder), mode(file)) == (0o755, 0o644)
    store = await Store.open(f"sqlite+aiosqlite:///{file}")
    assert (mode(folder), mode(file)) == (then, 0o600)
    await store.close()


def test_snapshots_are_private_and_old_folders_are_tightened(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "snapshots"
    snapshot_id = SnapshotLibrary(SnapshotsPlace(folder)).add(make_snapshot())
    assert mode(folder) == mode(folder / snapshot_id) == 0o700
    folder.chmod(0o755)
    assert SnapshotLibrary(SnapshotsPlace(folder)).load(snapshot_id, 1).version == 1
    assert mode(folder) == 0o700


def test_a_journal_is_private(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "journal"
    journal = Journal(folder, 1000)
    assert journal.append(b"{}\n", in_memory=False)
    assert mode(folder) == mode(folder.parent) == 0o700
    assert {mode(file) for file in folder.iterdir()} == {0o600}
    journal.close()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of a user without a token."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_ray_s_token_is_made_private_once(home: Path) -> None:
    _make_token()
    file = home / ".ray" / "auth_token"
    token = file.read_text()
    assert len(token) == 64
    assert mode(file) == 0o600
    file.chmod(0o644)
    _make_token()
    assert file.read_text() == token
    assert mode(file) == 0o600
    assert list(file.parent.iterdir()) == [file]


def test_a_token_of_the_environment_is_enough(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    _make_token()
    assert not (home / ".ray").exists()
