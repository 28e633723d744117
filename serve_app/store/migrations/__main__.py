"""Write the step from the schema as it was to the tables as they are."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from alembic import command
from sqlalchemy import create_engine

from serve_app.store.migrations import configuration, migrate

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        engine = create_engine(f"sqlite:///{Path(folder) / 'before.db'}")
        with engine.begin() as connection:
            migrate(connection)
        with engine.connect() as connection:
            command.revision(configuration(connection), sys.argv[1], autogenerate=True)
