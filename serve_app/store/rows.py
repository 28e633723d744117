"""From the report of a request to the rows that are kept of it, and lines of the journal."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import orjson

from serve_app.schemas import Action, Report

MAX_QUERY_CHARS = 16_384
"""Of a query, from its start, that is kept; an embedder and the learning loop read no more."""
MAX_ERROR_CHARS = 2_000
"""The same of an error."""

_ROW_BYTES = 2_048
"""Of a row as a dictionary, without its long values."""
_BINARY = (("request", "embedding"), ("trajectory", "answer_embeddings"))
"""Values that are bytes; JSON has none."""

_Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RequestRows:
    """Values of the rows of one request."""

    request: _Values
    outcomes: list[_Values]
    trajectory: _Values | None
    shadow: _Values | None
    trace: _Values | None = None
    """`None` also in lines of the journal that an earlier version wrote."""
    lease_id: str | None = None
    """The lease that the request was paid from; `None`: its key had no limits."""

    def num_bytes(self) -> int:
        """Bytes in memory, about."""
        long = [self.request["query"], self.request["embedding"], self.request["error"]]
        long += [outcome["error"] for outcome in self.outcomes]
        if self.trajectory is not None:
            long.append(self.trajectory["answer_embeddings"])
        if self.trace is not None:
            long.append(self.trace["spans"])
        calls = sum(len(outcome["tool_calls"]) for outcome in self.outcomes)
        short = 2 + len(self.outcomes) + calls
        return short * _ROW_BYTES + sum(sys.getsizeof(value) for value in long if value is not None)

    def to_line(self) -> bytes:
        """A line of the journal.

        Raises:
            TypeError: If a value is nothing that a table takes.
        """
        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        for table, column in _BINARY:
            row = values[table]
            if row is not None and row[column] is not None:
                values[table] = row | {column: base64.b64encode(row[column]).decode()}
        return orjson.dumps(values, option=orjson.OPT_APPEND_NEWLINE)

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """What `to_line` wrote.

        Raises:
            ValueError, TypeError, KeyError: If the line is nothing of that kind.
        """
        values = orjson.loads(line)
        for table, column in _BINARY:
            row = values[table]
            if row is not None and column in row and row[column] is not None:
                row[column] = base64.b64decode(row[column], validate=True)
        values["request"].setdefault("cluster", None)  # an earlier version's line has none
        for outcome in values["outcomes"]:
            outcome.setdefault("signals", None)  # a line of an earlier version
        return cls(**values)


def storable_text(text: str) -> str:
    """The text as every database takes it: PostgreSQL has no NUL, and none has lone surrogates."""
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def storable_query(query: str) -> str:
    """A query as it is kept."""
    return storable_text(query[:MAX_QUERY_CHARS])


def rows_of(report: Report, alpha: float | None, created_unix_s: float) -> RequestRows:
    """The rows of a request.

    Args:
        report: What happened.
        alpha: The cost-quality dial it ran with.
        created_unix_s: When the report was recorded.
    """
    decision = report.decision
    request = {
        "request_id": report.request_id,
        "owner": report.owner,
        "query": storable_query(report.query),
        "embedding": report.embedding,
        "model_id": decision.pair.model_id,
        "tool_id": decision.pair.tool_id,
        "path": str(decision.path),
        "confidence": decision.confidence,
        "propensity": decision.propensity,
        "alpha": alpha,
        "policy_version": decision.policy_version,
        "cluster": decision.cluster,
        "pool_version": decision.pool_version,
        "prompt_tokens": report.usage.prompt_tokens,
        "completion_tokens": report.usage.completion_tokens,
        "cost_usd": report.usage.cost_usd,
        "seconds": report.seconds,
        "error": None if report.error is None else storable_text(report.error[:MAX_ERROR_CHARS]),
        "created_unix_s": created_unix_s,
    }
    outcomes = [
        {
            "request_id": report.request_id,
            "step_index": index,
            "model_id": step.pair.model_id,
            "tool_id": step.pair.tool_id,
            "path": str(step.path),
            "propensity": step.propensity,
            "prompt_tokens": step.usage.prompt_tokens,
            "completion_tokens": step.usage.completion_tokens,
            "cost_usd": step.usage.cost_usd,
            "seconds": step.seconds,
            "mean_logprob": step.mean_logprob,
            "signals": None if step.signals is None else asdict(step.signals),
            "tool_calls": [
                {
                    "tool_id": call.tool_id,
                    "function": call.function,
                    "ok": call.ok,
                    "seconds": call.seconds,
                }
                for call in step.tool_calls
            ],
            "error": None if step.error is None else storable_text(step.error[:MAX_ERROR_CHARS]),
        }
        for index, step in enumerate(report.steps)
    ]
    return RequestRows(
        request,
        outcomes,
        _trajectory(report),
        _shadow(report),
        _trace(report),
        report.lease_id,
    )


def _trajectory(report: Report) -> _Values | None:
    if not report.decisions:
        return None
    decisions = [
        {
            "action": str(decision.action),
            "pair": str(decision.pair) if decision.action is Action.ROUTE else None,
            "propensity": decision.propensity,
            "path": str(decision.path),
            "can_think": decision.can_think,
        }
        for decision in report.decisions
    ]
    known = report.circumstances
    if known is not None:
        for decision, seconds_left in zip(decisions, known.seconds_left, strict=True):
            decision["seconds_left"] = seconds_left
    return {
        "request_id": report.request_id,
        "decisions": decisions,
        "answer_step": report.answer_step,
        "pairs": known and [str(candidate.pair) for candidate in report.decision.candidates],
        "max_steps": known and known.max_steps,
        "max_cost_usd": known and known.max_cost_usd,
        "answer_keys": known and list(known.answer_keys),
        "answer_embeddings": known and _stacked(report.embedding, known.answer_embeddings),
    }


def _stacked(like: bytes | None, vectors: Sequence[bytes | None]) -> bytes:
    """Embeddings one after the other, zeros for those that are missing."""
    size = len(like or next(filter(None, vectors), b""))
    return b"".join(vector or bytes(size) for vector in vectors)


def _shadow(report: Report) -> _Values | None:
    shadow = report.decision.shadow
    if shadow is None:
        return None
    return {
        "request_id": report.request_id,
        "policy_version": shadow.policy_version,
        "action": str(shadow.action),
        "model_id": shadow.pair.model_id,
        "tool_id": shadow.pair.tool_id,
        "path": str(shadow.path),
        "confidence": shadow.confidence,
        "propensity": shadow.propensity,
    }


def _trace(report: Report) -> _Values | None:
    if not report.spans:
        return None
    told = [span._asdict() for span in report.spans]
    try:
        spans = orjson.dumps(told).decode()
    except TypeError:  # a lone surrogate, which no database takes
        spans = json.dumps(told, ensure_ascii=False).encode("utf-8", "replace").decode()
    return {
        "request_id": report.request_id,
        "stop": str(report.stop),
        "num_dropped": report.num_dropped,
        "spans": spans,
    }
