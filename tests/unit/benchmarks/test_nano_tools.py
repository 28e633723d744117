"""Questions for the database and the clock: their golds, their wordings, what training may show."""

from __future__ import annotations

import json
import random
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from tokenizers import Tokenizer
from typer.testing import CliRunner

from benchmarks.nano import clock_tasks, shop, sql_tasks
from benchmarks.nano.__main__ import app
from benchmarks.nano.chat_format import render
from benchmarks.nano.clock_server import clock_server
from benchmarks.nano.evaluate import cell_items, is_right
from benchmarks.nano.facts_tasks import UNKNOWN
from benchmarks.nano.labelled import question_set
from benchmarks.nano.math_phrasings import canonical, expand, load_phrasings
from benchmarks.nano.registry import load_generator, weights_dir
from benchmarks.nano.skills import TOOL_CELLS, skill_cells, with_skills
from benchmarks.nano.sql_queries import FILTERS, PHRASINGS_PATH, draw_ask
from benchmarks.nano.task import TOOL_PARAMETERS, Conversation, EvalCell, Split, TaskGenerator
from serve_app.config.tools import SqlConfig
from serve_app.tools.builtin.sql import SqlTool

SPLITS: tuple[Split, ...] = ("seen", "held_out")
SECTIONS = sorted(load_phrasings(PHRASINGS_PATH))
SOURCES: dict[str, TaskGenerator] = {
    "database": sql_tasks.GENERATOR,
    "clock": clock_tasks.GENERATOR,
}


def chats(source: str, count: int) -> list[Conversation]:
    rng = random.Random(5)
    return [SOURCES[source].conversation(rng, 1.0) for _ in range(count)]


def calls(chat: Conversation) -> list[dict[str, Any]]:
    return [m["tool_calls"][0]["function"] for m in chat.messages if m.get("tool_calls")]


def rows_in(path: Path) -> list[list[tuple[Any, ...]]]:
    database = sqlite3.connect(path)
    try:
        return [
            database.execute(f"select * from {table} order by id").fetchall()
            for table in ("customers", "products", "orders")
        ]
    finally:
        database.close()


def test_training_draws_queries_on_a_thread_after_the_tokenizer_drew_some() -> None:
    before = shop.result_text("select count(*) from orders")
    with ThreadPoolExecutor(1) as thread:
        drawn = thread.submit(shop.result_text, "select count(*) from orders").result()
    assert drawn == before


def test_the_shipped_database_is_the_one_that_the_command_writes(tmp_path: Path) -> None:
    written = tmp_path / "shop.sqlite"
    assert CliRunner().invoke(app, ["database", str(written)]).exit_code == 0
    assert rows_in(written) == rows_in(shop.PATH)
    assert shop.PATH.stat().st_size < 64 << 10


def test_the_tool_gives_the_rows_that_training_shows() -> None:
    tool = SqlTool(SqlConfig(tool_id="database", database=shop.PATH))
    rng = random.Random(2)
    for _ in range(12):
        query = draw_ask(rng, "held_out", new=None).query
        assert tool.run({"query": query}, 60.0).text == shop.result_text(query)


@pytest.mark.parametrize("split", SPLITS)
def test_an_independent_engine_finds_the_gold_of_every_query(split: Split) -> None:
    rng = random.Random(3)
    file = sqlite3.connect(f"file:{shop.PATH}?mode=ro", uri=True)
    try:
        for _ in range(400):
            ask = draw_ask(rng, split, new=None)
            rows = file.execute(ask.query).fetchall()
            gold = sql_tasks.question_of(rng, ask, split).gold
            assert gold == ", ".join(": ".join(map(str, row)) for row in rows) != ""
    finally:
        file.close()


def test_the_first_rows_are_never_among_equals() -> None:
    rng = random.Random(4)
    for _ in range(600):
        ask = draw_ask(rng, "seen")
        ordered, limited, count = ask.query.partition(" limit ")
        if limited:
            found = [shop.rows_of(f"{ordered}, 1{way}{limited}{count}") for way in ("", " desc")]
            assert found[0] == found[1] == shop.rows_of(ask.query)


@pytest.mark.parametrize("section", SECTIONS)
def test_no_held_out_wording_equals_a_seen_one_up_to_synonyms(section: str) -> None:
    phrasings = load_phrasings(PHRASINGS_PATH)[section]
    seen, held_out = (
        {canonical(variant) for phrasing in group for variant in expand(phrasing)}
        for group in (phrasings.seen, phrasings.held_out)
    )
    assert seen & held_out == set()
    assert held_out


def test_every_condition_has_wordings() -> None:
    used = {filter_.section for filters in FILTERS.values() for filter_ in filters}
    assert used == {section for section in SECTIONS if "." in section}


