"""A purse in front of a scripted store: what is drawn, when, and what is refused."""

from __future__ import annotations

import asyncio
import math
import random
import time

import pytest

from serve_app.budget import Budget, Deadline, Use
from serve_app.errors import BudgetExceeded, QuotaExceeded, QuotaUnknown
from serve_app.purse import Purse
from serve_app.schemas import Usage
from serve_app.store import Amounts, Grant, Period, Refusal


class Till:
    """Gives dollars in slices until there are none.

    Attributes:
        left: Dollars.
        draws: What was asked for.
    """

    def __init__(self, left: float, part: float = 0.1) -> None:
        self.left = left
        self.draws: list[Amounts] = []
        self.is_away = False
        self.is_lost = False
        self._part = part

    async def draw(self, lease_id: str, needed: Amounts) -> Grant | Refusal:
        self.draws.append(needed)
        await asyncio.sleep(0)
        if self.is_away:
            raise QuotaUnknown("away")
        if self.left <= 1e-9 or needed.usd > self.left + 1e-9:
            return Refusal(Period.DAY, "usd", 1.0, 1.0 - self.left, 0.0, time.time() + 60)
        usd = max(needed.usd, min(self.left, self._part)) if needed.usd else 0.0
        self.left -= usd
        return Grant(Amounts(usd, math.inf, math.inf), math.inf, self.is_lost)


def purse_of(till: Till, safe_s: float = 60.0) -> Purse:
    return Purse("lease_1", till.draw, safe_s)


def request(purse: Purse, usd: float = math.inf) -> Budget:
    """The budget of a request that is paid from a purse."""
    return Budget(Deadline.after(30), parent=purse)


async def pay(purse: Purse, most: float, usd: float) -> None:
    with await request(purse).hold(Use(most), "a call") as held:
        await asyncio.sleep(0)
        held.settle(Usage(0, 0, usd))


async def test_calls_are_paid_from_the_purse_until_it_is_empty() -> None:
    till = Till(1.0)
    purse = purse_of(till)
    for _ in range(20):
        await pay(purse, 0.01, 0.01)
    assert len(till.draws) == 2
    await pay(purse, 0.5, 0.1)
    assert till.left == pytest.approx(0.3)
    assert len(till.draws) == 3


@pytest.mark.parametrize("seed", range(20))
async def test_calls_side_by_side_never_spend_more_than_there_is(seed: int) -> None:
    chance, till = random.Random(seed), Till(1.0)
    purse = purse_of(till)
    spent: list[float] = []

    async def one() -> None:
        most = chance.random() * 0.2
        try:
            usd = most * chance.random()
            await pay(purse, most, usd)
            spent.append(usd)
        except QuotaExceeded:
            pass

    await asyncio.gather(*(one() for _ in range(60)))
    assert sum(spent) <= 1.0
    assert purse.spent.usd == pytest.approx(sum(spent))
    assert len(spent) > 5


async def test_a_refusal_says_what_is_wanted_and_when_to_come_back() -> None:
    purse = purse_of(Till(0.25))
    with pytest.raises(QuotaExceeded, match=r"1 USD per day: 0\.75 USD are spent.*0\.5 USD") as no:
        await pay(purse, 0.5, 0.5)
    assert 0 < no.value.retry_after_s <= 60
    assert (no.value.status_code, no.value.cap, no.value.needed) == (429, "usd", 0.5)


async def test_the_store_is_not_asked_again_at_once_for_what_it_has_refused() -> None:
    till = Till(0.25)
    purse = purse_of(till)
    for _ in range(10):
        with pytest.raises(QuotaExceeded):
            await pay(purse, 0.5, 0.5)
    assert len(till.draws) == 1
    await pay(purse, 0.2, 0.2)  # less may fit
    assert len(till.draws) == 2


async def test_an_empty_purse_lets_nobody_in() -> None:
    purse = purse_of(Till(0.0))
    with pytest.raises(QuotaExceeded):
        await purse.admit()


async def test_letting_a_request_in_draws_no_dollars() -> None:
    till = Till(1.0)
    await purse_of(till).admit()
    assert till.left == 1.0


async def test_without_the_store_what_is_in_the_purse_is_spent_and_no_more() -> None:
    till = Till(1.0)
    purse = purse_of(till)
    await pay(purse, 0.02, 0.02)
    till.is_away = True
    await purse.admit()
    await pay(purse, 0.05, 0.05)
    with pytest.raises(QuotaUnknown):
        await pay(purse, 0.5, 0.5)


async def test_a_lease_that_was_not_renewed_is_drawn_anew() -> None:
    till = Till(1.0)
    purse = purse_of(till, safe_s=-1.0)
    till.is_lost = True
    with pytest.raises(QuotaUnknown):  # never safe: nothing may be paid
        await pay(purse, 0.02, 0.02)
    till.is_away = True
    with pytest.raises(QuotaUnknown):
        await purse.admit()


async def test_what_was_held_of_a_lost_lease_is_not_spent() -> None:
    till = Till(1.0)
    purse = purse_of(till)
    await pay(purse, 0.02, 0.02)  # 0.08 are left of the slice
    till.is_lost = True
    await pay(purse, 0.1, 0.1)  # drawn anew: only what this draw gave
    draws = len(till.draws)
    till.is_lost = False
    await pay(purse, 0.05, 0.05)
    assert len(till.draws) == draws + 1


async def test_the_request_s_own_cap_comes_first() -> None:
    purse = purse_of(Till(1.0))
    own = request(purse).child()
    with pytest.raises(BudgetExceeded):
        await Budget(Deadline.after(1), own._caps._replace(usd=0.1), own).hold(Use(0.2), "a call")
