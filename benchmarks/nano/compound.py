"""Several questions in one, and their parts: nano-code learns to split, composed sets to ask.

A part of a later hop refers to the answer of an earlier part as `{{a}}`. Parts are worded as the
specialists were trained; held-out compounds differ in how the parts are put together.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from benchmarks.nano import compound_wording as wording
from benchmarks.nano import facts_tasks, gazetteer, invented, math_tasks
from benchmarks.nano.code_questions import QUESTIONS
from benchmarks.nano.code_values import VALUE_KINDS, printed
from benchmarks.nano.math_numbers import number
from benchmarks.nano.math_problems import HARD_KINDS, KINDS
from benchmarks.nano.phrasing import Subject, load_facts, load_gazetteer
from benchmarks.nano.prompts import prompt
from benchmarks.nano.task import Conversation, Metric, Question, Split
from serve_app.errors import ToolRetry
from serve_app.tools.builtin.calculator import evaluate

T = TypeVar("T")
Frame = Split | Literal["improvised"]
"""Whose wordings put the parts together; `improvised`: trained ones and ones without meaning."""
IDS = "abc"
_WEIGHTS = (15, 36, 9, 9, 18, 4, 3, 6)
TRAINED_WEIGHTS = (12, 30, 15, 15, 18, 5, 5, 12)
"""The kinds that are hard to split come more often in training."""
PROMPT_NAME = "nano-split"
MAX_PART_CHARS = 130
_IMPROVISED_SHARE = 0.3

_QUESTION_WORD_TEXT = """
What What's Which Who Who's Whose When Where How In By Does Do Is Can Could At Of If With For From
On To Out Over Under
"""
_QUESTION_WORDS = frozenset(_QUESTION_WORD_TEXT.split())
_STATEMENTS = frozenset(
    (
        "A",
        "An",
        "The",
        "There",
        "Given",
        "Having",
        "Each",
        "Every",
        "Regarding",
        "About",
        "Counting",
    )
)
_IMPERATIVE_TEXT = """
Add Calculate Code Compute Convert Copy Count Create Define Determine Divide Drop Express Factor
Figure Find Flip Get Give Help Implement Keep List Look Make Move Multiply Name Pick Please Put
Remind Remove Return Reverse Run Say Select Solve Sort Spell Start State Subtract Sum Take Tell
Turn Work Write
"""
_IMPERATIVES = frozenset(_IMPERATIVE_TEXT.split())
_OPENED = ("Quick question", "Answer briefly", "First")
"""Parts that start like the opening of a compound question, from which nothing tells them apart."""
_NUMBER_RELATIONS = ("sides", "month_number", "event_year")
_INVENTED_NUMBERS = frozenset({"year", "count"})
_TEXT_RELATIONS = ("capital", "landmark_city", "city_country", "baby_animal", "roman_god")


@dataclass(frozen=True)
class Part:
    """One part of a compound question."""

    ask: str
    """What to ask a specialist; `{{a}}` stands for the answer of part `a`."""
    gold: str = ""
    """The right answer; empty where no specialist knows one."""
    metric: Metric = "exact"
    domain: str = ""
    tests: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compound:
    """A question and what it splits into."""

    query: str
    parts: tuple[Part, ...]
    kind: str
    """`single`, `pair`, `triple`, `phrases`, `hop`, `hop_pair`, `hop_chain` or `mixed`."""
    answers: tuple[Part, ...]
    """The parts whose answers the user asked for; the others only lead there."""

    @property
    def split_text(self) -> str:
        """The answer of the splitting model."""
        return split_text([part.ask for part in self.parts])


def split_text(asks: Sequence[str]) -> str:
    """Subtasks as the splitting model writes them."""
    subtasks = [{"id": key, "ask": ask} for key, ask in zip(IDS, asks, strict=False)]
    return json.dumps({"subtasks": subtasks}, ensure_ascii=False)


def split_prompt(query: str) -> str:
    """The user's turn that asks for a split."""
    return prompt(PROMPT_NAME, question=query)


def split_conversation(rng: random.Random) -> Conversation:
    """One training conversation that splits a question."""
    compound = draw_compound(rng, "improvised", weights=TRAINED_WEIGHTS)
    return Conversation(
        (
            {"role": "user", "content": split_prompt(compound.query)},
            {"role": "assistant", "content": compound.split_text},
        )
    )


