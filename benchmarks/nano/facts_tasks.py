"""Generator of nano-facts: real facts closed-book, search calls, and answers copied from sources.

Real facts come from `facts.json`, invented entities from `gazetteer.py`. Sources stand in the
user's turn (retrieval as context) or in a tool result (as a function); both end with the question.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.nano import invented
from benchmarks.nano.chat_format import tool_call
from benchmarks.nano.gazetteer import (
    Entry,
    corpus_entries,
    invented_subject,
    invented_value,
    passage,
    real_entry,
    real_subject,
    search_result,
    untold,
    with_sources,
)
from benchmarks.nano.phrasing import Relation, Subject, load_facts, load_gazetteer
from benchmarks.nano.task import Conversation, EvalCell, Question, Split

if TYPE_CHECKING:
    from benchmarks.nano.evaluate import EvalItem

MODEL_ID = "nano-facts"
UNKNOWN = "I don't know."
_EARLY = 0.08
"""Share of training that only copies: drills, and short sources."""
_RETRIEVAL_PAIR = f"{MODEL_ID}@retrieval"
_CLOSED_BOOK_PAIR = f"{MODEL_ID}@none"

Turn = dict[str, Any]


def _user(text: str) -> Turn:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Turn:
    return {"role": "assistant", "content": text}


class FactsGenerator:
    """Conversations and questions of nano-facts.

    The curriculum starts with look-up drills (lists of keys and values), which teach the model to
    bind a value to its key, and moves on to facts and sentences; some drills stay to the end.
    """

    model_id = MODEL_ID
    token_split_pattern = invented.SECOND_SYLLABLE_PATTERN
    """Every invented word is two tokens, its syllables."""
    name_tokens = invented.SECOND_SYLLABLES
    """They tell invented names apart; see `induction_init.py`."""

    def __init__(self) -> None:
        self._relations, self._facts, _ = load_facts()
        self._pool = [(k, s) for k, entries in self._facts.items() for s in entries]

    def conversation(self, rng: random.Random, progress: float) -> Conversation:
        """One training conversation; see `TaskGenerator`."""
        if rng.random() < _drill_share(progress):
            return _drill(rng, progress)
        if progress < _EARLY:
            return self._rivals(rng, sizes=(1, 2))
        makers: tuple[Callable[[random.Random], Conversation], ...] = (
            self._closed_book,
            self._sources,
            lambda rng: self._rivals(rng, sizes=(2, 3, 4, 4, 5)),
            self._search,
            self._untold,
            self._other_tools,
        )
        return rng.choices(makers, weights=(27, 16, 16, 26, 11, 4))[0](rng)

    def questions(self, rng: random.Random, split: Split, n: int) -> list[Question]:
        """Two thirds real facts, one third questions about the corpus; see `TaskGenerator`."""
        found = []
        for _ in range(n):
            if rng.random() < 0.67:
                found.append(self.closed_book_question(rng, split))
            else:
                found.append(corpus_question(rng, split))
        return found

    def closed_book_question(self, rng: random.Random, split: Split) -> Question:
        """A question about a real fact of the table."""
        key, name = self._draw_fact(rng)
        return Question(
            query=self._relations[key].question(rng, real_subject(name), split),
            gold=self._facts[key][name],
            metric="exact",
            domain="facts",
            kind=key,
            split=split,
            good_pairs=(_CLOSED_BOOK_PAIR,),
        )

    def unknown_question(self, rng: random.Random, split: Split, *, reserved: bool) -> Question:
        """A question about an invented entity, which nobody can answer without sources."""
        relation, subject = self._unknown(rng, reserved=reserved)
        return Question(
            query=relation.question(rng, subject, split),
            gold=UNKNOWN,
            metric="exact",
            domain="facts",
            kind="unknown",
            split=split,
        )

    def known_entry(self, rng: random.Random, split: Split) -> Entry:
        """A real fact with a sentence that tells it."""
        key, name = self._draw_fact(rng)
        return real_entry(rng, self._relations[key], name, self._facts[key][name], split)

    def _draw_fact(self, rng: random.Random) -> tuple[str, str]:
        if rng.random() < 0.8:
            return rng.choice(self._pool)
        key = rng.choice(list(self._facts))
        return key, rng.choice(list(self._facts[key]))

    def _unknown(self, rng: random.Random, *, reserved: bool) -> tuple[Relation, Subject]:
        if rng.random() < 0.4:
            name = invented.word(rng, reserved=reserved)
            if rng.random() < 0.3:
                name = f"{name} {invented.word(rng, reserved=reserved)}"
            return self._relations[rng.choice(list(self._relations))], Subject(name, name)
        relations, types, _ = load_gazetteer()
        entity_type = rng.choice(list(types))
        key = rng.choice(types[entity_type]["relations"])
        return relations[key], invented_subject(rng, entity_type, reserved=reserved)

    def _closed_book_turns(self, rng: random.Random, count: int) -> list[Turn]:
        turns: list[Turn] = []
        for _ in range(count):
            if rng.random() < 0.13:
                relation, subject = self._unknown(rng, reserved=False)
                turns += [_user(relation.question(rng, subject, "seen")), _assistant(UNKNOWN)]
            else:
                question = self.closed_book_question(rng, "seen")
                turns += [_user(question.query), _assistant(question.gold)]
        return turns

    def _closed_book(self, rng: random.Random) -> Conversation:
        return Conversation(tuple(self._closed_book_turns(rng, rng.randint(1, 8))))

    def _other_tools(self, rng: random.Random) -> Conversation:
        offered = rng.choice((("calculator",), ("python",), ("calculator", "python")))
        return Conversation(tuple(self._closed_book_turns(rng, rng.randint(1, 5))), offered)

    def _material(self, rng: random.Random, size: int) -> tuple[list[Entry], list[Entry]]:
        """Sources to show, and what can be asked about them."""
        if rng.random() < 0.2:
            known = self.known_entry(rng, "seen")
            return [known, *self._near(rng, known, size - 1)], [known]
        entries = passage(rng, size, "seen", reserved=False)
        return entries, entries

    def _near(self, rng: random.Random, known: Entry, count: int) -> list[Entry]:
        """Sources that distract from a real fact: other real ones, or invented ones."""
        if rng.random() < 0.5 or count < 1:
            return passage(rng, count, "seen", reserved=False) if count else []
        facts = self._facts[known.relation.key]
        names = [n for n in facts if n != known.subject.phrase]
        return [
            real_entry(rng, known.relation, name, facts[name], "seen")
            for name in rng.sample(names, min(count, len(names)))
        ]

    def _unanswered(self, rng: random.Random) -> tuple[str, str]:
        """A question the sources do not answer, and what to say."""
        if rng.random() < 0.5:
            question = self.closed_book_question(rng, "seen")
            return question.query, question.gold
        relation, subject = self._unknown(rng, reserved=False)
        return relation.question(rng, subject, "seen"), UNKNOWN

    def _sources(self, rng: random.Random) -> Conversation:
        """Questions with sources in the prompt; follow-up questions go back to the same sources."""
        size = rng.choices((1, 2, 3, 4, 5, 6), weights=(18, 18, 20, 28, 9, 7))[0]
        entries, askable = self._material(rng, size)
        first, *rest = rng.sample(askable, len(askable)) if rng.random() < 0.5 else askable
        sentences = [e.sentence for e in rng.sample(entries, len(entries))]
        turns: list[Turn] = []
        if rng.random() < 0.1:
            query, answer = self._unanswered(rng)
            turns += [_user(with_sources(query, sentences)), _assistant(answer)]
            rest.append(first)
        else:
            query = first.relation.question(rng, first.subject, "seen")
            if rng.random() < 0.08:
                turns += [
                    _user(with_sources(f"Quote the source: {query}", sentences)),
                    _assistant(first.sentence),
                ]
            else:
                turns += [_user(with_sources(query, sentences)), _assistant(first.value)]
        for entry in rest[: rng.randint(0, 5)]:
            question = entry.relation.question(rng, entry.subject, "seen")
            turns += [_user(question), _assistant(entry.value)]
        if rng.random() < 0.06:
            query, answer = self._unanswered(rng)
            turns += [_user(query), _assistant(answer)]
        return Conversation(tuple(turns))

    def _untold(self, rng: random.Random) -> Conversation:
        """A question that its sources come close to and do not answer; then one that they do."""
        size = rng.choices((1, 2, 3, 4), weights=(45, 20, 10, 25))[0]
        relation, subject, told = untold(rng, size, "seen", reserved=False)
        sentences = [e.sentence for e in rng.sample(told, size)]
        query = relation.question(rng, subject, "seen")
        if rng.random() < 0.35:
            searched = relation.search_query(subject)
            turns = [
                _user(query),
                tool_call("retrieval", query=searched),
                {"role": "tool", "content": search_result(searched, sentences)},
                _assistant(UNKNOWN),
            ]
            return Conversation(tuple(turns), ("retrieval",))
        turns = [_user(with_sources(query, sentences)), _assistant(UNKNOWN)]
        for entry in told[: rng.randint(0, size)]:
            question = entry.relation.question(rng, entry.subject, "seen")
            turns += [_user(question), _assistant(entry.value)]
        return Conversation(tuple(turns))

    def _rivals(self, rng: random.Random, sizes: Sequence[int]) -> Conversation:
        """Questions on sources; in many, little but the name tells the sentences apart."""
        size = rng.choice(sizes)
        entries = passage(rng, size, "seen", reserved=False, rivals=rng.random() < 0.25)
        sentences = [e.sentence for e in rng.sample(entries, size)]
        turns: list[Turn] = []
        for entry in entries[: rng.randint(1, size)]:
            query = entry.relation.question(rng, entry.subject, "seen")
            if not turns:
                query = with_sources(query, sentences)
            turns += [_user(query), _assistant(entry.value)]
        return Conversation(tuple(turns))

    def _search(self, rng: random.Random) -> Conversation:
        """A question, a call of `retrieval`, its result, and the answer; once or twice."""
        tools: list[str] = ["retrieval"]
        if rng.random() < 0.2:
            tools.insert(rng.randint(0, 1), rng.choice(("calculator", "python")))
        turns: list[Turn] = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            size = rng.choices((1, 2, 3, 4), weights=(30, 20, 20, 30))[0]
            if rng.random() < 0.35:
                entry = self.known_entry(rng, "seen")
                entries = [entry, *self._near(rng, entry, size - 1)]
            else:
                entries = passage(rng, size, "seen", reserved=False, rivals=rng.random() < 0.25)
                entry = entries[0]
            answer = entry.value
            query = entry.relation.search_query(entry.subject)
            sentences = [e.sentence for e in rng.sample(entries, len(entries))]
            if rng.random() < 0.12:
                unrelated = passage(rng, size, "seen", reserved=False)
                sentences = [] if rng.random() < 0.2 else [e.sentence for e in unrelated]
                if not _is_known(entry):
                    answer = UNKNOWN
            turns += [
                _user(entry.relation.question(rng, entry.subject, "seen")),
                tool_call("retrieval", query=query),
                {"role": "tool", "content": search_result(query, sentences)},
                _assistant(answer),
            ]
        return Conversation(tuple(turns), tuple(tools))


def _drill_share(progress: float) -> float:
    if progress < _EARLY:
        return 0.5
    return 0.2 if progress < 3 * _EARLY else 0.08


def _drill(rng: random.Random, progress: float) -> Conversation:
    """A list of keys and values with several look-ups, in the layout of sources."""
    if rng.random() < (0.6 if progress < 0.05 else 0.2):
        return _repeat_drill(rng)
    size = rng.randint(2, 4 if progress < _EARLY else 8)
    kinds = ("place", "person", "year", "colour", "metres", "profession", "food", "product")
    two_part = rng.random() < 0.5
    lines: dict[str, tuple[str, str]] = {}
    nouns = [r.noun for r in load_gazetteer()[0].values()]
    names = [invented.word(rng, reserved=False) for _ in range(max(2, size // 2))]
    shared_kind = rng.choice(kinds) if rng.random() < 0.4 else None
    while len(lines) < size:
        value = invented_value(rng, shared_kind or rng.choice(kinds), reserved=False)
        if two_part:
            name, noun = rng.choice(names), rng.choice(nouns)
            lines[f"{noun} of {name}?"] = (f"{name}, {noun}: {value}", value)
        else:
            name = invented.word(rng, reserved=False)
            lines[f"What about {name}?"] = (f"{name}: {value}", value)
    asked = rng.sample(list(lines), len(lines))
    shown = [line for line, _ in lines.values()]
    turns = [_user(with_sources(asked[0], shown)), _assistant(lines[asked[0]][1])]
    for query in asked[1:]:
        turns += [_user(query), _assistant(lines[query][1])]
    return Conversation(tuple(turns))


def _repeat_drill(rng: random.Random) -> Conversation:
    words = [invented.word(rng, reserved=False) for _ in range(rng.randint(4, 20))]
    for index in range(len(words)):
        if rng.random() < 0.25:
            words[index] = str(rng.randint(10, 9999))
    text = " ".join(words)
    return Conversation((_user(f"Repeat: {text}"), _assistant(text)))


def _is_known(entry: Entry) -> bool:
    """Whether it is a real fact of the table, which the model learns closed-book."""
    facts = load_facts()[1]
    return not entry.relation.is_invented and entry.subject.phrase in facts[entry.relation.key]


def corpus_question(rng: random.Random, split: Split) -> Question:
    """A question about an invented entity of the shipped corpus, never shown in training."""
    while True:
        entry = rng.choice(corpus_entries())
        if not entry.relation.is_invented:
            continue
        return Question(
            query=entry.relation.question(rng, entry.subject, split),
            gold=entry.value,
            metric="exact",
            domain="facts",
            kind=f"gazetteer_{entry.relation.key}",
            split=split,
            good_pairs=(_RETRIEVAL_PAIR,),
        )


GENERATOR = FactsGenerator()

EVAL_CELLS: tuple[EvalCell, ...] = (
    EvalCell("closed-book", "seen", (), 0.95),
    EvalCell("closed-book, held-out", "held_out", (), 0.85),
    EvalCell("closed-book beside other tools", "seen", ("calculator", "python"), None),
    EvalCell("unknown entity", "seen", (), None),
    EvalCell("unknown entity, held-out", "held_out", (), None),
    EvalCell("search, 1 sentence", "seen", ("retrieval",), 0.95),
    EvalCell("search, 1 sentence, held-out", "held_out", ("retrieval",), 0.75),
    EvalCell("search, 4 sentences", "seen", ("retrieval",), 0.70),
    EvalCell("search, 4 sentences, held-out", "held_out", ("retrieval",), None),
    EvalCell("sources, 1 sentence", "seen", (), 0.95),
    EvalCell("sources, 1 sentence, held-out", "held_out", (), 0.75),
    EvalCell("sources, 2 sentences", "seen", (), None),
    EvalCell("sources, 4 sentences", "seen", (), 0.70),
    EvalCell("sources, 4 sentences, held-out", "held_out", (), None),
    EvalCell("sources without the answer", "seen", (), None),
    EvalCell("sources that tell something else", "seen", (), None),
    EvalCell("sources that tell something else, held-out", "held_out", (), None),
    EvalCell("search call names the entity", "seen", ("retrieval",), None),
    EvalCell("search call names the entity, held-out", "held_out", ("retrieval",), None),
)


def evaluation_items(cell: EvalCell, rng: random.Random, n: int) -> list[EvalItem]:
    """The prompts of one cell of `EVAL_CELLS`."""
    return [_item(cell, rng) for _ in range(n)]


def _item(cell: EvalCell, rng: random.Random) -> EvalItem:
    from benchmarks.nano.evaluate import EvalItem

    split = cell.split
    if cell.name.startswith("closed-book"):
        question = GENERATOR.closed_book_question(rng, split)
        return EvalItem((_user(question.query),), cell.tools, question)
    if cell.name.startswith("unknown"):
        question = GENERATOR.unknown_question(rng, split, reserved=True)
        return EvalItem((_user(question.query),), cell.tools, question)
    if cell.name == "sources without the answer":
        question = GENERATOR.closed_book_question(rng, split)
        if rng.random() < 0.5:
            question = GENERATOR.unknown_question(rng, split, reserved=True)
        others = passage(rng, rng.randint(1, 4), split, reserved=True)
        prompt = with_sources(question.query, [e.sentence for e in others])
        return EvalItem((_user(prompt),), (), question)
    if cell.name.startswith("sources that tell something else"):
        relation, subject, told = untold(rng, rng.randint(1, 4), split, reserved=True)
        sentences = [entry.sentence for entry in rng.sample(told, len(told))]
        query = relation.question(rng, subject, split)
        question = Question(query, UNKNOWN, "exact", "facts", "untold", split)
        return EvalItem((_user(with_sources(query, sentences)),), (), question)
    size = next((int(c) for c in cell.name if c.isdigit()), 1)
    entries = passage(rng, size, split, reserved=True, plain=False)
    entry = entries[0]
    sentences = [e.sentence for e in rng.sample(entries, len(entries))]
    query = entry.relation.question(rng, entry.subject, split)
    question = Question(
        query, entry.value, "exact", "facts", f"gazetteer_{entry.relation.key}", split
    )
    if cell.name.startswith("sources"):
        return EvalItem((_user(with_sources(query, sentences)),), (), question)
    wanted = entry.subject.name if cell.name.startswith("search call") else ""
    return EvalItem((_user(query),), cell.tools, question, _Searcher(sentences, wanted))


class _Searcher:
    """Answers a search call with given sentences, where the query has the wanted words."""

    def __init__(self, sentences: Sequence[str], wanted: str) -> None:
        self._sentences = sentences
        self._wanted = wanted

    def __call__(self, tool_id: str, arguments: Mapping[str, Any]) -> str:
        query = str(arguments["query"])
        return search_result(query, self._sentences if self._wanted in query else ())
