"""Answers as OpenAI's clients get them, from what engines of several makes say."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.gateway.chat.writing import ChunkWriter, completion
from serve_app.models.reply import read_chunk, read_reply
from serve_app.orchestrator.answer import Answer
from serve_app.orchestrator.run import Piece, SpanEvent
from serve_app.schemas import ChatCall, DecidedBy, Limits, Pair, SpanKind, SpanRecord

PAIR = Pair("small", "none")
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOKENS = {"content": [{"token": "yes", "logprob": -0.5, "bytes": None}], "refusal": None}
REST: dict[str, Any] = {"logprobs": None, "finish_reason": None}


def call(**sampling: Any) -> ChatCall:
    return ChatCall("req_1", "small", ({"role": "user", "content": "?"},), sampling, Limits(0.0, 9))


def piece(*deltas: dict[str, Any], index: int = 0) -> Piece:
    chunk = {"choices": [{"index": index, "delta": delta} for delta in deltas]}
    return Piece(PAIR, DecidedBy.PINNED, read_chunk(chunk)[0])


def deltas(*pieces: Piece) -> list[dict[str, Any]]:
    writer = ChunkWriter(call())
    return [c["choices"][0]["delta"] for piece in pieces for c in writer.chunks(piece)]


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ({"content": "yes"}, {"content": "yes"}),
        ({}, {"content": None}),
        ({"content": "yes", "refusal": None}, {"content": "yes"}),
        ({"content": "yes", "annotations": []}, {"content": "yes", "annotations": []}),
        ({"content": None, "tool_calls": [CALL]}, {"content": None, "tool_calls": [CALL]}),
        ({"content": "yes", "tool_calls": []}, {"content": "yes", "tool_calls": []}),
        ({"content": "yes", "reasoning": "hm"}, {"content": "yes"}),
        ({"content": "", "reasoning_content": "hm"}, {"content": "", "reasoning_content": "hm"}),
    ],
)
def test_a_message_has_what_the_engine_says_and_nothing_that_is_null_but_the_content(
    said: dict[str, Any], written: dict[str, Any]
) -> None:
    choice = {"index": 0, "message": {"role": "assistant", **said}, "finish_reason": "stop"}
    choices = read_reply({"choices": [choice]}).choices
    extension = {"pair": "small@none", "usage": {"total_tokens": 3}}
    told = completion(call(), Answer(choices, PAIR, DecidedBy.PINNED, 0), extension)
    assert told["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", **written},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert (told["id"], told["object"]) == ("chatcmpl-req_1", "chat.completion")
    assert (told["model"], told["usage"]) == ("small@none", {"total_tokens": 3})
    assert told["atlas"] == extension


@pytest.mark.parametrize(("asked", "shown"), [(True, TOKENS), (False, None)])
def test_log_probabilities_are_for_who_asked_for_them(asked: bool, shown: Any) -> None:
    choice = {"index": 0, "message": {"content": "yes"}, "logprobs": TOKENS}
    choices = read_reply({"choices": [choice]}).choices
    extension: dict[str, Any] = {"pair": "small@none", "usage": {}}
    answer = Answer(choices, PAIR, DecidedBy.PINNED, 0)
    told = completion(call(logprobs=asked), answer, extension)
    assert told["choices"][0]["logprobs"] == shown


def test_the_first_chunk_of_a_choice_has_the_role_and_that_of_a_stream_names_the_pair() -> None:
    writer = ChunkWriter(call())
    chunks = [
        chunk
        for piece in (piece({"content": "a"}), piece({"content": "b"}), piece({}, index=1))
        for chunk in writer.chunks(piece)
    ]
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "delta": {"role": "assistant", "content": "a"}, **REST}],
        [{"index": 0, "delta": {"content": "b"}, **REST}],
        [{"index": 1, "delta": {"role": "assistant", "content": ""}, **REST}],
    ]
    assert [chunk.get("atlas") for chunk in chunks] == [
        {"pair": "small@none", "path": "pinned"},
        None,
        None,
    ]


def test_a_stream_passes_on_what_the_engine_says_beside_the_text() -> None:
    first = {**CALL, "index": 0}
    assert deltas(
        piece({"role": "assistant", "content": None, "tool_calls": [first], "refusal": None}),
        piece({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}),
        piece({"content": "", "reasoning": "hm"}),
        piece({"content": None, "reasoning_content": "hm"}),
    ) == [
        {"role": "assistant", "tool_calls": [first]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]},
        {"content": ""},
        {"reasoning_content": "hm"},
    ]


def test_an_event_is_a_chunk_without_choices() -> None:
    span = SpanRecord(1, 0, SpanKind.PAIR, "small@none", 0.0, None, None, 0, 0, 0.0, {})
    event = Piece(PAIR, DecidedBy.PINNED, (), SpanEvent("begin", span))
    (chunk,) = ChunkWriter(call()).chunks(event)
    assert (chunk["model"], chunk["choices"]) == ("small@none", [])
    assert chunk["atlas"] == {
        "path": "pinned",
        "event": {"type": "begin", "span": span._asdict()},
    }
