"""The connection to the store: engine, schema, and the translation of driver errors.

Everything specific to one database is in `_connect_sqlite`; queries elsewhere are portable SQL.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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

from serve_app.errors import ConfigError, StoreError
from serve_app.store.migrations import migrate

logger = logging.getLogger(__name__)

_SCHEMA_TRIES = 5
_SQLITE_BUSY_TIMEOUT_MS = 5_000


class Store:
    """An open store. Safe to share between the tasks of one event loop.

    Invariants:
        - A `begin()` block is one transaction: all of it is kept, or nothing.
        - What a finished `begin()` block wrote survives the death of this process.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        """Wrap an engine; use `Store.open`, which also makes the schema."""
        self._engine = engine

    @classmethod
    async def open(cls, url: str) -> Self:
        """Connect, and bring the schema up to this version.

        Args:
            url: A SQLAlchemy URL with an async driver, for example `sqlite+aiosqlite:////var/lib/atlas/atlas.db`.

        Raises:
            ConfigError: If the URL cannot work.
            StoreError: If the database is away or refuses.
        """
        store = cls(_make_engine(url))
        try:
            await store._make_schema()
        except BaseException:
            await store.close()
            raise
        return store

    async def _make_schema(self) -> None:
        """Take the steps that the database lacks; several processes may try at once."""
        for attempt in range(1, _SCHEMA_TRIES + 1):
            try:
                async with self._engine.begin() as connection:
                    await connection.run_sync(migrate)
                return
            except (DBAPIError, OSError) as error:
                if attempt == _SCHEMA_TRIES:
                    raise StoreError(f"cannot open the store: {type(error).__name__}") from error
                await asyncio.sleep(0.1 * attempt)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        """One transaction.

        Raises:
            StoreError: If the database is away or refuses.
            IntegrityError: If a constraint is broken; what that means depends on the statement.
        """
        try:
            async with self._engine.begin() as connection:
                yield connection
        except IntegrityError:
            raise
        except (SQLAlchemyError, OSError, sqlite3.Error) as error:
            raise StoreError("the store is not available; try again later") from error

    async def close(self) -> None:
        """Give the connections back."""
        await self._engine.dispose()


def is_transient(error: BaseException) -> bool:
    """Whether the same write may succeed later: the store was away, not the row at fault."""
    cause = error.__cause__ if isinstance(error, StoreError) else error
    return isinstance(cause, (OperationalError, OSError, TimeoutError, PoolTimeout)) or (
        isinstance(cause, DBAPIError) and cause.connection_invalidated
    )


def _make_engine(url: str) -> AsyncEngine:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:"):
            Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
        engine = create_async_engine(parsed, pool_pre_ping=parsed.get_backend_name() != "sqlite")
    except (ArgumentError, SQLAlchemyError, ImportError) as error:
        raise ConfigError(
            f"store.url cannot be used: {error}; an async driver is needed"
        ) from error
    except OSError as error:
        raise StoreError(f"cannot make the store's folder: {error.strerror}") from error
    if parsed.get_backend_name() == "sqlite":
        event.listen(engine.sync_engine, "connect", _connect_sqlite)
    return engine


def _connect_sqlite(connection: Any, _record: Any) -> None:
    """Set up one SQLite connection: readers beside a writer, waits for locks, synced commits."""
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {_SQLITE_BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()
