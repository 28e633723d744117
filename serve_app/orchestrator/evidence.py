"""From the spans of a step to its signals: what engines and tools reported on the way."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.models.reply import Choice
from serve_app.orchestrator.answer import text_of
from serve_app.orchestrator.trace import Span, Turn
from serve_app.schemas import ToolCall
from serve_app.signals import AnswerKind, Certainty, Signals, abstains, certainty_of
from serve_app.tools.builtin.best_of import normalise
from serve_app.tools.builtin.corpus import words

_MAX_WORDS_CHARS = 4_096
"""Of a query and an answer, that are compared."""


def turn_of(choices: list[Choice]) -> Turn | None:
    """What the first choice of a reply shows; `None`: there is none."""
    if not choices:
        return None
    return Turn(certainty_of(choices[0].tokens), bool(choices[0].calls))


def signals_of(span: Span, choices: list[Choice], query: str, *, offered: bool) -> Signals:
    """What a step showed.

    Args:
        span: Of the step.
        choices: Its answer; empty: it gave none.
        query: What was asked.
        offered: Whether the model was offered functions.
    """
    turns = [of.turn for of in span.walk() if of.turn is not None]
    calls = span.tool_calls()
    text = text_of(choices) or ""
    found = _sources(calls)
    votes = _votes(calls, text)
    return Signals(
        answer=certainty_of(choices[0].tokens) if choices else None,
        call=_least_sure(turns),
        num_turns=len(turns),
        offered=offered,
        num_calls=len(calls),
        num_failed=sum(not call.ok for call in calls),
        num_sources=found.number,
        source_score=found.score,
        source_similarity=found.similarity,
        vote_share=votes.share,
        rating=votes.rating,
        mean_rating=votes.mean_rating,
        is_cut=bool(choices) and choices[0].finish_reason == "length",
        abstains=abstains(text),
        kind=_kind(text),
        length=len(text),
        echo=_echo(query, text),
    )


@dataclass(frozen=True)
class _Found:
    number: int | None = None
    score: float | None = None
    similarity: float | None = None


@dataclass(frozen=True)
class _Votes:
    share: float | None = None
    rating: float | None = None
    mean_rating: float | None = None


def _least_sure(turns: list[Turn]) -> Certainty | None:
    calls = [turn.certainty for turn in turns if turn.called and turn.certainty is not None]
    return min(calls, key=lambda certainty: certainty.least, default=None)


def _sources(calls: tuple[ToolCall, ...]) -> _Found:
    """What was looked up; lists that a tool gives under `sources`, with their scores."""
    lists = [call.data["sources"] for call in calls if isinstance(call.data.get("sources"), list)]
    if not lists:
        return _Found()
    sources = [source for of in lists for source in of if isinstance(source, dict)]
    scores, similarities = (
        [float(of[name]) for of in sources if isinstance(of.get(name), int | float)]
        for name in ("score", "similarity")
    )
    return _Found(len(sources), max(scores, default=None), max(similarities, default=None))


def _votes(calls: tuple[ToolCall, ...], text: str) -> _Votes:
    """What `best_of` found: how many samples agree with the answer, and what they were rated."""
    for call in reversed(calls):
        answers, ratings = call.data.get("answers"), call.data.get("scores")
        if not isinstance(answers, list) or not answers:
            continue
        keys, key = [normalise(answer) for answer in answers], normalise(text)
        share = keys.count(key) / len(keys)
        if not isinstance(ratings, list) or len(ratings) != len(answers):
            return _Votes(share)
        own = [rating for of, rating in zip(keys, ratings, strict=True) if of == key]
        return _Votes(share, max(own, default=None), sum(ratings) / len(ratings))
    return _Votes()


def _kind(text: str) -> AnswerKind:
    key = normalise(text)
    if key.startswith("number:"):
        return "number"
    if key.startswith("code:"):
        return "code"
    return "text" if key else "none"


def _echo(query: str, text: str) -> float:
    asked = set(words(query[:_MAX_WORDS_CHARS]))
    return len(asked & set(words(text[:_MAX_WORDS_CHARS]))) / max(len(asked), 1)
