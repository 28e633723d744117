"""The first look: decisions without the encoder's network, on the encoder's real token vectors."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rl.fit.look import fit_look
from serve_app.config import EmbedderConfig
from serve_app.embedder import TokenTable
from serve_app.errors import ConfigError, InvalidRequest, SnapshotError
from serve_app.gateway.chat.extension import decision_object
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.first_look import NUM_POOLS, FirstLook
from serve_app.router.snapshots.snapshot import (
    RULE,
    VOI_RULE,
    RouterSnapshot,
    load_snapshot,
    save_snapshot,
)
from serve_app.schemas import Fixed, Look
from serve_app.store import Mode
from tests.path2_fakes import Path2, WordEmbedder, path2, plain_snapshot
from tests.router_data import DIM

NOUNS = ("apple", "river", "engine", "violin", "castle", "doctor", "winter", "copper")
KINDS = (
    "topic 0: how many {}s are {} and {}",
    "topic 1: please translate the word {} into French number {} {}",
    "topic 2: which {} was built in the year {}{}",
    "what is like topic 0, {}, or {} times {}?",
)
UNLIKE = (
    "SELECT name FROM users WHERE id = 3;",
    "Ärger im Büro: was nun?",
    "¿Dónde está el tren?",
)


def questions(start: int, number: int) -> list[str]:
    return [
        KINDS[i % len(KINDS)].format(NOUNS[i % len(NOUNS)], i, 7 * i % 100)
        for i in range(start, start + number)
    ]


def vectors(texts: list[str]) -> NDArray[np.float32]:
    return np.stack([WordEmbedder.one(text) for text in texts])


@pytest.fixture(scope="module")
def table() -> TokenTable:
    return TokenTable(EmbedderConfig())


@pytest.fixture(scope="module")
def snapshot(table: TokenTable) -> RouterSnapshot:
    """A snapshot with a first look that was fitted on 200 questions."""
    plain, texts = plain_snapshot(), questions(0, 200)
    fitted = fit_look(ClusterRule(plain), texts, vectors(texts), table)
    assert fitted is not None
    return replace(plain, look=fitted[0])


def look_of(snapshot: RouterSnapshot, table: TokenTable, **changes: Any) -> FirstLook:
    return FirstLook({**snapshot.look, **changes}, ClusterRule(snapshot), table)


def decided_at_once(snapshot: RouterSnapshot, table: TokenTable) -> list[str]:
    """New questions that need no encoder."""
    look = look_of(snapshot, table)
    return [text for text in questions(400, 80) if look.look(text) is not None]


async def promote(deployment: Path2, snapshot: RouterSnapshot, table: TokenTable) -> None:
    """As a replica whose encoder is the real one."""
    deployment.replica._follower._table = table
    await deployment.promote(snapshot)


def test_questions_like_the_profiled_ones_are_decided_and_seen_where_the_encoder_sees_them(
    snapshot: RouterSnapshot, table: TokenTable
) -> None:
    look, texts = look_of(snapshot, table), questions(200, 80)
    seen = {text: vector for text in texts if (vector := look.look(text)) is not None}
    assert len(seen) >= 20
    likeness = [float(vector @ vectors([text])[0]) for text, vector in seen.items()]
    assert np.mean(likeness) > 0.8
    assert all(abs(float(np.linalg.norm(vector)) - 1) < 1e-5 for vector in seen.values())


@pytest.mark.parametrize("text", UNLIKE)
def test_a_question_unlike_the_profiled_ones_is_left_to_the_encoder(
    text: str, snapshot: RouterSnapshot, table: TokenTable
) -> None:
    assert look_of(snapshot, table).look(text) is None


def test_an_empty_text_is_left_to_the_encoder(snapshot: RouterSnapshot, table: TokenTable) -> None:
    assert look_of(snapshot, table).look("") is None


def test_a_text_that_is_none_is_refused(snapshot: RouterSnapshot, table: TokenTable) -> None:
    with pytest.raises(InvalidRequest):
        look_of(snapshot, table).look("\ud800")


def test_a_snapshot_keeps_its_first_look(
    snapshot: RouterSnapshot, table: TokenTable, tmp_path: Path
) -> None:
    save_snapshot(snapshot, tmp_path / "s")
    loaded = load_snapshot(tmp_path / "s")
    assert loaded.looks_first
    for text in (*questions(300, 8), *UNLIKE):
        before, after = (look_of(of, table).vector_and_trust(text) for of in (snapshot, loaded))
        assert before[1] == after[1]
        assert (before[0] == after[0]).all()


def test_a_rule_of_several_steps_has_no_first_look(snapshot: RouterSnapshot) -> None:
    assert snapshot.looks_first
    assert not plain_snapshot().looks_first
    assert not replace(snapshot, metadata={RULE: VOI_RULE}).looks_first


@pytest.mark.parametrize("name", ["idf", "weights", "bias", "centre", "questions", "words"])
def test_a_first_look_that_lacks_or_mangles_an_array_is_refused(
    name: str, snapshot: RouterSnapshot, table: TokenTable
) -> None:
    with pytest.raises(SnapshotError, match=name):
        look_of(snapshot, table, **{name: snapshot.look[name][..., :-1]})
    without = {key: of for key, of in snapshot.look.items() if key != name}
    with pytest.raises(SnapshotError, match=name):
        FirstLook(without, ClusterRule(snapshot), table)


def test_a_first_look_with_numbers_that_are_not_finite_is_refused(
    snapshot: RouterSnapshot, table: TokenTable
) -> None:
    bias = snapshot.look["bias"].copy()
    bias[0] = np.nan
    with pytest.raises(SnapshotError, match="bias"):
        look_of(snapshot, table, bias=bias)


def test_too_few_questions_give_no_first_look(table: TokenTable) -> None:
    texts = questions(0, 60) + [""] * 200
    assert fit_look(ClusterRule(plain_snapshot()), texts, vectors(texts), table) is None


def test_pooled_vectors_are_the_two_means_and_the_ends(table: TokenTable) -> None:
    tokens = table.tokens("one two three")
    idf = np.ones(table.size, np.float32)
    idf[tokens[0]] = 3.0
    parts = table.pooled(tokens, idf).reshape(NUM_POOLS, table.dim)
    first, *_, last = (table.pooled(tokens[i : i + 1], idf)[: table.dim] for i in range(3))
    weighted = (3 * first + table.pooled(tokens[1:2], idf)[: table.dim] + last) / 5
    np.testing.assert_allclose(parts[0], weighted, atol=1e-6)
    np.testing.assert_allclose(parts[2], first, atol=1e-6)
    np.testing.assert_allclose(parts[3], last, atol=1e-6)


def test_an_encoder_without_token_vectors_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text(
        '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'
    )
    with pytest.raises(ConfigError, match="no table of token vectors"):
        TokenTable(EmbedderConfig(model=str(tmp_path)))


async def test_the_router_decides_by_the_first_look_and_says_so(
    snapshot: RouterSnapshot, table: TokenTable, tmp_path: Path
) -> None:
    sure = decided_at_once(snapshot, table)[0]
    async with path2(tmp_path) as deployment:
        await promote(deployment, snapshot, table)
        decision = await deployment.orchestrator.decide(deployment.call(sure))
        assert decision_object(decision)["look"] == "static"
        assert (await deployment.ask(sure))[1].embedding is None
        decision = await deployment.orchestrator.decide(deployment.call(UNLIKE[0]))
        assert decision_object(decision)["look"] == "encoder"
        report = (await deployment.ask(UNLIKE[0]))[1]
        assert report.embedding is not None
        assert len(report.embedding) == 4 * DIM


async def test_in_a_batch_each_request_is_decided_by_its_own_look(
    snapshot: RouterSnapshot, table: TokenTable, tmp_path: Path
) -> None:
    sure = decided_at_once(snapshot, table)[:4]
    async with path2(tmp_path) as deployment:
        await promote(deployment, snapshot, table)
        calls = [deployment.call(text) for pair in zip(sure, UNLIKE, strict=False) for text in pair]
        decisions = await asyncio.gather(*map(deployment.orchestrator.decide, calls))
        assert [of.look for of in decisions] == [Look.STATIC, Look.ENCODER] * 3


async def test_beside_a_policy_in_the_shadow_the_encoder_looks(
    snapshot: RouterSnapshot, table: TokenTable, tmp_path: Path
) -> None:
    sure = decided_at_once(snapshot, table)[0]
    async with path2(tmp_path) as deployment:
        await promote(deployment, snapshot, table)
        await deployment.promote(plain_snapshot(), mode=Mode.SHADOW)
        decision = await deployment.orchestrator.decide(deployment.call(sure))
        assert decision.look is Look.ENCODER
        assert decision.shadow is not None


async def test_the_same_result_again_has_the_same_look(
    snapshot: RouterSnapshot, table: TokenTable, tmp_path: Path
) -> None:
    async with path2(tmp_path) as deployment:
        await promote(deployment, snapshot, table)
        for text in (*questions(400, 4), *UNLIKE):
            decisions = [
                await deployment.orchestrator.decide(deployment.call(text, fixed=Fixed(30.0)))
                for _ in range(2)
            ]
            assert decisions[0].look == decisions[1].look
            assert decisions[0].candidates == decisions[1].candidates
