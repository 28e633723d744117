"""Random inputs for nano-code: words, strings, numbers and lists.

Everything is drawn from the caller's `random.Random`, so a seed fixes every sample.
"""

from __future__ import annotations

import random

_COMMON = """
apple banana cherry orange lemon melon peach plum grape mango carrot onion pepper potato tomato
river mountain valley forest desert island ocean harbor meadow garden castle bridge tower temple
tiger lion zebra giraffe monkey rabbit badger otter falcon eagle pigeon sparrow dolphin whale
brontosaurus elephant crocodile butterfly dragonfly hedgehog kangaroo penguin tortoise octopus
table chair window mirror carpet pillow blanket kettle bottle basket hammer pencil paper letter
silver golden copper bronze marble velvet cotton leather crystal diamond winter summer autumn
spring morning evening midnight thunder lightning rainbow shadow whisper journey planet comet
galaxy rocket engine wheel piston turbine circuit signal keyboard monitor printer library
teacher student doctor farmer sailor painter writer singer dancer baker miller tailor captain
music violin trumpet guitar piano melody rhythm chorus orchestra symphony puzzle riddle mystery
cat dog sun sky tree leaf rock fish bird milk bread rice salt tea cup hat box key map pen ink
red blue green black white brown quick slow small large happy quiet brave clever gentle proud
jump walk swim climb throw catch build write read sing dance sleep dream laugh think speak
the and with over under into from
mississippi programming algorithm variable statement recursion committee bookkeeper
banjo igloo umbrella yellow avocado zucchini quartz jigsaw oxygen hydrogen nitrogen helium
"""
WORDS: tuple[str, ...] = tuple(_COMMON.split())
"""Common words that strings in questions are made of; invented words are mixed in."""

_ONSETS = (
    "b",
    "c",
    "d",
    "f",
    "g",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "w",
    "z",
    "br",
    "cl",
    "dr",
    "fl",
    "gr",
    "pl",
    "st",
    "tr",
    "sh",
    "ch",
)
_VOWELS = ("a", "e", "i", "o", "u", "a", "e", "i", "o", "ai", "ee", "oo", "ou")
_CODAS = ["", "", "", "n", "r", "s", "t", "l", "m", "nd", "ck"]


def word(rng: random.Random) -> str:
    """A common word, or (in three cases of ten) an invented pronounceable one."""
    if rng.random() < 0.7:
        return rng.choice(WORDS)
    syllables = rng.choice((1, 2, 2, 2, 3))
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables)
    )


def words(rng: random.Random, low: int = 3, high: int = 6) -> list[str]:
    """Between `low` and `high` words."""
    return [word(rng) for _ in range(rng.randint(low, high))]


def phrase(rng: random.Random, low: int = 2, high: int = 4) -> str:
    """Lower-case words joined by single spaces."""
    return " ".join(words(rng, low, high))


def number(rng: random.Random, *, negative: bool = False) -> int:
    """A whole number of one to three digits; with `negative`, below zero in three cases of ten."""
    digits = rng.choice((1, 1, 2, 2, 2, 3))
    value = rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)
    return -value if negative and rng.random() < 0.3 else value


def numbers(
    rng: random.Random, low: int = 3, high: int = 8, *, negative: bool = False
) -> list[int]:
    """Between `low` and `high` whole numbers of one to three digits."""
    return [number(rng, negative=negative) for _ in range(rng.randint(low, high))]


def small_numbers(rng: random.Random, low: int = 3, high: int = 8, top: int = 12) -> list[int]:
    """Numbers from 1 to `top`, so that repeats occur."""
    return [rng.randint(1, top) for _ in range(rng.randint(low, high))]


def ordinal(n: int) -> str:
    """The number as `1st`, `2nd`, `3rd`, `4th`, `11th`, `21st`."""
    suffix = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"
