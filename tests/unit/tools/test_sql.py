"""The SQL tool: rows as a table, one SELECT and nothing else, everything bounded, no path told."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pytest

from benchmarks.sandbox_programs import start_counted
from serve_app.config.tools import SqlConfig
from serve_app.errors import ToolFailed, ToolRetry, ToolTimeout
from serve_app.tools.builtin import sql
from serve_app.tools.builtin.sql import ENGINE, PACKAGES, SqlTool, describe
from serve_app.tools.sandbox.client import SandboxServer, sandbox_server
from tests.sandboxes import wait_until

ENGINES = ("duckdb", "sqlite")
DEADLINE_S = 60.0
"""For what should end by itself, on a slow machine too."""
SETUP = (
    "CREATE TABLE items (id INTEGER PRIMARY KEY, name TEXT, price DECIMAL(10, 2))",
    "CREATE TABLE orders (item INTEGER, placed DATE, note BLOB)",
    "INSERT INTO items VALUES (1, 'tea', 2.5), (2, 'a|b', NULL), (3, 'line\none', 10)",
    "INSERT INTO orders VALUES (1, '2026-01-31', NULL), (1, '2026-02-01', NULL)",
    "CREATE VIEW dear AS SELECT name FROM items WHERE price > 5",
)


def connect(path: Path) -> Any:
    return duckdb.connect(str(path)) if path.suffix == ".duckdb" else sqlite3.connect(path)


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small shop for each engine."""
    folder = tmp_path_factory.mktemp("databases")
    made = {}
    for engine in ENGINES:
        made[engine] = folder / f"shop.{engine}"
        database = connect(made[engine])
        for statement in SETUP:
            database.execute(statement)
        database.commit()
        database.close()
    return made


@pytest.fixture(params=ENGINES)
def shop(request: pytest.FixtureRequest, databases: dict[str, Path]) -> SqlTool:
    return make(databases[request.param])


@pytest.fixture(scope="module", autouse=True)
def _server_ends() -> Iterator[None]:
    yield
    sandbox_server(PACKAGES, str(ENGINE)).close()


def make(database: Path, **settings: Any) -> SqlTool:
    return SqlTool(SqlConfig(tool_id="shop", database=database, **settings))


def ask(tool: SqlTool, query: str, deadline_s: float = DEADLINE_S) -> str:
    return tool.run({"query": query}, deadline_s).text


def refusal(tool: SqlTool, query: str) -> str:
    """Why a query is refused; the reason names no path of ours."""
    with pytest.raises(ToolRetry) as refused:
        ask(tool, query)
    message = str(refused.value)
    for path in (str(tool.config.database), str(tool.config.database.parent), "/shown"):
        assert path not in message
    return message


def test_rows_are_a_header_and_a_line_each(shop: SqlTool) -> None:
    result = shop.run({"query": "SELECT id, name FROM items ORDER BY id"}, DEADLINE_S)
    assert result.text == "id | name\n1 | tea\n2 | a\\|b\n3 | line\\none"
    assert result.data == {
        "columns": ["id", "name"],
        "rows": [[1, "tea"], [2, "a|b"], [3, "line\none"]],
        "complete": True,
    }


@pytest.mark.parametrize(
    "query",
    [
        "select 1 as n",
        "SELECT 1 AS n;",
        "WITH a AS (SELECT 1 AS n) SELECT n FROM a",
        "-- ; DROP TABLE items\nSELECT 1 AS n /* ; DROP TABLE items */ -- ;",
        "(SELECT 1 AS n)",
        "SELECT count(*) AS n FROM dear",
    ],
)
def test_a_select_in_any_dress_runs(shop: SqlTool, query: str) -> None:
    if query.startswith("(") and shop.config.database.suffix == ".sqlite":
        pytest.skip("SQLite knows no statement in parentheses")
    assert ask(shop, query) == "n\n1"


def test_values_of_all_kinds_are_shown(databases: dict[str, Path]) -> None:
    assert ask(
        make(databases["duckdb"]),
        """SELECT NULL AS a, 1.50::DECIMAL(9, 2) AS b, DATE '2026-01-31' AS c, true AS d,
        TIMESTAMPTZ '2026-01-31 12:00:00+02' AS e, '\\xAA\\x00'::BLOB AS f, [1, 2] AS g,
        {'k': 'v'} AS h, 'nan'::DOUBLE AS i, INTERVAL 3 DAY AS j, 0.5::DOUBLE AS k,
        170141183460469231731687303715884105727::HUGEINT AS l, 1 AS m, 2 AS m""",
    ).splitlines() == [
        "a | b | c | d | e | f | g | h | i | j | k | l | m | m",
        "NULL | 1.50 | 2026-01-31 | True | 2026-01-31 10:00:00+00:00 | [2 bytes] | [1, 2] | "
        '{"k": "v"} | nan | 3 days, 0:00:00 | 0.5 | '
        "170141183460469231731687303715884105727 | 1 | 2",
    ]
    assert (
        ask(make(databases["sqlite"]), "SELECT NULL AS a, x'AA00' AS b, 1.5 AS c, 9e999 AS d")
        == "a | b | c | d\nNULL | [2 bytes] | 1.5 | inf"
    )


