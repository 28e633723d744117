"""The reward: each term by itself, and what no setting of alpha may do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.ppo.reward import Float, RewardSettings, charge, end_terms

SETTINGS = RewardSettings()
RANGE = np.log(np.array([[1e-5, 1e-3]], np.float32))
NO = np.array([False])
YES = np.array([True])


def value(number: float) -> Float:
    return np.array([number], np.float32)


def charged(alpha: float, usd: float, settings: RewardSettings = SETTINGS) -> float:
    return float(charge(settings, value(alpha), value(usd), RANGE)[0])


def test_the_cost_is_traded_as_the_utility_trades_it() -> None:
    # Half of the way between the cheapest and the dearest pair, on a log scale.
    assert charged(0.2, 1e-4) == pytest.approx(0.25 * 0.5, abs=1e-6)
    assert charged(0.2, 1e-3) == pytest.approx(0.25, abs=1e-6)


def test_alpha_0_charges_nothing_and_so_does_spending_nothing() -> None:
    assert charged(0.0, 1e-3) == 0.0
    assert charged(1.0, 0.0) == 0.0


def test_the_reward_of_the_paper_has_no_cost() -> None:
    assert charged(0.9, 1.0, RewardSettings.paper()) == 0.0


@given(alpha=st.floats(0, 1), dear=st.floats(1e-5, 1e-3), cheap=st.floats(1e-5, 1e-3))
def test_one_cheap_wrong_answer_never_beats_one_dear_right_one(
    alpha: float, dear: float, cheap: float
) -> None:
    assert 1.0 - charged(alpha, dear) >= 0.0 - charged(alpha, cheap) - 1e-6


def test_several_runs_cost_what_the_utility_says_even_beyond_the_dearest_pair() -> None:
    # Ten times the dearest: one and a half of the scale, as an evaluation counts them.
    assert charged(0.2, 1e-2) == pytest.approx(0.25 * 1.5, abs=1e-6)


@given(alpha=st.floats(0, 1), less=st.floats(1e-9, 1e3), more=st.floats(1e-9, 1e3))
def test_more_dollars_never_cost_less(alpha: float, less: float, more: float) -> None:
    less, more = sorted((less, more))
    assert charged(alpha, less) <= charged(alpha, more)


def test_an_answer_of_one_of_the_best_pairs_earns_its_score() -> None:
    out, fmt, sel = end_terms(SETTINGS, value(0.7), YES, YES, value(0.7))
    assert (out[0], fmt[0], sel[0]) == (np.float32(0.7), 0.0, 0.0)


def test_an_answer_that_another_pair_beats_is_taken_off_a_little() -> None:
    _, _, sel = end_terms(SETTINGS, value(0.7), YES, YES, value(0.9))
    assert sel[0] == pytest.approx(-0.15)


def test_nothing_is_held_against_a_pair_where_nobody_knows_the_best() -> None:
    _, _, sel = end_terms(SETTINGS, value(0.0), YES, YES, value(-np.inf))
    assert sel[0] == 0.0


@pytest.mark.parametrize(("answered", "legal"), [(NO, YES), (YES, NO), (NO, NO)])
def test_an_illegal_action_and_no_answer_earn_the_penalty_alone(
    answered: np.ndarray, legal: np.ndarray
) -> None:
    out, fmt, sel = end_terms(SETTINGS, value(1.0), answered, legal, value(1.0))
    assert (out[0], fmt[0], sel[0]) == (0.0, -1.0, 0.0)


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="cost_weight is -1"):
        RewardSettings(cost_weight=-1.0)
