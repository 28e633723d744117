"""Rules of the desired pool, and what API keys may use."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Add the columns."""
    with op.batch_alter_table("pool_revisions", schema=None) as batch_op:
        batch_op.add_column(sa.Column("rules", sa.JSON(), nullable=True))
    with op.batch_alter_table("api_keys", schema=None) as batch_op:
        batch_op.add_column(sa.Column("lists", sa.JSON(), nullable=True))


def downgrade() -> None:
    """Drop them."""
    with op.batch_alter_table("api_keys", schema=None) as batch_op:
        batch_op.drop_column("lists")
    with op.batch_alter_table("pool_revisions", schema=None) as batch_op:
        batch_op.drop_column("rules")
