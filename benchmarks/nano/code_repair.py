"""Debugging requests of nano-code: a function with one fault and a report of it, to be mended.

A fault is made by changing the right program in one place; what is wrong is found by the engine of
the `debug` tool, so training reads what the tool says in serving. Held out are wordings, kinds of
reports, some fixed functions, and functions composed as none in training.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from benchmarks.nano.code_composed import draw_composition, draw_items
from benchmarks.nano.code_faults import ERROR_TYPES, FAULTS, Fault, faulty_variants
from benchmarks.nano.code_functions import FUNCTION_TASKS, FunctionTask
from benchmarks.nano.code_questions import code_answer, composition_tests, function_tests
from benchmarks.nano.code_reports import report, worded
from benchmarks.nano.prompts import prompt
from benchmarks.nano.task import Split
from serve_app.tools.builtin.debug import told
from serve_app.tools.builtin.debug_engine import OutOfTime, examine
from serve_app.tools.reports import ErrorType

PROMPT_NAME = "nano-repair"
LOGIC_PROMPT_NAME = "nano-repair-logic"

HELD_OUT_FUNCTIONS: frozenset[str] = frozenset(task.kind for task in FUNCTION_TASKS[3::8])
"""Fixed functions of which no faulty one is ever mended in training."""

_FIXED_SHARE = 0.6
_TRIES = 20
"""Functions that are tried for one kind of fault; some kinds have no place in most."""
_MAX_STEPS = 20_000
"""Lines that a faulty function may run."""
_MAX_SIZE = 10_000
"""Characters, items or bits of a value that it may make: some faults double a value per line."""
_MAX_FAILURE_CHARS = 220


@dataclass(frozen=True)
class Repair:
    """A faulty function and what it takes to mend it."""

    code: str
    """The faulty code, without a fence."""
    finding: dict[str, Any]
    """What the debug tool finds; see `debug_engine.examine`."""
    answer: str
    """The right code in a fence."""
    tests: tuple[str, ...]
    fault: Fault
    error: ErrorType
    function: str
    """Kind of the function, or `composed`."""

    @property
    def said(self) -> str:
        """What the debug tool says."""
        return told(self.finding)

    def worded(self, rng: random.Random, split: Split) -> str:
        """The request as a user of the split words it."""
        said = report(rng, split, self.error, self.finding, self.code)
        return worded(rng, split, self.code, said)

    def prompted(self, similar: str | None = None) -> str:
        """The request as the pattern words it; with the similar bugs that it has looked up."""
        slots = {"found.data.code": self.code, "found": self.said}
        if similar is None:
            return prompt(PROMPT_NAME, **slots)
        return prompt(LOGIC_PROMPT_NAME, **slots, similar=similar)


@dataclass(frozen=True)
class _Source:
    """A right function, and how to call and test it."""

    kind: str
    answer: str
    arguments: Callable[[], tuple[Any, ...]]
    tests: Callable[[], tuple[str, ...]]


def draw_repair(rng: random.Random, split: Split, error: ErrorType | None = None) -> Repair:
    """A random repair.

    Args:
        rng: Where it comes from.
        split: `held_out` takes functions of which training mends none.
        error: The error that the code has; `None`: any, all as likely.
    """
    wanted = rng.choice(ERROR_TYPES) if error is None else error
    while True:
        fault = rng.choice(FAULTS[wanted])
        for _ in range(_TRIES):
            repair = _with_fault(rng, split, wanted, fault)
            if repair is not None:
                return repair


def _with_fault(rng: random.Random, split: Split, wanted: ErrorType, fault: Fault) -> Repair | None:
    """One try to put a fault into a function; `None`: it has no place there, or other effects."""
    # The numbers of a composed function are any: no example tells that one of them was another.
    is_fixed = fault == "off_by_one" or rng.random() < _FIXED_SHARE
    source = _fixed(rng, split) if is_fixed else _composed(rng, split)
    right = plain(source.answer)
    choices = faulty_variants(right, fault)
    code = rng.choice(choices) if choices else right
    if code == right:
        return None
    finding = _finding(rng, code, right, source.arguments, wanted)
    if finding is None:
        return None
    return Repair(code, finding, source.answer, source.tests(), fault, wanted, source.kind)


def functions_of(split: Split) -> list[FunctionTask]:
    """The fixed functions whose faults a split mends."""
    is_held_out = split == "held_out"
    return [task for task in FUNCTION_TASKS if (task.kind in HELD_OUT_FUNCTIONS) == is_held_out]


def _fixed(rng: random.Random, split: Split) -> _Source:
    task = rng.choice(functions_of(split))
    return _Source(
        task.kind,
        code_answer(task.parameters, task.body),
        lambda: task.draw(rng),
        lambda: function_tests(rng, task),
    )


def _composed(rng: random.Random, split: Split) -> _Source:
    composition = draw_composition(rng, split)
    variable = "xs" if composition.subject == "numbers" else "words"
    return _Source(
        "composed",
        code_answer(variable, composition.body(variable)),
        lambda: (draw_items(rng, composition),),
        lambda: composition_tests(rng, composition),
    )


def plain(answer: str) -> str:
    """Code without its fence."""
    return answer.removeprefix("```python\n").removesuffix("\n```")


def _finding(
    rng: random.Random,
    code: str,
    right: str,
    draw: Callable[[], tuple[Any, ...]],
    wanted: ErrorType,
) -> dict[str, Any] | None:
    """What is wrong with code, by an example that shows it; `None`: not the error wanted."""
    if wanted == "syntax":
        found = examine(code, ())
        return found if found["kind"] == "syntax" else None
    space: dict[str, Any] = {}
    exec(right, space)
    for _ in range(4):
        arguments = draw()
        call = f"solution({', '.join(map(repr, arguments))})"
        expected = repr(space["solution"](*_copied(arguments)))
        # An error message alone says nothing of the value that is right.
        value = None if wanted == "runtime" and rng.random() < 0.5 else expected
        found = examined(code, [(call, value)])
        if found["kind"] == "syntax" or found["error"] == "TimeoutError":
            return None
        if found["kind"] == wanted:
            return found if len(call) + len(found["got"] + expected) < _MAX_FAILURE_CHARS else None
        if found["kind"] in ERROR_TYPES:
            return None
    return None


def _copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(list(a) if isinstance(a, list) else a for a in arguments)


def _is_large(value: object) -> bool:
    if isinstance(value, int):
        return value.bit_length() > _MAX_SIZE
    return isinstance(value, str | list) and len(value) > _MAX_SIZE


def examined(code: str, trials: list[tuple[str, str | None]]) -> dict[str, Any]:
    """What the debug tool finds, in this process: for code of ours, bounded in steps."""
    steps = 0

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal steps
        if frame.f_code.co_filename == "<code>":
            steps += 1
            if steps > _MAX_STEPS or any(map(_is_large, frame.f_locals.values())):
                raise OutOfTime
        return count

    earlier = sys.gettrace()
    sys.settrace(count)
    try:
        return examine(code, trials)
    finally:
        sys.settrace(earlier)
