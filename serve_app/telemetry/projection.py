"""From what a request's trace and log line say to spans as OpenTelemetry has them.

The engine's own trace is the truth; this is a view of it, made when the request is over. Nothing
here imports OpenTelemetry.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from serve_app.schemas import PATTERN_PREFIX, Fact, Report, SpanKind, SpanRecord
from serve_app.telemetry import conventions as names
from serve_app.telemetry.request_line import RequestLine

_NS = 1_000_000_000
_EMBEDDING_NUMBER = 1_000_000
"""Added to the number of a decision: that of the embedding below it."""
_DATASTORES = frozenset({"retrieval"})
"""Types of tools that look things up in a corpus."""
_PROVIDER = "atlas"
_OTHER_ERROR = "_OTHER"

Kind = Literal["server", "client", "internal"]


@dataclass(frozen=True, slots=True)
class VerdictView:
    """A user's verdict on an earlier request."""

    request_id: str
    score: float
    label: str


@dataclass(frozen=True, slots=True)
class SpanView:
    """One span as it is told."""

    name: str
    number: int
    """In its request."""
    parent: int | None
    """Number of the span above; `None`: the caller's, where there is one."""
    kind: Kind
    began_ns: int
    """Unix time, as `ended_ns`."""
    ended_ns: int
    attributes: dict[str, Fact]
    error: str | None = None
    """Why it failed; `None`: it did not."""
    event: tuple[str, dict[str, Fact]] | None = None
    """Name and attributes of what happened at its end."""


@dataclass(frozen=True, slots=True)
class _Told:
    """What the kind of a span decides."""

    name: str
    kind: Kind = "internal"
    attributes: dict[str, Fact] = field(default_factory=dict)


def server_span(
    line: RequestLine,
    ended_ns: int,
    verdict: VerdictView | None,
    report: Report | None,
    *,
    content: bool,
) -> SpanView:
    """The span of an HTTP request.

    Args:
        line: Its log line, with the time that it took.
        ended_ns: When its last byte was sent, in Unix time.
        verdict: What it said of an earlier request.
        report: Of the run that it asked for.
        content: Whether to tell what was asked and answered.
    """
    attributes: dict[str, Fact] = {
        names.HTTP_METHOD: line.method,
        names.HTTP_ROUTE: line.route,
        names.HTTP_STATUS: line.status,
        names.REQUEST_ID: line.request_id,
    }
    ours: dict[str, Fact | None] = {
        "candidate": line.pair,
        "path": line.path,
        "policy_version": line.policy_version,
    }
    ours |= {"stop": line.stop, "steps": line.steps, "cost_usd": line.cost_usd}
    attributes |= {names.ATLAS + name: value for name, value in ours.items() if value is not None}
    if line.pair is not None:
        attributes[names.RESPONSE_ID] = f"chatcmpl-{line.request_id}"
    for name, tokens in (
        (names.INPUT_TOKENS, line.prompt_tokens),
        (names.OUTPUT_TOKENS, line.completion_tokens),
    ):
        if tokens is not None:
            attributes[name] = tokens
    if content and report is not None:
        attributes[names.INPUT_MESSAGES] = _messages("user", report.query)
        final = report.final_step
        if final is not None and final.answer is not None:
            attributes[names.OUTPUT_MESSAGES] = _messages("assistant", final.answer)
    # A refusal is the caller's: by the conventions a server's span fails from 500 on.
    broke_off = line.status == 200 and line.error is not None
    failed = line.status >= 500 or line.status == 0 or broke_off
    if line.error is not None:
        attributes[names.ERROR_TYPE] = line.error
    began_ns = ended_ns - int(line.seconds * _NS)
    return SpanView(
        f"{line.method} {line.route}",
        0,
        None,
        "server",
        began_ns,
        ended_ns,
        attributes,
        (line.error or line.stop or "failed") if failed else None,
        None if verdict is None else _evaluation(verdict),
    )


def _evaluation(verdict: VerdictView) -> tuple[str, dict[str, Fact]]:
    return names.EVALUATION, {
        names.EVALUATION_NAME: "user_feedback",
        names.EVALUATION_SCORE: verdict.score,
        names.EVALUATION_LABEL: verdict.label,
        names.RESPONSE_ID: f"chatcmpl-{verdict.request_id}",
    }


