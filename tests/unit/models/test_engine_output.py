"""What engines say is checked where it enters: whatever it is, an answer or an `EngineError`."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.errors import EngineError
from serve_app.models.engine_output import MAX_CALLS, StreamChecker, checked_completion

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 64}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
WHOLE = {
    "id": "chatcmpl-1",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "yes", "tool_calls": [CALL]},
            "logprobs": {"content": [{"token": "yes", "logprob": -0.5, "top_logprobs": []}]},
            "finish_reason": "tool_calls",
            "token_ids": [1],
        }
    ],
    "usage": USAGE,
}
CHUNK = {
    "choices": [{"index": 0, "delta": {"content": "yes", "tool_calls": [{"index": 0, **CALL}]}}]
}
LAST = {"choices": [], "usage": USAGE}


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def changed(answer: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one part replaced."""
    copied: Any = copy.deepcopy(answer)
    *parents, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    place = copied
    for part in parents:
        place = place[part]
    place[last] = value
    return copied  # type: ignore[no-any-return]


def test_answers_pass_as_they_are() -> None:
    assert checked_completion(WHOLE, BODY) is WHOLE
    checker = StreamChecker(BODY)
    assert checker.checked([CHUNK, LAST]) == [CHUNK, LAST]
    assert checker.checked([]) == []
    checker.end()


MESSAGE = "choices.0.message"
WRONG_EVERYWHERE: list[tuple[str, Any]] = [
    ("choices", "text"),
    ("choices", {}),
    ("choices.0", None),
    ("choices.0.index", "0"),
    ("choices.0.index", 1),
    ("choices.0.index", -1),
    ("choices.0.index", 10**9),
    ("choices.0.finish_reason", ["stop"]),
    ("choices.0.logprobs", {"content": [{"token": "yes"}]}),
    ("choices.0.logprobs", {"content": [{"logprob": float("nan")}]}),
    ("choices.0.logprobs", {"content": "yes"}),
    ("usage", "many"),
    ("usage", {"prompt_tokens": "3", "completion_tokens": 2}),
    ("usage", {"prompt_tokens": 3.5, "completion_tokens": 2}),
    ("usage", {"prompt_tokens": -3, "completion_tokens": 2}),
    ("usage", {"prompt_tokens": 10**30, "completion_tokens": 2}),
    ("extra", deep(2000)),
    ("extra", "\ud800"),
    ("extra", {1: 2}),
    ("extra", 10**400),
    ("extra", "x" * (5 << 20)),
]
WRONG_WHOLE: list[tuple[str, Any]] = [
    ("choices", []),
    ("choices.0.message", None),
    ("choices.0.message", "yes"),
    (f"{MESSAGE}.role", "user"),
    (f"{MESSAGE}.content", ["yes"]),
    (f"{MESSAGE}.tool_calls", {}),
    (f"{MESSAGE}.tool_calls", [CALL] * (MAX_CALLS + 1)),
    (f"{MESSAGE}.tool_calls.0.id", None),
    (f"{MESSAGE}.tool_calls.0.id", ""),
    (f"{MESSAGE}.tool_calls.0.type", "code"),
    (f"{MESSAGE}.tool_calls.0.function", None),
    (f"{MESSAGE}.tool_calls.0.function", {"arguments": "{}"}),
    (f"{MESSAGE}.tool_calls.0.function", {"name": "f"}),
    (f"{MESSAGE}.tool_calls.0.function", {"name": "f", "arguments": {"x": 1}}),
    (f"{MESSAGE}.tool_calls.0.function", {"name": "f" * 300, "arguments": "{}"}),
]
DELTA = "choices.0.delta"
WRONG_CHUNK: list[tuple[str, Any]] = [
    (DELTA, "yes"),
    (f"{DELTA}.content", 3),
    (f"{DELTA}.tool_calls.0.index", 10**9),
    (f"{DELTA}.tool_calls.0.index", MAX_CALLS),
    (f"{DELTA}.tool_calls.0.index", -1),
    (f"{DELTA}.tool_calls.0.index", "0"),
    (f"{DELTA}.tool_calls.0", {"id": "call_1"}),
    (f"{DELTA}.tool_calls.0.function", {"name": "f", "arguments": {"x": 1}}),
    (f"{DELTA}.tool_calls", [{"index": 0, **CALL}] * (MAX_CALLS + 1)),
]


