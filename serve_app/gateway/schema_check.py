"""Checks JSON schemas of callers' tools and structured answers, before an engine compiles them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import jsonschema
import orjson

from serve_app.errors import InvalidRequest

MAX_SCHEMA_BYTES = 64 << 10
MAX_SCHEMA_DEPTH = 24
MAX_SCHEMA_NODES = 2_000


def check_json_schema(schema: dict[str, Any], field: str, *, is_object: bool = False) -> None:
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
    problem = _problem(encoded)
    if problem is not None:
        raise InvalidRequest(f"{field}: {problem}", field)


@lru_cache(maxsize=256)
def _problem(encoded: bytes) -> str | None:
    """What is wrong with a schema. Cached: a client sends the same few with every request."""
    schema = orjson.loads(encoded)
    for nodes, (node, depth) in enumerate(_containers(schema), start=1):
        if depth > MAX_SCHEMA_DEPTH:
            return f"nests deeper than {MAX_SCHEMA_DEPTH} levels"
        if nodes > MAX_SCHEMA_NODES:
            return f"has more than {MAX_SCHEMA_NODES} nodes"
        reference = node.get("$ref") if isinstance(node, dict) else None
        if isinstance(reference, str) and not reference.startswith("#"):
            return "'$ref' may only point into the schema itself"
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        return f"is not a JSON schema: {error.message[:200]}"
    except Exception:  # a hostile pattern or reference can make the checker itself fail
        return "is not a JSON schema"
    return None


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
