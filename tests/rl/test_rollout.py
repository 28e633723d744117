"""Replayed requests of several steps: they are what serving would do, cost what they cost, and are
evaluated beside policies of one step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from rl.evaluate.evaluate import (
    CANDIDATE,
    PATH_1,
    PATH_2,
    SERVING,
    EvaluationReport,
    EvaluationSettings,
    evaluate,
)
from rl.evaluate.figures import draw_pareto
from rl.evaluate.held_out import read_held_out
from rl.evaluate.policies import reach
from rl.ppo.replay import make_table, with_rule
from rl.ppo.rollout import (
    GATE_THRESHOLDS,
    PATH_1_ALONE,
    PATH_2_ALONE,
    GatedPolicy,
    Greedy,
    choose_gate,
    gated_policy,
    path_1_choices,
    roll_out,
    run_once,
)
from rl.ppo.table import ReplayTable
from rl.ppo.torch_policy_net import TorchPolicyNet
from serve_app.errors import ConfigError
from serve_app.router.policy.features import NO_ANSWER
from serve_app.router.policy.policy_net import PolicyNet
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.policy_rule import LearnedRule
from serve_app.router.snapshots.snapshot import THINKS
from serve_app.schemas import Action, Limits, Pair, Seen
from tests.policy_data import with_policy
from tests.rl.replay_data import encode, make_dataset, make_replay, one_query, with_thoughts
from tests.router_data import COSTS_USD, PAIRS, decide, make_snapshot

WIDE = np.linspace(0.0, 2.0, 9, dtype=np.float32)
NARROW = np.linspace(0.0, 0.15, 9, dtype=np.float32)
FAST = EvaluationSettings(alphas=(0.0, 0.1, 0.5), sweep_alphas=(0.0, 0.5, 1.0), num_resamples=200)
NUM_QUERIES = 90


def best_untried(answer: float = -10.0) -> PolicyNet:
    """Takes the best pair not tried yet; with an `answer` above 1 it stops after the first."""
    return LearnedRule(with_policy(answer=answer)).net


def random_weights(seed: int) -> dict[str, NDArray[np.float32]]:
    """Of a network that does something else in every state."""
    rng = np.random.default_rng(seed)
    net = TorchPolicyNet(16, width=8, num_heads=2, num_layers=1)
    return {
        name: (0.5 * rng.standard_normal(tensor.shape)).astype(np.float32)
        if name not in ("num_heads", "worth_weight")
        else 0 * tensor
        if name == "worth_weight"
        else tensor
        for name, tensor in net.to_tensors().items()
    }


def held_out_table() -> ReplayTable:
    return make_table(make_dataset(NUM_QUERIES, seed=4), encode=encode)


def rule_of(threshold: float = 0.0, **policy: float) -> ClusterRule:
    snapshot = replace(make_snapshot(), distance_quantiles=WIDE)
    return ClusterRule(with_policy(snapshot, threshold=threshold, **policy))


def served(
    rule: LearnedRule, table: ReplayTable, query: int, alpha: float, max_steps: int
) -> tuple[list[Pair], int]:
    """The pairs that a request ran in serving, and its number of decisions."""
    limits = Limits(alpha=alpha, deadline_s=1e9, max_steps=max_steps)
    history: tuple[Seen, ...] = ()
    last_answer: NDArray[np.float32] | None = None
    ran: list[Pair] = []
    number = 0
    while True:
        decision = decide(
            rule,
            table.embeddings[query],
            limits,
            table.pairs,
            1,
            history=history,
            last_answer=last_answer,
        )
        number += 1
        if decision.action is not Action.ROUTE:
            return ran, number
        ran.append(decision.pair)
        place = (0, query, table.pairs.index(decision.pair))
        key = int(table.answer_key[place])
        history += (
            Seen(
                pair=decision.pair,
                answer_key=None if key == NO_ANSWER else str(key),
                mean_logprob=float(table.logprob[place]),
                tool_errors=int(table.tool_errors[place]),
                cost_usd=float(table.costs_usd[place]),
            ),
        )
        last_answer = table.answer_embeddings[table.answer_row[place]]


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("max_steps", [1, 3])
def test_a_replayed_request_runs_what_the_served_one_runs(alpha: float, max_steps: int) -> None:
    snapshot = with_policy(replace(make_snapshot(), distance_quantiles=WIDE), threshold=2.0)
    weights = random_weights(seed=6)  # takes one step, two or three
    tensors = weights | {"gate.threshold": np.array([2.0], np.float32)}
    rule = LearnedRule(replace(snapshot, policy=tensors))
    table = with_rule(held_out_table(), rule.clusters)
    replayed = roll_out(Greedy(PolicyNet(weights)), table, alpha, max_steps=max_steps)
    lengths = set()
    for query in range(30):
        ran, _ = served(rule, table, query, alpha, max_steps)
        lengths.add(len(ran))
        assert replayed.steps[query] == len(ran)
        spent = sum(float(table.costs_usd[0, query, PAIRS.index(pair)]) for pair in ran)
        assert replayed.costs_usd[query] == pytest.approx(spent, rel=1e-5)
        assert PAIRS[replayed.pair[query]] in ran
    assert len(lengths) > 1 or max_steps == 1


def test_the_answer_most_agree_on_is_scored_and_all_steps_are_charged() -> None:
    table = one_query([0.0, 1.0, 1.0], [0, 1, 1])
    requests = roll_out(Greedy(best_untried()), table, 0.0, max_steps=4)
    assert requests.steps.tolist() == [3.0]
    assert requests.score.tolist() == [1.0]
    assert requests.pair.tolist() == [2]
    assert requests.costs_usd[0] == pytest.approx(1.11e-3)
    assert requests.cost[0] == pytest.approx(1 + np.log(1.11) / np.log(100), rel=1e-4)
    assert requests.utility(0.5)[0] == pytest.approx(0.5 - 0.5 * requests.cost[0])


def test_a_request_without_an_answer_scores_nothing() -> None:
    requests = roll_out(
        Greedy(best_untried()), one_query([0.0, 0.0, 0.0], [NO_ANSWER] * 3), 0.0, max_steps=2
    )
    assert (requests.score[0], requests.pair[0], requests.steps[0]) == (0.0, -1, 2.0)


def test_one_step_costs_what_the_evaluation_of_one_step_says() -> None:
    dataset = make_dataset(NUM_QUERIES, seed=4)
    held_out = read_held_out(dataset.outcomes, dataset.domains)
    table = make_replay(NUM_QUERIES, seed=4)
    for pair in range(3):
        chosen = np.full(NUM_QUERIES, pair)
        alone = run_once(table, chosen, np.ones(NUM_QUERIES))
        values = held_out.values(chosen, 0.3)
        assert alone.score == pytest.approx(values[:, 0])
        assert alone.costs_usd == pytest.approx(values[:, 1])
        assert alone.utility(0.3) == pytest.approx(values[:, 2], abs=1e-6)
    first = roll_out(Greedy(best_untried()), table, 0.0, max_steps=1)
    assert first.cost == pytest.approx(held_out.cost[first.pair], abs=1e-6)


def test_an_unknown_view_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 views, none at 2"):
        roll_out(Greedy(best_untried()), make_replay(), 0.0, max_steps=1, view=2)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("quantiles", "inside"), [(WIDE, {True}), (NARROW, {True, False})])
def test_path_1_is_read_off_its_beliefs_as_it_decides(
    quantiles: NDArray[np.float32], inside: set[bool], alpha: float
) -> None:
    rule = ClusterRule(replace(make_snapshot(), distance_quantiles=quantiles))
    table = with_rule(held_out_table(), rule)
    (view,) = table.views
    assert set(view.inside.tolist()) == inside
    (chosen,) = path_1_choices(view, table, rule.snapshot.caution, [alpha])
    limits = Limits(alpha=alpha, deadline_s=60.0)
    decided = [decide(rule, query, limits, PAIRS, 1).pair for query in table.embeddings]
    assert [PAIRS[column] for column in chosen] == decided


def test_the_gate_is_open_where_path_1_does_better_and_shut_where_path_2_does() -> None:
    table = make_replay(120)
    right = table.score[0]
    knowing = replace(table.views[0], quality=right, overall=0 * right)
    confused = replace(knowing, quality=1 - right)
    once, thrice = best_untried(answer=5.0), best_untried()

    def chosen(view: object, net: PolicyNet, alphas: tuple[float, ...] = (0.0,)) -> float:
        seen = replace(table, views=(view,))  # type: ignore[arg-type]
        return choose_gate(net, seen, caution=0.0, max_steps=3, alphas=alphas)

    # Path 2 takes the same pair as path 1, so they only differ in what they spend after it.
    assert chosen(knowing, once) == PATH_2_ALONE
    assert chosen(knowing, thrice, (0.5,)) == 0.7
    assert chosen(confused, thrice) == PATH_2_ALONE


def test_the_gate_lies_between_what_path_1_knows_and_what_it_only_believes() -> None:
    table = make_replay(120)
    right = table.score[0]
    knows = np.arange(120) % 2 == 0
    view = replace(
        table.views[0],
        quality=np.where(knows[:, None], right, 1 - right),
        overall=0 * right,
        confidence=np.where(knows, 0.94, 0.82).astype(np.float32),
    )
    table = replace(table, views=(view,))
    # It runs every pair and returns what most say: right where two agree, dear everywhere.
    threshold = choose_gate(best_untried(), table, caution=0.0, max_steps=3, alphas=(0.1,))
    assert threshold in GATE_THRESHOLDS
    assert 0.82 < threshold <= 0.94


@pytest.mark.parametrize(("better", "worse", "keeps"), [(3, 2, False), (30, 2, True)])
def test_the_gate_keeps_nothing_for_path_1_that_may_be_chance(
    better: int, worse: int, keeps: bool
) -> None:
    whole = make_replay(600)
    right = whole.score[0] > 0
    once, twice = (np.flatnonzero(right.sum(axis=1) == number) for number in (1, 2))
    # Path 2 returns what two pairs say; path 1 is right where its beliefs are.
    rows = np.concatenate([once[:better], twice[: 60 + worse]])
    table = whole.select(queries=rows)
    score = table.score[0]
    is_wrong = (np.arange(len(rows)) >= better) & (np.arange(len(rows)) < better + worse)
    view = replace(
        table.views[0],
        quality=np.where(is_wrong[:, None], 1 - score, score),
        overall=0 * score,
        confidence=np.where(np.arange(len(rows)) < better + worse, 0.96, 0.3).astype(np.float32),
    )
    seen = replace(table, views=(view,))
    threshold = choose_gate(best_untried(), seen, caution=0.0, max_steps=3, alphas=(0.0,))
    assert (threshold < 0.96) is keeps


@pytest.fixture(scope="module")
def report() -> EvaluationReport:
    """Path 2 runs all pairs and returns what most say; the gate is shut."""
    dataset = make_dataset(NUM_QUERIES, seed=4)
    rule, table = rule_of(PATH_2_ALONE), held_out_table()
    candidate = gated_policy(rule, table, max_steps=3)
    return evaluate(
        dataset.outcomes,
        dataset.domains,
        candidate,
        ClusterRule(make_snapshot()),
        others={PATH_1: rule, PATH_2: candidate.alone()},
        settings=FAST,
    )


def test_a_policy_of_several_steps_is_reported_beside_its_paths(
    report: EvaluationReport, tmp_path: Path
) -> None:
    shown = report.at_default
    assert shown.contenders[CANDIDATE].steps == 3.0
    assert shown.contenders[PATH_1].steps == shown.contenders[SERVING].steps == 1.0
    assert shown.difference.steps == 2.0
    assert shown.contenders[CANDIDATE].cost_usd.mean == pytest.approx(COSTS_USD.sum())
    assert shown.contenders[PATH_2] == shown.contenders[CANDIDATE]
    for groups in (report.domains, report.distribution):
        assert {PATH_1, PATH_2} < set(next(iter(groups.values())).contenders)
    assert {PATH_1, PATH_2} < set(report.frontiers)
    assert not report.verdict.promote  # three runs where one does
    assert report.to_json()["at_alpha"][0]["contenders"][CANDIDATE]["steps"] == 3.0
    draw_pareto(report, tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").stat().st_size > 5000


def test_the_gate_alone_gives_path_1() -> None:
    """With the gate open, what path 1 knows is answered in one step, as without a policy."""
    dataset = make_dataset(NUM_QUERIES, seed=4)
    rule = rule_of(PATH_1_ALONE)
    report = evaluate(
        dataset.outcomes,
        dataset.domains,
        gated_policy(rule, held_out_table(), max_steps=3),
        rule,
        settings=FAST,
    )
    for comparison in report.at_alpha:
        assert comparison.difference.utility.mean == pytest.approx(0.0, abs=1e-7)
    assert report.at_default.contenders[CANDIDATE].steps == 1.0


def test_queries_that_path_1_is_not_sure_of_go_to_path_2() -> None:
    snapshot = replace(make_snapshot(), distance_quantiles=NARROW)
    rule = ClusterRule(with_policy(snapshot, threshold=0.5))
    policy = gated_policy(rule, held_out_table(), max_steps=3)
    (view,) = policy.table.views
    sure = view.confidence >= 0.5
    assert 0 < sure.sum() < NUM_QUERIES
    requests = policy.answer(policy.table, 0.0)
    assert (requests.by_policy == ~sure).all()
    assert (requests.steps == np.where(sure, 1, 3)).all()
    assert policy.alone().answer(policy.table, 0.0).by_policy.all()


def test_queries_without_every_pair_are_left_out_of_the_replay_too() -> None:
    dataset = make_dataset(NUM_QUERIES, seed=4)
    outcomes = dataset.outcomes
    kept = ~((outcomes.query_index < 5) & (outcomes.pair_index == 1))
    columns = ("query_index", "pair_index", "score", "tokens", "seconds", "costs_usd")
    fewer = replace(outcomes, **{name: getattr(outcomes, name)[kept] for name in columns})
    held_out = read_held_out(fewer, dataset.domains)
    policy = gated_policy(rule_of(), held_out_table(), max_steps=2)
    assert reach("candidate", policy, held_out, [0.0]).score.shape == (1, NUM_QUERIES - 5)


def test_a_replay_of_other_queries_or_pairs_is_refused() -> None:
    dataset = make_dataset(NUM_QUERIES, seed=4)
    held_out = read_held_out(dataset.outcomes, dataset.domains)
    rule = rule_of()
    others = make_table(make_dataset(NUM_QUERIES, seed=5), encode=encode)
    for table, message in (
        (others, "other queries"),
        (held_out_table().select(queries=range(50)), "other pairs"),
        (held_out_table().select(pairs=[0, 2]), "other pairs"),
    ):
        with pytest.raises(ConfigError, match=message):
            gated_policy(rule, table, max_steps=2).reach(held_out, [0.0])


def test_a_policy_thinks_in_the_evaluation_only_if_it_learned_to() -> None:
    """After a thought every pair is right; the thought costs a step, and its price."""
    table = with_thoughts(held_out_table())
    eager = with_policy(replace(make_snapshot(), distance_quantiles=WIDE), think=2.0, answer=0.0)
    policy = gated_policy(ClusterRule(eager), table, max_steps=2)
    thinking = policy.answer(policy.table, 0.0)
    assert thinking.score.tolist() == [1.0] * NUM_QUERIES
    assert thinking.steps.tolist() == [2.0] * NUM_QUERIES
    of_pair = policy.table.costs_usd[1, np.arange(NUM_QUERIES), thinking.pair]
    np.testing.assert_allclose(thinking.costs_usd, of_pair + 1e-4, rtol=1e-5)
    never = replace(eager, metadata={THINKS: 0})
    policy = gated_policy(ClusterRule(never), table, max_steps=2)
    assert not policy.table.has_thoughts
    assert policy.answer(policy.table, 0.0).score.mean() < 1.0


def test_the_policy_is_the_snapshots() -> None:
    policy = gated_policy(rule_of(threshold=0.75), held_out_table(), max_steps=2)
    assert isinstance(policy, GatedPolicy)
    assert policy.threshold == 0.75
