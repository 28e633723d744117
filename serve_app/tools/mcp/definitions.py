"""What an MCP server may say of itself to a model: names, descriptions, schemas; bounded and plain.

A definition is pinned by the hash of what the server says, before anything of it is cut.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson
from mcp_types import Tool as ServerTool

from serve_app.config.tools import McpConfig
from serve_app.errors import InvalidRequest
from serve_app.schema_check import SchemaBudget, referred
from serve_app.tools.base import Function

MAX_FUNCTIONS = 512
"""Of one server; those after it are left out."""
MAX_DESCRIPTION = 1024
MAX_NODES = 1000
"""Schemas within the schema of one function, its references written out."""
_MAX_NAME = 64
"""Longest name that models' APIs take."""
_MAX_TOLD = 100
"""Left-out functions that are told of."""


@dataclass(frozen=True)
class Definition:
    """One function of a server."""

    name: str
    """The server's own."""
    function: Function
    """As it is offered."""
    sha256: str
    """Of name, description and input schema as the server says them."""


@dataclass(frozen=True)
class Listing:
    """What a server offers."""

    definitions: dict[str, Definition] = field(default_factory=dict)
    """By the name under which each is offered."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Functions that cannot be offered, and why; at most `_MAX_TOLD`."""


def read_listing(config: McpConfig, tools: Iterable[ServerTool]) -> Listing:
    """Take what can be offered of what a server lists.

    Args:
        config: Its settings.
        tools: As the server lists them; more than `MAX_FUNCTIONS` are not looked at.
    """
    definitions: dict[str, Definition] = {}
    left_out: dict[str, str] = {}
    for index, tool in enumerate(tools):
        shown = plain(tool.name, _MAX_NAME)
        if config.only is not None and tool.name not in config.only:
            continue
        offered = f"{config.tool_id}__{re.sub(r'[^A-Za-z0-9_-]', '_', tool.name)}"
        problem = None
        if index >= MAX_FUNCTIONS:
            problem = f"the server has more than {MAX_FUNCTIONS} functions"
        elif len(offered) > _MAX_NAME:
            problem = f"its name is too long: {offered[:_MAX_NAME]}…"
        elif offered in definitions:
            problem = f"another function is named {offered!r}"
        else:
            try:
                definitions[offered] = _definition(config, tool, offered)
            except InvalidRequest as error:
                problem = error.message
        if problem is not None and len(left_out) < _MAX_TOLD:
            left_out[shown] = problem
    return Listing(definitions, left_out)


def _definition(config: McpConfig, tool: ServerTool, offered: str) -> Definition:
    said = config.functions.get(tool.name)
    return Definition(
        tool.name,
        Function(
            offered,
            plain(tool.description or "", MAX_DESCRIPTION),
            _parameters(tool.input_schema),
            config.effects if said is None else said.effects,
        ),
        _sha256([tool.name, tool.description, tool.input_schema]),
    )


def _sha256(said: list[Any]) -> str:
    try:
        encoded = orjson.dumps(said, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # a number beyond 64 bits, or half of a character
        raise InvalidRequest("its definition cannot be written as JSON") from None
    return hashlib.sha256(encoded).hexdigest()


def plain(text: str, most: int) -> str:
    """A text without control characters and without characters that cannot be seen.

    Args:
        text: From outside.
        most: Longest result, in characters.
    """
    kept = "".join(
        c for c in text[: 8 * most] if c in "\n\t" or unicodedata.category(c) not in _UNSEEN
    )
    return kept if len(kept) <= most else f"{kept[: most - 1]}…"


_UNSEEN = frozenset({"Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"})


# Schemas: checked, without references, closed.

_ONE = frozenset({
    "additionalProperties", "contains", "contentSchema", "else", "if", "items", "not",
    "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties",
})  # fmt: skip
_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_MAPS = frozenset({"dependentSchemas", "properties"})
_DROPPED = frozenset({"$anchor", "$comment", "$defs", "$id", "$schema", "definitions", "title"})
_REFUSED = frozenset({"$dynamicAnchor", "$dynamicRef", "patternProperties"})


def _parameters(schema: dict[str, Any]) -> dict[str, Any]:
    """A server's schema as a model gets it: no reference, and no field beyond the named.

    Raises:
        InvalidRequest: If it is no schema, or needs too much work.
    """
    try:
        SchemaBudget().check(schema, "its schema", is_object=True)
    except TypeError:
        raise InvalidRequest("its schema cannot be written as JSON") from None
    written = _WrittenOut(schema).schema
    return {**written, "type": "object", "additionalProperties": False}


class _WrittenOut:
    """A schema with what it refers to put in place; what refers to itself takes any value there."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._nodes = 0
        self.schema: dict[str, Any] = self._of(root, ())

    def _of(self, schema: Any, within: tuple[str, ...]) -> Any:
        if isinstance(schema, bool):
            return schema
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise InvalidRequest(f"its schema has more than {MAX_NODES} parts, references included")
        written: dict[str, Any] = {}
        reference = schema.get("$ref")
        if reference is not None and reference not in within:
            target = self._of(referred(reference, self._root), (*within, reference))
            if isinstance(target, dict):
                written |= target
        for keyword, value in schema.items():
            if keyword in _REFUSED:
                raise InvalidRequest(f"its schema has {keyword!r}")
            if keyword == "$ref" or keyword in _DROPPED:
                continue
            if keyword in _ONE:
                value = self._of(value, within)
            elif keyword in _LISTS:
                value = [self._of(item, within) for item in value]
            elif keyword in _MAPS:
                value = {name: self._of(item, within) for name, item in value.items()}
            elif keyword == "description" and isinstance(value, str):
                value = plain(value, MAX_DESCRIPTION)
            written[keyword] = value
        return written
