"""What an earlier version left is still read: a store of each earlier schema."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import create_engine, text

from serve_app.store import Store, find_key, hash_key, newest_pool, read_profile, serving_policies
from serve_app.store.migrations import configuration, newest_revision

KEY = "sk-of-before"
ENCODER = "all-minilm-l6-v2"


def store_of(revision: str, path: Path) -> None:
    """A SQLite file as the version with this schema left it: a key, a question and its outcome."""
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        command.upgrade(configuration(connection), revision)
        connection.execute(
            text(
                "INSERT INTO api_keys (key_id, key_hash, name, scopes, created_unix_s) "
                "VALUES ('key_1', :hash, 'a team', 'chat', 1.0)"
            ),
            {"hash": hash_key(KEY)},
        )
        connection.execute(
            text("INSERT INTO profile_questions VALUES ('q', 'why?', 'd', 'train', :encoder, :v)"),
            {"encoder": ENCODER, "v": b"\0" * 16},
        )
        connection.execute(
            text(
                "INSERT INTO profile_outcomes (question_key, model_id, tool_id, fingerprint, "
                "score, prompt_tokens, completion_tokens, cost_usd, seconds, propensity, "
                "tool_errors, created_unix_s) "
                "VALUES ('q', 'm', 't', 'f', 0.5, 1, 2, 0.1, 3.0, 1.0, 0, 1.0)"
            )
        )
    engine.dispose()


@pytest.mark.parametrize(
    "revision", ["0001", "0002", "0003", "0004", "0005", "0006", "0007", "0008", "0009", "0010"]
)
async def test_a_store_of_an_earlier_schema_is_read_whole(revision: str, tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    store_of(revision, path)
    store = await Store.open(f"sqlite+aiosqlite:///{path}")
    try:
        key = await find_key(store, hash_key(KEY))
        questions, outcomes = await read_profile(store, ENCODER, "train")
        assert key is not None
        assert (key.key_id, key.scopes) == ("key_1", frozenset({"chat"}))
        assert [question.query for question in questions] == ["why?"]
        assert [(str(outcome.pair), outcome.score) for outcome in outcomes] == [("m@t", 0.5)]
        assert await serving_policies(store) == []
        assert await newest_pool(store) is None
    finally:
        await store.close()


async def test_a_pool_from_before_there_were_patterns_has_none(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        command.upgrade(configuration(connection), "0004")
        connection.execute(
            text(
                "INSERT INTO pool_revisions (revision, models, tools, from_file, change, "
                "created_unix_s) VALUES (1, '[]', '[]', '{}', 'the configuration', 1.0)"
            )
        )
    engine.dispose()
    store = await Store.open(f"sqlite+aiosqlite:///{path}")
    try:
        newest = await newest_pool(store)
    finally:
        await store.close()
    assert newest is not None
    assert newest.patterns == ()


def test_the_newest_step_is_the_last_of_the_chain() -> None:
    assert newest_revision() == ScriptDirectory.from_config(configuration()).get_current_head()


async def test_a_store_of_a_later_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    store_of("head", path)
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(CommandError):
        await Store.open(f"sqlite+aiosqlite:///{path}")


LAZY = """
import asyncio, sys
from serve_app.gateway.deployment import Gateway
from serve_app.pool.controller import PoolController
from serve_app.store import Store

async def open_it():
    await (await Store.open(sys.argv[1])).close()

asyncio.run(open_it())
print(*sorted({"alembic", "mcp", "mcp_types"} & set(sys.modules)))
"""


def test_a_gateway_on_a_store_of_its_schema_loads_no_migrations_and_no_mcp(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path}/store.db"
    loaded = [
        subprocess.run(
            [sys.executable, "-c", LAZY, url], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert loaded == [["alembic"], []]  # the first makes the schema