def test_text_that_is_no_utf8_is_shown_with_marks(databases: dict[str, Path]) -> None:
    text = ask(make(databases["sqlite"]), "SELECT CAST(x'61ff62' AS TEXT) AS t")
    assert text == "t\na\ufffdb"


def test_no_rows_and_cut_rows_and_cells_say_so(shop: SqlTool) -> None:
    assert ask(shop, "SELECT id FROM items WHERE id > 9") == "id\n[no rows]"
    few = make(shop.config.database, max_rows=2, max_cell_chars=8)
    query = "SELECT 'a very long text' AS t FROM items"
    assert ask(few, query) == "t\na very …\na very …\n[cut: only the first 2 rows are shown]"
    short = make(shop.config.database, max_result_chars=128)
    text = ask(short, "SELECT 'a very long text', a.id FROM items a, orders, items c")
    assert text.endswith("rows are shown]")
    assert len(text) <= 128


def test_the_description_names_tables_columns_and_types(shop: SqlTool) -> None:
    (function,) = shop.functions()
    assert function.name == "shop"
    lines = function.description.splitlines()
    assert lines[0] == "Run one SELECT statement on a database and return its rows."
    assert "Tables:" in lines
    (items,) = (line for line in lines if line.startswith("items"))
    assert items.replace("VARCHAR", "TEXT").replace(", 2", ",2") == (
        "items(id INTEGER, name TEXT, price DECIMAL(10,2))"
    )
    assert any(line.startswith("dear(name ") for line in lines)
    assert str(shop.config.database.parent) not in function.description


def test_a_long_schema_is_cut_and_none_is_read_where_none_is_wanted(shop: SqlTool) -> None:
    assert make(shop.config.database, max_schema_chars=0).functions()[0].description == (
        shop.description
    )
    columns = [[f"table_{number}", "id", "INTEGER"] for number in range(100)]
    text = describe(columns, 200)
    assert len(text) <= 200
    assert text.startswith("Tables:\ntable_0(id INTEGER)\n")
    assert text.endswith(" more tables]")


EVERYWHERE = [
    "DROP TABLE items",
    "DELETE FROM items",
    "UPDATE items SET name = 'x'",
    "INSERT INTO items VALUES (9, 'x', 1)",
    "CREATE TABLE x (a INTEGER)",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP TABLE items",
    "SELECT 1 /* a */ ; -- b\n DROP TABLE items",
    "/* SELECT */ DROP TABLE items",
    "SELECT 1;\0DROP TABLE items",
    "WITH a AS (SELECT 1) DELETE FROM items",
    "ATTACH '/etc/passwd' AS a",
    "DETACH data",
    "COPY items TO 'x.csv'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "EXPORT DATABASE 'x'",
    "PRAGMA database_list",
    "SET threads = 4",
    "CALL duckdb_databases()",
    "EXPLAIN SELECT 1",
    "VACUUM",
    "BEGIN",
    "-- nothing",
    "/**/" * 5000 + "DROP TABLE items",
    " ",
    "SELECT * FROM pragma_database_list",
    "SELECT * FROM duckdb_databases()",
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT getenv('HOME')",
    "SELECT nothing FROM items",
    "SELEC 1",
]
ON_DUCKDB = [
    "DESCRIBE items",
    "SHOW DATABASES",
    "SELECT * FROM (SHOW ALL TABLES)",
    "WITH a AS (INSERT INTO items VALUES (9, 'x', 1) RETURNING id) SELECT * FROM a",
    "SELECT * FROM duckdb_databases",
    'SELECT * FROM "DuckDB_Databases"()',
    "SELECT * FROM system.main.duckdb_settings()",
    "SELECT (SELECT path FROM duckdb_databases() LIMIT 1) FROM items",
    "SELECT * FROM query('SELECT path FROM duckdb_databases()')",
    "SELECT * FROM json_execute_serialized_sql('{}')",
    "SELECT json_serialize_plan('SELECT * FROM duckdb_databases()')",
    "SELECT * FROM pg_catalog.pg_settings",
    "SELECT * FROM pg_settings",
    "SELECT current_setting('temp_directory')",
    "SELECT 'threads'.current_setting()",
    "SELECT list_transform([1], x -> current_setting('threads'))",
    "SELECT * FROM items WHERE name = getvariable('x')",
    "SELECT * FROM read_text('/proc/self/environ')",
    "SELECT * FROM glob('*')",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM 'x.parquet'",
    "SELECT pg_sleep(1)",
    "FROM sniff_csv('/etc/passwd')",
    "SELECT $1",
]
ON_SQLITE = [
    "SELECT * FROM pragma_database_list()",
    "SELECT file FROM (SELECT * FROM pragma_database_list)",
    "SELECT * FROM pragma_table_info('items')",
    "SELECT load_extension('x')",
    "SELECT readfile('/etc/passwd')",
    "SELECT writefile('x', 'y')",
    "SELECT fts3_tokenizer('simple')",
    "SELECT sqlite_compileoption_get(0)",
    "SELECT * FROM dbstat",
    "SELECT * FROM sqlite_dbpage",
    "WITH a AS (SELECT 1) INSERT INTO items SELECT 9, 'x', 1",
    "REPLACE INTO items VALUES (1, 'x', 1)",
    "SELECT ?",
]


