"""Generator of nano-code: functions to write, and value questions to answer by running code.

A function question is answered with a fenced `solution`, whatever tools are offered. A value
question is answered with a call of `python` where it is offered, then with what the program
printed; without it, directly (mostly wrong). Held-out wordings never reach training.
"""

from __future__ import annotations

import json
import random
from functools import cache
from typing import TYPE_CHECKING, Any

from benchmarks.nano import code_inputs as inputs
from benchmarks.nano.chat_format import tool_call
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
from benchmarks.nano.gazetteer import CORPUS_PATH, with_sources
from benchmarks.nano.task import Conversation, EvalCell, Question, Split

if TYPE_CHECKING:
    from benchmarks.nano.evaluate import EvalItem

MODEL_ID = "nano-code"
FAILED = "The code failed."
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
_ERRORS = (
    "error: NameError: name 'x' is not defined (line 2)",
    "error: SyntaxError: invalid syntax (line 1)",
    "error: ValueError: max() arg is an empty sequence (line 2)",
    "error: the code did not finish in 5 s",
    "timeout",
    "[no output]",
)


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


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


def _copy_share(progress: float) -> float:
    """Share of drills in copying lists and strings: most of the start, little later."""
    if progress < 0.12:
        return 0.6
    return 0.2 if progress < 0.3 else 0.05


class CodeGenerator:
    """Conversations and questions of nano-code."""

    model_id = MODEL_ID

    def conversation(self, rng: random.Random, progress: float) -> Conversation:
        """One training conversation; see `TaskGenerator`."""
        if rng.random() < _copy_share(progress):
            return self._drill(rng)
        tools = self._tools(rng)
        num_turns = 1 if rng.random() < 0.6 else rng.randint(2, 4)
        messages: list[dict[str, Any]] = []
        if rng.random() < 0.04:
            messages.append({"role": "system", "content": "You are a helpful assistant."})
        for _ in range(num_turns):
            messages += self._exchange(rng, tools)
        return Conversation(tuple(messages), tools)

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

    def _tools(self, rng: random.Random) -> tuple[str, ...]:
        others = [tool for tool in ("calculator", "retrieval") if rng.random() < 0.2]
        if rng.random() < 0.62:
            others.append("python")
        rng.shuffle(others)
        return tuple(others)

    def _exchange(self, rng: random.Random, tools: tuple[str, ...]) -> list[dict[str, Any]]:
        """A question and everything up to its final answer."""
        has_python = "python" in tools
        if rng.random() >= (0.65 if has_python else 0.12):
            ask = self.function_question if rng.random() < 0.5 else self.composed_question
            question, answer = ask(rng, "seen")
            return [_user(self._with_noise(rng, question.query)), _assistant(answer)]
        question, program = self.value_question(rng, "seen")
        user = _user(self._with_noise(rng, question.query))
        if not has_python:
            return [user, _assistant(question.gold)]
        result, answer = question.gold, question.gold
        if rng.random() < 0.02:
            result, answer = rng.choice(_ERRORS), FAILED
        if rng.random() < 0.15:
            result += "\n"
        call = tool_call("python", code=program)
        return [user, call, {"role": "tool", "content": result}, _assistant(answer)]

    def _with_noise(self, rng: random.Random, query: str) -> str:
        """Sometimes the query with retrieved sources behind it, which are to be ignored."""
        return query if rng.random() >= 0.16 else _with_sources(rng, query)

    def _drill(self, rng: random.Random) -> Conversation:
        """Several requests to repeat a list, a string or words exactly."""
        messages: list[dict[str, Any]] = []
        for _ in range(rng.randint(2, 6)):
            value: Any = rng.choice(
                (
                    inputs.numbers(rng, 3, 8, negative=rng.random() < 0.3),
                    inputs.words(rng, 3, 5),
                    inputs.phrase(rng, 1, 4),
                    inputs.phrase(rng, 1, 4),
                    rng.choice("abcdefghijklmnopqrstuvwxyz"),
                    rng.randint(1, 99_999),
                )
            )
            ask = rng.choice(("Repeat {v}.", "Copy {v}", "Repeat {v} exactly.", "Echo {v}."))
            messages.append(_user(ask.replace("{v}", shown(rng, value))))
            messages.append(_assistant(repr(value)))
        return Conversation(tuple(messages), ())


@cache
def _corpus() -> tuple[str, ...]:
    """Sentences of the corpus that ships for retrieval."""
    lines = CORPUS_PATH.read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line)["text"] for line in lines)


def _with_sources(rng: random.Random, query: str) -> str:
    """The query as retrieval hands it on, with one to four sentences that do not matter."""
    drawn = [
        rng.choice(_corpus()) if rng.random() < 0.6 else _sentence(rng)
        for _ in range(rng.randint(1, 4))
    ]
    return with_sources(query, drawn)


def _sentence(rng: random.Random) -> str:
    subject, other = inputs.word(rng).capitalize(), inputs.word(rng).capitalize()
    return rng.choice(
        (
            f"The capital of {subject} is {other}.",
            f"{subject} has {rng.randint(2, 9999)} inhabitants.",
            f"{subject} was born in {other} in {rng.randint(1500, 2000)}.",
            f"The chemical symbol of {inputs.word(rng)} is {subject[:2]}.",
            f"The river {subject} is {rng.randint(20, 6000)} km long and ends in {other}.",
            f"The {inputs.word(rng)} and the {inputs.word(rng)} were built by {subject}.",
        )
    )


GENERATOR = CodeGenerator()

_FIXED = tuple(f"function.{task.kind}" for task in FUNCTION_TASKS)
_COMPOSED = ("composed.numbers", "composed.words")
_VALUES = (*(f"value.{kind.kind}" for kind in VALUE_KINDS), "value.composed", "value.run_code")

EVAL_CELLS: tuple[EvalCell, ...] = (
    EvalCell("fixed functions", "seen", (), 0.95, _FIXED),
    EvalCell("fixed functions, new wording", "held_out", (), 0.5, _FIXED),
    EvalCell("fixed functions, python offered", "seen", ("python",), 0.95, _FIXED),
    EvalCell("composed functions", "seen", (), 0.9, _COMPOSED),
    EvalCell("composed functions, new compositions", "held_out", (), 0.9, _COMPOSED),
    EvalCell("values with python", "seen", ("python",), 0.9, _VALUES),
    EvalCell("values with python, new wording", "held_out", ("python",), None, _VALUES),
    EvalCell(
        "values, all tools offered", "seen", ("calculator", "python", "retrieval"), 0.9, _VALUES
    ),
    EvalCell("values without a tool", "seen", (), None, _VALUES),
    EvalCell("functions with sources", "seen", (), None, (*_FIXED, *_COMPOSED)),
)


def evaluation_items(cell: EvalCell, rng: random.Random, n: int) -> list[EvalItem] | None:
    """Prompts of the cell with sources in the user's turn; `None` for all other cells."""
    if cell.name != "functions with sources":
        return None
    from benchmarks.nano.evaluate import EvalItem

    items: list[EvalItem] = []
    while len(items) < n:
        question = GENERATOR.questions(rng, cell.split, 1)[0]
        if question.metric == "unit_tests":
            query = _with_sources(rng, question.query)
            items.append(EvalItem((_user(query),), cell.tools, question))
    return items
