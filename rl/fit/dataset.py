"""What the store holds, as the fit and the evaluation read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rl.fit.traffic import fair_verdicts
from rl.profile.outcomes import NotMeasured, Outcomes
from rl.profile.prices import PriceHistory
from rl.profile.run import fingerprint, sample_of, thought_fingerprint
from serve_app.config import AtlasConfig
from serve_app.schemas import Pair
from serve_app.signals import NUMBERS, abstains, stacked
from serve_app.store import (
    ProfileOutcome,
    ProfileQuestion,
    Store,
    Verdict,
    read_profile,
    read_thoughts,
    read_verdicts,
    verdict_ids,
)

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
    num_outdated: int = 0
    """Times that a configured pair was asked one of the questions with other settings only."""
    answers: tuple[str | None, ...] = ()
    """(num_outcomes,) what was answered; `None` where nothing was. Empty where not kept."""
    logprob: NDArray[np.float32] | None = None
    """(num_outcomes,) mean token log-probability of the answer; NaN where unknown."""
    tool_errors: NDArray[np.float32] | None = None
    """(num_outcomes,) tool calls that failed."""
    signals: NDArray[np.float32] | None = None
    """(num_outcomes, len(NUMBERS)) as `Signals.numbers`; NaN where not kept."""
    thoughts: Thoughts | None = None
    """What the deployment's planner said, and what came of it; `None` where none was recorded."""


@dataclass(frozen=True)
class Thoughts:
    """What the planner took, and what the pairs did with its thought in their context."""

    after: Dataset
    """Of the same queries and pairs."""
    costs_usd: NDArray[np.float32]
    """(num_queries,) of the planner; NaN where it was not asked."""
    seconds: NDArray[np.float32]
    """(num_queries,) of the planner; NaN where it was not asked."""


async def read_dataset(
    config: AtlasConfig, store: Store, split: str, *, with_traffic: bool = False
) -> Dataset:
    """The newest outcome of every configured pair on every labelled question.

    Where a profile took several samples, each of them is one. Outcomes of other settings of a model
    or a tool, or after another planner than the deployment's has spoken, are left out. Dollars are
    at the prices of today.

    Args:
        config: The deployment.
        store: Where the outcomes are.
        split: `train` or `held_out`.
        with_traffic: Whether rated requests count too, with the verdict as the score; which of
            them, `rl.fit.traffic` says.

    Raises:
        NotMeasured: If there is none.
        StoreError: If the store is away.
    """
    encoder, planner = config.embedder.model, config.router.planner
    questions, rows = await read_profile(store, encoder, split)
    marks = {pair: fingerprint(config, pair) for pair in config.all_candidates()}
    prices = await PriceHistory.read(config, store)
    newest = prices.of_today(_newest(rows, marks))
    verdicts: list[Verdict] = []
    if with_traffic and questions:
        rated = await read_verdicts(store, await verdict_ids(store, 0.0, MAX_VERDICTS))
        vectors = np.stack([np.frombuffer(question.embedding, "<f4") for question in questions])
        size = len(questions[0].embedding)
        fitting = [of for of in rated if of.pair in marks and len(of.embedding) == size]
        verdicts = fair_verdicts(fitting, vectors)
    known = {row.pair for row in newest} | {verdict.pair for verdict in verdicts}
    pairs = tuple(pair for pair in config.all_candidates() if pair in known)
    measured = {(row.question_key, row.pair) for row in newest}
    outdated = {(row.question_key, row.pair) for row in rows if row.pair in marks} - measured
    if not newest:
        others = f" ({len(outdated)} are of other settings of it)" if outdated else ""
        raise NotMeasured(
            f"there is no outcome of split {split!r} for this configuration{others}: "
            "run `atlas profile`"
        )
    asked = {row.question_key for row in newest}
    questions = [question for question in questions if question.question_key in asked]
    dataset = replace(
        _laid_out(encoder, questions, verdicts, pairs, newest), num_outdated=len(outdated)
    )
    if planner is None:
        return dataset
    marks = {pair: fingerprint(config, pair, planner) for pair in pairs}
    after = prices.of_today([of for of in _newest(rows, marks) if of.question_key in asked])
    if not after:
        return dataset
    mark = thought_fingerprint(config, planner)
    thoughts = {
        thought.question_key: thought
        for thought in prices.of_today(await read_thoughts(store, sorted(asked)))
        if _is_of(thought.fingerprint, mark)
    }
    took = [thoughts.get(question.question_key) for question in questions]
    took += [None] * len(verdicts)
    return replace(
        dataset,
        thoughts=Thoughts(
            after=_laid_out(encoder, questions, verdicts, pairs, after, count_verdicts=False),
            costs_usd=_column([np.nan if of is None else of.cost_usd for of in took]),
            seconds=_column([np.nan if of is None else of.seconds for of in took]),
        ),
    )


