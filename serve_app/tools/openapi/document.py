"""An OpenAPI file as plain values, and its schemas as bounded JSON schemas.

Nothing outside the file is ever read: a `$ref` that leads elsewhere is refused.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml

Json = dict[str, Any]

MAX_JSON_BYTES = 8 << 20
MAX_YAML_BYTES = 512 << 10
"""YAML is read about forty times as slowly as JSON."""
MAX_NODES = 2000
"""Parts of one operation's schema, with what it refers to written out."""
MAX_SCHEMA_BYTES = 32 << 10
_MAX_REF_STEPS = 32
_MAX_YAML_DEPTH = 100
_MAX_DEPTH = 48
_MAX_TEXT_CHARS = 300
_MAX_ENUM = 256

_SCALARS = (
    "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength",
    "maxLength", "minItems", "maxItems", "const", "default",
)  # fmt: skip
"""Keywords that are copied. `pattern`, `uniqueItems` and `multipleOf` are left to the server: a
model's argument could make the check of them take long."""
_TYPES = frozenset(("string", "number", "integer", "boolean", "array", "object", "null"))


class SpecError(Exception):
    """The file, or one operation of it, cannot be used."""


class _Loader(yaml.CSafeLoader):
    """YAML of JSON's values: no dates, and no merging of mappings, which can grow without bound."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        letter: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:merge")
        ]
        for letter, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
    }


def read_document(path: Path) -> Json:
    """Read an OpenAPI 3 file.

    Args:
        path: Of a regular file with JSON or YAML.

    Raises:
        SpecError: If it is none, or too large; the message names no path.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise SpecError("the OpenAPI file is no regular file")
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except OSError:
        raise SpecError("the OpenAPI file cannot be read") from None
    if len(raw) > MAX_JSON_BYTES:
        raise SpecError(f"the OpenAPI file is larger than {MAX_JSON_BYTES} bytes")
    is_json = raw.lstrip().startswith(b"{")
    if not is_json and len(raw) > MAX_YAML_BYTES:
        raise SpecError(
            f"the OpenAPI file is YAML of more than {MAX_YAML_BYTES} bytes; convert it to JSON"
        )
    try:
        parsed = json.loads(raw) if is_json else _yaml(raw)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError):
        raise SpecError("the OpenAPI file is neither JSON nor YAML") from None
    if not isinstance(parsed, dict) or not str(parsed.get("openapi")).startswith(("3.0", "3.1")):
        raise SpecError("the OpenAPI file is not of OpenAPI 3.0 or 3.1")
    return parsed


