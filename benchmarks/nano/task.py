"""The nouns of the nano pool: what one training conversation and one evaluation question are.

Generators (`math_tasks`, `facts_tasks`, `code_tasks`) produce these; the trainer, the evaluation
and the labelled question sets read them. Nothing here imports torch or vLLM.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Split = Literal["seen", "held_out"]
"""`seen`: a phrasing used in training, with new numbers and names; `held_out`: never trained on."""

Metric = Literal["number", "exact", "verbatim", "unit_tests"]
"""How an answer is scored: numeric match, normalised exact match, exact match, or by running unit
tests."""


@dataclass(frozen=True)
class Conversation:
    """One training conversation in OpenAI chat form, ending in an assistant turn.

    Assistant turns that call a tool carry `tool_calls` as
    `[{"type": "function", "function": {"name": ..., "arguments": {...}}}]`; tool results are turns
    with role `tool`.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[str, ...] = ()
    """Ids of the tools offered, out of `TOOL_PARAMETERS`."""


@dataclass(frozen=True)
class Question:
    """One labelled question a user could ask, with what it takes to score an answer."""

    query: str
    gold: str
    metric: Metric
    domain: str
    """`math`, `facts`, `code`, `database` or `clock`."""
    kind: str
    """The problem type, for example `percent_of`."""
    split: Split
    tests: tuple[str, ...] = ()
    """Python assertions on the function `solution`; only for `unit_tests`."""
    good_pairs: tuple[str, ...] = ()
    """Pairs (`model_id@tool_id`) built to answer it right."""


TOOL_PARAMETERS: dict[str, tuple[str, ...]] = {
    "calculator": ("expression",),
    "python": ("code",),
    "retrieval": ("query",),
    "database": ("query",),
    "clock__get_current_time": ("timezone",),
    "clock__convert_time": ("source_timezone", "time", "target_timezone"),
}
"""Argument names of the tools the nano models know; their prompt shows `name(argument)`."""


class TaskGenerator(Protocol):
    """A seeded source of conversations and questions for one nano model."""

    model_id: str

    def conversation(self, rng: random.Random, progress: float) -> Conversation:
        """One training conversation; `progress` in [0, 1] is the share of training done."""
        ...

    def questions(self, rng: random.Random, split: Split, n: int) -> list[Question]:
        """`n` labelled questions as a user would ask them, over all kinds of this domain."""
        ...


@dataclass(frozen=True)
class EvalCell:
    """One cell of the evaluation table: the questions, the tools offered, the share required."""

    name: str
    split: Split
    tools: tuple[str, ...]
    required: float | None
    """The share that must be right, in [0, 1]; `None` for figures that are only reported."""
    kinds: tuple[str, ...] = field(default=())
    required_call: float | None = None
    """The share that must be valid tool calls, in [0, 1]; `None` = not required."""
