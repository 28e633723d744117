"""Request bodies: what is accepted, what is refused and with which words, what an engine gets."""

from __future__ import annotations

import contextlib
import gc
import json
import time
import tracemalloc
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app import schema_check
from serve_app.config import LimitsConfig
from serve_app.errors import InvalidRequest
from serve_app.gateway.chat import parsing
from serve_app.gateway.chat.chat_call import to_chat_call
from serve_app.gateway.chat.parsing import parse_json, validate
from serve_app.gateway.chat.wire import ChatRequest, FeedbackRequest
from serve_app.schemas import ChatCall

LIMITS = LimitsConfig()
MIB = 1 << 20
USER = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def read(body: bytes | dict[str, Any], limits: LimitsConfig = LIMITS) -> ChatCall:
    if isinstance(body, dict):
        body = json.dumps({"model": "atlas", "messages": [USER], **body}).encode()
    request = validate(ChatRequest, parse_json(body, limits.max_json_depth))
    return to_chat_call(request, request_id="req_1", owner="me", default_alpha=0.1, limits=limits)


def refusal(body: bytes | dict[str, Any], limits: LimitsConfig = LIMITS) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        read(body, limits)
    return caught.value


def tool_with(schema: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}


def tools_with(count: int, schema: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "type": "function",
            "function": {"name": f"f{i}", "parameters": schema | {"$comment": str(i)}},
        }
        for i in range(count)
    ]


def structured(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


SCHEMA_FIELD = "response_format.json_schema.schema"


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def test_a_plain_request_becomes_a_call_with_the_servers_defaults() -> None:
    call = read({})
    assert call.messages == ({"role": "user", "content": "hi"},)
    assert call.sampling == {}
    assert call.limits.alpha == 0.1
    assert call.limits.deadline_s == LIMITS.default_deadline_s
    assert call.limits.max_steps == LIMITS.max_steps
    assert (call.owner, call.request_id, call.explain) == ("me", "req_1", False)


def test_everything_allowed_arrives_under_its_own_name() -> None:
    sampling = {
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "seed": -5,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "logprobs": True,
        "top_logprobs": 3,
        "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    }
    call = read(
        {
            **sampling,
            "max_completion_tokens": 9,
            "stop": "END",
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "add"}},
            "atlas": {"alpha": 1, "max_cost_usd": 0.5, "deadline_s": 2, "max_steps": 2}
            | {"models": ["a"], "tools": ["none"], "explain": True},
        }
    )
    assert call.sampling == {**sampling, "max_tokens": 9, "stop": ["END"]}
    assert call.tools == (TOOL,)
    assert call.tool_choice == {"type": "function", "function": {"name": "add"}}
    assert (call.limits.alpha, call.limits.max_cost_usd, call.limits.deadline_s) == (1, 0.5, 2)
    assert (call.limits.models, call.limits.tools) == (frozenset({"a"}), frozenset({"none"}))
    assert call.explain


def test_several_answers_are_drawn_with_chance_unless_the_caller_says_otherwise() -> None:
    assert read({"n": 2}).sampling == {"n": 2, "temperature": 1.0}
    assert read({"n": 2, "temperature": 0}).sampling["temperature"] == 0
    assert "temperature" not in read({"n": 1}).sampling


def test_ignored_parameters_are_checked_and_go_nowhere() -> None:
    ignored = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}
    assert read({**ignored, "safety_identifier": "s", "prompt_cache_key": "p"}) == read({})
    assert refusal({"metadata": {"a": 1}}).param == "metadata.a"


def test_null_means_not_given() -> None:
    optional = [name for name, field in ChatRequest.model_fields.items() if not field.is_required()]
    assert read(dict.fromkeys(optional)) == read({})


def test_text_parts_are_joined_and_developer_becomes_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = read(
        {
            "messages": [
                {"role": "developer", "content": "rules"},
                {"role": "user", "content": parts, "name": "ann"},
            ]
        }
    )
    assert call.messages == (
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "a\nb", "name": "ann"},
    )


