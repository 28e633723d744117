"""The hostile requests, each with the class of status that is right for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.hostile.engine import ERRORS, STREAMS, WHOLE, Json

MIB = 1 << 20
CHAT = "/v1/chat/completions"
USER: Json = {"role": "user", "content": "good"}


@dataclass(frozen=True, slots=True)
class Case:
    """One hostile request."""

    name: str
    make: Callable[[int], bytes]
    """The body; the number makes it unlike earlier ones, which a cache may know."""
    wanted: tuple[int, ...]
    """Hundreds of the status that are right."""
    path: str = CHAT
    headers: dict[str, str] = field(default_factory=dict)


def body(**fields: Any) -> bytes:
    """A chat request."""
    return json.dumps({"model": "stub@none", "messages": [USER], **fields}).encode()


def _tools(count: int, schema: Json, number: int) -> list[Json]:
    return [
        {
            "type": "function",
            "function": {"name": f"f{i}", "parameters": {**schema, "$comment": f"{number} {i}"}},
        }
        for i in range(count)
    ]


def _structured(schema: Json, number: int) -> Json:
    named = {"name": "x", "schema": {**schema, "$comment": str(number)}}
    return {"type": "json_schema", "json_schema": named}


def _schemas(name: str, count: int, schema: Json, wanted: int) -> Case:
    return Case(f"tools: {name}", lambda n: body(tools=_tools(count, schema, n)), (wanted,))


_DEEP: Json = {}
for _ in range(14):
    _DEEP = {"properties": {"a": _DEEP}}
_REFERENCES = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(1000)} | {"d1000": {}}

_SLOW = "(?i)[\\u0100-\\uffff]"
"""A pattern that takes 4 ms to compile."""
_COUNTED: Json = {"properties": {f"p{i}": {} for i in range(200)}, "minProperties": 99}
_LENGTHS: Json = {"allOf": [{"minLength": 10**6, "maxLength": 10**9 + i} for i in range(300)]}


def _formats(name: str, schema: Json) -> Case:
    return Case(
        f"response_format: {name}", lambda n: body(response_format=_structured(schema, n)), (4,)
    )


def _said(content: str, **fields: Any) -> list[Json]:
    return [USER | {"content": content} | fields]


def _posted(path: str, name: str, **fields: Any) -> Case:
    return Case(name, lambda n: json.dumps({**fields, "x": n}).encode(), (4,), path)


_MANY = {f"x{i}": i for i in range(90_000)}

REQUESTS = (
    _schemas("400 patterns slow to compile", 10, {"allOf": [{"pattern": _SLOW}] * 40}, 4),
    _schemas("60 KiB of patterns", 1, {"allOf": [{"pattern": _SLOW * 30}] * 80}, 4),
    _schemas("as many nodes as may be", 2, {"allOf": [{"type": "string"}] * 990}, 2),
    _schemas("2,000 nodes in each of 15", 15, {"allOf": [{}] * 1990}, 4),
    _schemas("1,000 references", 3, {"$defs": _REFERENCES}, 2),
    _schemas("256 KiB of names", 4, {"required": [f"name-{i}" for i in range(4000)]}, 2),
    _schemas("nested 28 deep", 1, _DEEP, 4),
    _schemas("3,000 properties", 1, {"properties": {f"p{i}": True for i in range(3000)}}, 4),
    _formats("refers to itself", {"$ref": "#"}),
    _formats("200 counted properties", _COUNTED),
    _formats("300 lengths", _LENGTHS),
    Case("40,000 wrong messages", lambda n: body(messages=[n] * 40_000), (4,)),
    Case("500,000 wrong messages", lambda n: body(messages=[1] * 250_000), (4,)),
    Case("20,000 messages without a role", lambda n: body(messages=[{}] * 20_000), (4,)),
    Case("9,000 right messages", lambda n: body(messages=[USER] * 9_000), (4,)),
    Case("90,000 unknown fields", lambda n: body(**_MANY), (4,)),
    Case("340,000 empty lists", lambda n: b'{"messages":[' + b"[]," * 340_000 + b"[]]}", (4,)),
    Case(
        "annotations of 48,000 lists",
        lambda n: body(messages=_said("x", role="assistant", annotations=[[]] * 48_000)),
        (4,),
    ),
    Case("nested 500,000 deep", lambda n: b'{"a":' + b"[" * 500_000, (4,)),
    Case("nested 1,000 deep", lambda n: b'{"a":' + b"[" * 1000 + b"]" * 1000 + b"}", (4,)),
    Case("1 MiB of commas", lambda n: body(messages=_said("," * (MIB - 200))), (4,)),
    Case("250,000 texts", lambda n: b'{"a":[' + b'",",' * 250_000 + b"1]}", (4,)),
    Case("a number of 1 MB", lambda n: b'{"seed":' + b"9" * 1_000_000 + b"}", (4,)),
    Case("NaN", lambda n: b'{"temperature":NaN}', (4,)),
    Case("invalid UTF-8", lambda n: b'{"model":"' + b"\xff" * 1000 + b'"}', (4,)),
    Case(
        "80,000 characters of 12 bytes", lambda n: body(messages=_said("\U0001f600" * 80_000)), (2,)
    ),
    Case("8 MiB", lambda n: b"x" * (8 * MIB), (4,)),
    Case(
        "a media type of 15 KiB",
        lambda n: body(),
        (4,),
        headers={"content-type": "application/json" + " " * 15_000 + "x"},
    ),
    Case("100,000 allowed models", lambda n: body(atlas={"models": ["x"] * 100_000}), (4,)),
    Case("49,000 stop texts", lambda n: body(stop=[1] * 49_000), (4,)),
    Case("9,999,999,999 choices", lambda n: body(n=9_999_999_999), (4,)),
    _posted("/v1/feedback", "feedback with 90,000 fields", **_MANY),
    _posted("/v1/admin/jobs", "48,000 wrong questions", kind="profile", questions=[1] * 48_000),
    _posted("/v1/admin/jobs", "9,000 empty questions", kind="profile", questions=[{}] * 9_000),
    Case(
        "a model of 900 wrong fields",
        lambda n: json.dumps({"type": "remote"} | {f"x{i}": 1 for i in range(900)}).encode(),
        (4,),
        "/v1/admin/models",
    ),
)


def _wanted(name: str) -> tuple[int, ...]:
    """What a caller may get for an engine's answer: the answer, where it can be read, or 5xx."""
    return (4,) if name == "a 400 of 10 MiB" else (2, 5)


def _of_engine(name: str) -> list[Case]:
    pairs = ("stub@none", "stub@calculator", "stub@best_of") if name in WHOLE else ("stub@none",)
    if name in ("100 MiB", "1 MiB of empty lists", "HTML", "nothing", "a list"):
        pairs = ("stub@none",)
    return [Case(f"engine: {name}, {pair}", _asking(name, pair), _wanted(name)) for pair in pairs]


def _asking(name: str, pair: str) -> Callable[[int], bytes]:
    deadline_s = 3 if name in STREAMS else 15
    return lambda n: body(
        model=pair, messages=_said(name), stream=name in STREAMS, atlas={"deadline_s": deadline_s}
    )


ENGINES = tuple(case for name in (*WHOLE, *STREAMS, *ERRORS) for case in _of_engine(name))
CASES = REQUESTS + ENGINES
