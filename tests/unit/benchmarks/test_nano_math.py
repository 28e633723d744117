"""Nano-math's tasks: held-out phrasings stay held out, and every gold answer is right."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.nano.math_phrasings import (
    Phrasings,
    canonical,
    expand,
    fill,
    leaks,
    load_phrasings,
    swap_synonyms,
)
from benchmarks.nano.math_problems import HARD_KINDS, KINDS, Kind, Problem
from benchmarks.nano.math_tasks import GENERATOR, draw_problem, with_sources, word
from benchmarks.nano.math_words import words
from benchmarks.nano.registry import load_cells
from benchmarks.nano.task import Conversation

SECTIONS = sorted(load_phrasings())
BY_NAME = {kind.name: kind for kind in KINDS}


def chats(count: int, seed: int = 0) -> list[Conversation]:
    rng = random.Random(seed)
    return [GENERATOR.conversation(rng, index / count) for index in range(count)]


def test_importing_the_tasks_needs_neither_torch_nor_vllm() -> None:
    code = "import sys, benchmarks.nano.math_tasks; print({'torch', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_problem_type_has_enough_phrasings_of_both_splits() -> None:
    assert len(HARD_KINDS) >= 40
    assert {kind.section for kind in KINDS} == set(SECTIONS)
    for phrasings in load_phrasings().values():
        assert len(phrasings.seen) >= 12
        assert 2 <= len(phrasings.held_out) <= 4


@pytest.mark.parametrize("section", SECTIONS)
def test_no_held_out_phrasing_equals_a_seen_one_up_to_synonyms(section: str) -> None:
    assert leaks(load_phrasings()[section]) == set()


@pytest.mark.parametrize("section", SECTIONS)
def test_swapped_synonyms_never_leave_the_canonical_form(section: str) -> None:
    rng = random.Random(3)
    for phrasing in load_phrasings()[section].seen:
        for variant in expand(phrasing):
            assert canonical(swap_synonyms(variant, rng, 0.5)) == canonical(variant)


def test_a_synonym_copy_of_a_seen_phrasing_counts_as_a_leak() -> None:
    copied = Phrasings(seen=("Find the area of {x}.",), held_out=("Compute the area of {x}",))
    assert leaks(copied)


def test_no_held_out_text_occurs_in_training() -> None:
    rng = random.Random(11)
    held: set[str] = set()
    for kind in KINDS:
        for phrasing in load_phrasings()[kind.section].held_out:
            for variant in expand(phrasing):
                held.add(canonical(fill(variant, _blank(kind, rng))))
    for chat in chats(1500):
        for message in chat.messages:
            if message["role"] == "user":
                text = message["content"].partition("\n\nSources:")[0]
                assert canonical(_without_numbers(text)) not in held


def _blank(kind: Kind, rng: random.Random) -> dict[str, str]:
    slots = words(rng) | kind.make(rng).slots
    return {name: _without_numbers(value) for name, value in slots.items()}


def _without_numbers(text: str) -> str:
    return "".join("" if c.isdigit() or c == "." else c for c in text)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_slot_of_every_phrasing_can_be_filled(kind: Kind) -> None:
    rng = random.Random(5)
    phrasings = load_phrasings()[kind.section]
    for phrasing in (*phrasings.seen, *phrasings.held_out):
        for variant in expand(phrasing):
            problem, _ = draw_problem(kind, rng)
            text = fill(variant, words(rng) | problem.slots)
            assert "{" not in text
            assert "|" not in text


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_number_of_a_problem_is_in_its_question(kind: Kind) -> None:
    rng = random.Random(6)
    for split in ("seen", "held_out"):
        for _ in range(20):
            problem, _ = draw_problem(kind, rng)
            text = word(kind, problem, split, rng).lower()
            if kind.name != "expression":
                assert all(value.lower() in text for value in problem.slots.values())


def _float(problem: Problem) -> dict[str, float]:
    return {name: float(value) for name, value in problem.slots.items() if _is_number(value)}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


SOLUTIONS: dict[str, Callable[[dict[str, float]], float]] = {
    "easy_add": lambda s: s["a"] + s["b"],
    "remainder": lambda s: math.fmod(s["a"], s["b"]),
    "percent_of": lambda s: s["x"] * s["p"] / 100,
    "percent_change": lambda s: 100 * (s["b"] / s["a"] - 1),
    "increase": lambda s: s["x"] + s["x"] * s["p"] / 100,
    "discount": lambda s: s["x"] - s["x"] * s["p"] / 100,
    "change": lambda s: s["a"] - s["p"] * s["n"],
    "times_as_many": lambda s: s["a"] * (s["b"] + 1),
    "more_than": lambda s: 2 * s["a"] + s["b"],
    "hypotenuse": lambda s: math.hypot(s["a"], s["b"]),
    "circle_area": lambda s: math.pi * s["r"] * s["r"],
    "simple_interest": lambda s: s["t"] * (s["x"] * s["p"] / 100),
    "ph": lambda s: -math.log(s["m"]) / math.log(10),
    "celsius_to_fahrenheit": lambda s: 1.8 * s["x"] + 32,
    "fahrenheit_to_celsius": lambda s: (s["x"] - 32) / 1.8,
    "ratio": lambda s: s["x"] / (1 + s["b"] / s["a"]),
    "scale": lambda s: s["b"] * (s["p"] / s["a"]),
    "probability": lambda s: 1 / (1 + s["b"] / s["a"]),
    "sum_to": lambda s: sum(range(int(s["n"]) + 1)),
    "sequence": lambda s: list(range(int(s["a"]), 10**5, int(s["d"])))[int(s["n"]) - 1],
    "profit": lambda s: s["n"] * s["q"] - s["n"] * s["p"],
    "compound_interest": lambda s: s["x"] * math.exp(s["t"] * math.log1p(s["p"] / 100)),
    "ph_inverse": lambda s: math.exp(-s["h"] * math.log(10)),
    "kinetic_energy": lambda s: 0.5 * s["m"] * s["v"] ** 2,
    "reverse_percent": lambda s: 100 * s["x"] / s["p"],
}
"""The answers by other means than the calculator's expressions."""