def test_a_completions_own_message_can_be_sent_back() -> None:
    said = {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None}
    said |= {"annotations": [], "audio": None, "function_call": None, "reasoning_content": None}
    answered = {"role": "tool", "tool_call_id": "c1", "content": "2"}
    call = read({"messages": [USER, said, answered]})
    assert call.messages[1] == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert call.messages[2] == answered


def test_the_last_message_may_be_the_assistants() -> None:
    call = read({"messages": [USER, {"role": "assistant", "content": "so"}]})
    assert call.query == "hi"


def test_nul_and_astral_characters_are_text() -> None:
    assert read({"messages": [{"role": "user", "content": "a\0😀"}]}).query == "a\0😀"


def test_a_repeated_key_counts_with_its_last_value() -> None:
    body = b'{"model":"x","model":"atlas","messages":[{"role":"user","content":"hi"}]}'
    assert read(body).model == "atlas"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object, got array"),
        (b"7", "got number"),
        (b"true", "got boolean"),
        (b"null", "got null"),
        (b'{"a":NaN}', "not valid JSON"),
        (b'{"a":Infinity}', "not valid JSON"),
        (b'{"a":1e999}', "not valid JSON"),
        (b'{"a":"\\ud800"}', "not valid JSON"),
        (b'{"a":"\xff"}', "not valid JSON"),
        (b'{"a":"\xed\xa0\x80"}', "not valid JSON"),
        (b'{"a":' + b"[" * 40 + b"]" * 40 + b"}", "nests deeper than 32"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "not valid JSON"),
        (b"[" * 40_000, "not valid JSON"),
        (b'{"a":' + b"[" * 100_000, "more than 50000 values"),
        (b'{"a":[' + b"[]," * 60_000 + b"[]]}", "more than 50000 values"),
        (b'{"a":[' + b'",",' * 60_000 + b"1]}", "more than 50000 values"),
        (b"{" + b",".join(b'"%d":1' % i for i in range(2000)) + b"}", "more than 1024 keys"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_json_object_is_refused(body: bytes, words: str) -> None:
    assert words in refusal(body).message


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"frobnicate": 1}, "frobnicate", "unknown parameter 'frobnicate'"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "unknown parameter"),
        ({"model": None}, "model", "valid string"),
        ({"model": ""}, "model", "at least 1 character"),
        ({"model": "m" * 500}, "model", "at most 200"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hi"}, "messages", "valid list"),
        ({"messages": [5]}, "messages[0]", ""),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"content": "x"}]}, "messages[0]", "role"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0]", "wizard"),
        ({"messages": [{**USER, "secret": 1}]}, "messages[0].secret", "unknown parameter"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "string"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "at least 1"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content", "unless"),
        (
            {"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]},
            "messages[0].tool_call_id",
            "answers no earlier",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]},
            "messages[0].content[0].type",
            'content of type "file" is not supported',
        ),
        ({"messages": [{**USER, "name": "a b"}]}, "messages[0].name", "pattern"),
        ({"messages": [USER] * 257}, "messages", "at most 256"),
        ({"temperature": "1"}, "temperature", 'valid number, got "1"'),
        ({"temperature": True}, "temperature", "valid number"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": [1]}, "temperature", "a JSON array"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"max_tokens": 10**9}, "max_tokens", "at most 8192"),
        ({"max_completion_tokens": 10**30}, "max_completion_tokens", ""),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "send one of them"),
        ({"n": 0}, "n", "greater"),
        ({"n": 10**6}, "n", "at most 8"),
        ({"n": True}, "n", "valid integer"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"stop": [1]}, "stop[0]", "string"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"presence_penalty": 3}, "presence_penalty", "less"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 99}, "top_logprobs", "less"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream": 1}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown"),
        ({"response_format": {"type": "xml"}}, "response_format", "xml"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "required",
        ),
        ({"tool_choice": "auto"}, "tool_choice", "only allowed with tools"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice", ""),
        (
            {
                "tools": [TOOL],
                "tool_choice": {"type": "function", "function": {"name": "nope"}},
            },
            "tool_choice",
            "no tool is named 'nope'",
        ),
        ({"tools": [TOOL, TOOL]}, "tools", "same name"),
        ({"tools": [{"type": "web"}]}, "tools[0].type", "function"),
        ({"tools": [TOOL] * 65}, "tools", "at most 64"),
        (tool_with("x"), "tools[0].function.parameters", "dict"),
        (tool_with({"type": "array"}), "tools[0].function.parameters", "'object'"),
        (tool_with({"type": 5}), "tools[0].function.parameters", "'object'"),
        (
            tool_with({"properties": {"a": {"type": "nonsense"}}}),
            "tools[0].function.parameters",
            "not a JSON schema",
        ),
        (tool_with(nested(14)), None, "nests deeper"),
        (
            tool_with({"allOf": [{}] * 3000}),
            "tools[0].function.parameters",
            "more than 2000 nodes",
        ),
        (
            tool_with({"properties": {"a": {"$ref": "http://127.0.0.1/x"}}}),
            "tools[0].function.parameters",
            "$ref",
        ),
        (tool_with({"description": "x" * 70_000}), "tools[0].function.parameters", "bytes"),
        (tool_with({"properties": {"a": {"$ref": "#/$defs/b"}}}), None, "'$ref' may only point"),
        (
            tool_with({"properties": {f"p{i}": True for i in range(257)}}),
            "tools[0].function.parameters",
            "more than 256 properties",
        ),
        (
            tool_with({"properties": {f"p{i}": {} for i in range(65)}, "minProperties": 9}),
            "tools[0].function.parameters",
            "objects that count them",
        ),
        (
            tool_with({"properties": {f"p{i}": {"maxLength": i} for i in range(17)}}),
            "tools[0].function.parameters",
            "16 different lengths of texts",
        ),
        ({"tools": tools_with(10, {"title": "x" * 60_000})}, None, "262144 bytes in all"),
        (
            {"tools": tools_with(10, {"allOf": [{}] * 1900})},
            None,
            "at most 4000 nodes in all",
        ),
        (
            {"tools": tools_with(10, {"properties": {"a": {"pattern": "(?i)x" * 100}}})},
            None,
            "2048 characters of patterns, repetitions written out, in all",
        ),
        *(
            ({"response_format": structured(schema)}, SCHEMA_FIELD, "refers to itself without end")
            for schema in (
                {"$ref": "#"},
                {"anyOf": [{"type": "string"}, {"$ref": "#"}]},
                {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}},
            )
        ),
        ({"atlas": 5}, "atlas", ""),
        ({"atlas": {"alpha": 1.5}}, "atlas.alpha", "less"),
        ({"atlas": {"deadline_s": 1e6}}, "atlas.deadline_s", "at most 600"),
        ({"atlas": {"deadline_s": 0}}, "atlas.deadline_s", "greater"),
        ({"atlas": {"max_steps": 99}}, "atlas.max_steps", "at most 4"),
        ({"atlas": {"models": []}}, "atlas.models", "at least 1"),
        ({"atlas": {"models": "small"}}, "atlas.models", "list"),
        ({"atlas": {"pattern": "vote"}}, "atlas.pattern", "name a pattern as the model"),
        ({"atlas": {"other": 1}}, "atlas.other", "unknown parameter 'atlas.other'"),
        ({"metadata": {f"k{i}": "v" for i in range(17)}}, "metadata", "at most 16"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_field_is_named(change: dict[str, Any], param: str | None, words: str) -> None:
    error = refusal(change)
    assert words in error.message
    if param is not None:
        assert error.param == param
    assert len(error.message) < 700


@pytest.mark.parametrize(
    "pattern",
    [
        "^[a-z]{1,3000}$",
        "(([a-z]{1,20}){1,20}){1,20}",
        "(a{99}){99}",
        "x{1,99999999999}",
        "(ab){2000}",
    ],
)
def test_a_pattern_that_is_long_with_its_repetitions_written_out_is_refused(pattern: str) -> None:
    schema = {"properties": {"a": {"type": "string", "pattern": pattern}}}
    assert "characters of patterns" in refusal(tool_with(schema)).message
    named: dict[str, Any] = {"patternProperties": {pattern: {}}}
    assert "characters of patterns" in refusal({"response_format": structured(named)}).message


UUID = "^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$"


def test_usual_patterns_and_lengths_are_taken() -> None:
    fields: dict[str, Any] = {
        f"p{i}": {"type": "string", "minLength": 1, "maxLength": 100} for i in range(100)
    }
    fields |= {f"n{i}": {"type": "integer", "minimum": i, "maximum": 99} for i in range(100)}
    for index, pattern in enumerate(
        (UUID, r"^\+?[0-9]{6,14}$", r"^[^@\]{3}]+@[a-z.]{1,99}$", r"\{9999}")
    ):
        fields[f"x{index}"] = {"type": "string", "pattern": pattern}
    read({"response_format": structured({"properties": fields})})


@pytest.mark.parametrize(
    ("pattern", "steps"),
    [
        ("abc", 3),
        (r"\{9}", 3 + 1),
        ("[a-z]{3}", 3 + 7),
        ("[{9}]{2}", 2 + 7),
        ("(ab{2,9}){3}", 3 * (1 + 9) + 10),
        ("((a{9}){9}){9}", 9**3 + 13),
        ("a{2,}", 2 + 4),
        ("a{2,b", 5),
        ("){2}", 2 + 3),
        ("(" * 9, 9),
    ],
)
def test_a_patterns_repetitions_are_written_out(pattern: str, steps: int) -> None:
    assert schema_check._steps(pattern) == steps


def test_prompts_are_bounded_in_all() -> None:
    limits = LimitsConfig(max_prompt_chars=10)
    message = {"role": "user", "content": "123456"}
    assert read({"messages": [message]}, limits).query == "123456"
    assert "at most 10 characters" in refusal({"messages": [message, message]}, limits).message


def test_a_recursive_schema_with_something_between_is_taken() -> None:
    tree = {"type": "object", "properties": {"children": {"items": {"$ref": "#"}}}}
    read({"response_format": structured(tree)} | tool_with(tree))


def test_brackets_and_commas_in_a_text_are_no_values() -> None:
    text = '[{"a":1},]\\ \\" ' * 20_000
    assert read({"messages": [{"role": "user", "content": text}]}).query == text


@given(
    st.recursive(
        st.none() | st.text(alphabet='"\\,:[{a') | st.integers(0, 9),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(alphabet='"\\,[a'), inner),
    )
)
@settings(max_examples=200)
def test_values_are_counted_without_parsing(value: Any) -> None:
    def commas_and_brackets(value: Any) -> int:
        if not isinstance(value, dict | list):
            return 0
        items = list(value.values()) if isinstance(value, dict) else value
        return 1 + max(len(items) - 1, 0) + sum(map(commas_and_brackets, items))

    assert parsing._count_values(json.dumps(value).encode()) == commas_and_brackets(value) + 1


