"""Limits of API keys: what each may use, what each has used, and what gateways hold."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def _amounts(prefix: str, *, nullable: bool = False) -> list[sa.Column[float]]:
    names = ("usd", "tokens", "requests")
    return [sa.Column(f"{prefix}{name}", sa.Float(), nullable=nullable) for name in names]


def _key() -> sa.Column[str]:
    return sa.Column("key_id", sa.String(length=32), nullable=False)


def _of_key() -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["key_id"], ["api_keys.key_id"])


def upgrade() -> None:
    """Make the tables, the column that says which keys have limits, and the index by owner."""
    with op.batch_alter_table("api_keys", schema=None) as batch_op:
        batch_op.add_column(sa.Column("limited_unix_s", sa.Float(), nullable=True))
    op.create_index("ix_requests_owner_created", "requests", ["owner", "created_unix_s"])
    op.create_table(
        "key_limits",
        _key(),
        sa.Column("per", sa.String(length=16), nullable=False),
        *_amounts("", nullable=True),
        _of_key(),
        sa.PrimaryKeyConstraint("key_id", "per"),
    )
    op.create_table(
        "key_windows",
        _key(),
        sa.Column("per", sa.String(length=16), nullable=False),
        sa.Column("began_unix_s", sa.Float(), nullable=False),
        sa.Column("ends_unix_s", sa.Float(), nullable=False),
        *_amounts("spent_"),
        *_amounts("leased_"),
        _of_key(),
        sa.PrimaryKeyConstraint("key_id", "per", "began_unix_s"),
    )
    op.create_index("ix_key_windows_ends_unix_s", "key_windows", ["ends_unix_s"])
    op.create_table(
        "key_leases",
        sa.Column("lease_id", sa.String(length=64), nullable=False),
        sa.Column("per", sa.String(length=16), nullable=False),
        _key(),
        sa.Column("began_unix_s", sa.Float(), nullable=False),
        *_amounts(""),
        sa.Column("expires_unix_s", sa.Float(), nullable=False),
        _of_key(),
        sa.PrimaryKeyConstraint("lease_id", "per"),
    )
    op.create_index("ix_key_leases_key_id", "key_leases", ["key_id"])


def downgrade() -> None:
    """Drop them."""
    op.drop_table("key_leases")
    op.drop_table("key_windows")
    op.drop_table("key_limits")
    op.drop_index("ix_requests_owner_created", "requests")
    with op.batch_alter_table("api_keys", schema=None) as batch_op:
        batch_op.drop_column("limited_unix_s")
