"""The benchmark of the environment: what it takes is legal, and what it says are numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import numpy as np

from benchmarks.ppo import EnvFigures, legal_at_random, made_up_table, measure_env, targets

FIGURES = EnvFigures(1e3, 5e3, 6e3, 5.0, 2.0, 8, 4, 20)


def test_every_figure_of_a_short_run_is_a_number() -> None:
    figures = measure_env(made_up_table(20, 4, 8), num_envs=8, rounds=2, num_steps=4)
    assert all(math.isfinite(value) and value > 0 for value in asdict(figures).values())
    assert (figures.num_envs, figures.num_pairs, figures.num_queries) == (8, 4, 20)


def test_actions_are_drawn_from_the_legal_ones() -> None:
    mask = np.array([[0, 1, 0, 1], [0, 0, 0, 1]], np.float32)
    rng = np.random.default_rng(0)
    drawn = np.array([legal_at_random(mask, rng) for _ in range(100)])
    assert set(drawn[:, 0].tolist()) == {1, 3}
    assert set(drawn[:, 1].tolist()) == {3}


def test_five_times_as_fast_is_enough() -> None:
    assert [target.holds for target in targets(FIGURES)] == [True]
    assert [target.holds for target in targets(replace(FIGURES, speedup=4.9))] == [False]