@pytest.mark.parametrize("piece", ['",",', '"a":",",', '"[{",'])
def test_a_body_of_too_many_texts_is_refused_without_taking_it_apart(piece: str) -> None:
    body = f'{{"a":[{piece * (MIB // len(piece))}1]}}'.encode()
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match="more than 50000 values"):
            read(body)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(body)  # a text by itself: 34 bytes
    finally:
        tracemalloc.stop()


def keyword_values() -> list[Any]:
    return [
        *(1, -1, 0, 1.5, 2.0, "x", "string", True, False, None),
        *([], [1], ["a"], ["a", "a"], ["string"], [{}], [True], {}, {"a": {}}, {"a": 1}),
        *({"a": ["x"]}, {"a": ["x", "x"]}, [5, {}]),
    ]


@pytest.mark.parametrize("keyword", sorted(schema_check._KEYWORDS.keys() - {"$ref", "$dynamicRef"}))
def test_a_keyword_takes_what_the_meta_schema_takes(keyword: str) -> None:
    for value in keyword_values():
        valid = jsonschema.Draft202012Validator(
            jsonschema.Draft202012Validator.META_SCHEMA
        ).is_valid({keyword: value})
        problem = schema_check._examine(json.dumps({keyword: value}).encode()).problem
        assert (problem is None) == valid, value


