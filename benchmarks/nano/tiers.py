"""Questions and sources of `configs/nano-tiers.yaml`, the pool on which further steps matter.

Thirteen domains, so that leaving one out says something, and two incomplete sets of sources: what
the library does not tell, the archive may.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from benchmarks.nano.composed import COMPOUND_KINDS, HOP_KINDS, compound_fields
from benchmarks.nano.gazetteer import build_corpus
from benchmarks.nano.labelled import labelled
from benchmarks.nano.registry import question_source
from benchmarks.nano.task import Split
from serve_app import questions as profiling
from serve_app.errors import ConfigError

FOLDER = Path(__file__).parents[2] / "configs" / "nano" / "tiers"
SHELVES: tuple[str, ...] = ("library", "archive")
_MISSING = 0.35
"""Share of the entities that a shelf lacks; none is on neither."""
_DRAWN_AT_ONCE = 60
_MAX_EMPTY_DRAWS = 200
"""Draws of `_DRAWN_AT_ONCE` without a new question after which there are taken to be no more."""

_MATH: dict[str, tuple[str, ...]] = {
    "stories": (
        *("times_as_many", "profit", "cost", "remaining", "two_costs", "boxes", "boxes_plus"),
        *("share", "more_than", "change", "probability", "ratio", "scale"),
    ),
    "percentages": (
        *("percent_of", "what_percent", "percent_change", "reverse_percent", "discount"),
        *("increase", "simple_interest", "compound_interest"),
    ),
    "equations": ("linear_plus", "linear_minus", "linear_divide", "linear_both"),
    "measures": (
        *("convert", "fahrenheit_to_celsius", "celsius_to_fahrenheit", "density", "circumference"),
        *("ph", "ph_inverse", "travel_time", "distance", "speed", "circle_area", "hypotenuse"),
        *("rectangle_perimeter", "rectangle_area", "triangle_area", "box_volume"),
        "kinetic_energy",
    ),
}
"""Domain to the kinds of `math_tasks`; all others are sums."""


def _of_math(kind: str) -> str:
    return next((domain for domain, kinds in _MATH.items() if kind in kinds), "sums")


def _domain(source: str, kind: str) -> str:
    """The domain of a question of a source of `registry.QUESTION_SETS`."""
    match source:
        case "math":
            return _of_math(kind)
        case "facts":
            return "lookups" if kind.startswith("gazetteer_") else "facts"
        case "code":
            return "values" if kind.startswith("value.") else "functions"
    return source


SOURCES: dict[str, str] = {
    **dict.fromkeys(("sums", *_MATH), "math"),
    **dict.fromkeys(("facts", "lookups"), "facts"),
    **dict.fromkeys(("functions", "values"), "code"),
    "database": "database",
    "clock": "clock",
}
"""Domain to the source of its questions, for those that one call answers."""
COMPOSED: dict[str, tuple[str, ...]] = {"several parts": COMPOUND_KINDS, "hops": HOP_KINDS}
"""Domain to its kinds of compound question; in `hops` a part uses an earlier answer."""


def tiers_questions(sizes: dict[Split, int], seed: int) -> list[profiling.Question]:
    """Questions of all domains; no query occurs twice, in whichever split.

    Args:
        sizes: How many each domain and split gets; `held_out` takes wordings never trained on.
        seed: The same seed gives the same questions.

    Raises:
        ConfigError: If there are not so many different questions of a domain.
    """
    asked: set[str] = set()
    found: list[profiling.Question] = []
    for split, size in sizes.items():
        for domain in (*SOURCES, *COMPOSED):
            rng = random.Random(f"{seed}-{domain}-{split}")
            draws = _draws(domain, rng, split)
            found += islice(_new(draws, domain, asked), size)
    return found


def _draws(domain: str, rng: random.Random, split: Split) -> Iterator[list[profiling.Question]]:
    """Questions of a domain, some at a time, for ever."""
    number = 0
    while True:
        if domain in COMPOSED:
            fields = [compound_fields(rng, split, COMPOSED[domain]) for _ in range(_DRAWN_AT_ONCE)]
            split_name = "train" if split == "seen" else "held_out"
            made = [
                profiling.Question.model_validate({"id": "-", "split": split_name, **of})
                for of in fields
            ]
        else:
            source = SOURCES[domain]
            drawn = question_source(source).questions(rng, split, _DRAWN_AT_ONCE)
            made = [labelled(of, "-") for of in drawn if _domain(source, of.kind) == domain]
        named = []
        for question in made:
            number += 1
            name = f"{domain.replace(' ', '-')}-{split}-{number:05d}"
            named.append(question.model_copy(update={"id": name, "domain": domain}))
        yield named


def _new(
    draws: Iterator[list[profiling.Question]], domain: str, asked: set[str]
) -> Iterator[profiling.Question]:
    """Those that were not asked before.

    Raises:
        ConfigError: If no more come.
    """
    empty_draws = 0
    for drawn in draws:
        before = len(asked)
        for question in drawn:
            if question.query not in asked:
                asked.add(question.query)
                yield question
        empty_draws = empty_draws + 1 if len(asked) == before else 0
        if empty_draws > _MAX_EMPTY_DRAWS:
            raise ConfigError(f"there are not so many different questions of {domain!r}")


def write_shelves(folder: Path = FOLDER) -> None:
    """Write `library.jsonl` and `archive.jsonl`, parts of the corpus of the nano pool."""
    folder.mkdir(parents=True, exist_ok=True)
    for shelf in SHELVES:
        kept = [record for record in build_corpus() if _is_on(shelf, record["title"])]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        (folder / f"{shelf}.jsonl").write_text(lines, encoding="utf-8")


def _is_on(shelf: str, title: str) -> bool:
    """Whether a shelf has an entity: one lacks the lowest hashes, the other the highest."""
    digest = hashlib.sha256(title.encode()).digest()
    share = int.from_bytes(digest[:8]) / 2**64
    return share >= _MISSING if shelf == "library" else share < 1 - _MISSING
