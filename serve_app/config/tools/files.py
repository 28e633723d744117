"""Settings of the tool that looks into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from serve_app.config.tools.base import MAX_DESCRIPTION_CHARS, ToolSettings


class FilesConfig(ToolSettings):
    """Lists, reads and searches the files below one folder, read-only; links are not followed."""

    type: Literal["files"] = "files"
    kind: Literal["function"] = "function"
    description: str = Field(
        default="A folder of files.",
        max_length=MAX_DESCRIPTION_CHARS,
    )
    """What is in the folder; part of each function's description."""

    root: Path
    """The folder. Everything below it can be read, also what begins with a dot; not another file
    system that is mounted there."""

    max_entries: int = Field(default=200, ge=1, le=10_000)
    """Entries that a list shows, and lines that a search finds."""

    max_file_bytes: int = Field(default=8 << 20, ge=1, le=64 << 20)
    """Larger files are not read."""

    max_search_bytes: int = Field(default=64 << 20, ge=1, le=1 << 30)
    """Bytes that one search reads; that it read no more is said."""

    max_search_entries: int = Field(default=20_000, ge=1, le=1_000_000)
    """Files and folders that one search looks at; that it looked at no more is said."""

    @field_validator("root")
    @classmethod
    def _is_a_part(cls, root: Path) -> Path:
        if root == Path(root.root):
            raise ValueError("root: the whole disk is no folder to show")
        return root
