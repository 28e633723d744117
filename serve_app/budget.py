"""What a piece of work may still use: time, dollars, tokens, calls of models and of tools.

Budgets form a tree: a child has its own caps, and what a child uses counts against every budget
above it. Before a call the most that the call may use is reserved; after the call what it did use
is settled and the rest is given back. So calls side by side cannot pass a cap together, and a cap
is passed only by a call whose engine used more than it was allowed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

from serve_app.errors import BudgetExceeded, DeadlineExceeded
from serve_app.schemas import Usage

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


class Use(NamedTuple):
    """The most that one call may use."""

    usd: float = 0.0
    tokens: float = 0.0
    """Of prompts and completions."""
    model_calls: float = 0.0
    tool_calls: float = 0.0


class Caps(NamedTuple):
    """The most that all calls of a budget may use together; the fields are those of `Use`."""

    usd: float = math.inf
    tokens: float = math.inf
    model_calls: float = math.inf
    tool_calls: float = math.inf


UNLIMITED = Caps()

_NAMES = {
    "usd": ("cost {:.3g} USD", "atlas.max_cost_usd"),
    "tokens": ("take {:.0f} tokens", None),
    "model_calls": ("take {:.0f} calls of models", None),
    "tool_calls": ("take {:.0f} calls of tools", None),
}
"""Of each field: how it reads in a message, and the request's field that sets it."""


class Budget:
    """What one piece of work may use; used from one event loop.

    Invariants:
        - What is spent and what is reserved never pass a cap together, here and in every budget
          above, unless a call used more than was reserved for it.
        - A reservation ends with its `with` block, whatever ends the block.
        - A child has no more time than the budget above it.
    """

    def __init__(
        self, deadline: Deadline, caps: Caps = UNLIMITED, parent: Budget | None = None
    ) -> None:
        """Begin with nothing used.

        Args:
            deadline: When the work must be done.
            caps: What it may use.
            parent: The budget that this one draws on.
        """
        self.deadline = deadline
        self._caps = caps
        self._parent = parent
        self._spent = Use()
        self._reserved = Use()

    @property
    def spent(self) -> Use:
        """What was used here and below."""
        return self._spent

    @property
    def left(self) -> Caps:
        """What can still be reserved, never below 0; infinite: nothing limits it."""
        left = UNLIMITED
        for budget in self._line():
            left = Caps(
                *(
                    min(least, max(0.0, cap - spent - reserved))
                    for least, cap, spent, reserved in zip(
                        left, budget._caps, budget._spent, budget._reserved, strict=True
                    )
                )
            )
        return left

    def child(self, deadline: Deadline | None = None, caps: Caps = UNLIMITED) -> Budget:
        """A budget that draws on this one.

        Args:
            deadline: The child's own, if it is sooner than this budget's.
            caps: The child's own; those above it hold too.
        """
        at_s = self.deadline.at_s if deadline is None else min(deadline.at_s, self.deadline.at_s)
        return Budget(Deadline(at_s), caps, self)

    def part(self, share: float) -> Budget:
        """A child that has this share of the time left."""
        return self.child(self.deadline.sooner(share * max(self.seconds_left, 0.0)))

    @property
    def seconds_left(self) -> float:
        """Seconds to the deadline; below 0: it has passed."""
        return self.deadline.at_s - time.monotonic()

    @property
    def is_metered(self) -> bool:
        """Whether something limits dollars or tokens, here or above: calls have to be measured."""
        return any(budget._is_metered for budget in self._line())

    @property
    def _is_metered(self) -> bool:
        return math.isfinite(self._caps.usd) or math.isfinite(self._caps.tokens)

    async def hold(self, most: Use, work: str) -> Reservation:
        """As `reserve`, and a budget above that has to ask for more does so before.

        Raises:
            BudgetExceeded: If less is left.
            AtlasError: What else asking for more fails with.
        """
        for budget in self._line():
            await budget._cover(most, work)
        return self.reserve(most, work)  # at once: nothing ran since the last budget was asked

    async def _cover(self, most: Use, work: str) -> None:
        """Have what a call may use, where that is to be had by asking."""

    def reserve(self, most: Use, work: str) -> Reservation:
        """Set aside the most that a call may use; the result is a context manager.

        Args:
            most: What the call may use.
            work: The call in words, for the message.

        Raises:
            BudgetExceeded: If less is left.
        """
        for name, wanted, left in zip(Use._fields, most, self.left, strict=True):
            if wanted > left * _ROUNDING:
                words, param = _NAMES[name]
                limit = f"{param}: " if param else ""
                raise BudgetExceeded(
                    f"{limit}{work} may {words.format(wanted)}, and {left:.3g} are left",
                    param,
                    wanted,
                    name,
                )
        for budget in self._line():
            budget._reserved = _sum(budget._reserved, most)
        return Reservation(self, most)

    def _line(self) -> Iterator[Budget]:
        """This budget and those above it."""
        budget: Budget | None = self
        while budget is not None:
            yield budget
            budget = budget._parent

    def _end(self, reserved: Use, used: Use) -> None:
        for budget in self._line():
            budget._reserved = _sum(budget._reserved, reserved, -1.0)
            budget._spent = _sum(budget._spent, used)


def _sum(first: Use, second: Use, sign: float = 1.0) -> Use:
    return Use(*(a + sign * b for a, b in zip(first, second, strict=True)))


class Reservation:
    """What is set aside for one call.

    A call that is not settled counts as made, and as free of dollars and tokens.
    """

    def __init__(self, budget: Budget, most: Use) -> None:
        """Made by `Budget.reserve`."""
        self._budget = budget
        self._most = most
        self._used = most._replace(usd=0.0, tokens=0.0)

    def settle(self, usage: Usage | None) -> None:
        """Say what the call used; `None`: not reported, so all that was reserved."""
        self._used = (
            self._most
            if usage is None
            else self._most._replace(
                usd=usage.cost_usd, tokens=usage.prompt_tokens + usage.completion_tokens
            )
        )

    def __enter__(self) -> Self:
        """Nothing to do: the amounts are set aside already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give back what the call did not use."""
        self._budget._end(self._most, self._used)
