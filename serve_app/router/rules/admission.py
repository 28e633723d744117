"""Which candidates a request admits: the caller's lists, dollars and seconds; for every rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.schemas import Limits, Pair

_Floats = NDArray[np.floating[Any]]
_Indices = NDArray[np.intp]


class Admission:
    """Holds candidates against limits; candidates are addressed by their index.

    Invariant: one thread at a time.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        """Lay out the names.

        Args:
            pairs: Every pair that a rule knows.
        """
        self._index = {pair: i for i, pair in enumerate(pairs)}
        self._models = np.array([pair.model_id for pair in pairs])
        self._tools = np.array([pair.tool_id for pair in pairs])
        self._available: tuple[Pair, ...] = ()
        self._available_index: _Indices = np.zeros(0, np.intp)

    def available(self, pairs: tuple[Pair, ...]) -> _Indices:
        """Indices of those pairs that the rule knows, in their order."""
        # The pool changes rarely; comparing it costs less than indexing it anew.
        if self._available is not pairs and self._available != pairs:
            self._available = pairs
            self._available_index = np.array(
                [self._index[pair] for pair in pairs if pair in self._index], np.intp
            )
        return self._available_index

    def listed(self, limits: Limits, indices: _Indices) -> NDArray[np.bool_]:
        """(len(indices),) whether the caller's lists of models and tools admit these pairs."""
        listed = np.ones(len(indices), np.bool_)
        if limits.models is not None:
            listed &= np.isin(self._models[indices], list(limits.models))
        if limits.tools is not None:
            listed &= np.isin(self._tools[indices], list(limits.tools))
        return listed


def affordable(limits: Limits, costs_usd: _Floats) -> NDArray[np.bool_]:
    """Whether each run is expected to stay within the caller's dollars.

    Args:
        limits: What the caller allows.
        costs_usd: (num_pairs,) expected of a run.
    """
    if limits.max_cost_usd is None:
        return np.ones(len(costs_usd), np.bool_)
    within: NDArray[np.bool_] = costs_usd <= limits.max_cost_usd
    return within


def in_time(limits: Limits, seconds: _Floats) -> NDArray[np.bool_]:
    """Whether each run is expected to end before the deadline.

    Where none is, the fastest one counts as in time: a caller in a hurry would rather have an
    attempt than a refusal.

    Args:
        limits: What the caller allows; seconds from now on.
        seconds: (num_pairs,) expected of a run; 0 where unknown, which is always in time.
    """
    within: NDArray[np.bool_] = seconds <= limits.deadline_s
    if len(within) and not within.any():
        within[seconds.argmin()] = True
    return within
