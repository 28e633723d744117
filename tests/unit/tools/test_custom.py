"""Tools that are classes of one's own, and the names of the functions that are offered together."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from serve_app.config import AtlasConfig
from serve_app.config.tools import CustomToolConfig, ToolConfig
from serve_app.errors import ConfigError, ToolFailed
from serve_app.tools.builtin.toolset import check_tools
from serve_app.tools.registry import build_tool
from serve_app.tools.runner import ToolRunner

_TOOL: TypeAdapter[ToolConfig] = TypeAdapter(ToolConfig)
CALCULATOR = {"type": "calculator", "tool_id": "calculator"}


def own(name: str, settings: Any = None, **fields: Any) -> CustomToolConfig:
    """The settings of one of the tests' own tools."""
    tool = {"type": "custom", "tool_id": "own", "import_path": f"tests.own_tools:{name}"}
    config = _TOOL.validate_python(tool | {"settings": settings or {}} | fields)
    assert isinstance(config, CustomToolConfig)
    return config


def toolset(*members: str, **fields: Any) -> dict[str, Any]:
    return {"type": "toolset", "tool_id": "desk", "description": "x", "members": members} | fields


def test_a_class_of_ones_own_is_a_tool() -> None:
    tool = build_tool(own("Mood", {"glad": "fine"}, description="Says whether a text is glad."))
    (function,) = tool.functions()
    assert (function.name, function.description) == ("own", "Says whether a text is glad.")
    assert tool.kind == "function"
    assert tool.call("own", {"query": "a fine day"}, 1.0).text == "glad"


def test_a_class_of_ones_own_may_have_several_functions() -> None:
    tool = build_tool(own("Notes"))
    assert [f.name for f in tool.functions()] == ["read_note", "write_note", "send_note"]
    assert tool.call("read_note", {"number": 3}, 1.0).text == "read_note 3"


def test_it_may_be_a_context_tool() -> None:
    assert build_tool(own("Mood", kind="context")).kind == "context"


@pytest.mark.parametrize("own_worker", [True, False])
def test_its_calls_have_a_worker_of_their_own_unless_it_loads_nothing(own_worker: bool) -> None:
    assert own("Mood", own_worker=own_worker).dedicated_worker is own_worker
    assert own("Mood").dedicated_worker


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (own("Missing"), "cannot be imported: AttributeError"),
        (own("Mood", import_path="tests.no_such_module:X"), "imported: ModuleNotFoundError"),
        (own("Mood", import_path="os:system"), "is no subclass"),
        (own("NOTHING"), "is no subclass"),
        (own("Broken"), "cannot be made with settings []: RuntimeError"),
        (own("Mood", {"other": 1}), "cannot be made with settings ['other']: TypeError"),
        (own("Named", {"names": []}), "offers no function"),
        (own("Named", {"names": ["a", "a"]}), "two functions of one name"),
        (own("Named", {"names": ["a b"]}), "'a b' is no name"),
        (own("Named", {"names": ["a"], "schema": {"type": "thing"}}), "are no JSON schema"),
        (own("Named", {"names": ["a"], "schema": {"type": "object"}}), "additionalProperties"),
        (own("Named", {"names": ["a"], "schema": {"additionalProperties": False}}), "an object"),
    ],
    ids=str,
)
def test_a_class_that_cannot_be_a_tool_is_a_configuration_error(
    config: CustomToolConfig, reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_tool(config)
    assert reason in caught.value.message
    assert "'own'" in caught.value.message
    assert "secret" not in caught.value.message
    with pytest.raises(ConfigError):
        check_tools([config])


@pytest.mark.parametrize(
    "fields",
    [{"import_path": "os.system"}, {"import_path": "a;b:C"}, {"kind": "sampling"}, {"top_k": 0}],
    ids=str,
)
def test_wrong_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        own("Mood", **fields)


def test_a_tool_that_cannot_be_made_is_left_out_and_the_others_stay() -> None:
    runner = ToolRunner([_TOOL.validate_python(CALCULATOR), own("Broken")])
    assert runner.functions("calculator")
    with pytest.raises(ToolFailed, match="no tool 'own'"):
        runner.functions("own")


# Toolsets.


def pool(*tools: dict[str, Any] | CustomToolConfig) -> AtlasConfig:
    model = {"type": "custom", "model_id": "m", "import_path": "a:B"}
    return AtlasConfig.model_validate({"models": [model], "tools": tools})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (toolset("abacus"), "toolset 'desk' names tool 'abacus'; configured: ['calculator', "),
        (toolset("none"), "toolset 'desk' names tool 'none'"),
        (toolset("desk"), "'desk' is no tool with functions of its own"),
        (toolset("few"), "'few' is no tool with functions of its own"),
        (toolset("calculator", "calculator"), "each is named once"),
        (toolset(), "members"),
        (toolset("calculator", description=""), "description"),
        (toolset("calculator", price_usd_per_call=1.0), "price_usd_per_call: a call goes by"),
        (toolset("calculator", effects="once"), "effects: a call goes by its member's"),
        (toolset("calculator", top_k=0), "top_k"),
    ],
    ids=str,
)
def test_a_toolset_that_cannot_work_is_refused(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        pool(CALCULATOR, {"type": "best_of", "tool_id": "few"}, config)
    assert reason in str(caught.value)


def test_two_functions_of_one_name_are_an_error_that_names_both_tools() -> None:
    named = own("Named", {"names": ["sum", "calculator"]})
    tools = pool(CALCULATOR, named, toolset("calculator", "own")).tools
    with pytest.raises(ConfigError) as caught:
        check_tools(tools)
    for part in ("toolset 'desk'", "'calculator' and 'own'", "a function 'calculator'"):
        assert part in caught.value.message
    runner = ToolRunner(tools)
    with pytest.raises(ToolFailed, match="both have a function"):
        runner.functions("desk")
    check_tools(pool(CALCULATOR, named).tools)  # not offered together


def test_a_toolset_costs_what_its_dearest_member_does() -> None:
    dear = own("Notes", price_usd_per_call=2.0)
    config = pool({**CALCULATOR, "price_usd_per_call": 0.5}, dear, toolset("calculator", "own"))
    assert config.usd_per_tool_call("desk") == 2.0
    assert config.usd_per_tool_call("calculator") == 0.5
    assert config.usd_per_tool_call("none") == 0.0
