"""The questions of nano-code: functions to write, and values to compute by running code.

Each comes with the answer to learn: a fenced `solution`, or the program to run. Held-out wordings
never reach training.
"""

from __future__ import annotations

import random
from typing import Any

from benchmarks.nano.code_composed import Composition, draw_composition, draw_items, joined
from benchmarks.nano.code_functions import FUNCTION_TASKS, FunctionTask
from benchmarks.nano.code_values import VALUE_KINDS, printed
from benchmarks.nano.code_wording import (
    THIRD_PERSON_FRAMES,
    describe,
    imperative,
    shown,
    swap_synonyms,
    typed,
)
from benchmarks.nano.task import Question, Split

MODEL_ID = "nano-code"
NUM_TESTS = 4

_FUNCTION_PAIRS = (f"{MODEL_ID}@none", f"{MODEL_ID}@python")
_VALUE_PAIRS = (f"{MODEL_ID}@python",)

RUN_PHRASINGS: tuple[str, ...] = (
    "What does this code print?\n\n{code}",
    "Run this code:\n\n{code}",
    "What is the output of this Python code?\n{code}",
    "Execute the following program.\n\n{code}",
    "What will the following Python code print?\n\n{code}",
    "{code}\n\nWhat does this print?",
    "Run this Python program and tell me its output.\n\n{code}",
    "Tell me the output of this code.\n{code}",
)
RUN_HELD_OUT: tuple[str, ...] = (
    "What is printed by the following code?\n\n{code}",
    "Please run the program below.\n\n{code}",
)

VALUE_FRAMES: tuple[str, ...] = (
    "What is {np}?",
    "Compute {np}.",
    "Find {np}.",
    "Give me {np}.",
    "Tell me {np}.",
    "What do I get for {np}?",
    "Calculate {np}",
    "{np}",
)


def code_answer(parameters: str, body: str) -> str:
    """The chat answer that defines `solution`."""
    indented = "\n".join(f"    {line}" for line in body.split("\n"))
    return f"```python\ndef solution({parameters}):\n{indented}\n```"


def _assertion(arguments: tuple[Any, ...], value: Any) -> str:
    call = f"solution({', '.join(map(repr, arguments))})"
    if isinstance(value, bool) or not isinstance(value, float):
        return f"assert {call} == {value!r}"
    return f"assert abs({call} - {value!r}) < 1e-6"


def function_tests(rng: random.Random, task: FunctionTask) -> tuple[str, ...]:
    """Assertions on random arguments, with values from the task's reference."""
    drawn = [task.draw(rng) for _ in range(NUM_TESTS)]
    return tuple(_assertion(arguments, task.reference(*arguments)) for arguments in drawn)


def composition_tests(rng: random.Random, composition: Composition) -> tuple[str, ...]:
    """Assertions on lists to which the composition applies."""
    tests: list[str] = []
    while len(tests) < NUM_TESTS:
        items = draw_items(rng, composition)
        value = composition.result(items)
        if value is not None:
            tests.append(_assertion((items,), value))
    return tuple(tests)