WORST_BODIES = {
    "as many nodes as may be": {"tools": tools_with(2, {"allOf": [{"type": "string"}] * 990})},
    "references": {
        "tools": tools_with(
            2,
            {
                "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(1900)}
                | {"d1900": {}}
            },
        )
    },
    "patterns that take long to compile": {
        "tools": tools_with(9, {"allOf": [{"pattern": "(?i)[\u0100-\uffff]"}] * 20})
    },
    "wrong messages": {"messages": [1] * 49_000},
    "wrong roles": {"messages": [{"role": "x"}] * 24_000},
    "empty messages": {"messages": [USER] * 9_000},
    "unknown fields": {f"x{i}": 1 for i in range(1_000)},
    "wrong tools": {"tools": [{}] * 49_000},
    "annotations": {"messages": [{"role": "assistant", "content": "", "annotations": [[]] * 1000}]},
}


@pytest.mark.serial
@pytest.mark.parametrize("body", WORST_BODIES.values(), ids=list(WORST_BODIES))
def test_no_body_takes_long_to_check(body: dict[str, Any]) -> None:
    encoded = json.dumps({"model": "atlas", "messages": [USER], **body}).encode()
    schema_check._examine.cache_clear()
    gc.collect()
    gc.disable()  # a collection looks at what thousands of other tests left
    try:
        began_s = time.thread_time()
        with contextlib.suppress(InvalidRequest):
            read(encoded)
        took_s = time.thread_time() - began_s
    finally:
        gc.enable()
    assert took_s < 0.3  # a tenth of it here; seconds, without the bounds


