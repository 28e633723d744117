"""The cluster of a request; sums by policy, cluster and candidate, and of policies in shadow."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    """Make them, and sum up what is there; of earlier requests no cluster is known."""
    op.add_column("requests", sa.Column("cluster", sa.Integer(), nullable=True))
    op.create_table(
        "choice_days",
        *_keys("policy_version", "cluster"),
        sa.Column("requests", sa.Integer(), nullable=False),
        sa.Column("errors", sa.Integer(), nullable=False),
        sa.Column("cost_usd", sa.Float(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("confidence", sa.Float(), nullable=False),
        sa.Column("verdicts", sa.Integer(), nullable=False),
        sa.Column("wins", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("began_unix_s", "policy_version", "cluster", "model_id", "tool_id"),
    )
    op.create_table(
        "shadow_days",
        *_keys("policy_version"),
        sa.Column("requests", sa.Integer(), nullable=False),
        sa.Column("agreed", sa.Integer(), nullable=False),
        sa.Column("confidence", sa.Float(), nullable=False),
        sa.Column("verdicts", sa.Integer(), nullable=False),
        sa.Column("wins", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("began_unix_s", "policy_version", "model_id", "tool_id"),
    )
    _sum_up()


def _keys(*numbers: str) -> list[sa.Column[int] | sa.Column[str]]:
    return [
        sa.Column("began_unix_s", sa.BigInteger(), autoincrement=False, nullable=False),
        *(sa.Column(name, sa.Integer(), autoincrement=False, nullable=False) for name in numbers),
        sa.Column("model_id", sa.String(length=64), nullable=False),
        sa.Column("tool_id", sa.String(length=64), nullable=False),
    ]


def _sum_up() -> None:
    """What the requests, shadow decisions and verdicts that are there add to the sums."""
    pair = "r.model_id, r.tool_id"
    failed = "SUM(CASE WHEN r.error IS NULL THEN 0 ELSE 1 END)"
    wins = "SUM(CASE WHEN f.score >= 0.5 THEN 1 ELSE 0 END)"
    agreed = "s.action = 'route' AND s.model_id = r.model_id AND s.tool_id = r.tool_id"
    rated = "feedback f JOIN requests r ON r.request_id = f.request_id"
    shadowed = "shadow_decisions s JOIN requests r ON r.request_id = s.request_id"
    add_verdicts = (
        "DO UPDATE SET verdicts = {0}.verdicts + excluded.verdicts, wins = {0}.wins + excluded.wins"
    )
    ended, told = _day("r.created_unix_s"), _day("f.created_unix_s")
    op.execute(
        f"INSERT INTO choice_days SELECT {ended} AS began, r.policy_version, -1, {pair}, COUNT(*), "
        f"{failed}, SUM(r.cost_usd), SUM(r.seconds), SUM(r.confidence), 0, 0 FROM requests r "
        f"GROUP BY began, r.policy_version, {pair}"
    )
    op.execute(
        f"INSERT INTO choice_days SELECT {told} AS began, r.policy_version, -1, {pair}, "
        f"0, 0, 0, 0, 0, COUNT(*), {wins} FROM {rated} WHERE true "
        f"GROUP BY began, r.policy_version, {pair} "
        "ON CONFLICT (began_unix_s, policy_version, cluster, model_id, tool_id) "
        + add_verdicts.format("choice_days")
    )
    op.execute(
        f"INSERT INTO shadow_days SELECT {ended} AS began, s.policy_version, s.model_id, "
        f"s.tool_id, COUNT(*), SUM(CASE WHEN {agreed} THEN 1 ELSE 0 END), SUM(s.confidence), 0, 0 "
        f"FROM {shadowed} GROUP BY began, s.policy_version, s.model_id, s.tool_id"
    )
    op.execute(
        f"INSERT INTO shadow_days SELECT {told} AS began, s.policy_version, s.model_id, "
        f"s.tool_id, 0, 0, 0, COUNT(*), {wins} FROM {rated} "
        f"JOIN shadow_decisions s ON s.request_id = f.request_id WHERE {agreed} "
        "GROUP BY began, s.policy_version, s.model_id, s.tool_id "
        "ON CONFLICT (began_unix_s, policy_version, model_id, tool_id) "
        + add_verdicts.format("shadow_days")
    )


def _day(column: str) -> str:
    """The beginning of a day; PostgreSQL rounds in a cast, and SQLite may have no FLOOR."""
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    days = f"{column} / 86400" if is_sqlite else f"FLOOR({column} / 86400)"
    return f"CAST({days} AS INTEGER) * 86400"


def downgrade() -> None:
    """Drop them."""
    op.drop_table("shadow_days")
    op.drop_table("choice_days")
    op.drop_column("requests", "cluster")
