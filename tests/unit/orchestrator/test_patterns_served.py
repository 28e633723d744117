"""Patterns as callers, the router and the store see them: on the real orchestrator and router."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import select

from serve_app.errors import BudgetExceeded, InvalidRequest, ModelNotFound
from serve_app.router.rules.cold_start import pair_cards
from serve_app.schemas import DecidedBy, Pair, Report, StopReason
from serve_app.store.tables import OutcomeRow
from tests.path2_fakes import CHEAP, Path2, path2, path2_config

TWICE = """
name: twice
answers: "topic 1"
examples: ["topic 1"]
do:
  - ask: {id: draft, pair: cheap, prompt: "Draft: {{question}}", max_tokens: 50}
  - ask: {pair: math, prompt: "Mend: {{draft}}", max_tokens: 50}
"""
SORTED = """
name: sorted
routable: false
do:
  - refuse: {say: "No."}
"""
TWICE_PAIR = Pair.of_pattern("twice")


def patterns(*texts: str) -> list[Any]:
    return [yaml.safe_load(text) for text in texts]


async def outcomes(deployment: Path2) -> list[Any]:
    await deployment.outcomes.flush()
    async with deployment.store.begin() as connection:
        return list((await connection.execute(select(OutcomeRow.__table__))).mappings())


async def test_a_pattern_is_named_like_a_model(tmp_path: Path) -> None:
    async with path2(tmp_path, patterns=patterns(TWICE)) as deployment:
        text, report = await deployment.ask("What?", model="pattern:twice")
    assert text == "math says hello"
    assert (report.decision.path, report.pair) == (DecidedBy.PINNED, TWICE_PAIR)


async def test_a_run_of_a_pattern_is_one_step_with_the_use_of_all_its_calls(tmp_path: Path) -> None:
    async with path2(tmp_path, patterns=patterns(TWICE)) as deployment:
        _, report = await deployment.ask("What?", model="pattern:twice")
    (step,) = report.steps
    assert (step.pair, step.usage.prompt_tokens) == (TWICE_PAIR, 20)


async def test_the_store_has_one_outcome_of_a_run_of_a_pattern(tmp_path: Path) -> None:
    async with path2(tmp_path, patterns=patterns(TWICE)) as deployment:
        await deployment.ask("What?", model="pattern:twice")
        (row,) = await outcomes(deployment)
    assert (row["model_id"], row["tool_id"]) == ("pattern:twice", "none")


async def test_the_report_has_the_calls_inside_the_pattern(tmp_path: Path) -> None:
    async with path2(tmp_path, patterns=patterns(TWICE)) as deployment:
        _, report = await deployment.ask("What?", model="pattern:twice")
    assert [span.name for span in report.spans if span.kind == "model"] == ["cheap", "math"]


async def test_the_router_may_choose_a_pattern(tmp_path: Path) -> None:
    async with path2(tmp_path, patterns=patterns(TWICE)) as deployment:
        text, report = await deployment.ask("topic 1")
    assert (text, report.pair) == ("math says hello", TWICE_PAIR)
    assert report.decision.path is DecidedBy.COLD_START


async def test_a_pattern_that_is_not_routable_is_never_a_candidate(tmp_path: Path) -> None:
    async with path2(tmp_path, patterns=patterns(SORTED)) as deployment:
        decision = await deployment.orchestrator.decide(deployment.call(explain=True))
    assert not any(candidate.pair.is_pattern for candidate in decision.candidates)


@pytest.mark.parametrize(
    "changes",
    [
        {"tools": ({"type": "function", "function": {"name": "f"}},)},
        {"sampling": {"n": 2}},
        {"sampling": {"response_format": {"type": "json_object"}}},
        {"sampling": {"stop": ["x"]}},
        {"sampling": {"logprobs": True}},
    ],
    ids=["tools", "n", "response_format", "stop", "logprobs"],
)
async def test_a_call_that_only_one_model_can_answer_is_routed_to_a_pair(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    async with path2(tmp_path, patterns=patterns(TWICE)) as deployment:
        decision = await deployment.orchestrator.decide(deployment.call("topic 1", **changes))
    assert not any(candidate.pair.is_pattern for candidate in decision.candidates)


async def test_a_call_with_tools_of_its_own_is_refused_where_it_names_a_pattern(
    tmp_path: Path,
) -> None:
    tools = ({"type": "function", "function": {"name": "f"}},)
    async with path2(tmp_path, patterns=patterns(TWICE)) as deployment:
        with pytest.raises(InvalidRequest, match="tools"):
            await deployment.ask(model="pattern:twice", tools=tools)


async def test_a_pattern_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    async with path2(tmp_path, patterns=patterns(TWICE)) as deployment:
        with pytest.raises(ModelNotFound, match="pattern:other"):
            await deployment.ask(model="pattern:other")


async def test_a_refusal_is_an_answer_and_says_so(tmp_path: Path) -> None:
    async with path2(tmp_path, patterns=patterns(SORTED)) as deployment:
        text, report = await deployment.ask(model="pattern:sorted")
    assert (text, report.stop, report.error) == ("No.", StopReason.DECLINED, None)


async def test_at_the_callers_cap_what_is_there_is_given_as_partial(tmp_path: Path) -> None:
    async with path2(tmp_path, patterns=patterns(TWICE)) as deployment:
        deployment.engines.says["math"] = BudgetExceeded("no more", None, 1.0, "usd")
        completion, report = await deployment.complete(deployment.call(model="pattern:twice"))
    assert completion["choices"][0]["message"]["content"] == "cheap says hello"
    assert completion["choices"][0]["finish_reason"] == "length"
    assert (report.is_partial, report.stop) == (True, StopReason.USD)


async def test_dollars_that_cover_nothing_fail_with_the_cap(tmp_path: Path) -> None:
    async with path2(tmp_path, patterns=patterns(TWICE)) as deployment:
        with pytest.raises(BudgetExceeded):
            await deployment.ask(model="pattern:twice", limits={"max_cost_usd": 1e-9})


async def test_a_stream_of_a_pattern_has_its_last_text_alone(tmp_path: Path) -> None:
    async with path2(tmp_path, patterns=patterns(TWICE)) as deployment:
        items = await deployment.stream(model="pattern:twice")
    chunks = [item for item in items if not isinstance(item, Report)]
    pieces = [c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]]
    assert "".join(pieces) == "math says hello"
    assert chunks[0]["atlas"]["pair"] == "pattern:twice"


async def test_a_pattern_that_fails_is_followed_by_the_next_best_pair(tmp_path: Path) -> None:
    async with path2(tmp_path, patterns=patterns(TWICE)) as deployment:
        deployment.engines.says["math"] = RuntimeError("broken")
        text, report = await deployment.ask("topic 1")
    assert report.steps[0].pair == TWICE_PAIR
    assert text in {"cheap says hello", "strong says hello"}
    assert report.steps[0].error is not None


async def test_a_list_of_models_that_names_no_pattern_allows_none(tmp_path: Path) -> None:
    limits = {"models": frozenset({"cheap"})}
    async with path2(tmp_path, patterns=patterns(TWICE)) as deployment:
        _, report = await deployment.ask("topic 1", limits=limits)
    assert report.pair == CHEAP


def test_a_pattern_that_is_not_routable_does_not_move_the_scale_of_prices(tmp_path: Path) -> None:
    config = path2_config(tmp_path, patterns=patterns(TWICE, SORTED))
    cards = {str(card.pair): card for card in pair_cards(config)}
    assert set(cards) == {"cheap@none", "math@none", "strong@none", "pattern:twice"}
    expected = cards["cheap@none"].cost_usd + cards["math@none"].cost_usd
    assert cards["pattern:twice"].cost_usd == pytest.approx(expected)
