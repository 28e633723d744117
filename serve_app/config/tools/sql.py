"""Settings of the tool that asks a database file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from serve_app.config.tools.base import MAX_DESCRIPTION_CHARS, ToolSettings


class SqlConfig(ToolSettings):
    """Answers SELECT statements from a DuckDB or SQLite file, read-only and in the sandbox."""

    type: Literal["sql"] = "sql"
    kind: Literal["function"] = "function"
    description: str = Field(
        default="Run one SELECT statement on a database and return its rows.",
        max_length=MAX_DESCRIPTION_CHARS,
    )
    """What is in the database; models also get its tables, columns and their types."""

    database: Path
    """The file; its first bytes say which engine reads it. Where the server runs as root, others
    must be allowed to read the file."""

    max_rows: int = Field(default=50, ge=1, le=10_000)
    """Rows returned; that there are more is said."""

    max_cell_chars: int = Field(default=200, ge=8, le=65536)
    """Longer texts in a row are cut."""

    max_schema_chars: int = Field(default=4000, ge=0, le=65536)
    """Longest list of tables and columns in the description; 0: none."""

    memory_mb: int = Field(default=256, ge=64, le=65536)
    """Memory of one query, in MiB."""

    timeout_s: float = Field(default=5.0, gt=0, le=600)
    """Longest run of one call, in seconds; a caller's shorter deadline wins."""

    num_cpus: float = Field(default=0.25, ge=0)
    """CPUs each running call reserves in Ray."""
