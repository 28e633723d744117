"""Checks JSON schemas from outside, of tools and structured answers, before engines compile them.

The check runs on an event loop, so every step is linear in what `SchemaBudget` admits:
some 20 ms for the largest request. No pattern of a caller's is compiled here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import orjson

from serve_app.errors import InvalidRequest

MAX_SCHEMA_BYTES = 64 << 10
MAX_SCHEMA_DEPTH = 24
MAX_SCHEMA_NODES = 2_000
MAX_PROPERTIES = 256
"""Of one object: an engine's work grows with their square."""
MAX_COUNTED_PROPERTIES = 64
"""Of all objects of a schema with `minProperties` or `maxProperties` together: there an engine's
work grows with the fourth power."""
MAX_LENGTHS = 16
"""Different pairs of `minLength` and `maxLength` in a schema. xgrammar's work grows with their
square, and with the vocabulary: 16 take 1 to 2.5 s of a processor for the nano models (64: 18 s);
with 128,000 tokens one takes 7 s for 100 characters, and 12 s for any more. Meanwhile the engine
answers others, but not those that also ask for a schema that it does not know yet. Smallest and
largest numbers cost next to nothing."""
MAX_REQUEST_BYTES = 256 << 10
MAX_REQUEST_NODES = 4_000
MAX_REQUEST_PATTERN_STEPS = 2_048
"""Characters that the patterns of a request have with their repetitions written out. For one
`{1,N}` xgrammar holds the engine's event loop, by the square of N: 3,000 take 0.7 s."""

_PATTERN_PART = re.compile(
    r"\\.|\[(?:\\.|[^\]\\])*+\]?|\{(?P<least>\d++)(?:,(?P<most>\d*+))?\}|.", re.DOTALL
)
"""One character, class of characters, bracket or repetition."""


@dataclass(frozen=True, slots=True)
class _Finding:
    """What the check of one schema found."""

    problem: str | None
    nodes: int = 0
    pattern_steps: int = 0


class SchemaBudget:
    """What all schemas of one request may have together; make one per request."""

    def __init__(self) -> None:
        """Start with nothing used."""
        self._bytes = 0
        self._nodes = 0
        self._pattern_steps = 0

    def check(self, schema: dict[str, Any], field: str, *, is_object: bool = False) -> None:
        """Refuse a schema that is no JSON schema, is huge, or refers to anything outside itself.

        Args:
            schema: The schema, as parsed JSON.
            field: Where it stands in the request, for the message.
            is_object: Whether it must describe an object, as a tool's parameters do.

        Raises:
            InvalidRequest: If it is refused.
        """
        encoded = orjson.dumps(schema)
        if len(encoded) > MAX_SCHEMA_BYTES:
            raise InvalidRequest(
                f"{field}: at most {MAX_SCHEMA_BYTES} bytes, got {len(encoded)}", field
            )
        if is_object and schema.get("type", "object") != "object":
            raise InvalidRequest(f"{field}: 'type' must be 'object'", field)
        self._bytes += len(encoded)
        if self._bytes <= MAX_REQUEST_BYTES:
            found = _examine(encoded)
            if found.problem is not None:
                raise InvalidRequest(f"{field}: {found.problem}", field)
            self._nodes += found.nodes
            self._pattern_steps += found.pattern_steps
        for used, most, unit in (
            (self._bytes, MAX_REQUEST_BYTES, "bytes"),
            (self._nodes, MAX_REQUEST_NODES, "nodes"),
            (
                self._pattern_steps,
                MAX_REQUEST_PATTERN_STEPS,
                "characters of patterns, repetitions written out,",
            ),
        ):
            if used > most:
                raise InvalidRequest(
                    f"{field}: the schemas of a request have at most {most} {unit} in all", field
                )


