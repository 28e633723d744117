"""Evaluation: the better policy is let through, the worse is not, and the intervals are honest."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from rl.evaluate.evaluate import (
    BEST_SINGLE,
    CANDIDATE,
    COLD_START,
    ORACLE,
    OUTSIDE,
    RANDOM,
    SERVING,
    EvaluationReport,
    EvaluationSettings,
    evaluate,
    judge,
    show,
)
from rl.evaluate.figures import draw_pareto, draw_reliability
from rl.evaluate.importance_sampling import OffPolicyEstimate
from rl.evaluate.off_policy import LoggedDecisions, estimate
from rl.evaluate.policies import BootstrapInterval, bootstrap
from rl.fit.fit import fit
from serve_app.errors import ConfigError
from serve_app.router.rules.base import Answer, Batch
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.cold_start import ColdStartRule, PairCard
from serve_app.schemas import Pair
from tests.router_data import (
    COSTS_USD,
    DIM,
    LIMITS,
    PAIRS,
    QUICK,
    SKILL,
    decide,
    make_outcomes,
    make_queries,
    make_snapshot,
    topics,
)

FAST = EvaluationSettings(
    alphas=(0.0, 0.1, 0.5), sweep_alphas=(0.0, 0.05, 0.5, 1.0), num_resamples=400
)


def knowing_rule() -> ClusterRule:
    """Knows the skills."""
    return ClusterRule(replace(make_snapshot(), distance_quantiles=wide()))


def confused_rule() -> ClusterRule:
    """Takes each topic for the next one."""
    snapshot = make_snapshot()
    return ClusterRule(
        replace(
            snapshot,
            score_alpha=np.roll(snapshot.score_alpha, 1, axis=0),
            score_beta=np.roll(snapshot.score_beta, 1, axis=0),
            distance_quantiles=wide(),
        )
    )


def wide() -> NDArray[np.float32]:
    return np.linspace(0.0, 2.0, 9, dtype=np.float32)


def cold_start_rule() -> ColdStartRule:
    def encode(texts: Sequence[str]) -> NDArray[np.float32]:
        return topics()[[int(text) for text in texts]]

    cards = [
        PairCard(pair, (str(topic),), float(cost_usd))
        for topic, (pair, cost_usd) in enumerate(zip(PAIRS, COSTS_USD, strict=True))
    ]
    return ColdStartRule(cards, encode)


class AlwaysRule:
    """Chooses one pair, whatever is asked."""

    snapshot = None

    def __init__(self, pair: Pair) -> None:
        self._decision = decide(knowing_rule(), topics()[0], LIMITS, (pair,), 1)

    def decide(self, batch: Batch) -> list[Answer]:
        return [self._decision] * len(batch.requests)


def by_topic(topic: NDArray[np.int64]) -> tuple[str, ...]:
    return tuple(("facts", "maths", "")[number] for number in topic)


@pytest.fixture(scope="module")
def report() -> EvaluationReport:
    held_out, topic = make_outcomes(300, seed=5)
    return evaluate(
        held_out,
        by_topic(topic),
        knowing_rule(),
        confused_rule(),
        others={"cold_start": cold_start_rule()},
        settings=FAST,
    )


def test_a_better_candidate_is_promoted(report: EvaluationReport) -> None:
    assert report.verdict.promote
    difference = report.at_default.difference
    assert 0.2 < difference.utility.low < difference.utility.mean < difference.utility.high
    assert str(difference.utility) in report.verdict.reason
    assert "at alpha 0.1" in report.verdict.reason
    assert difference.steps == 0.0
    assert report.at_default.contenders[CANDIDATE].steps == 1.0


def test_a_worse_candidate_is_refused_with_the_interval_in_the_reason() -> None:
    held_out, topic = make_outcomes(300, seed=5)
    report = evaluate(held_out, by_topic(topic), confused_rule(), knowing_rule(), settings=FAST)
    assert not report.verdict.promote
    difference = report.at_default.difference.utility
    assert difference.high < 0
    assert f"utility {difference} at alpha 0.1" in report.verdict.reason
    assert f"{difference.low:+.3f}" in report.verdict.reason


def test_the_same_policy_again_is_no_gain_and_passes_only_within_a_margin() -> None:
    held_out, topic = make_outcomes(100, seed=5)
    rules = [knowing_rule(), knowing_rule()]
    for margin, promote in ((0.0, False), (0.01, True)):
        settings = replace(FAST, margin=margin)
        report = evaluate(held_out, by_topic(topic), *rules, settings=settings)
        assert report.verdict.promote is promote
        assert promote or "which does not begin above 0" in report.verdict.reason
        for comparison in report.at_alpha:
            assert comparison.difference.utility == BootstrapInterval(0.0, 0.0, 0.0)
            assert comparison.difference.cost_usd == BootstrapInterval(0.0, 0.0, 0.0)


LEVEL = BootstrapInterval(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("margin", "at_default", "at_zero", "fault"),
    [
        (0.0, BootstrapInterval(0.02, 0.001, 0.04), LEVEL, None),
        (0.0, BootstrapInterval(0.02, 0.0, 0.04), LEVEL, "at alpha 0.1, which does not"),
        (0.0, BootstrapInterval(0.02, 0.001, 0.04), BootstrapInterval(-0.01, -0.02, 0.001), None),
        (
            0.0,
            BootstrapInterval(0.02, 0.001, 0.04),
            BootstrapInterval(-0.02, -0.03, -0.001),
            "at alpha 0, which ends",
        ),
        (0.01, BootstrapInterval(-0.002, -0.005, 0.001), LEVEL, None),
        (0.01, BootstrapInterval(0.01, -0.02, 0.04), LEVEL, "at alpha 0.1, which does not"),
        (0.01, LEVEL, BootstrapInterval(-0.01, -0.02, -0.009), None),
        (0.01, LEVEL, BootstrapInterval(-0.02, -0.03, -0.011), "at alpha 0, which ends"),
    ],
)
def test_a_candidate_is_surely_better_on_the_objective_and_not_surely_worse_at_alpha_0(
    margin: float, at_default: BootstrapInterval, at_zero: BootstrapInterval, fault: str | None
) -> None:
    verdict = judge({0.0: at_zero, 0.1: at_default}, EvaluationSettings(margin=margin))
    assert verdict.promote is (fault is None)
    assert (fault or str(at_default)) in verdict.reason


def test_differences_are_paired() -> None:
    held_out, topic = make_outcomes(300, seed=5)
    fitted = [ClusterRule(fit(make_outcomes(600, seed=seed)[0], QUICK)) for seed in (0, 1)]
    report = evaluate(held_out, by_topic(topic), *fitted, settings=FAST)
    shown = report.at_default
    alone = [shown.contenders[name].utility for name in (CANDIDATE, SERVING)]
    narrow = shown.difference.utility
    assert 0 < narrow.high - narrow.low < 0.7 * min(one.high - one.low for one in alone)


def test_chance_is_below_and_hindsight_above_everyone(report: EvaluationReport) -> None:
    for comparison in report.at_alpha:
        utility = {name: of.utility.mean for name, of in comparison.contenders.items()}
        assert max(utility, key=lambda name: utility[name]) == ORACLE
        singles = [utility[str(pair)] for pair in PAIRS]
        assert utility[RANDOM] == pytest.approx(np.mean(singles))
        assert min(singles) < utility[RANDOM] < max(singles)
        assert utility[BEST_SINGLE] == utility[report.best_single]
    assert report.best_single == "strong@none"


def test_the_means_are_those_of_the_outcomes() -> None:
    held_out, topic = make_outcomes(60, seed=5)
    report = evaluate(
        held_out, by_topic(topic), AlwaysRule(PAIRS[1]), knowing_rule(), settings=FAST
    )
    score = held_out.score[held_out.pair_index == 1].mean()
    for comparison in report.at_alpha:
        figures = comparison.contenders[CANDIDATE]
        assert figures == comparison.contenders["math@calculator"]
        assert figures.score.mean == pytest.approx(score)
        assert figures.cost_usd.mean == pytest.approx(1e-4)
        alpha = comparison.alpha
        assert figures.utility.mean == pytest.approx((1 - alpha) * score - alpha * 0.5)


def test_the_deployments_alpha_and_0_are_always_reported() -> None:
    held_out, topic = make_outcomes(60, seed=5)
    settings = replace(FAST, default_alpha=0.25, alphas=(0.5,))
    report = evaluate(held_out, by_topic(topic), knowing_rule(), confused_rule(), settings=settings)
    assert [comparison.alpha for comparison in report.at_alpha] == [0.0, 0.25, 0.5]
    assert report.at_default.alpha == 0.25
    assert "alpha 0.25" in report.verdict.reason


def test_domains_and_the_distribution_split_all_queries(report: EvaluationReport) -> None:
    assert sorted(report.domains) == ["facts", "maths", "unknown"]
    for groups in (report.domains, report.distribution):
        assert sum(group.num_queries for group in groups.values()) == 300
        whole = sum(
            group.num_queries * group.contenders[CANDIDATE].score.mean for group in groups.values()
        )
        assert whole / 300 == pytest.approx(report.at_default.contenders[CANDIDATE].score.mean)
    assert set(report.domains["maths"].contenders) == {
        CANDIDATE,
        SERVING,
        COLD_START,
        BEST_SINGLE,
    }
    held_out, _ = make_outcomes(30)
    nameless = evaluate(held_out, ("",) * 30, knowing_rule(), confused_rule(), settings=FAST)
    assert nameless.domains == {}


def test_queries_unlike_the_profile_are_told_apart() -> None:
    held_out, topic = make_outcomes(60, seed=5)
    vectors = held_out.embeddings.copy()
    vectors[:15] = np.eye(DIM, dtype=np.float32)[10]
    held_out = replace(held_out, embeddings=vectors)
    rule = ClusterRule(replace(make_snapshot(), distance_quantiles=wide()[:5]))
    report = evaluate(held_out, by_topic(topic), rule, knowing_rule(), settings=FAST)
    assert report.distribution[OUTSIDE].num_queries == 15


def test_frontiers_go_from_quality_to_price(report: EvaluationReport) -> None:
    assert {CANDIDATE, SERVING, "cold_start", ORACLE, RANDOM} < set(report.frontiers)
    for name in (CANDIDATE, SERVING, "cold_start", ORACLE):
        points = report.frontiers[name]
        assert points[0].alpha == 0.0
        assert points[-1].cost_usd == pytest.approx(1e-5)  # at alpha 1 the cheapest
        assert np.diff([point.cost_usd for point in points]).max() <= 0
    assert len(report.frontiers["strong@none"]) == 1
    best, routed = report.frontiers[ORACLE][0], report.frontiers[CANDIDATE][0]
    assert best.score > routed.score
    at_zero = report.at_alpha[0].contenders[CANDIDATE]
    assert (routed.score, routed.cost_usd) == pytest.approx(
        (at_zero.score.mean, at_zero.cost_usd.mean)
    )


def test_reliability_counts_every_query_once(report: EvaluationReport) -> None:
    bins = report.reliability.bins
    assert sum(one.num_queries for one in bins) == 300
    assert 1 <= len(bins) <= 5
    assert sorted(one.confidence for one in bins) == [one.confidence for one in bins]
    error = sum(one.num_queries * abs(one.confidence - one.share) for one in bins) / 300
    assert report.reliability.error == pytest.approx(error)


def test_equal_confidences_share_a_bin_and_a_fitted_gate_is_calibrated() -> None:
    held_out, topic = make_outcomes(500, seed=5)
    snapshot = fit(make_outcomes(500)[0], QUICK)
    flat = replace(snapshot, gate_weights=np.zeros(5, np.float32))
    rules = [ClusterRule(flat), ClusterRule(snapshot)]
    settings = replace(FAST, alphas=(), sweep_alphas=(), num_resamples=10)
    of_flat, fitted = (
        evaluate(held_out, by_topic(topic), rule, rules[0], settings=settings).reliability
        for rule in rules
    )
    (only,) = of_flat.bins
    assert (only.num_queries, only.confidence) == (500, 0.5)
    assert of_flat.error == pytest.approx(abs(only.share - 0.5))
    assert len(fitted.bins) > 1
    assert fitted.error < 0.1


def test_queries_that_lack_a_pair_are_left_out_and_counted() -> None:
    held_out, topic = make_outcomes(300, seed=5, coverage=0.9)
    report = evaluate(held_out, by_topic(topic), knowing_rule(), confused_rule(), settings=FAST)
    assert report.num_queries + report.num_dropped == 300
    assert report.num_queries == pytest.approx(300 * 0.9**3, abs=25)
    assert report.coverage["cheap@none"] == pytest.approx(0.9, abs=0.05)
    assert report.verdict.promote


@pytest.mark.parametrize(("number", "coverage"), [(19, 1.0), (300, 0.1)])
def test_too_few_queries_are_refused(number: int, coverage: float) -> None:
    held_out, topic = make_outcomes(number, seed=5, coverage=coverage)
    with pytest.raises(ConfigError, match="lacks overlap"):
        evaluate(held_out, by_topic(topic), knowing_rule(), confused_rule(), settings=FAST)


def test_outcomes_of_one_run_more_than_once_are_averaged_and_prices_may_be_unknown() -> None:
    held_out, topic = make_outcomes(40, seed=5)
    costs_usd = np.tile(held_out.costs_usd, 2)
    costs_usd[np.tile(held_out.pair_index, 2) == 2] = np.nan
    costs_usd[:30] = np.nan
    doubled = replace(
        held_out,
        query_index=np.tile(held_out.query_index, 2),
        pair_index=np.tile(held_out.pair_index, 2),
        score=np.concatenate([held_out.score, np.full_like(held_out.score, 0.5)]),
        tokens=np.tile(held_out.tokens, 2),
        seconds=np.tile(held_out.seconds, 2),
        costs_usd=costs_usd,
    )
    report = evaluate(doubled, by_topic(topic), knowing_rule(), confused_rule(), settings=FAST)
    figures = report.at_default.contenders["cheap@none"]
    plain = held_out.score[held_out.pair_index == 0].mean()
    assert figures.score.mean == pytest.approx((plain + 0.5) / 2)
    assert figures.cost_usd.mean == pytest.approx(1e-5)
    middle = report.at_default.contenders["strong@none"].cost_usd.mean
    assert middle == pytest.approx(np.sqrt(1e-5 * 1e-4))


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (ClusterRule(replace(make_snapshot(), encoder="other")), "candidate.*encoder 'other'"),
        (
            ClusterRule(
                replace(make_snapshot(), pairs=tuple(Pair(f"m{i}", "none") for i in "abc"))
            ),
            "candidate policy knows none of the 3 pairs",
        ),
        (ClusterRule(make_snapshot(), epsilon=0.1), "candidate policy explores"),
    ],
    ids=["encoder", "pairs", "exploration"],
)
def test_a_candidate_that_cannot_be_held_against_the_outcomes_is_refused(
    candidate: ClusterRule, message: str
) -> None:
    held_out, topic = make_outcomes(30, seed=5)
    with pytest.raises(ConfigError, match=message):
        evaluate(held_out, by_topic(topic), candidate, knowing_rule(), settings=FAST)


def test_domains_of_other_queries_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 domains do not fit 30 queries"):
        evaluate(make_outcomes(30)[0], ("a", "b", "c"), knowing_rule(), knowing_rule())


def test_the_same_evaluation_gives_the_same_report_and_goes_through_json() -> None:
    held_out, topic = make_outcomes(60, seed=5)
    logged = logged_decisions(200, epsilon=1.0)
    reports = [
        evaluate(
            held_out,
            by_topic(topic),
            knowing_rule(),
            confused_rule(),
            logged=logged,
            settings=FAST,
        )
        for _ in range(2)
    ]
    assert reports[0] == reports[1]
    plain = reports[0].to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["verdict"]["promote"] is True
    assert plain["at_alpha"][0]["contenders"][CANDIDATE]["score"]["mean"] > 0.5
    assert set(plain["off_policy"]) == {CANDIDATE, SERVING}


def test_the_table_says_the_numbers_and_the_verdict(report: EvaluationReport) -> None:
    written = io.StringIO()
    show(report, Console(file=written, width=100))
    text = written.getvalue()
    for word in (CANDIDATE, SERVING, "cold start", RANDOM, ORACLE, "best single", "strong@none"):
        assert word in text
    figures = report.at_default.contenders[CANDIDATE].utility
    assert f"{figures.mean:.3f} [{figures.low:.3f}, {figures.high:.3f}]" in text
    assert "may serve" in text
    assert str(report.at_default.difference.utility) in " ".join(text.split())
    assert max(len(line) for line in text.splitlines()) <= 100


def test_figures_are_written(report: EvaluationReport, tmp_path: Path) -> None:
    for draw in (draw_pareto, draw_reliability):
        path = tmp_path / f"{draw.__name__}.png"
        draw(report, path)
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000


def test_free_pairs_are_drawn_too(tmp_path: Path) -> None:
    held_out, topic = make_outcomes(30, seed=5)
    free = replace(held_out, costs_usd=np.zeros_like(held_out.costs_usd))
    report = evaluate(free, by_topic(topic), knowing_rule(), confused_rule(), settings=FAST)
    draw_pareto(report, tmp_path / "free.png")
    assert (tmp_path / "free.png").stat().st_size > 5000


def test_intervals_hold_the_true_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    samples = (rng.random((200, 300)) < 0.7).astype(np.float64)
    intervals = [bootstrap(part[:, None], 300, seed=1)[0] for part in samples]
    held = np.mean([one.low <= 0.7 <= one.high for one in intervals])
    assert 0.9 <= held <= 0.99


def logged_decisions(number: int, epsilon: float, seed: int = 3) -> LoggedDecisions:
    """What the confused rule did, exploring uniformly with probability `epsilon`."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(3, size=number)
    rule = confused_rule()
    of_topic = [PAIRS.index(decide(rule, query, LIMITS, PAIRS, 1).pair) for query in topics()]
    own = np.array(of_topic)[topic]
    chosen = np.where(rng.random(number) < epsilon, rng.integers(3, size=number), own)
    return LoggedDecisions(
        encoder="test-encoder",
        embeddings=make_queries(topic, seed + 1),
        pairs=PAIRS,
        chosen=chosen,
        propensity=epsilon / 3 + (1 - epsilon) * (chosen == own),
        score=(rng.random(number) < SKILL[topic, chosen]).astype(np.float64),
    )


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
@pytest.mark.parametrize("pair", [0, 1, 2])
def test_logged_exploration_tells_the_score_of_another_policy(pair: int, epsilon: float) -> None:
    rule, known = AlwaysRule(PAIRS[pair]), (1 - epsilon) * SKILL[:, pair].mean()
    known += epsilon * SKILL.mean()
    found = []
    for seed in range(20):
        logged = logged_decisions(1000, 0.3, seed)
        one = estimate("candidate", rule, logged, 0.0, epsilon=epsilon, num_resamples=100)
        assert 30 < one.effective_size < one.num_decisions == 1000
        assert one.score is not None
        found.append(one.score)
    assert sum(one.low <= known <= one.high for one in found) >= 16  # 19 are expected
    assert np.mean([one.mean for one in found]) == pytest.approx(known, abs=0.03)


