"""The SQL tool: one SELECT on one database file, run in the sandbox, its rows as a small table.

The file is the only one of ours that the sandboxed process can read; what a query may be is checked
there too (`sql_engine`), beside the engine. Nothing here parses SQL.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from serve_app.config.tools import SqlConfig
from serve_app.errors import ToolFailed, ToolRetry, ToolTimeout
from serve_app.tools.base import Function, Tool, ToolResult
from serve_app.tools.sandbox.client import SandboxLimits, SandboxServer, sandbox_server

logger = logging.getLogger(__name__)

ENGINE = Path(__file__).with_name("sql_engine.py")
PACKAGES = ("duckdb",)
BESIDE = ("-wal", "-shm", "-journal", ".wal")
"""Ends of the names of the files that an engine keeps beside a database."""
MAX_QUERY_CHARS = 20_000
SCHEMA_S = 10.0
"""How long the tool waits for the tables when it is made."""
SCHEMA_ROWS = 5000
_ESCAPES = str.maketrans({"\\": "\\\\", "|": "\\|", "\n": "\\n", "\r": "\\r", "\t": "\\t"})


class SqlTool(Tool):
    """Runs `query` and returns a header line and a line for each row."""

    config: SqlConfig
    reads_functions: ClassVar[bool] = True

    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "query": {
                "type": "string",
                "description": "One SELECT statement.",
                "minLength": 1,
                "maxLength": MAX_QUERY_CHARS,
            }
        },
        "required": ["query"],
        "additionalProperties": False,
    }

    def functions(self) -> tuple[Function, ...]:
        """The query, described with the tables that it can ask."""
        described = "\n\n".join(part for part in (self.description, self._schema) if part)
        return (replace(super().functions()[0], description=described),)

    @cached_property
    def _schema(self) -> str:
        """The tables and their columns; empty where they cannot be read, as the calls will say."""
        if self.config.max_schema_chars == 0:
            return ""
        server = SandboxServer(PACKAGES, str(ENGINE))
        try:
            limits = {"max_rows": SCHEMA_ROWS, "max_chars": 1 << 20}
            reply = self._ask(server, "", limits, SCHEMA_S)
        except (ToolFailed, ToolRetry) as error:
            logger.warning("tool %s: no tables in its description: %s", self.tool_id, error)
            return ""
        finally:
            server.close()
        return describe(reply["rows"], self.config.max_schema_chars)

    def warm(self) -> None:
        """Start the sandbox server."""
        sandbox_server(PACKAGES, str(ENGINE)).start()

    def run(self, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        """Run `query`.

        Args:
            arguments: `query`.
            deadline_s: Seconds until it is stopped.

        Returns:
            The rows as text; `data` has `columns`, `rows` of JSON values, and `complete`.

        Raises:
            ToolRetry: If the query is wrong, not allowed, or needs too much memory.
            ToolTimeout: If it ran out of time.
            ToolFailed: If the database or the sandbox cannot be used.
        """
        config = self.config
        limits = {"max_rows": config.max_rows, "max_chars": config.max_result_chars - 64}
        server = sandbox_server(PACKAGES, str(ENGINE))
        reply = self._ask(server, arguments["query"], limits, deadline_s)
        return ToolResult(self.clip(table(reply)), reply)

    def _ask(
        self, server: SandboxServer, query: str, limits: dict[str, int], deadline_s: float
    ) -> dict[str, Any]:
        config = self.config
        limits = limits | {"max_cell_chars": config.max_cell_chars, "memory_mb": config.memory_mb}
        result = server.run(
            f"import {ENGINE.stem}\n{ENGINE.stem}.main({query!r}, {limits!r})",
            SandboxLimits(
                memory_mb=config.memory_mb,
                cpu_seconds=math.ceil(deadline_s),
                max_output_bytes=8 * limits["max_chars"] + (1 << 16),
                max_disk_bytes=0,
            ),
            deadline_s,
            readable=self._files(),
        )
        if result.timed_out:
            raise ToolTimeout(f"the query did not finish in {deadline_s:.3g} s")
        if not result.ok:
            # What a run that ended in disorder printed may be anything.
            raise ToolRetry("the query needs too much memory, or crashed the database engine")
        reply: dict[str, Any] = json.loads(result.stdout)
        if "refused" in reply:
            raise ToolRetry(reply["refused"])
        if "unusable" in reply:
            raise ToolFailed(f"the database of tool {self.tool_id!r}: {reply['unusable']}")
        return reply

    def _files(self) -> list[str]:
        """The database and what its engine keeps beside it, found anew: a file may be replaced."""
        try:
            database = self.config.database.resolve(strict=True)
            is_file = database.is_file()
        except (OSError, RuntimeError):  # a loop of links
            is_file = False
        if not is_file:
            raise ToolFailed(f"the database of tool {self.tool_id!r}: there is no such file")
        beside = (database.with_name(database.name + end) for end in BESIDE)
        return [str(path) for path in (database, *beside) if path.is_file()]


def table(reply: dict[str, Any]) -> str:
    """Show rows to a model: a header and a line for each row, cells apart by ` | `.

    Args:
        reply: `columns`, `rows` and `complete`.

    Returns:
        The lines. A cell's own `|`, line ends and backslashes are escaped by a backslash.
    """
    rows = reply["rows"]
    lines = [" | ".join(_cell(value) for value in row) for row in (reply["columns"], *rows)]
    if not reply["complete"]:
        lines.append(f"[cut: only the first {len(rows)} rows are shown]")
    elif not rows:
        lines.append("[no rows]")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "NULL"
    return str(value).translate(_ESCAPES)


def describe(columns: list[list[Any]], max_chars: int) -> str:
    """List tables for a model, one line each: `orders(id INTEGER, placed DATE)`.

    Args:
        columns: Rows of table, column and type, in order.
        max_chars: Of all lines together; tables that do not fit are left out, and that is said.
    """
    tables: dict[str, list[str]] = {}
    for name, column, kind in columns:
        tables.setdefault(_cell(name), []).append(f"{_cell(column)} {_cell(kind)}".strip())
    lines = ["Tables:"]
    left = max_chars - 50
    for name, described in tables.items():
        line = f"{name}({', '.join(described)})"
        left -= len(line) + 1
        if left < 0:
            lines.append(f"[and {len(tables) - len(lines) + 1} more tables]")
            break
        lines.append(line)
    return "\n".join(lines)
