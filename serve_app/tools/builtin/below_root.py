"""Folders and files below a root folder: nothing above the root is reached by any name or link.

A path is walked from the root's descriptor, one name at a time, and no link is followed, so what
others rename or link meanwhile changes nothing: each step is in the folder that the step before
opened. Only regular files, and folders of the root's own file system, are opened.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from serve_app.config.tools import FilesConfig
from serve_app.errors import ToolRetry

MAX_DEPTH = 32
"""Folders in a path; a search goes no deeper."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Not to wait for the other end, should a FIFO have taken the file's place.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@dataclass(frozen=True)
class Root:
    """The folder that nothing leaves."""

    descriptor: int
    device: int
    """The file system of its folders."""

    @contextmanager
    def folder(self, parts: list[str]) -> Iterator[int]:
        """A folder below the root.

        Raises:
            ToolRetry: If there is none by this name, without following a link.
        """
        opened = os.dup(self.descriptor)
        try:
            for part in parts:
                try:
                    inner = os.open(part, _FOLDER, dir_fd=opened)
                except OSError as error:
                    raise wrong(parts, error) from None
                os.close(opened)
                opened = inner
                if os.fstat(opened).st_dev != self.device:
                    raise ToolRetry(f"{name_of(parts)!r} is on another file system: not shown")
            yield opened
        finally:
            os.close(opened)

    @contextmanager
    def file(self, parts: list[str]) -> Iterator[int]:
        """A regular file below the root.

        Raises:
            ToolRetry: If there is none by this name, without following a link.
        """
        if not parts:
            raise ToolRetry("path: name a file")
        with self.folder(parts[:-1]) as folder:
            try:
                # Before it is opened: a device may do something then.
                mode = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False).st_mode
                if not stat.S_ISREG(mode):
                    raise ToolRetry(f"{name_of(parts)!r} is {kind_of(mode)}, not a file to read")
                descriptor = os.open(parts[-1], _FILE, dir_fd=folder)
            except OSError as error:
                raise wrong(parts, error) from None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ToolRetry(f"{name_of(parts)!r} is not a file to read")
            yield descriptor
        finally:
            os.close(descriptor)


@dataclass
class Walk:
    """One search through the files below a folder."""

    root: Root
    config: FilesConfig
    deadline: float
    stopped: str = ""
    """Why it ended early."""
    left_bytes: int = field(init=False)
    left_entries: int = field(init=False)

    def __post_init__(self) -> None:
        """Begin with the limits."""
        self.left_bytes = self.config.max_search_bytes
        self.left_entries = self.config.max_search_entries

    def files(self, parts: list[str]) -> Iterator[tuple[list[str], int]]:
        """Files in order of their names, by path and descriptor; those too large are left out.

        Raises:
            ToolRetry: If there is neither a file nor a folder by this name.
        """
        if parts and not self._is_folder(parts):
            with self.root.file(parts) as descriptor:
                yield parts, descriptor
            return
        folders = [parts]
        while folders and not self.stopped:
            path = folders.pop()
            inner = []
            for name, is_folder in self._entries(path, is_top=path is parts):
                if is_folder:
                    inner.append([*path, name])
                else:
                    yield from self._file([*path, name])
                if self.stopped:
                    return
            if len(path) < MAX_DEPTH:
                folders += reversed(inner)
            elif inner:
                self.stopped = f"folders deeper than {MAX_DEPTH} are not searched"

    def _is_folder(self, parts: list[str]) -> bool:
        with self.root.folder(parts[:-1]) as folder:
            try:
                info = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False)
            except OSError as error:
                raise wrong(parts, error) from None
        return stat.S_ISDIR(info.st_mode)

    def _entries(self, path: list[str], *, is_top: bool) -> list[tuple[str, bool]]:
        """Names in a folder and whether each is a folder; what is neither is left out."""
        found = []
        try:
            with self.root.folder(path) as folder, os.scandir(folder) as entries:
                for entry in entries:
                    self.left_entries -= 1
                    if self.left_entries < 0:
                        self.stopped = "there are too many files"
                        break
                    is_folder = entry.is_dir(follow_symlinks=False)
                    if is_folder or entry.is_file(follow_symlinks=False):
                        found.append((entry.name, is_folder))
        except (ToolRetry, OSError):
            if is_top:
                raise
            return []  # gone meanwhile, or not for us
        return sorted(found)

    def _file(self, path: list[str]) -> Iterator[tuple[list[str], int]]:
        if time.monotonic() > self.deadline - 0.1:
            self.stopped = "the time was not enough"
            return
        with ExitStack() as opened:
            try:
                descriptor = opened.enter_context(self.root.file(path))
            except ToolRetry:
                return  # gone meanwhile, or not for us
            size = os.fstat(descriptor).st_size
            if size > self.config.max_file_bytes:
                return
            self.left_bytes -= size
            if self.left_bytes < 0:
                self.stopped = "there is too much to read"
                return
            yield path, descriptor


def parts_of(path: str) -> list[str]:
    """The names of a path below the root.

    Raises:
        ToolRetry: If it can be none.
    """
    if "\0" in path:
        raise ToolRetry("path: it has a NUL character")
    if path.startswith("/"):
        raise ToolRetry("path: give it from the top of the folder, without a leading /")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ToolRetry("path: .. is not allowed; give it from the top of the folder")
    if len(parts) > MAX_DEPTH:
        raise ToolRetry(f"path: it has more than {MAX_DEPTH} parts")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise ToolRetry("path: it has characters that no file name has") from None
    return parts


def name_of(parts: list[str]) -> str:
    """A path as one line of text."""
    return printable("/".join(parts))


def printable(name: str) -> str:
    """A file's name as one line of text, whatever bytes it has."""
    text = os.fsencode(name).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def kind_of(mode: int) -> str:
    """What a file of this mode is, in words."""
    for test, kind in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISLNK, "a link: not followed"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if test(mode):
            return kind
    return "a device"


def wrong(parts: list[str], error: OSError) -> ToolRetry:
    """What to tell a model about a path that cannot be opened."""
    if isinstance(error, FileNotFoundError):
        return ToolRetry(f"there is no {name_of(parts)!r} here")
    if isinstance(error, PermissionError):
        return ToolRetry(f"{name_of(parts)!r} may not be read")
    return ToolRetry(f"{name_of(parts)!r} is a link, or not what you take it for")
