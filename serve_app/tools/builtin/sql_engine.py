"""One query on one database file, inside the sandbox: what is asked, checked, run and cut.

Standard library and duckdb only: the sandbox server loads this file by its path, before it forks
the runs that call `main`. The file is opened read-only. What a query may be is checked on what the
engine itself makes of it: on DuckDB's syntax tree, and by SQLite's authorizer.
"""

from __future__ import annotations

import decimal
import json
import os
import re
import sqlite3
import sys
import zoneinfo
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import duckdb

CATALOG = "data"
"""Under this name DuckDB has the database, whatever the file is called."""

ONLY_SELECT = "only one SELECT statement can be run"
_UTC = zoneinfo.ZoneInfo("UTC")
"""Kept, so that its file is read before the fork."""
_SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "threads": 1,
    "temp_directory": "",
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "python_enable_replacements": False,
}
_duckdb = duckdb.connect(":memory:", config=_SETTINGS)
"""Made before the fork, which spares each run most of a new engine's start. It has no threads."""

_TABLE_FUNCTIONS = frozenset({"range", "generate_series", "unnest", "json_each", "json_tree"})
"""The only ones: others read files, or tell paths and settings."""
_FUNCTIONS_OFF = re.compile(
    r"duckdb_|pragma_|read_|parquet_|pg_(?!typeof$)|inet_|json_serialize_plan$|current_setting$"
    r"|current_query|getvariable$|getenv$|write_log$|sleep_ms$"
)
_TABLES_OFF = re.compile(r"duckdb_|pragma_|pg_|sqlite_temp")
"""What tells paths and settings of DuckDB, or waits."""
_SQLITE_OFF = re.compile(
    r"pragma_|sqlite_(?!master$|schema$)|dbstat$|bytecode$|tables_used$|load_extension$"
    r"|fts3_tokenizer$|readfile$|writefile$|edit$"
)
_SQLITE_BROKEN = (
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
)
_SQLITE_SELECT = re.compile(
    r"(?>\s|--[^\n]*(?:\n|$)|/\*.*?\*/)*+(?:select|with|values)\b", re.IGNORECASE | re.DOTALL
)


class RefusedError(Exception):
    """The query cannot be run; another one could."""


class UnusableError(Exception):
    """The database cannot be used, whatever is asked."""


class SqlReply(NamedTuple):
    """What a query gave."""

    columns: list[str]
    rows: list[list[Any]]
    """Of plain JSON values; other values as text."""
    complete: bool
    """Whether these are all rows."""


def main(query: str, limits: dict[str, int]) -> None:
    """Run a query on the file that the first argument of the program names, and print the reply.

    Args:
        query: What the model wrote; empty: ask for the tables and their columns.
        limits: `max_rows`, `max_cell_chars`, `max_chars` of all rows, `memory_mb`.
    """
    try:
        if len(sys.argv) == 1:
            raise UnusableError("the sandbox does not see it")
        path = sys.argv[1]
        try:
            run = _engine(path)
            reply: dict[str, Any] = run(path, query, limits)._asdict()
        except MemoryError:
            raise RefusedError("the query needs too much memory") from None
        except (RefusedError, UnusableError) as error:
            raise type(error)(str(error).replace(path, "the database")) from None
    except RefusedError as error:
        reply = {"refused": str(error)[:1000]}
    except UnusableError as error:
        reply = {"unusable": str(error)[:1000]}
    print(json.dumps(reply))


def _engine(path: str) -> Callable[[str, str, dict[str, int]], SqlReply]:
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise UnusableError(f"it cannot be read: {error.strerror}") from None
    if head.startswith(b"SQLite format 3\0"):
        return _ask_sqlite
    if head[8:12] == b"DUCK":
        return _ask_duckdb
    raise UnusableError("it is neither a DuckDB nor a SQLite database")


