"""The environment: what its actions do and cost, and that many side by side are as many alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers.vector import DictInfoToList

from rl.ppo.backend import ReplayBackend
from rl.ppo.env import EnvSettings, Episodes, RoutingEnv, VectorRoutingEnv
from rl.ppo.replay import ReplayTable
from rl.ppo.reward import RewardSettings
from serve_app.errors import ConfigError
from serve_app.router.policy.features import MAX_STEPS, NO_ANSWER
from tests.rl.replay_data import flat_view, make_replay, one_query, with_thoughts

FIXED = EnvSettings(randomise=False, alpha=0.2, max_steps=4)
CHEAP, MIDDLE, DEAR, THINK, ANSWER = range(5)
"""Actions on three pairs."""


def start(table: ReplayTable, settings: EnvSettings = FIXED, num_envs: int = 1) -> Episodes:
    episodes = Episodes(table, num_envs, settings)
    episodes.reset()
    return episodes


def play(episodes: Episodes, *actions: int) -> tuple[float, dict[str, Any]]:
    """The return of one episode, and what its last step told; it must end there and not before."""
    total = 0.0
    for number, action in enumerate(actions, start=1):
        reward, done, info = episodes.step(np.array([action]))
        total += float(reward[0])
        assert bool(done[0]) == (number == len(actions)), f"after {number} actions"
    return total, {name: values[0] for name, values in info.items()}


def random_actions(legal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    actions: np.ndarray = np.where(legal, rng.random(legal.shape), -1).argmax(axis=1)
    return actions


def test_a_right_answer_earns_its_score_less_the_expected_cost() -> None:
    total, info = play(start(one_query([0, 1, 0], [0, 1, 2])), MIDDLE, ANSWER)
    # The middle pair is half way between the others on a log scale; alpha 0.2 trades 4 to 1.
    assert total == pytest.approx(1.0 - 0.25 * 0.5, abs=1e-6)
    assert (info["score"], info["pair"], info["steps"]) == (1.0, MIDDLE, 1)
    assert info["cost_usd"] == pytest.approx(1e-4)


def test_every_run_is_charged_and_the_terms_sum_to_the_reward() -> None:
    episodes = start(one_query([0, 0, 1], [0, 1, 2]))
    totals = np.zeros(4)
    for action in (CHEAP, DEAR, MIDDLE):
        reward, _, info = episodes.step(np.array([action]))
        terms = [float(info[name][0]) for name in ("r_out", "r_fmt", "r_sel", "r_cost")]
        assert reward[0] == pytest.approx(sum(terms), abs=1e-6)
        totals += terms
    # All three together are 111 times the cheapest, where the dearest is 100 times.
    assert totals[3] == pytest.approx(-0.25 * np.log(111) / np.log(100), abs=1e-4)
    assert -totals[3] == pytest.approx(info["total_cost"][0])


def test_the_answer_of_a_pair_that_another_beats_is_held_against_it() -> None:
    _, info = play(start(one_query([0, 1, 0], [0, 1, 2])), CHEAP, ANSWER)
    assert info["r_sel"] == pytest.approx(-0.15)
    _, info = play(start(one_query([0, 0, 0], [0, 1, 2])), CHEAP, ANSWER)
    assert info["r_sel"] == 0.0


def test_the_answer_most_agree_on_is_returned_and_else_the_last() -> None:
    agreeing = one_query([1, 0, 1], [0, 1, 0])
    _, info = play(start(agreeing), CHEAP, DEAR, MIDDLE)  # nothing is left to run
    assert (info["score"], info["pair"]) == (1.0, DEAR)
    apart = one_query([1, 0, 0], [0, 1, 2])
    _, info = play(start(apart), CHEAP, MIDDLE, ANSWER)
    assert (info["score"], info["pair"]) == (0.0, MIDDLE)


def test_candidates_that_never_differed_have_one_vote() -> None:
    table = one_query([0, 0, 1], [0, 0, 1])
    _, info = play(start(table), CHEAP, MIDDLE, DEAR)
    assert (info["score"], info["pair"]) == (0.0, MIDDLE)
    clones = replace(table, voters=np.array([0, 0, 2]))
    _, info = play(start(clones), CHEAP, MIDDLE, DEAR)
    assert (info["score"], info["pair"]) == (1.0, DEAR)


def test_the_observation_tells_which_answers_agree() -> None:
    episodes = start(one_query([1, 0, 1], [0, 1, 0]), replace(FIXED, max_steps=8))
    for action in (CHEAP, MIDDLE):
        episodes.step(np.array([action]))
    np.testing.assert_allclose(episodes.states.agreement[0], [1 / 2, 1 / 2, 0])


@pytest.mark.parametrize("action", [ANSWER, THINK, -1, 5, 99])
def test_an_illegal_action_ends_the_episode_with_the_penalty(action: int) -> None:
    total, info = play(start(one_query([1, 1, 1], [0, 0, 0])), action)
    assert total == -1.0
    assert info["r_fmt"] == -1.0
    assert info["pair"] == -1


def test_answers_so_far_do_not_save_an_illegal_action() -> None:
    total, info = play(start(one_query([1, 1, 1], [0, 0, 0])), CHEAP, CHEAP)
    assert total == -1.0
    assert info["score"] == 0.0


def test_a_run_that_fails_costs_its_price_and_another_may_follow() -> None:
    episodes = start(one_query([0, 1, 0], [NO_ANSWER, 0, 1]))
    episodes.step(np.array([DEAR]))
    episodes.step(np.array([CHEAP]))
    assert episodes.states.failed[0].tolist() == [True, False, False]
    assert episodes.legal()[0].tolist() == [False, True, False, False, True]
    assert not episodes.states.last_answer.any()


def test_an_episode_in_which_everything_failed_ends_without_an_answer() -> None:
    total, info = play(
        start(one_query([0, 0, 0], [NO_ANSWER] * 3), replace(FIXED, alpha=0.0)), 0, 1, 2
    )
    assert total == -1.0
    assert info["pair"] == -1


def test_an_episode_ends_by_itself_when_the_steps_are_used_up() -> None:
    table = one_query([1, 0, 0], [0, 1, 2])
    total, _ = play(start(table, replace(FIXED, max_steps=1, alpha=0.0)), CHEAP)
    assert total == 1.0


def test_a_limit_in_dollars_leaves_out_what_it_does_not_pay_for() -> None:
    episodes = Episodes(one_query([1, 0, 0], [0, 1, 2]), 1, FIXED)
    episodes.reset(usd_left=1.05e-4)
    assert episodes.legal()[0].tolist() == [True, True, False, False, False]
    _, done, _ = episodes.step(np.array([MIDDLE]))
    assert episodes.states.usd_left[0] == pytest.approx(5e-6, rel=1e-3)
    assert done[0]  # not even the cheap one fits into the rest


def test_a_limit_in_seconds_leaves_out_what_takes_longer() -> None:
    episodes = Episodes(one_query([1, 0, 0], [0, 1, 2]), 1, FIXED)
    episodes.reset(seconds_left=2.5)
    assert episodes.legal()[0].tolist() == [True, True, False, False, False]
    episodes.step(np.array([CHEAP]))
    assert episodes.states.seconds_left[0] == pytest.approx(1.5)


def test_the_reward_of_the_paper_charges_nothing() -> None:
    settings = replace(FIXED, alpha=0.9, reward=RewardSettings.paper())
    total, _ = play(start(one_query([0, 0, 1], [0, 1, 2]), settings), DEAR, ANSWER)
    assert total == 1.0


def test_observed_dollars_are_charged_where_that_is_asked_for() -> None:
    table = one_query([1, 1, 1], [0, 0, 0])
    dearer = replace(table, costs_usd=10 * table.costs_usd)
    settings = replace(FIXED, reward=RewardSettings(observed_cost=True))
    total, _ = play(start(dearer, settings), CHEAP, ANSWER)
    assert total == pytest.approx(1.0 - 0.25 * 0.5, abs=1e-6)


def test_a_run_costs_what_the_prices_of_its_episode_say() -> None:
    table = one_query([1, 1, 1], [0, 0, 0])
    settings = EnvSettings(drop_pairs=(0.0, 0.0), drop_members=0.0, price_jitter=1.0)
    episodes = Episodes(table, 100, settings)
    episodes.reset(alpha=0.5, max_steps=4, usd_left=np.inf, seconds_left=np.inf)
    prices = episodes.states.costs_usd.copy()
    _, _, info = episodes.step(np.full(100, MIDDLE))
    np.testing.assert_allclose(info["cost_usd"], prices[:, MIDDLE], rtol=1e-5)
    logs = np.log(prices)
    span = logs.max(axis=1) - logs.min(axis=1)
    share = (logs[:, MIDDLE] - logs.min(axis=1)) / span
    np.testing.assert_allclose(info["total_cost"], share, atol=1e-4)


def test_a_pair_that_is_away_is_not_held_against_the_others() -> None:
    settings = EnvSettings(drop_pairs=(0.5, 0.5), drop_members=0.0)
    episodes = Episodes(one_query([0, 0, 1], [0, 1, 2]), 200, settings)
    episodes.reset(max_steps=1, usd_left=np.inf, seconds_left=np.inf)
    there = episodes.states.present
    rows = there[:, CHEAP]
    _, _, info = episodes.step(np.where(rows, CHEAP, MIDDLE))
    expected = np.where(there[:, DEAR], -0.15, 0.0)
    np.testing.assert_allclose(info["r_sel"][rows], expected[rows])
    assert len(set(expected[rows].tolist())) == 2


def test_answers_of_an_earlier_episode_have_no_vote() -> None:
    table = one_query([0, 0, 1], [0, 0, 1])
    episodes = start(table)
    play(episodes, CHEAP, MIDDLE, ANSWER)
    episodes.reset()
    _, info = play(episodes, DEAR, ANSWER)
    assert (info["score"], info["pair"]) == (1.0, DEAR)


def test_after_a_thought_a_pair_is_held_against_what_others_then_reach() -> None:
    table = one_query([0, 1, 0], [0, 1, 2])
    thinking = with_thoughts(table)
    score = np.concatenate([table.score, np.array([[[1, 0, 1]]], np.float32)])
    _, info = play(start(replace(thinking, score=score)), THINK, CHEAP, ANSWER)
    assert info["r_sel"] == 0.0
    score = np.concatenate([table.score, np.zeros_like(table.score)])
    _, info = play(start(replace(thinking, score=score)), THINK, CHEAP, ANSWER)
    assert info["r_sel"] == 0.0


def test_a_thought_costs_a_step_and_its_price_and_changes_what_pairs_answer() -> None:
    table = with_thoughts(one_query([0, 0, 0], [0, 1, 2]), score=1.0)
    episodes = start(table, replace(FIXED, max_steps=2))
    _, _, info = episodes.step(np.array([THINK]))
    assert info["r_cost"][0] == pytest.approx(-0.25 * 0.5, abs=1e-6)
    assert not episodes.legal()[0, THINK]
    assert episodes.states.thought[0]
    _, done, info = episodes.step(np.array([CHEAP]))
    assert done[0]  # both steps are used up
    assert (info["score"][0], info["steps"][0]) == (1.0, 2)
    assert info["cost_usd"][0] == pytest.approx(1.1e-4)


def test_there_is_no_thinking_with_one_step_left_or_without_a_record() -> None:
    table = one_query([0, 0, 0], [0, 1, 2])
    assert not start(table).legal()[0, THINK]
    thinking = with_thoughts(table)
    assert start(thinking).legal()[0, THINK]
    assert not start(thinking, replace(FIXED, max_steps=1)).legal()[0, THINK]


def test_a_thought_that_would_take_a_pair_away_is_not_offered() -> None:
    table = with_thoughts(one_query([0, 0, 0], [0, 1, 2]))
    measured = table.measured.copy()
    measured[1, 0, DEAR] = False
    assert not start(replace(table, measured=measured)).legal()[0, THINK]


def test_many_side_by_side_do_as_each_alone() -> None:
    table = with_thoughts(make_replay(60))
    missing = np.random.default_rng(3).random(table.answer_key.shape) < 0.3
    table = replace(table, answer_key=np.where(missing, NO_ANSWER, table.answer_key))
    size, rng = 60, np.random.default_rng(0)
    together = Episodes(table, size, FIXED)
    setup: dict[str, Any] = {
        "queries": np.arange(size),
        "alpha": rng.random(size).astype(np.float32),
        "max_steps": rng.integers(1, MAX_STEPS + 1, size),
        "view": rng.integers(2, size=size),
    }
    together.reset(**setup)
    alone = [Episodes(table, 1, FIXED) for _ in range(size)]
    for row, episodes in enumerate(alone):
        episodes.reset(**{name: values[row : row + 1] for name, values in setup.items()})
    while together.active.any():
        actions = random_actions(together.legal(), rng)
        observation = together.observe()
        was_active = together.active.copy()
        reward, done, info = together.step(actions)
        for row in np.flatnonzero(was_active):
            own = alone[row].observe()
            for name, values in observation.items():
                np.testing.assert_allclose(own[name][0], values[row], rtol=1e-5, atol=1e-6)
            own_reward, own_done, own_info = alone[row].step(actions[row : row + 1])
            assert own_reward[0] == pytest.approx(reward[row], abs=1e-6)
            assert own_done[0] == done[row]
            assert own_info["score"][0] == info["score"][row]


def test_the_same_seed_draws_the_same_episodes() -> None:
    def first(seed: int) -> dict[str, np.ndarray]:
        env = VectorRoutingEnv(make_replay(), 32)
        return env.reset(seed=seed)[0]

    for name, values in first(5).items():
        np.testing.assert_array_equal(values, first(5)[name])
    assert (first(5)["candidates"] != first(6)["candidates"]).any()


def test_episodes_differ_in_everything_that_is_to_be_randomised() -> None:
    table = replace(make_replay(), pair_seconds=np.array([1.0, 2.0, 4.0], np.float32))
    settings = EnvSettings(usd_limits=0.5, seconds_limits=0.5, drop_pairs=(0.3, 0.6))
    states = start(table, settings, 2000).states
    assert set(states.steps_left.tolist()) == {1.0, 2.0, 3.0, 4.0}
    assert 0.1 < (states.alpha == 0).mean() < 0.2
    assert states.alpha[states.alpha > 0].min() < 0.01
    assert states.alpha.max() > 0.6
    assert set(states.present.sum(axis=1).tolist()) == {1, 2, 3}
    assert states.present.mean(axis=0).min() > 0.3
    factors = np.log(states.costs_usd / table.pair_costs_usd)
    # A factor of its own for the model and for the tool of each pair; two share a tool.
    np.testing.assert_allclose(factors.std(axis=0), 0.5 * np.sqrt(2), rtol=0.1)
    assert np.corrcoef(factors[:, 0], factors[:, 2])[0, 1] > 0.3
    assert abs(np.corrcoef(factors[:, 0], factors[:, 1])[0, 1]) < 0.1
    for limit in (states.usd_left, states.seconds_left):
        assert 0.4 < np.isfinite(limit).mean() < 0.6
    assert set(states.quality[:, 0].tolist()) == {0.5, np.float32(0.9)}


def test_every_episode_can_be_begun_whatever_is_drawn() -> None:
    table = replace(make_replay(), pair_seconds=np.array([1.0, 2.0, 4.0], np.float32))
    settings = EnvSettings(
        usd_limits=1.0, seconds_limits=1.0, drop_pairs=(1.0, 1.0), drop_members=0.9
    )
    episodes = start(table, settings, 2000)
    assert episodes.legal()[:, :3].any(axis=1).all()
    assert (episodes.states.present.sum(axis=1) == 1).all()


def test_members_are_away_with_all_their_pairs_and_the_planner_is_too() -> None:
    settings = EnvSettings(drop_members=0.3, drop_pairs=(0.0, 0.0), no_planner=0.25)
    states = start(with_thoughts(make_replay()), settings, 4000).states
    assert states.present.sum(axis=1).min() == 1  # whatever is away
    away = ~states.present
    # Of the outer pairs' common tool, or of both their models; a third of the time neither stays.
    assert (away[:, 0] & away[:, 2]).mean() == pytest.approx((0.3 + 0.7 * 0.09) / 3, abs=0.02)
    assert away[:, 1].mean() == pytest.approx((1 - 0.7 * 0.7) * 2 / 3, abs=0.03)
    assert states.can_think.mean() == pytest.approx(0.75, abs=0.03)


def test_path_1_knows_newcomers_by_their_cards_alone() -> None:
    table = make_replay()
    table = replace(table, new_models=flat_view(table, 0.25), new_tools=flat_view(table, 0.125))
    settings = EnvSettings(newcomers=0.2, drop_members=0.0)
    quality = start(table, settings, 4000).states.quality
    for value, share in ((0.25, 0.8 * 0.2), (0.125, 0.2)):  # a tool's word is the last
        assert (quality == value).mean() == pytest.approx(share, abs=0.02)
    fixed = start(table, FIXED, 50).states.quality
    np.testing.assert_array_equal(fixed, 0.5)


def test_views_are_drawn_by_their_weights() -> None:
    episodes = start(make_replay(), EnvSettings(view_weights=(1.0, 3.0)), 2000)
    assert episodes.view.mean() == pytest.approx(0.75, abs=0.04)


def test_a_pair_that_was_not_measured_is_absent() -> None:
    table = make_replay()
    measured = table.measured.copy()
    measured[0, :, 1] = False
    episodes = start(replace(table, measured=measured), EnvSettings(drop_members=0.0), 500)
    assert not episodes.states.present[:, 1].any()


def test_an_ended_row_waits_for_its_reset() -> None:
    episodes = start(make_replay(), FIXED, 2)
    episodes.step(np.array([ANSWER, CHEAP]))
    assert episodes.active.tolist() == [False, True]
    reward, done, _ = episodes.step(np.array([CHEAP, MIDDLE]))
    assert (reward[0], bool(done[0])) == (0.0, False)
    episodes.reset(np.array([0]), queries=np.array([7]))
    assert episodes.active.all()
    assert episodes.query[0] == 7
    assert episodes.states.tried[0].sum() == 0
    assert episodes.states.tried[1].sum() == 2


def test_an_observation_is_not_changed_by_later_steps() -> None:
    episodes = start(make_replay(), FIXED, 4)
    before = episodes.observe()
    kept = {name: values.copy() for name, values in before.items()}
    episodes.step(np.full(4, CHEAP))
    episodes.reset()
    for name, values in before.items():
        np.testing.assert_array_equal(values, kept[name])


def test_a_table_without_beliefs_or_with_too_many_pairs_is_refused() -> None:
    table = make_replay()
    with pytest.raises(ConfigError, match="view"):
        RoutingEnv(replace(table, views=()))
    with pytest.raises(ConfigError, match="raise max_pairs"):
        VectorRoutingEnv(table, 2, EnvSettings(max_pairs=2))


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_steps", 0), ("max_steps", 9), ("alpha_odds", (2.0, 1.0)), ("drop_pairs", (0.0, 1.5))],
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        EnvSettings(**{name: value})


def test_the_single_environment_passes_gymnasiums_checks() -> None:
    check_env(RoutingEnv(make_replay()), skip_render_check=True)


def test_padding_is_masked_and_its_actions_are_illegal() -> None:
    env = RoutingEnv(make_replay(), EnvSettings(max_pairs=6, randomise=False))
    observation, _ = env.reset(seed=0)
    assert observation["mask"].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert not observation["candidates"][3:].any()
    _, reward, terminated, truncated, info = env.step(4)
    assert (reward, terminated, truncated) == (-1.0, True, False)
    assert info["r_fmt"] == -1.0


def test_think_and_answer_follow_the_padding() -> None:
    env = RoutingEnv(
        with_thoughts(make_replay()), EnvSettings(max_pairs=6, randomise=False, alpha=0.0)
    )
    env.reset(seed=0, options={"queries": 3})
    for action in (6, 2):
        assert not env.step(action)[2]
    _, _, terminated, _, info = env.step(7)
    assert terminated
    assert (info["steps"], info["pair"], info["query"]) == (2, 2, 3)


def test_ended_episodes_begin_anew_at_the_next_step_as_rllib_expects() -> None:
    settings = EnvSettings(max_pairs=3, randomise=False, max_steps=1)

    def make(num_envs: int) -> VectorRoutingEnv:
        return VectorRoutingEnv(make_replay(), num_envs, settings)

    gymnasium.register("atlas-routing-test-v0", vector_entry_point=cast(Any, make))
    env: DictInfoToList = DictInfoToList(
        gymnasium.make_vec(
            "atlas-routing-test-v0", num_envs=4, vectorization_mode="vector_entry_point"
        )
    )
    assert env.metadata["autoreset_mode"] is gymnasium.vector.AutoresetMode.NEXT_STEP
    observation: Any
    observation, infos = env.reset(seed=1)
    assert env.observation_space.contains(observation)
    assert infos == [{}] * 4
    _, reward, terminated, _, infos = env.step(np.zeros(4, np.int64))
    assert terminated.all()
    assert all("score" in info for info in infos)
    observation, reward, terminated, _, infos = env.step(np.zeros(4, np.int64))
    assert not terminated.any()
    assert not reward.any()
    assert infos == [{}] * 4
    assert not observation["candidates"][:, :, -9].any()  # nothing is tried yet
    *_, infos = env.step(np.array([0, 1, 4, 2]))
    assert [info["pair"] for info in infos] == [0, 1, -1, 2]


def test_the_replay_backend_shows_what_was_recorded() -> None:
    table = make_replay()
    rows, queries, pairs = np.array([0, 1]), np.array([5, 9]), np.array([2, 0])
    batch = ReplayBackend(table).run(rows, queries, pairs, np.zeros(2, np.bool_))
    np.testing.assert_array_equal(batch.score, table.score[0, queries, pairs])
    np.testing.assert_array_equal(batch.answer_key, table.answer_key[0, queries, pairs])
    np.testing.assert_array_equal(
        batch.answer_embedding, table.answer_embeddings[table.answer_row[0, queries, pairs]]
    )
    assert not batch.seconds.any()  # unknown
