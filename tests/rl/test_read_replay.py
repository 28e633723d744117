"""From a store to a table, with the deployment's own encoder."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import numpy as np
import pytest

from rl.ppo.backend import ReplayBackend
from rl.ppo.replay import answer_encoder, read_replay
from rl.profile.run import fingerprint, thought_fingerprint
from rl.publish import fit_snapshot
from serve_app.config import AtlasConfig, RouterConfig
from serve_app.embedder import TextEncoder
from serve_app.errors import ConfigError
from serve_app.router.policy.features import NO_ANSWER, project
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.snapshots.build_rule import read_cards
from serve_app.store import (
    ProfileOutcome,
    ProfileThought,
    Store,
    add_outcomes,
    add_questions,
    add_thought,
)
from tests.profile_data import POEMS, SUMS, make_config, make_outcome, make_question
from tests.router_data import QUICK

NUM_QUESTIONS = 48


@pytest.fixture(autouse=True)
def own_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session's graph may have set another one."""
    monkeypatch.setenv("ATLAS_DATA_DIR", str(tmp_path))


@pytest.fixture
def config(tmp_path: Path) -> AtlasConfig:
    return make_config(tmp_path)


@pytest.fixture
async def store(config: AtlasConfig) -> AsyncIterator[Store]:
    """Even questions are sums, odd ones poems; each pair is right on its own."""
    opened = await Store.open(config.store_url())
    encoder = TextEncoder(config.embedder, config.data_path() / "cache")
    texts = [
        f"What is {number} + 2?" if number % 2 == 0 else f"A poem of {number} lines, please."
        for number in range(NUM_QUESTIONS)
    ]
    vectors = encoder.encode(texts)
    await add_questions(
        opened,
        [
            make_question(
                config,
                number,
                query=text,
                domain=("sums", "poems")[number % 2],
                split="train",
                embedding=vectors[number].astype("<f4").tobytes(),
            )
            for number, text in enumerate(texts)
        ],
    )
    for number in range(NUM_QUESTIONS):
        await add_outcomes(opened, outcomes_of(config, number))
    yield opened
    await opened.close()


def outcomes_of(config: AtlasConfig, number: int) -> list[ProfileOutcome]:
    found = []
    for place, pair in enumerate((SUMS, POEMS)):
        is_right = number % 2 == place
        failed = number == 4 and pair == POEMS
        found.append(
            make_outcome(
                config,
                number,
                pair,
                float(is_right),
                cost_usd=(1e-5, 1e-4)[place],
                seconds=0.5 + place,
                mean_logprob=None if failed else -0.1 - number,
                tool_errors=place,
                answer=None if failed else f"answer {number if is_right else 'unknown'}",
                error="away" if failed else None,
            )
        )
    return found


