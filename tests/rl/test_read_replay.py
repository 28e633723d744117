"""From a store to a table, with the deployment's own encoder."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from rl.profile import fingerprint
from rl.publish import fit_snapshot, read_cards
from rl.replay import answer_encoder, read_replay
from serve_app.config import AtlasConfig
from serve_app.embedder import TextEncoder
from serve_app.errors import ConfigError
from serve_app.router.clusters import ClusterRule
from serve_app.router.features import NO_ANSWER, project
from serve_app.schemas import Pair
from serve_app.store import ProfileOutcome, ProfileQuestion, Store, add_outcomes, add_questions
from tests.router_data import QUICK

SUMS, POEMS = Pair("sums", "calculator"), Pair("poems", "none")
NUM_QUESTIONS = 48


@pytest.fixture(autouse=True)
def own_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session's graph may have set another one."""
    monkeypatch.setenv("ATLAS_DATA_DIR", str(tmp_path))


@pytest.fixture
def config(tmp_path: Path) -> AtlasConfig:
    models = [
        {"type": "remote", "model_id": pair.model_id, "base_url": "http://127.0.0.1:1/v1",
         "remote_model": "x", "tools": [pair.tool_id], "card": {"description": pair.model_id}}
        for pair in (SUMS, POEMS)
    ]  # fmt: skip
    return AtlasConfig.model_validate(
        {
            "models": models,
            "tools": [{"type": "calculator", "tool_id": "calculator"}],
            "data_dir": str(tmp_path),
        }
    )


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
            ProfileQuestion(
                question_key=f"q{number:02}",
                query=text,
                domain=("sums", "poems")[number % 2],
                split="train",
                encoder=config.embedder.model,
                embedding=vectors[number].astype("<f4").tobytes(),
            )
            for number, text in enumerate(texts)
        ],
    )
    for number in range(NUM_QUESTIONS):
        await add_outcomes(
            opened,
            [_outcome(config, number, place, pair) for place, pair in enumerate((SUMS, POEMS))],
        )
    yield opened
    await opened.close()


def _outcome(config: AtlasConfig, number: int, place: int, pair: Pair) -> ProfileOutcome:
    is_right = number % 2 == place
    failed = number == 4 and pair == POEMS
    return ProfileOutcome(
        question_key=f"q{number:02}",
        model_id=pair.model_id,
        tool_id=pair.tool_id,
        fingerprint=fingerprint(config, pair),
        score=float(is_right),
        prompt_tokens=10,
        completion_tokens=5,
        cost_usd=(1e-5, 1e-4)[place],
        seconds=0.5 + place,
        mean_logprob=None if failed else -0.1 - number,
        tool_errors=place,
        answer=None if failed else f"answer {number if is_right else 'unknown'}",
        error="away" if failed else None,
        judge_agreed=None,
        created_unix_s=float(number),
    )


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
    crossed, without_domain = trained.views
    right = trained.score[0].argmax(axis=1)
    assert (crossed.quality.argmax(axis=1) == right).mean() > 0.9
    assert (without_domain.quality.argmax(axis=1) == right).mean() < 0.1
    assert trained.new_models is not None
    assert trained.new_tools is not None
    _, snapshot = await fit_snapshot(config, store, QUICK)
    evaluated = await read_replay(config, store, "train", views=snapshot)
    (view,) = evaluated.views
    beliefs = ClusterRule(snapshot, read_cards(config).prior).beliefs(evaluated.embeddings[7])
    np.testing.assert_allclose(view.quality[7], beliefs.quality, atol=1e-6)
    assert evaluated.new_models is None


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
