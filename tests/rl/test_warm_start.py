"""Where PPO starts: the rule, one run by its exact utility, and the teacher's several runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rl.ppo.config import TrainConfig, parse_train_config
from rl.ppo.episodes import Episodes
from rl.ppo.loop import validate
from rl.ppo.randomise import EnvSettings
from rl.ppo.rollout import Chooser, Greedy, roll_out
from rl.ppo.table import ReplayTable
from rl.ppo.teacher import Teacher
from rl.ppo.torch_policy_net import TorchPolicyNet
from rl.ppo.verifier import VerifierSettings, with_judges
from rl.ppo.warm_start import (
    IMITATION,
    ONE_STEP,
    RULE,
    TEACHER,
    WarmStart,
    _Imitation,
    warm_start,
)
from rl.training import split_table
from serve_app.router.policy.policy_net import PolicyNet
from tests.rl.replay_data import flat_view, make_replay
from tests.rl.test_verifier import make_table

FEW = VerifierSettings(num_trees=25, num_leaves=8, learning_rate=0.2, least_in_leaf=20)


def judged(num_queries: int = 400) -> ReplayTable:
    return with_judges(make_table(num_queries), FEW)


@pytest.fixture(scope="module")
def tables() -> tuple[ReplayTable, ReplayTable]:
    return split_table(judged(), 0.3)


def settings(**warm: int) -> TrainConfig:
    return parse_train_config(
        {
            "warm_start": {"batch": 128, "one_step": 0, "imitation": 0} | warm,
            "net": {"width": 16, "num_heads": 2},
            "env": {"max_steps": 3},
            "augmentation": {"noise": 0.1, "drop": 0.0, "scramble_known": 0.0},
            "validation": {"alphas": [0.0, 0.1]},
        }
    )


def started(table: ReplayTable, apart: ReplayTable, config: TrainConfig) -> WarmStart:
    def measure(chooser: Chooser) -> float:
        found = validate(chooser, apart, config.validation, config.env.max_steps)
        return float(np.mean(list(found.values())))

    return warm_start(table, apart, config, measure)


def test_without_updates_it_is_the_rule(tables: tuple[ReplayTable, ReplayTable]) -> None:
    start = started(*tables, settings())
    assert start.stage == RULE
    assert set(start.utilities) == {RULE, TEACHER}


def test_one_run_is_learned_from_all_outcomes_without_a_draw() -> None:
    """Path 1 believes the same of everyone; only the questions' embeddings tell who is right."""
    table = make_replay(300, seed=1)
    table = replace(table, views=(flat_view(table),))
    rest, apart = split_table(table, 0.3)
    start = started(rest, apart, settings(one_step=150))
    assert set(start.utilities) == {RULE, ONE_STEP}
    assert start.stage == ONE_STEP
    assert start.utilities[ONE_STEP] > start.utilities[RULE] + 0.1


def test_what_does_worse_on_the_questions_apart_is_not_started_from(
    tables: tuple[ReplayTable, ReplayTable],
) -> None:
    rest, apart = tables
    # The truth apart is the contrary of what is learned.
    misled = replace(apart, score=1 - apart.score)
    start = started(rest, misled, settings(one_step=40, imitation=10))
    assert start.utility == max(start.utilities[stage] for stage in (RULE, ONE_STEP, IMITATION))


def test_imitation_comes_near_to_the_teacher(tables: tuple[ReplayTable, ReplayTable]) -> None:
    rest, _ = tables
    config = settings(imitation=80)
    net = TorchPolicyNet(rest.embeddings.shape[1], width=16, num_heads=2)
    stage = _Imitation(net, rest, config)
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    losses = []
    for _update in range(80):
        loss = stage.loss()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_a_start_is_read_as_it_was_written(
    tables: tuple[ReplayTable, ReplayTable], tmp_path: Path
) -> None:
    assert WarmStart.read(tmp_path) is None
    start = started(*tables, settings())
    start.save(tmp_path)
    read = WarmStart.read(tmp_path)
    assert read is not None
    assert (read.stage, read.utilities) == (start.stage, start.utilities)
    for name, tensor in start.tensors.items():
        np.testing.assert_array_equal(read.tensors[name], tensor)


def under_way(table: ReplayTable, max_steps: int = 3) -> Episodes:
    """An episode of every question, after the first pair's run."""
    episodes = Episodes(table, table.num_queries, EnvSettings(randomise=False))
    everyone = np.arange(table.num_queries)
    episodes.reset(queries=everyone, alpha=0.0, max_steps=max_steps, view=0)
    episodes.step(np.zeros(table.num_queries, np.intp))
    return episodes


def test_a_teacher_says_nothing_that_rests_on_the_question_itself() -> None:
    table = judged(300)
    assert table.judges is not None
    assert table.judges.alone is not None
    before = Teacher(table).values(under_way(table), np.array([7]))
    score, alone = table.score.copy(), table.judges.alone.copy()
    score[0, 7, 1:] = 1 - score[0, 7, 1:]
    alone[:, 7, 1:] = 1 - alone[:, 7, 1:]
    changed = replace(table, score=score, judges=replace(table.judges, alone=alone))
    after = Teacher(changed).values(under_way(changed), np.array([7]))
    np.testing.assert_array_equal(before, after)


def test_a_teacher_knows_that_who_fails_on_one_question_fails_on_its_like() -> None:
    """The second is right where the first is; the third where both are wrong."""
    table = judged(400)
    assert table.judges is not None
    assert table.judges.alone is not None
    hard = np.arange(400) % 2 == 1
    score = table.score.copy()
    score[0] = np.stack([~hard, ~hard, hard], axis=1)
    alone = np.broadcast_to(np.where(score[0] > 0.5, 0.9, 0.1), table.judges.alone.shape)
    even = replace(flat_view(table), quality=np.full((400, 3), 0.5, np.float32))
    table = replace(
        table,
        score=score,
        views=(even,),
        # All questions look alike: what was seen is all there is to go by.
        embeddings=np.broadcast_to(table.embeddings[:1], table.embeddings.shape),
        judges=replace(table.judges, of=table.judges.of[:1], alone=alone[:1].astype(np.float32)),
    )
    episodes = under_way(table, max_steps=2)  # one more run, and nothing after it
    episodes.states.chance[:, 0] = np.where(hard, 0.1, 0.9)
    episodes.states.rise[:] = 0.0
    values = Teacher(table).values(episodes, np.arange(400))
    assert (values[hard, 2] > values[hard, 1] + 0.2).all()
    assert (values[~hard, :3].max(axis=1) < 0.1).all()


def test_a_table_without_chances_has_no_teacher() -> None:
    with pytest.raises(ValueError, match="chances"):
        Teacher(make_replay())


def test_chances_decide_which_answer_an_episode_returns() -> None:
    table = judged(200)
    net = Greedy(PolicyNet(_net(table).to_tensors()))
    requests = roll_out(net, table, 0.0, max_steps=3)
    once = roll_out(net, table, 0.0, max_steps=1)
    assert requests.score.mean() > once.score.mean()


def _net(table: ReplayTable) -> TorchPolicyNet:
    return TorchPolicyNet(table.embeddings.shape[1], width=16, num_heads=2, num_layers=1).eval()
