"""Skills that a nano model may learn beside its own tasks: splitting questions, repairing code.

`with_skills` mixes them into a model's conversations; `SKILL_CELLS` measures them on its weights.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from benchmarks.nano.code_repair import draw_repair
from benchmarks.nano.compound import split_conversation, split_question
from benchmarks.nano.task import Conversation, EvalCell, Question, Split, TaskGenerator

if TYPE_CHECKING:
    from benchmarks.nano.evaluate import EvalItem

_PROMPTED_SHARE = 0.3
"""Of the repairs, those in the prompt of patterns."""

SKILL_CELLS: tuple[EvalCell, ...] = (
    EvalCell("split", "seen", (), 0.95),
    EvalCell("split, new wording", "held_out", (), 0.8),
    EvalCell("split, one part", "seen", (), None, ("single",)),
    EvalCell("repair", "seen", (), None),
    EvalCell("repair, new wording", "held_out", (), None),
    EvalCell("repair, as patterns ask", "seen", (), None),
)


class SkilledGenerator:
    """A model's generator with splits and repairs among its conversations.

    Args:
        base: The model's own generator.
        split_share: Share of conversations that split a question, in [0, 1].
        repair_share: Share of conversations that repair a function, in [0, 1].
    """

    def __init__(self, base: TaskGenerator, split_share: float, repair_share: float) -> None:
        self.model_id = base.model_id
        self.name_tokens: tuple[str, ...] = getattr(base, "name_tokens", ())
        self.token_split_pattern: str | None = getattr(base, "token_split_pattern", None)
        self._base = base
        self._split_share = split_share
        self._repair_share = repair_share

    def conversation(self, rng: random.Random, progress: float) -> Conversation:
        """One training conversation; see `TaskGenerator`."""
        draw = rng.random()
        if draw < self._split_share:
            return split_conversation(rng)
        if draw < self._split_share + self._repair_share:
            return repair_conversation(rng)
        return self._base.conversation(rng, progress)

    def questions(self, rng: random.Random, split: Split, n: int) -> list[Question]:
        """The model's own questions; see `TaskGenerator`."""
        return self._base.questions(rng, split, n)


def with_skills(
    base: TaskGenerator, *, split_share: float = 0.0, repair_share: float = 0.0
) -> TaskGenerator:
    """The generator with the skills mixed in; without a share, the generator as it is.

    Raises:
        ValueError: If the shares leave nothing for the model's own tasks.
    """
    if split_share + repair_share >= 1:
        raise ValueError(
            f"split_share={split_share!r} and repair_share={repair_share!r} leave no own tasks; "
            "their sum must be below 1"
        )
    if split_share + repair_share == 0:
        return base
    return SkilledGenerator(base, split_share, repair_share)


def repair_conversation(rng: random.Random) -> Conversation:
    """One training conversation that repairs a function."""
    repair = draw_repair(rng, "seen")
    is_prompted = rng.random() < _PROMPTED_SHARE
    text = repair.prompted() if is_prompted else repair.worded(rng, "seen")
    return Conversation((_user(text), {"role": "assistant", "content": repair.answer}))


def repair_question(rng: random.Random, split: Split, *, prompted: bool = False) -> Question:
    """A labelled repair, in a wording of the split or as patterns word it."""
    repair = draw_repair(rng, split)
    return Question(
        query=repair.prompted() if prompted else repair.worded(rng, split),
        gold=repair.answer,
        metric="unit_tests",
        domain="code",
        kind=f"repair.{repair.fault}",
        split=split,
        tests=repair.tests,
    )


def skill_items(cell: EvalCell, rng: random.Random, n: int) -> list[EvalItem]:
    """The prompts of a cell of `SKILL_CELLS`."""
    from benchmarks.nano.evaluate import EvalItem

    if cell.name.startswith("split"):
        asked = [split_question(rng, cell.split, cell.kinds) for _ in range(n)]
    else:
        prompted = cell.name == "repair, as patterns ask"
        asked = [repair_question(rng, cell.split, prompted=prompted) for _ in range(n)]
    return [EvalItem((_user(question.query),), cell.tools, question) for question in asked]


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}
