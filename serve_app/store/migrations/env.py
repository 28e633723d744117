"""What alembic runs: the steps, on the connection it was given."""

from __future__ import annotations

from alembic import context

from serve_app.store.tables import Base

# SQLite changes a column by making the table anew.
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
