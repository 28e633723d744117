"""From outcomes in the store to a policy: what is fitted on, what is kept, what is published."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl import publish as publishing
from rl.comparison import evaluate_snapshot
from rl.evaluate.evaluate import CANDIDATE, PATH_1, PATH_2, VOI
from rl.fit.dataset import read_dataset
from rl.fit.look import MAX_LOSS
from rl.profile.outcomes import NotMeasured
from rl.profile.run import fingerprint
from rl.publish import (
    COLD_START,
    NEWEST,
    SERVING,
    fit_snapshot,
    keep_snapshot,
    promote,
    promote_evaluated,
    resolve,
    roll_back,
)
from serve_app.config import AtlasConfig, PriceConfig
from serve_app.errors import ConfigError, Conflict, NotFound, PromotionRefused
from serve_app.pool.desired import DesiredPool
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.serving.follower import PolicyFollower
from serve_app.router.snapshots.build_rule import read_cards
from serve_app.router.snapshots.library import SnapshotLibrary
from serve_app.router.snapshots.snapshot import DOCUMENT_FILE, LEARNED_UNTIL, LOOK
from serve_app.schemas import (
    LOCAL_OWNER,
    Action,
    Candidate,
    Circumstances,
    DecidedBy,
    Decision,
    Limits,
    Pair,
    Report,
    Step,
    Usage,
)
from serve_app.store import (
    OutcomeLog,
    Store,
    add_feedback,
    add_outcomes,
    add_questions,
    add_snapshot,
    forget_errors,
    measured,
    read_profile,
    serving_policies,
)
from tests.policy_data import make_policy
from tests.profile_data import (
    COST_USD,
    DIM,
    POEMS,
    SUMS,
    fill,
    make_config,
    make_outcome,
    make_question,
    topic_vector,
)
from tests.router_data import QUICK, decide


@pytest.fixture(autouse=True)
def own_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session's graph may have set another one."""
    monkeypatch.setenv("ATLAS_DATA_DIR", str(tmp_path))


@pytest.fixture
def config(tmp_path: Path, store_url: str) -> AtlasConfig:
    return make_config(tmp_path, store={"url": store_url})


@pytest.fixture
async def store(config: AtlasConfig) -> AsyncIterator[Store]:
    opened = await Store.open(config.store_url())
    yield opened
    await opened.close()


async def rate(
    store: Store,
    request_id: str,
    pair: Pair,
    score: float,
    owner: str = LOCAL_OWNER,
    path: DecidedBy = DecidedBy.CLUSTERS,
) -> None:
    decision = Decision((Candidate(pair, 1, 1, 0),), path, 1.0, 1.0, 1, 1)
    step = Step(pair, path, 1.0, Usage(), 0.1)
    log = OutcomeLog(store, flush_interval_s=0.001)
    log.record(Report(request_id, decision, (step,), Usage(), 0.1, "rated", topic_vector(0), owner))
    await log.close()
    await add_feedback(store, request_id, owner, score)


async def test_a_fit_on_enough_questions_has_a_first_look_and_the_evaluation_judges_it(
    config: AtlasConfig, store: Store
) -> None:
    await fill(
        config, store, 260, texts=("what is the sum of {} and 7", "a poem about the year {}")
    )
    snapshot_id, snapshot = await fit_snapshot(config, store, QUICK)
    assert snapshot.looks_first
    assert snapshot.metadata[LOOK]["loss"] <= MAX_LOSS
    report = await evaluate_snapshot(config, store, snapshot_id, None)
    assert report.look is not None
    assert 0 < report.look.share <= 1
    assert report.look.difference.mean >= -0.05
    assert report.to_json()["look"]["share"] == report.look.share


async def test_a_fit_reads_the_training_split_and_learns_who_is_right(
    config: AtlasConfig, store: Store
) -> None:
    await fill(config, store, 60)
    snapshot_id, snapshot = await fit_snapshot(config, store, QUICK)
    kept = SnapshotLibrary(config.snapshots_path()).load(snapshot_id, policy_version=9)
    assert snapshot.metadata["num_queries"] == 46
    assert snapshot.pairs == kept.pairs == (SUMS, POEMS)
    assert kept.version == 9
    assert len(kept.prior_weights) == DIM + 1


