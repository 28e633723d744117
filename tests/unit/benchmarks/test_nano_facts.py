"""The generator of nano-facts and the corpus that ships: what training shows, and never shows."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest

from benchmarks.nano import invented
from benchmarks.nano.chat_format import render
from benchmarks.nano.facts_tasks import (
    EVAL_CELLS,
    GENERATOR,
    UNKNOWN,
    corpus_question,
    evaluation_items,
)
from benchmarks.nano.gazetteer import (
    CORPUS_PATH,
    build_corpus,
    corpus_entries,
    passage,
    search_result,
    untold,
    with_sources,
)
from benchmarks.nano.phrasing import (
    FACTS_PATH,
    GAZETTEER_PATH,
    Relation,
    load_facts,
    load_gazetteer,
    normalized,
)
from benchmarks.nano.task import Conversation
from serve_app.tools.builtin.retrieval import NO_SOURCES

ALL_RELATIONS = [*load_facts()[0].values(), *load_gazetteer()[0].values()]
NUM_SAMPLES = 2500


def _sampled_conversations() -> list[Conversation]:
    rng = random.Random(7)
    return [GENERATOR.conversation(rng, i / NUM_SAMPLES) for i in range(NUM_SAMPLES)]


@pytest.fixture(scope="module")
def training_texts() -> list[str]:
    return ["".join(s.text for s in render(c.messages, c.tools)) for c in _sampled_conversations()]


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    assert not repeated, repeated
    return dict(pairs)


@pytest.mark.parametrize("path", [FACTS_PATH, GAZETTEER_PATH], ids=lambda p: p.name)
def test_tables_have_no_duplicate_keys(path: Any) -> None:
    json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicate_keys)


def test_there_are_hundreds_of_facts_over_many_relations() -> None:
    _, facts, corpus_only = load_facts()
    assert len(facts) >= 20
    assert sum(len(entries) for entries in facts.values()) >= 300
    for key, entries in corpus_only.items():
        assert not set(entries) & set(facts[key]), key


def test_what_is_left_untold_is_told_of_no_entity_of_that_name_and_kind() -> None:
    rng = random.Random(3)
    for _ in range(500):
        relation, subject, told = untold(rng, rng.randint(1, 4), "seen", reserved=True)
        assert (subject.name, relation.key) not in {(e.subject.name, e.relation.key) for e in told}
        (word,) = filter(invented.is_reserved, subject.name.split())
        assert word in told[0].sentence


@pytest.mark.parametrize("relation", ALL_RELATIONS, ids=lambda r: r.key)
def test_every_relation_has_many_phrasings_and_its_held_out_ones_are_new(
    relation: Relation,
) -> None:
    seen = {normalized(p) for p in relation.patterns("seen")}
    held_out = {normalized(p) for p in relation.patterns("held_out")}
    assert len(seen) >= 12
    assert len(relation.questions["held_out"]) >= 1
    assert not seen & held_out
    assert all(
        "{e}" in p or "{name}" in p for s in ("seen", "held_out") for p in relation.patterns(s)
    )


def test_no_held_out_phrasing_of_any_relation_is_a_seen_one_of_another() -> None:
    seen = {normalized(p) for r in ALL_RELATIONS for p in r.patterns("seen")}
    held_out = {normalized(p) for r in ALL_RELATIONS for p in r.patterns("held_out")}
    assert not seen & held_out


def test_held_out_statements_are_new() -> None:
    for relation in ALL_RELATIONS:
        seen = {normalized(p) for p in relation.statements["seen"]}
        assert not seen & {normalized(p) for p in relation.statements["held_out"]}, relation.key


def test_training_text_holds_no_held_out_phrasing(training_texts: list[str]) -> None:
    """Between names: the longest fixed stretch of each held-out pattern occurs nowhere."""
    text = " ".join(normalized(t) for t in training_texts)
    for relation in ALL_RELATIONS:
        for pattern in relation.questions["held_out"]:
            stretch = max(normalized(pattern).split("{e}"), key=len).strip()
            if len(stretch.split()) >= 6:
                assert f" {stretch} " not in text, pattern
    assert "i wonder what" not in text
    assert "with regard to" not in text


def test_training_never_shows_a_reserved_name(training_texts: list[str]) -> None:
    words = {w.strip('.,:?!"}[]') for t in training_texts for w in t.split()}
    assert not [w for w in words if invented.is_reserved(w)]


def test_training_never_shows_an_entity_of_the_corpus(training_texts: list[str]) -> None:
    text = "\n".join(training_texts)
    names = {e.subject.name for e in corpus_entries() if e.relation.is_invented}
    assert len(names) >= 100
    assert not [name for name in names if name in text]


def test_gold_answers_stand_word_for_word_in_their_passages() -> None:
    rng = random.Random(3)
    for _ in range(400):
        for split in ("seen", "held_out"):
            for entry in passage(rng, rng.randint(1, 6), split, reserved=rng.random() < 0.5):
                assert entry.value in entry.sentence
                assert entry.subject.name in entry.sentence


def test_a_passage_answers_its_question_once() -> None:
    rng = random.Random(4)
    for _ in range(300):
        entries = passage(rng, 4, "seen", reserved=True)
        pairs = [(e.subject.name, e.relation.key) for e in entries]
        assert pairs.count(pairs[0]) == 1


def test_answers_to_sources_are_copied_from_them() -> None:
    rng = random.Random(5)
    for cell in EVAL_CELLS:
        if not cell.name.startswith("sources,"):
            continue
        for item in evaluation_items(cell, rng, 20):
            assert item.question.gold in item.messages[0]["content"]


def test_what_was_asked_stands_last_in_both_layouts() -> None:
    sentences = ["Lake Fa is deep.", "Lake Bo is not."]
    shown = "[1] Lake Fa is deep.\n[2] Lake Bo is not."
    assert with_sources("Is it deep?", sentences) == f"Sources:\n{shown}\n\nQuestion: Is it deep?"
    assert search_result("depth Lake Fa", sentences) == f"{shown}\nQuery: depth Lake Fa"
    assert search_result("depth Lake Fa", []) == NO_SOURCES


def test_rival_sentences_tell_the_same_relation_of_different_names() -> None:
    rng = random.Random(8)
    passages = [passage(rng, 4, "seen", reserved=False, rivals=True) for _ in range(200)]
    same = [e.relation.key == found[0].relation.key for found in passages for e in found[1:]]
    names = [len({e.subject.name for e in found}) for found in passages]
    assert sum(same) >= 0.8 * len(same)
    assert sum(n == 4 for n in names) >= 190


def test_tools_are_called_only_when_retrieval_is_offered() -> None:
    for conversation in _sampled_conversations():
        calls = [m for m in conversation.messages if m.get("tool_calls")]
        assert bool(calls) == ("retrieval" in conversation.tools)


def test_the_shipped_corpus_is_the_generated_one() -> None:
    records = [json.loads(line) for line in CORPUS_PATH.read_text(encoding="utf-8").splitlines()]
    assert records == build_corpus()
    assert 400 <= len(records) <= 700
    assert len({r["id"] for r in records}) == len(records)
    assert all(set(r) == {"id", "title", "text"} and all(r.values()) for r in records)


def test_corpus_questions_need_retrieval_and_their_answer_is_in_the_corpus() -> None:
    rng = random.Random(6)
    texts = [record["text"] for record in build_corpus()]
    facts = load_facts()[1]
    for _ in range(100):
        question = corpus_question(rng, "seen")
        assert question.good_pairs == ("nano-facts@retrieval",)
        assert any(question.gold in text for text in texts)
        assert question.gold != UNKNOWN
        assert question.kind.startswith("gazetteer_")
        assert question.kind not in facts


def test_questions_are_the_same_for_the_same_seed() -> None:
    assert GENERATOR.questions(random.Random(1), "held_out", 30) == GENERATOR.questions(
        random.Random(1), "held_out", 30
    )
