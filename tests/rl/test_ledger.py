"""What a live training buys: once, within its caps, and on record; only the gateway is scripted."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rl.ppo.spend import CapReached, Ledger
from serve_app.errors import AtlasError, EngineError, InvalidRequest, NoCandidate, TrainingStopped
from serve_app.schemas import ChatCall, Limits, Report
from tests.rl.test_live import ScriptedGateway

ANSWERS: dict[str, str | AtlasError] = {
    "cheap@none": "41",
    "away@none": NoCandidate("not ready"),
    "broken@none": EngineError("it broke"),
}
PRICE = 2e-4
"""Of each of the gateway's answers."""


def call(model: str = "cheap@none", query: str = "what?", note: str | None = None) -> ChatCall:
    message = {"role": "user", "content": query}
    sampling = {"logprobs": True}
    return ChatCall("r", model, (message,), sampling, Limits(0.0, 10.0), note=note)


def make_ledger(path: Path, gateway: ScriptedGateway | None = None, **caps: float) -> Ledger:
    limits = {"max_cost_usd": 1.0, "max_seconds": 60.0} | caps
    run = gateway or ScriptedGateway(ANSWERS)
    return Ledger(path / "bought.jsonl", run, **limits, expected_usd={"cheap@none": PRICE})


def ask(ledger: Ledger, *calls: ChatCall, stop: bool = False) -> list[Any]:
    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*map(ledger, calls), return_exceptions=True)

    with ledger.opened(lambda: stop):
        return asyncio.run(all_of_them())


def answer_of(result: tuple[Report, AtlasError | None]) -> str | None:
    return result[0].steps[-1].answer


def test_equal_requests_are_sent_once_even_side_by_side(tmp_path: Path) -> None:
    gateway = ScriptedGateway(ANSWERS)
    ledger = make_ledger(tmp_path, gateway)
    same = ask(ledger, call(), call(), call(query="and that?"), call(note="mind the units"))
    assert [answer_of(result) for result in same] == ["41"] * 4
    assert len(gateway.calls) == 3
    assert ledger.spent.requests == 3
    assert ledger.spent.usd == pytest.approx(3 * PRICE)


def test_what_was_bought_outlives_the_process(tmp_path: Path) -> None:
    (before,) = ask(make_ledger(tmp_path), call())
    gateway = ScriptedGateway(ANSWERS)
    later = make_ledger(tmp_path, gateway)
    (after,) = ask(later, call())
    assert after == before
    assert gateway.calls == []
    assert later.spent.requests == 1
    assert later.spent.usd == pytest.approx(PRICE)


def test_a_line_that_was_cut_off_is_bought_anew(tmp_path: Path) -> None:
    ask(make_ledger(tmp_path), call(), call(query="and that?"))
    file = tmp_path / "bought.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    gateway = ScriptedGateway(ANSWERS)
    ask(make_ledger(tmp_path, gateway), call(), call(query="and that?"))
    assert len(gateway.calls) == 1
    again = make_ledger(tmp_path)
    ask(again)
    assert again.spent.requests == 2


def test_nothing_is_sent_that_could_exceed_the_dollars(tmp_path: Path) -> None:
    gateway = ScriptedGateway(ANSWERS)
    ledger = make_ledger(tmp_path, gateway, max_cost_usd=2.5 * PRICE)
    results = ask(ledger, *(call(query=f"question {number}") for number in range(5)))
    refused = [result for result in results if isinstance(result, CapReached)]
    assert (len(gateway.calls), len(refused)) == (2, 3)
    assert ledger.spent.usd <= 2.5 * PRICE
    # What is known is no purchase.
    assert answer_of(ask(make_ledger(tmp_path, max_cost_usd=PRICE), call(query="question 0"))[0])


def test_a_price_that_rises_is_reckoned_with(tmp_path: Path) -> None:
    ledger = Ledger(
        tmp_path / "bought.jsonl", ScriptedGateway(ANSWERS),
        max_cost_usd=1.5 * PRICE, max_seconds=60.0, expected_usd={},
    )  # fmt: skip
    assert isinstance(ask(ledger, call())[0], tuple)
    with pytest.raises(CapReached, match="USD"):
        ledger.check(PRICE)


def test_the_seconds_of_earlier_calls_count(tmp_path: Path) -> None:
    ask(make_ledger(tmp_path), call())
    (refused,) = ask(make_ledger(tmp_path, max_seconds=1e-9), call(query="and that?"))
    assert isinstance(refused, CapReached)
    assert "s is reached" in refused.message


@pytest.mark.parametrize("model", ["away@none", "broken@none"])
def test_what_could_not_be_had_is_asked_again(tmp_path: Path, model: str) -> None:
    gateway = ScriptedGateway(ANSWERS)
    for _ in range(2):
        ask(make_ledger(tmp_path, gateway), call(model))
    assert len(gateway.calls) == 2


def test_a_refusal_is_an_answer(tmp_path: Path) -> None:
    gateway = ScriptedGateway({"cheap@none": InvalidRequest("no logprobs here")})
    refused = [ask(make_ledger(tmp_path, gateway), call())[0] for _ in range(2)]
    assert len(gateway.calls) == 1
    assert [failure.message for _, failure in refused] == ["no logprobs here"] * 2


def test_a_pool_that_is_away_ends_the_training(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path)
    ask(ledger, *(call("away@none", f"question {number}") for number in range(32)))
    with pytest.raises(TrainingStopped, match="pool is away") as stopped:
        ledger.check()
    assert not isinstance(stopped.value, CapReached)


def test_told_to_stop_it_sends_nothing(tmp_path: Path) -> None:
    gateway = ScriptedGateway(ANSWERS)
    (refused,) = ask(make_ledger(tmp_path, gateway), call(), stop=True)
    assert isinstance(refused, TrainingStopped)
    assert gateway.calls == []