async def test_a_fit_with_enough_answers_has_a_verifier_that_the_rule_voi_can_serve(
    config: AtlasConfig, store: Store
) -> None:
    await fill(config, store, 40)
    with pytest.raises(ConfigError, match="verifier"):
        await fit_snapshot(config, store, QUICK, by_value=True)
    await fill(config, store, 150)
    snapshot_id, snapshot = await fit_snapshot(config, store, QUICK, by_value=True)
    assert snapshot.decides_by_value
    assert snapshot.verifier
    report = await evaluate_snapshot(config, store, snapshot_id, None)
    shown = report.at_default.contenders
    assert {PATH_1, VOI, "cold_start"} <= set(shown)
    assert shown[CANDIDATE] == shown[VOI]
    assert {"held_out", "new_questions"} <= set(report.verifier)
    report.to_json()


async def test_outcomes_of_other_settings_do_not_count_and_the_newest_does(
    config: AtlasConfig, store: Store
) -> None:
    await fill(config, store, 8)
    old = replace(make_outcome(config, 1, SUMS, 1.0), fingerprint="0" * 16, created_unix_s=9e9)
    again = replace(
        make_outcome(config, 1, SUMS, 0.5),
        fingerprint=fingerprint(config, SUMS) + "-again",
        created_unix_s=8e9,
    )
    await add_outcomes(store, [old, again])
    dataset = await read_dataset(config, store, "train")
    outcomes = dataset.outcomes
    assert dataset.num_outdated == 0  # there is a newer one
    row = outcomes.queries.index("query 1")
    of_sums = outcomes.score[(outcomes.query_index == row) & (outcomes.pair_index == 0)]
    assert of_sums.tolist() == [0.5]


async def test_all_samples_of_a_question_count_and_of_each_the_newest(
    config: AtlasConfig, store: Store
) -> None:
    await fill(config, store, 8)
    own = fingerprint(config, SUMS)
    runs = {"-s1": (0.25, 1.0), "-s2": (0.75, 1.0), "-again-s2": (0.5, 2.0)}
    for suffix, (score, created_unix_s) in runs.items():
        outcome = make_outcome(config, 1, SUMS, score)
        made = replace(outcome, fingerprint=own + suffix, created_unix_s=created_unix_s)
        await add_outcomes(store, [made])
    outcomes = (await read_dataset(config, store, "train")).outcomes
    row = outcomes.queries.index("query 1")
    of_sums = outcomes.score[(outcomes.query_index == row) & (outcomes.pair_index == 0)]
    assert sorted(of_sums.tolist()) == [0.0, 0.25, 0.5]


async def test_a_routable_pattern_is_fitted_and_judged_as_a_pair_is(
    tmp_path: Path, store_url: str, store: Store
) -> None:
    asked = [{"ask": {"pair": "sums@calculator", "prompt": "Answer: {{question}}"}}]
    names = {"chosen": True, "named": False}
    patterns = [{"name": name, "routable": of, "do": asked} for name, of in names.items()]
    config = make_config(tmp_path, store={"url": store_url}, patterns=patterns)
    chosen, named = map(Pair.of_pattern, names)
    scores = {SUMS: 0.0, POEMS: 0.0, chosen: 1.0, named: 1.0}
    for number in range(80):
        await add_questions(store, [make_question(config, number)])
        await add_outcomes(
            store, [make_outcome(config, number, of, score) for of, score in scores.items()]
        )
    snapshot_id, snapshot = await fit_snapshot(config, store, QUICK)
    assert snapshot.pairs == (SUMS, POEMS, chosen)
    report = await evaluate_snapshot(config, store, snapshot_id, None)
    assert report.at_default.contenders[CANDIDATE].score.mean == 1.0


async def test_how_many_outcomes_are_of_other_settings_is_told(
    config: AtlasConfig, store: Store
) -> None:
    await add_questions(store, [make_question(config, number) for number in range(3)])
    old = [make_outcome(config, n, SUMS, 1.0, fingerprint="0" * 16) for n in range(3)]
    await add_outcomes(store, old)
    with pytest.raises(ConfigError, match="3 are of other settings"):
        await read_dataset(config, store, "train")
    await add_outcomes(store, [make_outcome(config, 0, SUMS, 1.0)])
    assert (await read_dataset(config, store, "train")).num_outdated == 2


