"""What a run of a candidate shows beside its text: what the verifier reads of an answer.

In come what engines and tools report, out goes one `Signals` per run, which the store keeps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError

if TYPE_CHECKING:  # settings load without numpy
    import numpy as np
    from numpy.typing import NDArray

AnswerKind = Literal["number", "text", "code", "none"]

_ABSTAINS = re.compile(
    r"\b(?:i (?:do not|don.t) know|i (?:cannot|can.t|am unable to) (?:answer|say|find|help)"
    r"|(?:not|no) (?:enough|sufficient) information|no (?:answer|sources?) (?:was |were )?found"
    r"|unable to (?:answer|find|say)|(?:is|are) (?:unknown|not known))\b",
    re.IGNORECASE,
)
_LOOKED_AT_CHARS = 400
"""Of an answer, from its start, that may say that there is none."""
_LEAST_LOGPROB = -20.0
"""Engines give -inf, or -9999, for what is impossible."""


@dataclass(frozen=True, slots=True)
class Certainty:
    """Log-probabilities of the tokens of one turn of a model."""

    mean: float
    least: float
    first: float
    entropy: float | None
    """Mean over the tokens, in nats, of the likeliest tokens and the rest as one; `None`: the
    engine gave only the token's own."""
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Signals:
    """What a run showed; `None` in a field: not reported, or there is nothing of that kind."""

    answer: Certainty | None = None
    """Of the answer."""
    call: Certainty | None = None
    """Of the turn that called a tool; of several the one with the least likely token."""
    num_turns: int = 0
    """Replies of models."""
    offered: bool = False
    """Whether a function was offered to the model."""
    num_calls: int = 0
    """Of tools."""
    num_failed: int = 0
    """Calls of tools that failed."""
    num_sources: int | None = None
    """Passages that were found; 0: an empty search. `None`: nothing was looked up."""
    source_score: float | None = None
    """Of the best passage, as its tool ranks."""
    source_similarity: float | None = None
    """Cosine similarity of the query and the passage that is most like it."""
    vote_share: float | None = None
    """Of the sampled answers, that agree with the one that was returned."""
    rating: float | None = None
    """A verifier model's, of the answer that was returned."""
    mean_rating: float | None = None
    """The same of all sampled answers."""
    is_cut: bool = False
    """Whether a limit on tokens ended the answer."""
    abstains: bool = False
    """Whether the answer says that there is none."""
    kind: AnswerKind = "none"
    length: int = 0
    """Characters of the answer."""
    echo: float = 0.0
    """Share of the query's words that the answer repeats."""

    def numbers(self) -> list[float]:
        """As the verifier reads them, in the order of `NUMBERS`; NaN where not reported."""
        known = [
            *_numbers_of(self.answer),
            *_numbers_of(self.call),
            float(self.num_turns),
            float(self.offered),
            float(self.num_calls),
            float(self.offered and not self.num_calls),
            float(self.num_failed),
            *map(_or_nan, (self.num_sources, self.source_score, self.source_similarity)),
            *map(_or_nan, (self.vote_share, self.rating, self.mean_rating)),
            float(self.is_cut),
            float(self.abstains),
            *(float(self.kind == kind) for kind in ("number", "text", "code")),
            math.log1p(self.length),
            self.echo,
        ]
        return known


_CERTAINTY = ("mean", "least", "first", "entropy", "num_tokens")
NUMBERS = (
    *(f"answer_{name}" for name in _CERTAINTY),
    *(f"call_{name}" for name in _CERTAINTY),
    "num_turns",
    "offered",
    "num_calls",
    "not_called",
    "num_failed",
    "num_sources",
    "source_score",
    "source_similarity",
    "vote_share",
    "rating",
    "mean_rating",
    "is_cut",
    "abstains",
    "is_number",
    "is_text",
    "is_code",
    "log_length",
    "echo",
)
"""Names of the numbers of `Signals.numbers`."""

_ADAPTER = TypeAdapter(Signals)
_KNOWN = frozenset(spec.name for spec in fields(Signals))


def read_signals(kept: dict[str, Any] | None) -> Signals | None:
    """Signals as the store keeps them; `None`: none were kept, or not by this version."""
    if kept is None:
        return None
    try:
        return _ADAPTER.validate_python({n: v for n, v in kept.items() if n in _KNOWN})
    except ValidationError:
        return None


def numbers_kept(kept: dict[str, Any] | None) -> tuple[float, ...]:
    """The numbers of signals as the store keeps them; empty: none were kept."""
    signals = read_signals(kept)
    return () if signals is None else tuple(signals.numbers())


def stacked(numbers: Sequence[Sequence[float]]) -> NDArray[np.float32]:
    """(n, len(NUMBERS)) numbers of several runs; a row of NaN where none were kept."""
    import numpy as np

    nothing = (math.nan,) * len(NUMBERS)
    rows = [tuple(of) if len(of) == len(NUMBERS) else nothing for of in numbers]
    return np.array(rows, np.float32).reshape(len(rows), len(NUMBERS))


def certainty_of(tokens: Sequence[Mapping[str, Any]]) -> Certainty | None:
    """What the log-probabilities of a turn come to.

    Args:
        tokens: Of each `logprob`, and `top_logprobs` where they are known.
    """
    own = [max(_LEAST_LOGPROB, float(token["logprob"])) for token in tokens]
    if not own:
        return None
    entropies = [_entropy(token.get("top_logprobs") or ()) for token in tokens]
    known = [of for of in entropies if of is not None]
    return Certainty(
        mean=sum(own) / len(own),
        least=min(own),
        first=own[0],
        entropy=sum(known) / len(known) if known else None,
        num_tokens=len(own),
    )


def abstains(answer: str) -> bool:
    """Whether an answer says that there is none."""
    return _ABSTAINS.search(answer[:_LOOKED_AT_CHARS]) is not None


def _entropy(likeliest: Sequence[Mapping[str, Any]]) -> float | None:
    chances = [math.exp(max(_LEAST_LOGPROB, min(0.0, float(t["logprob"])))) for t in likeliest]
    if len(chances) < 2:
        return None
    rest = max(0.0, 1.0 - sum(chances))
    return -sum(chance * math.log(chance) for chance in (*chances, rest) if chance > 0)


def _numbers_of(certainty: Certainty | None) -> tuple[float, ...]:
    if certainty is None:
        return (math.nan,) * len(_CERTAINTY)
    return tuple(map(_or_nan, astuple(certainty)))


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)
