"""The planner: what it is asked, and how what it says reaches the pairs that run after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PLANNER_SAMPLING: dict[str, Any] = {"temperature": 0.0, "max_tokens": 256}
"""OpenAI sampling parameters of a thought."""

_TASK = (
    "Prepare the way for whoever answers the question; do not answer it yourself. "
    "In a few short lines: say in other words what is asked for and in which form; name the parts "
    "it falls into, in the order to work them out; name what could go wrong and how to check it. "
    "Where answers were proposed already, say what in them needs checking."
)
_MAX_ANSWER_CHARS = 1500
"""Of each proposed answer that the planner reads."""


def planner_messages(query: str, answers: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """What the planner reads.

    Args:
        query: The question.
        answers: What pairs answered so far, in their order.

    Returns:
        OpenAI messages.
    """
    parts = [f"Question:\n{query}"]
    for number, answer in enumerate(answers, start=1):
        parts.append(f"Proposed answer {number}:\n{answer[:_MAX_ANSWER_CHARS]}")
    return (
        {"role": "system", "content": _TASK},
        {"role": "user", "content": "\n\n".join(parts)},
    )


def with_note(note: str, question: str) -> str:
    """A question with a thought before it; the question comes last.

    Args:
        note: What the planner said.
        question: The last user message, with whatever a tool put into it.
    """
    return f"Notes that may help:\n{note}\n\n{question}"
