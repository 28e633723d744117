"""Tables: what the store holds laid out, and beliefs that never come from the query itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rl.fit.dataset import Dataset
from rl.fit.voters import voters_of
from rl.ppo.replay import groups_of, make_table, make_views, newcomer_view, view_of, with_rule
from serve_app.errors import ConfigError
from serve_app.router.policy.features import NO_ANSWER
from serve_app.router.rules.clusters import ClusterRule
from serve_app.schemas import Pair
from tests.rl.replay_data import DIM, RIGHT, encode, make_dataset, make_replay
from tests.router_data import COSTS_USD, PAIRS, QUICK, make_outcomes, make_snapshot


def with_answers(dataset: Dataset, *answers: str | None) -> Dataset:
    """Other answers of the first outcomes."""
    return replace(dataset, answers=(*answers, *dataset.answers[len(answers) :]))


def test_outcomes_lie_where_their_query_and_pair_are() -> None:
    dataset = make_dataset(20)
    table = make_table(dataset, encode=encode)
    outcomes = dataset.outcomes
    place = (0, outcomes.query_index, outcomes.pair_index)
    assert table.measured.all()
    np.testing.assert_array_equal(table.score[place], outcomes.score)
    np.testing.assert_array_equal(table.costs_usd[place], outcomes.costs_usd)
    np.testing.assert_allclose(table.pair_costs_usd, COSTS_USD, rtol=1e-5)
    assert np.isnan(table.seconds).all()
    assert not table.pair_seconds.any()


def test_a_pair_without_an_outcome_is_not_measured_on_that_query() -> None:
    outcomes, _ = make_outcomes(50, coverage=0.5)
    table = make_table(Dataset(outcomes, ("",) * 50))
    known = np.zeros((50, 3), np.bool_)
    known[outcomes.query_index, outcomes.pair_index] = True
    np.testing.assert_array_equal(table.measured[0], known)
    assert (table.answer_key[0][~known] == NO_ANSWER).all()


def test_answers_that_say_the_same_share_a_key_within_a_query() -> None:
    dataset = with_answers(make_dataset(2), "The answer is 42", "42.0", "41", "42")
    keys = make_table(dataset, encode=encode).answer_key[0]
    assert keys[0, 0] == keys[0, 1] != keys[0, 2]
    assert keys[0, 0] != keys[1, 0]


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_an_answer_with_nothing_in_it_is_no_answer(answer: str | None) -> None:
    table = make_table(with_answers(make_dataset(2), answer), encode=encode)
    assert table.answer_key[0, 0, 0] == NO_ANSWER
    assert not table.answer_embeddings[table.answer_row[0, 0, 0]].any()


def test_every_answer_is_embedded_as_itself() -> None:
    dataset = make_dataset(20)
    table = make_table(dataset, encode=encode)
    outcomes = dataset.outcomes
    place = (0, outcomes.query_index, outcomes.pair_index)
    vectors = table.answer_embeddings[table.answer_row[place]]
    np.testing.assert_array_equal(vectors, encode(dataset.answers))
    assert len(table.answer_embeddings) == len(set(dataset.answers)) + 1


def test_answers_that_were_not_kept_never_agree() -> None:
    table = make_table(replace(make_dataset(5), answers=()))
    assert all(len(set(keys)) == 3 for keys in table.answer_key[0].tolist())
    assert table.answer_embeddings.shape == (1, DIM)


def test_an_unknown_cost_is_the_mean_of_its_pair() -> None:
    dataset = make_dataset(10)
    costs_usd = dataset.outcomes.costs_usd.copy()
    costs_usd[0] = np.nan
    costs_usd[dataset.outcomes.pair_index == 2] = np.nan
    table = make_table(replace(dataset, outcomes=replace(dataset.outcomes, costs_usd=costs_usd)))
    assert table.costs_usd[0, 0, 0] == pytest.approx(1e-5)
    # Nothing is known of the third pair: the geometric mean of the others.
    assert table.pair_costs_usd[2] == pytest.approx(np.sqrt(1e-5 * 1e-4), rel=1e-4)


def test_columns_of_another_length_are_refused() -> None:
    with pytest.raises(ConfigError, match="logprob"):
        make_table(replace(make_dataset(5), logprob=np.zeros(3, np.float32)))


def test_a_selection_keeps_what_belongs_together() -> None:
    table = make_replay(30)
    table = replace(table, new_models=table.views[0], new_tools=table.views[1])
    part = table.select(queries=[7, 3], pairs=[2, 0])
    assert part.pairs == (PAIRS[2], PAIRS[0])
    assert part.domains == (table.domains[7], table.domains[3])
    np.testing.assert_array_equal(part.score[0], table.score[0][[7, 3]][:, [2, 0]])
    np.testing.assert_array_equal(part.embeddings, table.embeddings[[7, 3]])
    assert part.views[1].quality.shape == (2, 2)
    for view in (part.new_models, part.new_tools):
        assert view is not None
        assert view.quality.shape == (2, 2)
    assert table.select(pairs=[1]).num_queries == 30


def test_beliefs_never_come_from_the_query_or_its_group() -> None:
    outcomes = make_dataset(120).outcomes
    group = np.arange(120) % 2
    crossed, without_group = make_views(outcomes, group, settings=QUICK)
    of_group = group[outcomes.query_index] == 0
    lied = replace(outcomes, score=np.where(of_group, 1 - outcomes.score, outcomes.score))
    lied_crossed, lied_without_group = make_views(lied, group, settings=QUICK)
    np.testing.assert_array_equal(
        without_group.quality[group == 0], lied_without_group.quality[group == 0]
    )
    assert (without_group.quality[group == 1] != lied_without_group.quality[group == 1]).any()
    # One query's own scores do not reach its beliefs either.
    own = outcomes.query_index == 5
    lied = replace(outcomes, score=np.where(own, 1 - outcomes.score, outcomes.score))
    lied_crossed, _ = make_views(lied, group, settings=QUICK)
    np.testing.assert_array_equal(crossed.quality[5], lied_crossed.quality[5])


def test_beliefs_know_the_topics_unless_the_topic_was_left_out() -> None:
    dataset = make_dataset(400)
    table = make_table(dataset)
    crossed, without_topic = make_views(dataset.outcomes, dataset.domains, settings=QUICK)
    rows = np.arange(400)

    def reached(quality: np.ndarray) -> float:
        return float(table.score[0][rows, quality.argmax(axis=1)].mean())

    assert reached(crossed.quality) > 0.85
    assert reached(without_topic.quality) < reached(crossed.quality) - 0.1
    assert crossed.inside.mean() > 0.8
    assert without_topic.inside.mean() < 0.2
    assert without_topic.distance_quantile.mean() > crossed.distance_quantile.mean() + 0.2


def test_a_newcomer_is_believed_by_its_card_alone() -> None:
    outcomes = make_dataset(200).outcomes
    descriptors = np.random.default_rng(0).random((3, 4), np.float32)
    likeness = np.random.default_rng(1).random((200, 3), np.float32)

    def believed(score: np.ndarray) -> np.ndarray:
        changed = replace(outcomes, score=score)
        view = newcomer_view(changed, "model_id", descriptors, likeness, QUICK)
        assert view is not None
        return view.quality

    before = believed(outcomes.score)
    own = outcomes.pair_index == 1
    after = believed(np.where(own, 1 - outcomes.score, outcomes.score).astype(np.float32))
    np.testing.assert_array_equal(before[:, 1], after[:, 1])
    assert (before[:, 0] != after[:, 0]).any()
    # What differs between queries is how like the card they are.
    assert np.corrcoef(before[:, 1], likeness[:, 1])[0, 1] > 0.5


def test_without_cards_or_another_member_there_are_no_newcomers() -> None:
    outcomes = make_dataset(60).outcomes
    likeness = np.ones((60, 3), np.float32)
    assert newcomer_view(outcomes, "model_id") is None
    pairs = tuple(Pair("one", pair.tool_id) for pair in PAIRS)
    assert newcomer_view(replace(outcomes, pairs=pairs), "model_id", None, likeness) is None


def test_a_view_is_what_the_rule_believes_in_the_order_of_the_pairs() -> None:
    rule = ClusterRule(make_snapshot())
    table = make_replay(10)
    order = (PAIRS[2], PAIRS[0])
    view = view_of(rule, table.embeddings, order)
    for row, embedding in enumerate(table.embeddings):
        beliefs = rule.beliefs(embedding)
        np.testing.assert_array_equal(view.quality[row], beliefs.quality[[2, 0]])
        np.testing.assert_array_equal(view.spread[row], beliefs.spread[[2, 0]])
        np.testing.assert_array_equal(view.outside[row], beliefs.outside[[2, 0]])
        assert view.confidence[row] == np.float32(beliefs.verdict.confidence)
        assert view.inside[row] == beliefs.verdict.inside


def test_a_table_seen_with_a_rule_expects_the_rules_prices() -> None:
    table = replace(make_replay(10), pair_costs_usd=np.ones(3, np.float32))
    seen = with_rule(table, ClusterRule(make_snapshot()))
    np.testing.assert_array_equal(seen.pair_costs_usd, COSTS_USD)
    assert len(seen.views) == 1


def test_a_pair_that_the_rule_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="new@none"):
        view_of(ClusterRule(make_snapshot()), encode([RIGHT]), [Pair("new", "none")])


def test_groups_are_kinds_of_question_within_the_domains() -> None:
    embeddings = make_dataset(60).outcomes.embeddings
    kinds = groups_of(["a", "b"] * 30, embeddings)
    assert len(set(kinds)) > 2
    assert all(kind.startswith(domain) for kind, domain in zip(kinds, ["a", "b"] * 30, strict=True))
    for domains in ([""] * 60, ["only"] * 60):
        assert len(set(groups_of(domains, embeddings))) > 1
    assert list(groups_of(["a", "b", "a", "b"], embeddings[:4])) == ["a", "b", "a", "b"]
    many = [str(number % 8) for number in range(60)]
    assert list(groups_of(many, embeddings)) == many


def test_candidates_that_never_differed_are_one_voter() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 4, (40, 4))
    keys[:, 2] = keys[:, 0]
    assert voters_of(keys).tolist() == [0, 1, 0, 3]
    assert voters_of(keys[:10]).tolist() == [0, 1, 2, 3]  # too few to say so
    keys[5, 2] = NO_ANSWER  # what gave no answer says nothing
    assert voters_of(keys).tolist() == [0, 1, 0, 3]
    keys[6, 2] = 7
    assert voters_of(keys).tolist() == [0, 1, 2, 3]


def test_leaving_a_group_out_takes_two() -> None:
    with pytest.raises(ConfigError, match="two"):
        make_views(make_dataset(30).outcomes, ["same"] * 30)
