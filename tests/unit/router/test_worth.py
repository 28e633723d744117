"""What a further run is worth, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from serve_app.router.policy.worth import expected_rises, gains, prospects, worths
from serve_app.router.rules.gate import settle, settle_rows

NAN = np.nan
OUTLOOK = np.array([[0.0, 0.2], [0.4, 0.6], [0.8, 1.0]], np.float32)
"""Of candidates believed at 0, .5 and 1: the two chances that their answers had."""
OWN = np.arange(3)


def row(*values: float) -> NDArray[np.float32]:
    return np.array([values], np.float32)


def test_the_expected_rise_is_that_of_the_record_at_the_belief() -> None:
    quality = row(0.0, 0.5, 1.0)
    none, some = row(0.0)[0], row(0.5)[0]
    assert prospects(OUTLOOK, quality, none)[0] == pytest.approx([0.1, 0.5, 0.9])
    assert prospects(OUTLOOK, quality, some)[0] == pytest.approx([0.0, 0.05, 0.4])
    between = prospects(OUTLOOK, row(0.25, 0.75, 2.0), some)[0]
    assert between == pytest.approx([0.025, 0.225, 0.4])


def test_each_request_may_have_a_record_of_its_own() -> None:
    quality = np.full((2, 3), 0.5, np.float32)
    best = np.zeros(2, np.float32)
    together = prospects(np.stack([OUTLOOK, OUTLOOK[:, :1].repeat(2, axis=1)]), quality, best)
    assert together[:, 0] == pytest.approx([0.5, 0.4])


def test_before_the_first_answer_a_run_is_worth_what_path_1_expects() -> None:
    decided = row(0.3, 0.6, 0.9)
    rises = expected_rises(decided, row(NAN, NAN, NAN), OWN, OUTLOOK)
    np.testing.assert_array_equal(rises, decided)


def test_one_voter_has_nothing_to_add() -> None:
    rises = expected_rises(row(0.3, 1.0, 1.0), row(0.5, NAN, NAN), np.array([0, 1, 0]), OUTLOOK)
    assert rises[0] == pytest.approx([0.0, 0.4, 0.0])


def test_where_nothing_judges_only_a_better_candidate_adds_anything() -> None:
    rises = expected_rises(row(0.5, 0.4, 0.8), row(0.5, NAN, NAN), OWN, None)
    assert rises[0] == pytest.approx([0.0, 0.0, 0.3])


def test_what_was_spent_makes_the_next_dollar_cheaper() -> None:
    """Cost is on a log scale: a cent on top of a dollar is little."""
    cost_range = np.log(np.array([[1e-5, 1e-3]]))
    costs_usd = row(1e-5, 1e-4, 1e-3)
    fresh = gains(row(0.5)[0], row(0, 0, 0), costs_usd, row(0.0)[0], cost_range)[0]
    assert fresh == pytest.approx([0.0, -0.25, -0.5], abs=1e-5)
    spent = gains(row(0.5)[0], row(0, 0, 0), costs_usd, row(1e-3)[0], cost_range)[0]
    assert spent == pytest.approx(-0.5 * np.log([1.01, 1.1, 2.0]) / np.log(100), abs=1e-5)


def test_the_best_run_pays_only_where_it_raises_the_best_chance_enough() -> None:
    legal = np.ones((1, 5), np.bool_)
    for rise, answers in ((0.019, True), (0.021, False)):
        gained = row(0.5, -0.1, -0.1)
        worth = worths(gained, row(rise, 0.9, 0.9), np.array([True]), legal)[0]
        assert (worth.argmax() == 4) == answers
    first = worths(row(-0.5, -0.1, -0.2), row(0.01, 0.01, 0.01), np.array([False]), legal)[0]
    assert first[:3] == pytest.approx([-0.5, -0.1, -0.2])


def test_a_thought_is_worth_less_than_the_best_run_that_is_allowed() -> None:
    legal = np.array([[False, True, True, True, True]])
    worth = worths(row(0.9, 0.3, 0.1), row(1, 1, 1), np.array([False]), legal)[0]
    assert 0.1 < worth[3] < 0.3


def test_settling_many_queries_is_settling_each() -> None:
    rng = np.random.default_rng(0)
    quality, spread, overall = (rng.random((200, 4)).astype(np.float32) for _ in range(3))
    admitted = rng.random((200, 4)) < 0.7
    found = settle_rows(quality, 0.2 * spread, overall, admitted, 1.5)
    changed = 0
    for number in range(200):
        expected = quality[number]
        if admitted[number].any():
            usual = int(np.where(admitted[number], overall[number], -1).argmax())
            best = int(np.where(admitted[number], expected, -1).argmax())
            expected = settle(expected, 0.2 * spread[number], usual, best, 1.5)
        np.testing.assert_allclose(found[number], expected, atol=1e-6)
        changed += int((found[number] != quality[number]).any())
    assert changed > 20
