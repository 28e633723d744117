"""The connection to the store: engine, schema, and the translation of driver errors.

Everything specific to one database is in `_connect_sqlite`; queries elsewhere are portable SQL.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Self

from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from serve_app.config import DATA_FOLDER
from serve_app.errors import ConfigError, StoreAway, StoreError
from serve_app.private_files import make_private_file, make_private_folder, tighten
from serve_app.store.migrations import migrate

logger = logging.getLogger(__name__)

_SCHEMA_TRIES = 5
_SCHEMA_PAUSE_S = 1.0
"""A store that could not be opened is left alone this long."""
_SQLITE_BUSY_TIMEOUT_MS = 5_000
_CONNECT_TIMEOUT_S = 5.0
_COMMAND_TIMEOUT_S = 60.0
_TRANSIENT_SQLSTATES = ("08", "25006", "40", "53", "57")
"""Prefixes of PostgreSQL's codes: no connection, a standby, a deadlock, no room, going down."""
_AWAY = "the store is not available; try again later"


class Store:
    """An open store. Safe to share between the tasks of one event loop.

    Invariants:
        - A `begin()` block is one transaction: all of it is kept, or nothing.
        - What a finished `begin()` block wrote survives the death of this process.
    """

    def __init__(self, engine: AsyncEngine, file: Path | None) -> None:
        """Wrap an engine; use `Store.open`, which also makes the schema."""
        self._engine = engine
        self._file = file
        """Of an SQLite database; made where it is missing, for this user only."""
        self._has_schema = False
        self._opening = asyncio.Lock()
        self._next_try_s = 0.0

    @classmethod
    async def open(cls, url: str, *, must_answer: bool = True) -> Self:
        """Connect, and bring the schema up to this version.

        Args:
            url: A SQLAlchemy URL with an async driver, for example `sqlite+aiosqlite:////var/lib/atlas/atlas.db`.
            must_answer: `False` takes a database that is away: it is connected to by the first
                `begin` after it is back, and those before it fail at once.

        Raises:
            ConfigError: If the URL cannot work.
            StoreError: If the database is away and has to answer, or refuses.
        """
        store = cls(*_make_engine(url))
        try:
            await store._make_schema(_SCHEMA_TRIES if must_answer else 1)
        except StoreError as error:
            if must_answer or not is_transient(error):
                await store.close()
                raise
            logger.warning("the store is away (%r); going on without it", error.__cause__)
        except BaseException:
            await store.close()
            raise
        return store

    async def _make_schema(self, tries: int) -> None:
        """Take the steps that the database lacks; several processes may try at once."""
        for attempt in range(1, tries + 1):
            try:
                if self._file is not None:
                    _make_private(self._file)
                async with self._connect() as connection, connection.begin():
                    await connection.run_sync(migrate)
                self._has_schema = True
                return
            except (StoreError, DBAPIError, OSError) as error:
                if attempt == tries:
                    cause = error.__cause__ if isinstance(error, StoreError) else error
                    kind = type(cause or error).__name__
                    raise StoreError(f"cannot open the store: {kind}") from cause
                await asyncio.sleep(0.1 * attempt)

    async def _open_again(self) -> None:
        """What `open` could not do; of many who want it at once, one tries."""
        async with self._opening:
            if self._has_schema:
                return
            if time.monotonic() < self._next_try_s:
                raise StoreAway(_AWAY)
            try:
                await self._make_schema(1)
            except StoreError as error:
                self._next_try_s = time.monotonic() + _SCHEMA_PAUSE_S
                raise StoreAway(_AWAY) from error.__cause__ or error

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        """One transaction.

        Raises:
            StoreError: If the database is away or refuses.
            IntegrityError: If a constraint is broken; what that means depends on the statement.
        """
        if not self._has_schema:
            await self._open_again()
        async with self._connect() as connection:
            try:
                async with connection.begin():
                    yield connection
            except IntegrityError:
                raise
            except (SQLAlchemyError, OSError, sqlite3.Error) as error:
                raise StoreError(_AWAY) from error

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[AsyncConnection]:
        """A connection.

        Raises:
            StoreError: If there is none to be had.
        """
        async with AsyncExitStack() as stack:
            try:
                connection = await stack.enter_async_context(self._engine.connect())
            except Exception as error:  # drivers raise their own here, of many kinds
                raise StoreAway(_AWAY) from error
            yield connection

    async def close(self) -> None:
        """Give the connections back."""
        await self._engine.dispose()


def is_transient(error: BaseException) -> bool:
    """Whether the same write may succeed later: the store was away, not the row at fault."""
    if isinstance(error, StoreAway):
        return True
    cause = error.__cause__ if isinstance(error, StoreError) else error
    state = getattr(getattr(cause, "orig", cause), "sqlstate", None) or ""
    if state.startswith(_TRANSIENT_SQLSTATES):
        return True
    return isinstance(cause, (OperationalError, OSError, TimeoutError, PoolTimeout)) or (
        isinstance(cause, DBAPIError) and cause.connection_invalidated
    )


def _make_private(file: Path) -> None:
    """Have an SQLite database, what it has beside it, and its folder for this user only.

    SQLite gives what it makes beside a database the database's mode. A folder that is there already
    may be for other things too, so that only one with the default name is tightened.
    """
    make_private_folder(file.parent)
    if file.parent.name == DATA_FOLDER:
        tighten(file.parent)
    make_private_file(file)
    for suffix in ("-wal", "-shm", "-journal"):
        tighten(file.with_name(file.name + suffix))


def _make_engine(url: str) -> tuple[AsyncEngine, Path | None]:
    """The engine, and the file of an SQLite database."""
    file = None
    options: dict[str, Any] = {}
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() != "sqlite":
            options["pool_pre_ping"] = True
        elif parsed.database not in (None, "", ":memory:"):
            file = Path(str(parsed.database))
        if parsed.drivername == "postgresql+asyncpg":
            options["connect_args"] = {
                "timeout": _CONNECT_TIMEOUT_S,
                "command_timeout": _COMMAND_TIMEOUT_S,
            }
        engine = create_async_engine(parsed, **options)
    except (ArgumentError, SQLAlchemyError, ImportError) as error:
        raise ConfigError(
            f"store.url cannot be used: {error}; an async driver is needed"
        ) from error
    if parsed.get_backend_name() == "sqlite":
        event.listen(engine.sync_engine, "connect", _connect_sqlite)
    return engine, file


def _connect_sqlite(connection: Any, _record: Any) -> None:
    """Set up one SQLite connection: readers beside a writer, waits for locks, synced commits."""
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {_SQLITE_BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()
