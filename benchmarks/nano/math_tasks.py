"""The tasks of nano-math: calculator calls where one is offered, direct answers where not.

Problem types are in `math_problems`, their wording in `math_phrasings.txt`. Direct answers to easy
sums are drilled; to hard ones they are hardly practised, so that a call makes the difference.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.nano import gazetteer
from benchmarks.nano.chat_format import tool_call
from benchmarks.nano.math_phrasings import expand, fill, load_phrasings, restyle, swap_synonyms
from benchmarks.nano.math_problems import EASY_KINDS, HARD_KINDS, KINDS, Kind, Problem
from benchmarks.nano.math_words import NAMES, THINGS, words
from benchmarks.nano.task import Conversation, EvalCell, Question, Split
from serve_app.errors import ToolRetry
from serve_app.tools.builtin.calculator import evaluate

if TYPE_CHECKING:
    from benchmarks.nano.evaluate import EvalItem

_GOOD_PAIRS = ("nano-math@calculator",)
_SYNONYM_SHARE = 0.25
_CURRICULUM_END = 0.12
_OTHER_TOOLS = ("python", "retrieval")
_SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a maths assistant.",
    "Answer briefly.",
    "You solve maths problems.",
    "Be concise and precise.",
    "You are a careful assistant. Use tools where they help.",
    "Help the user.",
    "Answer the question.",
)
_FAILURE = "I could not work this out."
_SIMPLE_KINDS = tuple(k for k in HARD_KINDS if k.name in {"add", "sub", "mul", "div", "expression"})


def draw_problem(kind: Kind, rng: random.Random) -> tuple[Problem, str]:
    """A problem whose expression has a value, and that value as the calculator prints it."""
    while True:
        problem = kind.make(rng)
        try:
            result = evaluate(problem.expression)
        except ToolRetry:
            continue
        if "e" not in result or kind.name == "ph_inverse":
            return problem, result


def word(
    kind: Kind, problem: Problem, split: Split, rng: random.Random, *, plain: bool = False
) -> str:
    """Put a problem into a phrasing of the split; only seen phrasings vary in style.

    Args:
        kind: Its problem type.
        problem: What to word.
        split: Which phrasings to choose from.
        rng: Source of randomness.
        plain: Whether to leave out greetings and typing habits.
    """
    phrasings = load_phrasings()[kind.section]
    phrasing = rng.choice(phrasings.seen if split == "seen" else phrasings.held_out)
    text = rng.choice(expand(phrasing))
    if split == "seen":
        text = swap_synonyms(text, rng, _SYNONYM_SHARE)
    text = fill(text, words(rng) | problem.slots)
    return restyle(text, rng) if split == "seen" and not plain else text


def with_sources(query: str, rng: random.Random) -> str:
    """A question behind passages of no use, in the layout of context retrieval."""
    sentences = []
    for _ in range(rng.randint(1, 4)):
        name, other = rng.sample(NAMES, 2)
        sentence = rng.choice(_SOURCE_SENTENCES).format(
            name=name,
            other=other,
            thing=rng.choice(THINGS),
            year=rng.randint(1400, 2020),
            height=rng.randint(300, 8000),
            share=rng.randint(2, 99),
        )
        sentences.append(sentence)
    return gazetteer.with_sources(query, sentences)


_SOURCE_SENTENCES = (
    "{name} was born in {year} in the town of {other}.",
    "The {thing} of {name} were first described by {other}.",
    "Mount {name} is {height} m high.",
    "The capital of {name}land is {other}ville.",
    "{name} wrote a book about {thing} in {year}.",
    "About {share}% of {thing} come from {name}land.",
)


def expected_answer(result: str) -> str:
    """The model's sentence after a tool result."""
    if result.startswith("error"):
        return _FAILURE
    return f"The answer is {result.removesuffix('.0')}."


