"""The tables. Portable types only: the same definitions serve SQLite and PostgreSQL.

Times are seconds since the epoch in UTC, written by whoever saw the event.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Holds the metadata of all tables."""


class ApiKeyRow(Base):
    """One API key. The key itself is shown once and never stored."""

    __tablename__ = "api_keys"

    key_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    key_hash: Mapped[str] = mapped_column(String(64), unique=True)
    """SHA-256 of the key, in hex."""
    name: Mapped[str] = mapped_column(String(200))
    scopes: Mapped[str] = mapped_column(String(200))
    """Space-separated."""
    lists: Mapped[dict[str, Any] | None] = mapped_column(JSON, nullable=True)
    """What it may use: see `serve_app.schemas.AccessLists`; `None`: everything."""
    created_unix_s: Mapped[float] = mapped_column(Float)
    revoked_unix_s: Mapped[float | None] = mapped_column(Float)
    limited_unix_s: Mapped[float | None] = mapped_column(Float)
    """When its limits were changed last; `None`: it has none."""


class KeyLimitRow(Base):
    """What one API key may use in each period of one kind."""

    __tablename__ = "key_limits"

    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.key_id"), primary_key=True)
    per: Mapped[str] = mapped_column(String(16), primary_key=True)
    """A `limits.Period`."""
    usd: Mapped[float | None] = mapped_column(Float)
    """`None`: unlimited, as the others."""
    tokens: Mapped[float | None] = mapped_column(Float)
    requests: Mapped[float | None] = mapped_column(Float)


class KeyWindowRow(Base):
    """What one API key with limits has used in one period, and what gateways hold of it."""

    __tablename__ = "key_windows"

    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.key_id"), primary_key=True)
    per: Mapped[str] = mapped_column(String(16), primary_key=True)
    began_unix_s: Mapped[float] = mapped_column(Float, primary_key=True)
    ends_unix_s: Mapped[float] = mapped_column(Float, index=True)
    spent_usd: Mapped[float] = mapped_column(Float)
    """Of the requests that began in the period and are in `requests`, as the others."""
    spent_tokens: Mapped[float] = mapped_column(Float)
    spent_requests: Mapped[float] = mapped_column(Float)
    leased_usd: Mapped[float] = mapped_column(Float)
    """The sum over the leases of the period, as the others."""
    leased_tokens: Mapped[float] = mapped_column(Float)
    leased_requests: Mapped[float] = mapped_column(Float)


class KeyLeaseRow(Base):
    """What one gateway holds of one key's period; less with each outcome that is written."""

    __tablename__ = "key_leases"

    lease_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    per: Mapped[str] = mapped_column(String(16), primary_key=True)
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.key_id"), index=True)
    began_unix_s: Mapped[float] = mapped_column(Float)
    """Of the period."""
    usd: Mapped[float] = mapped_column(Float)
    tokens: Mapped[float] = mapped_column(Float)
    requests: Mapped[float] = mapped_column(Float)
    expires_unix_s: Mapped[float] = mapped_column(Float)
    """The gateway holds nothing from then on, unless the gateway renews the lease before."""


class RequestRow(Base):
    """One finished request: what was asked and what was decided."""

    __tablename__ = "requests"
    __table_args__ = (
        Index("ix_requests_owner_created", "owner", "created_unix_s"),
        Index("ix_requests_pair_created", "model_id", "tool_id", "created_unix_s"),
    )

    request_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64))
    query: Mapped[str] = mapped_column(Text)
    embedding: Mapped[bytes | None] = mapped_column(LargeBinary)
    """(dim,) float32 little-endian; `None` where the embedder was away."""
    model_id: Mapped[str] = mapped_column(String(64))
    """With `tool_id`: the pair first chosen."""
    tool_id: Mapped[str] = mapped_column(String(64))
    path: Mapped[str] = mapped_column(String(32))
    confidence: Mapped[float] = mapped_column(Float)
    propensity: Mapped[float] = mapped_column(Float)
    alpha: Mapped[float | None] = mapped_column(Float)
    policy_version: Mapped[int] = mapped_column(Integer)
    cluster: Mapped[int | None] = mapped_column(Integer)
    """Of the policy's snapshot; `None`: the policy has none, or the query is outside of them."""
    pool_version: Mapped[int] = mapped_column(Integer)
    prompt_tokens: Mapped[int] = mapped_column(Integer)
    completion_tokens: Mapped[int] = mapped_column(Integer)
    cost_usd: Mapped[float] = mapped_column(Float)
    seconds: Mapped[float] = mapped_column(Float)
    error: Mapped[str | None] = mapped_column(Text)
    created_unix_s: Mapped[float] = mapped_column(Float, index=True)


