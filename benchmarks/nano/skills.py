"""Skills that a nano model may learn beside its own tasks.

Splitting questions, repairing code, asking a database, and asking a clock.
`with_skills` mixes them into a model's conversations; `skill_cells` measures them on its weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from benchmarks.nano import clock_tasks, shop, sql_tasks
from benchmarks.nano.bugs import similar
from benchmarks.nano.code_repair import Repair, draw_repair
from benchmarks.nano.compound import split_conversation, split_question
from benchmarks.nano.facts_tasks import UNKNOWN
from benchmarks.nano.task import Conversation, EvalCell, Question, Split, TaskGenerator

if TYPE_CHECKING:
    from benchmarks.nano.evaluate import EvalItem, ToolFunction

_PROMPTED_SHARE = 0.75
"""Of the repairs, those in the prompts of the pattern `debug`."""
_SIMILAR_SHARE = 0.6
"""Of the prompted repairs of logic errors, those that have a similar bug beside them."""
_KNOWN_SHARE = 0.3
"""Of these, those for which bugs of the same function are known."""

SKILL_CELLS: tuple[EvalCell, ...] = (
    EvalCell("split", "seen", (), 0.95),
    EvalCell("split, new wording", "held_out", (), 0.8),
    EvalCell("split, one part", "seen", (), None, ("single",)),
    EvalCell("repair", "seen", (), None),
    EvalCell("repair, new wording", "held_out", (), None),
    EvalCell("repair, as the pattern asks", "seen", (), None),
    EvalCell("repair, as the pattern asks, new functions", "held_out", (), None),
)
TOOL_CELLS: tuple[EvalCell, ...] = (*sql_tasks.SQL_CELLS, *clock_tasks.CLOCK_CELLS)
"""The cells of the model that asks the tools `database` and `clock`."""

Draw = Callable[[random.Random], Conversation]


def skill_cells(name: str) -> tuple[EvalCell, ...]:
    """The cells of the skills that a nano model is meant to learn, by short name."""
    return TOOL_CELLS if name == "math" else SKILL_CELLS


class SkilledGenerator:
    """A model's generator with conversations of skills among its own.

    Args:
        base: The model's own generator.
        skills: Share of conversations of each skill, in [0, 1], and what draws them.
    """

    def __init__(self, base: TaskGenerator, skills: Sequence[tuple[float, Draw]]) -> None:
        self.model_id = base.model_id
        self.name_tokens: tuple[str, ...] = getattr(base, "name_tokens", ())
        self.token_split_pattern: str | None = getattr(base, "token_split_pattern", None)
        self._base = base
        self._skills = tuple(skills)

    def conversation(self, rng: random.Random, progress: float) -> Conversation:
        """One training conversation; see `TaskGenerator`."""
        draw = rng.random()
        for share, converse in self._skills:
            if draw < share:
                return converse(rng)
            draw -= share
        return self._base.conversation(rng, progress)

    def questions(self, rng: random.Random, split: Split, n: int) -> list[Question]:
        """The model's own questions; see `TaskGenerator`."""
        return self._base.questions(rng, split, n)


def with_skills(
    base: TaskGenerator,
    *,
    split_share: float = 0.0,
    repair_share: float = 0.0,
    sql_share: float = 0.0,
    clock_share: float = 0.0,
) -> TaskGenerator:
    """The generator with the skills mixed in; without a share, the generator as it is.

    Raises:
        ValueError: If the shares leave nothing for the model's own tasks.
    """
    shares = (split_share, repair_share, sql_share, clock_share)
    if sum(shares) >= 1:
        raise ValueError(
            f"split_share={split_share!r}, repair_share={repair_share!r}, sql_share={sql_share!r} "
            f"and clock_share={clock_share!r} leave no own tasks; their sum must be below 1"
        )
    if sum(shares) == 0:
        return base
    draws: tuple[Draw, ...] = (
        split_conversation,
        repair_conversation,
        lambda rng: sql_tasks.GENERATOR.conversation(rng, 1.0),
        lambda rng: clock_tasks.GENERATOR.conversation(rng, 1.0),
    )
    return SkilledGenerator(base, tuple(zip(shares, draws, strict=True)))