def test_a_refusal_does_not_echo_a_huge_value() -> None:
    assert len(refusal({"temperature": "x" * 100_000}).message) < 300


@pytest.mark.parametrize(
    "change",
    [
        {"score": float("nan")},
        {"score": float("inf")},
        {"score": "1"},
        {"score": True},
        {"score": None},
        {"request_id": "../../etc"},
        {"request_id": ""},
        {"comment": "x" * 5000},
        {"extra": 1},
    ],
    ids=str,
)
def test_wrong_feedback_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        validate(FeedbackRequest, {"request_id": "req_1", "score": 0.5, **change})


def test_a_session_is_its_keys_own() -> None:
    asked = ChatRequest.model_validate(
        {
            "model": "atlas",
            "messages": [{"role": "user", "content": "x"}],
            "atlas": {"session": "a"},
        }
    )

    def session(owner: str) -> str:
        made = to_chat_call(
            asked, request_id="req_1", owner=owner, default_alpha=0.1, limits=LIMITS
        )
        return made.session

    assert session("me") == session("me") != session("you")
    assert "me" not in session("me")


@pytest.mark.parametrize("name", ["", " ", "a b", "x" * 129, "\n", "ü", 7])
def test_a_sessions_name_is_short_and_plain(name: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        validate(
            ChatRequest,
            {
                "model": "atlas",
                "messages": [{"role": "user", "content": "x"}],
                "atlas": {"session": name},
            },
        )
    assert refused.value.param == "atlas.session"
