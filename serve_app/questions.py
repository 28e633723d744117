"""Labelled questions: what profiling asks every pair, and what a right answer is.

One question per line of a JSONL file, or per row of a Parquet file with the same columns:

    {"id": "sum-1", "query": "What is 2 + 2?", "gold": 4, "metric": "numeric", "domain": "math"}
    {"id": "add-1", "query": "Write …", "metric": {"name": "unit_tests", "tests": ["assert …"]}}

`metric` is a name, or an object of the name and its settings. What `gold` holds depends on it:

    numeric              a number, or a text that is one
    exact normalised f1  a text, or a list of accepted texts
    choice               a letter
    unit_tests           nothing, or a reference solution for the reader
    tool_call            {"name": …, "arguments": {…}}
    judge                a reference answer
    all_of               a list of parts: {"gold": …, "metric": …} each, at least two
    refusal              nothing, or a refusal for the reader
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from serve_app.config.base import BaseConfig
from serve_app.errors import ConfigError

_PART_METRICS = ("numeric", "exact", "normalised", "unit_tests", "refusal")
"""What a part of `all_of` may be scored by."""
HELD_OUT_SHARE = 0.2
"""Of the questions that name no split."""

QuestionSplit = Literal["train", "held_out"]


class NumericMetric(BaseConfig):
    """The number of the answer is the gold number, up to rounding."""

    name: Literal["numeric"] = "numeric"
    tolerance: float = Field(default=1e-3, ge=0, le=1)
    """Largest difference, as a share of the gold number."""


class UnitTestsMetric(BaseConfig):
    """The code of the answer passes every test."""

    name: Literal["unit_tests"] = "unit_tests"
    tests: tuple[str, ...] = Field(min_length=1)
    """Python assertions on the function `solution`."""


class PlainMetric(BaseConfig):
    """A metric without settings; `scoring` says what each does."""

    name: Literal["exact", "normalised", "f1", "choice", "tool_call", "judge", "all_of", "refusal"]


def _named(metric: object) -> object:
    return {"name": metric} if isinstance(metric, str) else metric


Metric = Annotated[
    Annotated[NumericMetric | UnitTestsMetric | PlainMetric, Field(discriminator="name")],
    BeforeValidator(_named),
]


class Question(BaseConfig):
    """One labelled question."""

    id: str = Field(min_length=1)
    """Unique in its file."""
    query: str = Field(pattern=r"\S")
    """What is asked, as a user would."""
    metric: Metric
    gold: JsonValue = Field(default=None, validate_default=True)
    """The right answer; its form depends on `metric`."""
    domain: str = ""
    split: QuestionSplit | None = None
    """`None` leaves it to the hash of the question."""

    @field_validator("gold")
    @classmethod
    def _fits_the_metric(cls, gold: JsonValue, info: ValidationInfo) -> JsonValue:
        metric = info.data.get("metric")
        if metric is not None:
            expected = _expectation(metric.name, gold)
            if expected:
                raise ValueError(f"metric {metric.name!r} needs {expected}, got {_short(gold)}")
        _canonical(gold)
        return gold

    @property
    def key(self) -> str:
        """16 hex digits of query, gold and metric: the same question under any id."""
        content = [self.query, self.gold, self.metric.model_dump(mode="json")]
        return hashlib.sha256(_canonical(content)).hexdigest()[:16]

    @property
    def effective_split(self) -> QuestionSplit:
        """The split it names, or else the one its key falls into."""
        if self.split is not None:
            return self.split
        return "held_out" if int(self.key, 16) < HELD_OUT_SHARE * 16**16 else "train"

    @property
    def parts(self) -> tuple[Question, ...]:
        """What `all_of` asks for, in order: a question for each part; empty for other metrics."""
        if self.metric.name != "all_of":
            return ()
        golds = self.gold if isinstance(self.gold, list) else []
        return tuple(_part(self.query, gold) for gold in golds)

    @property
    def gold_texts(self) -> tuple[str, ...]:
        """The accepted answers, as texts."""
        return tuple(map(str, self.gold if isinstance(self.gold, list) else [self.gold]))

    def to_line(self) -> str:
        """Its line of a JSONL file, without what equals the defaults."""
        fields = self.model_dump(mode="json", exclude_defaults=True)
        settings = self.metric.model_dump(mode="json", exclude_defaults=True, exclude={"name"})
        name = self.metric.name
        fields["metric"] = {"name": name, **settings} if settings else name
        return json.dumps(fields, ensure_ascii=False) + "\n"


def _expectation(metric: str, gold: JsonValue) -> str | None:
    """What the metric needs as gold, in words; `None` where it has it."""
    if metric == "numeric":
        return None if _is_number(gold) else "a finite number"
    if metric in ("exact", "normalised", "f1"):
        texts = gold if isinstance(gold, list) else [gold]
        ok = bool(texts) and all(isinstance(text, str) and text.strip() for text in texts)
        return None if ok else "a text or a list of texts, none of them empty"
    if metric == "choice":
        ok = isinstance(gold, str) and len(gold) == 1 and gold.isascii() and gold.isalpha()
        return None if ok else "a letter"
    if metric == "tool_call":
        ok = (
            isinstance(gold, dict)
            and gold.keys() == {"name", "arguments"}
            and isinstance(gold["name"], str)
            and isinstance(gold["arguments"], dict)
        )
        return None if ok else 'an object {"name": text, "arguments": object}'
    if metric == "judge":
        return None if isinstance(gold, str) and gold.strip() else "a reference answer"
    if metric == "all_of":
        return _parts_expectation(gold)
    return None


def _part(query: str, gold: object) -> Question:
    fields = dict(gold) if isinstance(gold, dict) else {}
    return Question.model_validate({"id": "part", "query": query, **fields})


def _parts_expectation(gold: JsonValue) -> str | None:
    """What `all_of` needs as gold, in words; `None` where it has it."""
    needed = 'a list of two parts or more, each {"gold": …, "metric": …}'
    if not isinstance(gold, list) or len(gold) < 2:
        return needed
    for number, part in enumerate(gold, start=1):
        if not isinstance(part, dict) or not part.keys() <= {"gold", "metric"}:
            return needed
        metric = part.get("metric")
        name = metric.get("name") if isinstance(metric, dict) else metric
        if name not in _PART_METRICS:
            return f"parts scored by {', '.join(_PART_METRICS)}"
        try:
            _part("q", part)
        except ValidationError as error:
            return f"{needed}; part {number}: {error.errors()[0]['msg']}"
    return None


def _is_number(gold: JsonValue) -> bool:
    if isinstance(gold, bool) or not isinstance(gold, int | float | str):
        return False
    try:
        return math.isfinite(float(gold))
    except (ValueError, OverflowError):
        return False


def _canonical(content: JsonValue) -> bytes:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def _short(gold: JsonValue) -> str:
    text = repr(gold)
    return text if len(text) <= 80 else f"{text[:80]}…"


def read_questions(path: Path) -> tuple[Question, ...]:
    """Read a question set.

    Args:
        path: A file that ends in `.jsonl` or `.parquet`. In Parquet, `metric` and a `gold` that is
            an object or a list of texts may be written as JSON.

    Returns:
        The questions in the order of the file, at least one.

    Raises:
        ConfigError: If the file cannot be read, or a question is wrong; the message names the line
            (or row, from 1) and the field.
    """
    what = f"questions {str(path)!r}"
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise ConfigError(f"{what}: the file name must end in .jsonl or .parquet")
    questions: list[Question] = []
    places: dict[str, str] = {}
    for place, fields in readers[path.suffix](path, what):
        question = _question(fields, f"{what}, {place}")
        if question.id in places:
            raise ConfigError(
                f"{what}, {place}: id: {question.id!r} is that of {places[question.id]} already; "
                "ids are unique"
            )
        places[question.id] = place
        questions.append(question)
    if not questions:
        raise ConfigError(f"{what}: there is no question in it")
    return tuple(questions)


def _question(fields: object, where: str) -> Question:
    try:
        return Question.model_validate(fields)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or '(all)'}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from error


def _jsonl_rows(path: Path, what: str) -> Iterator[tuple[str, object]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"cannot read {what}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not UTF-8: {error.reason}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{what}, line {number}: not JSON: {error}") from error


def _parquet_rows(path: Path, what: str) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(f"{what}: Parquet needs pyarrow; install the extra `rl`") from error
    try:
        rows = pq.read_table(path).to_pylist()
    except OSError as error:
        raise ConfigError(f"cannot read {what}: {error.strerror or error}") from error
    except pa.ArrowException as error:
        raise ConfigError(f"{what} is not Parquet: {error}") from error
    for number, row in enumerate(rows, start=1):
        fields = _without_nulls(row)
        if "metric" in fields:
            fields["metric"] = _decoded(fields["metric"], dict)
        if "gold" in fields:
            fields["gold"] = _decoded(fields["gold"], dict, list)
        yield f"row {number}", fields


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Only what is set: every row of a table has all columns, and every struct all members."""
    return {
        name: _without_nulls(value) if isinstance(value, dict) else value
        for name, value in row.items()
        if value is not None
    }


def _decoded(value: Any, *types: type) -> Any:
    """A JSON text as what it stands for, where that is an object or a list of texts."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "["):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    if not isinstance(parsed, types):
        return value
    # A list of numbers is a text to be answered, `[1, 2]`, not two accepted answers.
    is_answer = isinstance(parsed, list) and not all(isinstance(i, str | dict) for i in parsed)
    return value if is_answer else parsed
