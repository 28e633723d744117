"""Spans of a request: a tree with ids from the beginning, and with bounds."""

from __future__ import annotations

import math

import pytest

from serve_app.errors import EngineError, ToolFailed
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


def test_the_listener_hears_of_each_span_that_is_kept_when_it_begins_and_ends() -> None:
    heard: list[tuple[str, int]] = []
    trace = Trace("req_1", lambda phase, span: heard.append((phase, span.span_id)))
    with trace.root.child(SpanKind.PAIR, "m@none") as pair, pair.child(SpanKind.MODEL, "m"):
        pass
    trace.root.end()
    assert heard == [
        ("begin", 0),
        ("begin", 1),
        ("begin", 2),
        ("end", 2),
        ("end", 1),
        ("end", 0),
    ]


def test_nobody_hears_of_a_span_beyond_the_bound() -> None:
    heard: list[int] = []
    trace = Trace("req_1", lambda _, span: heard.append(span.span_id))
    for _ in range(2 * MAX_SPANS):
        trace.root.child(SpanKind.MODEL, "m").end()
    assert max(heard) == MAX_SPANS - 1
    assert len(heard) == 1 + 2 * (MAX_SPANS - 1)


def test_a_step_below_a_span_that_was_not_kept_is_told_below_the_nearest_that_was() -> None:
    trace = Trace("req_1")
    node = trace.root.child(SpanKind.NODE, "vote")
    for _ in range(MAX_SPANS):
        dropped = node.child(SpanKind.NODE, "ask")
    late = dropped.child(SpanKind.PAIR, "m@none")
    late.charge(Usage(1, 2, 0.5))
    assert trace.records()[-1].span_id == late.span_id
    assert trace.records()[-1].parent_id == node.span_id
    assert dropped.usage == Usage(1, 2, 0.5)


def test_a_record_has_what_is_small_and_no_word_of_the_content() -> None:
    trace = Trace("req_1")
    with trace.root.child(SpanKind.MODEL, "m") as model:
        model.said("secret")
        model.charge(Usage(3, 4, 0.5))
        model.attributes["count"] = 7
    with trace.root.child(SpanKind.TOOL, "search") as tool:
        tool.called(ToolCall("search", {"query": "secret"}, True, "secret", 0.1, {"a": "secret"}))
    with pytest.raises(ToolFailed), trace.root.child(SpanKind.TOOL, "python"):
        raise ToolFailed("ValueError: secret")
    trace.root.child(SpanKind.VALIDATION, "m").end("this is no call: secret")
    records = trace.records()
    assert "secret" not in repr(records)
    assert [record.error for record in records] == [None, None, None, "ToolFailed", "failed"]
    said = records[1]
    assert (said.prompt_tokens, said.completion_tokens, said.cost_usd) == (3, 4, 0.5)
    assert (said.parent_id, said.attributes) == (0, {"count": 7})
    assert 0 <= said.began_s <= said.began_s + (said.seconds or 0.0) < 10


def test_where_content_is_kept_a_record_has_it_up_to_a_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_CONTENT_BYTES", 19)
    trace = Trace("req_1", keeps_content=True)
    with trace.root.child(SpanKind.TOOL, "search") as tool:
        tool.called(ToolCall("search", {"q": "é"}, True, "found", 0.1))
    with trace.root.child(SpanKind.MODEL, "m") as model:
        model.said("äöüß and more")
    _, search, answer = trace.records()
    assert (search.arguments, search.text) == ('{"q": "é"}', "found")
    assert answer.text == "ä"  # 16 of the 19 bytes are taken, and half a letter is none


def test_a_call_that_was_refused_is_told_as_failed() -> None:
    trace = Trace("req_1")
    with trace.root.child(SpanKind.TOOL, "search") as tool:
        tool.called(ToolCall("search", {}, False, "not run", 0.0))
    assert trace.records()[1].error == "failed"


def test_attributes_of_a_record_are_few_short_and_fit_for_json() -> None:
    trace = Trace("req_1")
    trace.root.attributes["ratio"] = math.inf
    trace.root.attributes["why"] = "x" * 10_000
    trace.root.attributes |= {f"a{number}": number for number in range(100)}
    kept = trace.records()[0].attributes
    assert len(kept) == module.MAX_ATTRIBUTES
    assert (kept["ratio"], kept["why"]) == ("inf", "x" * module.MAX_ATTRIBUTE_CHARS)
