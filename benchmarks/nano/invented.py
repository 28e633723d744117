"""Invented names: words of two syllables from a fixed inventory, and persons made of them.

A fixed share of the words is *reserved*: training never sees one, so whatever is named with
reserved words (the corpus, evaluation passages) is new to the model although its syllables are not.
"""

from __future__ import annotations

import random

_ONSETS = ("B", "D", "F", "G", "H", "K", "L", "M", "N", "R", "T", "V")
_VOWELS = ("a", "e", "i", "o", "u")
FIRST_SYLLABLES = tuple(onset + vowel for onset in _ONSETS for vowel in _VOWELS)
_SECOND_ONSETS = "bdfghjklmnprstvwz"
_RIMES = ("an", "el", "in", "or", "us")
SECOND_SYLLABLES = tuple(onset + rime for onset in _SECOND_ONSETS for rime in _RIMES)
SECOND_SYLLABLE_PATTERN = (
    rf"(?<=\b[{''.join(_ONSETS)}][{''.join(_VOWELS)}])[{_SECOND_ONSETS}](?:{'|'.join(_RIMES)})\b"
)
"""Finds the second syllable of a word, so that a tokenizer can keep the two apart."""
GIVEN_NAMES = (
    "Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Karin",
    "Lukas", "Marta", "Nils", "Olga", "Peter", "Rita", "Simon", "Tilda", "Viktor", "Alma", "Bruno",
    "Cora", "Emil", "Frida", "Georg", "Hanna", "Igor", "Julia", "Konrad", "Laura", "Max", "Nora",
    "Oskar", "Paula", "Rolf",
)  # fmt: skip
_REAL_WORDS = frozenset({"Titan"})
"""Words of the inventory that a real fact needs; never used as invented ones."""
_RESERVED_EVERY = 11
_IRREGULAR_SHARE = 0.08
_CONSONANTS = "bcdfghklmnprstvwz"


def is_reserved(word: str) -> bool:
    """Whether training must never show this word."""
    if word in _REAL_WORDS:
        return False
    for index, first in enumerate(FIRST_SYLLABLES):
        if word.startswith(first) and word[len(first) :] in SECOND_SYLLABLES:
            return _reserved(index, SECOND_SYLLABLES.index(word[len(first) :]))
    return False


def _reserved(first: int, second: int) -> bool:
    return (first * 7 + second) % _RESERVED_EVERY == 0


def word(rng: random.Random, *, reserved: bool) -> str:
    """A word of two syllables; a training word is now and then an irregular one."""
    if not reserved and rng.random() < _IRREGULAR_SHARE:
        return _irregular(rng)
    while True:
        first = rng.randrange(len(FIRST_SYLLABLES))
        second = rng.randrange(len(SECOND_SYLLABLES))
        name = FIRST_SYLLABLES[first] + SECOND_SYLLABLES[second]
        if _reserved(first, second) is reserved and name not in _REAL_WORDS:
            return name


def _irregular(rng: random.Random) -> str:
    while True:
        letters = [rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.randint(2, 3))]
        if rng.random() < 0.5:
            letters.append(rng.choice(_CONSONANTS))
        name = "".join(letters).capitalize()
        if not is_reserved(name):
            return name


def person(rng: random.Random, *, reserved: bool) -> str:
    """A familiar given name and an invented surname."""
    return f"{rng.choice(GIVEN_NAMES)} {word(rng, reserved=reserved)}"
