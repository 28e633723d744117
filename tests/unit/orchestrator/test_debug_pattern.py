"""The shipped debugging assistant: the real engine and the real sandbox, scripted models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serve_app.config.patterns.files import read_pattern
from serve_app.config.tools import DebugConfig
from serve_app.schemas import StopReason
from serve_app.tools.base import ToolResult
from serve_app.tools.builtin.debug import DebugTool
from tests.pattern_fakes import PatternBench

FILE = Path(__file__).parents[3] / "configs" / "patterns" / "debug.yaml"
TOOL = DebugTool(DebugConfig(tool_id="debug"))
SIMILAR = "The operator computes something else: `a - b` has to be `a + b`."
RIGHT = "```python\ndef add(a, b):\n    return a + b\n```"
WRONG = "```python\ndef add(a, b):\n    return a * b\n```"
SYNTAX = "Fix this:\n\ndef add(a, b)\n    return a + b\n\nPython says expected ':' on line 1."
RUNTIME = "def add(a, b):\n    return a + c\n\nIt crashes when I call add(1, 2)."
LOGIC = "def add(a, b):\n    return a - b\n\nadd(1, 2) returned -1, expected 3"


def bench(folder: Path, *says: str) -> PatternBench:
    written = json.dumps(read_pattern(FILE).as_written()).replace("nano-code@none", "small")
    answers = list(says)
    made = PatternBench(folder, written, says={"small": lambda body: answers.pop(0)})
    made.tools.says["debug"] = lambda arguments: TOOL.run(arguments, 60.0)
    made.tools.says["bugs"] = ToolResult("", {"sources": [{"id": "1", "text": SIMILAR}]})
    return made


@pytest.mark.parametrize(
    ("question", "told"),
    [
        (SYNTAX, "SyntaxError: expected ':' (line 1)\nLine 1: def add(a, b)"),
        (RUNTIME, "add(1, 2) raised NameError: name 'c' is not defined\nLine 2: return a + c\n"),
        (LOGIC, f"add(1, 2) returned -1, expected 3\n\nA similar bug:\n[1] {SIMILAR}"),
    ],
)
async def test_the_model_is_told_what_was_found_by_the_kind_of_error(
    tmp_path: Path, question: str, told: str
) -> None:
    made = bench(tmp_path, RIGHT)
    assert await made.ask(question) == RIGHT
    (prompt,) = made.prompts("small")
    assert told in prompt
    searched = [tool for tool, _ in made.tools.calls if tool == "bugs"]
    assert len(searched) == (question == LOGIC)


@pytest.mark.parametrize("question", [RUNTIME, LOGIC])
async def test_what_still_fails_is_mended_once_more_and_no_more(
    tmp_path: Path, question: str
) -> None:
    made = bench(tmp_path, "```python\ndef add(a, b):\n    return a + d\n```", WRONG, RIGHT)
    assert await made.ask(question) == WRONG
    assert len(made.prompts("small")) == 2


async def test_an_answer_without_code_is_asked_for_once_more(tmp_path: Path) -> None:
    assert await bench(tmp_path, "I do not know.", RIGHT).ask(LOGIC) == RIGHT


async def test_a_message_without_code_is_refused_before_any_model_is_asked(tmp_path: Path) -> None:
    made = bench(tmp_path)
    composed = await made.run("My program is slow.")
    assert composed.stop is StopReason.DECLINED
    assert made.prompts("small") == []


async def test_the_trace_shows_which_way_was_taken(tmp_path: Path) -> None:
    made = bench(tmp_path, RIGHT)
    await made.ask(RUNTIME)
    spans: list[Any] = made.spans("branch mended")
    assert [span.attributes["way"] for span in spans] == [1]
