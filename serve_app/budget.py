"""What a piece of work may still use: time and dollars.

Budgets form a tree: a child has its own limits, and what a child uses counts against every budget
above it. Before a call the most that the call may cost is reserved; after the call what it did cost
is settled and the rest is given back. So calls side by side cannot pass a limit together, and a
limit is passed only by a call whose engine used more than it was allowed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from serve_app.errors import BudgetExceeded, DeadlineExceeded

_ROUNDING = 1 + 1e-9
"""Sums of floats are off by less than this factor."""


@dataclass(frozen=True)
class Deadline:
    """A point in time by which something must be done."""

    at_s: float
    """Monotonic clock."""

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The deadline that many seconds from now."""
        return cls(time.monotonic() + seconds)

    def remaining_s(self) -> float:
        """Seconds left.

        Raises:
            DeadlineExceeded: If none are.
        """
        left = self.at_s - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the request's deadline has passed")
        return left

    def is_over(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() >= self.at_s

    def sooner(self, seconds: float) -> Deadline:
        """This deadline, or the one that many seconds from now if that comes first."""
        return Deadline(min(self.at_s, time.monotonic() + seconds))


class Budget:
    """Time and dollars of one piece of work; used from one event loop.

    Invariants:
        - What is spent and what is reserved never pass `max_usd` together, here and in every budget
          above, unless a call cost more than was reserved for it.
        - A reservation ends with its `with` block, whatever ends the block.
    """

    def __init__(
        self, deadline: Deadline, max_usd: float | None = None, parent: Budget | None = None
    ) -> None:
        """Begin with nothing spent.

        Args:
            deadline: When the work must be done.
            max_usd: Dollars it may cost; `None` is unlimited.
            parent: The budget that this one draws on.
        """
        self.deadline = deadline
        self._max_usd = math.inf if max_usd is None else max_usd
        self._parent = parent
        self._spent_usd = 0.0
        self._reserved_usd = 0.0

    @property
    def spent_usd(self) -> float:
        """Dollars spent here and below."""
        return self._spent_usd

    @property
    def left_usd(self) -> float:
        """Dollars that can still be reserved, never below 0; infinite where nothing limits them."""
        return max(0.0, min(b._max_usd - b._spent_usd - b._reserved_usd for b in self._line()))

    def child(self, deadline: Deadline, max_usd: float | None = None) -> Budget:
        """A budget that draws on this one.

        Args:
            deadline: The child's own; a later one than this budget's counts as this budget's.
            max_usd: The child's own limit; `None` leaves the limits above it.
        """
        sooner = Deadline(min(deadline.at_s, self.deadline.at_s))
        return Budget(sooner, max_usd, self)

    def reserve(self, usd: float, work: str) -> Reservation:
        """Set aside the most that a call may cost; used as a context manager.

        Args:
            usd: Dollars.
            work: The call in words, for the message.

        Raises:
            BudgetExceeded: If less is left.
        """
        left_usd = self.left_usd
        if usd > left_usd * _ROUNDING:
            raise BudgetExceeded(
                f"atlas.max_cost_usd: {work} may cost {usd:.3g} USD, and {left_usd:.3g} are left",
                "atlas.max_cost_usd",
                usd,
            )
        for budget in self._line():
            budget._reserved_usd += usd
        return Reservation(self, usd)

    def _line(self) -> Iterator[Budget]:
        """This budget and those above it."""
        budget: Budget | None = self
        while budget is not None:
            yield budget
            budget = budget._parent

    def _end(self, reserved_usd: float, cost_usd: float) -> None:
        for budget in self._line():
            budget._reserved_usd -= reserved_usd
            budget._spent_usd += cost_usd


class Reservation:
    """Dollars set aside for one call. Without a settled cost the call counts as free."""

    def __init__(self, budget: Budget, usd: float) -> None:
        """Made by `Budget.reserve`."""
        self._budget = budget
        self._usd = usd
        self._cost_usd = 0.0

    def settle(self, cost_usd: float | None) -> None:
        """Say what the call cost; `None`: not reported, so all that was reserved."""
        self._cost_usd = self._usd if cost_usd is None else cost_usd

    def __enter__(self) -> Self:
        """Nothing to do: the dollars are set aside already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give back what the call did not cost."""
        self._budget._end(self._usd, self._cost_usd)
