"""Invented entities, sentences about them, and the small corpus that ships for retrieval.

`passage` makes sources for training and evaluation; `build_corpus` makes `corpus.jsonl` (run this
module to write it again). Sentences hold the value word for word. The corpus names its invented
entities with reserved words, so nothing about them can be known without looking it up.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.nano import invented
from benchmarks.nano.phrasing import Relation, Subject, load_facts, load_gazetteer
from benchmarks.nano.task import Split
from serve_app.tools.builtin.retrieval import NO_SOURCES, query_line, with_question

CORPUS_PATH = Path(__file__).parents[2] / "configs" / "nano" / "corpus.jsonl"
CORPUS_SEED = 20
CORPUS_ENTITIES_PER_TYPE = 25
CORPUS_KNOWN_PER_RELATION = 2

_PLAIN_SHARE = 0.2
"""Share of invented entities that take the place of a real subject, such as an invented country."""
_NUMERIC = frozenset({"sides", "month_number", "event_year"})


@dataclass(frozen=True)
class Entry:
    """One invented or real fact, with the sentence that tells it."""

    relation: Relation
    subject: Subject
    value: str
    sentence: str


def invented_value(rng: random.Random, kind: str, *, reserved: bool) -> str:
    """A value of a kind named in `gazetteer.json`."""
    if kind == "year":
        return str(rng.randint(1500, 2019))
    if kind == "metres":
        return f"{rng.randint(11, 9800 if rng.random() < 0.3 else 990)} metres"
    if kind == "count":
        return str(rng.randint(2, 60))
    if kind == "person":
        return invented.person(rng, reserved=reserved)
    if kind in ("place", "river"):
        return invented.word(rng, reserved=reserved)
    return rng.choice(load_gazetteer()[2][kind])


def invented_subject(rng: random.Random, entity_type: str, *, reserved: bool) -> Subject:
    """A subject of a type named in `gazetteer.json`."""
    make = invented.person if entity_type == "person" else invented.word
    return _named(entity_type, make(rng, reserved=reserved))


def _named(entity_type: str, word: str) -> Subject:
    """The subject of a type that has this word, or is this person."""
    entry = load_gazetteer()[1][entity_type]
    name = entry["name"].replace("{w}", word).replace("{p}", word)
    return Subject(phrase=f"the {name}" if entry["article"] else name, name=name)


def _plain_entry(rng: random.Random, relation: Relation, split: Split, *, reserved: bool) -> Entry:
    """An invented subject under a real relation."""
    name = invented.word(rng, reserved=reserved)
    if rng.random() < 0.3:
        name = f"{name} {invented.word(rng, reserved=reserved)}"
    if relation.is_person:
        value = invented.person(rng, reserved=reserved)
    elif relation.key in _NUMERIC:
        value = str(rng.randint(1, 2000))
    else:
        value = invented.word(rng, reserved=reserved)
    subject = Subject(name, name)
    return Entry(relation, subject, value, relation.statement(rng, subject, value, split))


def real_subject(name: str) -> Subject:
    """The subject of a real fact; its article goes where the name is a keyword."""
    return Subject(phrase=name, name=name.removeprefix("the "))


def real_entry(
    rng: random.Random,
    relation: Relation,
    name: str,
    value: str,
    split: Split,
    *,
    natural: bool = False,
) -> Entry:
    """A real fact with a sentence that tells it."""
    subject = real_subject(name)
    sentence = relation.statement(rng, subject, value, split, natural=natural)
    return Entry(relation, subject, value, sentence)


def passage(
    rng: random.Random,
    size: int,
    split: Split,
    *,
    reserved: bool,
    plain: bool = True,
    rivals: bool = False,
) -> list[Entry]:
    """Sentences about invented entities; each pair of entity and relation occurs once.

    The first entry is the one to ask for; the others distract: other relations of its entity, its
    relation of other entities, and unrelated ones.

    Args:
        rng: Source of randomness.
        size: Number of sentences.
        split: Which statement patterns to use.
        reserved: Whether names are made of reserved words.
        plain: Whether invented subjects of real relations may occur.
        rivals: Whether nearly all sentences tell the same relation, each of another entity.
    """
    if plain and rng.random() < _PLAIN_SHARE:
        real = load_facts()[0]
        keys = rng.sample(sorted(real), min(size, 2))
        keys += [rng.choice(keys) for _ in range(size - len(keys))]
        if rivals:
            keys = keys[:1] * size
        return [_plain_entry(rng, real[key], split, reserved=reserved) for key in keys]
    relations, types, _ = load_gazetteer()
    entity_type = rng.choice(list(types))
    subject = invented_subject(rng, entity_type, reserved=reserved)
    own = rng.sample(types[entity_type]["relations"], len(types[entity_type]["relations"]))
    chosen = [(subject, own.pop())]
    target = chosen[0][1]
    while len(chosen) < size:
        draw = 0.4 + 0.45 * rng.random() if rivals else rng.random()
        if draw < 0.4 and own:
            chosen.append((subject, own.pop()))
        elif draw < 0.8:
            others = [t for t in types if target in types[t]["relations"]]
            other = entity_type if rng.random() < 0.7 else rng.choice(others)
            chosen.append((invented_subject(rng, other, reserved=reserved), target))
        else:
            other = rng.choice(list(types))
            other_subject = invented_subject(rng, other, reserved=reserved)
            chosen.append((other_subject, rng.choice(types[other]["relations"])))
    return [_entry(rng, relations[key], s, split, reserved=reserved) for s, key in chosen]


def untold(
    rng: random.Random, size: int, split: Split, *, reserved: bool
) -> tuple[Relation, Subject, list[Entry]]:
    """What to ask, and sentences that come close and do not tell it.

    The first tells something else of the entity, or something of another kind of entity with the
    same name; the others are as in `passage`.

    Args:
        rng: Source of randomness.
        size: Number of sentences.
        split: Which statement patterns to use.
        reserved: Whether names are made of reserved words.
    """
    relations, types, _ = load_gazetteer()
    entity_type, namesake = rng.sample([key for key in types if key != "person"], 2)
    word = invented.word(rng, reserved=reserved)
    subject = _named(entity_type, word)
    own = rng.sample(types[entity_type]["relations"], len(types[entity_type]["relations"]))
    asked = own.pop()
    first = (subject, own.pop())
    if rng.random() < 0.35:
        first = (_named(namesake, word), rng.choice(types[namesake]["relations"]))
    chosen = [first]
    while len(chosen) < size:
        if own and rng.random() < 0.4:
            chosen.append((subject, own.pop()))
        else:
            others = [t for t in types if asked in types[t]["relations"]]
            other = invented_subject(rng, rng.choice(others), reserved=reserved)
            if other != subject:
                chosen.append((other, asked))
    told = [_entry(rng, relations[key], s, split, reserved=reserved) for s, key in chosen]
    return relations[asked], subject, told


def _entry(
    rng: random.Random,
    relation: Relation,
    subject: Subject,
    split: Split,
    *,
    reserved: bool,
) -> Entry:
    value = invented_value(rng, relation.value, reserved=reserved)
    return Entry(relation, subject, value, relation.statement(rng, subject, value, split))


def numbered(sentences: Sequence[str]) -> str:
    """Sentences as retrieval returns them: one per line, with source numbers."""
    return "\n".join(f"[{index}] {text}" for index, text in enumerate(sentences, start=1))


def with_sources(question: str, sentences: Sequence[str]) -> str:
    """A question behind the passages found for it, as context retrieval lays out a prompt."""
    return with_question(numbered(sentences) if sentences else NO_SOURCES, question)


def search_result(query: str, sentences: Sequence[str]) -> str:
    """What the retrieval tool returns: the passages, and behind them the query it was given."""
    return numbered(sentences) + query_line(query) if sentences else NO_SOURCES


@cache
def corpus_entries() -> tuple[Entry, ...]:
    """Every fact of the shipped corpus; first the invented ones, one for each entity."""
    rng = random.Random(CORPUS_SEED)
    relations, types, _ = load_gazetteer()
    entries: list[Entry] = []
    taken: set[str] = set()
    for entity_type, entry in types.items():
        for index in range(CORPUS_ENTITIES_PER_TYPE):
            subject = invented_subject(rng, entity_type, reserved=True)
            while taken & set(_invented_words(subject)):
                subject = invented_subject(rng, entity_type, reserved=True)
            taken.update(_invented_words(subject))
            relation = relations[entry["relations"][index % len(entry["relations"])]]
            value = invented_value(rng, relation.value, reserved=False)
            sentence = relation.statement(rng, subject, value, "seen", natural=True)
            entries.append(Entry(relation, subject, value, sentence))
    real_relations, facts, corpus_only = load_facts()
    for key, relation in real_relations.items():
        known = rng.sample(sorted(facts[key].items()), CORPUS_KNOWN_PER_RELATION)
        for name, value in (*known, *corpus_only[key].items()):
            entries.append(real_entry(rng, relation, name, value, "seen", natural=True))
    return tuple(entries)


def _invented_words(subject: Subject) -> list[str]:
    return [word for word in subject.name.split() if invented.is_reserved(word)]


def build_corpus() -> list[dict[str, str]]:
    """The records of `corpus.jsonl`."""
    return [
        {"id": f"c{index:04d}", "title": _title(entry.subject), "text": entry.sentence}
        for index, entry in enumerate(corpus_entries(), start=1)
    ]


def _title(subject: Subject) -> str:
    return subject.name[0].upper() + subject.name[1:]


def write_corpus(path: Path = CORPUS_PATH) -> None:
    """Write the corpus, one record per line."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in build_corpus()]
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write_corpus()