class OutcomeRow(Base):
    """One step of a request: what the pair did."""

    __tablename__ = "outcomes"

    request_id: Mapped[str] = mapped_column(ForeignKey("requests.request_id"), primary_key=True)
    step_index: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    model_id: Mapped[str] = mapped_column(String(64), index=True)
    tool_id: Mapped[str] = mapped_column(String(64))
    path: Mapped[str] = mapped_column(String(32))
    propensity: Mapped[float] = mapped_column(Float)
    prompt_tokens: Mapped[int] = mapped_column(Integer)
    completion_tokens: Mapped[int] = mapped_column(Integer)
    cost_usd: Mapped[float] = mapped_column(Float)
    seconds: Mapped[float] = mapped_column(Float)
    mean_logprob: Mapped[float | None] = mapped_column(Float)
    tool_calls: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    """`tool_id`, `function`, `ok`, `seconds` of each call."""
    signals: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """As `serve_app.signals.Signals`; `None`: not kept."""
    error: Mapped[str | None] = mapped_column(Text)


class TrajectoryRow(Base):
    """What a request decided by the multi-step policy adds to its `requests` row."""

    __tablename__ = "trajectories"

    request_id: Mapped[str] = mapped_column(ForeignKey("requests.request_id"), primary_key=True)
    decisions: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    """`action`, `pair` (`None` but for `route`), `propensity`, `path`, `can_think` and
    `seconds_left` of each decision, in their order: the n-th `route` or `think` is step n of
    `outcomes`."""
    answer_step: Mapped[int | None] = mapped_column(Integer)
    """`step_index` of the answer that was returned; `None` where none was."""
    # What it takes to decide the request anew; `None` in rows of earlier versions.
    pairs: Mapped[list[str] | None] = mapped_column(JSON)
    """Those that the first decision could choose from."""
    max_steps: Mapped[int | None] = mapped_column(Integer)
    """Allowed to the request."""
    max_cost_usd: Mapped[float | None] = mapped_column(Float)
    """Allowed to the request; `None` where there was no limit."""
    answer_keys: Mapped[list[int | None] | None] = mapped_column(JSON)
    """Of each step: equal for answers that say the same, `None` for none."""
    answer_embeddings: Mapped[bytes | None] = mapped_column(LargeBinary)
    """(num_steps, dim) float32 little-endian; zeros where there was no answer, or nobody asked
    what comes after it."""


class ShadowRow(Base):
    """What a policy on trial would have done with a request; nobody acted on it."""

    __tablename__ = "shadow_decisions"

    request_id: Mapped[str] = mapped_column(ForeignKey("requests.request_id"), primary_key=True)
    policy_version: Mapped[int] = mapped_column(Integer, index=True)
    action: Mapped[str] = mapped_column(String(16))
    model_id: Mapped[str] = mapped_column(String(64))
    tool_id: Mapped[str] = mapped_column(String(64))
    path: Mapped[str] = mapped_column(String(32))
    confidence: Mapped[float] = mapped_column(Float)
    propensity: Mapped[float] = mapped_column(Float)


class TraceRow(Base):
    """What happened in one request.

    One row holds all its spans: one insert writes them, one key reads them, none searches in them.
    """

    __tablename__ = "spans"

    request_id: Mapped[str] = mapped_column(ForeignKey("requests.request_id"), primary_key=True)
    stop: Mapped[str] = mapped_column(String(16))
    """Why nothing more was done."""
    num_dropped: Mapped[int] = mapped_column(Integer)
    """Spans that were not kept."""
    spans: Mapped[str] = mapped_column(Text)
    """JSON list of `schemas.SpanRecord`, each after the one it is part of; as text, because the
    journal has the same."""


class FeedbackRow(Base):
    """The owner's verdict on a request; one per request."""

    __tablename__ = "feedback"

    request_id: Mapped[str] = mapped_column(ForeignKey("requests.request_id"), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64))
    score: Mapped[float] = mapped_column(Float)
    """In [0, 1]."""
    comment: Mapped[str | None] = mapped_column(Text)
    created_unix_s: Mapped[float] = mapped_column(Float, index=True)