class CodeQuestions:
    """Draws labelled questions with the answers to learn."""

    def questions(self, rng: random.Random, split: Split, n: int) -> list[Question]:
        """`n` questions: 40% fixed functions, 15% composed functions, 45% values."""
        drawn: list[Question] = []
        for _ in range(n):
            roll = rng.random()
            if roll < 0.4:
                drawn.append(self.function_question(rng, split)[0])
            elif roll < 0.55:
                drawn.append(self.composed_question(rng, split)[0])
            else:
                drawn.append(self.value_question(rng, split)[0])
        return drawn

    def function_question(self, rng: random.Random, split: Split) -> tuple[Question, str]:
        """A fixed function task and the answer to learn."""
        task = rng.choice(FUNCTION_TASKS)
        description = rng.choice(task.trained if split == "seen" else task.held_out)
        answer = code_answer(task.parameters, task.body)
        return self._function(
            describe(rng, description, split),
            answer,
            f"function.{task.kind}",
            split,
            function_tests(rng, task),
        ), answer

    def composed_question(self, rng: random.Random, split: Split) -> tuple[Question, str]:
        """A composed function and the answer to learn; `held_out` takes unseen compositions."""
        composition = draw_composition(rng, split)
        sources = ["a list", f"a list of {composition.subject}"]
        roll = rng.random()
        if roll < 0.55:
            text = composition.noun(rng, rng.choice(("in ", "of ")) + rng.choice(sources))
            if rng.random() < 0.2:
                text = composition.noun(rng, "")
                text = f"takes {rng.choice(sources)} and returns {text}"
            else:
                text = f"{rng.choice(('returns', 'computes', 'finds', 'gives'))} {text}"
        else:
            text = joined(composition.pipeline(rng, rng.choice(sources)))
        frame = rng.choice(THIRD_PERSON_FRAMES)
        variable = "xs" if composition.subject == "numbers" else "words"
        answer = code_answer(variable, composition.body(variable))
        query = typed(rng, frame.replace("{vp}", text))
        kind = f"composed.{composition.subject}"
        return self._function(
            query, answer, kind, split, composition_tests(rng, composition)
        ), answer

    def value_question(self, rng: random.Random, split: Split) -> tuple[Question, str]:
        """A value question and the program to run."""
        roll = rng.random()
        if roll < 0.14:
            return self._composed_value(rng, split)
        kind = rng.choice(VALUE_KINDS)
        arguments = kind.draw(rng)
        value = kind.reference(**arguments)
        program = kind.program(arguments)
        if roll < 0.23:
            phrasing = rng.choice(RUN_PHRASINGS if split == "seen" else RUN_HELD_OUT)
            query = phrasing.replace("{code}", f"```python\n{program}\n```")
            return self._value(query, value, "run_code", split), program
        phrasing = rng.choice(kind.trained if split == "seen" else kind.held_out)
        query = kind.question(rng, swap_synonyms(rng, phrasing, 0.2), arguments)
        return self._value(typed(rng, query), value, kind.kind, split), program

    def _composed_value(self, rng: random.Random, split: Split) -> tuple[Question, str]:
        value = None
        while value is None:
            composition = draw_composition(rng, split)
            items = draw_items(rng, composition)
            value = composition.result(items)
        place = rng.choice(("in ", "in the list ", "of ")) + shown(rng, items)
        if rng.random() < 0.6:
            np = composition.noun(rng, place)
            query = rng.choice(VALUE_FRAMES).replace("{np}", np)
        else:
            steps = composition.pipeline(rng, f"the list {shown(rng, items)}")
            text = joined([imperative(step) for step in steps])
            query = f"{text[0].upper()}{text[1:]}."
        variable = "xs" if composition.subject == "numbers" else "words"
        *body, last = composition.body(variable).split("\n")
        program = "\n".join(
            [f"{variable} = {items!r}", *body, f"print({last.removeprefix('return ')})"]
        )
        return self._value(typed(rng, query), value, "composed", split), program

    def _function(
        self, query: str, answer: str, kind: str, split: Split, tests: tuple[str, ...]
    ) -> Question:
        return Question(
            query=query,
            gold=answer,
            metric="unit_tests",
            domain="code",
            kind=kind,
            split=split,
            tests=tests,
            good_pairs=_FUNCTION_PAIRS,
        )

    def _value(self, query: str, value: Any, kind: str, split: Split) -> Question:
        is_number = isinstance(value, int | float)
        return Question(
            query=query,
            gold=printed(value),
            metric="number" if is_number else "exact",
            domain="code",
            kind=f"value.{kind}",
            split=split,
            good_pairs=_VALUE_PAIRS,
        )


QUESTIONS = CodeQuestions()
