"""Labelled questions: files that are read, what is refused and where, and the set that ships."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.nano import labelled
from benchmarks.nano import task as nano
from benchmarks.nano.__main__ import app
from benchmarks.nano.gazetteer import corpus_entries
from benchmarks.nano.phrasing import load_gazetteer
from benchmarks.nano.task import Split
from serve_app.errors import ConfigError
from serve_app.questions import HELD_OUT_SHARE, NumericMetric, Question, read_questions
from serve_app.scoring import GivenAnswer, measure

SHIPPED = Path("configs/nano/questions.jsonl")
COMPOSED = Path("configs/nano/composed.jsonl")
SUM = {"id": "sum", "query": "What is 2 + 2?", "gold": 4, "metric": "numeric"}
CALL = {"name": "weather", "arguments": {"city": "Oslo", "days": 3}}
PARTS = [{"gold": "Ada", "metric": "normalised"}, {"gold": 4, "metric": "numeric"}]
ROWS: list[dict[str, Any]] = [
    SUM | {"metric": {"name": "numeric", "tolerance": 0.01}, "domain": "math", "split": "train"},
    {"id": "fact", "query": "Who?", "gold": ["Ada", "Ada Lovelace"], "metric": "f1"},
    {"id": "list", "query": "Sort 2, 1", "gold": "[1, 2]", "metric": "normalised"},
    {"id": "code", "query": "Write f", "metric": {"name": "unit_tests", "tests": ["assert 1"]}},
    {"id": "call", "query": "Weather?", "gold": CALL, "metric": "tool_call"},
    {"id": "both", "query": "Who, and 2 + 2?", "gold": PARTS, "metric": "all_of"},
    {"id": "none", "query": "Who?", "metric": "refusal"},
]


def write(folder: Path, *rows: object) -> Path:
    path = folder / "questions.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_file_is_read_in_its_order_and_empty_lines_are_skipped(tmp_path: Path) -> None:
    questions = read_questions(write(tmp_path, ROWS[0], "", *ROWS[1:], ""))
    assert [question.id for question in questions] == [row["id"] for row in ROWS]
    assert questions[0].metric == NumericMetric(tolerance=0.01)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    questions = read_questions(write(tmp_path, *ROWS))
    path = write(tmp_path, "".join(question.to_line() for question in questions))
    assert read_questions(path) == questions


def test_a_parquet_file_holds_the_same_questions(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="Parquet is in the extra `rl`")
    pq = pytest.importorskip("pyarrow.parquet")

    def as_json(value: Any) -> Any:
        return value if value is None or isinstance(value, str) else json.dumps(value)

    columns = ("id", "query", "gold", "metric", "domain", "split")
    rows = [{name: row.get(name) for name in columns} for row in ROWS]
    for row in rows:
        row |= {name: as_json(row[name]) for name in ("gold", "metric")}
    rows[0]["gold"] = "4"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "questions.parquet")
    expected = read_questions(write(tmp_path, ROWS[0] | {"gold": "4"}, *ROWS[1:]))
    assert read_questions(tmp_path / "questions.parquet") == expected


def test_parquet_columns_may_be_nested(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="Parquet is in the extra `rl`")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"id": "a", "query": "a?", "gold": ["x", "y"], "metric": {"name": "exact"}},
        {"id": "b", "query": "b?", "gold": None, "metric": {"name": "unit_tests", "tests": ["0"]}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "questions.parquet")
    expected = read_questions(write(tmp_path, rows[0], rows[1]))
    assert read_questions(tmp_path / "questions.parquet") == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("[]", r"line 2: \(all\)"),
        (SUM | {"id": ""}, "line 2: id"),
        (SUM | {"id": "one"}, "line 2: id: 'one' is that of line 1"),
        (SUM | {"query": " "}, "line 2: query"),
        (SUM | {"surprise": 1}, "line 2: surprise"),
        (SUM | {"split": "test"}, "line 2: split"),
        (SUM | {"metric": "vibes"}, "line 2: metric.*'vibes'"),
        (SUM | {"metric": {"name": "numeric", "tolerance": -1}}, r"line 2: metric.*tolerance"),
        (SUM | {"metric": {"name": "f1", "tolerance": 1}}, r"line 2: metric.*tolerance"),
        (SUM | {"metric": "unit_tests"}, "line 2: metric.*tests"),
        (SUM | {"gold": "four"}, "line 2: gold: .*a finite number, got 'four'"),
        (SUM | {"gold": True}, "line 2: gold"),
        (SUM | {"gold": float("nan")}, "line 2: gold"),
        (SUM | {"gold": 10**400}, "line 2: gold"),
        (SUM | {"metric": "exact"}, "line 2: gold: .*a text"),
        (SUM | {"metric": "f1", "gold": []}, "line 2: gold"),
        (SUM | {"metric": "choice", "gold": "AB"}, "line 2: gold: .*a letter"),
        (SUM | {"metric": "judge", "gold": None}, "line 2: gold: .*a reference"),
        (SUM | {"metric": "tool_call", "gold": {"name": "f"}}, "line 2: gold: .*arguments"),
        (SUM | {"metric": "all_of"}, "line 2: gold: .*two parts or more"),
        (SUM | {"metric": "all_of", "gold": PARTS[:1]}, "line 2: gold: .*two parts or more"),
        (SUM | {"metric": "all_of", "gold": [*PARTS, {"gold": 1}]}, "line 2: gold: .*scored by"),
        (
            SUM | {"metric": "all_of", "gold": [*PARTS, {"gold": "x", "metric": "numeric"}]},
            "line 2: gold: .*part 3: .*a finite number",
        ),
        (
            SUM | {"metric": "all_of", "gold": [*PARTS, {"gold": PARTS, "metric": "all_of"}]},
            "line 2: gold: .*scored by",
        ),
        (
            SUM | {"metric": "tool_call", "gold": {"name": "f", "arguments": {"x": float("nan")}}},
            "line 2: gold",
        ),
    ],
)
def test_a_wrong_question_is_refused_by_line_and_field(
    tmp_path: Path, wrong: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_questions(write(tmp_path, SUM | {"id": "one"}, wrong))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "bytes.parquet").write_bytes(b"no table")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, message in [
        ("none.jsonl", "No such file"),
        ("bytes.jsonl", "not UTF-8"),
        ("bytes.parquet", "not Parquet"),
        ("none.parquet", "cannot read"),
        ("empty.jsonl", "no question"),
        ("questions.csv", "must end in"),
    ]:
        with pytest.raises(ConfigError, match=message):
            read_questions(tmp_path / name)


def test_the_key_is_that_of_the_question_under_any_id_domain_and_split() -> None:
    key = Question.model_validate(SUM).key
    assert len(key) == 16
    same = SUM | {"id": "other", "domain": "math", "split": "train"}
    assert Question.model_validate(same | {"metric": {"name": "numeric"}}).key == key


@pytest.mark.parametrize(
    "change",
    [{"query": "2 + 2"}, {"gold": 5}, {"metric": {"name": "numeric", "tolerance": 0.5}}],
    ids=["query", "gold", "metric"],
)
def test_another_question_has_another_key(change: dict[str, Any]) -> None:
    assert Question.model_validate(SUM | change).key != Question.model_validate(SUM).key


def test_a_question_without_a_split_falls_into_one_by_its_hash() -> None:
    questions = [Question.model_validate(SUM | {"query": f"What is {n}?"}) for n in range(2000)]
    held_out = [question.effective_split == "held_out" for question in questions]
    assert sum(held_out) / len(held_out) == pytest.approx(HELD_OUT_SHARE, abs=0.03)
    named = Question.model_validate(SUM | {"split": "held_out"})
    assert named.effective_split == "held_out"


def test_the_shipped_set_holds_its_splits_and_domains_apart() -> None:
    questions = read_questions(SHIPPED)
    for domain in ("math", "facts", "code", "database", "clock"):
        splits = [question.split for question in questions if question.domain == domain]
        assert (splits.count("train"), splits.count("held_out")) == (240, 60)
    assert len(questions) == 5 * 300
    assert len({question.query for question in questions}) == len(questions)
    assert len({question.key for question in questions}) == len(questions)


def test_the_shipped_set_is_what_its_command_writes(tmp_path: Path) -> None:
    path = tmp_path / "nano.jsonl"
    assert CliRunner().invoke(app, ["questions", str(path)]).exit_code == 0
    assert path.read_bytes() == SHIPPED.read_bytes()


def test_the_composed_set_holds_its_domains_and_splits() -> None:
    questions = read_questions(COMPOSED)
    for split in ("train", "held_out"):
        domains = [question.domain for question in questions if question.split == split]
        counts = {domain: domains.count(domain) for domain in set(domains)}
        assert counts == {"compound": 160, "hops": 100, "refusal": 80, "repair": 60}
    assert len({question.query for question in questions}) == len(questions) == 800


def test_the_composed_set_is_what_its_command_writes(tmp_path: Path) -> None:
    path = tmp_path / "composed.jsonl"
    assert CliRunner().invoke(app, ["composed", str(path)]).exit_code == 0
    assert path.read_bytes() == COMPOSED.read_bytes()


def test_gold_answers_of_the_composed_set_are_right_a_line_each() -> None:
    num_programs = 0
    for question in read_questions(COMPOSED):
        parts = question.parts or (question,)
        num_programs += any(part.metric.name == "unit_tests" for part in parts)
        if num_programs > 30 and any(part.metric.name == "unit_tests" for part in parts):
            continue
        answer = "\n".join(str(part.gold) for part in parts)
        assert measure(question, GivenAnswer(answer)) == 1.0, question.id


def test_nothing_in_the_corpus_answers_what_is_to_be_refused() -> None:
    told = {(entry.subject.name, entry.relation.key) for entry in corpus_entries()}
    relations = load_gazetteer()[0]
    for question in read_questions(COMPOSED):
        if question.domain == "refusal":
            for name, key in told:
                if name in question.query and key in relations:
                    asked = [np.replace("{e}", "") for np in relations[key].noun_phrases]
                    assert not any(np in question.query for np in asked), question.query


def test_every_gold_answer_of_the_shipped_set_is_right() -> None:
    for question in read_questions(SHIPPED):
        assert measure(question, GivenAnswer(str(question.gold))) == 1.0, question.id


def test_more_questions_than_a_generator_knows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Echo:
        model_id = "nano-echo"

        def questions(self, rng: random.Random, split: Split, n: int) -> list[nano.Question]:
            return [nano.Question(rng.choice("ab"), "1", "number", "echo", "k", split)] * n

    monkeypatch.setattr(labelled, "question_source", lambda name: Echo())
    assert len(labelled.question_set(["echo"], {"seen": 1, "held_out": 1}, seed=0)) == 2
    with pytest.raises(ConfigError, match="no 2 different held_out questions"):
        labelled.question_set(["echo"], {"seen": 1, "held_out": 2}, seed=0)