def split_question(rng: random.Random, split: Split, kinds: Sequence[str] = ()) -> Question:
    """A labelled split; names in it are reserved, so training never showed them."""
    while True:
        compound = draw_compound(rng, split, new_names=True)
        if not kinds or compound.kind in kinds:
            return Question(
                query=split_prompt(compound.query),
                gold=compound.split_text,
                metric="verbatim",
                domain="split",
                kind=f"split.{compound.kind}",
                split=split,
            )


def draw_compound(
    rng: random.Random,
    frame: Frame,
    *,
    new_names: bool = False,
    answerable: bool = False,
    weights: Sequence[int] = _WEIGHTS,
) -> Compound:
    """A random compound question.

    Args:
        rng: Source of randomness.
        frame: How its parts are put together; the parts are always in trained wordings.
        new_names: Whether invented names are reserved ones, which training never shows.
        answerable: Whether every part has a gold answer.
        weights: How often each kind is drawn: single, pair, triple, phrases, hop, hop_pair,
            hop_chain, mixed.
    """
    source = _Parts(rng, new_names=new_names, answerable=answerable)
    makers: tuple[Callable[[_Parts, Frame], Compound], ...] = (
        _single,
        _pair,
        _triple,
        _phrases,
        _hop,
        _hop_pair,
        _hop_chain,
        _mixed,
    )
    return rng.choices(makers, weights)[0](source, frame)


