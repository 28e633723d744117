"""What a server says of its functions, as a model gets it; and arguments held against it."""

from __future__ import annotations

import time
from typing import Any

import pytest
from mcp_types import Tool
from pydantic import ValidationError

from serve_app.config.tools import McpConfig
from serve_app.errors import ToolRetry
from serve_app.tools.arguments import ArgumentsCheck
from serve_app.tools.mcp.definitions import Listing, read_listing

Json = dict[str, Any]

SERVER = McpConfig(tool_id="srv", command="x")


def listing(*schemas: Json, name: str = "act", description: str = "Act.") -> Listing:
    tools = [
        Tool(name=f"{name}{n or ''}", description=description, input_schema=schema)
        for n, schema in enumerate(schemas)
    ]
    return read_listing(SERVER, tools)


def parameters(schema: Json) -> Json:
    (definition,) = listing(schema).definitions.values()
    return definition.function.parameters


def hash_of(**said: Any) -> str:
    (definition,) = listing({"type": "object"}, **said).definitions.values()
    return definition.sha256


def test_a_schema_takes_no_field_that_it_does_not_name() -> None:
    assert parameters({"type": "object", "additionalProperties": True}) == {
        "type": "object",
        "additionalProperties": False,
    }


def test_references_are_written_out_and_one_to_itself_takes_anything() -> None:
    schema = {
        "type": "object",
        "properties": {
            "zone": {"$ref": "#/$defs/Zone", "default": "UTC"},
            "tree": {"$ref": "#/$defs/Tree"},
            "$ref": {"type": "string"},
        },
        "$defs": {
            "Zone": {"enum": ["UTC"], "title": "Zone"},
            "Tree": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Tree"}}},
        },
    }
    assert parameters(schema)["properties"] == {
        "zone": {"enum": ["UTC"], "default": "UTC"},
        "tree": {"type": "object", "properties": {"next": {}}},
        "$ref": {"type": "string"},
    }


def doubling(depth: int) -> Json:
    """A schema that is twice as long with each level, once it is written out."""
    levels: Json = {f"l{n}": {"anyOf": [{"$ref": f"#/$defs/l{n + 1}"}] * 2} for n in range(depth)}
    return {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/l0"}},
        "$defs": {**levels, f"l{depth}": {"type": "string"}},
    }


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "array"}, "'type' must be 'object'"),
        ({"type": "object", "properties": {"a": {"$ref": "http://evil/x"}}}, "into the schema"),
        ({"type": "object", "properties": {"a": {"type": "text"}}}, "'type' must be one or"),
        ({"type": "object", "patternProperties": {"(a+)+$": {}}}, "'patternProperties'"),
        ({"type": "object", "$defs": {"a": {}}, "$dynamicRef": "#/$defs/a"}, "'$dynamicRef'"),
        ({"type": "object", "description": "x" * (65 << 10)}, "at most 65536 bytes"),
        (doubling(20), "more than 1000 parts"),
        ({"type": "object", "properties": {"a": {"maximum": float("inf")}}}, "must be a number"),
        ({"type": "object", "properties": {"a": {"maximum": 10**400}}}, "written as JSON"),
    ],
)
def test_a_function_whose_schema_cannot_be_used_is_left_out_with_the_reason(
    schema: Json, why: str
) -> None:
    begin = time.monotonic()
    read = listing(schema, {"type": "object"})
    assert time.monotonic() - begin < 10
    assert set(read.definitions) == {"srv__act1"}
    assert why in read.left_out["act"]


@pytest.mark.parametrize(
    ("name", "offered"),
    [("a.b/c d", "srv__a_b_c_d"), ("\u200bx", "srv___x"), ("a" * 59, "srv__" + "a" * 59)],
)
def test_a_name_becomes_one_that_models_can_call(name: str, offered: str) -> None:
    assert set(listing({"type": "object"}, name=name).definitions) == {offered}


def test_names_that_are_too_long_or_clash_are_left_out() -> None:
    tools = [Tool(name=name, input_schema={"type": "object"}) for name in ("a" * 60, "a.b", "a/b")]
    read = read_listing(SERVER, tools)
    assert set(read.definitions) == {"srv__a_b"}
    assert "too long" in read.left_out["a" * 60]
    assert "another function" in read.left_out["a/b"]


def test_the_hash_changes_with_anything_that_is_said_and_with_nothing_else() -> None:
    assert hash_of() == hash_of()
    assert hash_of(description="Act.\u200b") != hash_of()  # also what a model does not get to see
    (one,) = listing({"type": "object", "title": "A"}).definitions.values()
    assert one.sha256 != hash_of()
    (a,) = listing({"type": "object", "required": []}).definitions.values()
    (b,) = listing({"required": [], "type": "object"}).definitions.values()
    assert a.sha256 == b.sha256


def test_a_pattern_that_explodes_costs_nothing() -> None:
    check = ArgumentsCheck("act", {"properties": {"a": {"pattern": "^(a+)+$"}}})
    begin = time.monotonic()
    with pytest.raises(ToolRetry, match="does not match"):
        check.check({"a": "a" * 50_000 + "!"})
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("arguments", "fits"),
    [
        ({"n": 2}, True),
        ({}, False),
        ({"n": 2, "more": 1}, False),
        ({"n": "2"}, False),
        ({"n": 2.5}, False),
        ({"n": int("9" * 400)}, False),
        ([], False),
    ],
)
def test_arguments_fit_or_the_model_is_told(arguments: Any, fits: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "multipleOf": 0.5, "maximum": 99}},
        "required": ["n"],
    }
    check = ArgumentsCheck("act", parameters(schema))
    if fits:
        check.check(arguments)
    else:
        with pytest.raises(ToolRetry, match="tool 'act'") as caught:
            check.check(arguments)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, "either a command or a url"),
        ({"command": "x", "url": "http://h/mcp"}, "either a command or a url"),
        ({"url": "http://h/mcp", "args": ["-y"]}, "go with a command"),
        ({"url": "http://h/mcp", "sandbox": {}}, "go with a command"),
        ({"command": "x", "headers": {"a": "b"}}, "go with a url"),
        ({"command": "x", "env": {"A": "1"}, "env_from": {"A": "B"}}, "'A' has two values"),
        ({"command": "x", "only": ["a"], "functions": {"b": {"effects": "none"}}}, "among 'only'"),
        ({"command": "x", "sandbox": {"read": ["../x"]}}, "no path to allow"),
        ({"command": "x", "sandbox": {"write": ["/"]}}, "no path to allow"),
        ({"url": "http://user:secret@h/mcp"}, "url"),
        ({"url": "file:///etc/passwd"}, "url"),
        ({"url": "http://h/mcp", "headers": {"a": "b\r\nc: d"}}, "headers"),
        ({"command": "x\0y"}, "command"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: Json, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        McpConfig.model_validate({"tool_id": "srv", **settings})
