"""Pictures on their way through pairs, patterns and decisions: they stay beside their question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serve_app.budget import Budget, Caps, Deadline
from serve_app.capabilities import Needs
from serve_app.content import PICTURE_TOKENS
from serve_app.errors import BudgetExceeded, NoCandidate, UnfitForPair
from serve_app.tools.base import ToolResult
from tests.executor_fakes import Bench, reply
from tests.path2_fakes import CHEAP, path2
from tests.pattern_fakes import PatternBench
from tests.pictures import asking, part, picture

PICTURE = part()
SOURCE = {"id": "1", "title": "Shoes", "text": "Shoes are worn.", "similarity": 0.9}
QUESTION = asking(PICTURE, text="What is this?")
LARGE = asking(part(picture(size=(900, 900), compress_level=0)))


def content(body: dict[str, Any]) -> Any:
    return body["messages"][-1]["content"]


async def test_a_context_tool_looks_up_the_text_and_the_model_gets_the_pictures(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path, reply("A shoe."))
    bench.tools.says = "[1] Shoes."
    await bench.run("lookup", messages=(QUESTION,))
    ((_, body),) = bench.engines.bodies
    assert bench.tools.arguments == [{"query": "What is this?"}]
    text, shown = content(body)
    assert "[1] Shoes." in text["text"]
    assert text["text"].endswith("What is this?")
    assert shown == PICTURE


async def test_a_tool_that_reads_pictures_puts_their_text_in_their_place(tmp_path: Path) -> None:
    bench = Bench(tmp_path, reply("In 1921."))
    bench.tools.says = "Founded in 1921."
    earlier = asking(PICTURE, PICTURE, text="Here is one.")
    await bench.run("ocr", messages=(earlier, QUESTION))
    ((_, body),) = bench.engines.bodies
    shown = "Sources:\nFounded in 1921."
    assert [message["content"] for message in body["messages"]] == [
        f"{shown}\n\nFounded in 1921.\n\nQuestion: Here is one.",
        f"{shown}\n\nQuestion: What is this?",
    ]
    assert len(bench.tools.arguments[0]["pictures"]) == 3
    assert bench.result.tool_calls[0].arguments == {"pictures": 3}


async def test_a_request_without_a_picture_is_not_for_a_tool_that_reads_pictures(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path)
    with pytest.raises(UnfitForPair, match="no picture"):
        await bench.run("ocr")


@pytest.mark.parametrize("tool", ["none", "calculator", "best_of"])
async def test_an_engine_gets_the_parts_unchanged(tmp_path: Path, tool: str) -> None:
    bench = Bench(tmp_path, reply("A shoe."))
    await bench.run(tool, messages=(QUESTION,))
    assert bench.engines.bodies[0][1]["messages"][-1] == QUESTION


async def test_a_thought_stands_before_the_question_and_the_pictures_stay(tmp_path: Path) -> None:
    bench = Bench(tmp_path, reply("A shoe."))
    await bench.run("none", messages=(QUESTION,), note="Look closely.")
    text, shown = content(bench.engines.bodies[0][1])
    assert (shown, text["text"].startswith("Notes that may help:\nLook closely.")) == (
        PICTURE,
        True,
    )


@pytest.mark.parametrize(
    ("tokens", "fits"), [(PICTURE_TOKENS, False), (PICTURE_TOKENS + 9999, True)]
)
async def test_a_picture_counts_as_its_tokens_and_not_as_its_bytes(
    tmp_path: Path, tokens: int, fits: bool
) -> None:
    bench = Bench(tmp_path, reply("A shoe."))
    budget = Budget(Deadline.after(30), Caps(tokens=tokens))
    if fits:
        await bench.run("none", messages=(LARGE,), budget=budget)
        return
    with pytest.raises(BudgetExceeded):
        await bench.run("none", messages=(LARGE,), budget=budget)


LOOK_TWICE = """
name: look-twice
do:
  - ask: {id: seen, pair: small, prompt: "What is in it? {{question}}", max_tokens: 20}
  - ask: {pair: large, prompt: "Say it briefly: {{seen}}", max_tokens: 20}
"""
AS_ASKED = """
name: as-asked
do:
  - retrieve: {id: found, corpus: handbook}
  - ask: {pair: small, uses: [found], max_tokens: 20}
"""
ROUTED = """
name: routed
do:
  - ask: {id: seen, pair: route, prompt: "{{question}}", max_tokens: 20}
  - ask: {pair: route, prompt: "Say it briefly: {{seen}}", max_tokens: 20}
"""


async def test_a_prompt_with_the_question_takes_its_pictures_along(tmp_path: Path) -> None:
    bench = PatternBench(tmp_path, LOOK_TWICE)
    await bench.run(messages=(QUESTION,))
    (looked,), (said,) = bench.engines.asked("small"), bench.engines.asked("large")
    text = {"type": "text", "text": "What is in it? What is this?"}
    assert content(looked) == [text, PICTURE]
    assert content(said) == "Say it briefly: small says hello"


async def test_sources_stand_before_the_question_and_the_pictures_stay(tmp_path: Path) -> None:
    bench = PatternBench(tmp_path, AS_ASKED)
    bench.tools.says["handbook"] = ToolResult("", {"sources": [SOURCE]})
    await bench.run(messages=(QUESTION,))
    text, shown = content(bench.engines.asked("small")[0])
    assert ("Shoes are worn." in text["text"], shown) == (True, PICTURE)


async def test_a_node_that_routes_needs_what_its_own_prompt_needs(tmp_path: Path) -> None:
    bench = PatternBench(tmp_path, ROUTED)
    await bench.run(messages=(QUESTION,))
    assert [limits.needs.vision for limits in bench.chooser.limits] == [True, False]


async def test_a_pattern_has_room_for_pictures(tmp_path: Path) -> None:
    bench = PatternBench(tmp_path, LOOK_TWICE)
    assert await bench.ask(messages=(LARGE, LARGE)) == "large says hello"


async def test_the_router_gives_pictures_to_who_can_see(tmp_path: Path) -> None:
    async with path2(tmp_path, capabilities={"strong": {"vision": True}}) as deployment:
        seen = await deployment.orchestrator.decide(
            deployment.call(messages=(asking(text="topic 0"),))
        )
        plain = await deployment.orchestrator.decide(deployment.call("topic 0"))
    assert [candidate.pair.model_id for candidate in seen.candidates] == ["strong"]
    assert len(plain.candidates) == 3


async def test_where_nobody_that_answers_can_see_there_is_no_candidate(tmp_path: Path) -> None:
    async with path2(tmp_path) as deployment:
        with pytest.raises(NoCandidate):
            await deployment.ask(messages=(QUESTION,))


async def test_a_fallback_can_see_too(tmp_path: Path) -> None:
    sees = {"vision": True}
    async with path2(tmp_path, capabilities={"math": sees, "strong": sees}) as deployment:
        decision = await deployment.orchestrator.decide(deployment.call(messages=(QUESTION,)))
    assert CHEAP not in {candidate.pair for candidate in decision.candidates}


async def test_a_call_without_pictures_needs_nothing(tmp_path: Path) -> None:
    async with path2(tmp_path) as deployment:
        assert deployment.call("hi").needs == Needs()
