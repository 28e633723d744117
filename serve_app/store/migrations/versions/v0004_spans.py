"""What happened in each request."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Make the table of spans."""
    op.create_table(
        "spans",
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("stop", sa.String(length=16), nullable=False),
        sa.Column("num_dropped", sa.Integer(), nullable=False),
        sa.Column("spans", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["request_id"],
            ["requests.request_id"],
        ),
        sa.PrimaryKeyConstraint("request_id"),
    )


def downgrade() -> None:
    """Drop it."""
    op.drop_table("spans")
