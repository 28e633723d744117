"""Folders of runs: whatever is in them is counted, or refused, and deleted."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serve_app.tools.sandbox import process as sandbox_process
from serve_app.tools.sandbox.client import SandboxServer
from serve_app.tools.sandbox.files import deleted_bytes, disk_use, remove_tree
from tests.sandboxes import LIMITS, wait_until
from tests.unit.tools.test_sandbox import make_deep

OTHER_USER = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def as_other_user(function: Callable[[], bool]) -> bool:
    """Call a function in a process of an ordinary user."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgroups([])
            os.setresgid(OTHER_USER, OTHER_USER, OTHER_USER)
            os.setresuid(OTHER_USER, OTHER_USER, OTHER_USER)
            code = 0 if function() else 1
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


@pytest.fixture
def folder(tmp_path: Path) -> str:
    path = tmp_path / "run"
    path.mkdir()
    return str(path)


def test_deep_folders_are_removed(folder: str) -> None:
    make_deep(Path(folder), 1500)
    if sys.version_info < (3, 13):
        with pytest.raises(RecursionError):
            shutil.rmtree(folder, ignore_errors=True)
    assert os.path.exists(folder)
    assert remove_tree(folder)
    assert not os.path.exists(folder)


def test_links_are_removed_and_not_followed(folder: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(0o700)
    (outside / "kept").write_text("x")
    os.symlink(outside, f"{folder}/link")
    os.mkdir(f"{folder}/inner")
    os.symlink(outside / "kept", f"{folder}/inner/link")
    os.symlink(folder, tmp_path / "link-to-folder")
    assert not remove_tree(str(tmp_path / "link-to-folder"))
    assert remove_tree(folder)
    assert os.listdir(outside) == ["kept"]


@as_root
@pytest.mark.parametrize("mode", [0, 0o300, 0o500, 0o600])
def test_folders_of_any_mode_are_removed_by_their_ordinary_owner(shared: Path, mode: int) -> None:
    path = f"{shared}/run"

    def make_and_remove() -> bool:
        os.makedirs(f"{path}/a/b/c")
        Path(f"{path}/a/b/file").write_text("x")
        for inner in (f"{path}/a/b", f"{path}/a", path):
            os.chmod(inner, mode)
        return remove_tree(path)

    assert as_other_user(make_and_remove)
    assert not os.path.lexists(path)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A folder in which anybody may write."""
    path = Path("/tmp") / f"atlas-test-{os.getpid()}-{time.time_ns()}"
    path.mkdir()
    path.chmod(0o777)
    yield path
    remove_tree(str(path))


_GET_FLAGS, _SET_FLAGS, _IMMUTABLE = 0x80086601, 0x40086602, 0x10


def set_immutable(path: str, immutable: bool) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        (flags,) = struct.unpack("=i", fcntl.ioctl(descriptor, _GET_FLAGS, bytes(8))[:4])
        flags = flags | _IMMUTABLE if immutable else flags & ~_IMMUTABLE
        fcntl.ioctl(descriptor, _SET_FLAGS, struct.pack("=i", flags))
    except OSError as error:
        pytest.skip(f"no immutable files here: {error.strerror}")
    finally:
        os.close(descriptor)


@as_root
def test_what_cannot_be_removed_is_left_and_stops_neither_removal_nor_sweep(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stuck, other = (tmp_path / f"{sandbox_process.BASE_PREFIX}{name}" for name in "ab")
    for path in (stuck, other):
        path.mkdir()
        (path / "file").write_text("x")
        (path / "inner").mkdir()
    set_immutable(f"{stuck}/file", True)
    try:
        assert not remove_tree(str(stuck))
        assert os.listdir(stuck) == ["file"]
        for path in (stuck, other):
            os.utime(path, (0, 0))
        server = SandboxServer()
        assert server.run("1", LIMITS, 30).stdout == "1\n"
        wait_until(lambda: not other.exists())
        server.close()
        assert stuck.exists()
    finally:
        set_immutable(f"{stuck}/file", False)


def test_count_sees_the_deepest_file(folder: str) -> None:
    make_deep(Path(folder), 200)
    assert disk_use(folder, 1000)[1] == 200
    assert disk_use(folder, 100)[1] == 101
    descriptor = os.open(folder, os.O_RDONLY)
    for _ in range(18):
        os.mkdir("x" * 250, dir_fd=descriptor)
        descriptor = os.open("x" * 250, os.O_RDONLY, dir_fd=descriptor)
    before = disk_use(folder, 1000)
    with open(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor), "wb") as file:
        file.write(b"x" * (1 << 20))
    used, entries = disk_use(folder, 1000)
    assert entries == before[1] + 1
    assert used >= before[0] + (1 << 20)


@as_root
@pytest.mark.parametrize("mode", [0, 0o300])
def test_count_of_what_cannot_be_read_fails(shared: Path, mode: int) -> None:
    def count() -> bool:
        os.makedirs(f"{shared}/run/hidden")
        if disk_use(f"{shared}/run", 100)[1] != 1:
            return False
        os.chmod(f"{shared}/run/hidden", mode)
        try:
            disk_use(f"{shared}/run", 100)
        except PermissionError:
            return True
        return False

    assert as_other_user(count)


def test_entries_that_vanish_while_they_are_counted_do_not_matter(folder: str) -> None:
    pid = os.fork()
    if pid == 0:
        while True:
            for name in "abc":
                os.makedirs(f"{folder}/{name}/{name}", exist_ok=True)
                os.rmdir(f"{folder}/{name}/{name}")
                os.rmdir(f"{folder}/{name}")
    try:
        for _ in range(2000):
            assert disk_use(folder, 100)[1] <= 6
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_deleted_files_are_counted_while_they_are_open(folder: str) -> None:
    with open(f"{folder}/file", "wb") as file:
        file.write(b"x" * (1 << 20))
        file.flush()
        before = deleted_bytes(os.getpid(), folder, 1 << 20)
        os.unlink(f"{folder}/file")
        assert deleted_bytes(os.getpid(), folder, 1 << 20) >= before + (1 << 20)
    assert deleted_bytes(os.getpid(), folder, 1 << 20) == before