async def test_what_ended_in_an_error_can_be_taken_back(config: AtlasConfig, store: Store) -> None:
    await add_questions(store, [make_question(config, number) for number in range(3)])
    mark = fingerprint(config, SUMS)
    kept = [
        make_outcome(config, 0, SUMS, 1.0),
        make_outcome(config, 0, POEMS, 0.0, error="of another pair"),
        make_outcome(config, 2, SUMS, 0.0, error="of another question"),
    ]
    failed = [
        make_outcome(config, 1, SUMS, 0.0, error="too slow"),
        make_outcome(config, 1, SUMS, 0.0, error="too slow", fingerprint=f"{mark}-again"),
    ]
    await add_outcomes(store, kept + failed)
    await forget_errors(store, ["q000", "q001"], [mark])
    _, left = await read_profile(store, config.embedder.model)
    assert {(row.question_key, row.pair) for row in left} == {
        (row.question_key, row.pair) for row in kept
    }


async def test_rated_traffic_counts_and_is_not_learned_online_again(
    config: AtlasConfig, store: Store
) -> None:
    await fill(config, store, 60)
    await rate(store, "req_1", POEMS, 0.25)
    began = time.time()
    _, with_traffic = await fit_snapshot(config, store, QUICK)
    _, without = await fit_snapshot(config, store, QUICK, with_traffic=False)
    assert with_traffic.metadata["num_verdicts"] == 1
    assert float(with_traffic.metadata[LEARNED_UNTIL]) >= began
    assert (without.metadata["num_verdicts"], without.metadata[LEARNED_UNTIL]) == (0, 0.0)


async def test_what_users_asked_is_in_no_snapshot(config: AtlasConfig, store: Store) -> None:
    await fill(config, store, 60)
    for number in range(12):
        await rate(store, f"req_{number}", POEMS, 0.5)
    snapshot_id, snapshot = await fit_snapshot(config, store, QUICK)
    assert snapshot.metadata["num_verdicts"] == 12
    document = (config.snapshots_path().folder / snapshot_id / DOCUMENT_FILE).read_text()
    assert "query 2" in document
    assert "rated" not in document
    assert all(text.startswith("query ") for texts in snapshot.examples for text in texts)


async def test_verdicts_of_two_keys_do_not_change_what_is_fitted(
    config: AtlasConfig, store: Store
) -> None:
    await fill(config, store, 60)
    for number in range(60):
        await rate(store, f"req_{number}", POEMS, float(number % 2), f"key_{number % 2}")
    _, with_traffic = await fit_snapshot(config, store, QUICK)
    _, without = await fit_snapshot(config, store, QUICK, with_traffic=False)
    assert with_traffic.metadata["num_verdicts"] == 0
    for name in ("centroids", "landmarks", "score_alpha", "pair_beta", "head_in", "head_out"):
        np.testing.assert_array_equal(getattr(with_traffic, name), getattr(without, name))


async def test_pinned_requests_are_not_fitted(config: AtlasConfig, store: Store) -> None:
    await fill(config, store, 60)
    for number in range(10):
        await rate(store, f"req_{number}", POEMS, 1.0, path=DecidedBy.PINNED)
    _, snapshot = await fit_snapshot(config, store, QUICK)
    assert snapshot.metadata["num_verdicts"] == 0


async def test_an_outcome_is_kept_once(config: AtlasConfig, store: Store) -> None:
    await fill(config, store, 2)
    changed = replace(make_outcome(config, 0, SUMS, 0.0), answer="later")
    fresh = replace(make_outcome(config, 1, SUMS, 0.0), fingerprint="f")
    await add_outcomes(store, [changed, fresh])
    dataset = await read_dataset(config, store, "train")
    assert dataset.outcomes.score.max() == 1.0
    assert ("q001", SUMS, "f") in await measured(store, ["q000", "q001"])


async def test_without_outcomes_the_way_to_get_them_is_said(
    config: AtlasConfig, store: Store
) -> None:
    with pytest.raises(ConfigError, match="atlas profile"):
        await fit_snapshot(config, store)