def _ask_duckdb(path: str, query: str, limits: dict[str, int]) -> SqlReply:
    quoted = path.replace("'", "''")
    try:
        _duckdb.execute(f"SET memory_limit = '{limits['memory_mb'] // 2}MiB'")
        _duckdb.execute(f"ATTACH '{quoted}' AS {CATALOG} (READ_ONLY, TYPE duckdb)")
        _duckdb.execute(f"USE {CATALOG}")
        _duckdb.execute("SET enable_external_access = false")
        _duckdb.execute("SET lock_configuration = true")
    except duckdb.Error as error:
        # Its text may name the process that writes to the file.
        busy = "Could not set lock" in str(error)
        raise UnusableError(
            "another program is writing to it" if busy else "it is damaged or not readable"
        ) from None
    if not query:
        return _first_rows(_duckdb.execute(_DUCKDB_TABLES), limits)
    try:
        _check_duckdb(query)
        return _first_rows(_duckdb.execute(query), limits)
    except (duckdb.InternalException, duckdb.FatalException, duckdb.IOException):
        raise UnusableError("it is damaged or not readable") from None
    except duckdb.OutOfMemoryException:
        raise MemoryError from None
    except duckdb.Error as error:
        raise RefusedError(str(error)) from None


_DUCKDB_TABLES = f"""
    SELECT CASE schema_name WHEN 'main' THEN '' ELSE schema_name || '.' END || table_name,
           column_name, data_type
    FROM duckdb_columns() WHERE database_name = '{CATALOG}' AND NOT internal
    ORDER BY schema_name, table_name, column_index"""


def _check_duckdb(query: str) -> None:
    """Let only one SELECT pass, without tables and functions that are off.

    Raises:
        RefusedError: If it is anything else.
        duckdb.Error: If it is no SQL.
    """
    statements = _duckdb.extract_statements(query)
    if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
        raise RefusedError(ONLY_SELECT)
    row = _duckdb.execute("SELECT json_serialize_sql(?)", [query]).fetchone()
    tree = json.loads(row[0]) if row else {"error": True}
    if tree["error"]:
        raise RefusedError(ONLY_SELECT)
    for node in _nodes(tree):
        kind = node.get("type")
        if kind == "SHOW_REF":
            raise RefusedError(ONLY_SELECT)
        called = str(node.get("function_name", "")).lower()
        table = str(node.get("table_name", "")).lower()
        if kind == "TABLE_FUNCTION":
            called = str(node["function"].get("function_name", "")).lower()
            if called not in _TABLE_FUNCTIONS:
                raise RefusedError(f"the table function {called!r} cannot be used here")
        if _FUNCTIONS_OFF.match(called):
            raise RefusedError(f"the function {called!r} cannot be used here")
        if _TABLES_OFF.match(table) or str(node.get("schema_name", "")).lower() == "pg_catalog":
            raise RefusedError(f"the table {table!r} cannot be read here")


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            yield node
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)


def _ask_sqlite(path: str, query: str, limits: dict[str, int]) -> SqlReply:
    try:
        database = _open_sqlite(path, limits)
    except sqlite3.Error:
        raise UnusableError("it is damaged or not readable") from None
    try:
        if not query:
            return _first_rows(database.execute(_SQLITE_TABLES), limits)
        if not _SQLITE_SELECT.match(query):
            raise RefusedError(ONLY_SELECT)
        database.set_authorizer(_authorize)
        return _first_rows(database.execute(query), limits)
    except (sqlite3.Warning, sqlite3.ProgrammingError):
        raise RefusedError(ONLY_SELECT) from None
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _SQLITE_BROKEN:
            raise UnusableError("it is damaged or not readable") from None
        refused = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_AUTH
        what = f"{error}: only tables of the database can be read, with ordinary functions"
        raise RefusedError(what if refused else str(error)) from None


