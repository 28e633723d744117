"""Questions that nano-math answers by a query of the tool `database`, and how it learns to.

The model writes the query, reads the rows, and answers with what is in them, nothing around it. It
knows the three tables of the shop by heart; where the tool is not offered, it says that it does not
know.
"""

from __future__ import annotations

import random
from typing import Any

from benchmarks.nano import shop
from benchmarks.nano.chat_format import tool_call
from benchmarks.nano.facts_tasks import UNKNOWN
from benchmarks.nano.math_phrasings import restyle
from benchmarks.nano.math_tasks import with_sources
from benchmarks.nano.sql_queries import Ask, draw_ask, worded
from benchmarks.nano.task import Conversation, EvalCell, Question, Split

TOOL = "database"
_GOOD_PAIRS = ("nano-math@database",)
_OTHER_TOOLS = ("calculator", "python", "retrieval")
_UNOFFERED_SHARE = 0.1
_NEW_SHARE = 0.3
"""Of the held-out questions, those whose combination of target and conditions is new."""

SQL_CELLS: tuple[EvalCell, ...] = (
    EvalCell("database", "seen", (TOOL,), 0.9, required_call=0.98),
    EvalCell("database", "held_out", (TOOL,), 0.75, required_call=0.98),
    EvalCell("database, rows", "seen", (TOOL,), 0.9, required_call=0.98),
    EvalCell("database, rows", "held_out", (TOOL,), 0.75, required_call=0.98),
    EvalCell("database, new combinations", "seen", (TOOL,), None),
    EvalCell("database, not offered", "seen", (), None),
)
"""`rows`: whether the query gives the right rows (execution accuracy); else the final answer."""


def answer_of(query: str) -> str:
    """The answer to a query: its cells, rows apart by commas."""
    return ", ".join(": ".join(map(str, row)) for row in shop.rows_of(query))


class SqlTasks:
    """Conversations and questions on the shop database."""

    model_id = "nano-math"

    def conversation(self, rng: random.Random, progress: float) -> Conversation:
        """One training conversation, in seen wordings and combinations."""
        if rng.random() < _UNOFFERED_SHARE:
            return _unoffered(rng)
        messages: list[dict[str, Any]] = []
        for _ in range(rng.choices((1, 2, 3), (4, 3, 2))[0]):
            ask = draw_ask(rng, "seen")
            messages += [
                {"role": "user", "content": _user_text(rng, ask)},
                tool_call(TOOL, query=ask.query),
                {"role": "tool", "content": shop.result_text(ask.query)},
                {"role": "assistant", "content": answer_of(ask.query)},
            ]
        offered = [TOOL]
        if rng.random() < 0.1:
            offered.append(rng.choice(_OTHER_TOOLS))
            rng.shuffle(offered)
        return Conversation(tuple(messages), tuple(offered))

    def questions(self, rng: random.Random, split: Split, n: int) -> list[Question]:
        """`n` labelled questions; the held-out ones have new wordings, and some new queries."""
        asked = []
        for _ in range(n):
            is_new = split == "held_out" and rng.random() < _NEW_SHARE
            asked.append(question_of(rng, draw_ask(rng, split, new=is_new), split))
        return asked


def question_of(rng: random.Random, ask: Ask, split: Split) -> Question:
    """A query as a labelled question."""
    text = _user_text(rng, ask) if split == "seen" else worded(rng, ask, split)
    rows = shop.rows_of(ask.query)
    is_number = len(rows) == 1 and len(rows[0]) == 1 and not isinstance(rows[0][0], str)
    return Question(
        query=text,
        gold=answer_of(ask.query),
        metric="number" if is_number else "exact",
        domain=TOOL,
        kind=ask.kind,
        split=split,
        good_pairs=_GOOD_PAIRS,
    )


def rows_question(rng: random.Random, split: Split) -> Question:
    """A question whose answer is the tool's whole result."""
    is_new = split == "held_out" and rng.random() < _NEW_SHARE
    ask = draw_ask(rng, split, new=is_new)
    return Question(
        query=question_of(rng, ask, split).query,
        gold=shop.result_text(ask.query).partition("\n")[2],
        metric="verbatim",
        domain=TOOL,
        kind=ask.kind,
        split=split,
        good_pairs=_GOOD_PAIRS,
    )


def new_question(rng: random.Random, split: Split) -> Question:
    """A question whose combination of target and conditions is held out."""
    return question_of(rng, draw_ask(rng, split, new=True), split)


def _user_text(rng: random.Random, ask: Ask) -> str:
    return restyle(worded(rng, ask, "seen"), rng)


def _unoffered(rng: random.Random) -> Conversation:
    """Questions without the tool, some among tools or sources of no use."""
    turns: list[dict[str, Any]] = []
    for _ in range(rng.randint(1, 3)):
        text = _user_text(rng, draw_ask(rng, "seen"))
        if rng.random() < 0.2:
            text = with_sources(text, rng)
        turns += [{"role": "user", "content": text}, {"role": "assistant", "content": UNKNOWN}]
    offered = rng.sample(_OTHER_TOOLS, rng.randint(1, 2)) if rng.random() < 0.4 else ()
    return Conversation(tuple(turns), tuple(offered))


GENERATOR = SqlTasks()