def test_a_log_without_exploration_or_with_too_little_is_refused() -> None:
    certain = estimate("candidate", knowing_rule(), logged_decisions(500, 0.0), 0.0)
    assert certain == OffPolicyEstimate(None, 0.0, 0, certain.reason)
    assert "no logged decision was explored" in str(certain.reason)
    few = estimate("candidate", knowing_rule(), logged_decisions(60, 0.3), 0.0)
    assert few.score is None
    assert few.effective_size < 30
    assert f"{few.effective_size:.1f}" in str(few.reason)


def test_decisions_made_before_exploration_was_on_do_not_bias_the_estimate() -> None:
    explored, certain = logged_decisions(500, 0.3), logged_decisions(500, 0.0, seed=8)
    both = LoggedDecisions(
        explored.encoder,
        np.concatenate([explored.embeddings, certain.embeddings]),
        PAIRS,
        *(
            np.concatenate([getattr(explored, name), getattr(certain, name)])
            for name in ("chosen", "propensity", "score")
        ),
    )
    assert estimate("candidate", knowing_rule(), both, 0.0) == estimate(
        "candidate", knowing_rule(), explored, 0.0
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("chosen", 3, "none of the 3"), ("propensity", 0.0, "propensity"), ("score", 2.0, "score")],
)
def test_a_log_that_does_not_fit_is_refused(name: str, value: float, message: str) -> None:
    logged = logged_decisions(10, 0.3)
    column = getattr(logged, name).copy()
    column[4] = value
    with pytest.raises(ConfigError, match=message):
        replace(logged, **{name: column})
