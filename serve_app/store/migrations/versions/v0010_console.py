"""Sums over requests and verdicts, sessions of the console, and what finds a request in a list."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Make the tables, and sum up what is there; how long requests took is summed from now on."""
    op.create_table(
        "traffic",
        _began(),
        *_pair(),
        sa.Column("path", sa.String(length=32), nullable=False),
        sa.Column("requests", sa.Integer(), nullable=False),
        sa.Column("errors", sa.Integer(), nullable=False),
        sa.Column("cost_usd", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("began_unix_s", "model_id", "tool_id", "path"),
    )
    op.create_table(
        "latencies",
        _began(),
        sa.Column("step", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("requests", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("began_unix_s", "step"),
    )
    op.create_table(
        "usage_days",
        _began(),
        sa.Column("owner", sa.String(length=64), nullable=False),
        *_pair(),
        sa.Column("requests", sa.Integer(), nullable=False),
        sa.Column("errors", sa.Integer(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cost_usd", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("began_unix_s", "owner", "model_id", "tool_id"),
    )
    op.create_table(
        "verdict_days",
        _began(),
        *_pair(),
        sa.Column("tenth", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("verdicts", sa.Integer(), nullable=False),
        sa.Column("wins", sa.Integer(), nullable=False),
        sa.Column("score", sa.Float(), nullable=False),
        sa.Column("confidence", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("began_unix_s", "model_id", "tool_id", "tenth"),
    )
    op.create_table(
        "console_sessions",
        sa.Column("session_hash", sa.String(length=64), nullable=False),
        sa.Column("key_id", sa.String(length=32), nullable=False),
        sa.Column("expires_unix_s", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.key_id"]),
        sa.PrimaryKeyConstraint("session_hash"),
    )
    op.create_index("ix_console_sessions_expires_unix_s", "console_sessions", ["expires_unix_s"])
    op.create_index(
        "ix_requests_pair_created", "requests", ["model_id", "tool_id", "created_unix_s"]
    )
    _sum_up()


def _began() -> sa.Column[int]:
    return sa.Column("began_unix_s", sa.BigInteger(), autoincrement=False, nullable=False)


def _pair() -> list[sa.Column[str]]:
    return [
        sa.Column("model_id", sa.String(length=64), nullable=False),
        sa.Column("tool_id", sa.String(length=64), nullable=False),
    ]


def _sum_up() -> None:
    """What the requests and verdicts that are there add to the sums."""
    failed = "SUM(CASE WHEN error IS NULL THEN 0 ELSE 1 END)"
    op.execute(
        f"INSERT INTO traffic SELECT {_floor('created_unix_s', 300)} AS began, model_id, tool_id, "
        f"path, COUNT(*), {failed}, SUM(cost_usd) FROM requests "
        "GROUP BY began, model_id, tool_id, path"
    )
    op.execute(
        f"INSERT INTO usage_days SELECT {_floor('created_unix_s', 86400)} AS began, owner, "
        f"model_id, tool_id, COUNT(*), {failed}, SUM(prompt_tokens), SUM(completion_tokens), "
        "SUM(cost_usd) FROM requests GROUP BY began, owner, model_id, tool_id"
    )
    tenth = (
        "CASE WHEN confidence >= 1 THEN 9 WHEN confidence < 0 THEN 0 ELSE "
        f"{_whole('confidence * 10')} END"
    )
    op.execute(
        f"INSERT INTO verdict_days SELECT {_floor('feedback.created_unix_s', 86400)} AS began, "
        f"model_id, tool_id, {tenth} AS tenth, COUNT(*), "
        "SUM(CASE WHEN score >= 0.5 THEN 1 ELSE 0 END), SUM(score), SUM(confidence) "
        "FROM feedback JOIN requests ON requests.request_id = feedback.request_id "
        "GROUP BY began, model_id, tool_id, tenth"
    )


def _floor(column: str, width_s: int) -> str:
    return f"{_whole(f'{column} / {width_s}')} * {width_s}"


def _whole(value: str) -> str:
    """The next whole number below; PostgreSQL rounds in a cast, and SQLite may have no FLOOR."""
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    return f"CAST({value} AS INTEGER)" if is_sqlite else f"CAST(FLOOR({value}) AS INTEGER)"


def downgrade() -> None:
    """Drop them."""
    op.drop_index("ix_requests_pair_created", "requests")
    for name in ("traffic", "latencies", "usage_days", "verdict_days", "console_sessions"):
        op.drop_table(name)
