"""What a first look does on held-out questions: which it decides, and what that costs or gains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rl.evaluate.held_out import HeldOut
from rl.evaluate.policies import BootstrapInterval, ask, bootstrap
from serve_app.router.rules.base import Deciding
from serve_app.router.rules.first_look import FirstLook


@dataclass(frozen=True, slots=True)
class LookFigures:
    """A first look on held-out questions."""

    share: float
    """Of the questions that it decides."""
    difference: BootstrapInterval
    """Utility with it minus utility with the encoder alone, over all questions."""


def look_figures(
    look: FirstLook,
    rule: Deciding,
    held_out: HeldOut,
    queries: Sequence[str],
    alpha: float,
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> LookFigures:
    """Hold decisions with a first look against those of the encoder alone.

    Args:
        look: Of the same snapshot as the rule.
        rule: Decides, and does not explore.
        held_out: The questions.
        queries: (num_queries,) their texts; an empty one is left to the encoder.
        alpha: Cost-quality dial in [0, 1].
        num_resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        ConfigError: As `ask`.
    """
    seen, decided = held_out.embeddings.copy(), np.zeros(len(queries), np.bool_)
    for row, text in enumerate(queries):
        vector = look.look(text)
        if vector is not None:
            seen[row], decided[row] = vector, True
    rows, gained = np.arange(len(queries)), held_out.utilities(alpha)
    with_look, without = (
        gained[
            rows, ask("candidate", rule, of, held_out.encoder, held_out.pairs, [alpha]).chosen[0]
        ]
        for of in (seen, held_out.embeddings)
    )
    (difference,) = bootstrap((with_look - without)[:, None], num_resamples, seed)
    return LookFigures(float(decided.mean()), difference)
