"""The benchmark of path 2: its units are kept, its comparisons are fair, its changes are what they
say."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.path2.baselines import (
    KNN,
    RIDGE,
    TOP_P,
    Cascade,
    one_step_qualities,
    tuned_cascade,
)
from benchmarks.path2.data import Bench, Learnt, part_of, read_bench
from benchmarks.path2.encoders import TOKEN_MEAN, TokenMean
from benchmarks.path2.figure import draw_frontiers
from benchmarks.path2.parts import Run, ablations, changes, in_distribution, lessons, newcomers
from benchmarks.path2.summary import (
    Figure,
    Resamples,
    as_text,
    changed,
    growth_share,
    held_against,
    over_domains,
    section,
    targets,
)
from benchmarks.path2.units import (
    ALPHAS,
    BEST_SINGLE,
    GATED,
    HINDSIGHT,
    ONE_STEP,
    ORACLE,
    PATH_1,
    PATH_2,
    Unit,
    best_known,
    contend,
    load_unit,
    save_unit,
)
from rl.fit.dataset import Dataset
from rl.fit.selection import FitSettings
from rl.ppo.config import TrainConfig
from rl.ppo.replay import make_table
from rl.ppo.rollout import roll_out
from rl.ppo.verifier import with_judges
from serve_app.config import AtlasConfig
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.gate import POLICY_MAX_ALPHA
from serve_app.router.rules.policy_rule import LearnedRule
from serve_app.schemas import NO_TOOL, Pair
from serve_app.store import Store
from tests.policy_data import with_policy
from tests.rl.replay_data import encode, make_dataset
from tests.rl.test_verifier import FEW
from tests.rl.test_verifier import make_table as make_verified
from tests.router_data import PAIRS, QUICK, make_snapshot

WIDE = np.linspace(0.0, 2.0, 9, dtype=np.float32)


def bench() -> Bench:
    train, test = make_dataset(90, seed=1), make_dataset(60, seed=2)
    return Bench(
        outcomes=train.outcomes,
        train=make_table(train, encode=encode),
        test=make_table(test, encode=encode),
        prior=None,
        descriptors=None,
        likeness=None,
    )


def learnt(answer: float = -10.0, threshold: float = 2.0) -> Learnt:
    """Takes pairs from best to worst; stops after the first with an `answer` above 1."""
    snapshot = replace(make_snapshot(), distance_quantiles=WIDE)
    rule = LearnedRule(with_policy(snapshot, answer=answer, threshold=threshold))
    return Learnt(rule.snapshot, rule.net, rule.threshold)


def asked(router: Learnt) -> Unit:
    of = bench()
    return contend(router, ClusterRule(router.snapshot), of.test, best_known(of.train))


@pytest.fixture(scope="module")
def units() -> list[Unit]:
    return [asked(learnt(answer)) for answer in (-10.0, 5.0)]


def test_everyone_is_asked_the_same_and_nobody_beats_hindsight(units: list[Unit]) -> None:
    for unit in units:
        for alpha in ALPHAS:
            utility = {name: unit.utility(name, alpha) for name in unit.reached}
            for name in (PATH_1, ONE_STEP, BEST_SINGLE, HINDSIGHT):
                assert (utility[name] <= utility[ORACLE] + 1e-6).all()
            assert utility[BEST_SINGLE].mean() <= utility[HINDSIGHT].mean() + 1e-9
            kept = alpha > POLICY_MAX_ALPHA
            assert utility[GATED] == pytest.approx(utility[PATH_1 if kept else PATH_2])
    many, once = units
    assert (many.reached[PATH_2]["steps"] == 3).all()
    assert (many.reached[ONE_STEP]["steps"] == 1).all()
    assert once.utility(PATH_2, 0.0) == pytest.approx(once.utility(ONE_STEP, 0.0))


def test_a_unit_is_kept_and_not_made_again(units: list[Unit], tmp_path: Path) -> None:
    save_unit(units[0], tmp_path / "unit.npz")
    read = load_unit(tmp_path / "unit.npz")
    assert read.reached.keys() == units[0].reached.keys()
    assert read.utility(GATED, 0.3) == pytest.approx(units[0].utility(GATED, 0.3), abs=1e-6)
    run = Run(bench(), tmp_path, [0], FitSettings(), TrainConfig(), lambda _: None)
    made: list[int] = []

    def make(run: Run) -> Unit:
        made.append(1)
        return units[0]

    for _ in range(2):
        assert set(run.units({"one": make})) == {"one"}
    assert made == [1]


def test_intervals_resample_questions_and_seeds(units: list[Unit]) -> None:
    of = Resamples(units)
    constant = of.figure(np.ones((2, 60)))
    assert constant == {"value": 1.0, "low": pytest.approx(1.0), "high": pytest.approx(1.0)}
    by_seed = of.figure(np.repeat([[0.0], [1.0]], 60, axis=1))
    assert [*by_seed.values()] == pytest.approx([0.5, 0.0, 1.0])


def test_steps_are_compared_at_equal_cost(units: list[Unit]) -> None:
    """What a dearer pair alone would have reached is not a gain of the steps."""
    once = Resamples(units[1:]).equal_cost(0.0, "costs_usd")
    assert once == Figure(pytest.approx(0.0), pytest.approx(0.0), pytest.approx(0.0))  # type: ignore[arg-type]
    size = 50
    rng = np.random.default_rng(0)
    right = (rng.random((len(ALPHAS), size)) < 0.9).astype(float)
    cost = np.linspace(0.9, 0.1, len(ALPHAS))[:, None] * np.ones((1, size))

    def of(score: np.ndarray, cost: np.ndarray) -> dict[str, np.ndarray]:
        return {"score": score, "cost": cost, "costs_usd": cost, "steps": np.ones_like(cost)}

    one_step = of(0.5 * right + 0 * cost, cost)
    unit = Unit({PATH_1: one_step, ONE_STEP: one_step, PATH_2: of(right, cost)})
    gain = Resamples([unit]).equal_cost(ALPHAS[3], "cost")
    assert 0.2 < gain.low < gain.value < gain.high


def test_a_share_of_the_gain_is_of_the_gain() -> None:
    of = bench()
    known = best_known(of.train)

    def reaching(score: float) -> Unit:
        base = asked(learnt(5.0))
        fixed = {**base.reached[GATED], "score": np.full((len(ALPHAS), 60), score)}
        return Unit({**base.reached, GATED: fixed})

    assert set(known) == set(ALPHAS)
    without, added, again = ([reaching(score)] for score in (0.2, 0.5, 0.6))
    assert growth_share(without, added, again, GATED).value == pytest.approx(0.75)


def test_a_change_is_paired_with_the_whole(units: list[Unit]) -> None:
    of_path_2 = units[0].reached[PATH_2]
    worse = Unit({**units[0].reached, PATH_2: {**of_path_2, "score": of_path_2["score"] - 0.1}})
    less = changed([worse], units[:1])
    for alpha in (0.0, 0.1, 0.3):
        figures = less[PATH_2][f"alpha {alpha:g}"]
        assert list(figures["scores"].values()) == pytest.approx([-0.1] * 3)
        assert figures["utilities"]["value"] == pytest.approx(-0.1 * (1 - alpha))
        assert less[PATH_1][f"alpha {alpha:g}"]["scores"]["value"] == 0.0


def test_what_was_trained_on_one_step_is_also_seen_asked_with_one(units: list[Unit]) -> None:
    many, once = units
    held = changed([once], [many])[ONE_STEP]["alpha 0"]["scores"]["value"]
    assert held == pytest.approx((once.score(ONE_STEP, 0.0) - many.score(PATH_2, 0.0)).mean())
    assert abs(held) > 0.01


def test_a_run_goes_on_only_with_its_own_profile() -> None:
    of = bench()
    assert of.mark == bench().mark
    assert of.mark != replace(of, test=of.test.select(pairs=np.arange(2))).mark


def test_sections_and_targets_say_what_was_measured(units: list[Unit], tmp_path: Path) -> None:
    inside = section(units)
    unseen = over_domains({"a": units, "b": units})
    assert unseen[0].score(PATH_1, 0.0).size == 120
    domains = {"a": inside, "b": inside}
    result = {
        "in_distribution": inside,
        "leave_one_domain_out": {
            "all": section(unseen, ["a"] * 60 + ["b"] * 60),
            "domains": domains,
            "told_apart": inside,
        },
        "tables": {"one": {"in_distribution": inside}},
        "changes": {"a change": inside},
    }
    result["targets"] = found = targets(result)  # type: ignore[assignment]
    names = {row["name"] for row in found}
    assert "a change: gated minus best single, utility" in names
    best = inside["best_one_choice"]["name"]
    assert f"in distribution: dollars saved at the score of {best}" in names
    assert "unseen domains: gated minus path 1, score at alpha 0" in names
    assert "real tables: gated minus path 1, score at alpha 0, the worst" in names
    assert as_text(result).count("\n") == len(found)
    draw_frontiers({"all": units}, bench().test, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("low", "asked", "holds"),
    [(-0.1, "mean", True), (-0.1, "surely", False), (0.1, "surely", True)],
)
def test_a_target_holds_in_the_mean_or_surely(low: float, asked: str, holds: bool) -> None:
    target = held_against("x", Figure(0.2, low, 0.3), 0.0, asked)  # type: ignore[arg-type]
    assert target.holds is holds


def test_a_claim_is_corrected_for_the_number_of_claims(units: list[Unit]) -> None:
    inside = section(units)
    sure = {"value": 0.1, "low": 0.05, "high": 0.15}
    best = {"name": PATH_1, "difference": sure, "p": 0.03, "saving": sure}
    over = {f"{GATED} minus {PATH_1}": {"alpha 0": {"scores": sure}}}
    alone = targets({"in_distribution": inside | {"best_one_choice": best}})
    assert (alone[0]["p"], alone[0]["holds"]) == (0.03, True)
    unseen = {"all": {"differences": over, "p_over_path_1": 0.04}, "domains": {}}
    both = targets(
        {"in_distribution": inside | {"best_one_choice": best}, "leave_one_domain_out": unseen}
    )
    assert [row["p"] for row in both if row["p"] is not None] == pytest.approx([0.06, 0.06])
    assert not any(row["holds"] for row in both if row["p"] is not None)


def test_dollars_are_saved_where_the_same_score_costs_less() -> None:
    size, alphas = 40, len(ALPHAS)
    cheaper = np.linspace(0.6, 0.1, alphas)[:, None] * np.ones((1, size))

    def of(score: np.ndarray, usd: np.ndarray) -> dict[str, np.ndarray]:
        return {"score": score, "cost": usd, "costs_usd": usd, "steps": np.ones_like(usd)}

    falling = np.linspace(0.9, 0.5, alphas)[:, None] * np.ones((1, size))
    unit = Unit(
        {
            PATH_1: of(np.full((alphas, size), 0.7), np.ones((alphas, size))),
            GATED: of(falling, cheaper),
        }
    )
    saved = Resamples([unit]).saving(GATED, PATH_1)
    assert saved.value == pytest.approx(1 - 0.35)
    never = Resamples([Unit({**unit.reached, GATED: of(0 * falling, cheaper)})])
    assert never.saving(GATED, PATH_1).value == -1.0


def test_whole_domains_are_resampled(units: list[Unit]) -> None:
    """Two domains that differ make a wide interval, however many questions each has."""
    values = np.tile(np.repeat([0.0, 1.0], 30), (2, 1))
    alone = Resamples(units).figure(values)
    grouped = Resamples(units, groups=["a"] * 30 + ["b"] * 30).figure(values)
    assert grouped["value"] == alone["value"] == 0.5
    assert (grouped["low"], grouped["high"]) == pytest.approx((0.0, 1.0))
    assert alone["low"] > 0.3


def test_a_cascade_asks_the_cheapest_of_the_best_until_one_is_likely_right() -> None:
    table = with_judges(make_verified(400), FEW)
    kept = replace(table, views=table.views[:1])
    requests = roll_out(Cascade(3, 2.0), kept, 0.0, max_steps=4)
    assert (requests.steps == 3).all()
    once = roll_out(Cascade(3, 0.0), kept, 0.0, max_steps=4)
    assert (once.steps == 1).all()
    assert (once.pair == int(kept.pair_costs_usd.argmin())).all()
    some = roll_out(Cascade(3, 0.6), kept, 0.0, max_steps=4)
    assert 1 < some.steps.mean() < 3
    assert some.score.mean() > once.score.mean()


def test_a_cascade_is_tuned_on_what_was_said_before_the_outcome_was_known() -> None:
    table = with_judges(make_verified(400), FEW)
    assert table.judges is not None
    assert table.judges.alone is not None
    quality = table.views[0].quality
    steps = [
        roll_out(
            tuned_cascade(table, table.judges.alone[0], quality, alpha), table, alpha, max_steps=4
        ).steps.mean()
        for alpha in (0.0, 0.9)
    ]
    assert steps[1] < steps[0]


@pytest.mark.parametrize("name", [KNN, RIDGE, TOP_P])
def test_each_method_of_one_choice_learns_who_is_good_at_what(name: str) -> None:
    of = bench()
    quality = one_step_qualities(of.train, of.test.embeddings, 0)[name]
    rows = np.arange(of.test.num_queries)
    chosen = of.test.score[0][rows, quality.argmax(axis=1)].mean()
    assert chosen > of.test.score[0].mean(axis=0).max()


def test_newcomers_are_a_model_and_its_best_tool() -> None:
    table = bench().train
    pairs = tuple(Pair(model_id, tool_id) for model_id in "ab" for tool_id in (NO_TOOL, "t", "u"))
    score = np.zeros((1, 90, 6), np.float32)
    score[:, :, 1] = score[:, :, 5] = 1.0
    wide = replace(table, pairs=pairs, score=score)
    assert {name: new.tolist() for name, new in newcomers(wide).items()} == {
        "a+t": [0, 1, 2, 4],
        "b+u": [2, 3, 4, 5],
    }


def test_changes_shrink_reprice_and_break_the_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(bench(), tmp_path, [0], FitSettings(), TrainConfig(), lambda _: None)
    monkeypatch.setattr(Run, "learnt", lambda self, name, seed: learnt(5.0))
    found = changes(run)
    assert set(found) == {
        *(f"without {pair.model_id}" for pair in PAIRS),
        *(f"{pair.model_id} three times as dear" for pair in PAIRS),
    }  # no model has a pair with and one without a tool, so none can break
    plain = asked(learnt(5.0))
    (dear,) = found["strong three times as dear"]
    spent = [unit.reached[BEST_SINGLE]["costs_usd"][0].mean() for unit in (plain, dear)]
    assert spent[1] == pytest.approx(3 * spent[0])
    (shrunk,) = found["without strong"]
    assert shrunk.score(ORACLE, 0.0).mean() < plain.score(ORACLE, 0.0).mean()


TINY = TrainConfig.model_validate(
    {
        "iterations": 1,
        "train_batch_size_per_learner": 64,
        "minibatch_size": 64,
        "num_epochs": 1,
        "num_envs_per_env_runner": 64,
        "net": {"width": 8, "num_heads": 1},
        "env": {"max_steps": 2},
        "validation": {"share": 0.3, "alphas": [0.0], "every": 1},
    }
)


TINY_FIT = replace(QUICK, clusterings=((3, 1),), num_landmarks=16, num_folds=2, num_averaged=1)


def of_two_topics(size: int, seed: int, turn: int = 0) -> Dataset:
    """Queries of two of the topics, their vectors turned by some places."""
    made = make_dataset(size, seed=seed)
    rows = np.flatnonzero(np.array(made.domains) != "topic 2")
    outcomes = part_of(made.outcomes, rows, np.arange(len(PAIRS)))
    kept = np.isin(made.outcomes.query_index, rows)
    return replace(
        made,
        outcomes=replace(outcomes, embeddings=np.roll(outcomes.embeddings, turn, axis=1)),
        domains=tuple(made.domains[row] for row in rows),
        answers=tuple(np.array(made.answers)[kept].tolist()),
        logprob=np.array(made.logprob)[kept],
        tool_errors=np.array(made.tool_errors)[kept],
    )


def small_bench(turn: int = 0) -> Bench:
    train, test = of_two_topics(60, 1, turn), of_two_topics(30, 2, turn)
    return Bench(
        outcomes=train.outcomes,
        train=make_table(train, encode=encode),
        test=make_table(test, encode=encode),
        prior=None,
        descriptors=None,
        likeness=None,
    )


def test_a_lesson_changes_one_thing(tmp_path: Path) -> None:
    run = Run(small_bench(), tmp_path, [0], TINY_FIT, TINY, lambda _: None)
    plain = TINY.env.reward
    rewards = {
        "no R_sel": replace(plain, selection_penalty=0.0),
        "no R_fmt": replace(plain, format_penalty=0.0),
        "no cost": replace(plain, cost_weight=0.0),
    }
    assert plain not in rewards.values()
    assert lessons(run) == {
        **{name: {"train": TINY.model_copy(update={"env": replace(TINY.env, reward=reward)})}
           for name, reward in rewards.items()},
        "one step": {"train": TINY.model_copy(update={"env": replace(TINY.env, max_steps=1)})},
        "K 4": {"fit": replace(TINY_FIT, clusterings=((4, 1),))},
        "K 16": {"fit": replace(TINY_FIT, clusterings=((16, 1),))},
    }  # fmt: skip


@pytest.mark.usefixtures("cluster")
def test_an_ablation_is_learnt_and_asked_in_and_out_of_distribution(tmp_path: Path) -> None:
    learnt: list[str] = []
    run = Run(small_bench(), tmp_path, [0], TINY_FIT, TINY, learnt.append)
    taught = {"one step": lessons(run)["one step"]}
    found = ablations(run, taught, {"turned": small_bench(turn=3)})
    assert set(found) == {"one step", "encoder: turned"}
    for inside, unseen in found.values():
        assert section(inside)["num_questions"] == run.bench.test.num_queries
        assert set(unseen) == {"topic 0", "topic 1"}
        assert section(over_domains(unseen))["num_questions"] == run.bench.test.num_queries
    (once,) = found["one step"][0]
    assert (once.reached[PATH_1]["steps"] == 1).all()
    said = len(learnt)
    again = ablations(run, taught, {"turned": small_bench(turn=3)})
    assert len(learnt) == said  # all of it was kept
    assert set(again) == set(found)


@pytest.mark.usefixtures("cluster")
def test_units_made_side_by_side_are_those_made_here(tmp_path: Path) -> None:
    here = Run(small_bench(), tmp_path / "here", [0, 1], TINY_FIT, TINY, lambda _: None)
    beside = replace(here, folder=tmp_path / "beside", cpus_per_unit=0.0)
    for one, other in zip(in_distribution(here), in_distribution(beside), strict=True):
        assert one.reached.keys() == other.reached.keys()
        assert one.score(PATH_1, 0.0) == pytest.approx(other.score(PATH_1, 0.0))
    assert sorted(path.name for path in (beside.folder / "learnt").iterdir()) == [
        "base-0",
        "base-1",
    ]


async def test_a_bench_of_another_encoder_is_of_that_encoder_throughout(
    config: AtlasConfig, store: Store
) -> None:
    encoder = TokenMean(config.embedder)
    own, other = [await asyncio.to_thread(read_bench, config, one) for one in (None, encoder)]
    assert other.outcomes.encoder == other.train.encoder == other.test.encoder == TOKEN_MEAN
    np.testing.assert_array_equal(other.outcomes.embeddings, encoder(own.outcomes.queries))
    np.testing.assert_array_equal(other.train.embeddings, other.outcomes.embeddings)
    np.testing.assert_allclose(other.test.answer_embeddings[1], encoder(["x"])[0], atol=1e-6)
    assert not np.array_equal(own.test.answer_embeddings, other.test.answer_embeddings)
    assert own.prior is not None
    assert other.prior is not None
    query = encoder(["a poem"])[0]
    assert not np.allclose(own.prior.similarities(query), other.prior.similarities(query))
    for name in ("descriptors", "likeness"):
        assert not np.allclose(getattr(own, name), getattr(other, name))
    np.testing.assert_array_equal(own.train.score, other.train.score)


def test_the_mean_of_tokens_knows_words_and_not_their_order(config: AtlasConfig) -> None:
    encoder = TokenMean(config.embedder)
    vectors = encoder(["the dog bites the man", "the man bites the dog", "a sonnet on rain", " "])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)
    assert vectors[0] @ vectors[2] < 0.9
    assert vectors.shape == (4, 384)


@pytest.mark.parametrize(("low", "high", "holds"), [(-0.1, 0.02, True), (0.01, 0.1, False)])
def test_replay_has_to_lie_within_what_live_requests_show(
    low: float, high: float, holds: bool
) -> None:
    score = {"value": (low + high) / 2, "low": low, "high": high}
    result = {"live": {"num_questions": 200, "live_minus_replay": {"score": score}}}
    (target,) = targets(result)
    assert target["holds"] is holds
    assert "200 requests" in as_text({"targets": [target]})


def test_a_part_of_the_outcomes_is_renumbered() -> None:
    outcomes = make_dataset(20, seed=0).outcomes
    part = part_of(outcomes, np.array([7, 3]), np.array([2, 0]))
    assert part.pairs == (PAIRS[2], PAIRS[0])
    assert len(part.score) == 4
    of_seven = outcomes.score[(outcomes.query_index == 7) & (outcomes.pair_index == 0)]
    place = (part.query_index == 0) & (part.pair_index == 1)
    assert part.score[place].tolist() == of_seven.tolist()
    assert part.embeddings[0].tolist() == outcomes.embeddings[7].tolist()