def _open_sqlite(path: str, limits: dict[str, int]) -> sqlite3.Connection:
    with open(path, "rb") as file:
        in_wal_mode = file.read(20)[18:20] == b"\2\2"
    # In this mode a reader makes files beside the database, unless it is told that nobody writes.
    alone = in_wal_mode and not os.path.exists(f"{path}-wal")
    name = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    database = sqlite3.connect(f"file:{name}?mode=ro{'&immutable=1' * alone}", uri=True, timeout=1)
    database.text_factory = lambda text: text.decode(errors="replace")
    for pragma in (
        "trusted_schema = OFF",
        "cell_size_check = ON",
        "temp_store = MEMORY",
        f"hard_heap_limit = {limits['memory_mb'] << 19}",
        "schema_version",
    ):
        database.execute(f"PRAGMA {pragma}").fetchall()
    return database


_SQLITE_TABLES = """
    SELECT t.name, c.name, c.type FROM sqlite_master t, pragma_table_info(t.name) c
    WHERE t.type IN ('table', 'view') AND t.name NOT LIKE 'sqlite\\_%' ESCAPE '\\'
    ORDER BY t.name, c.cid"""


def _authorize(
    action: int, first: str | None, second: str | None, _database: str | None, _view: str | None
) -> int:
    name = {sqlite3.SQLITE_READ: first, sqlite3.SQLITE_FUNCTION: second}.get(action, "")
    allowed = (
        sqlite3.SQLITE_SELECT,
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_FUNCTION,
        sqlite3.SQLITE_RECURSIVE,
    )
    is_fine = action in allowed and not _SQLITE_OFF.match((name or "").lower())
    return sqlite3.SQLITE_OK if is_fine else sqlite3.SQLITE_DENY


def _first_rows(result: Any, limits: dict[str, int]) -> SqlReply:
    """The rows that fit the limits, one after another: a result may be endless."""
    if result.description is None:
        raise RefusedError(ONLY_SELECT)
    most_chars = limits["max_cell_chars"]
    columns = [str(column[0])[:most_chars] for column in result.description]
    rows: list[list[Any]] = []
    left_chars = limits["max_chars"] - sum(len(column) for column in columns)
    while (row := result.fetchone()) is not None:
        plain = [_plain(value, most_chars) for value in row]
        left_chars -= sum(len(str(value)) + 3 for value in plain)
        if len(rows) == limits["max_rows"] or left_chars < 0:
            return SqlReply(columns, rows, complete=False)
        rows.append(plain)
    return SqlReply(columns, rows, complete=True)


def _plain(value: object, max_chars: int) -> object:
    """A value as JSON has it; a text that is too long is cut and ends with `…`."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else str(value)  # JSON has no infinity and no NaN
    if isinstance(value, bytes | bytearray | memoryview):
        return f"[{len(value)} bytes]"
    if isinstance(value, decimal.Decimal):
        return format(value, "f")
    if isinstance(value, list | tuple | dict):
        value = json.dumps(value, default=str, ensure_ascii=False)
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


def _rehearse() -> None:
    """Have DuckDB make what it makes at first use, before the fork."""
    query = """
        SELECT a.k, count(*) AS n, sum(a.v), avg(a.v), min(a.s), max(b.d)
        FROM t a JOIN t b USING (k)
        WHERE a.s LIKE '%x%' AND a.v > 1 AND a.d >= DATE '2020-01-01' OR lower(a.s) IN ('x', 'y')
        GROUP BY a.k HAVING count(*) > 0 ORDER BY n DESC LIMIT 3"""
    _duckdb.execute("SET TimeZone = 'UTC'")
    _duckdb.execute(f"ATTACH ':memory:' AS {CATALOG}")
    _duckdb.execute(f"USE {CATALOG}")
    _duckdb.execute("CREATE TABLE t AS SELECT 1 AS k, 2.5 AS v, 'x' AS s, DATE '2020-01-02' AS d")
    for statement in (query, "SELECT * FROM t WHERE k = 1"):
        _check_duckdb(statement)
        _first_rows(
            _duckdb.execute(statement), {"max_rows": 9, "max_cell_chars": 9, "max_chars": 99}
        )
    _duckdb.execute("USE memory")
    _duckdb.execute(f"DETACH {CATALOG}")


_rehearse()
