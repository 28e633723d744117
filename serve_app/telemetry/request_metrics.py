"""What one finished request adds to the metrics, read from its report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from serve_app.schemas import DecidedBy, Report, SpanKind, SpanRecord
from serve_app.telemetry.metrics import (
    GATEWAY_COST_USD,
    GATEWAY_TOKENS,
    MODEL_CALLS,
    MODEL_RETRIES,
    MODEL_SECONDS,
    ROUTER_CONFIDENCE,
    ROUTER_DECISIONS,
    ROUTER_OUT_OF_DISTRIBUTION,
    ROUTER_SECONDS,
    RUN_FALLBACKS,
    RUN_STEPS,
    RUN_STOPS,
    TOOL_CALLS,
    TOOL_SECONDS,
)
from serve_app.telemetry.sinks import MetricSink

_UNSEEN_FAULT = "other"
"""Why a candidate failed whose span does not say."""


def count_request(metrics: MetricSink, report: Report) -> None:
    """Count a finished request, answered or not."""
    candidate, decision, usage = str(report.pair), report.decision, report.usage
    path = str(decision.path)
    metrics.record(ROUTER_DECISIONS, path=path, candidate=str(decision.pair))
    if decision.path is not DecidedBy.PINNED:
        metrics.record(ROUTER_CONFIDENCE, decision.confidence, path=path)
    if decision.path is DecidedBy.OUT_OF_DISTRIBUTION:
        metrics.record(ROUTER_OUT_OF_DISTRIBUTION)
    metrics.record(GATEWAY_TOKENS, usage.prompt_tokens, candidate=candidate, kind="prompt")
    metrics.record(GATEWAY_TOKENS, usage.completion_tokens, candidate=candidate, kind="completion")
    metrics.record(GATEWAY_COST_USD, usage.cost_usd, candidate=candidate)
    metrics.record(RUN_STOPS, stop=report.stop.value)
    for step in report.steps:
        metrics.record(RUN_STEPS, kind=step.action.value, outcome=_outcome(step.error is None))
        for call in step.tool_calls:
            metrics.record(TOOL_CALLS, tool=call.tool_id, outcome=_outcome(call.ok))
            metrics.record(TOOL_SECONDS, call.seconds, tool=call.tool_id)
    _count_spans(metrics, report.spans)


def _count_spans(metrics: MetricSink, spans: Sequence[SpanRecord]) -> None:
    for span in spans:
        if span.kind is SpanKind.MODEL:
            metrics.record(MODEL_CALLS, model=span.name, outcome=_outcome(span.error is None))
            metrics.record(MODEL_SECONDS, span.seconds or 0.0, model=span.name)
        elif span.kind is SpanKind.DECISION and "path" in span.attributes:
            metrics.record(ROUTER_SECONDS, span.seconds or 0.0, path=str(span.attributes["path"]))
    for call in _followed(spans, SpanKind.MODEL, same_name=True):
        metrics.record(MODEL_RETRIES, model=call.name)
    for step in _followed(spans, SpanKind.PAIR, same_name=False):
        reason = str(step.attributes.get("fault", _UNSEEN_FAULT))
        metrics.record(RUN_FALLBACKS, reason=reason)


def _followed(
    spans: Sequence[SpanRecord], kind: SpanKind, *, same_name: bool
) -> Iterator[SpanRecord]:
    """Spans of a kind that failed and were followed by another one below the same span."""
    parents = {span.parent_id for span in spans if span.kind is kind}
    for parent_id in parents:
        siblings = [span for span in spans if span.kind is kind and span.parent_id == parent_id]
        for first, second in pairwise(siblings):
            if first.error is not None and (first.name == second.name) is same_name:
                yield first


def _outcome(ok: bool) -> str:
    return "ok" if ok else "failed"