class _Parts:
    """Draws parts in the wordings that the specialists know."""

    def __init__(self, rng: random.Random, *, new_names: bool, answerable: bool) -> None:
        self.rng = rng
        self.new_names = new_names
        self.answerable = answerable

    def sentence(self) -> Part:
        """A part that starts with a capital or a digit and ends with a final mark."""
        while True:
            part = self.any()
            if (
                len(part.ask) <= MAX_PART_CHARS
                and part.ask[-1] in ".?"
                and not part.ask[0].islower()
                and "\n" not in part.ask
                and not part.ask.startswith(_OPENED)
            ):
                return part

    def any(self) -> Part:
        """A part in whatever style."""
        draw = self.rng.random()
        if draw < 0.42:
            return self.fact()
        if draw < 0.76:
            return self.sum()
        return self.value() if draw < 0.9 else self.function()

    def fact(self) -> Part:
        """A question about a real fact, or one that can only be looked up."""
        rng = self.rng
        if self.answerable:
            if rng.random() < 0.6:
                return _part(facts_tasks.GENERATOR.closed_book_question(rng, "seen"))
            return _part(facts_tasks.corpus_question(rng, "seen"))
        draw = rng.random()
        if draw < 0.45:
            return _part(facts_tasks.GENERATOR.closed_book_question(rng, "seen"))
        if draw < 0.6:
            return Part(_what_is(self.other_phrase()))
        if draw < 0.7:
            name = self._name()
            real = rng.choice(list(load_facts()[0].values()))
            return Part(real.question(rng, Subject(name, name), "seen"))
        relations, types, _ = load_gazetteer()
        entity_type = rng.choice(list(types))
        subject = gazetteer.invented_subject(rng, entity_type, reserved=self.new_names)
        key = rng.choice(types[entity_type]["relations"])
        return Part(relations[key].question(rng, subject, "seen"))

    def sum(self) -> Part:
        """A question for the calculator, without greetings."""
        rng = self.rng
        if rng.random() < 0.35:
            phrase, gold = self.sum_phrase()
            return Part(_what_is(phrase), gold, "number", "math")
        kind = rng.choices(HARD_KINDS, [k.weight for k in HARD_KINDS])[0]
        if rng.random() < 0.2:
            kind = rng.choice(KINDS)
        problem, result = math_tasks.draw_problem(kind, rng)
        text = math_tasks.word(kind, problem, "seen", rng, plain=True)
        return Part(text, result, "number", "math")

    def value(self) -> Part:
        """A question for Python; no code in the text."""
        while True:
            question, _ = QUESTIONS.value_question(self.rng, "seen")
            if question.kind != "value.run_code":
                return _part(question)

    def function(self) -> Part:
        """A function to write."""
        ask = QUESTIONS.function_question
        if self.rng.random() < 0.4:
            ask = QUESTIONS.composed_question
        return _part(ask(self.rng, "seen")[0])

    def sum_phrase(self) -> tuple[str, str]:
        """A noun phrase for a sum, and its value."""
        while True:
            pattern, operation = self.rng.choice(wording.SUM_PHRASES)
            a, b = number(self.rng, 4), number(self.rng, 3)
            value = _apply(operation, a, b)
            if value is not None:
                return pattern.replace("{a}", a).replace("{b}", b), value

    def fact_phrase(self) -> tuple[str, str]:
        """A noun phrase for a fact, with its article, and its value; empty where unknown."""
        rng = self.rng
        draw = rng.random()
        if draw < 0.5 or self.answerable:
            relations, facts, _ = load_facts()
            key = rng.choice(list(facts))
            name = rng.choice(list(facts[key]))
            noun = rng.choice(relations[key].noun_phrases)
            return "the " + noun.replace("{e}", name), facts[key][name]
        if draw < 0.65:
            return self.other_phrase(), ""
        relations, types, _ = load_gazetteer()
        entity_type = rng.choice(list(types))
        subject = gazetteer.invented_subject(rng, entity_type, reserved=self.new_names)
        noun = rng.choice(relations[rng.choice(types[entity_type]["relations"])].noun_phrases)
        return "the " + noun.replace("{e}", subject.phrase), ""

    def number_phrase(self) -> tuple[str, str]:
        """A noun phrase for a fact that is a whole number, and the number."""
        rng = self.rng
        relations, facts, _ = load_facts()
        draw = rng.random()
        if self.answerable and draw < 0.4:
            entries = [
                e for e in gazetteer.corpus_entries() if e.relation.value in _INVENTED_NUMBERS
            ]
            entry = rng.choice(entries)
            noun = rng.choice(entry.relation.noun_phrases)
            return "the " + noun.replace("{e}", entry.subject.phrase), entry.value
        if self.answerable or draw < 0.4:
            key = rng.choice(_NUMBER_RELATIONS)
            name = rng.choice(list(facts[key]))
            noun = rng.choice(relations[key].noun_phrases)
            return "the " + noun.replace("{e}", name), facts[key][name]
        if draw < 0.6:
            return self.other_phrase(), ""
        invented_relations, types, _ = load_gazetteer()
        while True:
            entity_type = rng.choice(list(types))
            relation = invented_relations[rng.choice(types[entity_type]["relations"])]
            if relation.value in _INVENTED_NUMBERS:
                subject = gazetteer.invented_subject(rng, entity_type, reserved=self.new_names)
                noun = rng.choice(relation.noun_phrases)
                return "the " + noun.replace("{e}", subject.phrase), ""

    def text_phrase(self) -> tuple[str, str]:
        """A noun phrase for a fact that is one word, and the word."""
        rng = self.rng
        relations, facts, _ = load_facts()
        while True:
            key = rng.choice(_TEXT_RELATIONS)
            name = rng.choice(list(facts[key]))
            if facts[key][name].isalpha():
                noun = rng.choice(relations[key].noun_phrases)
                return "the " + noun.replace("{e}", name), facts[key][name]

    def other_phrase(self) -> str:
        """A noun phrase for something no model knows."""
        rng = self.rng
        facts = load_facts()[1]
        slots = {
            "element": rng.choice(list(facts["symbol"])),
            "country": rng.choice(list(facts["capital"])),
            "word": self._name(),
            "thing": rng.choice(("bicycle", "ticket", "brick", "piano", "lamp", "horse", "shirt")),
        }
        pattern = rng.choice(wording.OTHER_SUBJECTS)
        return "the " + re.sub(r"\{(\w+)\}", lambda slot: slots[slot[1]], pattern)

    def _name(self) -> str:
        words = 2 if self.rng.random() < 0.3 else 1
        return " ".join(invented.word(self.rng, reserved=self.new_names) for _ in range(words))


def _part(question: Question) -> Part:
    return Part(question.query, question.gold, question.metric, question.domain, question.tests)


def _what_is(phrase: str) -> str:
    return f"What is {phrase}?"


