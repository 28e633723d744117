"""Spans of a request: a tree with ids from the beginning, and with bounds."""

from __future__ import annotations

import pytest

from serve_app.errors import EngineError
from serve_app.orchestrator import trace as module
from serve_app.orchestrator.trace import MAX_SPANS, SpanKind, Trace
from serve_app.schemas import DecidedBy, Pair, Step, ToolCall, Usage


def step() -> Step:
    return Step(Pair("m", "none"), DecidedBy.PINNED, 1.0, Usage(), 0.0)


def test_a_span_has_its_id_before_it_ends() -> None:
    trace = Trace("req_1")
    pair = trace.root.child(SpanKind.PAIR, "m@none")
    model = pair.child(SpanKind.MODEL, "m")
    assert [span.span_id for span in trace.root.walk()] == [0, 1, 2]
    assert (model.seconds, model.parent) == (None, pair)
    with model:
        pass
    assert model.seconds is not None


def test_use_is_charged_to_every_span_above() -> None:
    trace = Trace("req_1")
    first, second = (trace.root.child(SpanKind.PAIR, "m@none") for _ in range(2))
    first.child(SpanKind.MODEL, "m").charge(Usage(1, 2, 0.5))
    second.child(SpanKind.MODEL, "m").charge(Usage(10, 20, 5.0))
    assert (first.usage, second.usage) == (Usage(1, 2, 0.5), Usage(10, 20, 5.0))
    assert trace.root.usage == Usage(11, 22, 5.5)


def test_a_block_that_fails_says_why_without_the_words_of_unforeseen_errors() -> None:
    trace = Trace("req_1")
    for error in (EngineError("broken"), ValueError("/a/path")):
        with pytest.raises(type(error)), trace.root.child(SpanKind.MODEL, "m"):
            raise error
    assert [span.error for span in trace.root.children] == ["broken", "ValueError"]


def test_spans_beyond_the_bound_are_counted_and_charged_and_steps_are_all_kept() -> None:
    trace = Trace("req_1")
    for _ in range(2 * MAX_SPANS):
        with trace.root.child(SpanKind.MODEL, "m") as span:
            span.charge(Usage(1, 0, 0.0))
    assert sum(1 for _ in trace.root.walk()) == MAX_SPANS
    assert trace.num_dropped == trace.num_begun - MAX_SPANS
    assert trace.root.usage.prompt_tokens == 2 * MAX_SPANS
    late = trace.root.child(SpanKind.PAIR, "m@none")
    late.step = step()
    assert trace.steps() == [late.step]


def test_what_tools_say_is_kept_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    trace = Trace("req_1")
    for _ in range(3):
        with trace.root.child(SpanKind.TOOL, "search") as span:
            span.called(ToolCall("search", {"query": "x"}, True, "y" * 400, 0.1, {"a": "b"}))
    texts = [len(call.text) for call in trace.root.tool_calls()]
    assert texts[:2] == [400, 400]
    assert texts[2] < 200
    assert trace.root.tool_calls()[2].data == {}


def test_steps_are_in_the_order_in_which_they_began() -> None:
    trace = Trace("req_1")
    spans = [trace.root.child(SpanKind.PAIR, name) for name in "ab"]
    for span in reversed(spans):
        span.step = step()
    assert [a is b for a, b in zip(trace.steps(), (s.step for s in spans), strict=True)] == [
        True
    ] * 2