class SnapshotRow(Base):
    """A router snapshot in the snapshots' folder, under its id."""

    __tablename__ = "snapshots"

    snapshot_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    about: Mapped[dict[str, Any]] = mapped_column(JSON)
    """How it was made; the snapshot's own metadata."""
    created_unix_s: Mapped[float] = mapped_column(Float)


class PolicyRow(Base):
    """One publication of a snapshot; none ever changes.

    The highest version without a trial serves; trials above it run beside it.
    """

    __tablename__ = "policies"

    policy_version: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    snapshot_id: Mapped[str | None] = mapped_column(ForeignKey("snapshots.snapshot_id"))
    """`None` is the cold-start rule."""
    reason: Mapped[str] = mapped_column(String(300))
    report: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    """The evaluation it was promoted on."""
    created_unix_s: Mapped[float] = mapped_column(Float)


class TrialRow(Base):
    """A publication that does not simply serve. A later one that does ends it."""

    __tablename__ = "policy_trials"

    policy_version: Mapped[int] = mapped_column(
        ForeignKey("policies.policy_version"), primary_key=True, autoincrement=False
    )
    mode: Mapped[str] = mapped_column(String(16))
    """`canary` or `shadow`."""
    share: Mapped[float] = mapped_column(Float)
    """Of the requests, in [0, 1]."""


class RollbackRow(Base):
    """A publication that took another one back."""

    __tablename__ = "policy_rollbacks"

    policy_version: Mapped[int] = mapped_column(
        ForeignKey("policies.policy_version"), primary_key=True, autoincrement=False
    )
    taken_back: Mapped[int] = mapped_column(Integer)
    """Version of the one taken back."""


class ProfileQuestionRow(Base):
    """One labelled question that pairs were measured on."""

    __tablename__ = "profile_questions"

    question_key: Mapped[str] = mapped_column(String(32), primary_key=True)
    """Hash of query, gold and metric."""
    query: Mapped[str] = mapped_column(Text)
    domain: Mapped[str] = mapped_column(String(200))
    split: Mapped[str] = mapped_column(String(16))
    """`train` or `held_out`."""
    encoder: Mapped[str] = mapped_column(String(300))
    embedding: Mapped[bytes] = mapped_column(LargeBinary)
    """(dim,) float32 little-endian, of `encoder`."""


class ProfileOutcomeRow(Base):
    """What one pair did on one labelled question."""

    __tablename__ = "profile_outcomes"

    question_key: Mapped[str] = mapped_column(
        ForeignKey("profile_questions.question_key"), primary_key=True
    )
    model_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tool_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64), primary_key=True)
    """Of the model's and the tool's settings, and where the planner had spoken before of its too:
    other settings are another measurement."""
    score: Mapped[float] = mapped_column(Float)
    """In [0, 1]."""
    prompt_tokens: Mapped[int] = mapped_column(Integer)
    completion_tokens: Mapped[int] = mapped_column(Integer)
    cost_usd: Mapped[float] = mapped_column(Float)
    """Model and tool."""
    seconds: Mapped[float] = mapped_column(Float)
    mean_logprob: Mapped[float | None] = mapped_column(Float)
    tool_errors: Mapped[int] = mapped_column(Integer)
    """Tool calls that failed."""
    answer: Mapped[str | None] = mapped_column(Text)
    error: Mapped[str | None] = mapped_column(Text)
    """Why there is no answer; the score is 0 then."""
    judge_agreed: Mapped[bool | None] = mapped_column(Boolean)
    """Whether the judge said the same in both orders; `None` without a judge."""
    signals: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """As `serve_app.signals.Signals`; `None`: not kept."""
    propensity: Mapped[float] = mapped_column(Float)
    created_unix_s: Mapped[float] = mapped_column(Float)