def _apply(operation: str, a: str, b: str) -> str | None:
    """The value of a sum as the calculator prints it; `None` where it is none to ask for."""
    expression = f"{a}*{b}/100" if operation == "%" else f"{a}{operation}{b}"
    try:
        value = evaluate(f"round({expression},4)")
    except ToolRetry:
        return None
    return None if "e" in value else value


# The parts as pieces of one text.


def _worded(
    rng: random.Random,
    group: dict[Split, tuple[T, ...]],
    frame: Frame,
    improvise: Callable[[random.Random], T],
) -> T:
    """A wording for a frame: one of its group, or one that is made up on the spot."""
    if frame != "improvised":
        return rng.choice(group[frame])
    return improvise(rng) if rng.random() < _IMPROVISED_SHARE else rng.choice(group["seen"])


def _trained(frame: Frame) -> Split:
    return "seen" if frame == "improvised" else frame


def lowered(ask: str) -> str:
    """The ask with a small first letter, where its first word is one that takes it."""
    first = ask.split(maxsplit=1)[0].rstrip(",:")
    if first in _QUESTION_WORDS | _IMPERATIVES | _STATEMENTS:
        return ask[0].lower() + ask[1:]
    return ask


def unmarked(ask: str) -> str | None:
    """The ask without its final mark; `None` where the mark could not be told from the rest."""
    first = ask.split(maxsplit=1)[0].rstrip(",:")
    if re.search(r"[.?!;] ", ask) or "\n" in ask:
        return None
    if (first in _QUESTION_WORDS and ask.endswith("?")) or (
        first in _IMPERATIVES and ask.endswith(".")
    ):
        return ask[:-1]
    return None


def joined(rng: random.Random, asks: Sequence[str], frame: Frame) -> str:
    """Asks as one text, in the wordings of a frame."""
    draw = rng.random()
    if draw < 0.2:
        text = _listed(rng, asks, frame)
    else:
        text = asks[0]
        for index, ask in enumerate(asks[1:], start=1):
            text = _linked(rng, text, ask, frame, is_last=index == len(asks) - 1)
    text = _opened(rng, text, frame if rng.random() < 0.5 else "seen")
    if rng.random() < 0.08:
        return text + _worded(
            rng, wording.ENDINGS, frame if rng.random() < 0.5 else "seen", wording.improvised_ending
        )
    if rng.random() < 0.1 and unmarked(asks[-1]) and text.endswith(asks[-1][-1]):
        return text[:-1]
    return text


def _listed(rng: random.Random, asks: Sequence[str], frame: Frame) -> str:
    marks = _worded(rng, wording.LIST_MARKS, frame, wording.improvised_marks)
    gap = "\n" if marks[0][0] in "-*>" or rng.random() < 0.5 else " "
    return gap.join(mark + ask for mark, ask in zip(marks, asks, strict=False))


def _linked(rng: random.Random, text: str, ask: str, frame: Frame, *, is_last: bool) -> str:
    last_ask = re.split(r"(?<=[.?;,:]) ", text)[-1]
    bare = unmarked(text) if unmarked(text) is not None else _bare_end(last_ask, text)
    if bare is not None and rng.random() < 0.6:
        join = _worded(rng, wording.CLAUSE_JOINS, frame, wording.improvised_clause_join)
        if not is_last and rng.random() < 0.6:
            join = ", {b}"
        return bare + join.replace("{b}", lowered(ask)).replace("{B}", ask)
    join = _worded(rng, wording.SENTENCE_JOINS, frame, wording.improvised_sentence_join)
    return text + join.replace("{b}", lowered(ask)).replace("{B}", ask)


def _bare_end(last_ask: str, text: str) -> str | None:
    """The text without its final mark, where its last ask can do without."""
    capital = last_ask[:1].upper() + last_ask[1:]
    return text[:-1] if last_ask and unmarked(capital) is not None else None


def _opened(rng: random.Random, text: str, frame: Frame) -> str:
    """The text behind an opening, or with a small first letter, or as it stands."""
    draw = rng.random()
    if draw < 0.3:
        opening = _worded(rng, wording.OPENINGS, frame, wording.improvised_opening)
        after_stop = opening.rstrip()[-1] in ".!?"
        keep = after_stop or (opening.endswith(": ") and rng.random() < 0.5)
        return opening + (text if keep else lowered(text))
    if draw < 0.38:
        return lowered(text)
    return text


