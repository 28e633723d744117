"""What a further run is worth: the value of information over the answers that a request holds.

`(1 - alpha)` times the expected rise of the best chance held, minus alpha times the rise in cost
(Howard, 1966). Before the first answer that is path 1's utility. Arrays over B requests and P
pairs: the same in the rule `voi`, in the learned policy, which starts from it, and in training.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from serve_app.router.rules.utility import normalised, utility

Float = NDArray[np.float32]
Bool = NDArray[np.bool_]
Index = NDArray[np.intp]

LEAST_RISE = 0.02
"""Expected rise of the best chance below which nothing runs, whatever it costs: a step takes
time."""
_TOO_SMALL = -0.01
"""Worth at most of a run whose rise is below that."""
_OF_THOUGHT = 0.05
"""How much less a thought is worth than the best run; nothing is known of it."""
_OF_ANSWER = 1e-6
"""Of answering: a run has to be worth more than nothing."""


def prospects(outlook: Float, quality: Float, best: Float) -> Float:
    """(B, P) expected rise of the best chance held, if each pair ran next.

    What chance an answer will have is read from the record: of pairs that path 1 believed as good,
    the chances that their answers turned out to have.

    Args:
        outlook: (levels, quantiles) of the record, or (B, levels, quantiles).
        quality: (B, P) expected scores.
        best: (B,) the highest chance of an answer held; 0 without one.
    """
    levels = outlook.shape[-2]
    rises = np.maximum(outlook - best[:, None, None], 0.0).mean(axis=2)
    place = np.clip(quality, 0.0, 1.0) * (levels - 1)
    low = np.minimum(place.astype(np.intp), max(levels - 2, 0))
    high = np.minimum(low + 1, levels - 1)
    share = place - low
    row = np.arange(len(rises))[:, None]
    of_low, of_high = rises[row, low], rises[row, high]
    expected: Float = ((1 - share) * of_low + share * of_high).astype(np.float32)
    return expected


def repeats(answered: Bool, voters: Index) -> Bool:
    """(B, P) pairs that would only say again what one voter has answered.

    Args:
        answered: (B, P) pairs whose answer is held.
        voters: (P,) as of `features.voices`.
    """
    same = voters[:, None] == voters[None, :]
    again: Bool = answered @ same
    return again


def expected_rises(decided: Float, chance: Float, voters: Index, outlook: Float | None) -> Float:
    """(B, P) expected rise of the best chance held, if each pair ran next; in [0, 1].

    Args:
        decided: (B, P) expected scores by which path 1 decides.
        chance: (B, P) that the pair's answer is right; NaN for a pair without an answer.
        voters: (P,) as of `features.voices`.
        outlook: As of `prospects`; `None`: nothing tells right answers from wrong ones, so a run is
            worth what its pair is expected to score above the best one held.
    """
    answered = np.isfinite(chance)
    holds: Bool = np.any(answered, axis=1)
    best = np.where(answered, chance, 0.0).max(axis=1, initial=0.0).astype(np.float32)
    if outlook is None:
        rises = np.maximum(decided - best[:, None], 0.0)
    else:
        rises = np.where(holds[:, None], prospects(outlook, decided, best), decided)
    return np.where(repeats(answered, voters), 0.0, rises).astype(np.float32)


def gains(
    alpha: Float,
    rise: Float,
    costs_usd: Float,
    spent_usd: Float,
    log_cost_range: NDArray[np.float64],
) -> Float:
    """(B, P) utility that each run is expected to add.

    Args:
        alpha: (B,) in [0, 1].
        rise: (B, P) as `expected_rises` gives them.
        costs_usd: (B, P) expected of a run.
        spent_usd: (B,) so far.
        log_cost_range: (B, 2) as of `utility.cost_range`.
    """
    wide = log_cost_range[:, None, :]
    spent = spent_usd.astype(np.float64)[:, None]
    added = normalised(spent + costs_usd, wide) - normalised(spent, wide)
    return utility(alpha[:, None].astype(np.float64), rise.astype(np.float64), added).astype(
        np.float32
    )


def worths(gained: Float, rise: Float, holds: Bool, legal: Bool) -> Float:
    """(B, P + 2) what each action is worth beside answering, in utility; the rule takes the best.

    Args:
        gained: (B, P) as `gains` gives them.
        rise: (B, P) as `expected_rises` gives them.
        holds: (B,) whether the request holds an answer.
        legal: (B, P + 2) as of `features.legal_actions`.
    """
    num_pairs = gained.shape[1]
    small = holds[:, None] & (rise < LEAST_RISE)
    runs = np.where(small, np.minimum(gained, _TOO_SMALL), gained)
    best = np.where(legal[:, :num_pairs], runs, -1.0).max(axis=1, initial=-1.0)
    others = np.stack([best - _OF_THOUGHT, np.full(len(best), _OF_ANSWER)], axis=1)
    worth: Float = np.concatenate([runs, others], axis=1).astype(np.float32)
    return worth
