"""Which candidates a request admits, for every rule.

What they can take comes first, then the caller's lists, dollars and seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.capabilities import UNKNOWN, Capabilities, Needs
from serve_app.schemas import Limits, Pair

Abilities = Mapping[Pair, Capabilities]
"""What candidates can take; one that is not in it is unknown. Never changed, but replaced."""
NO_ABILITIES: Abilities = {}
"""Nothing is known of anyone."""

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
        self._pairs = tuple(pairs)
        self._index = {pair: i for i, pair in enumerate(pairs)}
        self._models = np.array([pair.model_id for pair in pairs])
        self._tools = np.array([pair.tool_id for pair in pairs])
        self._available: tuple[Pair, ...] = ()
        self._available_index: _Indices = np.zeros(0, np.intp)
        self._use(NO_ABILITIES)

    def available(self, pairs: tuple[Pair, ...]) -> _Indices:
        """Indices of those pairs that the rule knows, in their order."""
        # The pool changes rarely; comparing it costs less than indexing it anew.
        if self._available is not pairs and self._available != pairs:
            self._available = pairs
            self._available_index = np.array(
                [self._index[pair] for pair in pairs if pair in self._index], np.intp
            )
        return self._available_index

    def admits(self, limits: Limits, indices: _Indices, abilities: Abilities) -> NDArray[np.bool_]:
        """(len(indices),) whether the request's needs and lists of names admit these pairs.

        Args:
            limits: What the request needs, and what the caller allows.
            indices: Of the pairs.
            abilities: What the pool's candidates can take.
        """
        return self.able(limits.needs, indices, abilities) & self.listed(limits, indices)

    def listed(self, limits: Limits, indices: _Indices) -> NDArray[np.bool_]:
        """(len(indices),) whether the request's lists of names admit these pairs.

        Args:
            limits: What the caller allows.
            indices: Of the pairs.
        """
        listed = np.ones(len(indices), np.bool_)
        if limits.models is not None:
            listed &= np.isin(self._models[indices], list(limits.models))
        if limits.tools is not None:
            listed &= np.isin(self._tools[indices], list(limits.tools))
        if limits.without:
            listed &= ~np.isin(self._models[indices], list(limits.without))
        if limits.candidates is not None:
            named = limits.candidates
            listed &= np.array([self._pairs[index] in named for index in indices], np.bool_)
        return listed

    def able(self, needs: Needs, indices: _Indices, abilities: Abilities) -> NDArray[np.bool_]:
        """(len(indices),) whether these pairs can take what a request needs.

        Args:
            needs: Of the request.
            indices: Of the pairs.
            abilities: What the pool's candidates can take.
        """
        if self._abilities is not abilities:
            self._use(abilities)
        able = np.ones(len(indices), np.bool_)
        for is_needed, can in (
            (needs.vision, self._vision),
            (needs.json_schema, self._json_schema),
            (needs.tools, self._tools_of_callers),
        ):
            if is_needed:
                able &= can[indices]
        if not needs.vision and not self._all_take_text:
            able &= self._text_alone[indices]
        if needs.prompt_tokens > self._least_context:
            able &= self._context[indices] >= needs.prompt_tokens
        return able

    def _use(self, abilities: Abilities) -> None:
        """Lay out what the candidates can take."""
        known = [abilities.get(pair, UNKNOWN) for pair in self._pairs]
        self._abilities = abilities
        self._vision = np.array([of.vision for of in known], np.bool_)
        self._json_schema = np.array([of.json_schema for of in known], np.bool_)
        self._tools_of_callers = np.array([of.tools for of in known], np.bool_)
        self._context = np.array([of.context_tokens for of in known])
        self._text_alone = np.array([of.text_alone for of in known], np.bool_)
        self._all_take_text = bool(self._text_alone.all())
        self._least_context = min((of.context_tokens for of in known), default=0.0)


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
