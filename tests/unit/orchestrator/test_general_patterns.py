"""The shipped patterns for general models are wired: the real engine, scripted models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serve_app.config.patterns.files import read_patterns
from serve_app.config.tools import DebugConfig
from serve_app.schemas import StopReason
from serve_app.tools.base import ToolResult
from serve_app.tools.builtin.debug import DebugTool
from tests.pattern_fakes import PatternBench

GENERAL = Path(__file__).parents[3] / "configs" / "patterns" / "general"
SOURCE = {"id": "1", "title": "Returns", "text": "Shoes can be returned.", "similarity": 0.9}
FOUND = ToolResult("[1] Shoes can be returned.", {"sources": [SOURCE]})
NOTHING = ToolResult("No sources found.", {"sources": []})


def bench(folder: Path, **says: Any) -> PatternBench:
    made = PatternBench(
        folder, *[json.dumps(of.as_written()) for of in read_patterns([str(GENERAL)])], says=says
    )
    made.tools.says["handbook"] = FOUND
    return made


async def test_a_customer_is_answered_with_what_was_heard_and_found(tmp_path: Path) -> None:
    made = bench(tmp_path, small="negative", large="You can return worn shoes [1].")
    answer = await made.ask("Can I return them?", name="customer-service")
    (asked,) = made.engines.asked("large")
    assert answer == "You can return worn shoes [1]."
    assert "negative" in asked["messages"][0]["content"]
    assert "[1] Shoes can be returned." in asked["messages"][1]["content"]


async def test_a_customer_is_refused_what_the_handbook_does_not_say(tmp_path: Path) -> None:
    made = bench(tmp_path)
    made.tools.says["handbook"] = NOTHING
    composed = await made.run("Do you sell cars?", name="customer-service")
    assert composed.stop is StopReason.DECLINED
    assert made.engines.asked("large") == []


async def test_an_answer_to_a_customer_that_cites_nothing_is_withheld(tmp_path: Path) -> None:
    made = bench(tmp_path, large="Surely, of course you can do that.")
    composed = await made.run("Can I return them?", name="customer-service")
    assert composed.stop is StopReason.DECLINED


def researching(body: Any) -> str:
    prompt = body["messages"][-1]["content"]
    if prompt.startswith("Split this question"):
        parts = [{"id": "a", "ask": "What is known?"}, {"id": "b", "ask": "What is not?"}]
        return json.dumps({"subtasks": parts})
    if prompt.startswith("You are an analyst"):
        return "They agree."
    return "A revised report." if prompt.startswith("Mend the report") else "A first report."


@pytest.mark.parametrize(
    ("verdict", "report"),
    [("OK", "A first report."), ("It is too short.", "A revised report.")],
)
async def test_research_is_planned_looked_up_analysed_written_and_revised_at_most_once(
    tmp_path: Path, verdict: str, report: str
) -> None:
    def small(body: Any) -> str:
        prompt = body["messages"][-1]["content"]
        return verdict if prompt.startswith("You are a critic") else "A note [1]."

    made = bench(tmp_path, small=small, large=researching)
    assert await made.ask("What about shoes?", name="research") == report
    assert len([call for call in made.tools.calls if call[0] == "handbook"]) == 2


def triage(urgency: str) -> Any:
    def small(body: Any) -> str:
        if body["messages"][-1]["content"].startswith("Sort this complaint"):
            return json.dumps({"urgency": urgency, "reason": "it hurts"})
        return "urgent"

    return small


async def test_an_emergency_is_never_answered_by_a_model(tmp_path: Path) -> None:
    made = bench(tmp_path, small=triage("emergency"))
    assert "emergency number" in await made.ask("My chest hurts.", name="clinical-triage")
    assert made.engines.asked("large") == []


async def test_a_triage_note_has_the_urgency_and_a_second_opinion(tmp_path: Path) -> None:
    def large(body: Any) -> str:
        prompt = body["messages"][-1]["content"]
        return "Urgent, by [1]." if "Write a note for staff" in prompt else "urgent"

    made = bench(tmp_path, small=triage("urgent"), large=large)
    assert await made.ask("My foot hurts.", name="clinical-triage") == "Urgent, by [1]."
    assert "urgency urgent, second opinion urgent" in made.prompts("large")[-1]


async def test_a_question_with_two_parts_is_split_and_both_are_answered(tmp_path: Path) -> None:
    def large(body: Any) -> str:
        parts = [{"id": "a", "ask": "atomic number?"}, {"id": "b", "ask": "{{a}} times 12?"}]
        return json.dumps({"subtasks": parts})

    said = {"atomic number?": "8", "8 times 12?": "96"}
    made = bench(tmp_path, large=large, small=lambda body: said[body["messages"][-1]["content"]])
    assert await made.ask("Multiply it by 12.", name="split-and-solve") == "96"


async def test_code_that_fails_an_example_is_written_anew_once(tmp_path: Path) -> None:
    right = "```python\ndef f(x):\n    return x + 2\n```"
    made = bench(tmp_path, small="```python\ndef f(x):\n    return x\n```", large=right)
    debug = DebugTool(DebugConfig(tool_id="debug"))
    made.tools.says["debug"] = lambda arguments: debug.run(arguments, 60.0)
    assert await made.ask("Write f.\nf(1) == 3", name="write-and-test") == right
    (asked,) = made.prompts("large")
    assert "f(1) returned 1, expected 3" in asked