async def test_a_snapshot_with_a_policy_is_evaluated_step_by_step(
    config: AtlasConfig, store: Store
) -> None:
    await fill(config, store, 120)
    first, snapshot = await fit_snapshot(config, store, QUICK)
    await promote(store, first, "a test")
    wasteful = replace(snapshot, policy=make_policy(dim=DIM))  # runs every pair, whatever it saw
    second = await keep_snapshot(config, store, wasteful)
    report = await evaluate_snapshot(config, store, second, first)
    contenders = report.at_default.contenders
    assert contenders[CANDIDATE].steps == contenders[PATH_2].steps == 2.0
    assert contenders[PATH_1].steps == 1.0
    assert contenders[CANDIDATE].cost_usd.mean == pytest.approx(2e-5)
    assert report.num_queries == 30
    back = await evaluate_snapshot(config, store, first, second)
    assert back.at_default.difference.utility.mean == pytest.approx(
        -report.at_default.difference.utility.mean
    )
    assert PATH_2 not in back.at_default.contenders  # only of the candidate


PRICED = {"usd_per_1m_prompt_tokens": 1.0, "usd_per_1m_completion_tokens": 1.0}


async def serving_rule(config: AtlasConfig, snapshot_id: str) -> ClusterRule:
    """What a router replica decides by."""
    follower = PolicyFollower(config, read_cards(config))
    await follower.refresh()
    try:
        assert follower.state().snapshot_id == snapshot_id
        assert isinstance(follower.rule, ClusterRule)
        return follower.rule
    finally:
        assert follower.store is not None
        await follower.store.close()


async def test_after_a_change_of_prices_the_gate_judges_by_the_costs_that_are_served(
    tmp_path: Path, store_url: str, store: Store
) -> None:
    before = make_config(tmp_path, store={"url": store_url}, price=PRICED)
    pool = DesiredPool(before, store)
    await pool.apply_file()
    await fill(before, store, 120, created_unix_s=time.time())
    first, _ = await fit_snapshot(before, store, QUICK)
    await promote(store, first, "a test")
    dear = PriceConfig(**{name: 100 * usd for name, usd in PRICED.items()})
    await pool.set_price(SUMS.model_id, dear)
    after = await pool.current()
    alpha = 0.6
    rule = await serving_rule(after, first)
    served = [
        decide(
            rule, np.frombuffer(topic_vector(topic), "<f4"), Limits(alpha, 60.0), (SUMS, POEMS), 1
        ).pair
        for topic in (0, 1)
    ]
    assert served == [POEMS, POEMS]  # sums are right on half of the questions, and too dear
    report = await evaluate_snapshot(after, store, first, None)
    contenders = next(at for at in report.at_alpha if at.alpha == alpha).contenders
    judged = contenders[CANDIDATE]
    assert judged.score.mean == pytest.approx(0.5)
    assert judged.cost_usd.mean == pytest.approx(COST_USD)
    assert contenders[str(SUMS)].cost_usd.mean == pytest.approx(100 * COST_USD)
    assert contenders[str(SUMS)].utility.mean == pytest.approx((1 - alpha) * 0.5 - alpha)


async def log_explored(config: AtlasConfig, store: Store, number: int = 180) -> None:
    """Rated requests of two steps at most that draw uniformly from what they may do next; a
    question is worth what the last pair that ran is worth on it."""
    log = OutcomeLog(store, flush_interval_s=0.001)
    rng = np.random.default_rng(0)
    scores = {}
    for request in range(number):
        request_id, topic = f"req_{request}", request % 2
        first = int(rng.integers(2))
        again = rng.random() < 0.5
        ran = [first, 1 - first] if again else [first]
        pairs = [(SUMS, POEMS)[place] for place in ran]
        made = [decided((SUMS, POEMS) if first == 0 else (POEMS, SUMS), 0.5)]
        made.append(decided(pairs[1:], 0.5))
        log.record(
            Report(
                request_id,
                made[0],
                tuple(
                    Step(pair, DecidedBy.POLICY, 0.5, Usage(10, 5, 1e-5), 0.1, answer=str(pair))
                    for pair in pairs
                ),
                Usage(10, 5, 1e-5),
                0.1,
                "rated",
                topic_vector(topic),
                "me",
                decisions=tuple(made),
                answer_step=len(ran) - 1,
                circumstances=Circumstances(
                    max_steps=2,
                    max_cost_usd=None,
                    seconds_left=(60.0, 59.0),
                    answer_keys=tuple(range(len(ran))),
                    answer_embeddings=(topic_vector(7), None)[: len(ran)],
                ),
            ),
            0.0,
        )
        scores[request_id] = float(ran[-1] == topic)
    await log.close()
    for request_id, score in scores.items():
        await add_feedback(store, request_id, "me", score)


