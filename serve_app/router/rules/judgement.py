"""What a rule found in a request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Judgement:
    """A label, and how sure the rule is of it."""

    label: str
    score: float
    """What the confidence was made from: 1 of a keyword, a cosine similarity, or the mean
    probability of a model's tokens."""
    confidence: float
    """Calibrated chance that the label is right, in [0, 1]."""
