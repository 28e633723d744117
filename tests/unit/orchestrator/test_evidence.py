"""The signals of a step: what is read of its spans and its answer."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest

from serve_app.models.reply import Choice, FunctionRequest
from serve_app.orchestrator.evidence import signals_of, turn_of
from serve_app.orchestrator.trace import Span, SpanKind, Trace
from serve_app.schemas import ToolCall
from serve_app.signals import NUMBERS, Signals, abstains, read_signals, stacked

QUERY = "How many moons has Jupiter?"


def choice(text: str | None, *logprobs: float, calls: tuple[FunctionRequest, ...] = ()) -> Choice:
    tokens = [{"token": "x", "logprob": logprob} for logprob in logprobs]
    return Choice(0, text, {"content": tokens}, "stop", calls=calls)


def calling(*logprobs: float) -> Choice:
    return choice(None, *logprobs, calls=(FunctionRequest("1", "tool", "{}"),))


def step(*replies: Choice, calls: tuple[ToolCall, ...] = ()) -> Span:
    span = Trace("req_1").root.child(SpanKind.PAIR, "small@tool")
    for reply in replies:
        span.child(SpanKind.MODEL, "small").turn = turn_of([reply])
    for call in calls:
        span.child(SpanKind.TOOL, call.tool_id).called(call)
    return span


def test_the_turn_that_called_the_tool_is_told_apart_from_the_answer() -> None:
    answer = choice("95", -0.1, -0.3)
    span = step(calling(-0.2, -2.0), answer, calls=(ToolCall("tool", {}, True, "95", 0.1),))
    signals = signals_of(span, [answer], QUERY, offered=True)
    assert signals.call is not None
    assert signals.answer is not None
    assert (signals.call.least, signals.call.first) == (-2.0, -0.2)
    assert signals.answer.mean == pytest.approx(-0.2)
    assert (signals.num_turns, signals.num_calls, signals.kind) == (2, 1, "number")
    assert signals.numbers()[NUMBERS.index("not_called")] == 0.0


def test_a_tool_that_was_offered_and_not_called_shows() -> None:
    signals = signals_of(step(choice("95")), [choice("95")], QUERY, offered=True)
    assert signals.numbers()[NUMBERS.index("not_called")] == 1.0
    plain = signals_of(step(choice("95")), [choice("95")], QUERY, offered=False)
    assert plain.numbers()[NUMBERS.index("not_called")] == 0.0


def test_an_empty_search_differs_from_none_and_a_found_passage_has_its_scores() -> None:
    answer = [choice("Jupiter has 95 moons")]
    assert signals_of(step(), answer, QUERY, offered=False).num_sources is None
    empty = ToolCall("search", {}, True, "No sources found.", 0.1, {"sources": []})
    assert signals_of(step(calls=(empty,)), answer, QUERY, offered=False).num_sources == 0
    sources = [{"score": 0.03, "similarity": 0.4}, {"score": 0.01, "similarity": None}]
    found = ToolCall("search", {}, True, "[1] …", 0.1, {"sources": sources})
    signals = signals_of(step(calls=(found,)), answer, QUERY, offered=False)
    assert (signals.num_sources, signals.source_score, signals.source_similarity) == (2, 0.03, 0.4)
    assert 0 < signals.echo < 1


def test_samples_vote_and_a_verifier_model_rates() -> None:
    data = {"answers": ["4", "5", "4.0"], "scores": [0.2, 0.9, 0.4]}
    sampled = ToolCall("best_of", {"n": 3}, True, "4", 0.1, data)
    signals = signals_of(step(calls=(sampled,)), [choice("4")], QUERY, offered=False)
    assert signals.vote_share == pytest.approx(2 / 3)
    assert signals.rating == 0.4
    assert signals.mean_rating == pytest.approx(0.5)


def test_a_failed_step_has_signals_without_an_answer() -> None:
    signals = signals_of(step(), [], QUERY, offered=False)
    assert (signals.answer, signals.kind, signals.length) == (None, "none", 0)


@pytest.mark.parametrize(
    ("text", "says_none"),
    [
        ("I don't know.", True),
        ("I do not know who that is", True),
        ("The answer is not known.", True),
        ("I do not think so: it is 4", False),
        ("42", False),
        ("", False),
    ],
)
def test_an_answer_that_says_there_is_none(text: str, says_none: bool) -> None:
    assert abstains(text) is says_none


def test_what_the_store_keeps_is_read_again_and_what_it_does_not_know_is_left_out() -> None:
    answer = [choice("95", -0.1, -math.inf)]
    signals = signals_of(step(answer[0]), answer, QUERY, offered=True)
    assert read_signals(asdict(signals)) == signals
    assert read_signals(asdict(signals) | {"of_a_later_version": 1}) == signals
    assert read_signals({"num_calls": "many"}) is None
    assert read_signals(None) is None
    table = stacked([signals.numbers(), ()])
    assert table.shape == (2, len(NUMBERS))
    assert math.isnan(table[1].max())
    assert len(Signals().numbers()) == len(NUMBERS)