@pytest.mark.parametrize(("path", "value"), WRONG_EVERYWHERE + WRONG_WHOLE)
def test_a_whole_answer_that_is_none_is_an_engine_error(path: str, value: Any) -> None:
    answer = changed(WHOLE, path, value)
    with pytest.raises(EngineError) as caught:
        checked_completion(answer, BODY)
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(("path", "value"), WRONG_EVERYWHERE + WRONG_CHUNK)
def test_a_chunk_that_is_none_is_an_engine_error(path: str, value: Any) -> None:
    with pytest.raises(EngineError):
        StreamChecker(BODY).checked([changed(CHUNK, path, value)])


@pytest.mark.parametrize("batch", [None, "text", CHUNK, [None], ["text"], [[]]])
def test_a_batch_that_is_none_is_an_engine_error(batch: Any) -> None:
    with pytest.raises(EngineError):
        StreamChecker(BODY).checked(batch)


@pytest.mark.parametrize("lacking", ["id", "function"])
def test_a_streamed_call_without_an_id_or_a_name_is_an_engine_error(lacking: str) -> None:
    call = {"index": 0, **{name: part for name, part in CALL.items() if name != lacking}}
    checker = StreamChecker(BODY)
    checker.checked([changed(CHUNK, f"{DELTA}.tool_calls.0", call)])
    with pytest.raises(EngineError, match="without an id or a name"):
        checker.end()


def test_a_streamed_call_that_was_left_out_is_an_engine_error() -> None:
    checker = StreamChecker(BODY)
    checker.checked([changed(CHUNK, f"{DELTA}.tool_calls.0.index", 2)])
    with pytest.raises(EngineError):
        checker.end()


def test_more_choices_than_asked_for_are_an_engine_error() -> None:
    second = {**WHOLE["choices"][0], "index": 1}  # type: ignore[index]
    two = {**WHOLE, "choices": [WHOLE["choices"][0], second]}  # type: ignore[index]
    with pytest.raises(EngineError):
        checked_completion(two, BODY)
    assert checked_completion(two, BODY | {"n": 2}) is two
    with pytest.raises(EngineError):
        checked_completion({**WHOLE, "choices": [second, second]}, BODY | {"n": 2})


def test_a_stream_without_an_end_is_cut_off() -> None:
    checker = StreamChecker(BODY)
    taken = 0
    chunk = changed(CHUNK, DELTA, {"content": "x" * 1000})

    def take() -> None:
        nonlocal taken
        while taken < 100_000:
            checker.checked([chunk])
            taken += 1

    with pytest.raises(EngineError, match="too large"):
        take()
    assert taken < 2000  # a little over 1 MiB for 64 tokens


def test_an_answer_may_be_as_long_as_was_asked_for() -> None:
    long = changed(WHOLE, f"{MESSAGE}.content", "x" * (8192 * 8))
    assert checked_completion(long, BODY | {"max_tokens": 8192}) is long


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
_PATHS = ["choices", "choices.0", "choices.0.index", "usage", "choices.0.logprobs"]


@settings(max_examples=300)
@given(
    st.sampled_from(
        [(WHOLE, path) for path in [*_PATHS, MESSAGE, f"{MESSAGE}.tool_calls.0"]]
        + [(CHUNK, path) for path in [*_PATHS[:3], DELTA, f"{DELTA}.tool_calls.0"]]
    ),
    _JSON,
)
def test_whatever_stands_in_an_answer_the_check_answers_or_says_engine_error(
    case: tuple[dict[str, Any], str], value: Any
) -> None:
    answer, path = case

    def whole() -> Any:
        return checked_completion(changed(answer, path, value), BODY)

    def streamed() -> Any:
        return StreamChecker(BODY).checked([changed(answer, path, value)])

    check: Callable[[], Any] = whole if answer is WHOLE else streamed
    with contextlib.suppress(EngineError):
        check()
