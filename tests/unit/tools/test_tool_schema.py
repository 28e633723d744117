"""Every tool describes itself to models and to the router, and its settings are strict."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any, get_args

import jsonschema
import pytest
from pydantic import TypeAdapter, ValidationError

from serve_app.config.tools import ToolConfig
from serve_app.tools.registry import _MADE_BY, build_tool

ADAPTER: TypeAdapter[ToolConfig] = TypeAdapter(ToolConfig)

TOOLS: dict[str, dict[str, Any]] = {
    "none": {},
    "calculator": {},
    "python": {},
    "debug": {},
    "retrieval": {"corpus": "corpus.jsonl"},
    "best_of": {},
    "fetch": {},
    "web_search": {"base_url": "http://search.internal"},
    "sql": {"database": "missing.db"},
    "files": {"root": "missing"},
}
KINDS = {
    "none": "none",
    "calculator": "function",
    "python": "function",
    "debug": "function",
    "retrieval": "context",
    "best_of": "sampling",
    "fetch": "function",
    "web_search": "function",
    "sql": "function",
    "files": "function",
}


def config(name: str, **settings: Any) -> ToolConfig:
    return ADAPTER.validate_python({"type": name, "tool_id": name, **TOOLS[name], **settings})


def test_every_type_of_tool_has_a_class() -> None:
    types = get_args(get_args(ToolConfig)[0])
    assert set(_MADE_BY) == set(types)
    for module, name in _MADE_BY.values():
        assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("name", TOOLS)
def test_tool_says_how_it_joins_a_model(name: str) -> None:
    tool = build_tool(config(name))
    assert tool.kind == KINDS[name]
    assert tool.tool_id == name


@pytest.mark.parametrize("name", TOOLS)
def test_schema_is_what_openai_and_json_schema_expect(name: str) -> None:
    for function in build_tool(config(name, description="Does things.")).functions():
        entry = function.schema()
        assert entry["type"] == "function"
        assert entry["function"]["name"].partition("__")[0] == name
        assert entry["function"]["description"].startswith("Does things.")
        parameters = entry["function"]["parameters"]
        jsonschema.Draft202012Validator.check_schema(parameters)
        assert parameters["type"] == "object"
        assert parameters["additionalProperties"] is False


def test_retrieval_can_be_a_function() -> None:
    assert build_tool(config("retrieval", kind="function")).kind == "function"


@pytest.mark.parametrize("name", TOOLS)
def test_settings_survive_a_trip_through_json(name: str) -> None:
    settings = config(name, price_usd_per_call=0.01, examples=["a", "b"])
    assert ADAPTER.validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("calculator", {"unknown": 1}),
        ("calculator", {"tool_id": "has space"}),
        ("calculator", {"tool_id": ""}),
        ("calculator", {"price_usd_per_call": -1}),
        ("calculator", {"price_usd_per_call": float("nan")}),
        ("calculator", {"timeout_s": 0}),
        ("calculator", {"timeout_s": float("inf")}),
        ("calculator", {"max_concurrency": 0}),
        ("calculator", {"kind": "context"}),
        ("python", {"memory_mb": 0}),
        ("python", {"max_processes": 5}),
        ("debug", {"memory_mb": 0}),
        ("retrieval", {"corpus": None}),
        ("retrieval", {"top_k": 0}),
        ("retrieval", {"kind": "sampling"}),
        ("best_of", {"num_samples": 1}),
        ("best_of", {"temperature": 0}),
        ("best_of", {"vote": "coin"}),
        ("sql", {"database": None}),
        ("sql", {"memory_mb": 1}),
        ("sql", {"max_rows": 0}),
        ("files", {"root": "/"}),
        ("files", {"max_entries": 0}),
    ],
)
def test_wrong_settings_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config(name, **settings)


def test_unknown_type_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValidationError, match="'calculator'"):
        ADAPTER.validate_python({"type": "oracle", "tool_id": "oracle"})


def test_settings_do_not_change() -> None:
    settings = config("python")
    with pytest.raises(ValidationError):
        settings.timeout_s = 3  # type: ignore[misc]


def test_settings_load_without_heavy_libraries() -> None:
    code = (
        "import sys, serve_app.config.tools\n"
        "heavy = {'ray', 'torch', 'vllm', 'transformers', 'sandlock', 'sympy', 'numpy', 'duckdb'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


def test_long_results_are_cut_and_say_so() -> None:
    tool = build_tool(config("calculator", max_result_chars=64))
    clipped = tool.clip("x" * 1000)
    assert len(clipped) == 64
    assert clipped.endswith("[cut: 1000 characters]")
    assert tool.clip("short") == "short"
