"""The files tool: list, read and search the files below one folder, and no others."""

from __future__ import annotations

import heapq
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from serve_app.config.tools import FilesConfig
from serve_app.errors import ToolFailed, ToolRetry, ToolTimeout
from serve_app.tools.base import Function, ManyFunctions, ToolResult
from serve_app.tools.builtin.below_root import (
    Root,
    Walk,
    kind_of,
    name_of,
    parts_of,
    printable,
    wrong,
)

MAX_PATH_CHARS = 1000
MAX_LINE_CHARS = 1000
PROBE_BYTES = 8192
"""A file with a NUL among its first bytes is binary."""


def _object(required: tuple[str, ...], **properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _path(what: str) -> dict[str, Any]:
    return {"type": "string", "description": what, "maxLength": MAX_PATH_CHARS}


_LINE = {"type": "integer", "minimum": 1, "maximum": 1_000_000_000}


class FilesTool(ManyFunctions):
    """`list`, `read` and `search`, each named after the tool: `docs__list`."""

    config: FilesConfig

    FUNCTIONS: ClassVar[dict[str, tuple[str, dict[str, Any]]]] = {
        "list": (
            "List the files and folders in a folder.",
            _object((), path=_path("The folder, like a/b. Default: the top.")),
        ),
        "read": (
            "Read lines of a text file.",
            _object(
                ("path",),
                path=_path("The file, like a/b.txt."),
                start_line=_LINE | {"description": "First line. Default: 1."},
                num_lines=_LINE | {"description": "Number of lines. Default: 200."},
            ),
        ),
        "search": (
            "Find the lines that contain a text, whatever its case, in a folder's files.",
            _object(
                ("text",),
                text={"type": "string", "minLength": 1, "maxLength": 200},
                path=_path("A folder or file. Default: everything."),
            ),
        ),
    }

    def functions(self) -> tuple[Function, ...]:
        """The three functions."""
        return tuple(
            Function(f"{self.tool_id}__{name}", f"{self.description} {what}".strip(), parameters)
            for name, (what, parameters) in self.FUNCTIONS.items()
        )

    def call(self, function: str, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        """Call one of the functions.

        Args:
            function: Its name.
            arguments: Valid against its parameters.
            deadline_s: Seconds until it stops; a search returns what it found by then.

        Raises:
            ToolRetry: If the path is wrong, or no file or folder that can be read.
            ToolFailed: If the root is not there.
            ToolTimeout: If a list or a file took too long.
        """
        deadline = time.monotonic() + deadline_s
        parts = parts_of(arguments.get("path", ""))
        with self._root() as root:
            match function.removeprefix(f"{self.tool_id}__"):
                case "list":
                    return self._list(root, parts, deadline)
                case "read":
                    first = arguments.get("start_line", 1)
                    return self._read(root, parts, first, arguments.get("num_lines", 200), deadline)
                case "search":
                    return self._search(root, parts, arguments["text"], deadline)
        raise ToolFailed(f"tool {self.tool_id!r} has no function {function!r}")

    @contextmanager
    def _root(self) -> Iterator[Root]:
        try:
            descriptor = os.open(self.config.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            raise ToolFailed(f"the folder of tool {self.tool_id!r} cannot be read") from None
        try:
            yield Root(descriptor, os.fstat(descriptor).st_dev)
        finally:
            os.close(descriptor)

    def _list(self, root: Root, parts: list[str], deadline: float) -> ToolResult:
        most = self.config.max_entries
        count = 0

        def described(folder: int) -> Iterator[tuple[bool, str, str]]:
            nonlocal count
            with os.scandir(folder) as entries:
                for entry in entries:
                    if time.monotonic() > deadline:
                        raise ToolTimeout("the folder could not be listed in time")
                    count += 1
                    is_folder = entry.is_dir(follow_symlinks=False)
                    yield not is_folder, entry.name, _about(entry)

        with root.folder(parts) as folder:
            try:
                first = heapq.nsmallest(most, described(folder))
            except OSError as error:
                raise wrong(parts, error) from None
        lines = [printable(name) + about for _, name, about in first]
        if count > most:
            lines.append(f"[cut: {count} entries, the first {most} are shown]")
        names = [printable(name) for _, name, _ in first]
        return ToolResult(
            self.clip("\n".join(lines) or "[empty folder]"), {"names": names, "entries": count}
        )

    def _read(
        self, root: Root, parts: list[str], first: int, number: int, deadline: float
    ) -> ToolResult:
        with root.file(parts) as descriptor:
            text = self._text(descriptor, parts, deadline)
        if text is None:
            return ToolResult("[a binary file: not shown]", {"binary": True})
        lines = _lines(text)
        shown = lines[first - 1 : first - 1 + number]
        last = first - 1 + len(shown)
        # Room for the note, which must not be cut.
        kept = self._fitting([line.rstrip("\r")[:MAX_LINE_CHARS] for line in shown])
        if len(kept) < len(shown):
            last = first - 1 + len(kept)
        whole = first == 1 and last == len(lines)
        if not kept:
            note = f"[no lines: the file has {len(lines)}]"
        else:
            note = "" if whole else f"[lines {first} to {last} of {len(lines)}]"
        return ToolResult(
            self.clip("\n".join([*kept, note] if note else kept)),
            {"lines": len(lines), "first": first, "last": last},
        )

    def _search(self, root: Root, parts: list[str], text: str, deadline: float) -> ToolResult:
        wanted = text.casefold()
        found: list[dict[str, Any]] = []
        walk = Walk(root, self.config, deadline)
        for path, descriptor in walk.files(parts):
            content = self._text(descriptor, path, deadline)
            for number, line in enumerate(_lines(content or ""), 1):
                if wanted in line.casefold():
                    shown = line.strip()[:MAX_LINE_CHARS]
                    found.append({"path": name_of(path), "line": number, "text": shown})
                if len(found) > self.config.max_entries:
                    walk.stopped = f"the first {len(found) - 1} lines are shown"
                    break
            if walk.stopped:
                break
        lines = [f"{hit['path']}:{hit['line']}: {hit['text']}" for hit in found]
        kept = self._fitting(lines[: self.config.max_entries])
        if len(kept) < len(found) and not walk.stopped:
            walk.stopped = f"the first {len(kept)} of {len(found)} lines are shown"
        if walk.stopped:
            note = [f"[not complete: {walk.stopped}]"]
        else:
            note = [] if kept else ["[not found]"]
        data = {"matches": found[: len(kept)], "complete": not walk.stopped}
        return ToolResult(self.clip("\n".join([*kept, *note])), data)

    def _text(self, descriptor: int, parts: list[str], deadline: float) -> str | None:
        """A file's text; `None` of a binary file.

        Raises:
            ToolRetry: If it is too large.
            ToolTimeout: If it cannot be read in time.
        """
        most = self.config.max_file_bytes
        size = os.fstat(descriptor).st_size
        if size > most:
            raise ToolRetry(f"{name_of(parts)!r} has {size} bytes; at most {most} are read")
        data = bytearray()
        while len(data) <= most and (block := os.read(descriptor, 1 << 20)):
            data += block
            if b"\0" in data[:PROBE_BYTES]:
                return None
            if time.monotonic() > deadline:
                raise ToolTimeout("the file could not be read in time")
        return data.decode(errors="replace")

    def _fitting(self, lines: list[str]) -> list[str]:
        """The lines that fit the result, beside a note."""
        left = self.config.max_result_chars - 64
        for number, line in enumerate(lines):
            left -= len(line) + 1
            if left < 0:
                return lines[:number] or [line[: self.config.max_result_chars - 64]]
        return lines


def _lines(text: str) -> list[str]:
    """Lines as an editor counts them."""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def _about(entry: os.DirEntry[str]) -> str:
    try:
        info = entry.stat(follow_symlinks=False)
    except OSError:
        return ""
    if stat.S_ISDIR(info.st_mode):
        return "/"
    if stat.S_ISREG(info.st_mode):
        return f"  {info.st_size} bytes"
    return f"  [{kind_of(info.st_mode)}]"
