"""Episodes on a pool: real runs behind the same interface; only the gateway is scripted."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rl.ppo.env import EnvSettings, Episodes, RoutingEnv
from rl.ppo.live import LiveBackend
from rl.ppo.table import ReplayTable
from rl.profile.measure import RunSettings
from serve_app.errors import AtlasError, ConfigError, EngineError, InvalidRequest, NoCandidate
from serve_app.questions import Question
from serve_app.router.policy.features import NO_ANSWER
from serve_app.schemas import ChatCall, DecidedBy, Decision, Pair, Report, Step, Usage
from tests.rl.replay_data import DIM, encode, make_replay
from tests.router_data import PAIRS

PLANNER = Pair("planner", "none")
SETTINGS = EnvSettings(randomise=False, alpha=0.2, max_steps=4)
CHEAP, MIDDLE, DEAR, THINK, ANSWER = range(5)


class ScriptedGateway:
    """Answers each pair with its own text; what a model's name begins with decides."""

    def __init__(self, answers: dict[str, str | AtlasError]) -> None:
        self.answers = answers
        self.calls: list[ChatCall] = []
        self.at_once = self.most_at_once = 0

    async def __call__(self, call: ChatCall) -> tuple[Report, AtlasError | None]:
        self.calls.append(call)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0.01)
        self.at_once -= 1
        said = self.answers[call.model]
        if isinstance(said, NoCandidate):
            raise said
        if isinstance(said, InvalidRequest) and "logprobs" not in call.sampling:
            said = "42"
        failure = said if isinstance(said, AtlasError) else None
        pair = Pair.parse(call.model)
        usage = Usage(10, 5, 2e-4)
        step = Step(
            pair,
            DecidedBy.PINNED,
            1.0,
            usage,
            0.5,
            answer=None if failure else str(said),
            mean_logprob=None if failure else -0.25,
        )
        decision = Decision((), DecidedBy.PINNED, 1.0, 1.0, 0, 1)
        report = Report(
            call.request_id, decision, (step,), usage, 0.5, call.query, None, owner=call.owner
        )
        return report, failure


def make_pool(num_queries: int = 4) -> tuple[ReplayTable, list[Question]]:
    """Queries of their own texts, to all of which 42 is right."""
    table = replace(
        make_replay(num_queries), queries=tuple(f"question {n}?" for n in range(num_queries))
    )
    return table, [
        Question(id=str(n), query=query, gold=42, metric="numeric")
        for n, query in enumerate(table.queries)
    ]


def make_backend(
    answers: dict[str, str | AtlasError] | None = None, num_queries: int = 4, **changes: Any
) -> tuple[LiveBackend, ScriptedGateway]:
    table, questions = make_pool(num_queries)
    default: dict[str, str | AtlasError] = {
        "cheap@none": "41",
        "math@calculator": "The answer is 42",
        "strong@none": "42",
        "planner@none": "Mind the units.",
    }
    gateway = ScriptedGateway(default | (answers or {}))
    return LiveBackend(table, questions, encode, run=gateway, **changes), gateway


def run(backend: LiveBackend, pairs: list[int], start: bool = True) -> Any:
    rows = np.arange(len(pairs))
    if start:
        backend.start(rows, rows)
    return backend.run(rows, rows, np.array(pairs), np.zeros(len(pairs), np.bool_))


def test_answers_are_scored_against_the_gold_and_embedded() -> None:
    backend, gateway = make_backend()
    batch = run(backend, [CHEAP, MIDDLE, DEAR])
    assert batch.score.tolist() == [0.0, 1.0, 1.0]
    np.testing.assert_allclose(batch.cost_usd, 2e-4)
    np.testing.assert_allclose(batch.seconds, 0.5)
    np.testing.assert_allclose(batch.logprob, -0.25)
    np.testing.assert_array_equal(batch.answer_embedding[2], encode(["42"])[0])
    assert [call.query for call in gateway.calls] == [f"question {n}?" for n in range(3)]
    assert {call.owner for call in gateway.calls} == {"rollout"}


def test_answers_agree_within_an_episode_and_are_forgotten_with_it() -> None:
    backend, _ = make_backend()
    first = run(backend, [MIDDLE]).answer_key[0]
    assert run(backend, [DEAR], start=False).answer_key[0] == first
    assert run(backend, [CHEAP], start=False).answer_key[0] != first
    assert run(backend, [CHEAP]).answer_key[0] == 0


