"""Composed list tasks of nano-code: filter, map and reduce over numbers or over words.

One eighth of the compositions that have all three parts is held apart: no training sample, be it a
function or a value question, is ever built from one.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.nano import code_catalog
from benchmarks.nano import code_inputs as inputs
from benchmarks.nano.task import Split

Subject = Literal["numbers", "words"]


@dataclass(frozen=True)
class Filter:
    """Which items stay. `{k}` stands for the constant of the question."""

    name: str
    condition: str
    """Python condition on `x`; empty to keep everything."""
    keeps: Callable[[Any, Any], bool]
    """The same condition another way, on an item and the constant."""
    nouns: tuple[str, ...]
    """Noun phrases for the kept items, after `the`."""


@dataclass(frozen=True)
class Map:
    """What happens to each item. `{m}` stands for the constant of the question."""

    name: str
    expression: str
    """Python expression on `x`."""
    apply: Callable[[Any, Any], Any]
    """The same change another way, on an item and the constant."""
    nouns: tuple[str, ...]
    """Noun phrases around `{np}`, the kept items with their article."""
    verbs: tuple[str, ...]
    """Third-person verb phrases about `them`."""


@dataclass(frozen=True)
class Reduce:
    """What the items become together."""

    name: str
    code: str
    """Statements with `{gen}` (the inside of a generator); the last line starts with `return`."""
    apply: Callable[[list[Any]], Any]
    """The same result another way."""
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]


def _filters(part: str, keeps: dict[str, Callable[[Any, Any], bool]]) -> tuple[Filter, ...]:
    return tuple(
        Filter(
            name,
            code_catalog.text(part, name, "condition"),
            keep,
            code_catalog.wordings(part, name, "nouns"),
        )
        for name, keep in keeps.items()
    )


def _maps(part: str, changes: dict[str, Callable[[Any, Any], Any]]) -> tuple[Map, ...]:
    return tuple(
        Map(
            name,
            code_catalog.text(part, name, "expression"),
            change,
            code_catalog.wordings(part, name, "nouns"),
            code_catalog.wordings(part, name, "verbs"),
        )
        for name, change in changes.items()
    )


def _reduces(part: str, results: dict[str, Callable[[list[Any]], Any]]) -> tuple[Reduce, ...]:
    return tuple(
        Reduce(
            name,
            code_catalog.code(part, name),
            result,
            code_catalog.wordings(part, name, "nouns"),
            code_catalog.wordings(part, name, "verbs"),
        )
        for name, result in results.items()
    )


_NUMBER_FILTERS = _filters(
    "number_filters",
    {
        "all": lambda x, k: True,
        "even": lambda x, k: not x & 1,
        "odd": lambda x, k: bool(x & 1),
        "positive": lambda x, k: x >= 1,
        "negative": lambda x, k: x <= -1,
        "greater": lambda x, k: x >= k + 1,
        "less": lambda x, k: x <= k - 1,
        "at_least": lambda x, k: x > k - 1,
        "divisible": lambda x, k: x // k * k == x,
        "not_divisible": lambda x, k: x // k * k != x,
    },
)
_NUMBER_MAPS = _maps(
    "number_maps",
    {
        "same": lambda x, m: x,
        "square": lambda x, m: x**2,
        "cube": lambda x, m: x * x * x,
        "double": lambda x, m: x + x,
        "times": lambda x, m: m * x,
        "plus": lambda x, m: m + x,
        "minus": lambda x, m: -m + x,
        "negate": lambda x, m: 0 - x,
        "absolute": lambda x, m: max(x, -x),
        "last_digit": lambda x, m: int(str(x)[-1]),
        "remainder": lambda x, m: x - x // m * m,
    },
)
_NUMBER_REDUCES = _reduces(
    "number_reduces",
    {
        "sum": math.fsum,
        "product": math.prod,
        "max": lambda v: sorted(v)[-1],
        "min": lambda v: sorted(v)[0],
        "count_distinct": lambda v: len(dict.fromkeys(v)),
        "list": list,
        "ascending": lambda v: sorted(v, reverse=True)[::-1],
        "descending": lambda v: sorted(v)[::-1],
    },
)
_WORD_FILTERS = _filters(
    "word_filters",
    {
        "all": lambda x, k: True,
        "longer": lambda x, k: len(x) >= k + 1,
        "shorter": lambda x, k: len(x) <= k - 1,
        "starting": lambda x, k: x[0] == k,
        "ending": lambda x, k: x[-1] == k,
        "containing": lambda x, k: x.count(k) > 0,
        "lacking": lambda x, k: x.count(k) == 0,
    },
)
_WORD_MAPS = _maps(
    "word_maps",
    {
        "same": lambda x, m: x,
        "upper": lambda x, m: "".join(c.upper() for c in x),
        "reversed": lambda x, m: "".join(reversed(x)),
        "capitalized": lambda x, m: x[0].upper() + x[1:],
        "first": lambda x, m: x[:1],
        "last": lambda x, m: x[len(x) - 1],
        "doubled": lambda x, m: x + x,
        "length": lambda x, m: sum(1 for _ in x),
    },
)
_TEXT_REDUCES = _reduces(
    "text_reduces",
    {
        "list": list,
        "sorted": lambda v: sorted(v, reverse=True)[::-1],
        "spaces": lambda v: "".join(f" {x}" for x in v)[1:],
        "commas": lambda v: "".join(f",{x}" for x in v)[1:],
        "glued": lambda v: "".join(f"{x}" for x in v),
    },
)
_COUNT = _reduces("count", {"count": len})[0]
_LENGTH_REDUCES = tuple(
    r for r in _NUMBER_REDUCES if r.name in {"sum", "max", "min", "list", "ascending"}
)


@dataclass(frozen=True)
class Composition:
    """A filter, a map and a reduce over numbers or words, with the constants of one question."""

    subject: Subject
    filter: Filter
    map: Map
    reduce: Reduce
    k: int | str
    m: int

    @property
    def key(self) -> str:
        """Identity of the composition, without its constants."""
        return "/".join((self.subject, self.filter.name, self.map.name, self.reduce.name))

    def _fill(self, text: str) -> str:
        return text.replace("{k}", str(self.k)).replace("{m}", str(self.m))

    def body(self, variable: str) -> str:
        """Statements over the list `variable` ending in a `return` line."""
        condition = f" if {self.filter.condition}" if self.filter.condition else ""
        bare = f"x in {variable}{condition}"
        identity = not condition and self.map.name == "same"
        code = self.reduce.code
        if identity:
            code = code.replace("[{gen}]", variable).replace("{gen}", variable)
        generator = f"{self.map.expression} for {bare}"
        return self._fill(code.replace("{bare}", bare).replace("{gen}", generator))

    def result(self, items: list[Any]) -> Any:
        """The value by the reference route; `None` where it is undefined (an empty maximum)."""
        kept = [self.map.apply(x, self.m) for x in items if self.filter.keeps(x, self.k)]
        if not kept and self.reduce.name in {"max", "min"}:
            return None
        value = self.reduce.apply(kept)
        return int(value) if isinstance(value, float) else value

    def noun(self, rng: random.Random, where: str) -> str:
        """A noun phrase for the result; `where` is for example `in a list`, or empty."""
        kept = rng.choice(self.filter.nouns)
        if self.reduce.name == "count":
            text = rng.choice(self.reduce.nouns).replace("{x}", kept)
            return self._fill(f"{text} {where}".strip())
        mapped, reduced = rng.choice(self.map.nouns), rng.choice(self.reduce.nouns)
        open_ended = mapped.endswith("{np}") and reduced.endswith("{x}")
        place_first = not open_ended or rng.random() < 0.35
        np = f"the {kept} {where}".strip() if place_first else f"the {kept}"
        text = reduced.replace("{x}", mapped.replace("{np}", np))
        return self._fill(text if place_first else f"{text} {where}".strip())

    def pipeline(self, rng: random.Random, source: str) -> list[str]:
        """Third-person steps: keep, change, combine; `source` is for example `a list`."""
        kept = rng.choice(self.filter.nouns)
        keep = rng.choice(
            (
                "takes the {} of {}",
                "keeps the {} of {}",
                "picks the {} in {}",
                "selects the {} from {}",
            )
        )
        steps = [keep.format(kept, source)]
        if self.map.verbs:
            steps.append(rng.choice(self.map.verbs))
        steps.append(rng.choice(self.reduce.verbs))
        return [self._fill(step) for step in steps]


def joined(steps: list[str]) -> str:
    """`a, b and c`."""
    return f"{', '.join(steps[:-1])} and {steps[-1]}"


def is_held_out(key: str) -> bool:
    """Whether training never uses the composition: one eighth of those with all three parts."""
    _, kept, mapped, _ = key.split("/")
    return kept != "all" and mapped != "same" and zlib.crc32(key.encode()) % 8 == 0


def _draw(rng: random.Random, subject: Subject) -> Composition:
    if subject == "numbers":
        kept = rng.choice(_NUMBER_FILTERS[1:] if rng.random() < 0.9 else _NUMBER_FILTERS[:1])
        mapped = rng.choice(_NUMBER_MAPS[1:] if rng.random() < 0.8 else _NUMBER_MAPS[:1])
        reduced = rng.choice(_NUMBER_REDUCES)
        divides = kept.name in {"divisible", "not_divisible"}
        k: int | str = (
            rng.randint(2, 9) if divides else rng.choice((rng.randint(2, 20), rng.randint(2, 99)))
        )
        if mapped.name == "same" and kept.name != "all" and rng.random() < 0.3:
            reduced = _COUNT
    else:
        kept = rng.choice(_WORD_FILTERS[1:] if rng.random() < 0.9 else _WORD_FILTERS[:1])
        mapped = rng.choice(_WORD_MAPS[1:] if rng.random() < 0.8 else _WORD_MAPS[:1])
        reduced = rng.choice(_LENGTH_REDUCES if mapped.name == "length" else _TEXT_REDUCES)
        by_length = kept.name in {"longer", "shorter"}
        k = rng.randint(4, 8) if by_length else rng.choice("abcdefghiklmnoprstu")
        if mapped.name == "same" and kept.name != "all" and rng.random() < 0.3:
            reduced = _COUNT
    return Composition(subject, kept, mapped, reduced, k, rng.randint(2, 12))


def draw_composition(
    rng: random.Random, split: Split, subject: Subject | None = None
) -> Composition:
    """A random composition: a trained one for `seen`, an unseen one for `held_out`."""
    while True:
        chosen = subject or ("numbers" if rng.random() < 0.65 else "words")
        composition = _draw(rng, chosen)
        trivial = composition.filter.name == "all" and composition.map.name == "same"
        if not trivial and is_held_out(composition.key) == (split == "held_out"):
            return composition


def draw_items(rng: random.Random, composition: Composition) -> list[Any]:
    """A list for `composition`, long enough for its filter to matter and its result to exist."""
    for _ in range(50):
        items = _items(rng, composition)
        kept = sum(composition.filter.keeps(x, composition.k) for x in items)
        if kept >= 2 or (kept and rng.random() < 0.3):
            return items
    return [*items, _matching(composition)]


def _items(rng: random.Random, composition: Composition) -> list[Any]:
    if composition.subject == "numbers":
        negative = composition.filter.name in {"positive", "negative"} or rng.random() < 0.2
        return inputs.numbers(rng, 4, 8, negative=negative)
    items = inputs.words(rng, 3, 5)
    if isinstance(composition.k, str) and rng.random() < 0.8:
        spot = rng.randrange(len(items))
        letter = composition.k
        items[spot] = (
            items[spot] + letter if composition.filter.name == "ending" else letter + items[spot]
        )
    return items


def _matching(composition: Composition) -> Any:
    """Some item that the filter keeps."""
    k = composition.k
    candidates: list[Any] = list(range(999, -200, -1))
    if composition.subject == "words":
        candidates = [f"{k}a{k}", *inputs.WORDS]
    return next(x for x in candidates if composition.filter.keeps(x, k))
