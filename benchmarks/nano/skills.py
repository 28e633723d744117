"""Skills that a nano model may learn beside its own tasks: splitting questions, repairing code.

`with_skills` mixes them into a model's conversations; `SKILL_CELLS` measures them on its weights.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from benchmarks.nano.bugs import similar
from benchmarks.nano.code_repair import Repair, draw_repair
from benchmarks.nano.compound import split_conversation, split_question
from benchmarks.nano.task import Conversation, EvalCell, Question, Split, TaskGenerator

if TYPE_CHECKING:
    from benchmarks.nano.evaluate import EvalItem

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
    """The prompts of a cell of `SKILL_CELLS`."""
    from benchmarks.nano.evaluate import EvalItem

    if cell.name.startswith("split"):
        asked = [split_question(rng, cell.split, cell.kinds) for _ in range(n)]
    else:
        prompted = cell.name.startswith("repair, as the pattern asks")
        asked = [repair_question(rng, cell.split, prompted=prompted) for _ in range(n)]
    return [EvalItem((_user(question.query),), cell.tools, question) for question in asked]


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}