@lru_cache(maxsize=256)
def _examine(encoded: bytes) -> _Finding:
    """Check a schema. Cached: a client sends the same few with every request."""
    schema = orjson.loads(encoded)
    nodes = 0
    for nodes, (_, depth) in enumerate(_containers(schema), start=1):
        if depth > MAX_SCHEMA_DEPTH:
            return _Finding(f"nests deeper than {MAX_SCHEMA_DEPTH} levels")
        if nodes > MAX_SCHEMA_NODES:
            return _Finding(f"has more than {MAX_SCHEMA_NODES} nodes")
    schemas: list[dict[str, Any]] = []
    problem = _problem(schema, schemas) or _work_problem(schemas)
    if problem is not None:
        return _Finding(problem)
    patterns = [
        pattern
        for found in schemas
        for pattern in (found.get("pattern", ""), *found.get("patternProperties", ()))
    ]
    chars = sum(map(len, patterns))
    too_long = chars > MAX_REQUEST_PATTERN_STEPS
    return _Finding(None, nodes, chars if too_long else sum(map(_steps, patterns)))


def _steps(pattern: str) -> int:
    """Characters of a regular expression with its repetitions written out; linear.

    `(ab{2,9}){3}` has 3 * (1 + 9), and those of the notation, 10, which count as they are.
    """
    groups, last, notation = [0], 0, 0
    for part in _PATTERN_PART.finditer(pattern):
        notation += len(part[0])
        most = part["most"] or part["least"]
        if part[0] == "(":
            groups.append(0)
            last = 0
        elif part[0] == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif most is not None:
            times = int(most) if len(most) < 8 else 10**8
            groups[-1] += last * max(times - 1, 0)
            last *= max(times, 1)
        else:
            last = 1
            groups[-1] += 1
            notation -= 1
    return sum(groups) + notation


def _containers(schema: Any) -> Iterator[tuple[Any, int]]:
    """Every object and array in the schema with its depth, level by level."""
    level, depth = [schema], 1
    while level:
        yield from ((node, depth) for node in level)
        level = [
            item
            for node in level
            for item in (node.values() if isinstance(node, dict) else node)
            if isinstance(item, (dict, list))
        ]
        depth += 1


def _problem(root: dict[str, Any], schemas: list[dict[str, Any]]) -> str | None:
    """What is wrong with a schema, if anything; adds it and all inside it to `schemas`."""
    same_value: dict[int, list[Any]] = {}
    """Of each schema those that the same value has to fit, or may fit instead."""
    left: list[Any] = [root]
    while left:
        schema = left.pop()
        if isinstance(schema, bool) or id(schema) in same_value:
            continue
        if not isinstance(schema, dict):
            return f"is not a JSON schema: {_shown(schema)} stands for a schema"
        in_place: list[Any] = []
        for keyword, value in schema.items():
            known = _KEYWORDS.get(keyword)
            if known is None:
                continue
            if not known.takes(value):
                return f"is not a JSON schema: {keyword!r} must be {known.words}"
            if known.inside is not None:
                left += known.inside(value)
            if keyword in _IN_PLACE:
                in_place += value
            elif keyword in _REFERENCES:
                target = referred(value, root)
                if target is None:
                    return f"'$ref' may only point into the schema itself: {_shown(value)}"
                in_place.append(target)
        same_value[id(schema)] = in_place
        schemas.append(schema)
        left += in_place
    if _has_cycle(same_value):
        return "refers to itself without end: no value can fit it"
    return None


def _work_problem(schemas: list[dict[str, Any]]) -> str | None:
    """Whether a valid schema asks for too much of an engine's work."""
    lengths: set[tuple[Any, Any]] = set()
    counted = 0
    for schema in schemas:
        properties = len(schema.get("properties", ()))
        if properties > MAX_PROPERTIES:
            return f"has an object with more than {MAX_PROPERTIES} properties"
        counted += 0 if _COUNTS.isdisjoint(schema) else properties
        if not _LENGTHS.isdisjoint(schema):
            lengths.add((schema.get("minLength"), schema.get("maxLength")))
    if len(lengths) > MAX_LENGTHS:
        limit = f"more than {MAX_LENGTHS} different lengths of texts"
        return f"has {limit} ('minLength', 'maxLength')"
    if counted > MAX_COUNTED_PROPERTIES:
        limit = f"more than {MAX_COUNTED_PROPERTIES} properties in objects that count them"
        return f"has {limit} ('minProperties', 'maxProperties')"
    return None


