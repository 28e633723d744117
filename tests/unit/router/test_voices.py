"""How much of users' verdicts counts, owner by owner."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from serve_app.router.rules.voices import OWN_DISCOUNT, Voices
from serve_app.schemas import LOCAL_OWNER

DISCOUNT = 0.98
ONE = np.ones(1, np.float32)
MOST = 1 / (1 - OWN_DISCOUNT)
"""Verdicts that the voice of one key is worth at most."""


def heard(*said: tuple[str, float]) -> tuple[float, float]:
    """Count and sum of verdicts on one cell."""
    voices = Voices(1, DISCOUNT)
    for owner, value in said:
        voices.add(owner, ONE, value)
    counts, sums = voices.totals()
    return float(counts[0]), float(sums[0])


def cells(rng: np.random.Generator) -> NDArray[np.float32]:
    """A verdict's share in the pair in general, and in two of six clusters."""
    counts = np.zeros(7, np.float32)
    counts[0] = 1.0
    counts[1 + rng.choice(6, 2, replace=False)] = 0.5
    return counts


def test_where_no_key_is_asked_for_the_total_is_a_discounted_sum() -> None:
    values = np.random.default_rng(0).uniform(-1, 1, 300)
    count, total = heard(*((LOCAL_OWNER, value) for value in values))
    ages = DISCOUNT ** np.arange(300)[::-1]
    assert count == pytest.approx(ages.sum(), rel=1e-4)
    assert total == pytest.approx((ages * values).sum(), abs=1e-3)


@pytest.mark.parametrize("num_keys", [1, 2])
def test_one_or_two_keys_say_nothing_however_often(num_keys: int) -> None:
    rng = np.random.default_rng(num_keys)
    voices = Voices(7, DISCOUNT)
    for number in range(400):
        voices.add(f"key_{number % num_keys}", cells(rng), float(rng.choice([-1.0, 0.0, 0.7])))
        counts, sums = voices.totals()
        assert not counts.any()
        assert not sums.any()


def test_two_keys_that_say_the_same_say_nothing() -> None:
    assert heard(("a", -0.5), ("b", -0.5)) == (0.0, 0.0)


def test_of_three_keys_the_middle_one_counts() -> None:
    count, total = heard(("a", -1.0), ("b", 0.5), ("c", 0.1))
    assert count == pytest.approx(1 + DISCOUNT + DISCOUNT**2)
    assert total == pytest.approx(0.1 * count)


def test_a_key_is_worth_five_verdicts_however_many_it_gives() -> None:
    said = [("high", 1.0), ("low", -1.0), ("key", 0.1)] * 5
    before, _ = heard(*said)
    count, total = heard(*said, *[("key", 0.1)] * 1000)
    assert before < count <= 3 * MOST
    assert total == pytest.approx(0.1 * count)


def test_a_key_that_changes_its_mind_is_heard_after_a_few_verdicts() -> None:
    extremes = [("high", 2.0)] * 20 + [("low", -2.0)] * 20
    count, total = heard(*extremes, *[("key", 0.5)] * 100, *[("key", -0.5)] * 8)
    assert total / count < -0.3


def test_what_many_keys_said_is_not_drowned_by_one_that_talks() -> None:
    said = [(f"key_{number}", -0.5) for number in range(20)]
    before, _ = heard(*said)
    after, total = heard(*said, *[("talker", 1.0)] * 1000)
    assert before * DISCOUNT ** (1.1 * MOST) <= after - MOST <= before
    assert total == pytest.approx(-0.5 * after)


@pytest.mark.parametrize("seed", range(5))
def test_one_key_beside_others_moves_a_mean_within_the_range_of_theirs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    opinions = {f"key_{number}": rng.uniform(-0.4, 0.3) for number in range(6)}
    voices = Voices(1, DISCOUNT)
    for _ in range(200):
        owner = str(rng.choice(list(opinions)))
        voices.add(owner, ONE, opinions[owner])
        voices.add("attacker", ONE, float(rng.choice([-1.0, 1.0, -0.39, 0.29])))
        counts, sums = voices.totals()
        if counts[0]:
            assert min(opinions.values()) - 1e-6 <= sums[0] / counts[0]
            assert sums[0] / counts[0] <= max(opinions.values()) + 1e-6


def test_keys_are_left_out_cluster_by_cluster() -> None:
    first, second = np.array([1, 1, 0], np.float32), np.array([1, 0, 1], np.float32)
    voices = Voices(3, DISCOUNT)
    for number in range(6):
        voices.add(f"key_{number}", first, -0.5)
    for _ in range(50):
        voices.add("alone", second, -1.0)
    counts, sums = voices.totals()
    assert counts[1] > 3
    assert sums[1] < 0
    assert (counts[2], sums[2]) == (0.0, 0.0)


def test_keys_that_have_not_spoken_for_long_are_forgotten() -> None:
    rng = np.random.default_rng(0)
    voices = Voices(7, DISCOUNT)
    for number in range(2000):
        voices.add(f"key_{number}", cells(rng), 0.1)
    assert len(voices._owners) == len(voices._counts) <= 230  # 0.98^230 is 0.01
    assert voices.totals()[0][0] == pytest.approx(1 / (1 - DISCOUNT), rel=0.05)


def test_a_voice_that_hardly_spoke_is_not_taken_for_many() -> None:
    slight = np.array([1.0, 0.05], np.float32)
    voices = Voices(2, DISCOUNT)
    for _ in range(20):
        voices.add("high", np.ones(2, np.float32), 1.0)
        voices.add("low", np.ones(2, np.float32), -1.0)
    voices.add("key", slight, 0.5)
    counts, sums = voices.totals()
    assert counts[1] == pytest.approx(3 * 0.05)
    assert sums[1] == pytest.approx(0.5 * counts[1])