def test_all_runs_of_a_step_are_under_way_at_once_up_to_the_limit() -> None:
    backend, gateway = make_backend(num_queries=8)
    run(backend, [DEAR] * 8)
    assert gateway.most_at_once == 8
    backend, gateway = make_backend(num_queries=8, concurrency=3)
    run(backend, [DEAR] * 8)
    assert gateway.most_at_once == 3


@pytest.mark.parametrize("failure", [EngineError("away"), NoCandidate("not ready")])
def test_a_run_that_could_not_be_had_is_a_step_without_an_answer(failure: AtlasError) -> None:
    backend, _ = make_backend({"cheap@none": failure})
    batch = run(backend, [CHEAP, DEAR])
    assert batch.answer_key.tolist() == [NO_ANSWER, 0]
    assert batch.score.tolist() == [0.0, 1.0]
    assert batch.cost_usd[0] == 0.0
    assert not batch.answer_embedding[0].any()


def test_an_engine_without_log_probabilities_is_asked_again_without_them() -> None:
    backend, gateway = make_backend({"cheap@none": InvalidRequest("no logprobs here")})
    assert run(backend, [CHEAP]).score[0] == 1.0
    assert ["logprobs" in call.sampling for call in gateway.calls] == [True, False]


def test_a_thought_reads_the_answers_and_reaches_the_later_runs() -> None:
    backend, gateway = make_backend(planner=PLANNER)
    episodes = Episodes(backend, 1, SETTINGS)
    episodes.reset()
    for action in (CHEAP, THINK, DEAR):
        assert episodes.legal()[0, action]
        _, done, info = episodes.step(np.array([action]))
    assert not done[0]
    first, plan, last = gateway.calls
    assert first.note is None
    assert plan.model == "planner@none"
    assert "question" in plan.query
    assert "41" in plan.query
    assert last.note == "Mind the units."
    assert info["cost_usd"][0] == pytest.approx(6e-4)
    # A later episode knows nothing of it.
    episodes.reset()
    episodes.step(np.array([CHEAP]))
    assert gateway.calls[-1].note is None


def test_a_planner_that_fails_leaves_no_note() -> None:
    backend, gateway = make_backend({"planner@none": EngineError("away")}, planner=PLANNER)
    episodes = Episodes(backend, 1, SETTINGS)
    episodes.reset()
    episodes.step(np.array([THINK]))
    episodes.step(np.array([DEAR]))
    assert gateway.calls[-1].note is None


def test_there_is_no_thinking_without_a_planner() -> None:
    backend, _ = make_backend()
    episodes = Episodes(backend, 1, SETTINGS)
    episodes.reset()
    assert not episodes.legal()[0, THINK]


def test_a_live_episode_is_rewarded_as_a_replayed_one() -> None:
    backend, _ = make_backend()
    env = RoutingEnv(backend, SETTINGS)
    env.reset(seed=0)
    assert env.step(MIDDLE)[2] is False
    _, reward, terminated, _, info = env.step(env.core.settings.max_pairs + 1)
    assert terminated
    assert info["score"] == 1.0
    assert reward == pytest.approx(info["r_out"] + info["r_sel"])


def test_only_ready_pairs_and_known_questions_take_part() -> None:
    table, questions = make_pool()
    gateway = ScriptedGateway({})
    backend = LiveBackend(table, questions[:2], encode, ready=PAIRS[1:], run=gateway)
    assert backend.can_run.tolist() == [[False, True, True]] * 2 + [[False] * 3] * 2
    episodes = Episodes(backend, 50, EnvSettings())
    episodes.reset()
    assert set(episodes.query.tolist()) == {0, 1}
    assert not episodes.states.present[:, 0].any()


def test_questions_of_another_table_are_refused() -> None:
    table, _ = make_pool()
    other = Question(id="1", query="something else", gold=1, metric="numeric")
    with pytest.raises(ConfigError, match="none of the table's queries"):
        LiveBackend(table, [other], encode)


def test_a_judge_is_asked_through_the_same_pool() -> None:
    table, _ = make_pool(1)
    question = Question(id="1", query=table.queries[0], gold="42", metric="judge")
    gateway = ScriptedGateway({"strong@none": "42", "planner@none": "Verdict: tie"})
    settings = RunSettings(judge=PLANNER, owner="rollout")
    backend = LiveBackend(table, [question], encode, settings=settings, run=gateway)
    assert run(backend, [DEAR]).score[0] == 1.0
    assert [call.model for call in gateway.calls].count("planner@none") == 2


def test_embeddings_of_answers_have_the_width_of_the_tables() -> None:
    backend, _ = make_backend()
    assert run(backend, [CHEAP, CHEAP]).answer_embedding.shape == (2, DIM)
