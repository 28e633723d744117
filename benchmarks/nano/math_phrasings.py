"""Reads nano-math's phrasings and varies them: alternatives, synonyms, small differences in style.

Held-out phrasings stay apart from the seen ones even after synonyms are swapped; `canonical` is the
form in which two phrasings are compared.
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PHRASINGS_PATH = Path(__file__).with_name("math_phrasings.txt")

SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("calculate", "compute", "work out", "find", "determine", "figure out"),
    ("how large", "how big"),
    ("in total", "in all", "altogether"),
    ("buys", "purchases", "orders"),
    ("bought", "purchased"),
    ("total cost", "total price", "overall cost"),
    ("equally", "evenly", "fairly"),
    ("shares", "divides", "splits", "distributes"),
    ("shared", "split", "distributed"),
    ("left", "remaining"),
    ("gives away", "hands out", "donates"),
    ("travels", "goes", "moves", "rides"),
    ("needs", "requires"),
    ("average", "mean"),
    ("together", "combined"),
    ("box", "crate", "basket", "jar"),
    ("boxes", "crates", "baskets", "jars"),
    ("bag", "pack", "urn"),
    ("costs", "is priced at"),
    ("ball", "marble"),
    ("balls", "marbles"),
    ("probability", "chance"),
    ("trip", "journey"),
    ("garden", "field", "yard", "pond"),
    ("square root", "root"),
    ("get", "receive"),
    ("gets", "receives"),
    ("children", "kids"),
    ("friends", "cousins", "neighbours"),
    ("becomes", "turns into"),
    ("what is", "what's"),
    ("find", "give"),
    ("value", "amount"),
    ("large", "big"),
)
"""Words that may replace each other in training; matched as whole words, longest first."""

_SLOT = re.compile(r"\{(\w+)\}")
_CHOICE = re.compile(r"\[([^\[\]]*\|[^\[\]]*|average|positive|friend|in total)\]")
_PREFIXES = ("Please: ", "Question: ", "Hi! ", "Hello, ", "Quick question: ", "Help me: ", "Q: ")
_OPENERS = (
    "I have a question. ",
    "This is from my homework. ",
    "It is Monday. ",
    "We learned this at school. ",
    "Now a sum: ",
    "Next one: ",
    "Think about this. ",
    "Here is a problem. ",
    "Solve this: ",
)
_SUFFIXES = (" Thanks.", " Please.", " Thank you!", " I need the result.", " Just the number.")


@dataclass(frozen=True)
class Phrasings:
    """The phrasings of one problem type."""

    seen: tuple[str, ...]
    held_out: tuple[str, ...]


@cache
def load_phrasings(path: Path = PHRASINGS_PATH) -> dict[str, Phrasings]:
    """All phrasings by problem type, with alternatives still in brackets."""
    sections: dict[str, tuple[list[str], list[str]]] = {}
    for raw in path.read_text(encoding="utf-8").splitlines():
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        header = re.fullmatch(r"\[([\w.<>= ]+)\]", line)
        if header:
            current = sections.setdefault(header.group(1), ([], []))
        else:
            current[line.startswith("!")].append(line.removeprefix("!"))
    return {key: Phrasings(tuple(seen), tuple(held)) for key, (seen, held) in sections.items()}


@cache
def expand(phrasing: str) -> tuple[str, ...]:
    """Every choice of the alternatives in brackets; a single bracketed word is optional."""
    parts = _CHOICE.split(phrasing)
    options = [
        [part] if index % 2 == 0 else _alternatives(part) for index, part in enumerate(parts)
    ]
    return tuple(" ".join("".join(chosen).split()) for chosen in itertools.product(*options))


def _alternatives(choice: str) -> list[str]:
    return choice.split("|") if "|" in choice else [choice, ""]


@cache
def _swap_pattern() -> tuple[re.Pattern[str], dict[str, list[str]]]:
    others: dict[str, list[str]] = {}
    for group in SYNONYMS:
        for word in group:
            others.setdefault(word, []).extend(other for other in group if other != word)
    words = sorted(others, key=len, reverse=True)
    pattern = re.compile(rf"(?<!\{{)\b({'|'.join(map(re.escape, words))})\b(?!\}})", re.IGNORECASE)
    return pattern, others


@cache
def _representatives() -> dict[str, str]:
    """One word for each set of words linked by synonyms."""
    linked: dict[str, set[str]] = {}
    for group in SYNONYMS:
        merged = set(group).union(*(linked.get(word, {word}) for word in group))
        for word in merged:
            linked[word] = merged
    return {word: min(words) for word, words in linked.items()}


def canonical(phrasing: str) -> str:
    """A phrasing without case, punctuation and choice of synonyms; slots stay."""
    pattern, _ = _swap_pattern()
    representatives = _representatives()
    text = " ".join(re.sub(r"[^\w{}+*/^=%$'-]", " ", phrasing.lower()).split())
    while text != (text := pattern.sub(lambda match: representatives[match.group(1)], text)):
        pass
    return re.sub(r"\b(the|a|an|of|is)\b ?", "", text).strip()


def leaks(phrasings: Phrasings) -> set[str]:
    """Canonical forms that a held-out phrasing shares with a seen one."""
    seen = {canonical(variant) for phrasing in phrasings.seen for variant in expand(phrasing)}
    held = {canonical(variant) for phrasing in phrasings.held_out for variant in expand(phrasing)}
    return seen & held


def swap_synonyms(text: str, rng: random.Random, share: float) -> str:
    """Replace about `share` of the words that have synonyms."""
    pattern, others = _swap_pattern()

    def swap(match: re.Match[str]) -> str:
        word = match.group(1)
        if rng.random() >= share:
            return word
        other = rng.choice(others[word.lower()])
        return other[0].upper() + other[1:] if word[0].isupper() else other

    return pattern.sub(swap, text)


def fill(phrasing: str, slots: dict[str, str]) -> str:
    """The phrasing with its slots filled."""
    return _SLOT.sub(lambda match: slots[match.group(1)], phrasing)


def restyle(text: str, rng: random.Random) -> str:
    """Now and then a greeting, no capital, no final mark or a closing word."""
    roll = rng.random()
    if roll < 0.10:
        text = text[0].lower() + text[1:]
    elif roll < 0.18:
        text = text.rstrip("?.")
    elif roll < 0.24:
        text = text.rstrip("?.").lower()
    elif roll < 0.30:
        text = rng.choice(_PREFIXES) + text
    elif roll < 0.36:
        text = text + rng.choice(_SUFFIXES)
    elif roll < 0.39:
        text = "Can you help? " + text
    elif roll < 0.45:
        text = rng.choice(_OPENERS) + text
    return text
