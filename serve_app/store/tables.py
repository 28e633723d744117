"""The tables. Portable types only: the same definitions serve SQLite and PostgreSQL.

Times are seconds since the epoch in UTC, written by whoever saw the event.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Float, ForeignKey, Integer, LargeBinary, String, Text
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
    created_unix_s: Mapped[float] = mapped_column(Float)
    revoked_unix_s: Mapped[float | None] = mapped_column(Float)


class RequestRow(Base):
    """One finished request: what was asked and what was decided."""

    __tablename__ = "requests"

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
    """`tool_id`, `ok`, `seconds` of each call."""
    error: Mapped[str | None] = mapped_column(Text)


class FeedbackRow(Base):
    """The owner's verdict on a request; one per request."""

    __tablename__ = "feedback"

    request_id: Mapped[str] = mapped_column(ForeignKey("requests.request_id"), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64))
    score: Mapped[float] = mapped_column(Float)
    """In [0, 1]."""
    comment: Mapped[str | None] = mapped_column(Text)
    created_unix_s: Mapped[float] = mapped_column(Float)