# The kinds of compound.


def _compound(
    query: str, parts: Sequence[Part], kind: str, answers: Sequence[Part] = ()
) -> Compound:
    return Compound(query, tuple(parts), kind, tuple(answers or parts))


def _single(source: _Parts, frame: Frame) -> Compound:
    """One part, which stays as it is."""
    part = source.any() if source.rng.random() < 0.6 else source.sentence()
    return _compound(part.ask, [part], "single")


def _pair(source: _Parts, frame: Frame) -> Compound:
    parts = [source.sentence(), source.sentence()]
    return _compound(joined(source.rng, [p.ask for p in parts], frame), parts, "pair")


def _triple(source: _Parts, frame: Frame) -> Compound:
    parts = [source.sentence() for _ in range(3)]
    return _compound(joined(source.rng, [p.ask for p in parts], frame), parts, "triple")


def _phrases(source: _Parts, frame: Frame) -> Compound:
    """Noun phrases behind one head, such as `Tell me the capital of Japan and 15% of 240`."""
    rng = source.rng
    count = 3 if rng.random() < 0.2 else 2
    parts, phrases = [], []
    for _ in range(count):
        if rng.random() < 0.3:
            phrase, gold = source.sum_phrase()
            parts.append(Part(_what_is(phrase), gold, "number", "math"))
        else:
            phrase, gold = source.fact_phrase()
            parts.append(Part(_what_is(phrase), gold, "exact", "facts"))
        phrases.append(phrase)
    head = _worded(rng, wording.HEADS, frame, wording.improvised_head)
    last_join = rng.choice((" and ", ", and ", " and also "))
    if frame == "held_out" and rng.random() < 0.5:
        last_join = rng.choice((" plus ", ", as well as "))
    query = f"{head} {', '.join(phrases[:-1])}{last_join}{phrases[-1]}"
    query += "?" if head.startswith(("What", "Do", "Can")) else "."
    return _compound(_opened(rng, query, "seen"), parts, "phrases")


def _hop(source: _Parts, frame: Frame) -> Compound:
    parts, query = _hop_parts(source, frame, 0)
    return _compound(query, parts, "hop", parts[-1:])


def _hop_parts(source: _Parts, frame: Frame, offset: int) -> tuple[list[Part], str]:
    """A fact and a question on it, with the whole query; `offset` is the index of the fact."""
    rng = source.rng
    draw = rng.random()
    if draw < 0.12:
        phrase, gold = source.text_phrase()
        pattern, kind = rng.choice(wording.TEXT_HOPS[_trained(frame)])
        value, metric = _value(kind, gold)
        ask = pattern.replace("{x}", f"'{_reference(offset)}'")
        hop = Part(ask, value, metric, "code")
        return [Part(_what_is(phrase), gold, "exact", "facts"), hop], _embedded(
            rng, pattern.replace("{x}", phrase)
        )
    phrase, gold = source.number_phrase()
    fact = Part(_what_is(phrase), gold, "exact", "facts")
    is_embedded = rng.random() < 0.5
    hops = frame if is_embedded or rng.random() < 0.4 else "seen"
    pattern, hop = _number_hop(rng, hops, gold, offset)
    if is_embedded:
        return [fact, hop], _embedded(rng, pattern.replace("{x}", phrase))
    pronoun = _worded(
        rng, wording.PRONOUNS, frame if rng.random() < 0.6 else "seen", wording.improvised_pronoun
    )
    first = fact.ask
    if rng.random() < 0.4:
        takes = frame if rng.random() < 0.6 else "seen"
        first = f"{_worded(rng, wording.TAKES, takes, wording.improvised_take)} {phrase}."
    query = _hop_joined(rng, first, pattern.replace("{x}", pronoun), frame)
    return [fact, hop], _opened(rng, query, frame if rng.random() < 0.3 else "seen")