def _yaml(raw: bytes) -> object:
    """YAML's value, if it is not nested deeper than the C loader can follow."""
    depth = 0
    for event in yaml.parse(raw, _Loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_YAML_DEPTH:
            raise ValueError
    return yaml.load(raw, _Loader)


class References:
    """Follows the references inside one file."""

    def __init__(self, document: Json) -> None:
        """Of a document."""
        self._document = document

    def follow(self, node: object) -> tuple[Json, tuple[str, ...]]:
        """The object that a node is or refers to.

        Returns:
            The object, and the references that led to it.

        Raises:
            SpecError: If a reference leads out of the file, to nothing, or round in a circle.
        """
        path: list[str] = []
        while isinstance(node, dict) and "$ref" in node:
            reference = node["$ref"]
            if not isinstance(reference, str) or not reference.startswith("#/"):
                raise SpecError(f"$ref {str(reference)[:80]!r} leads out of the file")
            if reference in path or len(path) >= _MAX_REF_STEPS:
                raise SpecError(f"$ref {reference[:80]!r} leads to itself")
            path.append(reference)
            node = self._at(reference)
        if not isinstance(node, dict):
            raise SpecError(f"there is a {type(node).__name__} where an object is expected")
        return node, tuple(path)

    def _at(self, reference: str) -> object:
        here: object = self._document
        for part in reference[2:].split("/"):
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(here, list) and key.isdecimal() and int(key[:9]) < len(here):
                here = here[int(key[:9])]
            elif isinstance(here, dict) and key in here:
                here = here[key]
            else:
                raise SpecError(f"$ref {reference[:80]!r} leads to nothing")
        return here


class SchemaReader:
    """Copies the schemas of one operation, references written out, within one budget of parts."""

    def __init__(self, references: References) -> None:
        """Of a file.

        Args:
            references: Its references.
        """
        self._references = references
        self._nodes_left = MAX_NODES

    def copy(self, node: object, above: tuple[str, ...] = (), depth: int = 0) -> Json:
        """One schema as a JSON schema that holds no reference.

        A schema that contains itself takes any value where it comes round; an object that names
        its properties takes no other.

        Args:
            node: As in the file.
            above: The references that it was reached by.
            depth: How deep it is nested.

        Raises:
            SpecError: If it is too large or too deep, or cannot be read.
        """
        self._nodes_left -= 1
        if self._nodes_left < 0 or depth > _MAX_DEPTH:
            raise SpecError("its parameters are too large or too deep")
        if isinstance(node, bool):
            return {} if node else {"not": {}}
        schema, path = self._references.follow(node)
        if any(reference in above for reference in path):
            return {}
        above = (*above, *path)

        def copied(inner: object) -> Json:
            return self.copy(inner, above, depth + 1)

        made = _scalars(schema) | _type_of(schema)
        if isinstance(schema.get("enum"), list):
            if len(schema["enum"]) > _MAX_ENUM or not all(map(_is_plain, schema["enum"])):
                raise SpecError("an enum is too long, or not of plain values")
            made["enum"] = list(schema["enum"])
        for keyword in ("anyOf", "oneOf", "allOf"):
            if isinstance(schema.get(keyword), list) and schema[keyword]:
                made[keyword] = [copied(inner) for inner in schema[keyword]]
        if "items" in schema:
            made["items"] = copied(schema["items"])
        made |= self._object(schema, copied)
        if "allOf" in made:  # the parts know only their own properties
            made["allOf"] = [_open(part) for part in made["allOf"]]
            made.pop("additionalProperties", None)
        if schema.get("nullable") is True and isinstance(made.get("type"), str):
            made["type"] = [made["type"], "null"]
            if "enum" in made and None not in made["enum"]:
                made["enum"].append(None)
        return made

    def _object(self, schema: Json, copied: Callable[[object], Json]) -> Json:
        """The keywords of objects; what only the server writes is left out."""
        made: Json = {}
        properties = schema.get("properties")
        if isinstance(properties, dict):
            made["properties"] = {
                str(name): copied(inner)
                for name, inner in properties.items()
                if not (isinstance(inner, dict) and inner.get("readOnly") is True)
            }
            made["additionalProperties"] = False
        extra = schema.get("additionalProperties")
        if isinstance(extra, dict | bool):
            made["additionalProperties"] = extra if isinstance(extra, bool) else copied(extra)
        required = schema.get("required")
        if isinstance(required, list):
            known = made.get("properties")
            made["required"] = [
                name
                for name in dict.fromkeys(filter(lambda n: isinstance(n, str), required))
                if known is None or name in known
            ]
        return made


def check_size(schema: Json) -> None:
    """See that a function's whole schema is small enough for a prompt.

    Raises:
        SpecError: If it is not, or is no valid schema.
    """
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except ValueError:
        raise SpecError("its parameters hold a number that is none") from None
    if size > MAX_SCHEMA_BYTES:
        raise SpecError(f"its parameters are larger than {MAX_SCHEMA_BYTES} bytes")


def text_in(node: Mapping[str, Any], *names: str, max_chars: int = _MAX_TEXT_CHARS) -> str:
    """The texts of a node in one line, cut."""
    parts = [node[name] for name in names if isinstance(node.get(name), str)]
    line = " ".join(" ".join(parts).split())
    return line if len(line) <= max_chars else f"{line[: max_chars - 1]}…"


def _scalars(schema: Json) -> Json:
    made: Json = {
        name: schema[name] for name in _SCALARS if name in schema and _is_plain(schema[name])
    }
    for strict, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        # OpenAPI 3.0 has a switch there.
        if isinstance(made.get(strict), bool) and made.pop(strict) and bound in made:
            made[strict] = made.pop(bound)
    description = text_in(schema, "description")
    return made | ({"description": description} if description else {})


def _type_of(schema: Json) -> Json:
    named = schema.get("type")
    types = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    if not all(isinstance(name, str) and name in _TYPES for name in types):
        raise SpecError("a schema names an unknown type")
    if not types:
        return {}
    return {"type": types[0] if len(types) == 1 else list(types)}


def _is_plain(value: object) -> bool:
    is_short = not isinstance(value, str) or len(value) <= _MAX_TEXT_CHARS
    return value is None or (isinstance(value, str | int | float) and is_short)


def _open(schema: Json) -> Json:
    return {name: part for name, part in schema.items() if name != "additionalProperties"}
