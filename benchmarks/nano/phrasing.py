"""Relations and the ways to ask for them: `facts.json` and `gazetteer.json` as typed values.

A question is a frame shared by all relations, filled with one of the relation's nouns, or a
sentence of the relation's own. Both kinds have held-out members that training never shows.
"""

from __future__ import annotations

import json
import random
import string
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.nano.task import Split

FACTS_PATH = Path(__file__).with_name("facts.json")
GAZETTEER_PATH = Path(__file__).with_name("gazetteer.json")

FactTable = dict[str, dict[str, str]]
"""Values by subject, by relation key."""

NOUN_PHRASE_FRAMES: dict[Split, tuple[str, ...]] = {
    "seen": (
        "What is the {np}?",
        "What's the {np}?",
        "Tell me the {np}.",
        "Give me the {np}.",
        "Name the {np}.",
        "State the {np}.",
        "{np}",
        "{np}?",
        "the {np}",
        "I need the {np}.",
        "Do you know the {np}?",
        "Please tell me the {np}.",
        "Quick question: what is the {np}?",
        "I would like to know the {np}.",
        "Could you give me the {np}?",
        "The {np} is what?",
        "Let me know the {np}.",
        "Find the {np}.",
        "Answer briefly: the {np}?",
        "Remind me of the {np}.",
        "The {np}, please.",
        "What was the {np} again?",
        "I forgot the {np}.",
        "Say what the {np} is.",
    ),
    "held_out": (
        "Can you tell me what the {np} is?",
        "I wonder what the {np} might be.",
    ),
}
"""Frames around a noun phrase such as "capital of France"."""

PERSON_FRAMES: tuple[str, ...] = ("Who is the {np}?", "Who was the {np}?", "Who's the {np}?")
"""More frames for relations whose values are persons; all seen."""

NOUN_FRAMES: dict[Split, tuple[str, ...]] = {
    "seen": (
        "{name}: {noun}?",
        "{name} {noun}",
        "For {e}, what is the {noun}?",
        "About {e}: what is the {noun}?",
        "{name}, {noun}",
        "Regarding {e}, give the {noun}.",
        "Consider {e}. What is the {noun}?",
        "{noun}, {name}",
        "{noun}: {name}",
        "{noun} {name}",
        "{e} has what {noun}?",
        "Think of {e}. Tell me the {noun}.",
    ),
    "held_out": ("Take {e}: what would the {noun} be?", "With regard to {e}, name the {noun}."),
}
"""Frames that name the subject and the noun apart, mostly in reversed order or as keywords."""


@dataclass(frozen=True)
class Subject:
    """What is asked about: `phrase` in a sentence ("the Balin Bridge"), `name` as a keyword."""

    phrase: str
    name: str


@dataclass(frozen=True)
class Relation:
    """One relation and everything needed to ask for it."""

    key: str
    noun_phrases: tuple[str, ...]
    """Patterns with a slot `{e}`, such as "capital of {e}"."""
    keyword: str
    """What stands for the relation in a search query."""
    is_person: bool
    questions: dict[Split, tuple[str, ...]]
    """The relation's own question patterns, with a slot `{e}`."""
    statements: dict[Split, tuple[str, ...]] = field(default_factory=dict)
    """Patterns of sentences that hold the value, with slots `{e}` and `{v}`."""
    value: str = ""
    """Kind of invented value; empty for real relations."""

    @property
    def is_invented(self) -> bool:
        """Whether its facts are invented, so that they can only be looked up."""
        return bool(self.value)

    @property
    def noun(self) -> str:
        """The relation without its subject, such as "capital"."""
        head, separator, tail = self.noun_phrases[0].partition(" of {e}")
        return head if separator and not tail else self.keyword

    def patterns(self, split: Split) -> tuple[str, ...]:
        """Every question pattern of a split with nouns filled in; only the subject is open."""
        frames = NOUN_PHRASE_FRAMES[split]
        if split == "seen" and self.is_person:
            frames += PERSON_FRAMES
        filled = [frame.replace("{np}", np) for frame in frames for np in self.noun_phrases]
        filled += [frame.replace("{noun}", self.noun) for frame in NOUN_FRAMES[split]]
        return (*filled, *self.questions[split])

    def question(self, rng: random.Random, subject: Subject, split: Split) -> str:
        """Ask for this relation of a subject."""
        draw = rng.random()
        if draw < 0.5:
            pattern = rng.choice(self.questions[split])
        elif draw < 0.8:
            frames = NOUN_PHRASE_FRAMES[split]
            if split == "seen" and self.is_person and rng.random() < 0.3:
                frames = PERSON_FRAMES
            pattern = rng.choice(frames).replace("{np}", rng.choice(self.noun_phrases))
        else:
            pattern = rng.choice(NOUN_FRAMES[split]).replace("{noun}", self.noun)
        return self._finish(rng, pattern, subject)

    def _finish(self, rng: random.Random, pattern: str, subject: Subject) -> str:
        text = fill(pattern, subject)
        if rng.random() < 0.12:
            # As typed in a hurry; a leading name keeps its capital.
            text = text.rstrip(".?")
            if not pattern.startswith(("{e}", "{name}")):
                text = text[0].lower() + text[1:]
        return text

    def search_query(self, subject: Subject) -> str:
        """The words to search for; the name comes second so that it always follows a space."""
        return f"{self.keyword} {subject.name}"

    def statement(
        self,
        rng: random.Random,
        subject: Subject,
        value: str,
        split: Split,
        *,
        natural: bool = False,
    ) -> str:
        """A sentence that holds the value, word for word.

        Args:
            rng: Source of randomness.
            subject: What the sentence is about.
            value: What it says.
            split: Which patterns to use.
            natural: Whether to leave out the stiff patterns ("For X, the founder is Y.").
        """
        patterns = self.statements[split]
        if natural:
            patterns = tuple(p for p in patterns if "{noun}" not in p)
        pattern = rng.choice(patterns).replace("{np}", rng.choice(self.noun_phrases))
        pattern = pattern.replace("{noun}", self.noun)
        return fill(pattern, subject).replace("{v}", value)


