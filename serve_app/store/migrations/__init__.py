"""The store's schema in steps; a database gets those that it lacks when it is opened.

`python -m serve_app.store.migrations "what changes"` writes the step for a change of `tables.py`; a
test holds the steps against the tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import Connection

if TYPE_CHECKING:
    from alembic.config import Config

_LOCK = 20260
"""Number of PostgreSQL's advisory lock: one process at a time changes the schema."""


def configuration(connection: Connection | None = None) -> Config:
    """Alembic's, on an open connection where there is one."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    if connection is not None:
        config.attributes["connection"] = connection
    return config


def known_revisions() -> frozenset[str]:
    """Every schema that this version can bring a database from."""
    from alembic.script import ScriptDirectory

    steps = ScriptDirectory.from_config(configuration()).walk_revisions()
    return frozenset(step.revision for step in steps)


def migrate(connection: Connection) -> None:
    """Bring a database to this version's schema, in the transaction of the connection."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # the driver begins too late for DDL
    else:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
    if _revision(connection) != newest_revision():
        from alembic import command  # a third of what a process loads for the store

        command.upgrade(configuration(connection), "head")


def newest_revision() -> str:
    """The schema of this version: steps are numbered, in the names of their files too."""
    steps = Path(__file__).parent.glob("versions/v*.py")
    return max(step.name for step in steps)[1:5]


def _revision(connection: Connection) -> str | None:
    """The schema that a database has; `None`: none of ours."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    return revision