@pytest.mark.parametrize(
    ("engine", "query"),
    [
        *((engine, query) for engine in ENGINES for query in EVERYWHERE),
        *(("duckdb", query) for query in ON_DUCKDB),
        *(("sqlite", query) for query in ON_SQLITE),
    ],
)
def test_all_but_one_plain_select_is_refused_and_changes_nothing(
    databases: dict[str, Path], engine: str, query: str
) -> None:
    path = databases[engine]
    before = hashlib.sha256(path.read_bytes()).digest()
    assert refusal(make(path), query)
    assert hashlib.sha256(path.read_bytes()).digest() == before
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["shop.duckdb", "shop.sqlite"]


def test_an_error_of_the_engine_tells_the_model_what_to_mend(shop: SqlTool) -> None:
    assert "nme" in refusal(shop, "SELECT nme FROM items")
    assert "itms" in refusal(shop, "SELECT name FROM itms")


ENDLESS = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r)"


@pytest.mark.parametrize(
    "query",
    [
        f"{ENDLESS} SELECT count(*) FROM r",
        f"{ENDLESS} SELECT count(*) FROM r a, r b WHERE a.n = b.n + 1",
        f"WITH many AS ({ENDLESS} SELECT n FROM r LIMIT 3000) "
        "SELECT count(*) FROM many a, many b, many c, many d WHERE a.n + b.n = c.n * d.n",
    ],
    ids=("recursion", "two recursions", "cross join"),
)
def test_a_query_without_end_is_stopped(shop: SqlTool, query: str) -> None:
    with pytest.raises((ToolTimeout, ToolRetry), match=r"did not finish in 1\.5 s|memory"):
        ask(shop, query, deadline_s=1.5)


def test_an_endless_result_is_cut(shop: SqlTool) -> None:
    text = ask(make(shop.config.database, max_rows=3), f"{ENDLESS} SELECT n FROM r")
    assert text == "n\n1\n2\n3\n[cut: only the first 3 rows are shown]"


@pytest.mark.parametrize(
    ("engine", "query"),
    [
        ("duckdb", "SELECT repeat('x', 1000000000) AS t"),
        ("duckdb", "SELECT length(string_agg(repeat('x', 1000), '')) FROM range(1000000)"),
        ("duckdb", "SELECT list(repeat('x', 1000) || i) FROM range(1000000) t(i)"),
        ("sqlite", "SELECT hex(zeroblob(400000000)) AS t"),
        ("sqlite", "SELECT length(replace(hex(zeroblob(9000000)), '0', 'xxxx')) AS t"),
    ],
)
def test_too_much_memory_is_refused(databases: dict[str, Path], engine: str, query: str) -> None:
    assert "memory" in refusal(make(databases[engine], memory_mb=64), query)


def test_a_long_text_that_fits_the_memory_is_cut(databases: dict[str, Path]) -> None:
    text = ask(make(databases["duckdb"]), "SELECT repeat('x', 10000000) AS t")
    assert text == f"t\n{'x' * 199}…"


def failure(tool: SqlTool, query: str = "SELECT 1") -> str:
    """Why the database cannot be used; the reason names no path."""
    with pytest.raises(ToolFailed) as failed:
        ask(tool, query)
    message = str(failed.value)
    assert "/" not in message
    return message


def test_what_is_no_database_is_said(tmp_path: Path) -> None:
    assert "no such file" in failure(make(tmp_path / "missing.db"))
    assert "no such file" in failure(make(tmp_path))
    (tmp_path / "loop.db").symlink_to("loop.db")
    assert "no such file" in failure(make(tmp_path / "loop.db"))
    os.mkfifo(tmp_path / "fifo.db")
    assert "no such file" in failure(make(tmp_path / "fifo.db"))
    for content in (b"", b"id,name\n1,tea\n"):
        (tmp_path / "text.db").write_bytes(content)
        assert "neither a DuckDB nor a SQLite" in failure(make(tmp_path / "text.db"))


