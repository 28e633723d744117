"""What the finished steps of a request showed, and which of their answers is the best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serve_app.router.policy.features import NO_ANSWER, best_answers
from serve_app.schemas import Action, Seen, Step
from serve_app.tools.builtin.best_of import answer_key


def seen(step: Step) -> Seen:
    """What a finished step showed to the policy."""
    is_thought = step.action is Action.THINK
    return Seen(
        pair=None if is_thought else step.pair,
        answer_key=None if is_thought or step.error is not None else answer_key(step.answer),
        mean_logprob=step.mean_logprob,
        tool_errors=sum(not call.ok for call in step.tool_calls),
        cost_usd=step.usage.cost_usd,
        signals=() if step.signals is None else tuple(step.signals.numbers()),
    )


def answer_numbers(steps: Sequence[Step]) -> tuple[int | None, ...]:
    """Of each step a number that is equal for answers that say the same; `None` for none."""
    keys = [seen(step).answer_key for step in steps]
    number = {key: place for place, key in enumerate(dict.fromkeys(k for k in keys if k))}
    return tuple(None if key is None else number[key] for key in keys)


def has_answer(steps: Sequence[Step]) -> bool:
    """Whether a pair has answered."""
    return any(step.action is Action.ROUTE and step.error is None for step in steps)


def best_step(steps: Sequence[Step]) -> int | None:
    """Index of the step whose answer is returned: the last that most agree on.

    Returns:
        `None` where no pair has answered. An answer with nothing in it is returned only where
        there is no other.
    """
    keys = [NO_ANSWER if number is None else number for number in answer_numbers(steps)]
    best = int(best_answers(np.array([keys], np.intp))[0]) if keys else NO_ANSWER
    if best != NO_ANSWER:
        return best
    empty = [number for number, step in enumerate(steps) if has_answer([step])]
    return empty[-1] if empty else None