def repair_conversation(rng: random.Random) -> Conversation:
    """One training conversation that repairs a function."""
    repair = draw_repair(rng, "seen")
    is_prompted = rng.random() < _PROMPTED_SHARE
    text = _prompted(rng, repair) if is_prompted else repair.worded(rng, "seen")
    return Conversation((_user(text), {"role": "assistant", "content": repair.answer}))


def _prompted(rng: random.Random, repair: Repair) -> str:
    if repair.error != "logic" or rng.random() >= _SIMILAR_SHARE:
        return repair.prompted()
    return repair.prompted(similar(repair, knows_function=rng.random() < _KNOWN_SHARE))


def repair_question(rng: random.Random, split: Split, *, prompted: bool = False) -> Question:
    """A labelled repair, in a wording of the split or as patterns word it."""
    repair = draw_repair(rng, split)
    known = split == "seen"
    looked_up = similar(repair, knows_function=known) if repair.error == "logic" else None
    return Question(
        query=repair.prompted(looked_up) if prompted else repair.worded(rng, split),
        gold=repair.answer,
        metric="unit_tests",
        domain="code",
        kind=f"repair.{repair.error}",
        split=split,
        tests=repair.tests,
    )


def skill_items(cell: EvalCell, rng: random.Random, n: int) -> list[EvalItem]:
    """The prompts of a cell of `skill_cells`."""
    from benchmarks.nano.evaluate import EvalItem

    if cell in sql_tasks.SQL_CELLS:
        return _sql_items(cell, rng, n)
    if cell in clock_tasks.CLOCK_CELLS:
        return _clock_items(cell, rng, n)
    if cell.name.startswith("split"):
        asked = [split_question(rng, cell.split, cell.kinds) for _ in range(n)]
    else:
        prompted = cell.name.startswith("repair, as the pattern asks")
        asked = [repair_question(rng, cell.split, prompted=prompted) for _ in range(n)]
    return [EvalItem((_user(question.query),), cell.tools, question) for question in asked]


def _sql_items(cell: EvalCell, rng: random.Random, n: int) -> list[EvalItem]:
    from benchmarks.nano.evaluate import EvalItem

    def run(function: str, arguments: Mapping[str, Any]) -> str:
        text = shop.result_text(str(arguments["query"]))
        return text.partition("\n")[2] if judges_rows else text

    judges_rows = cell.name == "database, rows"
    if judges_rows:
        asked = [sql_tasks.rows_question(rng, cell.split) for _ in range(n)]
    elif cell.name == "database, new combinations":
        asked = [sql_tasks.new_question(rng, cell.split) for _ in range(n)]
    else:
        asked = sql_tasks.GENERATOR.questions(rng, cell.split, n)
    asked = [_as_offered(question, cell) for question in asked]
    return [EvalItem((_user(q.query),), cell.tools, q, run, judges_rows) for q in asked]


def _clock_items(cell: EvalCell, rng: random.Random, n: int) -> list[EvalItem]:
    """Prompts about the clock; the real server answers, and what "now" is stays as it was asked."""
    from benchmarks.nano.clock_server import clock_server
    from benchmarks.nano.evaluate import EvalItem

    if cell.name != "clock, now":
        run = clock_server().call if cell.tools else None
        asked = clock_tasks.GENERATOR.questions(rng, cell.split, n)
        asked = [_as_offered(question, cell) for question in asked]
        return [EvalItem((_user(q.query),), cell.tools, q, run) for q in asked]
    items = []
    for _ in range(n):
        call = clock_tasks.moving_call(rng)
        result = clock_server().result(call.function, call.arguments)
        question = clock_tasks.question_of(rng, call, cell.split, result)
        remembered = _remembering(call, result)
        items.append(EvalItem((_user(question.query),), cell.tools, question, remembered))
    return items


def _remembering(call: clock_tasks.Call, result: dict[str, Any]) -> ToolFunction:
    """The real server, whose earlier result of a call is given again."""
    from benchmarks.nano.clock_server import clock_server

    def run(function: str, arguments: Mapping[str, Any]) -> str:
        if (function, arguments) == (call.function, call.arguments):
            return clock_tasks.shown(result)
        return clock_server().call(function, arguments)

    return run


def _as_offered(question: Question, cell: EvalCell) -> Question:
    """Without the tool, not to know is right."""
    return question if cell.tools else replace(question, gold=UNKNOWN, metric="exact")


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}
