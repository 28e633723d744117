"""`configs/nano/composed.jsonl`: questions that take more than one call, for patterns.

Four domains: `compound` (two or three questions at once), `hops` (a fact, then a question on it),
`refusal` (nothing in the corpus answers it) and `repair` (broken code with a failing example).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from benchmarks.nano import gazetteer
from benchmarks.nano.code_repair import draw_repair
from benchmarks.nano.compound import Part, draw_compound
from benchmarks.nano.facts_tasks import UNKNOWN
from benchmarks.nano.labelled import metric_name
from benchmarks.nano.phrasing import Relation, Subject, load_gazetteer
from benchmarks.nano.task import Split
from serve_app.questions import Question, QuestionSplit

DOMAIN_SHARES: dict[str, float] = {"compound": 0.4, "hops": 0.25, "refusal": 0.2, "repair": 0.15}
COMPOUND_KINDS = ("pair", "triple", "phrases", "mixed")
HOP_KINDS = ("hop", "hop_pair", "hop_chain")
_SPLITS: dict[Split, QuestionSplit] = {"seen": "train", "held_out": "held_out"}

Fields = dict[str, Any]
"""`query`, `metric` and `gold` of a question."""


def composed_questions(sizes: dict[Split, int], seed: int) -> list[Question]:
    """Questions of all domains; no query occurs twice, in whichever split.

    Args:
        sizes: How many questions each split gets; `held_out` takes wordings never trained on.
        seed: The same seed gives the same questions.
    """
    makers: dict[str, Callable[[random.Random, Split], Fields]] = {
        "compound": lambda rng, split: compound_fields(rng, split, COMPOUND_KINDS),
        "hops": lambda rng, split: compound_fields(rng, split, HOP_KINDS),
        "refusal": _refusal,
        "repair": _repair,
    }
    asked: set[str] = set()
    found: list[Question] = []
    for split, size in sizes.items():
        for domain, share in DOMAIN_SHARES.items():
            rng = random.Random(f"{seed}-{domain}-{split}")
            for number in range(1, round(size * share) + 1):
                fields = makers[domain](rng, split)
                while fields["query"] in asked:
                    fields = makers[domain](rng, split)
                asked.add(fields["query"])
                key = {"id": f"{domain}-{split}-{number:04d}"}
                fields |= key | {"domain": domain, "split": _SPLITS[split]}
                found.append(Question.model_validate(fields))
    return found


def compound_fields(rng: random.Random, split: Split, kinds: Sequence[str]) -> Fields:
    """A question of one of some kinds of `compound`, that can be answered."""
    while True:
        compound = draw_compound(rng, split, answerable=True)
        if compound.kind in kinds:
            break
    golds = [_scored(part) for part in compound.answers]
    if len(golds) == 1:
        return {"query": compound.query, **golds[0]}
    return {"query": compound.query, "metric": "all_of", "gold": golds}


def _scored(part: Part) -> Fields:
    """Gold and metric of one part."""
    if part.tests:
        metric = {"name": "unit_tests", "tests": list(part.tests)}
        return {"gold": part.gold, "metric": metric}
    return {"gold": part.gold, "metric": metric_name(part.metric)}


def _refusal(rng: random.Random, split: Split) -> Fields:
    relation, subject = _unanswered(rng)
    query = relation.question(rng, subject, split)
    return {"query": query, "metric": "refusal", "gold": UNKNOWN}


def _unanswered(rng: random.Random) -> tuple[Relation, Subject]:
    """An entity that the corpus does not name, or a relation it does not tell of one it names."""
    relations, types, _ = load_gazetteer()
    entity_types, told = _told()
    if rng.random() < 0.5:
        entry = rng.choice([e for e in gazetteer.corpus_entries() if e.relation.is_invented])
        keys = types[entity_types[entry.subject.name]]["relations"]
        others = [key for key in keys if (entry.subject.name, key) not in told]
        return relations[rng.choice(others)], entry.subject
    entity_type = rng.choice(list(types))
    subject = gazetteer.invented_subject(rng, entity_type, reserved=True)
    while subject.name in entity_types:
        subject = gazetteer.invented_subject(rng, entity_type, reserved=True)
    return relations[rng.choice(types[entity_type]["relations"])], subject


@cache
def _told() -> tuple[dict[str, str], frozenset[tuple[str, str]]]:
    """The type of each invented entity of the corpus, and each (entity, relation) it tells."""
    types = list(load_gazetteer()[1])
    invented = [entry for entry in gazetteer.corpus_entries() if entry.relation.is_invented]
    per_type = gazetteer.CORPUS_ENTITIES_PER_TYPE
    entity_types = {e.subject.name: types[i // per_type] for i, e in enumerate(invented)}
    return entity_types, frozenset((e.subject.name, e.relation.key) for e in invented)


def _repair(rng: random.Random, split: Split) -> Fields:
    repair = draw_repair(rng, split)
    metric = {"name": "unit_tests", "tests": list(repair.tests)}
    return {"query": repair.worded(rng, split), "metric": metric, "gold": repair.answer}
