"""The words of nano-math's problems: names, things, units and conversions."""

from __future__ import annotations

import random

# fmt: off
NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ines", "Jack", "Kate",
    "Leo", "Maria", "Nina", "Oscar", "Paul", "Rosa", "Sam", "Tina", "Victor", "Wendy", "Yara",
    "Zoe", "Ali", "Bella", "Chen", "Diego", "Elena", "Fatima", "George", "Hana", "Ivan", "Jia",
    "Kofi", "Lena", "Mei", "Noah", "Omar", "Priya", "Quinn", "Ravi", "Sofia", "Tom", "Uma",
    "Vera", "Will", "Tim", "Alice", "Bob", "Lucy", "Mark", "Sara", "John", "Mia", "Liam",
    "Nora", "Peter", "Ella", "Max", "Ruth",
)
# fmt: on
# fmt: off
THINGS = (
    "apples", "pencils", "books", "eggs", "cookies", "marbles", "stamps", "oranges", "pens",
    "cards", "balloons", "cups", "tickets", "flowers", "toys", "coins", "shirts", "bottles",
    "chairs", "stickers", "muffins", "notebooks", "bananas", "candies", "plates", "roses",
    "shells", "beads", "bricks", "cakes", "lemons", "hats", "keys", "lamps", "mugs", "nuts",
    "peaches", "plums", "socks", "towels", "bolts",
)
# fmt: on
_SYLLABLE = (
    ("b", "d", "f", "k", "l", "m", "n", "p", "r", "s", "t", "v", "gr", "st"),
    "aeiou",
    ("", "n", "r"),
)
_INVENTED_SHARE = 0.15
VEHICLES = ("train", "car", "bus", "truck", "cyclist", "plane", "boat", "runner", "bike", "ship")
LENGTHS = ("m", "cm", "meters", "feet", "metres", "inches", "mm", "centimeters")
DISTANCES = (("km", "km/h"), ("miles", "mph"), ("kilometers", "km/h"), ("miles", "miles per hour"))

_UNITS: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (("km", "kilometers"), ("m", "meters"), "1000"),
    (("m", "meters"), ("cm", "centimeters"), "100"),
    (("cm", "centimeters"), ("mm", "millimeters"), "10"),
    (("m", "meters"), ("mm", "millimeters"), "1000"),
    (("kg", "kilograms"), ("g", "grams"), "1000"),
    (("g", "grams"), ("mg", "milligrams"), "1000"),
    (("tonnes",), ("kg", "kilograms"), "1000"),
    (("liters", "L"), ("ml", "milliliters"), "1000"),
    (("hours",), ("minutes",), "60"),
    (("minutes",), ("seconds",), "60"),
    (("days",), ("hours",), "24"),
    (("weeks",), ("days",), "7"),
    (("years",), ("months",), "12"),
    (("feet", "ft"), ("inches",), "12"),
    (("yards",), ("feet", "ft"), "3"),
    (("inches",), ("cm", "centimeters"), "2.54"),
    (("miles",), ("km", "kilometers"), "1.609"),
    (("feet", "ft"), ("m", "meters"), "0.3048"),
    (("pounds", "lb"), ("kg", "kilograms"), "0.4536"),
    (("ounces", "oz"), ("g", "grams"), "28.35"),
    (("gallons",), ("liters", "L"), "3.785"),
    (("kilobytes", "kB"), ("bytes",), "1000"),
    (("dozens", "dozen"), ("pieces",), "12"),
    (("dollars",), ("cents",), "100"),
    (("hours",), ("seconds",), "3600"),
)
"""Larger unit, smaller unit, factor from the first to the second (also backwards)."""


def conversion(rng: random.Random) -> tuple[str, str, str]:
    """A unit, another one, and the operation that converts, for example `*1000`."""
    first, second, factor = rng.choice(_UNITS)
    if rng.random() < 0.5:
        return rng.choice(first), rng.choice(second), f"*{factor}"
    return rng.choice(second), rng.choice(first), f"/{factor}"


def invented(rng: random.Random) -> str:
    """A word that means nothing, so that the model learns to copy numbers past any noun."""
    syllables = ("".join(rng.choice(part) for part in _SYLLABLE) for _ in range(rng.randint(2, 3)))
    return "".join(syllables)


def words(rng: random.Random) -> dict[str, str]:
    """Values for the word slots of a phrasing; some names and things are invented."""
    name, name2 = rng.sample(NAMES, 2)
    thing, thing2 = rng.sample(THINGS, 2)
    if rng.random() < _INVENTED_SHARE:
        name = invented(rng).capitalize()
    if rng.random() < _INVENTED_SHARE:
        thing = f"{invented(rng)}s"
    dist, rate = rng.choice(DISTANCES)
    return {
        "name": name,
        "name2": name2,
        "thing": thing,
        "thing2": thing2,
        "vehicle": rng.choice(VEHICLES),
        "len": rng.choice(LENGTHS),
        "dist": dist,
        "rate": rate,
    }
