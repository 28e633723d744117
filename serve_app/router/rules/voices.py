"""Voices: users' verdicts on one pair, told apart by owner, so that no owner outweighs the others.

In come verdicts, out come their totals in every cell. An owner is an API key. Its voice is its last
few verdicts, however many it gives. The mean in a cell leaves out the owner who says the most for
the pair and the one who says the most against it: the trimmed mean of Yin et al., "Byzantine-robust
distributed learning" (ICML 2018; arXiv 1803.01498). So one or two keys alone change nothing, and
beside others one key moves a mean only within the range of theirs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from serve_app.schemas import LOCAL_OWNER

OWN_DISCOUNT = 0.8
"""Weight that a key's earlier verdicts on a pair keep at each new one of the same key: all of them
together are worth at most five."""
_LEAST_WEIGHT = 0.01
"""Voices worth less than this part of a verdict are forgotten."""
_AT_LEAST_KEYS = 3
"""Keys that it takes to say anything, as two are left out."""
_TINY = np.float32(1e-9)

_Cells = NDArray[np.float32]


class Voices:
    """Who said what of one pair.

    Cell 0 is the pair in general; each verdict counts once there.

    Invariants:
        - The totals depend on the verdicts and their order alone.
        - Where no key is asked for, everybody is one owner, `LOCAL_OWNER`. Its voice is as long as
          `discount` lets it be and is never left out: alone it is a plain discounted sum.
    """

    def __init__(self, num_cells: int, discount: float) -> None:
        """Begin with no verdict.

        Args:
            num_cells: Cells that verdicts fall into.
            discount: Weight in (0, 1) that what the others said keeps at one more verdict. A voice
                that is full already does not grow by another verdict, and discounts nothing.
        """
        self._discount = discount
        self._owners: list[str] = []
        self._counts: _Cells = np.zeros((0, num_cells), np.float32)
        """(num_owners, num_cells)"""
        self._sums: _Cells = np.zeros((0, num_cells), np.float32)

    def add(self, owner: str, counts: _Cells, value: float) -> None:
        """Take in a verdict.

        Args:
            owner: Who gave it.
            counts: (num_cells,) how much it counts in each cell; 1 in cell 0.
            value: What it says, against what was expected.
        """
        if owner not in self._owners:
            self._owners.append(owner)
            nothing = np.zeros((1, len(counts)), np.float32)
            self._counts = np.concatenate([self._counts, nothing])
            self._sums = np.concatenate([self._sums, nothing])
        row = self._owners.index(owner)
        own = self._discount if owner == LOCAL_OWNER else OWN_DISCOUNT
        grows = 1 - (1 - own) * float(self._counts[row, 0])
        factors = np.full((len(self._owners), 1), self._discount**grows, np.float32)
        factors[row] = own
        self._counts *= factors
        self._sums *= factors
        self._counts[row] += counts
        self._sums[row] += counts * np.float32(value)
        self._forget()

    def _forget(self) -> None:
        """Leave out the voices that weigh next to nothing."""
        heard = self._counts[:, 0] >= _LEAST_WEIGHT
        if not heard.all():
            self._owners = [owner for owner, kept in zip(self._owners, heard, strict=True) if kept]
            self._counts, self._sums = self._counts[heard], self._sums[heard]

    def totals(self) -> tuple[_Cells, _Cells]:
        """(num_cells,) how many verdicts count, and the sum of what they say."""
        counts, sums = self._counts, self._sums
        keys = np.array([owner != LOCAL_OWNER for owner in self._owners], np.bool_)
        total, value = counts[~keys].sum(axis=0), sums[~keys].sum(axis=0)
        if keys.any():
            counts, sums = counts[keys], sums[keys]
            middle = ~_extremes(counts, sums)
            heard = np.where(middle, counts, 0).sum(axis=0)
            said = np.where(middle, sums, 0).sum(axis=0)
            # The mean stands for the two that were left out as well, were they like the others.
            times = np.minimum(counts.sum(axis=0) / np.maximum(heard, _TINY), _AT_LEAST_KEYS)
            total, value = total + times * heard, value + times * said
        return total, value


def _extremes(counts: _Cells, sums: _Cells) -> NDArray[np.bool_]:
    """(num_owners, num_cells) the voices of the highest and the lowest mean in each cell."""
    spoke = counts > 0
    means = sums / np.maximum(counts, _TINY)
    highest = np.where(spoke, means, -np.inf).argmax(axis=0)
    # Of equal ones the last, so that they are two wherever two spoke.
    lowest = len(sums) - 1 - np.where(spoke, means, np.inf)[::-1].argmin(axis=0)
    cells = np.arange(sums.shape[1])
    extremes = np.zeros_like(spoke)
    extremes[highest, cells] = extremes[lowest, cells] = True
    return extremes
