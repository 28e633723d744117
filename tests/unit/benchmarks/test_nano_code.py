"""The nano-code generator: answers agree with independent references; held-out stays held out."""

from __future__ import annotations

import contextlib
import io
import random

import pytest

from benchmarks.nano.chat_format import render
from benchmarks.nano.code_composed import draw_composition, is_held_out
from benchmarks.nano.code_functions import FUNCTION_TASKS, FunctionTask
from benchmarks.nano.code_questions import (
    RUN_HELD_OUT,
    RUN_PHRASINGS,
    code_answer,
    function_tests,
)
from benchmarks.nano.code_tasks import EVAL_CELLS, FAILED, GENERATOR
from benchmarks.nano.code_values import VALUE_KINDS, ValueKind, printed
from benchmarks.nano.code_wording import (
    NEW_FRAMES,
    NOUN_PHRASE_VERBS,
    canonical,
    imperative,
    swap_synonyms,
)
from benchmarks.nano.evaluate import cell_items, is_right, run_python
from benchmarks.nano.task import Conversation, EvalCell, Split
from serve_app.scoring import extract_code

SPLITS: tuple[Split, ...] = ("seen", "held_out")


def output_of(program: str) -> str:
    """What our own catalogue's code prints, run in this process (hundreds of programs a second)."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        exec(program, {})
    return stream.getvalue().strip()


def trained_conversations(count: int, seed: int = 5) -> list[Conversation]:
    rng = random.Random(seed)
    return [GENERATOR.conversation(rng, i / count) for i in range(count)]


@pytest.mark.parametrize("task", FUNCTION_TASKS, ids=lambda task: task.kind)
def test_answer_of_every_function_task_passes_tests_from_its_reference(task: FunctionTask) -> None:
    rng = random.Random(task.kind)
    program = extract_code(code_answer(task.parameters, task.body))
    for _ in range(10):
        output_of("\n".join([program, *function_tests(rng, task)]))


@pytest.mark.parametrize("kind", VALUE_KINDS, ids=lambda kind: kind.kind)
def test_program_of_every_value_kind_prints_its_reference(kind: ValueKind) -> None:
    rng = random.Random(kind.kind)
    for _ in range(30):
        arguments = kind.draw(rng)
        assert output_of(kind.program(arguments)) == printed(kind.reference(**arguments))


@pytest.mark.parametrize("split", SPLITS)
def test_composed_answers_pass_tests_from_their_references(split: Split) -> None:
    rng = random.Random(7)
    for _ in range(600):
        question, answer = GENERATOR.composed_question(rng, split)
        output_of("\n".join([extract_code(answer), *question.tests]))


@pytest.mark.parametrize("split", SPLITS)
def test_programs_of_value_questions_print_the_gold_answer(split: Split) -> None:
    rng = random.Random(8)
    for _ in range(600):
        question, program = GENERATOR.value_question(rng, split)
        assert output_of(program) == question.gold
        assert "{" not in question.query.split("```")[0]


def test_wrong_function_fails_its_tests_in_the_evaluation() -> None:
    question, answer = GENERATOR.function_question(random.Random(3), "seen")
    assert is_right(question, answer)
    assert not is_right(question, "```python\ndef solution(*args):\n    return ...\n```")


def test_evaluation_runs_programs_to_the_printed_value() -> None:
    question, program = GENERATOR.value_question(random.Random(4), "seen")
    assert run_python(program) == (0, question.gold)


def test_catalogue_is_large_enough_and_holds_two_wordings_of_every_kind_apart() -> None:
    assert len(FUNCTION_TASKS) >= 50
    assert len(VALUE_KINDS) >= 40
    assert all(len(task.trained) >= 8 and len(task.held_out) == 2 for task in FUNCTION_TASKS)
    assert all(len(kind.trained) >= 8 and len(kind.held_out) == 2 for kind in VALUE_KINDS)


def descriptions_as_asked(text: str) -> set[str]:
    """Every form in which a description of the catalogue can enter a question, up to synonyms."""
    phrases = [text]
    if text.startswith("@"):
        phrases = [f"{verb} {text[1:]}" for verb in NOUN_PHRASE_VERBS]
    return {canonical(form) for phrase in phrases for form in (phrase, imperative(phrase))}


def test_held_out_wordings_differ_from_all_trained_ones_up_to_synonyms() -> None:
    trained: set[str] = set()
    for task in FUNCTION_TASKS:
        trained.update(*map(descriptions_as_asked, task.trained))
    for task in FUNCTION_TASKS:
        assert not any(descriptions_as_asked(text) & trained for text in task.held_out), task.kind
    phrasings = {canonical(text) for kind in VALUE_KINDS for text in kind.trained}
    assert not phrasings & {canonical(text) for kind in VALUE_KINDS for text in kind.held_out}
    assert not {canonical(t) for t in RUN_PHRASINGS} & {canonical(t) for t in RUN_HELD_OUT}


def test_one_wording_never_asks_for_two_different_functions() -> None:
    owner: dict[str, str] = {}
    for task in FUNCTION_TASKS:
        for text in (*task.trained, *task.held_out):
            assert owner.setdefault(canonical(text.removeprefix("@")), task.kind) == task.kind


def test_synonym_swaps_keep_the_canonical_wording() -> None:
    rng = random.Random(9)
    for task in FUNCTION_TASKS:
        for text in task.trained:
            assert canonical(swap_synonyms(rng, text, 1.0)) == canonical(text)


def test_training_never_shows_held_out_wordings() -> None:
    asked = [
        canonical(message["content"])
        for conversation in trained_conversations(2500)
        for message in conversation.messages
        if message["role"] == "user"
    ]
    whole = "\n".join(asked)
    frames = [canonical(frame).partition(" {vp}")[0] for frame in NEW_FRAMES]
    assert not [frame for frame in frames if frame in whole]
    held_out = {
        form
        for task in FUNCTION_TASKS
        for text in task.held_out
        for form in descriptions_as_asked(text)
        if len(form.split()) > 4
    }
    trained = {f for t in FUNCTION_TASKS for text in t.trained for f in descriptions_as_asked(text)}
    held_out = {form for form in held_out if not any(form in text for text in trained)}
    functions = [text for text in asked if "function" in text]
    assert len(held_out) > 200
    assert not [form for form in held_out if any(text.endswith(form) for text in functions)]


def test_compositions_of_training_and_held_out_never_meet() -> None:
    rng = random.Random(10)
    seen = {draw_composition(rng, "seen").key for _ in range(5000)}
    unseen = {draw_composition(rng, "held_out").key for _ in range(1000)}
    assert len(seen) > 500
    assert len(unseen) > 50
    assert not seen & unseen
    assert all(is_held_out(key) for key in unseen)


def test_python_is_called_for_values_only_and_only_when_offered() -> None:
    called = 0
    for conversation in trained_conversations(1500):
        for before, message in zip(conversation.messages, conversation.messages[1:], strict=False):
            for call in message.get("tool_calls", ()):
                called += 1
                assert call["function"]["name"] == "python"
                assert "python" in conversation.tools
                assert "function" not in before["content"].split("\n")[0].lower().split()
    assert called > 300


def test_final_answers_repeat_the_tool_result() -> None:
    for conversation in trained_conversations(1500):
        for before, message in zip(conversation.messages, conversation.messages[1:], strict=False):
            if before["role"] == "tool" and message["content"] != FAILED:
                assert message["content"] == before["content"].strip("\n")


def test_conversations_are_reproducible_and_render() -> None:
    first, second = trained_conversations(50), trained_conversations(50)
    assert first == second
    assert all(render(c.messages, c.tools) for c in first)


@pytest.mark.parametrize("split", SPLITS)
def test_questions_cover_functions_and_values_with_their_good_pairs(split: Split) -> None:
    questions = GENERATOR.questions(random.Random(11), split, 300)
    assert {question.split for question in questions} == {split}
    functions = [question for question in questions if question.metric == "unit_tests"]
    values = [question for question in questions if question.metric != "unit_tests"]
    assert len(functions) > 100
    assert len(values) > 90
    assert all(
        q.tests and q.good_pairs == ("nano-code@none", "nano-code@python") for q in functions
    )
    assert all(not q.tests and q.good_pairs == ("nano-code@python",) for q in values)


@pytest.mark.parametrize("cell", EVAL_CELLS, ids=lambda cell: cell.name)
def test_every_evaluation_cell_yields_its_prompts(cell: EvalCell) -> None:
    items = cell_items("code", cell, seed=1, n=20)
    assert len(items) == 20
    assert all(item.tools == cell.tools for item in items)
