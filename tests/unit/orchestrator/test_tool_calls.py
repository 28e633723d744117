"""What models call: read with care, run, and when it cannot be read never taken for an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import (
    InvalidRequest,
    NoAnswer,
    ToolFailed,
    ToolRetry,
    UnfitForPair,
    UnreadableCall,
)
from serve_app.models.reply import ChoicePiece
from serve_app.orchestrator.pairs.tool_calls import ReplyGate, looks_like_call, read_arguments
from tests.executor_fakes import Bench, reply

CALL = '{"expression": "20 * 5"}'
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
RESIDUES = [
    'The answer is 20*5"}}\n</tool_call>',
    '<tool_call>\n{"name": "calculator", "arguments": {"expression": "20*5"}\n</tool_call>',
    "<tool_call>",
    "Let me see. <tool_call>\nnot json",
    '{"name": "calculator", "arguments": {"expression": "20*5"}}',
    '```json\n{"name": "calculator", "parameters": {"expression": "20*5"}}\n```',
    '{"name": "calculator", "arguments": {"expression": "20*5',
    'The answer is 20*5"}}',
    "[TOOL_CALLS] calculator",
]
ANSWERS = [
    "The answer is 100.",
    'Use {"name": "Ada", "age": 36} as the body.',
    '{"name": "Ada", "age": 36}',
    "It is \\boxed{\\frac{1}{2}}",
    "An <xml> tag is closed by </xml>; <tool> and <call/> are tags too.",
    "f'{{{x}}}'",
]


@pytest.mark.parametrize("text", RESIDUES)
def test_what_is_left_of_a_call_looks_like_one(text: str) -> None:
    assert looks_like_call(text, ["calculator"])


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_does_not_look_like_a_call(text: str) -> None:
    assert not looks_like_call(text, ["calculator"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", RESIDUES)
async def test_a_call_that_cannot_be_read_is_repaired_once(
    tmp_path: Path, text: str, stream: bool
) -> None:
    bench = Bench(tmp_path, reply(text), reply(calls=(CALL,)), reply("It is 100."))
    answer, _ = await bench.run(stream=stream)
    assert answer == "It is 100."
    assert [call.ok for call in bench.result.tool_calls] == [False, True]
    told = bench.engines.asked("m")[1]["messages"][-2:]
    assert told[0] == {"role": "assistant", "content": text}
    assert "looks like a tool call" in told[1]["content"]
    assert "calculator" in told[1]["content"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", [*RESIDUES, "", " \n"])
async def test_a_call_that_cannot_be_read_twice_is_never_the_answer(
    tmp_path: Path, text: str, stream: bool
) -> None:
    bench = Bench(tmp_path, reply(text))
    with pytest.raises(UnreadableCall) as caught:
        await bench.run(stream=stream)
    assert caught.value.status_code == 502
    assert bench.result.answer is None
    assert len(bench.engines.bodies) == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["<tool_call>", ""])
@pytest.mark.parametrize("tools", [(), (WEATHER,)])
async def test_a_call_that_the_callers_limit_cut_short_is_an_empty_answer_cut_short(
    tmp_path: Path, tools: tuple[Any, ...], text: str, stream: bool
) -> None:
    said = reply(text)
    said["choices"][0]["finish_reason"] = "length"
    bench = Bench(tmp_path, said)
    tool = "none" if tools else "calculator"
    answer, pieces = await bench.run(tool, stream=stream, tools=tools, sampling={"max_tokens": 1})
    assert answer == ""
    assert bench.result.choices[0].finish_reason == "length"
    assert len(bench.engines.bodies) == 1
    if stream:
        assert pieces[-1].finish_reason == "length"
    bench = Bench(tmp_path, said)
    if text:  # the model's own limit is no excuse
        with pytest.raises(UnreadableCall):
            await bench.run(tool, stream=stream, tools=tools)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_is_repaired_once_in_all_its_rounds(tmp_path: Path, stream: bool) -> None:
    bench = Bench(tmp_path, reply(RESIDUES[0]), reply(calls=(CALL,)), reply(RESIDUES[0]))
    with pytest.raises(UnreadableCall):
        await bench.run(stream=stream)
    assert len(bench.engines.bodies) == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", [*ANSWERS, "word " * 400])
async def test_an_answer_is_passed_on_unchanged(tmp_path: Path, text: str, stream: bool) -> None:
    bench = Bench(tmp_path, reply(text))
    assert (await bench.run(stream=stream))[0] == text
    assert len(bench.engines.bodies) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", [*RESIDUES, ""])
@pytest.mark.parametrize("tool", ["none", "lookup"])
async def test_without_tools_any_text_is_an_answer(
    tmp_path: Path, tool: str, text: str, stream: bool
) -> None:
    bench = Bench(tmp_path, reply(text))
    assert (await bench.run(tool, stream=stream))[0] == text
    assert len(bench.engines.bodies) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_words_before_a_call_are_no_part_of_the_answer(tmp_path: Path, stream: bool) -> None:
    bench = Bench(tmp_path, reply("I compute it.", (CALL,)), reply("100"))
    assert (await bench.run(stream=stream))[0] == "100"


async def test_a_long_answer_streams_before_its_end(tmp_path: Path) -> None:
    gate = ReplyGate(["calculator"], passes_calls=False)
    given = [gate.feed(piece("word " * 10)) for _ in range(30)]
    first = next(number for number, deltas in enumerate(given) if deltas)
    assert 5 < first < 15
    assert sum(map(len, given)) == 30  # nothing is lost
    assert gate.is_open
    assert gate.rest() == []


async def test_a_mark_that_comes_late_ends_the_stream_with_an_error() -> None:
    gate = ReplyGate(["calculator"], passes_calls=False)
    assert gate.feed(piece("word " * 200))
    gate.feed(piece('20*5"}}\n</tool'))
    with pytest.raises(UnreadableCall):
        gate.feed(piece("_call>"))


async def test_a_long_broken_call_is_held_back_to_its_end(tmp_path: Path) -> None:
    bench = Bench(tmp_path, reply("<tool_call>" + "x" * 5000), reply("100"))
    assert (await bench.run(stream=True))[0] == "100"


def piece(text: str) -> list[ChoicePiece]:
    return [ChoicePiece(0, text)]


# The caller's own tools.


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_of_the_callers_tool_reaches_the_caller(tmp_path: Path, stream: bool) -> None:
    said = reply("I look.", (CALL,))
    said["choices"][0]["message"]["tool_calls"][0]["function"]["name"] = "weather"
    bench = Bench(tmp_path, said)
    text, pieces = await bench.run("none", stream=stream, tools=(WEATHER,))
    assert text == "I look."
    (call,) = bench.result.choices[0].calls
    assert (call.name, call.arguments) == ("weather", CALL)
    if stream:
        assert [p.calls[0]["id"] for p in pieces if p.calls]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_broken_call_of_the_callers_tool_is_repaired_once(
    tmp_path: Path, stream: bool
) -> None:
    bench = Bench(tmp_path, reply("<tool_call>\n{"), reply("It is sunny."))
    assert (await bench.run("none", stream=stream, tools=(WEATHER,)))[0] == "It is sunny."
    bench = Bench(tmp_path, reply("<tool_call>\n{"))
    with pytest.raises(UnreadableCall):
        await bench.run("none", stream=stream, tools=(WEATHER,))


@pytest.mark.parametrize("changes", [{"tool_choice": "none"}, {}])
async def test_a_reply_to_the_callers_tools_may_be_empty_or_about_calls(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    text = "<tool_call> is a mark." if changes else ""
    bench = Bench(tmp_path, reply(text))
    assert (await bench.run("none", tools=(WEATHER,), **changes))[0] == text
    assert bench.engines.bodies[0][1]["tools"] == [WEATHER]


# Arguments.


@pytest.mark.parametrize(
    "arguments",
    [
        "{not json",
        '{"x": ' + "9" * 5000 + "}",
        "[" * 100_000,
        '{"x": ' + "[" * 900 + "]" * 900 + "}",
        '{"x": ' * 40 + "1" + "}" * 40,
        '{"x": NaN}',
        '{"x": -Infinity}',
        '"20 * 5"',
        "[1]",
        "null",
        '{"x": "' + "y" * 200_000 + '"}',
        "{}{}",
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_arguments_that_cannot_be_read_are_told_to_the_model(
    tmp_path: Path, arguments: str, stream: bool
) -> None:
    with pytest.raises(ToolRetry) as caught:
        read_arguments(arguments)
    assert len(caught.value.message) < 120
    bench = Bench(tmp_path, reply(calls=(arguments,)), reply("100"))
    assert (await bench.run(stream=stream))[0] == "100"
    assert bench.tools.arguments == []
    told = bench.engines.asked("m")[1]["messages"][-1]
    assert told["role"] == "tool"
    assert told["content"].startswith("Error: the arguments")


def test_arguments_that_can_be_read_are() -> None:
    assert read_arguments("") == {}
    assert read_arguments(CALL) == {"expression": "20 * 5"}
    assert read_arguments('{"x": [[[1]]]}') == {"x": [[[1]]]}


async def test_a_tool_that_was_not_offered_is_not_run(tmp_path: Path) -> None:
    said = reply(calls=(CALL,))
    said["choices"][0]["message"]["tool_calls"][0]["function"]["name"] = "python"
    bench = Bench(tmp_path, said, reply("100"))
    assert (await bench.run())[0] == "100"
    assert bench.tools.arguments == []


async def test_a_model_that_calls_for_ever_is_stopped(tmp_path: Path) -> None:
    bench = Bench(tmp_path, reply(calls=(CALL,)))
    with pytest.raises(NoAnswer, match="more than 3 times"):
        await bench.run()
    assert bench.result.answer is None


@pytest.mark.parametrize("tool", ["calculator", "best_of"])
async def test_a_pair_with_one_answer_refuses_to_give_several(tmp_path: Path, tool: str) -> None:
    bench = Bench(tmp_path, reply("100"))
    with pytest.raises(InvalidRequest, match="gives one answer, got 2"):
        await bench.run(tool, sampling={"n": 2})
    assert not bench.engines.bodies


# What the caller gives to a tool.


async def test_a_query_with_nothing_to_look_for_is_the_callers_fault(tmp_path: Path) -> None:
    bench = Bench(tmp_path, reply("100"))
    bench.tools.says = ToolRetry("'my secret' is empty")
    with pytest.raises(UnfitForPair) as caught:
        await bench.run("lookup", query="my secret")
    assert caught.value.status_code == 400
    assert "secret" not in caught.value.message


async def test_a_long_query_is_cut(tmp_path: Path) -> None:
    bench = Bench(tmp_path, reply("100"))
    query = "What is this? " * 1000
    await bench.run("lookup", query=query)
    assert len(bench.tools.arguments[0]["query"]) == 2000
    assert query in bench.engines.asked("m")[0]["messages"][-1]["content"]


async def test_a_tool_that_fails_is_our_fault(tmp_path: Path) -> None:
    bench = Bench(tmp_path, reply("100"))
    bench.tools.says = ToolFailed("no index")
    with pytest.raises(ToolFailed):
        await bench.run("lookup")
