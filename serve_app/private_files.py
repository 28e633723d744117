"""Folders and files that only the user of this process may read: modes 0700 and 0600."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path


def make_private_folder(folder: Path) -> None:
    """Make a folder, and each that is missing above it, with mode 0700; one that is there stays.

    Raises:
        OSError: If it cannot be made.
    """
    if folder.is_dir():
        return
    make_private_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


def make_private_file(file: Path) -> None:
    """Make an empty file with mode 0600; one that is there keeps its content and is tightened.

    Raises:
        OSError: If it cannot be made.
    """
    os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    tighten(file)


def tighten(path: Path) -> None:
    """Take all rights of other users from a file or folder.

    What is not there, belongs to another user, or is meant for all users (a folder with the sticky
    bit, such as `/tmp`) is left alone.
    """
    with contextlib.suppress(OSError):
        found = path.stat()
        if found.st_uid != os.geteuid() or found.st_mode & stat.S_ISVTX:
            return
        if found.st_mode & 0o077:
            path.chmod(stat.S_IMODE(found.st_mode) & 0o700)