def _newest(rows: Sequence[ProfileOutcome], marks: dict[Pair, str]) -> list[ProfileOutcome]:
    """The newest outcome of each run of each pair on each question, by the settings of now."""
    newest = {
        (row.question_key, row.pair, sample_of(row.fingerprint)): row
        for row in sorted(rows, key=lambda row: row.created_unix_s)
        if _is_of(row.fingerprint, marks.get(row.pair))
    }
    return list(newest.values())


def _is_of(fingerprint: str, mark: str | None) -> bool:
    """Whether something was measured with these settings, be it again."""
    return fingerprint.partition("-")[0] == mark


def _laid_out(
    encoder: str,
    questions: Sequence[ProfileQuestion],
    verdicts: Sequence[Verdict],
    pairs: tuple[Pair, ...],
    rows: Sequence[ProfileOutcome],
    *,
    count_verdicts: bool = True,
) -> Dataset:
    """Outcomes on questions and rated queries, as flat columns; the verdicts are outcomes too."""
    place = {question.question_key: row for row, question in enumerate(questions)}
    index = {pair: column for column, pair in enumerate(pairs)}
    vectors = [np.frombuffer(question.embedding, "<f4") for question in questions]
    vectors += [np.frombuffer(verdict.embedding, "<f4") for verdict in verdicts]
    rated = list(enumerate(verdicts, len(questions))) if count_verdicts else []
    unknown = [np.nan] * len(rated)
    outcomes = Outcomes(
        encoder=encoder,
        embeddings=np.stack(vectors).astype(np.float32),
        pairs=pairs,
        query_index=np.array(
            [place[row.question_key] for row in rows] + [query for query, _ in rated]
        ),
        pair_index=_indices(index, [row.pair for row in rows] + [of.pair for _, of in rated]),
        score=_column([row.score for row in rows] + [of.score for _, of in rated]),
        tokens=_column([row.prompt_tokens + row.completion_tokens for row in rows] + unknown),
        seconds=_column([row.seconds for row in rows] + unknown),
        costs_usd=_column([row.cost_usd for row in rows] + unknown),
        # What users asked is not for others to see.
        queries=(*(question.query for question in questions), *[""] * len(verdicts)),
    )
    return Dataset(
        outcomes,
        domains=tuple([question.domain for question in questions] + [""] * len(verdicts)),
        num_verdicts=len(rated),
        answers=tuple([row.answer for row in rows] + [None] * len(rated)),
        logprob=_column(
            [np.nan if row.mean_logprob is None else row.mean_logprob for row in rows] + unknown
        ),
        tool_errors=_column([row.tool_errors for row in rows] + [0.0] * len(rated)),
        signals=stacked([_numbers(row) for row in rows] + [()] * len(rated)),
    )


def _numbers(row: ProfileOutcome) -> Sequence[float]:
    """What an outcome showed; of one from before signals were kept, what its columns say."""
    if row.signals is not None:
        return row.signals.numbers()
    numbers = [np.nan] * len(NUMBERS)
    if row.mean_logprob is not None:
        numbers[NUMBERS.index("answer_mean")] = row.mean_logprob
    numbers[NUMBERS.index("num_failed")] = row.tool_errors
    numbers[NUMBERS.index("abstains")] = float(abstains(row.answer or ""))
    numbers[NUMBERS.index("log_length")] = float(np.log1p(len(row.answer or "")))
    return numbers


def _indices(
    index: dict[Pair, int], pairs: Sequence[Pair]
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array([index[pair] for pair in pairs], np.int64)


def _column(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.array(values, np.float32)
