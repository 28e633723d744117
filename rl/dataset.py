"""What the store holds, as the fit and the evaluation read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rl.outcomes import Outcomes
from rl.profile import fingerprint
from serve_app.config import AtlasConfig
from serve_app.errors import ConfigError
from serve_app.schemas import Pair
from serve_app.store import Store, Verdict, read_profile, read_verdicts, verdict_ids

MAX_VERDICTS = 1_000_000
"""Read at once at most, the newest."""


@dataclass(frozen=True)
class Dataset:
    """Outcomes of the configured pairs, and what else is known of the queries."""

    outcomes: Outcomes
    domains: tuple[str, ...]
    """(num_queries,) empty where unknown."""
    num_verdicts: int = 0
    """Outcomes that are users' verdicts on traffic, not measurements."""
    answers: tuple[str | None, ...] = ()
    """(num_outcomes,) what was answered; `None` where nothing was. Empty where not kept."""
    logprob: NDArray[np.float32] | None = None
    """(num_outcomes,) mean token log-probability of the answer; NaN where unknown."""
    tool_errors: NDArray[np.float32] | None = None
    """(num_outcomes,) tool calls that failed."""


async def read_dataset(
    config: AtlasConfig, store: Store, split: str, *, with_traffic: bool = False
) -> Dataset:
    """The newest outcome of every configured pair on every labelled question.

    Outcomes of other settings of a model or a tool are left out.

    Args:
        config: The deployment.
        store: Where the outcomes are.
        split: `train` or `held_out`.
        with_traffic: Whether rated requests count too, with the verdict as the score.

    Raises:
        ConfigError: If there is none.
        StoreError: If the store is away.
    """
    encoder = config.embedder.model
    questions, rows = await read_profile(store, encoder, split)
    marks = {pair: fingerprint(config, pair) for pair in config.all_pairs()}
    newest = {
        (row.question_key, row.pair): row
        for row in sorted(rows, key=lambda row: row.created_unix_s)
        if row.fingerprint.partition("-")[0] == marks.get(row.pair)
    }
    verdicts: list[Verdict] = []
    if with_traffic:
        rated = await read_verdicts(store, await verdict_ids(store, 0.0, MAX_VERDICTS))
        verdicts = [verdict for verdict in rated if verdict.pair in marks]
    pairs = tuple(
        pair
        for pair in config.all_pairs()
        if any(pair == of for _, of in newest) or any(pair == v.pair for v in verdicts)
    )
    if not newest:
        raise ConfigError(
            f"there is no outcome of split {split!r} for this configuration: run `atlas profile`"
        )
    asked = {key for key, _ in newest}
    questions = [question for question in questions if question.question_key in asked]
    place = {question.question_key: row for row, question in enumerate(questions)}
    index = {pair: column for column, pair in enumerate(pairs)}
    measured = list(newest.values())
    vectors = [np.frombuffer(question.embedding, "<f4") for question in questions]
    vectors += [np.frombuffer(verdict.embedding, "<f4") for verdict in verdicts]
    unknown = [np.nan] * len(verdicts)
    outcomes = Outcomes(
        encoder=encoder,
        embeddings=np.stack(vectors).astype(np.float32),
        pairs=pairs,
        query_index=np.array(
            [place[row.question_key] for row in measured]
            + [len(questions) + number for number in range(len(verdicts))]
        ),
        pair_index=_indices(index, [row.pair for row in measured] + [v.pair for v in verdicts]),
        score=_column([row.score for row in measured] + [v.score for v in verdicts]),
        tokens=_column([row.prompt_tokens + row.completion_tokens for row in measured] + unknown),
        seconds=_column([row.seconds for row in measured] + unknown),
        costs_usd=_column([row.cost_usd for row in measured] + unknown),
        queries=tuple([question.query for question in questions] + [v.query for v in verdicts]),
    )
    domains = tuple([question.domain for question in questions] + [""] * len(verdicts))
    return Dataset(
        outcomes,
        domains,
        len(verdicts),
        answers=tuple([row.answer for row in measured] + [None] * len(verdicts)),
        logprob=_column(
            [np.nan if row.mean_logprob is None else row.mean_logprob for row in measured] + unknown
        ),
        tool_errors=_column([row.tool_errors for row in measured] + [0.0] * len(verdicts)),
    )


def _indices(
    index: dict[Pair, int], pairs: Sequence[Pair]
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array([index[pair] for pair in pairs], np.int64)


def _column(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.array(values, np.float32)