def decided(pairs: Sequence[Pair], propensity: float) -> Decision:
    candidates = tuple(Candidate(pair, 1, 1, 0) for pair in pairs)
    action = Action.ROUTE if pairs else Action.ANSWER
    return Decision(candidates, DecidedBy.POLICY, 1.0, propensity, 1, 1, action=action)


async def test_logged_requests_of_several_steps_tell_what_a_policy_would_have_scored(
    config: AtlasConfig, store: Store
) -> None:
    """One takes the pair that is right and stops; one takes both, and ends with the wrong one."""
    await fill(config, store, 120)
    first, snapshot = await fit_snapshot(config, store, QUICK)
    await log_explored(config, store)
    knowing = replace(snapshot, policy=make_policy(dim=DIM, answer=0.5))
    wasteful = replace(snapshot, policy=make_policy(dim=DIM))
    names = [await keep_snapshot(config, store, made) for made in (knowing, wasteful)]
    report = await evaluate_snapshot(config, store, *names)
    found = report.off_policy_requests
    assert set(found) == {CANDIDATE, SERVING}
    assert not report.off_policy  # no decision of path 1 was rated
    for name, known in ((CANDIDATE, 1.0), (SERVING, 0.0)):
        estimate = found[name]
        assert estimate.effective_size == pytest.approx(45, rel=0.3)
        assert estimate.coverage == pytest.approx(1.0, abs=0.3)
        for figure in (estimate.score, estimate.importance, estimate.doubly_robust):
            assert figure is not None
            assert figure.mean == pytest.approx(known, abs=0.25)
        assert estimate.score is not None
        assert estimate.score.mean == pytest.approx(known)
    assert found[CANDIDATE].direct.mean > found[SERVING].direct.mean + 0.3  # type: ignore[union-attr]
    assert set(report.to_json()["off_policy_requests"]) == {CANDIDATE, SERVING}
    by_cards = await evaluate_snapshot(config, store, first, None)
    assert by_cards.off_policy_requests[CANDIDATE].score.mean == pytest.approx(1.0)  # type: ignore[union-attr]


async def test_a_policy_that_is_worse_is_refused_and_a_forced_one_is_recorded(
    config: AtlasConfig, store: Store
) -> None:
    await fill(config, store, 120)
    first, snapshot = await fit_snapshot(config, store, QUICK)
    await promote(store, first, "a test")
    silent = make_policy(dim=DIM)
    silent["candidate.weight"] *= -1  # takes the pair that is expected to be the worst
    silent["slot_logits.bias"][1] = 5.0
    second = await keep_snapshot(config, store, replace(snapshot, policy=silent))
    with pytest.raises(PromotionRefused, match="refused: utility"):
        await promote_evaluated(config, store, second)
    version, report = await promote_evaluated(config, store, second, force=True)
    assert report is not None
    assert not report.verdict.promote
    (serving, *_) = await serving_policies(store)
    assert (serving.policy_version, serving.snapshot_id) == (version, second)
    assert serving.reason.startswith("forced: ")


async def test_a_snapshot_that_cannot_be_judged_serves_only_if_forced(
    config: AtlasConfig, store: Store
) -> None:
    await fill(config, store, 60)  # of which 14 are held out
    snapshot_id, _ = await fit_snapshot(config, store, QUICK)
    with pytest.raises(NotMeasured, match="14 of 14 held-out queries"):
        await promote_evaluated(config, store, snapshot_id)
    version, report = await promote_evaluated(config, store, snapshot_id, force=True)
    assert report is None
    (serving, *_) = await serving_policies(store)
    assert (serving.policy_version, serving.snapshot_id) == (version, snapshot_id)
    assert serving.reason.startswith("forced: ")


