"""Thoughts of profiles, and what it takes to decide trajectories anew."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the table of thoughts, and the columns."""
    op.create_table(
        "profile_thoughts",
        sa.Column("question_key", sa.String(length=32), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("model_id", sa.String(length=64), nullable=False),
        sa.Column("thought", sa.Text(), nullable=True),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("completion_tokens", sa.Integer(), nullable=False),
        sa.Column("cost_usd", sa.Float(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_unix_s", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["question_key"],
            ["profile_questions.question_key"],
        ),
        sa.PrimaryKeyConstraint("question_key", "fingerprint"),
    )
    with op.batch_alter_table("trajectories", schema=None) as batch_op:
        batch_op.add_column(sa.Column("pairs", sa.JSON(), nullable=True))
        batch_op.add_column(sa.Column("max_steps", sa.Integer(), nullable=True))
        batch_op.add_column(sa.Column("max_cost_usd", sa.Float(), nullable=True))
        batch_op.add_column(sa.Column("answer_keys", sa.JSON(), nullable=True))
        batch_op.add_column(sa.Column("answer_embeddings", sa.LargeBinary(), nullable=True))


def downgrade() -> None:
    """Drop them."""
    with op.batch_alter_table("trajectories", schema=None) as batch_op:
        batch_op.drop_column("answer_embeddings")
        batch_op.drop_column("answer_keys")
        batch_op.drop_column("max_cost_usd")
        batch_op.drop_column("max_steps")
        batch_op.drop_column("pairs")
    op.drop_table("profile_thoughts")
