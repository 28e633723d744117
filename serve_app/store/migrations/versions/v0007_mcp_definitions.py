"""Definitions of MCP servers' functions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "mcp_definitions",
        sa.Column("tool_id", sa.String(length=64), nullable=False),
        sa.Column("function", sa.String(length=64), nullable=False),
        sa.Column("seen", sa.String(length=64), nullable=False),
        sa.Column("accepted", sa.String(length=64), nullable=True),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("seen_unix_s", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("tool_id", "function"),
    )


def downgrade() -> None:
    """Drop it."""
    op.drop_table("mcp_definitions")
