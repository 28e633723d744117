"""Training path 2 with RLlib's PPO, in small: it learns, goes on where it was cut off, and takes
only what is free."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from numpy.typing import NDArray

from rl.ppo.algorithm import env_runners_that_fit
from rl.ppo.config import TrainConfig, load_train_config, parse_train_config
from rl.ppo.loop import TrainProgress, TrainResult, train_policy, validate
from rl.ppo.rollout import Greedy
from rl.ppo.run_folder import Checkpoint, RunFolder
from rl.ppo.sampling import TERMS, Augmentation, Fragment, advantages, augmented
from rl.ppo.table import ReplayTable
from rl.training import split_table
from serve_app.config import load_config
from serve_app.errors import ConfigError, TrainingStopped
from serve_app.questions import read_questions
from serve_app.router.policy.features import DESCRIPTOR_DIM, LOG_SECONDS, NUM_FEATURES
from tests.rl.replay_data import make_replay


def known(num_queries: int, seed: int) -> ReplayTable:
    """Queries of kinds that path 1 knows; only their embeddings tell them apart."""
    table = make_replay(num_queries, seed)
    return replace(table, views=table.views[:1])


TABLE, VALIDATION = known(160, seed=1), known(60, seed=2)
SMALL: dict[str, Any] = {
    "iterations": 12,
    "train_batch_size_per_learner": 512,
    "minibatch_size": 128,
    "num_envs_per_env_runner": 64,
    "torch_threads": 1,
    "lr": 2e-3,
    "net": {"width": 16, "num_heads": 2, "num_layers": 1},
    "warm_start": {"one_step": 0},
    "env": {"max_steps": 2},
    "augmentation": {"noise": 0.1, "drop": 0.0, "scramble_known": 0.0},
    "validation": {"alphas": [0.0, 0.1], "every": 4, "patience": None},
    "checkpoint_every": 4,
}


pytestmark = pytest.mark.usefixtures("cluster")


def settings(**changes: Any) -> TrainConfig:
    return parse_train_config(SMALL | changes)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, list[TrainProgress]]:
    told: list[TrainProgress] = []
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return train_policy(TABLE, VALIDATION, settings(), folder, told.append), told


def test_it_learns_which_pair_is_good_at_what(
    learned: tuple[TrainResult, list[TrainProgress]],
) -> None:
    result, _ = learned
    utilities = validate(
        Greedy(result.net()), VALIDATION, result.settings.validation, result.settings.env.max_steps
    )
    assert np.mean(list(utilities.values())) == pytest.approx(result.best_utility, abs=1e-5)
    best_single = VALIDATION.score[0].mean(axis=0).max()
    assert utilities["0/0"] > best_single + 0.03
    first, *_, last = result.curve
    assert last["mean_return"] > first["mean_return"] + 0.05


def test_progress_tells_the_terms_of_the_reward_apart(
    learned: tuple[TrainResult, list[TrainProgress]],
) -> None:
    result, told = learned
    assert [progress.done for progress in told] == list(range(1, 13))
    for progress in told:
        assert set(progress.terms) == set(TERMS)
        assert sum(progress.terms.values()) == pytest.approx(progress.mean_return, abs=1e-5)
    assert told[2].held_out_utility is None
    assert told[-1].best_utility == result.best_utility
    assert told[-1].eta_s == 0
    assert json.loads(json.dumps(told[-1].to_json()))["phase"] == "training"


def test_a_run_leaves_its_settings_curve_events_and_figure(
    learned: tuple[TrainResult, list[TrainProgress]],
) -> None:
    result, _ = learned
    config = json.loads((result.folder / "config.json").read_text())
    assert config["settings"]["seed"] == 0
    kept = json.loads((result.folder / "result.json").read_text())
    assert (kept["best_iteration"], len(kept["curve"])) == (result.best_iteration, 12)
    assert (result.folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((result.folder / "tensorboard").glob("events.*"))
    assert len(list((result.folder / "checkpoints").iterdir())) == 2
    kinds = {p.suffix for p in (result.folder / "checkpoints").rglob("*") if p.is_file()}
    assert kinds == {".json", ".safetensors"}  # nothing that runs when it is read


class _Killed(Exception):
    pass


def test_a_run_that_was_cut_off_ends_where_it_would_have_ended(
    learned: tuple[TrainResult, list[TrainProgress]], tmp_path: Path
) -> None:
    def die(progress: TrainProgress) -> None:
        if progress.done == 6:
            raise _Killed

    folder = tmp_path / "cut"
    with pytest.raises(_Killed):
        train_policy(TABLE, VALIDATION, settings(), folder, die)
    told: list[TrainProgress] = []
    resumed = train_policy(TABLE, VALIDATION, settings(), folder, told.append)
    assert told[0].done == 5  # the checkpoint was of the fourth
    whole, _ = learned
    assert resumed.best_iteration == whole.best_iteration
    assert [row["mean_return"] for row in resumed.curve] == pytest.approx(
        [row["mean_return"] for row in whole.curve], abs=1e-5
    )
    for name, tensor in whole.tensors.items():
        np.testing.assert_allclose(resumed.tensors[name], tensor, atol=1e-5)


def test_a_run_that_is_over_is_not_run_again(
    learned: tuple[TrainResult, list[TrainProgress]],
) -> None:
    whole, _ = learned
    told: list[TrainProgress] = []
    again = train_policy(TABLE, VALIDATION, settings(), whole.folder, told.append)
    assert told == []
    assert again.best_utility == whole.best_utility


def test_told_to_stop_it_leaves_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped):
        train_policy(TABLE, VALIDATION, settings(), tmp_path / "run", should_stop=lambda: True)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["000001"]


def test_it_stops_early_where_nothing_improves(tmp_path: Path) -> None:
    validation = SMALL["validation"] | {"every": 1, "patience": 2}
    hopeless = settings(lr=1e-12, validation=validation)
    result = train_policy(TABLE, VALIDATION, hopeless, tmp_path / "run")
    assert result.iterations == 2
    assert result.best_iteration == 0
    assert result.best_utility == result.start.utility
    for name, tensor in result.start.tensors.items():
        np.testing.assert_array_equal(result.tensors[name], tensor)


def test_a_weight_on_the_distance_keeps_the_policy_where_it_started(tmp_path: Path) -> None:
    def moved(weight: float) -> float:
        few = settings(iterations=4, start_kl_coeff=weight)
        result = train_policy(TABLE, VALIDATION, few, tmp_path / f"{weight:g}")
        return float(result.curve[-1].get("start_kl", np.nan))

    assert np.isnan(moved(0.0))
    assert moved(100.0) < 0.2 * moved(0.01)


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path, {}), pytest.raises(ConfigError, match="already"):
        RunFolder(tmp_path, {}).__enter__()
    with RunFolder(tmp_path, {}):
        pass


def test_a_folder_of_other_settings_is_left_alone(tmp_path: Path) -> None:
    with RunFolder(tmp_path, {"seed": 1}):
        pass
    with pytest.raises(ConfigError, match="other settings"):
        RunFolder(tmp_path, {"seed": 2}).__enter__()


def test_a_torn_checkpoint_does_not_count(tmp_path: Path) -> None:
    def tear(folder: str) -> None:
        Path(folder).mkdir()
        raise _Killed

    with RunFolder(tmp_path, {}) as run:
        whole = Checkpoint(1, {"n": 1}, {"w": np.ones(2, np.float32)})
        run.save(whole, lambda folder: Path(folder).mkdir())
        with pytest.raises(_Killed):
            run.save(Checkpoint(2, {"n": 2}, {}), tear)
        found = run.last_checkpoint()
    assert found is not None
    assert (found[0].iteration, found[0].document) == (1, {"n": 1})
    np.testing.assert_array_equal(found[0].tensors["w"], whole.tensors["w"])


def test_sampling_stays_here_where_the_cluster_has_no_cpu_to_spare() -> None:
    assert env_runners_that_fit(settings()) == 0
    assert env_runners_that_fit(settings(num_env_runners=8, num_cpus_per_env_runner=100)) == 0


def test_env_runners_on_the_cluster_sample_and_go_with_the_training(tmp_path: Path) -> None:
    before = ray.available_resources().get("CPU", 0.0)
    if before < 1:
        pytest.skip("the session's cluster has no CPU to spare")
    during: list[float] = []
    spread = settings(num_env_runners=2, num_cpus_per_env_runner=0.5, iterations=1)
    result = train_policy(
        TABLE, VALIDATION, spread, tmp_path / "run",
        lambda _: during.append(ray.available_resources().get("CPU", 0.0)),
    )  # fmt: skip
    assert result.iterations == 1
    assert during[0] <= before - 1


def test_advantages_are_those_of_each_episode_alone() -> None:
    rng = np.random.default_rng(0)
    length, rows, gamma, lambda_ = 7, 5, 0.9, 0.8
    rewards = rng.standard_normal((length, rows)).astype(np.float32)
    values = rng.standard_normal((length + 1, rows)).astype(np.float32)
    done = rng.random((length, rows)) < 0.4

    def by_definition(step: int, row: int) -> float:
        total, weight = 0.0, 1.0
        for later in range(step, length):
            after = 0.0 if done[later, row] else values[later + 1, row]
            total += weight * (rewards[later, row] + gamma * after - values[later, row])
            if done[later, row]:
                break
            weight *= gamma * lambda_
        return float(total)

    nothing: NDArray[Any] = np.zeros(length * rows, np.float32)
    fragment = Fragment({}, nothing.astype(np.int64), nothing, nothing, rewards, values, done)
    expected = [[by_definition(step, row) for row in range(rows)] for step in range(length)]
    np.testing.assert_allclose(advantages(fragment, gamma, lambda_), expected, atol=1e-5)


def test_questions_apart_are_the_same_whatever_else_is_there() -> None:
    rest, apart = split_table(TABLE, 0.3)
    assert rest.num_queries + apart.num_queries == TABLE.num_queries
    some = TABLE.select(queries=range(0, 160, 2))
    _, apart_of_some = split_table(some, 0.3)
    wanted = {vector.tobytes() for vector in apart.embeddings}
    assert {vector.tobytes() for vector in apart_of_some.embeddings} == wanted & {
        vector.tobytes() for vector in some.embeddings
    }
    with pytest.raises(ConfigError, match="too few"):
        split_table(TABLE.select(queries=[0]), 0.3)


@pytest.mark.parametrize("path", sorted(Path("configs/rl").glob("*.yaml")), ids=str)
def test_every_shipped_training_file_loads_and_names_a_deployment(path: Path) -> None:
    read, deployment, questions = load_train_config(path)
    assert read.iterations >= 1
    assert deployment is not None
    assert load_config(deployment).all_pairs()
    assert (questions is not None) == (read.live is not None)
    assert questions is None or read_questions(questions)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"lr": 0}, "lr"),
        ({"lr": [[0, 1e-3], [0, 1e-4]]}, "lr"),
        ({"minibatch_size": 1024}, "minibatch_size"),
        ({"num_envs_per_env_runner": 100}, "num_envs_per_env_runner"),
        ({"net": {"width": 10, "num_heads": 4}}, "net"),
        ({"env": {"max_steps": 99}}, "max_steps"),
        ({"env": {"surprise": 1}}, "surprise"),
        ({"live": {"max_seconds": 60}}, "max_cost_usd"),
        ({"live": {"max_cost_usd": 0}}, "max_cost_usd"),
        ({"live": {"max_cost_usd": 1}, "num_env_runners": 1}, "live.concurrency"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        settings(**changes)


def test_a_live_run_goes_on_under_other_caps() -> None:
    live = {"max_cost_usd": 1.0}
    run = settings(live=live)
    for changed in ({"max_cost_usd": 2.0}, {"max_seconds": 9.0}, {"concurrency": 2}):
        assert settings(live=live | changed).digest() == run.digest()
    assert settings(live=live | {"deadline_s": 9.0}).digest() != run.digest()
    assert settings().digest() != run.digest()


def test_scrambled_states_keep_what_is_alike_and_lose_what_it_was() -> None:
    rng = np.random.default_rng(0)
    size, num_pairs = 6, 3
    vectors = rng.standard_normal((size, 16)).astype(np.float32)
    candidates = rng.standard_normal((size, num_pairs, NUM_FEATURES)).astype(np.float32)
    candidates[:, 2] = 0  # absent
    seen = {"query": vectors, "answer": np.zeros_like(vectors), "candidates": candidates}
    views = np.array([0, 0, 0, 1, 1, 1])
    changed = augmented(seen, views, Augmentation(scramble=1.0), rng)
    np.testing.assert_array_equal(changed["query"][:3], vectors[:3])
    np.testing.assert_array_equal(changed["candidates"][:3], candidates[:3])
    assert (np.abs(changed["query"][3:] - vectors[3:]).max(axis=1) > 0.1).all()
    assert not changed["answer"].any()
    assert not changed["candidates"][:, 2].any()
    others = np.delete(np.arange(DESCRIPTOR_DIM, NUM_FEATURES), LOG_SECONDS - DESCRIPTOR_DIM)
    np.testing.assert_array_equal(changed["candidates"][:, :, others], candidates[:, :, others])
    blurred = changed["candidates"][3:, :2, LOG_SECONDS] - candidates[3:, :2, LOG_SECONDS]
    assert (np.abs(blurred) > 0).all()
    before = candidates[:, :, :DESCRIPTOR_DIM] @ candidates[:, :, :DESCRIPTOR_DIM].swapaxes(1, 2)
    kept = changed["candidates"][:, :, :DESCRIPTOR_DIM]
    np.testing.assert_allclose(kept @ kept.swapaxes(1, 2), before, rtol=1e-4, atol=1e-4)