class MathTasks:
    """Conversations and questions of nano-math."""

    model_id = "nano-math"

    def __init__(self) -> None:
        self._weights = [kind.weight for kind in HARD_KINDS]

    def conversation(self, rng: random.Random, progress: float) -> Conversation:
        """One training conversation.

        Args:
            rng: Source of randomness.
            progress: Share of training done; the first eighth has more sums in plain symbols.
        """
        roll = rng.random()
        if roll < 0.75:
            return self._tool_chat(rng, progress)
        if roll < 0.84:
            return self._easy_drill(rng)
        kinds: Sequence[Kind] = EASY_KINDS if roll < 0.95 else (self._hard_kind(rng, progress),)
        return self._direct_chat(rng, rng.choice(kinds))

    def questions(self, rng: random.Random, split: Split, n: int) -> list[Question]:
        """`n` labelled questions over all problem types in turn, easy ones included."""
        kinds = list(KINDS)
        rng.shuffle(kinds)
        return [self.question(kinds[index % len(kinds)], rng, split) for index in range(n)]

    def question(self, kind: Kind, rng: random.Random, split: Split) -> Question:
        """One labelled question of a problem type."""
        problem, result = draw_problem(kind, rng)
        return Question(
            query=word(kind, problem, split, rng),
            gold=result,
            metric="number",
            domain="math",
            kind=kind.name,
            split=split,
            good_pairs=_GOOD_PAIRS,
        )

    def _hard_kind(self, rng: random.Random, progress: float) -> Kind:
        if rng.random() < 0.6 * (1 - progress / _CURRICULUM_END):
            return rng.choice(_SIMPLE_KINDS)
        return rng.choices(HARD_KINDS, self._weights)[0]

    def _tool_chat(self, rng: random.Random, progress: float) -> Conversation:
        messages = _opening(rng)
        for _ in range(rng.choices((1, 2, 3), (5, 3, 2))[0]):
            is_easy = rng.random() < 0.08
            kind = rng.choice(EASY_KINDS) if is_easy else self._hard_kind(rng, progress)
            problem, result = draw_problem(kind, rng)
            query = word(kind, problem, "seen", rng)
            if rng.random() < 0.05:
                query = with_sources(query, rng)
            result = _as_returned(result, rng)
            messages += [
                {"role": "user", "content": query},
                tool_call("calculator", expression=problem.expression),
                {"role": "tool", "content": result},
                {"role": "assistant", "content": expected_answer(result)},
            ]
        offered = ["calculator"]
        if rng.random() < 0.25:
            offered += rng.sample(_OTHER_TOOLS, rng.randint(1, 2))
            rng.shuffle(offered)
        return Conversation(tuple(messages), tuple(offered))

    def _easy_drill(self, rng: random.Random) -> Conversation:
        messages = _opening(rng)
        for _ in range(rng.randint(5, 9)):
            messages += _direct_turns(rng.choice(EASY_KINDS), rng)
        return Conversation(tuple(messages), _useless_tools(rng))

    def _direct_chat(self, rng: random.Random, kind: Kind) -> Conversation:
        turns = _direct_turns(kind, rng)
        if rng.random() < 0.2:
            turns[0]["content"] = with_sources(turns[0]["content"], rng)
        return Conversation(tuple(_opening(rng) + turns), _useless_tools(rng))


def _opening(rng: random.Random) -> list[dict[str, Any]]:
    if rng.random() < 0.12:
        return [{"role": "system", "content": rng.choice(_SYSTEM_MESSAGES)}]
    return []


def _direct_turns(kind: Kind, rng: random.Random) -> list[dict[str, Any]]:
    problem, result = draw_problem(kind, rng)
    return [
        {"role": "user", "content": word(kind, problem, "seen", rng)},
        {"role": "assistant", "content": f"The answer is {result}."},
    ]


def _useless_tools(rng: random.Random) -> tuple[str, ...]:
    """In a quarter of the direct chats, tools that are not to be called."""
    if rng.random() < 0.25:
        return tuple(rng.sample(_OTHER_TOOLS, rng.randint(1, 2)))
    return ()


def _as_returned(result: str, rng: random.Random) -> str:
    """The result as this or another calculator would print it, now and then an error."""
    roll = rng.random()
    if roll < 0.05 and result.isdigit():
        return f"{result}.0"
    if roll > 0.99:
        return rng.choice(("error: division by zero", "error: the result is too large", "error"))
    return result


_EASY = tuple(kind.name for kind in EASY_KINDS)
_HARD = tuple(kind.name for kind in HARD_KINDS)

EVAL_CELLS: tuple[EvalCell, ...] = (
    EvalCell("calculator", "seen", ("calculator",), 0.95, required_call=0.99),
    EvalCell("calculator", "held_out", ("calculator",), 0.85, required_call=0.99),
    EvalCell("all tools offered", "held_out", ("calculator", "python", "retrieval"), None),
    EvalCell("calculator, sources", "held_out", ("calculator",), None),
    EvalCell("direct, easy sums", "seen", (), None, _EASY),
    EvalCell("direct, hard sums", "seen", (), None, _HARD),
    EvalCell("other tools, easy", "seen", ("python", "retrieval"), None, _EASY),
    EvalCell("direct, sources", "seen", (), None, _EASY),
)
"""The first cell against "direct, hard sums" is what routing to the calculator gains."""


def evaluation_items(cell: EvalCell, rng: random.Random, n: int) -> list[EvalItem] | None:
    """Prompts of the cells with sources in the text; `None` for the others."""
    if "sources" not in cell.name:
        return None
    from benchmarks.nano.evaluate import EvalItem

    kinds = [kind for kind in KINDS if not cell.kinds or kind.name in cell.kinds]
    items = []
    for index in range(n):
        question = GENERATOR.question(kinds[index % len(kinds)], rng, cell.split)
        content = with_sources(question.query, rng)
        items.append(EvalItem(({"role": "user", "content": content},), cell.tools, question))
    return items


GENERATOR = MathTasks()
