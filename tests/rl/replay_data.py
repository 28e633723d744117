"""Made-up profiles for the environment's tests, small enough to work out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from rl.fit.dataset import Dataset
from rl.ppo.replay import ReplayTable, View, make_table
from rl.ppo.table import Float
from tests.router_data import make_outcomes

WRONG, RIGHT = "no idea", "It is 42."
DIM = 16


def encode(texts: Any) -> Float:
    """A unit vector per text that tells texts apart."""
    vectors = np.array([np.random.default_rng(len(text)).standard_normal(DIM) for text in texts])
    unit: Float = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


def flat_view(table: ReplayTable, quality: float = 0.5) -> View:
    """Path 1 believes the same of every pair."""
    shape = table.score.shape[1:]
    return View(
        quality=np.full(shape, quality, np.float32),
        spread=np.full(shape, 0.1, np.float32),
        overall=np.full(shape, quality, np.float32),
        outside=np.full(shape, quality, np.float32),
        distance_quantile=np.full(shape[0], 0.4, np.float32),
        confidence=np.full(shape[0], 0.7, np.float32),
        inside=np.ones(shape[0], np.bool_),
    )


def make_dataset(num_queries: int = 60, seed: int = 0) -> Dataset:
    """Outcomes of three pairs on three topics; right answers agree, wrong ones do not."""
    outcomes, topic = make_outcomes(num_queries, seed)
    answers = tuple(
        RIGHT if score else f"{WRONG} {query} {pair}"
        for score, query, pair in zip(
            outcomes.score, outcomes.query_index, outcomes.pair_index, strict=True
        )
    )
    size = len(outcomes.score)
    return Dataset(
        outcomes=outcomes,
        domains=tuple(f"topic {number}" for number in topic),
        answers=answers,
        logprob=np.where(outcomes.score > 0, -0.1, -1.0).astype(np.float32),
        tool_errors=np.zeros(size, np.float32),
    )


def make_replay(num_queries: int = 60, seed: int = 0) -> ReplayTable:
    """`make_dataset` as a table with two flat views."""
    table = make_table(make_dataset(num_queries, seed), encode=encode)
    return replace(table, views=(flat_view(table, 0.5), flat_view(table, 0.9)))


def one_query(
    scores: list[float],
    keys: list[int],
    *,
    costs_usd: tuple[float, ...] = (1e-5, 1e-4, 1e-3),
    seconds: tuple[float, ...] = (1.0, 2.0, 3.0),
) -> ReplayTable:
    """Three pairs on one query: their scores and their answers' keys (-1 for none)."""
    table = make_replay(1)
    shape = (1, 1, 3)
    costs = np.array(costs_usd, np.float32)
    return replace(
        table,
        score=np.array(scores, np.float32).reshape(shape),
        answer_key=np.array(keys, np.intp).reshape(shape),
        answer_row=np.array([0 if key < 0 else 1 for key in keys], np.intp).reshape(shape),
        answer_embeddings=np.stack([np.zeros(DIM), np.eye(DIM)[0]]).astype(np.float32),
        costs_usd=costs.reshape(shape),
        pair_costs_usd=costs,
        pair_seconds=np.array(seconds, np.float32),
        seconds=np.array(seconds, np.float32).reshape(shape),
    )


def with_thoughts(table: ReplayTable, score: float = 1.0) -> ReplayTable:
    """The same where every pair does as well after a thought, which costs 0.0001 USD and 2 s."""

    def doubled(name: str) -> Any:
        values = getattr(table, name)
        return np.concatenate([values, values])

    num_queries = table.num_queries
    changed = {
        name: doubled(name)
        for name in (
            "costs_usd",
            "seconds",
            "logprob",
            "tool_errors",
            "measured",
            "answer_key",
            "answer_row",
            "signals",
        )
    }
    return replace(
        table,
        score=np.concatenate([table.score, np.full_like(table.score, score)]),
        think_cost_usd=np.full(num_queries, 1e-4, np.float32),
        think_seconds=np.full(num_queries, 2.0, np.float32),
        **changed,
    )
