"""A deployment of two pairs, and made-up profiles of it for a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rl.profile.run import fingerprint
from serve_app.config import AtlasConfig
from serve_app.schemas import Pair
from serve_app.store import ProfileOutcome, ProfileQuestion, Store, add_outcomes, add_questions

SUMS, POEMS = Pair("sums", "calculator"), Pair("poems", "none")
DIM = 384
COST_USD = 1e-5
"""Of every outcome."""


def make_config(
    folder: Path, *, price: dict[str, float] | None = None, **settings: Any
) -> AtlasConfig:
    """The deployment, whose data is in a folder; every model has one price, or is free."""
    models = [
        {"type": "remote", "model_id": pair.model_id, "base_url": "http://127.0.0.1:1/v1",
         "remote_model": "x", "tools": [pair.tool_id], "card": {"description": pair.model_id},
         "price": price or {}}
        for pair in (SUMS, POEMS)
    ]  # fmt: skip
    tools = [{"type": "calculator", "tool_id": "calculator"}]
    return AtlasConfig.model_validate(
        {"models": models, "tools": tools, "data_dir": str(folder)} | settings
    )


def topic_vector(number: int) -> bytes:
    """An embedding near one of two topics."""
    made = 0.1 * np.random.default_rng(number).standard_normal(DIM)
    made[number % 2] += 5
    return np.asarray(made / np.linalg.norm(made), "<f4").tobytes()


def make_question(config: AtlasConfig, number: int, **changes: Any) -> ProfileQuestion:
    """A question named after its number; a quarter of them are held out."""
    values: dict[str, Any] = {
        "question_key": f"q{number:03}",
        "query": f"query {number}",
        "domain": "",
        "split": "held_out" if number % 8 >= 6 else "train",
        "encoder": config.embedder.model,
        "embedding": topic_vector(number),
    }
    return ProfileQuestion(**values | changes)


def make_outcome(
    config: AtlasConfig, number: int, pair: Pair, score: float, **changes: Any
) -> ProfileOutcome:
    """What a pair did on such a question."""
    values: dict[str, Any] = {
        "question_key": f"q{number:03}",
        "model_id": pair.model_id,
        "tool_id": pair.tool_id,
        "fingerprint": fingerprint(config, pair),
        "score": score,
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "cost_usd": COST_USD,
        "seconds": 0.1,
        "mean_logprob": -0.1,
        "tool_errors": 0,
        "answer": "x",
        "error": None,
        "judge_agreed": None,
        "created_unix_s": float(number),
    }
    return ProfileOutcome(**values | changes)


async def fill(
    config: AtlasConfig,
    store: Store,
    num_questions: int = 80,
    texts: tuple[str, str] = ("query {}", "query {}"),
    **changes: Any,
) -> None:
    """Even questions are sums, odd ones poems; each pair is right on its own."""
    for number in range(num_questions):
        query = texts[number % 2].format(number)
        await add_questions(store, [make_question(config, number, query=query)])
        await add_outcomes(
            store,
            [
                make_outcome(config, number, pair, float(number % 2 == place), **changes)
                for place, pair in enumerate((SUMS, POEMS))
            ],
        )
