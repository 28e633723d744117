"""From bytes to a wire model, with an error that names the field and shows the value.

In comes the body of a request; out goes one of the models of `wire`, or an `InvalidRequest`.
"""

from __future__ import annotations

from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from serve_app.errors import InvalidRequest

MAX_JSON_VALUES = 50_000
"""In a body: parsed, an empty list of two bytes takes 25 times as many."""
MAX_OBJECT_KEYS = 1_024

_MAX_ERROR_VALUE_CHARS = 80
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'",:[{'))

Model = TypeVar("Model", bound=BaseModel)


def parse_json(body: bytes, max_depth: int) -> dict[str, Any]:
    """Read a body as one JSON object.

    Repeated keys count with their last value. NaN, Infinity, numbers beyond double range, lone
    surrogates and invalid UTF-8 are no JSON.

    Raises:
        InvalidRequest: If it is none, nests deeper than `max_depth`, or has too many values.
    """
    # Before it is parsed: half a million lists take a tenth of a second, and 25 MiB.
    if _most_values(body) > MAX_JSON_VALUES and _count_values(body) > MAX_JSON_VALUES:
        raise InvalidRequest(f"the body has more than {MAX_JSON_VALUES} values")
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        reason = str(error).partition(":")[0][:100]
        raise InvalidRequest(f"the body is not valid JSON: {reason} at byte {error.pos}") from error
    if not isinstance(parsed, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {_json_type(parsed)}")
    problem = _problem(parsed, max_depth)
    if problem is not None:
        raise InvalidRequest(f"the body {problem}")
    return parsed


def _most_values(body: bytes) -> int:
    """A bound on the values in a body, found at once: what stands in strings counts too."""
    return body.count(b",") + body.count(b"[") + body.count(b"{") + 1


def _count_values(body: bytes) -> int:
    """The same without what stands in strings; right as far as the body is JSON.

    Beyond the limit a lower bound is enough. Linear, and all in C: some 10 ms for 1 MiB of
    whatever bytes.
    """
    bare = body.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _NOT_STRUCTURE)
    bare = bare.replace(b'""', b"")
    # Two quotes are a string, and two strings, a key and its value, need a comma or a bracket.
    if (least := bare.count(b'"') // 4) > MAX_JSON_VALUES:
        return least
    return _most_values(b"".join(bare.split(b'"')[::2]))


def _problem(value: Any, max_depth: int) -> str | None:
    """Whether parsed JSON is too deep, or an object in it too large."""
    level = [value]
    for _ in range(max_depth):
        if any(len(item) > MAX_OBJECT_KEYS for item in level if isinstance(item, dict)):
            return f"has an object with more than {MAX_OBJECT_KEYS} keys"
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return None
    return f"nests deeper than {max_depth} levels"


def validate(kind: type[Model], body: dict[str, Any], *, strict: bool = False) -> Model:
    """Check a body against its model.

    Args:
        kind: The model.
        body: Parsed JSON.
        strict: Whether JSON's types count where the model itself, like that of the configuration
            file, is not strict.

    Raises:
        InvalidRequest: Naming the first wrong field.
    """
    try:
        if strict:
            return kind.model_validate_json(orjson.dumps(body), strict=True)
        return kind.model_validate(body)
    except ValidationError as error:
        raise _invalid_request(error, body) from None


def _invalid_request(error: ValidationError, body: dict[str, Any]) -> InvalidRequest:
    """The deepest of the errors: of variants tried in turn, the one that got furthest is meant."""
    errors = error.errors(include_url=False, include_context=False)
    located = [(_field(item["loc"], body), item) for item in errors]
    (path, depth), first = max(located, key=lambda pair: pair[0][1])
    value = first.get("input")
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"unknown parameter {path!r}", path)
    if first["type"] == "missing":
        return InvalidRequest(f"{path}: this field is required", path)
    if path == "atlas.pattern":
        return InvalidRequest("atlas.pattern: name a pattern as the model, 'pattern:<name>'", path)
    if ".content[" in path and (kind := _part_kind(path, value)) is not None:
        path = path if path.endswith(".type") else f"{path}.type"
        return InvalidRequest(
            f"{path}: only text is served, and of a user image_url; content of type "
            f"{_shown(kind)} is not supported",
            path,
        )
    if first["type"].startswith("union_tag"):
        return InvalidRequest(f"{path}: {first['msg'][:300]}", path)
    shown = f", got {_shown(value)}" if depth else ""
    return InvalidRequest(f"{path}: {first['msg'][:300]}{shown}", path)


def _part_kind(path: str, value: Any) -> str | None:
    """The type of a content part that has none of those served; `None`: it is something else."""
    if path.endswith("]") and isinstance(value, dict):
        value = value.get("type")
    elif not path.endswith(".type"):
        return None
    return value if isinstance(value, str) else None


def _field(loc: tuple[str | int, ...], body: Any) -> tuple[str, int]:
    """The path of an error as the caller would write it, without variants' tags, and its depth."""
    path, depth, here = "", 0, body
    for index, part in enumerate(loc):
        if isinstance(here, list) and isinstance(part, int) and part < len(here):
            path, here = f"{path}[{part}]", here[part]
        elif (
            isinstance(here, dict)
            and isinstance(part, str)
            and (part in here or index == len(loc) - 1)
        ):
            path, here = (f"{path}.{part}" if path else part)[:200], here.get(part)
        else:
            continue
        depth += 1
    return path or "body", depth


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return f"a JSON {_json_type(value)}"
    text = orjson.dumps(value, default=str).decode()
    return text if len(text) <= _MAX_ERROR_VALUE_CHARS else text[:_MAX_ERROR_VALUE_CHARS] + "…"


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
