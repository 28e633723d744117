"""Tables of the console: sums that are kept as requests and verdicts are written, and sessions.

A page shows sums over a million requests; it reads some thousand rows of these instead. They are
written in the transaction that writes what they sum up, so they are never behind it.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Float, ForeignKey, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from serve_app.store.tables import Base


class TrafficRow(Base):
    """Requests of five minutes that went to one candidate in one way."""

    __tablename__ = "traffic"

    began_unix_s: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    """A multiple of `sums.TRAFFIC_S`."""
    model_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    """With `tool_id`: the pair first chosen."""
    tool_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    path: Mapped[str] = mapped_column(String(32), primary_key=True)
    requests: Mapped[int] = mapped_column(Integer)
    errors: Mapped[int] = mapped_column(Integer)
    """Requests that were not answered."""
    cost_usd: Mapped[float] = mapped_column(Float)


class LatencyRow(Base):
    """Requests of five minutes that took about as long."""

    __tablename__ = "latencies"

    began_unix_s: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    """A multiple of `sums.TRAFFIC_S`."""
    step: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    """How long; see `sums.step_of`."""
    requests: Mapped[int] = mapped_column(Integer)


class UsageDayRow(Base):
    """What one key used of one candidate on one day, in UTC."""

    __tablename__ = "usage_days"

    began_unix_s: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    owner: Mapped[str] = mapped_column(String(64), primary_key=True)
    model_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tool_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    requests: Mapped[int] = mapped_column(Integer)
    errors: Mapped[int] = mapped_column(Integer)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)
    cost_usd: Mapped[float] = mapped_column(Float)


class VerdictDayRow(Base):
    """Verdicts of one day on one candidate, given with about the same confidence."""

    __tablename__ = "verdict_days"

    began_unix_s: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    model_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tool_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenth: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    """Of the confidence's range, 0 to 9."""
    verdicts: Mapped[int] = mapped_column(Integer)
    wins: Mapped[int] = mapped_column(Integer)
    """Verdicts with a score of one half or more."""
    score: Mapped[float] = mapped_column(Float)
    """Sum of the scores."""
    confidence: Mapped[float] = mapped_column(Float)
    """Sum of the confidences."""


class ChoiceDayRow(Base):
    """Requests of one day that one policy sent to one candidate in one cluster, and verdicts."""

    __tablename__ = "choice_days"

    began_unix_s: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    policy_version: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    cluster: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    """Of the policy's snapshot; `sums.NO_CLUSTER`: in none of them."""
    model_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tool_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    requests: Mapped[int] = mapped_column(Integer)
    errors: Mapped[int] = mapped_column(Integer)
    cost_usd: Mapped[float] = mapped_column(Float)
    seconds: Mapped[float] = mapped_column(Float)
    """Sum of the times that the requests took."""
    confidence: Mapped[float] = mapped_column(Float)
    """Sum of the confidences."""
    verdicts: Mapped[int] = mapped_column(Integer)
    """Given on this day."""
    wins: Mapped[int] = mapped_column(Integer)


class ShadowDayRow(Base):
    """Requests of one day for which one policy in the shadow would have chosen one candidate."""

    __tablename__ = "shadow_days"

    began_unix_s: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    policy_version: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    model_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    """With `tool_id`: what the shadow would have chosen."""
    tool_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    requests: Mapped[int] = mapped_column(Integer)
    agreed: Mapped[int] = mapped_column(Integer)
    """Requests that went there."""
    confidence: Mapped[float] = mapped_column(Float)
    """Sum of the shadow's confidences."""
    verdicts: Mapped[int] = mapped_column(Integer)
    """Given on this day on requests that went there."""
    wins: Mapped[int] = mapped_column(Integer)


class ConsoleSessionRow(Base):
    """A browser that has shown a key; its cookie stands for the key until the session ends."""

    __tablename__ = "console_sessions"

    session_hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    """SHA-256 of the cookie, in hex."""
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.key_id"))
    expires_unix_s: Mapped[float] = mapped_column(Float, index=True)
