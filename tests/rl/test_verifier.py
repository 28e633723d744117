"""The verifier, fitted on made-up answers whose truth is known, and as a snapshot holds it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rl.evaluate.verified import auc, figures_of
from rl.ppo.table import ReplayTable
from rl.ppo.verified import report_of, said_of, verifier_figures
from rl.ppo.verifier import Fitted, VerifierSettings, _Trees, fit_verifier
from serve_app.errors import SnapshotError
from serve_app.router.policy.verifier import AMONG, FEATURES, Verifier
from serve_app.router.policy.worth import prospects
from serve_app.router.snapshots.snapshot import VERIFIER, load_snapshot, save_snapshot
from serve_app.signals import NUMBERS
from tests.rl.replay_data import make_replay
from tests.router_data import SKILL, make_snapshot

FEW = VerifierSettings(num_trees=25, num_leaves=8, learning_rate=0.2, least_in_leaf=20)
LOGPROB, SIMILARITY = NUMBERS.index("answer_mean"), NUMBERS.index("source_similarity")


def make_table(num_queries: int = 400, seed: int = 0) -> ReplayTable:
    """Three candidates: the first is sure where it is right, the second where it is wrong, and of
    the third nothing shows."""
    table = make_replay(num_queries, seed)
    rng = np.random.default_rng(seed + 9)
    right = table.score[0] > 0.5
    signals = np.full((1, *right.shape, len(NUMBERS)), np.nan, np.float32)
    noise = 0.2 * rng.standard_normal((4, num_queries))
    signals[0, :, 0, LOGPROB] = np.where(right[:, 0], -0.2, -1.0) + noise[0]
    signals[0, :, 1, LOGPROB] = np.where(right[:, 1], -4.0, -3.2) + noise[1]
    signals[0, :, 1, SIMILARITY] = np.where(right[:, 1], 0.8, 0.4) + noise[2] / 2
    signals[0, :, 2, LOGPROB] = -0.5 + noise[3]
    topic = np.array([int(name.removeprefix("topic ")) for name in table.domains])
    believed = SKILL[topic].astype(np.float32)
    views = tuple(replace(view, quality=believed) for view in table.views)
    # The answers' texts would give the truth away.
    rows = np.zeros_like(table.answer_row)
    keys = np.arange(right.size).reshape(1, *right.shape)
    return replace(table, signals=signals, views=views, answer_row=rows, answer_key=keys)


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    made = fit_verifier(make_table(), FEW)
    assert made is not None
    return made


@pytest.fixture(scope="module")
def held_out(fitted: Fitted) -> tuple[np.ndarray, ...]:
    table = make_table(200, seed=50)
    snapshot = replace(make_snapshot(), verifier=fitted.arrays)
    said = said_of(replace(table, views=table.views[:1]), snapshot)
    return said.chance, said.score, said.query, said.pair


def test_signals_tell_right_from_wrong_within_a_candidate(
    held_out: tuple[np.ndarray, ...],
) -> None:
    chance, score, _, pair = held_out
    within = [auc(chance[pair == of], score[pair == of] > 0.5) for of in range(3)]
    assert within[0] > 0.9
    assert within[1] > 0.9  # its log-probability says the opposite


def test_a_verifier_is_calibrated_and_beats_the_rates_of_the_candidates(
    held_out: tuple[np.ndarray, ...],
) -> None:
    figures = figures_of(*held_out)
    assert figures is not None
    assert figures.calibration_error < 0.08
    assert figures.brier < 0.7 * figures.brier_of_rate
    _, score, _, pair = held_out
    best_alone = max(score[pair == of].mean() for of in range(3))
    assert figures.chosen > best_alone
    assert figures.chosen <= figures.best


def test_the_fit_says_how_good_it_is_on_questions_and_domains_that_it_did_not_see(
    fitted: Fitted,
) -> None:
    report = report_of(fitted, make_table().domains)
    assert report["new_questions"]["auc_within_candidate"] > 0.75
    assert sorted(report["left_out_domains"]) == ["topic 0", "topic 1", "topic 2"]


def test_the_arrays_say_what_the_trees_said(fitted: Fitted) -> None:
    examples = fitted.examples
    everything = np.ones(len(examples.score), np.bool_)
    trees = _Trees(examples, everything, FEW)
    said = Verifier(fitted.arrays, 3).raw(examples.features[:300])
    np.testing.assert_allclose(said, trees.raw(examples.binned[:300]), atol=1e-4)


def test_what_others_say_counts_only_beside_them(fitted: Fitted) -> None:
    alone = fitted.examples.features[fitted.examples.is_alone]
    columns = [FEATURES.index(name) for name in AMONG[1:-1]]
    assert not alone[:, columns].any()
    assert fitted.examples.features[~fitted.examples.is_alone][:, columns].any()


def test_the_rise_of_the_best_chance_is_what_the_record_promises(fitted: Fitted) -> None:
    outlook = Verifier(fitted.arrays, 3).outlook
    quality = np.tile(np.array([0.1, 0.5, 0.9], np.float32), (3, 1))
    unheld, held, sure = prospects(outlook, quality, np.array([0.0, 0.6, 1.0], np.float32))
    assert list(unheld) == sorted(unheld)
    assert unheld[2] == pytest.approx(0.9, abs=0.12)
    assert (held < unheld).all()
    assert sure.tolist() == [0.0, 0.0, 0.0]


def test_no_answer_is_judged_by_a_fit_that_saw_its_question_or_its_domain() -> None:
    table = make_table()
    domains = np.array(table.domains)
    made = fit_verifier(table, FEW)
    assert made is not None
    judges = made.judges
    assert judges.of.shape == (2, table.num_queries)
    assert len(set(judges.of[0].tolist())) == 5
    for domain in set(table.domains):
        assert len(set(judges.of[1][domains == domain].tolist())) == 1
    assert not set(judges.of[0].tolist()) & set(judges.of[1].tolist())
    # Turned around, the truth of one domain must change nothing that is said of it there.
    rows = domains == "topic 1"
    score = table.score.copy()
    score[0, rows] = 1 - score[0, rows]
    other = fit_verifier(replace(table, score=score), FEW)
    assert other is not None
    number = int(judges.of[1][rows][0])
    asked = made.examples.features[rows[made.examples.query]]
    one, another = (of.verifiers[number].raw(asked) for of in (judges, other.judges))
    np.testing.assert_array_equal(one, another)
    assert (judges.verifiers[0].raw(asked) != other.judges.verifiers[0].raw(asked)).any()


def test_too_few_answers_make_no_verifier() -> None:
    assert fit_verifier(make_table(30), FEW) is None
    table = make_table(200)
    assert fit_verifier(replace(table, score=np.ones_like(table.score)), FEW) is None


def test_a_profile_without_signals_still_fits() -> None:
    assert fit_verifier(replace(make_table(120), signals=None), FEW) is not None


def test_a_snapshot_keeps_its_verifier_and_one_without_still_loads(
    fitted: Fitted, tmp_path: Path
) -> None:
    about = {VERIFIER: report_of(fitted, make_table().domains)}
    snapshot = replace(make_snapshot(), verifier=fitted.arrays, metadata=about)
    save_snapshot(snapshot, tmp_path / "with")
    read = load_snapshot(tmp_path / "with")
    for name, array in fitted.arrays.items():
        np.testing.assert_array_equal(read.verifier[name], array)
    table = make_table(100, seed=3)
    figures = verifier_figures(replace(table, views=table.views[:1]), read)
    assert {"held_out", "new_questions", "without topic 1"} <= set(figures)
    save_snapshot(make_snapshot(), tmp_path / "without")
    assert not load_snapshot(tmp_path / "without").verifier


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("feature", len(FEATURES)),
        ("left", 0),
        ("right", 10_000),
        ("threshold", np.nan),
        ("calibration", 2.0),
        ("outlook", -0.1),
        ("width", 0.0),
    ],
)
def test_a_damaged_verifier_is_refused(fitted: Fitted, name: str, value: float) -> None:
    damaged = {key: array.copy() for key, array in fitted.arrays.items()}
    damaged[name][(0,) * damaged[name].ndim] = value
    if name == "calibration":
        damaged[name][1, -1] = value
    with pytest.raises(SnapshotError, match="verifier"):
        Verifier(damaged, 3)


def test_a_verifier_of_other_pairs_is_refused(fitted: Fitted) -> None:
    with pytest.raises(SnapshotError, match="scales"):
        Verifier(fitted.arrays, 4)
    with pytest.raises(SnapshotError, match="lacks"):
        Verifier({}, 3)
