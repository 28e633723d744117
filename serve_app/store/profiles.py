"""Outcomes of pairs, and thoughts, on labelled questions: written as they come, never twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import delete, func, insert, select
from sqlalchemy.exc import IntegrityError

from serve_app.schemas import Pair
from serve_app.signals import Signals, read_signals
from serve_app.store.database import Store
from serve_app.store.rows import storable_text
from serve_app.store.tables import ProfileOutcomeRow, ProfileQuestionRow, ProfileThoughtRow

_KEYS_AT_ONCE = 500
"""Keys in one query; databases bound the number of parameters."""


@dataclass(frozen=True, slots=True)
class ProfileQuestion:
    """One labelled question; fields as in `ProfileQuestionRow`."""

    question_key: str
    query: str
    domain: str
    split: str
    encoder: str
    embedding: bytes


@dataclass(frozen=True, slots=True)
class ProfileOutcome:
    """What one pair did on one question; fields as in `ProfileOutcomeRow`."""

    question_key: str
    model_id: str
    tool_id: str
    fingerprint: str
    score: float
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    seconds: float
    mean_logprob: float | None
    tool_errors: int
    answer: str | None
    error: str | None
    judge_agreed: bool | None
    created_unix_s: float
    propensity: float = 1.0
    signals: Signals | None = None

    @property
    def pair(self) -> Pair:
        """Who answered."""
        return Pair(self.model_id, self.tool_id)


@dataclass(frozen=True, slots=True)
class ProfileThought:
    """What the planner said of one question; fields as in `ProfileThoughtRow`."""

    question_key: str
    fingerprint: str
    model_id: str
    thought: str | None
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    seconds: float
    error: str | None
    created_unix_s: float


async def add_questions(store: Store, questions: Iterable[ProfileQuestion]) -> None:
    """Keep questions; a known one takes over the new domain, split and embedding.

    Raises:
        StoreError: If the store is away.
    """
    for question in questions:
        values = asdict(question) | {"query": storable_text(question.query)}
        try:
            async with store.begin() as connection:
                await connection.execute(insert(ProfileQuestionRow).values(values))
        except IntegrityError:
            async with store.begin() as connection:
                await connection.execute(
                    ProfileQuestionRow.__table__.update()  # type: ignore[attr-defined]
                    .where(ProfileQuestionRow.question_key == question.question_key)
                    .values(values)
                )


async def add_outcomes(store: Store, outcomes: Sequence[ProfileOutcome]) -> None:
    """Keep outcomes; one that is there already stays as it is.

    Raises:
        StoreError: If the store is away.
    """
    rows = []
    for outcome in outcomes:
        row = asdict(outcome)
        for name in ("answer", "error"):
            row[name] = None if row[name] is None else storable_text(row[name])
        rows.append(row)
    try:
        async with store.begin() as connection:
            await connection.execute(insert(ProfileOutcomeRow), rows)
    except IntegrityError:
        if len(outcomes) > 1:
            for outcome in outcomes:
                await add_outcomes(store, [outcome])


async def add_thought(store: Store, thought: ProfileThought) -> None:
    """Keep a thought; one that is there already stays as it is.

    Raises:
        StoreError: If the store is away.
    """
    values = asdict(thought)
    for name in ("thought", "error"):
        values[name] = None if values[name] is None else storable_text(values[name])
    try:
        async with store.begin() as connection:
            await connection.execute(insert(ProfileThoughtRow).values(values))
    except IntegrityError:
        return


async def read_thoughts(store: Store, question_keys: Sequence[str]) -> list[ProfileThought]:
    """Every thought on some questions, the oldest first."""
    row = ProfileThoughtRow
    found: list[ProfileThought] = []
    for start in range(0, len(question_keys), _KEYS_AT_ONCE):
        keys = question_keys[start : start + _KEYS_AT_ONCE]
        query = select(row.__table__).where(row.question_key.in_(keys))
        async with store.begin() as connection:
            found += [ProfileThought(**of) for of in (await connection.execute(query)).mappings()]
    return sorted(found, key=lambda thought: (thought.created_unix_s, thought.fingerprint))


async def measured(store: Store, question_keys: Sequence[str]) -> set[tuple[str, Pair, str]]:
    """Which (question, pair, fingerprint) are measured already."""
    row = ProfileOutcomeRow
    done: set[tuple[str, Pair, str]] = set()
    for start in range(0, len(question_keys), _KEYS_AT_ONCE):
        keys = question_keys[start : start + _KEYS_AT_ONCE]
        query = select(row.question_key, row.model_id, row.tool_id, row.fingerprint).where(
            row.question_key.in_(keys)
        )
        async with store.begin() as connection:
            found = (await connection.execute(query)).all()
        done |= {(key, Pair(model_id, tool_id), mark) for key, model_id, tool_id, mark in found}
    return done


async def forget_errors(
    store: Store, question_keys: Sequence[str], fingerprints: Iterable[str]
) -> None:
    """Take back what ended in an error, so that it is missing; measured `again` or not.

    Args:
        store: Where the outcomes are.
        question_keys: Questions whose outcomes are meant.
        fingerprints: Settings that they were measured with.
    """
    row, marks = ProfileOutcomeRow, sorted(set(fingerprints))
    for start in range(0, len(question_keys), _KEYS_AT_ONCE):
        keys = question_keys[start : start + _KEYS_AT_ONCE]
        chosen = (row.question_key.in_(keys), row.error.is_not(None))
        async with store.begin() as connection:
            for mark in marks:
                of_mark = func.substr(row.fingerprint, 1, len(mark)) == mark
                await connection.execute(delete(row).where(*chosen, of_mark))


async def read_profile(
    store: Store, encoder: str, split: str | None = None
) -> tuple[list[ProfileQuestion], list[ProfileOutcome]]:
    """The questions embedded by an encoder, and every outcome on them; in a fixed order.

    Args:
        store: Where they are.
        encoder: Name of the encoder.
        split: `train`, `held_out`, or `None` for both.
    """
    question, outcome = ProfileQuestionRow, ProfileOutcomeRow
    chosen = [question.encoder == encoder]
    if split is not None:
        chosen.append(question.split == split)
    questions = select(question.__table__).where(*chosen).order_by(question.question_key)
    outcomes = (
        select(outcome.__table__)
        .join(question, question.question_key == outcome.question_key)
        .where(*chosen)
        .order_by(outcome.question_key, outcome.model_id, outcome.tool_id, outcome.created_unix_s)
    )
    async with store.begin() as connection:
        asked = [ProfileQuestion(**row) for row in (await connection.execute(questions)).mappings()]
        found = (await connection.execute(outcomes)).mappings()
        done = [ProfileOutcome(**dict(row) | {"signals": read_signals(row["signals"])})
                for row in found]  # fmt: skip
    return asked, done