class ProfileThoughtRow(Base):
    """What the planner said of one labelled question, before any pair had answered."""

    __tablename__ = "profile_thoughts"

    question_key: Mapped[str] = mapped_column(
        ForeignKey("profile_questions.question_key"), primary_key=True
    )
    fingerprint: Mapped[str] = mapped_column(String(64), primary_key=True)
    """Of the planner's settings and of what it is asked."""
    model_id: Mapped[str] = mapped_column(String(64))
    thought: Mapped[str | None] = mapped_column(Text)
    """`None` where it said nothing: the pairs then ran without a note."""
    prompt_tokens: Mapped[int] = mapped_column(Integer)
    completion_tokens: Mapped[int] = mapped_column(Integer)
    cost_usd: Mapped[float] = mapped_column(Float)
    seconds: Mapped[float] = mapped_column(Float)
    error: Mapped[str | None] = mapped_column(Text)
    created_unix_s: Mapped[float] = mapped_column(Float)


class JobRow(Base):
    """One job of the learning loop."""

    __tablename__ = "jobs"

    job_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[str] = mapped_column(String(32))
    state: Mapped[str] = mapped_column(String(16))
    """`queued`, `running`, `succeeded`, `failed` or `cancelled`."""
    settings: Mapped[dict[str, Any]] = mapped_column(JSON)
    progress: Mapped[dict[str, Any]] = mapped_column(JSON)
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    error: Mapped[str | None] = mapped_column(Text)
    owner: Mapped[str] = mapped_column(String(64))
    created_unix_s: Mapped[float] = mapped_column(Float, index=True)
    updated_unix_s: Mapped[float] = mapped_column(Float)


class PoolRevisionRow(Base):
    """One state of the desired pool; the highest revision holds."""

    __tablename__ = "pool_revisions"

    revision: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    models: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    """Settings of every model."""
    tools: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    """Settings of every tool."""
    patterns: Mapped[list[dict[str, Any]] | None] = mapped_column(JSON, nullable=True)
    """Every pattern as it is written; `None` in revisions from before there were any."""
    rules: Mapped[list[dict[str, Any]] | None] = mapped_column(JSON, nullable=True)
    """Every rule in its order; `None` as of `patterns`."""
    from_file: Mapped[dict[str, Any]] = mapped_column(JSON)
    """`models`, `tools` and `patterns` of the configuration file when it was last applied, by id,
    and the hash of its `rules`: what differs from it was changed by an admin since."""
    change: Mapped[str] = mapped_column(String(300))
    created_unix_s: Mapped[float] = mapped_column(Float)


class IdempotencyKeyRow(Base):
    """One `Idempotency-Key` of an API key: the claim on it, and the answer of its request.

    The columns tell the state. `status` is there: the request is answered. Else the lease is not
    over: it is under way. Else `effect_begun`: its outcome is unknown. Else the key is free.
    """

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index("ix_idempotency_keys_owner_expires", "owner", "expires_unix_s"),)

    owner: Mapped[str] = mapped_column(String(64), primary_key=True)
    """Who asked: the id of an API key, or `LOCAL_OWNER`."""
    key_hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    """SHA-256 of the header's value, in hex."""
    claim_id: Mapped[str] = mapped_column(String(64))
    """Id of the HTTP request that holds or held the key; each try has another."""
    request_hash: Mapped[str] = mapped_column(String(64))
    """SHA-256 of path and body, in hex."""
    effect_begun: Mapped[bool] = mapped_column(Boolean)
    """Whether something that must not happen twice may have happened."""
    lease_until_unix_s: Mapped[float] = mapped_column(Float)
    """The gateway that holds the key renews it before then."""
    expires_unix_s: Mapped[float] = mapped_column(Float, index=True)
    """The key is forgotten then."""
    status: Mapped[int | None] = mapped_column(Integer)
    """HTTP status of the answer; `None`: there is none."""
    headers: Mapped[list[list[str]] | None] = mapped_column(JSON(none_as_null=True))
    """Names and values of the answer's headers."""
    body: Mapped[bytes | None] = mapped_column(LargeBinary)
    """Of the answer; `None`: it was too large to keep."""


class McpDefinitionRow(Base):
    """One function of an MCP server: what the server said last, and what an admin accepted."""

    __tablename__ = "mcp_definitions"

    tool_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    function: Mapped[str] = mapped_column(String(64), primary_key=True)
    """The server's own name."""
    seen: Mapped[str] = mapped_column(String(64))
    """Hash of the definition that the server listed last."""
    accepted: Mapped[str | None] = mapped_column(String(64))
    """Hash of the one that may be offered; `None`: none yet."""
    description: Mapped[str] = mapped_column(Text)
    """As the server listed it last; cut."""
    seen_unix_s: Mapped[float] = mapped_column(Float)
    """When the server first listed what it lists now."""
