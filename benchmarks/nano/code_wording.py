"""How nano-code's questions are worded: frames, synonyms, literals as users type them.

`canonical` maps all synonym variants of a wording to one text, which keeps held-out wordings apart.
"""

from __future__ import annotations

import random
import re

from benchmarks.nano.task import Split

THIRD_PERSON_FRAMES: tuple[str, ...] = (
    "Write a Python function that {vp}.",
    "Write a function that {vp}.",
    "Write a python function which {vp}.",
    "Implement a Python function that {vp}.",
    "Implement a function which {vp}.",
    "I need a Python function that {vp}.",
    "Give me a Python function which {vp}.",
    "Can you write a Python function that {vp}?",
    "Create a Python function that {vp}.",
    "Code a function that {vp}.",
    "Write Python code for a function that {vp}.",
    "Write solution, a Python function that {vp}.",
    "Define a function solution that {vp}.",
    "Help me with a Python function that {vp}.",
    "Python function that {vp}",
    "I want a function in Python that {vp}.",
)
IMPERATIVE_FRAMES: tuple[str, ...] = (
    "Write a Python function to {vp}.",
    "Write a function to {vp}.",
    "Write a python function to {vp}.",
    "How do I write a Python function to {vp}?",
    "Using Python, write a function to {vp}.",
    "Make a Python function to {vp}.",
    "I need a function to {vp}.",
    "Python function to {vp}",
)
NOUN_PHRASE_VERBS: tuple[str, ...] = ("returns", "computes", "finds", "gives")
"""Verbs put before a noun phrase to make it a verb phrase."""

NEW_FRAMES: tuple[str, ...] = (
    "Show me a short Python function that {vp}.",
    "Could you code up a Python function that {vp}?",
    "Please provide a Python function which {vp}.",
)
"""Frames that only held-out questions use."""

_SECOND_VERBS = frozenset(
    (
        "adds",
        "capitalizes",
        "checks",
        "counts",
        "drops",
        "keeps",
        "joins",
        "makes",
        "moves",
        "returns",
        "reverses",
        "sums",
    )
)
_NO_PLEASE = frozenset(
    (
        "What",
        "How",
        "Which",
        "I",
        "Can",
        "Python",
        "Using",
        "Given",
        "In",
        "For",
        "With",
        "Counting",
        "Starting",
    )
)

_SWAPS: tuple[tuple[str, ...], ...] = (
    ("numbers", "integers", "values", "ints"),
    ("returns", "gives", "gives back", "outputs"),
    ("computes", "calculates", "works out", "determines"),
    ("compute", "calculate", "work out", "determine"),
    ("largest", "biggest", "greatest"),
    ("smallest", "lowest"),
    ("string", "text"),
    ("every", "each"),
    ("checks whether", "checks if", "tests whether", "tells whether", "tells if"),
    ("sum", "total"),
    ("average", "mean"),
    ("keeps", "selects"),
    ("list", "array"),
    ("how many times", "how often"),
    ("descending order", "decreasing order"),
    ("ascending order", "increasing order"),
    ("letters", "characters"),
)
"""Groups of interchangeable wordings; the first of each group is the canonical one."""

_TO_CANONICAL = {variant: group[0] for group in _SWAPS for variant in group}
_SWAP_PATTERN = re.compile(
    r"(?<![\w{'])("
    + "|".join(re.escape(v) for v in sorted(_TO_CANONICAL, key=len, reverse=True))
    + r")(?![\w}'(])"
)
_GROUP = {variant: group for group in _SWAPS for variant in group}


def swap_synonyms(rng: random.Random, template: str, share: float = 0.3) -> str:
    """Replace interchangeable wordings of a template (before its slots are filled) at random."""

    def replace(match: re.Match[str]) -> str:
        if rng.random() >= share:
            return match.group(1)
        return rng.choice(_GROUP[match.group(1)])

    swapped = _SWAP_PATTERN.sub(replace, template)
    return re.sub(
        r"\ba (array|integer)\b", r"an \1", re.sub(r"\ban (list|number)\b", r"a \1", swapped)
    )


def canonical(template: str) -> str:
    """The one spelling that all synonym swaps of a template share; used to keep held-out apart."""
    text = _SWAP_PATTERN.sub(lambda m: _TO_CANONICAL[m.group(1)], template.lower())
    return re.sub(r"[^\w{}]+", " ", re.sub(r"\ban\b", "a", text)).strip()


def shown(rng: random.Random, value: object) -> str:
    """How a user might type `value`: a Python literal, or items with commas and `and`."""
    if isinstance(value, list):
        roll = rng.random()
        items = [shown(rng, item) if isinstance(item, int) else f"'{item}'" for item in value]
        if roll < 0.7 or len(items) < 3:
            return "[" + ", ".join(items) + "]"
        if roll < 0.87:
            return ", ".join(items)
        return ", ".join(items[:-1]) + " and " + items[-1]
    if isinstance(value, str):
        return f"'{value}'" if rng.random() < 0.65 else f'"{value}"'
    return str(value)


def imperative(verb_phrase: str) -> str:
    """`sorts a list and keeps the first` -> `sort a list and keep the first`."""
    head, joint, tail = verb_phrase.partition(" and ")
    if joint and tail.split()[0] in _SECOND_VERBS:
        return f"{imperative(head)} and {imperative(tail)}"
    verb, _, rest = verb_phrase.partition(" ")
    irregular = {"does": "do", "searches": "search", "squashes": "squash", "splits": "split"}
    if verb in irregular:
        verb = irregular[verb]
    elif verb.endswith(("sses", "shes", "ches")):
        verb = verb[:-2]
    elif verb.endswith("s"):
        verb = verb[:-1]
    return f"{verb} {rest}"


def typed(rng: random.Random, text: str) -> str:
    """Small habits of typing: no final stop, a small first letter, a `please`."""
    roll = rng.random()
    if roll < 0.15:
        return text.rstrip(".")
    if roll < 0.22 and text[:1].isalpha():
        return text[0].lower() + text[1:]
    if roll < 0.27 and text[:1].isupper() and text.split(maxsplit=1)[0] not in _NO_PLEASE:
        return f"Please {text[0].lower()}{text[1:]}"
    return text


def describe(rng: random.Random, description: str, split: Split) -> str:
    """A request for a function from a verb phrase or, after `@`, a noun phrase."""
    text = swap_synonyms(rng, description.removeprefix("@"))
    if description.startswith("@"):
        text = f"{rng.choice(NOUN_PHRASE_VERBS)} {text}"
    new = split == "held_out" and rng.random() < 0.3
    if not new and rng.random() < 0.35 and not text.startswith(("takes", "given")):
        return typed(rng, rng.choice(IMPERATIVE_FRAMES).replace("{vp}", imperative(text)))
    frame = rng.choice(NEW_FRAMES if new else THIRD_PERSON_FRAMES)
    return typed(rng, frame.replace("{vp}", text))