async def test_names_stand_for_snapshots(config: AtlasConfig, store: Store) -> None:
    await fill(config, store, 60)
    first, _ = await fit_snapshot(config, store, QUICK)
    second, _ = await fit_snapshot(config, store, replace(QUICK, seed=1))
    await promote(store, first, "a test")
    assert await resolve(store, NEWEST) == second
    assert await resolve(store, SERVING) == first
    assert await resolve(store, first[:8]) == first
    assert await resolve(store, COLD_START) is None
    with pytest.raises(NotFound):
        await resolve(store, "zzz")


async def test_a_rollback_publishes_what_served_before_under_a_new_version(
    config: AtlasConfig, store: Store
) -> None:
    await fill(config, store, 60)
    first, _ = await fit_snapshot(config, store, QUICK)
    second, _ = await fit_snapshot(config, store, replace(QUICK, seed=1))
    await promote(store, first, "a test")
    await promote(store, second, "a test")
    assert await roll_back(store) == (3, first)
    assert await resolve(store, SERVING) == first


async def test_the_same_rollback_twice_goes_back_once(config: AtlasConfig, store: Store) -> None:
    """A double click, or a request that was sent again on the way."""
    for name in ("a", "b", "c"):
        await add_snapshot(store, name, {})
        await promote(store, name, "a test")
    results = await asyncio.gather(*(roll_back(store) for _ in range(5)), return_exceptions=True)
    assert [result for result in results if isinstance(result, tuple)] == [(4, "b")]
    assert all(isinstance(result, Conflict) for result in results if result != (4, "b"))
    with pytest.raises(Conflict, match="policy 3 has been rolled back already, by policy 4"):
        await roll_back(store)
    assert await resolve(store, SERVING) == "b"


async def test_a_rollback_goes_further_back_only_where_it_names_the_policy(
    config: AtlasConfig, store: Store
) -> None:
    for name in ("a", "b", "c"):
        await add_snapshot(store, name, {})
        await promote(store, name, "a test")
    with pytest.raises(Conflict, match="policy 2 is not the one to take back: policy 3 is"):
        await roll_back(store, expect_version=2)
    assert await roll_back(store, expect_version=3) == (4, "b")
    with pytest.raises(Conflict, match="policy 3 is not the one"):
        await roll_back(store, expect_version=3)
    # Never to what was rolled back itself.
    assert await roll_back(store, expect_version=4) == (5, "a")
    assert await roll_back(store, expect_version=5) == (6, None)
    # What is promoted anew counts anew.
    await promote(store, "c", "a test")
    await promote(store, "a", "a test")
    assert await roll_back(store) == (9, "c")


async def test_a_promotion_counts_only_on_top_of_the_policy_it_was_judged_against(
    config: AtlasConfig, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(config, store, 60)
    first, _ = await fit_snapshot(config, store, QUICK)
    second, _ = await fit_snapshot(config, store, replace(QUICK, seed=1))
    with pytest.raises(Conflict, match="policy 0 serves, and not 3"):
        await promote_evaluated(config, store, first, force=True, expect_version=3)
    assert (await promote_evaluated(config, store, first, force=True, expect_version=0))[0] == 1
    with pytest.raises(Conflict, match="serves already, as policy 1"):
        await promote_evaluated(config, store, first, force=True)
    judge = evaluate_snapshot

    async def judged_while_another_is_published(*args: Any) -> Any:
        await promote(store, None, "by somebody else")
        return await judge(*args)

    monkeypatch.setattr(publishing, "evaluate_snapshot", judged_while_another_is_published)
    with pytest.raises(Conflict, match="published while this one was judged"):
        await promote_evaluated(config, store, second, force=True)
    assert await resolve(store, SERVING) is None
    assert [policy.policy_version for policy in await serving_policies(store)] == [2, 1]


async def test_the_first_policy_rolls_back_to_the_cold_start_rule(
    config: AtlasConfig, store: Store
) -> None:
    with pytest.raises(ConfigError, match="nothing was ever promoted"):
        await roll_back(store)
    await fill(config, store, 60)
    first, _ = await fit_snapshot(config, store, QUICK)
    await promote(store, first, "a test")
    assert await roll_back(store) == (2, None)