def fill(pattern: str, subject: Subject) -> str:
    """Put the subject into a pattern; a sentence starts with a capital."""
    text = pattern.replace("{e}", subject.phrase).replace("{name}", subject.name)
    if pattern.startswith("{v}") or not text:
        return text
    return text[0].upper() + text[1:]


def normalized(pattern: str) -> str:
    """A pattern without case, punctuation and articles, to compare phrasings."""
    kept = "".join(c for c in pattern.casefold() if c not in string.punctuation or c in "{}")
    kept = kept.replace("{name}", "{e}")
    return " ".join(token for token in kept.split() if token != "the")


@cache
def load_facts() -> tuple[dict[str, Relation], FactTable, FactTable]:
    """Real relations by key, the facts of each, and the facts only the corpus tells."""
    raw: dict[str, Any] = json.loads(FACTS_PATH.read_text(encoding="utf-8"))
    frames: dict[Split, tuple[str, ...]] = {
        "seen": ("The {np} is {v}.", "{v} is the {np}.", "For {e}, the {noun} is {v}."),
        "held_out": ("It is known that the {np} is {v}.",),
    }
    relations = {
        key: Relation(
            key=key,
            noun_phrases=tuple(p.replace("{s}", "{e}") for p in entry["nouns"]),
            keyword=entry["keyword"],
            is_person=entry["person"],
            questions={
                "seen": tuple(p.replace("{s}", "{e}") for p in entry["questions"]),
                "held_out": tuple(p.replace("{s}", "{e}") for p in entry["held_out"]),
            },
            statements={
                "seen": tuple(p for p in entry["statements"] for _ in range(2)) + frames["seen"],
                "held_out": frames["held_out"],
            },
        )
        for key, entry in raw.items()
    }
    facts = {key: entry["facts"] for key, entry in raw.items()}
    return relations, facts, {key: entry.get("corpus_only", {}) for key, entry in raw.items()}


@cache
def load_gazetteer() -> tuple[dict[str, Relation], dict[str, Any], dict[str, list[str]]]:
    """Invented relations by key, entity types by name, and the words values are drawn from."""
    raw: dict[str, Any] = json.loads(GAZETTEER_PATH.read_text(encoding="utf-8"))
    splits: tuple[tuple[Split, str, str], ...] = (
        ("seen", "questions", "statements"),
        ("held_out", "held_out", "statements_held_out"),
    )
    relations = {}
    for key, entry in raw["relations"].items():
        relations[key] = Relation(
            key=key,
            noun_phrases=tuple(entry["nouns"]),
            keyword=entry["keyword"],
            is_person=entry["person"],
            questions={split: _lower_slots(entry[name]) for split, name, _ in splits},
            statements={
                split: _lower_slots(entry[name] * 2 + raw["frames"][name])
                for split, _, name in splits
            },
            value=entry["value"],
        )
    return relations, raw["types"], raw["values"]


def _lower_slots(patterns: list[str]) -> tuple[str, ...]:
    return tuple(p.replace("{E}", "{e}") for p in patterns)
