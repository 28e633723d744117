"""Requests that the rule `voi` decides, through the real orchestrator, router and store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from serve_app.gateway.chat.extension import completion_extension
from serve_app.router.snapshots.snapshot import RULE, VOI_RULE, RouterSnapshot
from serve_app.schemas import Action, DecidedBy, StopReason
from serve_app.signals import read_signals
from serve_app.store import read_trace
from serve_app.store.tables import OutcomeRow
from tests.path2_fakes import MATH, Path2, path2, plain_snapshot
from tests.verifier_data import make_verifier

SURE, UNSURE = -0.1, -2.0
PRICED = {"alpha": 0.5}


@pytest.fixture
async def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Path2]:
    monkeypatch.setenv("ATLAS_DATA_DIR", str(tmp_path))
    async with path2(tmp_path) as running:
        await running.promote(by_value())
        yield running


def by_value() -> RouterSnapshot:
    snapshot = plain_snapshot()
    return replace(snapshot, verifier=make_verifier(), metadata={RULE: VOI_RULE})


def saying(text: str, logprob: float, **changes: Any) -> dict[str, Any]:
    likely = [{"token": "x", "logprob": logprob}, {"token": "y", "logprob": -3.0}]
    token = {"token": text, "logprob": logprob, "top_logprobs": likely}
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
        "logprobs": {"content": [token, token]},
    }
    return {"choices": [choice | changes], "usage": {"prompt_tokens": 10, "completion_tokens": 5}}


async def test_a_likely_answer_is_given_after_one_step(graph: Path2) -> None:
    graph.engines.says = {"math": saying("42", SURE)}
    text, report = await graph.ask("topic 1", limits=PRICED)
    assert (text, report.decision.path) == ("42", DecidedBy.VOI)
    assert [decision.action for decision in report.decisions] == [Action.ROUTE, Action.ANSWER]
    told = completion_extension(report, alpha=0.0, explain=True)
    assert told["chances"] == [pytest.approx(0.9, abs=1e-3)]
    assert "chances" not in completion_extension(report, alpha=0.0, explain=False)


async def test_the_likeliest_answer_held_is_given_also_after_the_last_step(graph: Path2) -> None:
    for sure, said in ((0, "41"), (1, "42")):
        first, second = (SURE, UNSURE) if sure == 0 else (UNSURE, SURE)
        graph.engines.says = {"math": saying("41", first), "strong": saying("42", second)}
        text, report = await graph.ask("topic 1", limits={"max_steps": 2})
        assert len(report.steps) == 2
        assert (report.stop, report.answer_step, text) == (StopReason.STEPS, sure, said)


async def test_a_replay_returns_the_same_answer(graph: Path2) -> None:
    graph.engines.says = {"math": saying("41", SURE), "strong": saying("42", UNSURE)}
    _, first = await graph.ask("topic 1", limits={"max_steps": 2})
    assert await graph.outcomes.flush()
    replay = (await read_trace(graph.store, first.request_id, "local")).choices()
    assert (replay.is_policy, replay.answer_step, first.answer_step) == (True, 0, 0)
    text, again = await graph.ask("topic 1", replay=replay)
    assert (text, again.pair, len(again.steps)) == ("41", MATH, 2)


async def test_the_store_keeps_what_each_run_showed(graph: Path2) -> None:
    graph.engines.says = {"math": saying("I don't know.", SURE, finish_reason="length")}
    await graph.ask("topic 1 is what?", limits=PRICED)
    assert await graph.outcomes.flush()
    async with graph.store.begin() as connection:
        (row,) = (await connection.execute(select(OutcomeRow.signals))).all()
    signals = read_signals(row.signals)
    assert signals is not None
    assert signals.answer is not None
    assert (signals.answer.mean, signals.answer.num_tokens) == (SURE, 2)
    assert signals.answer.entropy == pytest.approx(0.38, abs=0.01)
    assert (signals.abstains, signals.is_cut, signals.kind) == (True, True, "text")
    assert (signals.num_turns, signals.num_calls, signals.num_sources) == (1, 0, None)


async def test_what_the_verifier_said_is_in_the_trace(graph: Path2) -> None:
    graph.engines.says = {"math": saying("42", SURE)}
    _, report = await graph.ask("topic 1", limits=PRICED)
    facts = [span.attributes for span in report.spans if span.kind == "decision"][-1]
    assert facts["best_chance"] == pytest.approx(0.9, abs=1e-3)
    assert (facts["answer_step"], facts["answers"]) == (0, 1)


async def test_a_first_choice_is_cluster_routings_and_streams(graph: Path2) -> None:
    graph.engines.says = {"math": saying("42", SURE)}
    *pieces, report = await graph.stream("topic 1", limits={"max_steps": 1})
    assert pieces
    assert report.pair == MATH