def _number_hop(rng: random.Random, frame: Frame, gold: str, index: int) -> tuple[str, Part]:
    """A question on the number that part `index` answers: with its slot `{x}` open, and as a part.

    Args:
        rng: Source of randomness.
        frame: Which wordings to choose from.
        gold: The number; empty where nobody knows it.
        index: Which part answers with the number.
    """
    while True:
        if rng.random() < 0.15:
            pattern, kind = rng.choice(wording.VALUE_HOPS[_trained(frame)])
            value, metric = _value(kind, int(gold)) if gold else ("", "exact")
            return pattern, Part(pattern.replace("{x}", _reference(index)), value, metric, "code")
        pattern, operation = _worded(rng, wording.NUMBER_HOPS, frame, wording.improvised_number_hop)
        other = number(rng, 3)
        pattern = pattern.replace("{n}", other)
        found = _apply(operation, gold, other) if gold else ""
        if found is not None:
            return pattern, Part(pattern.replace("{x}", _reference(index)), found, "number", "math")


def _value(kind: str, argument: object) -> tuple[str, Metric]:
    """What Python prints for a value question of a kind, and how to score it."""
    found = next(k for k in VALUE_KINDS if k.kind == kind)
    value = found.reference(argument)
    return printed(value), "exact" if isinstance(value, str) else "number"


def _hop_joined(rng: random.Random, first: str, second: str, frame: Frame) -> str:
    join = _worded(rng, wording.HOP_JOINS, frame, wording.improvised_hop_join)
    if join.startswith("."):
        join = first[-1] + join[1:]
    return first[:-1] + join.replace("{b}", lowered(second)).replace("{B}", second)


def _embedded(rng: random.Random, query: str) -> str:
    text = query[0].upper() + query[1:]
    draw = rng.random()
    if draw < 0.12:
        return _opened(rng, text, "seen")
    return text[:-1] if draw < 0.2 and unmarked(text) else text


def _reference(index: int) -> str:
    return "{{" + IDS[index] + "}}"


def _hop_pair(source: _Parts, frame: Frame) -> Compound:
    """A sum on two facts."""
    rng = source.rng
    while True:
        (one, gold), (other, other_gold) = source.number_phrase(), source.number_phrase()
        pattern, operation = _worded(rng, wording.PAIR_HOPS, frame, wording.improvised_pair_hop)
        value = _apply(operation, gold, other_gold) if gold and other_gold else ""
        if value is None or one == other or (source.answerable and not value):
            continue
        facts = [
            Part(_what_is(one), gold, "exact", "facts"),
            Part(_what_is(other), other_gold, "exact", "facts"),
        ]
        ask = pattern.replace("{x}", _reference(0)).replace("{y}", _reference(1))
        hop = Part(ask, value, "number", "math")
        query = pattern.replace("{x}", one).replace("{y}", other)
        return _compound(_embedded(rng, query), [*facts, hop], "hop_pair", [hop])


def _hop_chain(source: _Parts, frame: Frame) -> Compound:
    """A fact, a sum on it, and a sum on that."""
    rng = source.rng
    parts, query = _hop_parts(source, frame, 0)
    while parts[-1].domain != "math" or not re.fullmatch(r"\d*", parts[-1].gold):
        parts, query = _hop_parts(source, frame, 0)
    pattern, hop = _number_hop(rng, "seen", parts[-1].gold, 1)
    pronoun = _worded(rng, wording.PRONOUNS, frame, wording.improvised_pronoun)
    if query[-1] not in ".?":
        query += "."
    query = _hop_joined(rng, query, pattern.replace("{x}", pronoun), frame)
    return _compound(query, [*parts, hop], "hop_chain", [hop])


def _mixed(source: _Parts, frame: Frame) -> Compound:
    """A part of its own and a fact with a sum on it, in either order."""
    rng = source.rng
    own = source.sentence()
    if rng.random() < 0.5:
        hop_parts, hop_query = _hop_parts(source, "seen", 1)
        query = joined(rng, [own.ask, _sentence(hop_query)], frame)
        return _compound(query, [own, *hop_parts], "mixed", [own, hop_parts[-1]])
    hop_parts, hop_query = _hop_parts(source, "seen", 0)
    query = joined(rng, [_sentence(hop_query), own.ask], frame)
    return _compound(query, [*hop_parts, own], "mixed", [hop_parts[-1], own])


def _sentence(query: str) -> str:
    text = query[0].upper() + query[1:]
    return (
        text
        if text[-1] in ".?"
        else f"{text}{'?' if lowered(text) != text and text.split()[0] in _QUESTION_WORDS else '.'}"
    )