@pytest.mark.parametrize(
    "name",
    sorted(SOLUTIONS),
)
def test_gold_answers_agree_with_another_way_of_solving(name: str) -> None:
    rng = random.Random(8)
    for _ in range(50):
        problem, result = draw_problem(BY_NAME[name], rng)
        expected = SOLUTIONS[name](_float(problem))
        assert float(result) == pytest.approx(expected, rel=1e-8, abs=0.00501)


@pytest.mark.parametrize(
    ("name", "residual"),
    [
        ("linear_plus", lambda s, x: s["a"] * x + s["b"] - s["c"]),
        ("linear_minus", lambda s, x: s["a"] * x - s["b"] - s["c"]),
        ("linear_divide", lambda s, x: x / s["a"] + s["b"] - s["c"]),
        ("linear_both", lambda s, x: s["a"] * x + s["b"] - s["c"] * x - s["d"]),
    ],
)
def test_solutions_of_equations_solve_them(name: str, residual: Any) -> None:
    rng = random.Random(9)
    for _ in range(50):
        problem, result = draw_problem(BY_NAME[name], rng)
        assert residual(_float(problem), float(result)) == pytest.approx(0, abs=0.01)


def test_a_call_is_made_exactly_where_a_calculator_is_offered() -> None:
    for chat in chats(400):
        calls = [m for m in chat.messages if m.get("tool_calls")]
        if "calculator" in chat.tools:
            questions = [m for m in chat.messages if m["role"] == "user"]
            assert len(calls) == len(questions)
            assert all(c["tool_calls"][0]["function"]["name"] == "calculator" for c in calls)
        else:
            assert not calls


def test_some_direct_chats_offer_tools_of_no_use() -> None:
    offered = [chat.tools for chat in chats(400) if "calculator" not in chat.tools]
    assert 0.1 < sum(bool(tools) for tools in offered) / len(offered) < 0.4


def test_questions_are_the_same_for_the_same_seed_and_cover_every_type() -> None:
    first = GENERATOR.questions(random.Random(4), "held_out", 2 * len(KINDS))
    again = GENERATOR.questions(random.Random(4), "held_out", 2 * len(KINDS))
    assert first == again
    assert {question.kind for question in first} == set(BY_NAME)
    assert {question.good_pairs for question in first} == {("nano-math@calculator",)}


def test_sources_stand_before_the_question_as_retrieval_puts_them() -> None:
    text = with_sources("What is 2 + 2?", random.Random(1))
    assert text.startswith("Sources:\n[1] ")
    assert text.endswith("\n\nQuestion: What is 2 + 2?")


def test_the_evaluation_requires_what_was_promised() -> None:
    cells = {(cell.name, cell.split): cell for cell in load_cells("math")}
    assert cells["calculator", "seen"].required == 0.95
    assert cells["calculator", "held_out"].required == 0.85
    assert cells["calculator", "held_out"].required_call == 0.99
