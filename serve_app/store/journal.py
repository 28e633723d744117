"""Journal: records on disk until the store has them, in files that one process at a time owns.

In come lines, out come the same lines, in their order, to this process or to the one that takes
over after it ended. A record that was appended survives the death of its process at once, and that
of the machine after `sync`, or when the kernel has written it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from serve_app.private_files import make_private_folder

logger = logging.getLogger(__name__)

_SUFFIX = ".jsonl"
_SEGMENT_BYTES = 4 << 20
"""A file that grew to this gets no more records."""
_MAX_ADOPTED = 64
"""Files of ended processes held open at once; more wait until these are written."""


@dataclass(slots=True)
class Segment:
    """One file of records."""

    path: Path
    fd: int
    """Open, and locked: whoever has the lock owns the file, and death gives it back."""
    size: int
    """Bytes."""
    in_memory: bool
    """Whether its records are also in the memory of this process."""
    is_own: bool
    """Whether this process wrote it."""
    num_records: int = 0
    """Not in the store yet; of an adopted one known once it was read."""
    is_full: bool = False
    """Whether the next record goes elsewhere."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What one file held."""

    lines: list[bytes]
    """Records without their ends, the oldest first."""
    is_own: bool
    """Whether this process wrote them."""
    num_lost: int = 0
    """Records that this process wrote and cannot read."""


