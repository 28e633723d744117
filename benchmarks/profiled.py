"""A router snapshot with a first look, fitted on made-up outcomes of the load's profiled questions.

Every pair of a configuration answers every question, the first pair right more often than others.
What matters here is what the router has to do, and not how right it is.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.client import profiled_question
from rl.fit.fit import fit
from rl.fit.look import fit_look
from rl.profile.outcomes import Outcomes
from serve_app.config import load_config
from serve_app.embedder import TextEncoder, TokenTable
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.snapshots.build_rule import read_cards
from serve_app.router.snapshots.snapshot import save_snapshot

_NUM_QUESTIONS = 800
_STRIDE = 7_919
"""Between the numbers of questions, so that they differ in every part."""


def save_profiled(config: Path, folder: Path) -> float:
    """Fit a snapshot for the pairs of a configuration, and write it.

    Returns:
        The share of the profiled questions that its first look is expected to decide.
    """
    deployment = load_config(config)
    encoder = TextEncoder(deployment.embedder, deployment.data_path() / "cache")
    texts = tuple(profiled_question(number * _STRIDE) for number in range(_NUM_QUESTIONS))
    embeddings = np.concatenate(
        [encoder.encode(texts[i : i + 64]) for i in range(0, len(texts), 64)]
    )
    pairs = deployment.all_candidates()
    size, rng = len(texts) * len(pairs), np.random.default_rng(0)
    pair_index = np.tile(np.arange(len(pairs)), len(texts))
    outcomes = Outcomes(
        encoder=deployment.embedder.model,
        embeddings=embeddings,
        pairs=tuple(pairs),
        query_index=np.repeat(np.arange(len(texts)), len(pairs)),
        pair_index=pair_index,
        score=(rng.random(size) < np.where(pair_index == 0, 0.9, 0.5)).astype(np.float32),
        tokens=np.full(size, 20, np.float32),
        seconds=np.full(size, 0.1, np.float32),
        costs_usd=np.full(size, 1e-5, np.float32),
        queries=texts,
    )
    snapshot = fit(outcomes)
    rule = ClusterRule(snapshot, read_cards(deployment, encoder.encode).prior)
    fitted = fit_look(rule, texts, embeddings, TokenTable(deployment.embedder))
    assert fitted is not None, "no first look was fitted"
    arrays, expected = fitted
    save_snapshot(replace(snapshot, look=arrays), folder)
    return expected["share"]
