"""What a step, or a request as a whole, came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve_app.models.reply import Choice
from serve_app.schemas import DecidedBy, Pair, StopReason


@dataclass(frozen=True)
class Answer:
    """What a step, or a request as a whole, came to."""

    choices: list[Choice]
    pair: Pair
    """Which gave it."""
    path: DecidedBy
    """Who decided on the pair."""
    step: int
    """Number of the step that gave it."""
    stop: StopReason = StopReason.ANSWERED
    """Why nothing more was done."""
    is_partial: bool = False
    """Whether a cap cut it short; `stop` says which."""
    sources: tuple[dict[str, Any], ...] = ()
    """What the answer of a pattern rests on."""


def text_of(choices: Sequence[Choice]) -> str | None:
    """The text of the first choice; `None`: it has none."""
    return choices[0].text if choices else None


def mean_logprob_of(choices: Sequence[Choice]) -> float | None:
    """Mean token log-probability of the first choice; `None`: the engine gave none."""
    tokens = choices[0].tokens if choices else ()
    return sum(token["logprob"] for token in tokens) / len(tokens) if tokens else None
