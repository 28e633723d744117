"""One tenant does not steer another: verdicts of few keys and the snapshot that is shipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from serve_app.router.rules.beliefs import Prior
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.snapshots.snapshot import RouterSnapshot, load_snapshot
from serve_app.schemas import LOCAL_OWNER, Limits, Pair
from tests.router_data import decide

ALPHAS = (0.0, 0.1, 0.3, 0.6)
NEW = Pair("nano-new", "none")


@pytest.fixture(scope="module")
def shipped() -> RouterSnapshot:
    return load_snapshot(Path("configs/nano/snapshot"))


def make_rule(snapshot: RouterSnapshot) -> ClusterRule:
    """The snapshot's rule, in a pool with one pair more."""
    pairs = (*snapshot.pairs, NEW)
    likeness = np.linspace(0.2, 0.4, len(pairs), dtype=np.float32)
    return ClusterRule(
        snapshot, Prior(pairs, np.full(len(pairs), 1e-5, np.float32), lambda _: likeness)
    )


def decisions(rule: ClusterRule, questions: NDArray[np.float32]) -> NDArray[np.intp]:
    """(num_questions, num_alphas) the choice on each question, at several alphas."""
    index = {pair: number for number, pair in enumerate(rule.pairs)}
    limits = [Limits(alpha, 60.0) for alpha in ALPHAS]
    return np.array(
        [
            [index[decide(rule, question, of, rule.pairs, 1).pair] for of in limits]
            for question in questions
        ]
    )


def attack(rule: ClusterRule, snapshot: RouterSnapshot, owners: list[str]) -> None:
    """200 verdicts against what is chosen, and for what is not, wherever a caller can get them."""
    rng = np.random.default_rng(1)
    for count in range(200):
        question = snapshot.landmarks[rng.integers(len(snapshot.landmarks))]
        chosen = decide(rule, question, Limits(0.1, 60.0), rule.pairs, 1).pair
        # A caller reaches any pair without naming one: the lists of models and tools admit it only.
        other = rule.pairs[rng.integers(len(rule.pairs))]
        pair = (chosen, other, NEW)[count % 3]
        rule.update(question, pair, float(pair != chosen), owners[count % len(owners)])


def changed(snapshot: RouterSnapshot, owners: list[str], every: int = 1) -> float:
    """Share of the profiled questions whose decision the verdicts of some owners change.

    The snapshot holds 512 of its 720 questions as landmarks.
    """
    rule, questions = make_rule(snapshot), snapshot.landmarks[::every]
    before = decisions(rule, questions)
    attack(rule, snapshot, owners)
    return float((decisions(rule, questions) != before).any(axis=1).mean())


def test_200_verdicts_of_one_key_change_no_decision_on_a_profiled_question(
    shipped: RouterSnapshot,
) -> None:
    assert changed(shipped, ["key"]) == 0


def test_nor_do_those_of_two_keys(shipped: RouterSnapshot) -> None:
    assert changed(shipped, ["key", "another"], every=4) == 0


def test_the_same_verdicts_change_decisions_where_no_key_is_asked_for(
    shipped: RouterSnapshot,
) -> None:
    assert changed(shipped, [LOCAL_OWNER], every=8) > 0.2


def test_what_one_key_says_is_not_in_any_expected_score(shipped: RouterSnapshot) -> None:
    rule, untouched = make_rule(shipped), make_rule(shipped)
    attack(rule, shipped, ["key"])
    elsewhere = np.roll(shipped.landmarks[:50], 7, axis=1)
    for question in (*shipped.landmarks[:50], *elsewhere):
        for gated in (True, False):
            np.testing.assert_array_equal(
                rule.qualities(question, gated=gated), untouched.qualities(question, gated=gated)
            )


def test_a_pair_that_five_keys_find_bad_is_left_within_50_verdicts(
    shipped: RouterSnapshot,
) -> None:
    """Questions on which one pair leads by 0.02 to 0.35 of the utility."""
    num_left = 0
    limits = Limits(0.1, 60.0)
    for question in shipped.landmarks[::8]:
        rule = ClusterRule(shipped)
        best, second = decide(rule, question, limits, rule.pairs, 1).candidates[:2]
        if not 0.02 < best.utility - second.utility < 0.35:
            continue
        for number in range(50):
            rule.update(question, best.pair, 0.0, f"key_{number % 5}")
        assert decide(rule, question, limits, rule.pairs, 1).pair != best.pair
        num_left += 1
    assert num_left >= 10