def run_spans(report: Report, began_ns: int, *, content: bool) -> Iterator[SpanView]:
    """The spans below that of the HTTP request.

    Args:
        report: Of the run.
        began_ns: When the run began, in Unix time.
        content: Whether to tell what models and tools were given and said.
    """
    for record in report.spans:
        if record.kind is SpanKind.REQUEST:
            continue
        told = _TELLERS.get(record.kind, _own)(record)
        attributes = told.attributes | _facts(record)
        if content:
            attributes |= _content(record)
        start_ns = began_ns + int(record.began_s * _NS)
        if record.error is not None:
            attributes[names.ERROR_TYPE] = str(record.attributes.get("fault", _OTHER_ERROR))
        yield SpanView(
            told.name,
            record.span_id,
            record.parent_id,
            told.kind,
            start_ns,
            start_ns + int((record.seconds or 0.0) * _NS),
            attributes,
            record.error,
        )
        if "embedding_s" in record.attributes:
            yield _embedding(record, start_ns)


def _embedding(decision: SpanRecord, start_ns: int) -> SpanView:
    """The embedding of the query, which a decision tells in its attributes."""
    facts = decision.attributes
    began_ns = start_ns + int(float(facts.get("embedding_after_s", 0.0)) * _NS)
    return SpanView(
        names.EMBEDDINGS,
        _EMBEDDING_NUMBER + decision.span_id,
        decision.span_id,
        "client",
        began_ns,
        began_ns + int(float(facts["embedding_s"]) * _NS),
        {names.OPERATION: names.EMBEDDINGS, names.PROVIDER: _PROVIDER},
    )


def _candidate(record: SpanRecord) -> _Told:
    is_pattern = record.name.startswith(PATTERN_PREFIX)
    operation = names.INVOKE_WORKFLOW if is_pattern else names.INVOKE_AGENT
    agent = record.name.removeprefix(PATTERN_PREFIX)
    return _operation(record, operation, agent, {names.AGENT: agent})


def _thought(record: SpanRecord) -> _Told:
    return _operation(record, names.PLAN, record.name, {names.AGENT: record.name})


def _model(record: SpanRecord) -> _Told:
    told: dict[str, Fact] = {names.REQUEST_MODEL: record.name, names.PROVIDER: _PROVIDER}
    return _operation(record, names.CHAT, record.name, told, "client")


def _tool(record: SpanRecord) -> _Told:
    if record.attributes.get("type") in _DATASTORES:
        return _operation(record, names.RETRIEVAL, record.name, {names.DATA_SOURCE: record.name})
    told: dict[str, Fact] = {names.TOOL_NAME: record.name, names.TOOL_TYPE: "function"}
    return _operation(record, names.EXECUTE_TOOL, record.name, told)


def _operation(
    record: SpanRecord,
    operation: str,
    what: str,
    attributes: dict[str, Fact],
    kind: Kind = "internal",
) -> _Told:
    usage: dict[str, Fact] = {}
    if record.prompt_tokens or record.completion_tokens:
        usage[names.INPUT_TOKENS] = record.prompt_tokens
        usage[names.OUTPUT_TOKENS] = record.completion_tokens
    if record.cost_usd:
        usage[names.COST_USD] = record.cost_usd
    told = {names.OPERATION: operation} | attributes | usage
    return _Told(f"{operation} {what}", kind, told)


def _decision(record: SpanRecord) -> _Told:
    return _Told("atlas.route")


def _own(record: SpanRecord) -> _Told:
    """What the conventions have no name for: nodes, rules, checks, shortened conversations."""
    return _Told(f"atlas.{record.kind} {record.name}")


_TELLERS = {
    SpanKind.PAIR: _candidate,
    SpanKind.CALL: _candidate,
    SpanKind.THOUGHT: _thought,
    SpanKind.MODEL: _model,
    SpanKind.TOOL: _tool,
    SpanKind.DECISION: _decision,
}


def _facts(record: SpanRecord) -> dict[str, Fact]:
    return {names.ATLAS + name: fact for name, fact in record.attributes.items()}


def _content(record: SpanRecord) -> dict[str, Fact]:
    told: dict[str, Fact] = {}
    if record.kind is SpanKind.TOOL:
        if record.arguments is not None:
            told[names.TOOL_ARGUMENTS] = record.arguments
        if record.text is not None:
            told[names.TOOL_RESULT] = record.text
    elif record.text is not None:
        told[names.OUTPUT_MESSAGES] = _messages("assistant", record.text)
    return told


def _messages(role: str, text: str) -> str:
    """One message as the conventions write it."""
    parts = [{"type": "text", "content": text}]
    return json.dumps([{"role": role, "parts": parts}], ensure_ascii=False)