def referred(reference: str, root: Any) -> Any:
    """What a reference of a schema points to; `None` if that is no schema inside it."""
    if reference == "#":
        return root
    if not reference.startswith("#/"):
        return None
    here = root
    for part in reference[2:].split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(here, dict):
            here = here.get(name)
        elif isinstance(here, list) and name.isascii() and name.isdigit() and len(name) < 6:
            here = here[int(name)] if int(name) < len(here) else None
        else:
            return None
    return here if isinstance(here, dict | bool) else None


def _has_cycle(same_value: dict[int, list[Any]]) -> bool:
    """Whether a schema asks of a value, before anything inside it, to fit that schema again."""
    done: set[int] = set()
    for start, first in same_value.items():
        if not first or start in done:
            continue
        path: list[tuple[int, Iterator[Any]]] = [(start, iter(first))]
        on_path = {start}
        while path:
            here, following = path[-1]
            schema = next(following, None)
            if schema is None:
                path.pop()
                on_path.discard(here)
                done.add(here)
            elif id(schema) in on_path:
                return True
            elif same_value.get(id(schema)) and id(schema) not in done:
                on_path.add(id(schema))
                path.append((id(schema), iter(same_value[id(schema)])))
    return False


def _shown(value: Any) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= 80 else f"{text[:80]}…"


# JSON Schema 2020-12: the keywords that say something, and what their values must be.


class _Keyword(NamedTuple):
    takes: Callable[[Any], bool]
    words: str
    """What `takes` demands, for the message."""
    inside: Callable[[Any], Iterable[Any]] | None = None
    """The schemas in its value."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)


def _are_names(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(item, str) for item in value)
        and len(set(value)) == len(value)
    )


def _is_type(value: Any) -> bool:
    names = value if isinstance(value, list) and value else [value]
    return _are_names(names) and _TYPES.issuperset(names)


_TYPES = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})
_IN_PLACE = frozenset({"allOf", "anyOf", "oneOf"})
_REFERENCES = frozenset({"$ref", "$dynamicRef"})
_COUNTS = frozenset({"minProperties", "maxProperties"})
_LENGTHS = frozenset({"minLength", "maxLength"})

_SCHEMA = _Keyword(
    lambda value: isinstance(value, dict | bool),
    "a schema: an object, true or false",
    lambda v: (v,),
)
_SCHEMAS = _Keyword(
    lambda value: isinstance(value, list) and bool(value), "a list of at least one schema", iter
)
_NAMED_SCHEMAS = _Keyword(
    lambda value: isinstance(value, dict), "an object of schemas", lambda value: value.values()
)
_COUNT = _Keyword(_is_count, "a whole number from 0")
_NUMBER = _Keyword(_is_number, "a number")
_TEXT = _Keyword(lambda value: isinstance(value, str), "a text")
_FLAG = _Keyword(lambda value: isinstance(value, bool), "true or false")
_LIST = _Keyword(lambda value: isinstance(value, list), "a list")

_KEYWORDS: dict[str, _Keyword] = {
    name: keyword
    for keyword, names in (
        (_SCHEMA, "additionalProperties contains contentSchema else if items not propertyNames"),
        (_SCHEMA, "then unevaluatedItems unevaluatedProperties"),
        (_SCHEMAS, "allOf anyOf oneOf prefixItems"),
        (_NAMED_SCHEMAS, "$defs definitions dependentSchemas patternProperties properties"),
        (_COUNT, "maxContains maxItems maxLength maxProperties"),
        (_COUNT, "minContains minItems minLength minProperties"),
        (_NUMBER, "exclusiveMaximum exclusiveMinimum maximum minimum"),
        (_TEXT, "$anchor $comment $dynamicAnchor $dynamicRef $id $ref $schema contentEncoding"),
        (_TEXT, "contentMediaType description format pattern title"),
        (_FLAG, "deprecated readOnly uniqueItems writeOnly"),
        (_LIST, "enum examples"),
    )
    for name in names.split()
} | {
    "multipleOf": _Keyword(lambda value: _is_number(value) and value > 0, "a number above 0"),
    "required": _Keyword(_are_names, "a list of different names"),
    "dependentRequired": _Keyword(
        lambda value: isinstance(value, dict) and all(map(_are_names, value.values())),
        "an object of lists of different names",
    ),
    "type": _Keyword(_is_type, f"one or several of {', '.join(sorted(_TYPES))}"),
}