def test_training_shows_no_held_out_combination_and_no_held_out_pair_of_zones() -> None:
    rng = random.Random(6)
    held_out = {draw_ask(rng, "seen", new=True).query for _ in range(300)}
    shown = {call["arguments"]["query"] for chat in chats("database", 1500) for call in calls(chat)}
    assert len(shown) > 1000
    assert shown & held_out == set()
    for chat in chats("clock", 1500):
        for call in calls(chat):
            zones = call["arguments"]
            if call["name"] == clock_tasks.CONVERT:
                source, target = zones["source_timezone"], zones["target_timezone"]
                assert not clock_tasks.is_new(source, target)


@pytest.mark.parametrize("source", list(SOURCES))
def test_conversations_call_what_is_offered_and_end_in_the_answer(source: str) -> None:
    unoffered = 0
    for chat in chats(source, 400):
        made = calls(chat)
        assert all(call["name"] in chat.tools for call in made)
        assert all(tuple(call["arguments"]) == TOOL_PARAMETERS[call["name"]] for call in made)
        is_unknown = chat.messages[-1]["content"] == UNKNOWN
        assert is_unknown == (not made)
        unoffered += is_unknown
    assert 15 < unoffered < 80


@pytest.mark.parametrize("source", list(SOURCES))
def test_the_shipped_tokenizer_writes_every_conversation(source: str) -> None:
    tokenizer = Tokenizer.from_file(str(weights_dir("math") / "tokenizer.json"))
    for chat in chats(source, 200):
        text = "".join(segment.text for segment in render(chat.messages, chat.tools))
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert len(ids) <= 640


@pytest.mark.parametrize("source", list(SOURCES))
@pytest.mark.parametrize("split", SPLITS)
def test_the_gold_answer_is_right_and_another_is_not(source: str, split: Split) -> None:
    for question in SOURCES[source].questions(random.Random(7), split, 60):
        unit = " hours" if question.kind == "difference" else ""
        assert is_right(question, question.gold + unit)
        assert not is_right(question, UNKNOWN)
        assert not is_right(question, "99:99")


def test_the_zones_have_one_offset_all_year() -> None:
    days = [datetime(2026, month, 15, tzinfo=UTC) for month in range(1, 13)]
    for zone in clock_tasks.PLACES:
        assert len({day.astimezone(ZoneInfo(zone)).utcoffset() for day in days}) == 1


def test_the_real_server_gives_the_results_that_training_shows() -> None:
    rng = random.Random(8)
    for kind in ("convert", "convert", "difference"):
        call = clock_tasks.draw_call(rng, kind)
        text = clock_server().call(call.function, call.arguments)
        source = json.loads(text.partition("\n")[2])["source"]["datetime"]
        now = datetime.fromisoformat(source).replace(tzinfo=None)
        assert text == clock_tasks.shown(clock_tasks.result_of(call, now))
    call = clock_tasks.draw_call(rng, "now")
    text = clock_server().call(call.function, call.arguments)
    now = datetime.fromisoformat(json.loads(text.partition("\n")[2])["datetime"])
    assert text == clock_tasks.shown(clock_tasks.result_of(call, now.replace(tzinfo=None)))


def test_what_the_real_server_refuses_comes_back_as_text() -> None:
    told = clock_server().call(clock_tasks.NOW, {"timezone": "Asia/Nowhere"})
    assert "Invalid timezone" in told


@pytest.mark.parametrize("cell", TOOL_CELLS, ids=lambda cell: f"{cell.name} {cell.split}")
def test_every_cell_of_tools_yields_its_prompts(cell: EvalCell) -> None:
    items = cell_items("math", cell, seed=1, n=8)
    assert len(items) == 8
    for item in items:
        if not cell.tools:
            assert item.question.gold == UNKNOWN
        else:
            assert item.run_tool is not None
            assert item.judges_result == (cell.name == "database, rows")


def test_the_cells_of_tools_belong_to_the_model_that_learns_them() -> None:
    assert skill_cells("math") == TOOL_CELLS
    assert not set(skill_cells("code")) & set(TOOL_CELLS)


def test_an_earlier_time_is_given_again_to_the_right_call() -> None:
    cell = next(cell for cell in TOOL_CELLS if cell.name == "clock, now")
    (item,) = cell_items("math", cell, seed=1, n=1)
    assert item.run_tool is not None
    rng = random.Random(f"1-math-{cell.name}")
    call = clock_tasks.moving_call(rng)
    result = json.loads(item.run_tool(call.function, call.arguments).partition("\n")[2])
    assert call.answer(result) == item.question.gold


def test_the_shares_mix_both_into_the_models_own_tasks() -> None:
    mixed = with_skills(load_generator("math"), sql_share=0.4, clock_share=0.2)
    rng = random.Random(9)
    named = [call["name"] for _ in range(600) for call in calls(mixed.conversation(rng, 1.0))[:1]]
    assert 160 < named.count("database") < 280
    assert 60 < sum(name.startswith("clock__") for name in named) < 160
    assert named.count("calculator") > 120


def test_labelled_questions_of_both_are_written_for_profiles() -> None:
    questions = question_set(["database", "clock"], {"seen": 20, "held_out": 10}, seed=2)
    assert {q.domain for q in questions} == {"database", "clock"}
    assert {q.metric.name for q in questions} == {"numeric", "normalised", "exact"}