class Journal:
    """Appends, reads back, and forgets records, the oldest first.

    Algorithm:
        Records go to the last of a row of files. One whose records are all in the store is removed,
        or, if it is the last, emptied. Files that processes left behind when they ended join the
        end of the row. A last line without its end was torn by a death and is left out.

    Invariants:
        - At most `max_bytes` are held in the files of this process, adopted ones counted.
        - A file has one owner: two processes never read the same records.
        - Trouble with the disk is logged, and never raised.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Use a folder; it is made with the first record.

        Args:
            folder: Where the files are; processes share it.
            max_bytes: Of this process's files; 0 keeps nothing.
        """
        self._folder = folder
        self._max_bytes = max_bytes
        self._segments: deque[Segment] = deque()
        self._prefix = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
        self._number = 0

    @property
    def num_bytes(self) -> int:
        """Bytes in the files of this process."""
        return sum(segment.size for segment in self._segments)

    @property
    def has_unread(self) -> bool:
        """Whether there are records that only the files have."""
        return any(not segment.in_memory for segment in self._segments)

    def append(self, record: bytes, *, in_memory: bool) -> bool:
        """Put a record at the end.

        Args:
            record: One line with its end.
            in_memory: Whether the caller keeps it too; else it comes back from `read_next`.

        Returns:
            Whether that was done; `False` where the files are at their bound or the disk refuses.
        """
        if self.num_bytes + len(record) > self._max_bytes:
            return False
        segment = self._last(in_memory)
        if segment is None:
            return False
        try:
            if os.write(segment.fd, record) != len(record):
                raise OSError("the disk took a part of it")
        except OSError as error:
            logger.warning("the journal cannot be written: %s", error)
            segment.is_full = not self._cut(segment, segment.size)  # nothing after half a record
            return False
        segment.size += len(record)
        segment.num_records += 1
        segment.is_full = segment.size >= _SEGMENT_BYTES
        return True

    def read_next(self) -> Reading | None:
        """The records of the oldest file that is not in memory; they are from now on.

        Returns:
            `None` where all are.
        """
        segment = next((s for s in self._segments if not s.in_memory), None)
        if segment is None:
            return None
        try:
            # By position: a descriptor that appends stands at the end.
            lines = os.pread(segment.fd, segment.size, 0).split(b"\n")[:-1]
        except OSError as error:
            logger.error("the journal cannot be read: %s; %s stays", error, segment.path.name)
            self._segments.remove(segment)
            os.close(segment.fd)
            return Reading([], segment.is_own, segment.num_records)
        lost = max(0, segment.num_records - len(lines))
        segment.in_memory, segment.num_records = True, len(lines)
        self._forget_finished()
        return Reading(lines, segment.is_own, lost)

    def commit(self, count: int) -> None:
        """The oldest `count` records are in the store, or need not be: forget them."""
        for segment in self._segments:
            done = min(count, segment.num_records)
            segment.num_records -= done
            count -= done
            if not count:
                break
        self._forget_finished()

    def adopt(self) -> int:
        """Take over the files of processes that ended.

        Returns:
            How many files there were.
        """
        try:
            found = sorted(self._folder.glob(f"*{_SUFFIX}"))
        except OSError:
            return 0
        held = {segment.path for segment in self._segments}
        room = _MAX_ADOPTED - sum(not segment.is_own for segment in self._segments)
        adopted = 0
        for path in found:
            if path in held or adopted >= room:
                continue
            fd = _claim(path, os.O_RDWR | os.O_APPEND)
            if fd is None:
                continue
            size = os.fstat(fd).st_size
            self._segments.append(Segment(path, fd, size, in_memory=False, is_own=False))
            adopted += 1
        return adopted

    def sync(self) -> Callable[[], None]:
        """What forces the records to disk; it blocks, and may run in another thread."""
        copies = [os.dup(segment.fd) for segment in self._segments if segment.is_own]
        with contextlib.suppress(OSError):
            copies.append(os.open(self._folder, os.O_RDONLY))  # it has the files' names

        def force() -> None:
            for fd in copies:
                try:
                    os.fsync(fd)
                except OSError as error:
                    logger.warning("the journal cannot be forced to disk: %s", error)
                finally:
                    os.close(fd)

        return force

    def close(self) -> None:
        """Let go of the files; those with records are the next process's."""
        self._forget_finished()
        for segment in self._segments:
            if segment.in_memory and not segment.num_records:
                _remove(segment)
            else:
                os.close(segment.fd)
        self._segments.clear()

    def _last(self, in_memory: bool) -> Segment | None:
        """The file that takes the next record; `None` if there can be none."""
        last = self._segments[-1] if self._segments else None
        if last is not None and last.is_own and last.in_memory == in_memory and not last.is_full:
            return last
        try:
            make_private_folder(self._folder)
        except OSError as error:
            logger.warning("the journal's folder cannot be made: %s", error)
            return None
        for _ in range(3):  # another process may take a new file for one that was left behind
            self._number += 1
            path = self._folder / f"{self._prefix}-{self._number:08d}{_SUFFIX}"
            fd = _claim(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL)
            if fd is not None:
                segment = Segment(path, fd, 0, in_memory=in_memory, is_own=True)
                self._segments.append(segment)
                self._forget_finished()
                return segment
        return None

    def _forget_finished(self) -> None:
        """Remove files that have no record left; keep the last own one, emptied."""
        for segment in list(self._segments):
            if not segment.in_memory or segment.num_records:
                continue
            if segment is self._segments[-1] and segment.is_own:
                if segment.size and self._cut(segment, 0):
                    segment.size, segment.is_full = 0, False
                continue
            _remove(segment)
            self._segments.remove(segment)

    def _cut(self, segment: Segment, size: int) -> bool:
        try:
            os.ftruncate(segment.fd, size)
        except OSError as error:
            logger.warning("the journal cannot be cut: %s", error)
            return False
        return True


def _claim(path: Path, flags: int) -> int | None:
    """Open a file and own it.

    Returns:
        Its descriptor; `None` if another process owns it, or it cannot be had.
    """
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            logger.warning("a file of the journal cannot be opened: %s", error)
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:  # else the owner before was done with it
            return fd
    except BlockingIOError:
        pass
    except OSError as error:
        logger.warning("a file of the journal cannot be locked: %s", error)
    os.close(fd)
    return None


def _remove(segment: Segment) -> None:
    with contextlib.suppress(FileNotFoundError):
        segment.path.unlink()
    os.close(segment.fd)
