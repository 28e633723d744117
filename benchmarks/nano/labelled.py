"""The nano pool's labelled questions, in the form that profiling reads (`serve_app.questions`)."""

from __future__ import annotations

import random
from collections.abc import Iterable

from benchmarks.nano.registry import question_source
from benchmarks.nano.task import Metric, Question, Split, TaskGenerator
from serve_app import questions as profiling
from serve_app.errors import ConfigError

_METRICS: dict[Metric, str] = {"number": "numeric", "exact": "normalised", "verbatim": "exact"}
_SPLITS: dict[Split, str] = {"seen": "train", "held_out": "held_out"}
_MAX_EMPTY_DRAWS = 20
"""Draws without a new question after which there are taken to be no more."""


def metric_name(metric: Metric) -> str:
    """The name that profiling has for a metric."""
    return _METRICS.get(metric, metric)


def labelled(question: Question, question_id: str) -> profiling.Question:
    """A question of a nano generator as profiling reads it."""
    metric = {"name": metric_name(question.metric)}
    return profiling.Question.model_validate(
        {
            "id": question_id,
            "query": question.query,
            "metric": metric | ({"tests": question.tests} if question.tests else {}),
            "gold": question.gold,
            "domain": question.domain,
            "split": _SPLITS[question.split],
        }
    )


def question_set(
    names: Iterable[str], sizes: dict[Split, int], seed: int
) -> list[profiling.Question]:
    """Questions of several domains; no query occurs twice, in whichever split.

    Args:
        names: Out of `registry.QUESTION_SETS`.
        sizes: How many questions each model and split gets.
        seed: The same seed gives the same questions.

    Raises:
        ConfigError: If a generator does not know so many different questions.
    """
    asked: set[str] = set()
    found: list[profiling.Question] = []
    for name in names:
        generator = question_source(name)
        for split, size in sizes.items():
            rng = random.Random(f"{seed}-{name}-{split}")
            drawn = _distinct(generator, rng, split, size, asked)
            found += [
                labelled(question, f"{name}-{split}-{number:04d}")
                for number, question in enumerate(drawn, start=1)
            ]
    return found


def _distinct(
    generator: TaskGenerator, rng: random.Random, split: Split, size: int, asked: set[str]
) -> list[Question]:
    """Draws `size` questions that are not `asked`, and adds them there."""
    kept: list[Question] = []
    empty_draws = 0
    while len(kept) < size:
        before = len(kept)
        for question in generator.questions(rng, split, size - len(kept)):
            if question.query not in asked:
                asked.add(question.query)
                kept.append(question)
        empty_draws = empty_draws + 1 if len(kept) == before else 0
        if empty_draws > _MAX_EMPTY_DRAWS:
            raise ConfigError(
                f"{generator.model_id} knows no {size} different {split} questions; ask for fewer"
            )
    return kept
