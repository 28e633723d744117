"""Who votes: candidates that never differed in the profile are one voter."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rl.fit.dataset import Dataset
from serve_app.router.policy.features import NO_ANSWER
from serve_app.tools.builtin.best_of import answer_key

_LEAST_SHARED = 20
"""Questions that two candidates have to have answered alike before they count as one."""


def voters_of(keys: NDArray[np.intp]) -> NDArray[np.intp]:
    """(P,) of each candidate the first one that it never differed from.

    Args:
        keys: (N, P) equal within a query for answers that say the same; `NO_ANSWER` for none.
    """
    given = keys != NO_ANSWER
    voters = np.arange(keys.shape[1])
    for pair in range(1, keys.shape[1]):
        for other in range(pair):
            both = given[:, pair] & given[:, other]
            if both.sum() >= _LEAST_SHARED and (keys[both, pair] == keys[both, other]).all():
                voters[pair] = voters[other]
                break
    return voters


def answer_keys(dataset: Dataset) -> NDArray[np.intp]:
    """(N, P) keys of the answers of a profile, as `voters_of` takes them."""
    outcomes = dataset.outcomes
    keys = np.full((len(outcomes.embeddings), len(outcomes.pairs)), NO_ANSWER, np.intp)
    said: dict[tuple[int, str], int] = {}
    places = zip(outcomes.query_index.tolist(), outcomes.pair_index.tolist(), strict=True)
    for (query, pair), answer in zip(places, dataset.answers, strict=True):
        key = answer_key(answer)
        if key is not None:
            keys[query, pair] = said.setdefault((query, key), len(said))
    return keys
