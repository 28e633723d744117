"""The tables of version 0.1; those that an earlier build made are left as they are."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make what is missing."""
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.String(length=32), nullable=False),
        sa.Column("key_hash", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("scopes", sa.String(length=200), nullable=False),
        sa.Column("created_unix_s", sa.Float(), nullable=False),
        sa.Column("revoked_unix_s", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("key_id"),
        sa.UniqueConstraint("key_hash"),
        if_not_exists=True,
    )
    op.create_table(
        "jobs",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("progress", sa.JSON(), nullable=False),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("created_unix_s", sa.Float(), nullable=False),
        sa.Column("updated_unix_s", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("job_id"),
        if_not_exists=True,
    )
    op.create_index("ix_jobs_created_unix_s", "jobs", ["created_unix_s"], if_not_exists=True)

    op.create_table(
        "profile_questions",
        sa.Column("question_key", sa.String(length=32), nullable=False),
        sa.Column("query", sa.Text(), nullable=False),
        sa.Column("domain", sa.String(length=200), nullable=False),
        sa.Column("split", sa.String(length=16), nullable=False),
        sa.Column("encoder", sa.String(length=300), nullable=False),
        sa.Column("embedding", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("question_key"),
        if_not_exists=True,
    )
    op.create_table(
        "requests",
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("query", sa.Text(), nullable=False),
        sa.Column("embedding", sa.LargeBinary(), nullable=True),
        sa.Column("model_id", sa.String(length=64), nullable=False),
        sa.Column("tool_id", sa.String(length=64), nullable=False),
        sa.Column("path", sa.String(length=32), nullable=False),
        sa.Column("confidence", sa.Float(), nullable=False),
        sa.Column("propensity", sa.Float(), nullable=False),
        sa.Column("alpha", sa.Float(), nullable=True),
        sa.Column("policy_version", sa.Integer(), nullable=False),
        sa.Column("pool_version", sa.Integer(), nullable=False),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("completion_tokens", sa.Integer(), nullable=False),
        sa.Column("cost_usd", sa.Float(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_unix_s", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("request_id"),
        if_not_exists=True,
    )
    op.create_index(
        "ix_requests_created_unix_s", "requests", ["created_unix_s"], if_not_exists=True
    )

    op.create_table(
        "snapshots",
        sa.Column("snapshot_id", sa.String(length=64), nullable=False),
        sa.Column("about", sa.JSON(), nullable=False),
        sa.Column("created_unix_s", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("snapshot_id"),
        if_not_exists=True,
    )
    op.create_table(
        "feedback",
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("score", sa.Float(), nullable=False),
        sa.Column("comment", sa.Text(), nullable=True),
        sa.Column("created_unix_s", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["request_id"],
            ["requests.request_id"],
        ),
        sa.PrimaryKeyConstraint("request_id"),
        if_not_exists=True,
    )
    op.create_index(
        "ix_feedback_created_unix_s", "feedback", ["created_unix_s"], if_not_exists=True
    )

    op.create_table(
        "outcomes",
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("step_index", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("model_id", sa.String(length=64), nullable=False),
        sa.Column("tool_id", sa.String(length=64), nullable=False),
        sa.Column("path", sa.String(length=32), nullable=False),
        sa.Column("propensity", sa.Float(), nullable=False),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("completion_tokens", sa.Integer(), nullable=False),
        sa.Column("cost_usd", sa.Float(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("mean_logprob", sa.Float(), nullable=True),
        sa.Column("tool_calls", sa.JSON(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["request_id"],
            ["requests.request_id"],
        ),
        sa.PrimaryKeyConstraint("request_id", "step_index"),
        if_not_exists=True,
    )
    op.create_index("ix_outcomes_model_id", "outcomes", ["model_id"], if_not_exists=True)

    op.create_table(
        "policies",
        sa.Column("policy_version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("snapshot_id", sa.String(length=64), nullable=True),
        sa.Column("reason", sa.String(length=300), nullable=False),
        sa.Column("report", sa.JSON(), nullable=True),
        sa.Column("created_unix_s", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["snapshot_id"],
            ["snapshots.snapshot_id"],
        ),
        sa.PrimaryKeyConstraint("policy_version"),
        if_not_exists=True,
    )
    op.create_table(
        "profile_outcomes",
        sa.Column("question_key", sa.String(length=32), nullable=False),
        sa.Column("model_id", sa.String(length=64), nullable=False),
        sa.Column("tool_id", sa.String(length=64), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("score", sa.Float(), nullable=False),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("completion_tokens", sa.Integer(), nullable=False),
        sa.Column("cost_usd", sa.Float(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("mean_logprob", sa.Float(), nullable=True),
        sa.Column("tool_errors", sa.Integer(), nullable=False),
        sa.Column("answer", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("judge_agreed", sa.Boolean(), nullable=True),
        sa.Column("propensity", sa.Float(), nullable=False),
        sa.Column("created_unix_s", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["question_key"],
            ["profile_questions.question_key"],
        ),
        sa.PrimaryKeyConstraint("question_key", "model_id", "tool_id", "fingerprint"),
        if_not_exists=True,
    )
    op.create_table(
        "shadow_decisions",
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("policy_version", sa.Integer(), nullable=False),
        sa.Column("action", sa.String(length=16), nullable=False),
        sa.Column("model_id", sa.String(length=64), nullable=False),
        sa.Column("tool_id", sa.String(length=64), nullable=False),
        sa.Column("path", sa.String(length=32), nullable=False),
        sa.Column("confidence", sa.Float(), nullable=False),
        sa.Column("propensity", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["request_id"],
            ["requests.request_id"],
        ),
        sa.PrimaryKeyConstraint("request_id"),
        if_not_exists=True,
    )
    op.create_index(
        "ix_shadow_decisions_policy_version",
        "shadow_decisions",
        ["policy_version"],
        if_not_exists=True,
    )

    op.create_table(
        "trajectories",
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("decisions", sa.JSON(), nullable=False),
        sa.Column("answer_step", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(
            ["request_id"],
            ["requests.request_id"],
        ),
        sa.PrimaryKeyConstraint("request_id"),
        if_not_exists=True,
    )
    op.create_table(
        "policy_rollbacks",
        sa.Column("policy_version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("taken_back", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["policy_version"],
            ["policies.policy_version"],
        ),
        sa.PrimaryKeyConstraint("policy_version"),
        if_not_exists=True,
    )
    op.create_table(
        "policy_trials",
        sa.Column("policy_version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("mode", sa.String(length=16), nullable=False),
        sa.Column("share", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["policy_version"],
            ["policies.policy_version"],
        ),
        sa.PrimaryKeyConstraint("policy_version"),
        if_not_exists=True,
    )


def downgrade() -> None:
    """Take it back."""
    op.drop_table("policy_trials")
    op.drop_table("policy_rollbacks")
    op.drop_table("trajectories")
    op.drop_table("shadow_decisions")
    op.drop_table("profile_outcomes")
    op.drop_table("policies")
    op.drop_table("outcomes")
    op.drop_table("feedback")
    op.drop_table("snapshots")
    op.drop_table("requests")
    op.drop_table("profile_questions")
    op.drop_table("jobs")
    op.drop_table("api_keys")