def test_a_damaged_file_is_said(shop: SqlTool, tmp_path: Path) -> None:
    content = shop.config.database.read_bytes()
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(content[:64] + b"\xff" * 20_000)
    assert "damaged" in failure(make(damaged), "SELECT * FROM items")
    assert make(damaged).functions()[0].description == shop.description


def test_a_file_that_the_sandbox_s_user_may_not_read_is_said(shop: SqlTool, tmp_path: Path) -> None:
    closed = tmp_path / "closed.db"
    shutil.copy(shop.config.database, closed)
    closed.chmod(0)
    assert "cannot be read: Permission denied" in failure(make(closed))


def test_a_link_to_a_database_is_followed(shop: SqlTool, tmp_path: Path) -> None:
    (tmp_path / "today's").symlink_to(shop.config.database)
    assert ask(make(tmp_path / "today's"), "SELECT 1 AS n") == "n\n1"


def test_odd_names_of_files_are_names(shop: SqlTool, tmp_path: Path) -> None:
    odd = tmp_path / "a'b;c?d#e%20 f"
    shutil.copy(shop.config.database, odd)
    assert ask(make(odd), "SELECT id FROM items LIMIT 1") == "id\n1"


def test_a_file_replaced_while_a_query_runs_harms_neither_that_nor_the_next(
    shop: SqlTool, tmp_path: Path
) -> None:
    path = tmp_path / f"live{shop.config.database.suffix}"
    shutil.copy(shop.config.database, path)
    new = tmp_path / f"new{path.suffix}"
    shutil.copy(path, new)
    database = connect(new)
    database.execute("INSERT INTO items VALUES (4, 'new', 1)")
    database.commit()
    database.close()
    tool = make(path)
    count = "SELECT count(*) AS n FROM items"
    assert ask(tool, count) == "n\n3"
    answers: list[str] = []
    slow = (
        f"WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 20000) {count}"
    )
    thread = threading.Thread(target=lambda: answers.append(ask(tool, slow + ", r WHERE r.n = 1")))
    server = sandbox_server(PACKAGES, str(ENGINE))
    thread.start()
    wait_until(lambda: bool(answers or psutil.Process(server.pid).children(recursive=True)))
    new.rename(path)
    thread.join()
    assert answers in (["n\n3"], ["n\n4"])
    assert ask(tool, count) == "n\n4"


def test_what_sqlite_has_not_yet_put_into_the_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "live.db"
    writer = sqlite3.connect(path)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("CREATE TABLE t (a INTEGER)")
    writer.execute("INSERT INTO t VALUES (1)")
    writer.commit()
    assert (tmp_path / "live.db-wal").stat().st_size > 0
    for name in tmp_path.iterdir():
        name.chmod(0o644)
    assert ask(make(path), "SELECT a FROM t") == "a\n1"
    writer.close()
    assert not (tmp_path / "live.db-wal").exists()
    assert ask(make(path), "SELECT a FROM t") == "a\n1"


def test_what_duckdb_has_not_yet_put_into_the_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "live.duckdb"
    code = f"""
import duckdb, os
database = duckdb.connect({str(path)!r})
database.execute("CREATE TABLE t (a INTEGER)")
database.execute("CHECKPOINT")
database.execute("INSERT INTO t VALUES (1)")
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert (tmp_path / "live.duckdb.wal").exists()
    assert ask(make(path), "SELECT a FROM t") == "a\n1"


def test_a_duckdb_file_that_somebody_writes_to_is_said(tmp_path: Path) -> None:
    path = tmp_path / "live.duckdb"
    with duckdb.connect(str(path)) as writer:
        writer.execute("CREATE TABLE t (a INTEGER)")
        assert "another program is writing" in failure(make(path))
    assert ask(make(path), "SELECT count(*) AS n FROM t") == "n\n0"


def test_without_a_root_of_its_own_the_sandbox_still_tells_no_path(
    databases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = SandboxServer(PACKAGES, str(ENGINE))
    monkeypatch.setattr(sql, "sandbox_server", lambda *_: server)
    # Pytest's own folders are private, also to a sandbox's user.
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        try:
            start_counted(server)
            for path in databases.values():
                tool = make(Path(shutil.copy(path, name)))
                assert ask(tool, "SELECT id FROM items LIMIT 1") == "id\n1"
                refusal(tool, "SELECT * FROM duckdb_databases()")
                refusal(tool, f"SELECT * FROM read_text('{path}') x")
                refusal(tool, "SELECT * FROM nothing")
        finally:
            server.close()
