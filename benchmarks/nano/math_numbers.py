"""The numbers of nano-math's problems, as written: counts, decimals, prices, percentages."""

from __future__ import annotations

import random


def whole(rng: random.Random, max_digits: int, least: int = 2) -> int:
    """A whole number; its count of digits is uniform, so short and long ones are both common."""
    digits = rng.randint(1, max_digits)
    return max(least, rng.randint(10 ** (digits - 1), 10**digits - 1))


def decimal(rng: random.Random, max_digits: int, places: int = 1) -> str:
    """A decimal number, without trailing zeros."""
    return f"{whole(rng, max_digits)}.{rng.randint(1, 10**places - 1):0{places}d}".rstrip("0")


def number(rng: random.Random, max_digits: int, decimal_share: float = 0.25) -> str:
    """A whole or decimal number."""
    if rng.random() < decimal_share:
        return decimal(rng, max_digits, rng.choice((1, 1, 2)))
    return str(whole(rng, max_digits))


def price(rng: random.Random, max_whole: int = 60) -> str:
    """A price: whole dollars or with cents."""
    dollars = rng.randint(1, max_whole)
    if rng.random() < 0.5:
        return str(dollars + 1)
    return f"{dollars}.{rng.choice((25, 50, 75, 99, 95, 5, 10, 20, 40, rng.randint(1, 99))):02d}"


def percent(rng: random.Random) -> str:
    """A percentage, mostly a whole one."""
    if rng.random() < 0.15:
        return f"{rng.randint(1, 30)}.{rng.randint(1, 9)}"
    return str(rng.choice((5, 10, 15, 20, 25, rng.randint(1, 99), rng.randint(1, 99))))


def rate(rng: random.Random) -> str:
    """A yearly rate of interest."""
    if rng.random() < 0.4:
        return f"{rng.randint(1, 9)}.{rng.choice((5, 2, 8, 25, 75))}"
    return str(rng.randint(1, 15))


def money(rng: random.Random) -> str:
    """A sum of money, often a round one."""
    roll = rng.random()
    if roll < 0.4:
        return str(rng.randint(2, 99) * rng.choice((10, 50, 100)))
    return str(rng.randint(20, 9999)) if roll < 0.8 else price(rng, 400)
