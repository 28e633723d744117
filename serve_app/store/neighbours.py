"""Questions of the profile that are like a request, and what the candidates reached on them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import func, select

from serve_app.schemas import Pair
from serve_app.store.database import Store
from serve_app.store.tables import ProfileOutcomeRow, ProfileQuestionRow, RequestRow

MAX_COMPARED = 20_000
"""Questions that a request is compared with, at most."""
_MAX_CHARS = 300
"""Of a question, that are shown."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A profiled question that is like a request."""

    query: str
    """Cut."""
    domain: str
    similarity: float
    """Cosine of the two embeddings."""
    scores: tuple[tuple[Pair, float], ...]
    """Mean score of each candidate on it, the best first."""


async def neighbours_of(store: Store, request_id: str, encoder: str, limit: int) -> list[Neighbour]:
    """The profiled questions nearest to a request, the nearest first.

    Args:
        store: Where both are.
        request_id: Of the request; one without an embedding has no neighbours.
        encoder: Embeds requests now; questions of another one are not comparable.
        limit: The most that are returned.

    Raises:
        StoreError: If the store is away.
    """
    question, outcome = ProfileQuestionRow, ProfileOutcomeRow
    of_request = select(RequestRow.embedding).where(RequestRow.request_id == request_id)
    of_questions = select(question.question_key, question.embedding).where(
        question.encoder == encoder
    )
    async with store.begin() as connection:
        vector = await connection.scalar(of_request)
        rows = (await connection.execute(of_questions.limit(MAX_COMPARED))).all() if vector else []
    if vector is None or not rows:
        return []
    near = await asyncio.to_thread(_nearest, vector, rows, limit)
    told = select(
        question.question_key, func.substr(question.query, 1, _MAX_CHARS), question.domain
    ).where(question.question_key.in_(near))
    score = func.avg(outcome.score)
    scored = (
        select(outcome.question_key, outcome.model_id, outcome.tool_id, score)
        .where(outcome.question_key.in_(near))
        .group_by(outcome.question_key, outcome.model_id, outcome.tool_id)
        .order_by(score.desc(), outcome.model_id, outcome.tool_id)
    )
    async with store.begin() as connection:
        texts = {row[0]: (row[1], row[2]) for row in (await connection.execute(told)).all()}
        scores: dict[str, list[tuple[Pair, float]]] = {key: [] for key in near}
        for key, model_id, tool_id, mean in (await connection.execute(scored)).all():
            scores[key].append((Pair(model_id, tool_id), mean))
    return [
        Neighbour(*texts[key], similarity, tuple(scores[key]))
        for key, similarity in near.items()
        if key in texts
    ]


def _nearest(vector: bytes, rows: Sequence[Any], limit: int) -> dict[str, float]:
    """Keys of the nearest questions, and their similarity."""
    comparable = [row for row in rows if len(row.embedding) == len(vector)]
    if not comparable:
        return {}
    of_request = np.frombuffer(vector, "<f4")
    joined = b"".join(row.embedding for row in comparable)
    questions = np.frombuffer(joined, "<f4").reshape(len(comparable), -1)
    lengths = np.linalg.norm(questions, axis=1) * np.linalg.norm(of_request)
    similarity = (questions @ of_request) / np.maximum(lengths, 1e-12)
    order = np.argsort(-similarity, kind="stable")[:limit]
    return {comparable[place].question_key: float(similarity[place]) for place in order}
