"""What a run shows beside its text, with each outcome of traffic and of a profile."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"

_TABLES = ("outcomes", "profile_outcomes")


def upgrade() -> None:
    """Add the column; of what is there, nothing is known."""
    for table in _TABLES:
        op.add_column(table, sa.Column("signals", sa.JSON(), nullable=True))


def downgrade() -> None:
    """Drop it."""
    for table in _TABLES:
        op.drop_column(table, "signals")
