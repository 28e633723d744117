"""The folders of sandboxed runs: counting what is in them, and deleting them whatever is in them.

Standard library only: the sandbox server loads this file by its path. Both walk by descriptor, so
neither the depth of a folder nor the length of its path matters, and follow no link. Counting fails
closed: what cannot be counted is an `OSError`, never zero.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import stat
import time
from collections.abc import Iterator

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: str, seconds: float = math.inf) -> bool:
    """Delete a folder: deep, read-only or unreadable, with links to elsewhere. Never raises.

    Nested folders are moved up to the top before they are emptied, so nothing recurses and two
    descriptors are enough for any depth. What cannot be deleted is left, and the rest goes.

    Args:
        path: The folder; a link is not followed.
        seconds: When to give up.

    Returns:
        Whether it is gone.
    """
    deadline = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        top = _open_for_removal(path)
        try:
            _empty(top, deadline)
        finally:
            os.close(top)
    # Also a folder that cannot be opened can be deleted when it is empty.
    with contextlib.suppress(OSError):
        os.rmdir(path)
    return not os.path.lexists(path)


def _empty(top: int, deadline: float) -> None:
    numbers = itertools.count()
    changed = True
    # Ends when a whole pass changed nothing: what is then left cannot be deleted.
    while changed:
        changed = False
        for name in os.listdir(top):
            if time.monotonic() > deadline:
                return
            changed |= _delete(name, top) or _hollow_out(name, top, numbers)


def _delete(name: str, folder: int) -> bool:
    """Delete a file, a link or an empty folder; False if that is not possible."""
    try:
        os.unlink(name, dir_fd=folder)
    except IsADirectoryError:
        try:
            os.rmdir(name, dir_fd=folder)
        except OSError:
            return False
    except OSError:
        return False
    return True


def _hollow_out(name: str, top: int, numbers: Iterator[int]) -> bool:
    """Delete what is in a folder, and move its folders up to `top`; whether anything changed."""
    changed = False
    with contextlib.suppress(OSError):
        folder = _open_for_removal(name, top)
        try:
            for inner in os.listdir(folder):
                changed |= _delete(inner, folder) or _move_up(inner, folder, top, next(numbers))
        finally:
            os.close(folder)
    return _delete(name, top) or changed


def _move_up(name: str, folder: int, top: int, number: int) -> bool:
    with contextlib.suppress(OSError):
        # A folder that may not be written to cannot be moved: its ".." changes.
        os.close(_open_for_removal(name, folder))
        os.rename(name, f".{os.getpid()}-{number}", src_dir_fd=folder, dst_dir_fd=top)
        return True
    return False


def _open_for_removal(name: str, folder: int | None = None) -> int:
    """Open a folder and allow its owner everything in it."""
    try:
        descriptor = os.open(name, _FOLDER, dir_fd=folder)
    except PermissionError:
        handle = os.open(name, os.O_PATH | _FOLDER, dir_fd=folder)
        try:
            os.chmod(f"/proc/self/fd/{handle}", 0o700)
        finally:
            os.close(handle)
        return os.open(name, _FOLDER, dir_fd=folder)
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, 0o700)
    return descriptor


def disk_use(root: str, max_files: int) -> tuple[int, int]:
    """Bytes and entries below a folder.

    Args:
        root: The folder.
        max_files: Counting stops above this many entries.

    Returns:
        Bytes on disk and number of entries.

    Raises:
        OSError: If something cannot be counted, for example an unreadable folder. An entry that
            vanished meanwhile is not counted.
    """
    total = entries = 0
    open_folders = [os.open(root, _FOLDER)]
    scans = [os.scandir(open_folders[0])]
    try:
        while scans and entries <= max_files:
            entry = next(scans[-1], None)
            if entry is None:
                scans.pop().close()
                os.close(open_folders.pop())
                continue
            entries += 1
            with contextlib.suppress(FileNotFoundError):
                info = os.stat(entry.name, dir_fd=open_folders[-1], follow_symlinks=False)
                total += info.st_blocks * 512
                if stat.S_ISDIR(info.st_mode):
                    open_folders.append(os.open(entry.name, _FOLDER, dir_fd=open_folders[-1]))
                    scans.append(os.scandir(open_folders[-1]))
    finally:
        for scan in scans:
            scan.close()
        for descriptor in open_folders:
            os.close(descriptor)
    return total, entries


def deleted_bytes(pid: int, workdir: str, max_file_bytes: int) -> int:
    """Bytes of deleted files that a process still holds, open or mapped, in any of its threads.

    Args:
        pid: The process.
        workdir: The only folder in which it can have made files.
        max_file_bytes: Counted for a file that is mapped and no longer open.

    Raises:
        OSError: If that cannot be read. A thread that ended or a file that was closed meanwhile
            is not counted.
    """
    held: dict[tuple[int, int], int] = {}
    mapped: set[tuple[int, int]] = set()
    for thread in _names(f"/proc/{pid}/task"):
        folder = f"/proc/{pid}/task/{thread}"
        try:
            held |= _deleted_and_open(f"{folder}/fd")
            # All threads share their memory, but one that has ended shows none.
            mapped = mapped or _deleted_and_mapped(f"{folder}/maps", workdir)
        except PermissionError:
            # What a thread that is ending still has belongs to root; it runs no more code.
            if not _is_ending(folder):
                raise
    for identity in mapped:
        held.setdefault(identity, max_file_bytes)
    return sum(held.values())


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, ProcessLookupError):
        return []


def _deleted_and_open(folder: str) -> dict[tuple[int, int], int]:
    """Bytes of each deleted file, by device and number."""
    found = {}
    for name in _names(folder):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            info = os.stat(f"{folder}/{name}")
            if stat.S_ISREG(info.st_mode) and info.st_nlink == 0:
                found[info.st_dev, info.st_ino] = info.st_blocks * 512
    return found


def _deleted_and_mapped(path: str, workdir: str) -> set[tuple[int, int]]:
    """Device and number of each deleted file."""
    found = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(path, "rb") as maps:
        for line in maps:
            if line.endswith(b" (deleted)\n") and os.fsencode(f"{workdir}/") in line:
                _, _, _, device, number, _ = line.split(maxsplit=5)
                major, minor = (int(part, 16) for part in device.split(b":"))
                found.add((os.makedev(major, minor), int(number)))
    return found


def _is_ending(thread: str) -> bool:
    """Whether a thread has given up its memory: it runs no more code."""
    try:
        with open(f"{thread}/statm", "rb") as file:
            return file.read().startswith(b"0 ")
    except (FileNotFoundError, ProcessLookupError):
        return True
