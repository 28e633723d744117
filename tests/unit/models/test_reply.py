"""What is read of an engine's answer, and what pieces of one come to."""

from __future__ import annotations

from typing import Any

from serve_app.models.reply import (
    Choice,
    ChoicePiece,
    ChunkMerger,
    FunctionRequest,
    read_chunk,
    read_reply,
)
from serve_app.schemas import Usage

CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TOKENS = {"content": [{"token": "yes", "logprob": -0.5}], "refusal": None}


def piece(**delta: Any) -> ChoicePiece:
    (read,), _ = read_chunk({"choices": [{"index": 0, "delta": delta}]})
    return read


def test_an_answer_is_read_and_the_rest_is_kept_for_the_caller() -> None:
    message = {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": [CALL]}
    choice = {"index": 0, "message": message, "logprobs": TOKENS, "finish_reason": "stop"}
    remarks = {"native_finish_reason": "STOP"}
    engines_own = {"stop_reason": 2, "token_ids": [1]}
    usage = {"prompt_tokens": 3, "completion_tokens": None, "total_tokens": 3}
    reply = read_reply({"choices": [{**choice, **remarks, **engines_own}], "usage": usage})
    asked = FunctionRequest("call_1", "f", '{"x": 1}')
    read = Choice(0, "yes", TOKENS, "stop", {"refusal": None}, remarks, (asked,))
    assert reply.choices == [read]
    assert reply.usage == Usage(3, 0)
    assert read.tokens == TOKENS["content"]


def test_a_thought_is_noticed_under_either_name() -> None:
    for name in ("reasoning", "reasoning_content"):
        message = {"role": "assistant", "content": "", name: "hm"}
        (choice,) = read_reply({"choices": [{"index": 0, "message": message}]}).choices
        assert choice.has_thought


def test_what_an_engine_adds_to_a_call_is_told_to_it_again() -> None:
    signed = CALL | {"extra_content": {"signature": "abc"}}
    message = {"role": "assistant", "content": None, "tool_calls": [signed]}
    (choice,) = read_reply({"choices": [{"index": 0, "message": message}]}).choices
    assert [called.written() for called in choice.calls] == [signed]


def test_a_chunk_without_choices_may_say_the_usage() -> None:
    assert read_chunk({"usage": {"prompt_tokens": 3}}) == ([], Usage(3, 0))
    assert read_chunk({"choices": [], "usage": None}) == ([], None)
    assert read_chunk({"choices": [{"index": 1}]}) == ([ChoicePiece(1)], None)


def test_pieces_come_to_what_the_whole_answer_would_have_been() -> None:
    merger = ChunkMerger()
    merger.add([piece(role="assistant", content="")])
    merger.add([piece(content="ye"), ChoicePiece(1, "no", finish_reason="length")])
    merger.add([piece(content="s")._replace(logprobs=TOKENS)])
    begun = CALL | {"index": 0, "function": {"name": "f", "arguments": ""}}
    merger.add([piece(tool_calls=[begun])])
    for arguments in ('{"x":', " 1}"):
        merger.add([piece(tool_calls=[{"index": 0, "function": {"arguments": arguments}}])])
    merger.add([ChoicePiece(0, finish_reason="tool_calls")])
    asked = FunctionRequest("call_1", "f", '{"x": 1}')
    first = Choice(0, "yes", {"content": TOKENS["content"]}, "tool_calls", calls=(asked,))
    assert merger.choices() == [first, Choice(1, "no", finish_reason="length")]


def test_a_whole_answer_can_be_sent_as_one_piece_or_as_its_end_alone() -> None:
    choice = Choice(2, "yes", TOKENS, "length")
    assert choice.as_piece() == ChoicePiece(2, "yes", TOKENS, "length")
    assert choice.ending() == ChoicePiece(2, finish_reason="length")
    assert Choice(0).as_piece() == ChoicePiece(0, "", finish_reason="stop")


def test_of_a_piece_its_text_alone_can_be_passed_on() -> None:
    spoken = ChoicePiece(0, "yes", TOKENS, "stop", calls=[{"index": 0}])
    assert spoken.text_only() == ChoicePiece(0, "yes", TOKENS)
    assert ChoicePiece(0, "", finish_reason="stop").text_only() is None
