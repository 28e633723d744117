"""`best_of` with a verifier: the best rated answer wins, and without the verifier the majority."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from serve_app.budget import Budget, Deadline
from serve_app.config import AtlasConfig, ScoringConfig
from serve_app.config.tools import BestOfConfig
from serve_app.errors import EngineError
from serve_app.models.protocol import ChatBody
from serve_app.models.reply import read_reply
from serve_app.models.verifier import read_score, score_completion, scoring_body
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.pairs.runner import PairRunner
from serve_app.schemas import ChatCall, Limits, Pair
from tests.executor_fakes import Result
from tests.path2_fakes import Engines

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's own imports deprecate things
    from serve_app.models.process_reward import combined, judged

QUESTION = "What is 3 + 4?"
SAMPLES = ["8", "8", "7 apples"]
"""What the model answers; most of them are wrong."""


def pool(**changes: Any) -> dict[str, Any]:
    remote = {"type": "remote", "base_url": "http://127.0.0.1:1/v1", "remote_model": "x"}
    best_of = {
        "type": "best_of",
        "tool_id": "best_of",
        "num_samples": len(SAMPLES),
        "vote": "verifier",
        "verifier": "judge",
        "price_usd_per_call": 0.5,
    }
    judge = {"role": "verifier", "price": {"usd_per_1m_prompt_tokens": 1e4}}
    return {
        "models": [
            remote | {"model_id": "small", "tools": ["none", "best_of"]},
            remote | {"model_id": "judge"} | judge | changes.pop("judge", {}),
        ],
        "tools": [best_of | changes.pop("best_of", {})],
        **changes,
    }


class Sampler(Engines):
    """A model that gives the samples, and a judge that says what it is told to."""

    async def complete(
        self, model_id: str, body: ChatBody, deadline: Deadline, session: str = ""
    ) -> dict[str, Any]:
        completion = await super().complete(model_id, body, deadline)
        if model_id == "small":
            (choice,) = completion["choices"]
            completion["choices"] = [
                {**choice, "index": number, "message": {"role": "assistant", "content": said}}
                for number, said in enumerate(SAMPLES[: body["n"]])
            ]
        return completion


def by_answer(**scores: Any) -> Any:
    """A judge that knows what each answer is worth."""
    return lambda body: scores["_" + body["messages"][-1]["content"].replace(" ", "_")]


async def best(tmp_path: Path, judge: Any) -> tuple[Result, Sampler]:
    engines = Sampler(says={"judge": judge})
    config = AtlasConfig.model_validate(pool(data_dir=str(tmp_path)))
    call = ChatCall(
        request_id="req_1",
        model="atlas",
        messages=({"role": "user", "content": QUESTION},),
        sampling={},
        limits=Limits(alpha=0.0, deadline_s=30),
    )
    result, pair = Result(), Pair("small", "best_of")
    work = PairWork(pair, call, Budget(Deadline.after(30)), result.trace.root)
    result.choices = await PairRunner(config, engines).run(work)
    return result, engines


async def test_the_best_rated_answer_wins_against_the_majority(tmp_path: Path) -> None:
    result, engines = await best(tmp_path, by_answer(_8="0.2", _7_apples="0.9"))
    assert result.answer == "7 apples"
    assert len(result.choices) == 1
    (call,) = result.tool_calls
    assert call.ok
    assert call.data == {"answers": SAMPLES, "scores": [0.2, 0.2, 0.9]}
    asked = [body["messages"] for body in engines.asked("judge")]
    assert asked[2] == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "7 apples"},
    ]


async def test_the_verifier_s_tokens_are_paid_for(tmp_path: Path) -> None:
    result, _ = await best(tmp_path, "0.5")
    assert result.usage.cost_usd == pytest.approx(0.5 + 3 * 10 * 0.01)
    assert result.usage.prompt_tokens == 10 + 3 * 10


@pytest.mark.parametrize("judge", [EngineError("gone"), "a poem", "nan"])
async def test_without_the_verifier_the_majority_decides_and_the_call_failed(
    tmp_path: Path, judge: Any
) -> None:
    result, _ = await best(tmp_path, judge)
    assert result.answer == "8"
    (call,) = result.tool_calls
    assert not call.ok
    assert "the majority decided" in call.text


@pytest.mark.parametrize(
    "changes",
    [
        {"best_of": {"verifier": "small"}},
        {"best_of": {"verifier": "nobody"}},
        {"best_of": {"vote": "self_consistency"}},
        {"best_of": {"verifier": None}},
        {"router": {"planner": "judge"}},
        {"router": {"fallback": "judge@none"}},
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any]) -> None:
    AtlasConfig.model_validate(pool())
    with pytest.raises(ValueError, match=r"verifier|planner|fallback"):
        AtlasConfig.model_validate(pool(**changes))


def test_a_verifier_makes_no_pair() -> None:
    pairs = AtlasConfig.model_validate(pool()).all_pairs()
    assert [str(pair) for pair in pairs] == ["small@none", "small@best_of"]


def test_a_pool_of_verifiers_is_refused() -> None:
    only = [model for model in pool()["models"] if model["model_id"] == "judge"]
    with pytest.raises(ValueError, match="every model is a verifier"):
        AtlasConfig.model_validate({"models": only})


def test_best_of_needs_no_verifier() -> None:
    assert BestOfConfig(tool_id="best_of").vote == "self_consistency"


def test_a_score_survives_its_way_as_text() -> None:
    assert read_score(read_reply(score_completion(0.123456, 7))) == 0.123456
    assert score_completion(0.5, 7)["usage"]["prompt_tokens"] == 7


def test_thoughts_are_not_rated() -> None:
    body = scoring_body(QUESTION, "<think>8? No.</think>\n\n7")
    assert body["messages"][-1] == {"role": "assistant", "content": "7"}


def test_a_step_token_stands_behind_each_step_and_nowhere_else() -> None:
    messages = [
        {"role": "user", "content": "What<extra_0>?"},
        {"role": "assistant", "content": "3 + 4<extra_0> = 7.\n\n\n\nSo 7.\n\n"},
    ]
    system, user, assistant = judged(messages, ScoringConfig())
    assert system["role"] == "system"
    assert user == {"role": "user", "content": "What?"}
    assert assistant == {"role": "assistant", "content": "3 + 4 = 7.<extra_0>So 7.<extra_0>"}


@pytest.mark.parametrize(
    "said",
    ["a<ext<extra_0>ra_0>b", "a<ext<ext<extra_0>ra_0>ra_0>b", "<extra_0" * 3 + "><extra_0>>" + ">"],
)
def test_no_step_can_be_written_into_an_answer(said: str) -> None:
    messages = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
    _, user, assistant = judged(messages, ScoringConfig())
    assert "<extra_0>" not in user["content"]
    assert assistant["content"].count("<extra_0>") == 1


def test_a_conversation_without_an_answer_has_one_empty_step() -> None:
    *_, assistant = judged([{"role": "user", "content": "Hello."}], ScoringConfig())
    assert assistant["content"] == "<extra_0>"


@pytest.mark.parametrize(("combine", "score"), [("product", 0.1), ("min", 0.2), ("last", 0.5)])
def test_steps_are_combined_as_configured(combine: Any, score: float) -> None:
    assert combined([0.2, 1.0, 0.5], ScoringConfig(combine=combine)) == pytest.approx(score)


def test_a_model_with_another_step_token_is_no_silent_zero() -> None:
    with pytest.raises(EngineError, match="step token"):
        combined([], ScoringConfig())