async def test_a_table_holds_what_the_store_holds(config: AtlasConfig, store: Store) -> None:
    table = await read_replay(config, store, "train", views=None)
    assert table.pairs == (SUMS, POEMS)
    assert table.domains == ("sums", "poems") * (NUM_QUESTIONS // 2)
    assert table.queries[0] == "What is 0 + 2?"
    np.testing.assert_array_equal(table.score[0, :2], [[1, 0], [0, 1]])
    np.testing.assert_allclose(table.pair_costs_usd, [1e-5, 1e-4], rtol=1e-4)
    np.testing.assert_allclose(table.pair_seconds, [0.5, 1.5])
    np.testing.assert_allclose(table.logprob[0, 3], [-3.1, -3.1])
    np.testing.assert_array_equal(table.tool_errors[0, 3], [0, 1])
    assert table.answer_key[0, 4, 1] == NO_ANSWER
    assert np.isnan(table.logprob[0, 4, 1])
    knowledge = read_cards(config)
    np.testing.assert_allclose(
        table.descriptors, project(knowledge.descriptors_of(table.pairs)), atol=1e-5
    )
    np.testing.assert_allclose(
        table.similarity[5], knowledge.cold_start.qualities(table.embeddings[5]), atol=1e-5
    )


async def test_training_and_evaluation_see_their_own_views(
    config: AtlasConfig, store: Store
) -> None:
    trained = await read_replay(config, store, "train", settings=QUICK)
    crossed, without_kind = trained.views
    right = trained.score[0].argmax(axis=1)
    assert (crossed.quality.argmax(axis=1) == right).mean() > 0.9
    assert not np.allclose(without_kind.quality, crossed.quality)
    assert trained.new_models is not None
    assert trained.new_tools is not None
    _, snapshot = await fit_snapshot(config, store, QUICK)
    evaluated = await read_replay(config, store, "train", views=snapshot)
    (view,) = evaluated.views
    beliefs = ClusterRule(snapshot, read_cards(config).prior).beliefs(evaluated.embeddings[7])
    np.testing.assert_allclose(view.quality[7], beliefs.quality, atol=1e-6)
    assert evaluated.new_models is None


def with_planner(config: AtlasConfig, planner: str | None = "poems") -> AtlasConfig:
    return config.model_copy(update={"router": RouterConfig(planner=planner)})


async def think(config: AtlasConfig, store: Store, planner: str, numbers: Iterable[int]) -> None:
    """Record a thought on some questions; after it every pair is right, and says `Aha.`."""
    for number in numbers:
        await add_thought(
            store,
            ProfileThought(
                question_key=f"q{number:03}",
                fingerprint=thought_fingerprint(config, planner),
                model_id=planner,
                thought="Mind the units.",
                prompt_tokens=10,
                completion_tokens=5,
                cost_usd=1e-4 * (1 + number),
                seconds=2.0,
                error=None,
                created_unix_s=1.0,
            ),
        )
        await add_outcomes(
            store,
            [
                make_outcome(
                    config,
                    number,
                    pair,
                    1.0,
                    fingerprint=fingerprint(config, pair, planner),
                    answer="Aha.",
                    cost_usd=2e-4,
                    created_unix_s=1e9,
                )
                for pair in (SUMS, POEMS)
            ],
        )


async def test_what_came_of_a_thought_is_beside_what_came_without(
    config: AtlasConfig, store: Store
) -> None:
    thinking = with_planner(config)
    await think(thinking, store, "poems", range(40))
    table = await read_replay(thinking, store, "train", views=None)
    before = await read_replay(config, store, "train", views=None)
    assert (len(table.score), len(before.score)) == (2, 1)
    for name in ("score", "costs_usd", "logprob", "measured", "pair_costs_usd"):
        np.testing.assert_array_equal(getattr(table, name)[:1], getattr(before, name)[:1])
    np.testing.assert_array_equal(table.score[1, :40], 1.0)
    np.testing.assert_allclose(table.costs_usd[1, :40], 2e-4)
    assert (table.answer_key[1, 7, 0], table.measured[1, 40].any()) == (
        table.answer_key[1, 7, 1],
        False,
    )
    np.testing.assert_allclose(table.think_cost_usd[:3], [1e-4, 2e-4, 3e-4], rtol=1e-5)
    np.testing.assert_allclose(table.think_cost_usd[40:], 20.5e-4, rtol=1e-5)  # the others' mean
    np.testing.assert_allclose(table.think_seconds, 2.0)
    np.testing.assert_array_equal(ReplayBackend(table).can_think, np.arange(NUM_QUESTIONS) < 40)
    assert table.without_thoughts().score.shape == before.score.shape


async def test_thoughts_of_a_planner_with_other_settings_are_not_read(
    config: AtlasConfig, store: Store
) -> None:
    thinking = with_planner(config)
    models = [model.model_copy(update={"max_completion_tokens": 99}) for model in config.models]
    await think(thinking.model_copy(update={"models": models}), store, "poems", range(40))
    assert not (await read_replay(thinking, store, "train", views=None)).has_thoughts


def test_what_a_planner_says_counts_in_the_fingerprint(config: AtlasConfig) -> None:
    models = [config.models[0].model_copy(update={"max_completion_tokens": 99}), config.models[1]]
    changed = config.model_copy(update={"models": models})
    alone, after = fingerprint(changed, POEMS), fingerprint(changed, POEMS, "sums")
    assert alone == fingerprint(config, POEMS)
    assert len({alone, after, fingerprint(changed, POEMS, "poems")}) == 3
    assert after != fingerprint(config, POEMS, "sums")


async def test_path_1_is_fitted_on_what_came_without_a_thought(
    config: AtlasConfig, store: Store
) -> None:
    _, before = await fit_snapshot(config, store, QUICK)
    thinking = with_planner(config)
    await think(thinking, store, "poems", range(NUM_QUESTIONS))
    _, after = await fit_snapshot(thinking, store, QUICK)
    np.testing.assert_array_equal(before.score_alpha, after.score_alpha)
    np.testing.assert_array_equal(before.pair_costs_usd, after.pair_costs_usd)


async def test_a_split_without_outcomes_is_refused(config: AtlasConfig, store: Store) -> None:
    with pytest.raises(ConfigError, match="held_out"):
        await read_replay(config, store, "held_out")


def test_answers_are_encoded_once_and_as_serving_encodes_them(config: AtlasConfig) -> None:
    texts = ["42", "It is a long answer of many words.", "7"]
    encode = answer_encoder(config)
    first = encode(texts)
    served = TextEncoder(config.embedder, config.data_path() / "cache").encode(texts)
    np.testing.assert_allclose(first, served, atol=1e-5)
    (kept,) = (config.data_path() / "cache").glob("answers-*.npy")
    np.save(kept, first + 1)
    np.testing.assert_array_equal(answer_encoder(config)(texts), first + 1)
    assert not np.array_equal(encode([*texts, "more"])[:3], first + 1)
