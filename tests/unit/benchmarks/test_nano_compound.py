"""Compound questions and repairs: their prompts, their parts, and what training may show."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from benchmarks.nano import code_reports, compound
from benchmarks.nano import compound_wording as wording
from benchmarks.nano.bugs import BUGS_PATH, bug_entries
from benchmarks.nano.code_faults import ERROR_TYPES, FAULTS
from benchmarks.nano.code_repair import HELD_OUT_FUNCTIONS, draw_repair, examined, plain
from benchmarks.nano.code_tasks import GENERATOR
from benchmarks.nano.code_values import VALUE_KINDS
from benchmarks.nano.compound import draw_compound, lowered, split_prompt, split_text, unmarked
from benchmarks.nano.evaluate import cell_items, is_right
from benchmarks.nano.math_phrasings import expand, load_phrasings
from benchmarks.nano.prompts import prompt
from benchmarks.nano.registry import SHAPES, load_generator
from benchmarks.nano.skills import (
    SKILL_CELLS,
    repair_conversation,
    repair_question,
    with_skills,
)
from benchmarks.nano.task import EvalCell, Split
from serve_app.scoring import extract_code
from serve_app.tools.reports import ErrorType, code_in, trials_in

PROMPTS = Path("configs/patterns/prompts")
SPLITS: tuple[Split, ...] = ("seen", "held_out")
DEMO = "What is the capital of Japan, and what is 15% of 240?"


def prompt_file(name: str) -> str:
    return (PROMPTS / f"{name}.md").read_text(encoding="utf-8")


def test_the_split_prompt_of_patterns_is_the_one_trained_on() -> None:
    rng = random.Random(1)
    for _ in range(50):
        chat = compound.split_conversation(random.Random(seed := rng.random()))
        drawn = draw_compound(random.Random(seed), "improvised", weights=compound.TRAINED_WEIGHTS)
        query = drawn.query
        expected = prompt_file("nano-split").replace("{{question}}", query)
        assert chat.messages[0]["content"] == expected == f"Split into subtasks as JSON: {query}"


@pytest.mark.parametrize("name", ["nano-repair", "nano-repair-logic"])
def test_the_repair_prompts_of_the_pattern_are_trained_on(name: str) -> None:
    asked = [
        str(repair_conversation(random.Random(seed)).messages[0]["content"]) for seed in range(300)
    ]
    parts = re.split(r"\{\{[\w.]+\}\}", prompt_file(name))
    shape = re.compile("(?s)" + ".*".join(map(re.escape, parts)))
    assert sum(shape.fullmatch(text) is not None for text in asked) > 30


def test_a_prompted_repair_is_the_prompt_with_the_code_and_what_the_tool_says() -> None:
    repair = draw_repair(random.Random(3), "seen")
    text = prompt_file("nano-repair").replace("{{found.data.code}}", repair.code)
    assert repair.prompted() == text.replace("{{found}}", repair.said)


def test_the_second_round_asks_as_the_first_does() -> None:
    first, second = prompt_file("nano-repair"), prompt_file("nano-repair-again")
    assert first.replace("{{found", "{{tried") == second


def test_what_fills_a_prompt_is_not_read_for_slots() -> None:
    assert prompt("nano-split", question="{{draft}}").endswith(": {{draft}}")


def test_the_demo_question_can_be_drawn_in_a_trained_frame() -> None:
    parts = ["What is the capital of Japan?", "What is 15% of 240?"]
    assert DEMO in {compound.joined(random.Random(seed), parts, "seen") for seed in range(20_000)}


@pytest.mark.parametrize("split", SPLITS)
def test_parts_are_ids_in_order_and_refer_only_to_earlier_ones(split: Split) -> None:
    rng = random.Random(f"parts-{split}")
    for _ in range(1500):
        drawn = draw_compound(rng, split)
        subtasks = json.loads(drawn.split_text)["subtasks"]
        assert "".join(task["id"] for task in subtasks) == "abc"[: len(subtasks)]
        for index, task in enumerate(subtasks):
            assert set(re.findall(r"\{\{(.*?)\}\}", task["ask"])) <= set("abc"[:index])


def test_a_question_with_one_part_stays_as_it_is() -> None:
    rng = random.Random(4)
    singles = [c for c in (draw_compound(rng, "seen") for _ in range(800)) if c.kind == "single"]
    assert len(singles) > 60
    for drawn in singles:
        assert drawn.split_text == split_text([drawn.query])


def test_every_part_of_a_joined_question_can_be_read_back_from_it() -> None:
    rng = random.Random(5)
    for _ in range(1500):
        drawn = draw_compound(rng, rng.choice((*SPLITS, "improvised")))
        if drawn.kind in ("pair", "triple"):
            for part in drawn.parts:
                assert lowered(part.ask)[1:-1] in drawn.query


def test_a_final_mark_is_left_out_only_where_it_can_be_told() -> None:
    assert unmarked("What is 2 + 2?") == "What is 2 + 2"
    assert unmarked("Add 2 and 3.") == "Add 2 and 3"
    assert unmarked("Turkey: capital?") is None
    assert unmarked("A cat eats 2 mice. How many do 3 eat?") is None


@pytest.mark.parametrize(
    "group",
    [
        wording.OPENINGS,
        wording.SENTENCE_JOINS,
        wording.CLAUSE_JOINS,
        wording.ENDINGS,
        wording.LIST_MARKS,
        wording.HEADS,
        wording.PRONOUNS,
        wording.TAKES,
        wording.HOP_JOINS,
        wording.NUMBER_HOPS,
        wording.VALUE_HOPS,
        wording.TEXT_HOPS,
        wording.PAIR_HOPS,
        code_reports.REQUESTS,
        *code_reports.REPORTS.values(),
    ],
)
def test_held_out_wordings_are_not_trained_on(group: dict[Split, tuple[object, ...]]) -> None:
    def plain(member: object) -> str:
        return re.sub(r"[^\w{}+*#-]+", " ", str(member)).casefold().strip()

    assert not {plain(m) for m in group["seen"]} & {plain(m) for m in group["held_out"]}


def test_sums_on_an_answer_are_trained_wordings_of_the_maths_model() -> None:
    def shape(text: str) -> str:
        return re.sub(r"\{\w+\}", "{}", text)

    known = {
        shape(variant)
        for phrasings in load_phrasings().values()
        for phrasing in phrasings.seen
        for variant in expand(phrasing)
    }
    for split in SPLITS:
        for pattern, _ in (*wording.NUMBER_HOPS[split], *wording.PAIR_HOPS[split]):
            assert shape(pattern) in known, pattern
    for phrase, _ in wording.SUM_PHRASES:
        assert shape(f"What is {phrase}?") in known, phrase


def test_values_of_an_answer_are_trained_wordings_of_the_code_model() -> None:
    kinds = {kind.kind: kind for kind in VALUE_KINDS}
    for split in SPLITS:
        for pattern, kind in (*wording.VALUE_HOPS[split], *wording.TEXT_HOPS[split]):
            known = [re.sub(r"\{\w+\}", "{x}", p) for p in kinds[kind].trained]
            assert pattern in known, pattern


@pytest.mark.parametrize("split", SPLITS)
def test_every_answerable_part_has_a_gold_answer(split: Split) -> None:
    rng = random.Random(f"gold-{split}")
    for _ in range(600):
        drawn = draw_compound(rng, split, answerable=True)
        assert all(part.gold for part in drawn.parts)


def test_a_split_is_right_only_to_the_letter() -> None:
    question = compound.split_question(random.Random(6), "seen", ("pair",))
    assert is_right(question, question.gold)
    assert not is_right(question, question.gold.lower())
    assert question.query.startswith(split_prompt(""))


@pytest.mark.parametrize("error", ERROR_TYPES)
def test_a_request_says_what_the_code_does_and_the_answer_passes_all_tests(
    error: ErrorType,
) -> None:
    rng = random.Random(7)
    faults = set()
    for _ in range(150):
        split = rng.choice(SPLITS)
        repair = draw_repair(rng, split, error)
        faults.add(repair.fault)
        right: dict[str, object] = {}
        exec(extract_code(repair.answer), right)
        for test in repair.tests:
            exec(test, right)
        asked = repair.worded(rng, split)
        code = code_in(asked)
        found = examined(code, trials_in(asked, code))
        assert (code.strip("\n"), found["error"]) == (repair.code, repair.finding["error"])
        assert found["kind"] == error or (error, found["kind"]) == ("logic", "none")
        mended = plain(repair.answer)
        assert examined(mended, trials_in(asked, mended))["kind"] == "none"
    assert faults == set(FAULTS[error])


def test_functions_held_out_are_never_mended_in_training() -> None:
    rng = random.Random(11)
    drawn = {split: {draw_repair(rng, split).function for _ in range(300)} for split in SPLITS}
    assert drawn["held_out"] - {"composed"} <= HELD_OUT_FUNCTIONS
    assert not drawn["seen"] & HELD_OUT_FUNCTIONS


def test_the_shipped_bugs_are_those_of_the_generator() -> None:
    shipped = [json.loads(line) for line in BUGS_PATH.read_text(encoding="utf-8").splitlines()]
    assert shipped == bug_entries(480, 4)
    assert not {entry["id"].rpartition("-")[0] for entry in shipped} & HELD_OUT_FUNCTIONS


def test_a_repair_in_a_new_wording_is_scored_by_its_tests() -> None:
    question = repair_question(random.Random(8), "held_out")
    assert is_right(question, question.gold)
    assert not is_right(question, "```python\ndef solution(*_):\n    return None\n```")


@pytest.mark.parametrize("name", list(SHAPES))
def test_skills_come_in_their_shares_and_the_rest_are_the_models_own(name: str) -> None:
    mixed = with_skills(load_generator(name), split_share=0.4, repair_share=0.2)
    rng = random.Random(9)
    first = [mixed.conversation(rng, 0.5).messages[-1]["content"] for _ in range(500)]
    splits = sum(text.startswith('{"subtasks"') for text in first)
    assert 150 < splits < 250
    assert mixed.model_id == f"nano-{name}"


def test_without_shares_the_model_trains_on_its_own_tasks_only() -> None:
    assert with_skills(GENERATOR) is GENERATOR
    with pytest.raises(ValueError, match="leave no own tasks"):
        with_skills(GENERATOR, split_share=0.6, repair_share=0.4)


@pytest.mark.parametrize("cell", SKILL_CELLS, ids=lambda cell: cell.name)
def test_every_cell_of_skills_yields_its_prompts(cell: EvalCell) -> None:
    items = cell_items("code", cell, seed=1, n=20)
    assert len(items) == 20
    assert all(item.question.split == cell.split for item in items)
