"""The operations of an OpenAPI file: a function for each, and the request that a call makes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from serve_app.config.tools import OpenApiConfig
from serve_app.errors import ToolRetry
from serve_app.schemas import Effects
from serve_app.tools.base import Function
from serve_app.tools.openapi.document import (
    Json,
    References,
    SchemaReader,
    SpecError,
    check_size,
    text_in,
)
from serve_app.tools.web.addresses import WebError, read_url

MAX_FUNCTIONS = 256
MAX_NAME_CHARS = 64
BODY = "body"
_EFFECTS = {
    "get": Effects.NONE,
    "head": Effects.NONE,
    "put": Effects.IDEMPOTENT,
    "delete": Effects.IDEMPOTENT,
    "post": Effects.ONCE,
    "patch": Effects.ONCE,
}
_MAX_DESCRIPTION_CHARS = 1024
_MAX_URL_CHARS = 2000
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_IGNORED_HEADERS = frozenset(("accept", "content-type", "authorization"))
"""OpenAPI says of them that they are no parameters."""
_SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class Parameter:
    """A value of the path or of the query."""

    name: str
    place: str
    """`path` or `query`."""

    is_exploded: bool
    """Whether each item of a list of the query is named anew."""

    is_json: bool
    """Whether the value is written as JSON."""

    is_deep: bool
    """Whether the fields of an object are written `name[field]`."""


@dataclass(frozen=True)
class ApiOperation:
    """One operation of the file."""

    function: Function
    method: str
    path: str
    """With `{name}` where a parameter of the path goes."""

    parameters: tuple[Parameter, ...]
    media_type: str | None
    """Of the body; `None`: it has none."""

    def request(self, arguments: Mapping[str, Any]) -> tuple[str, bytes]:
        """What a call asks for.

        Args:
            arguments: Valid against the function's parameters.

        Returns:
            Path with query, below the server's address, and the body.

        Raises:
            ToolRetry: If a value would change the path, or cannot be sent.
        """
        try:
            target = self._filled(arguments) + self._query(arguments)
            body = b""
            if BODY in arguments and self.media_type is not None:
                body = json.dumps(
                    arguments[BODY], ensure_ascii=False, allow_nan=False, separators=(",", ":")
                ).encode()
        except (UnicodeEncodeError, ValueError, RecursionError):
            raise ToolRetry("the arguments hold what cannot be sent") from None
        if len(target) > _MAX_URL_CHARS:
            raise ToolRetry(f"the arguments make an address of more than {_MAX_URL_CHARS} bytes")
        return target, body

    def _filled(self, arguments: Mapping[str, Any]) -> str:
        def value(found: re.Match[str]) -> str:
            given = arguments[found[1]]
            parts = given if isinstance(given, list) else [given]
            text = ",".join(map(_text, parts))
            steps = re.split(r"[/\\]", text)
            if not text or any(step in (".", "..") for step in steps) or not text.isprintable():
                raise ToolRetry(f"{found[1]}: {text[:50]!r} cannot stand in a path")
            return quote(text, safe="")

        path = _PLACEHOLDER.sub(value, self.path)
        if any(step in (".", "..") for step in path.split("/")):
            raise ToolRetry("the arguments would change the path")
        return path

    def _query(self, arguments: Mapping[str, Any]) -> str:
        pairs: list[tuple[str, str]] = []
        for parameter in self.parameters:
            given = arguments.get(parameter.name)
            if parameter.place != "query" or given is None:
                continue
            name = parameter.name
            if parameter.is_json or (isinstance(given, dict) and not parameter.is_deep):
                pairs.append((name, json.dumps(given, allow_nan=False, separators=(",", ":"))))
            elif isinstance(given, dict):
                pairs += [(f"{name}[{key}]", _text(part)) for key, part in given.items()]
            elif isinstance(given, list):
                texts = list(map(_text, given))
                pairs += [
                    (name, t) for t in (texts if parameter.is_exploded else [",".join(texts)])
                ]
            else:
                pairs.append((name, _text(given)))
        return f"?{urlencode(pairs, quote_via=quote, safe='')}" if pairs else ""


def server_of(document: Json, config: OpenApiConfig) -> str:
    """The address that all paths are below, without a slash at its end.

    Raises:
        SpecError: If neither the settings nor the file name one that can be used.
    """
    if config.server is not None:
        return config.server.rstrip("/")
    servers = document.get("servers")
    first = servers[0] if isinstance(servers, list) and servers else None
    url = first.get("url") if isinstance(first, dict) else None
    if (
        not isinstance(url, str)
        or "{" in url
        or (isinstance(first, dict) and first.get("variables"))
    ):
        raise SpecError("the file's first server is missing or has variables; name one in `server`")
    try:
        address = read_url(url)
    except WebError as error:
        raise SpecError(f"the file's first server cannot be used: {error}; see `server`") from None
    if "?" in address.target:
        raise SpecError("the file's first server has a query; name another one in `server`")
    return address.url.rstrip("/")


def read_operations(document: Json, config: OpenApiConfig) -> dict[str, ApiOperation]:
    """The operations that the settings offer, by the names of their functions.

    Args:
        document: The file.
        config: The tool's settings.

    Raises:
        SpecError: If one that is offered cannot be, or there are too many.
    """
    references = References(document)
    entries = list(_entries(document, references))
    wanted = None if config.operations is None else frozenset(config.operations)
    known = {operation_id for operation_id, *_ in entries}
    missing = sorted((wanted or frozenset()) - known) or sorted(
        set(config.operation_effects) - known
    )
    if missing:
        raise SpecError(f"the file has no operation {missing[0]!r}")
    chosen = [entry for entry in entries if wanted is None or entry[0] in wanted]
    if len(chosen) > MAX_FUNCTIONS:
        raise SpecError(
            f"the file has {len(chosen)} operations; name at most {MAX_FUNCTIONS} in `operations`"
        )
    if not chosen:
        raise SpecError("the file has no operations")
    found: dict[str, ApiOperation] = {}
    problems: list[str] = []
    for operation_id, method, path, item, node in chosen:
        name = _unique_name(config.tool_id, operation_id, found)
        effects = config.operation_effects.get(operation_id, _EFFECTS[method])
        try:
            reader = _OperationReader(references, config, path)
            found[name] = reader.read(name, method, effects, item, node)
        except SpecError as error:
            problems.append(f"operation {operation_id[:80]!r}: {error}")
    if problems:
        raise SpecError(
            f"{len(problems)} operations cannot be offered; name the others in `operations`. "
            + "; ".join(problems[:_SHOWN_PROBLEMS])
        )
    return found


def _entries(document: Json, references: References) -> Iterator[tuple[str, str, str, Json, Json]]:
    """Id, method, path, path item and operation of each, in the file's order."""
    paths = document.get("paths")
    for path, raw in (paths if isinstance(paths, dict) else {}).items():
        item, _ = references.follow(raw)
        for method in _EFFECTS:
            node = item.get(method)
            if isinstance(node, dict):
                operation_id = node.get("operationId")
                named = operation_id if isinstance(operation_id, str) else f"{method}{path}"
                yield named, method, str(path), item, node


def _unique_name(tool_id: str, operation_id: str, taken: Mapping[str, ApiOperation]) -> str:
    """A function's name: of letters that models' tools may have, short, and of one operation."""
    clean = re.sub(r"[^A-Za-z0-9_-]+", "_", operation_id).strip("_") or "operation"
    name = f"{tool_id}__{clean}"
    if len(name) > MAX_NAME_CHARS or name in taken:
        digest = hashlib.sha256(f"{operation_id}{len(taken)}".encode()).hexdigest()[:8]
        name = f"{name[: MAX_NAME_CHARS - 9]}_{digest}"
    return name


class _OperationReader:
    """Reads one operation."""

    def __init__(self, references: References, config: OpenApiConfig, path: str) -> None:
        self._references = references
        self._schemas = SchemaReader(references)
        self._set_headers = {name.lower() for name in config.headers}
        self._path = path

    def read(
        self, name: str, method: str, effects: Effects, item: Json, node: Json
    ) -> ApiOperation:
        """The operation as a function.

        Raises:
            SpecError: If it asks for what cannot be given.
        """
        if not self._path.startswith("/") or re.search(r"[?#\s]", self._path):
            raise SpecError("its path is none")
        if "servers" in node or "servers" in item:
            raise SpecError("it has a server of its own")
        properties: Json = {}
        required: list[str] = []
        parameters = []
        for raw in self._parameters(item, node):
            parameter = self._parameter(raw)
            if parameter is None:
                continue
            if parameter.name in properties:
                raise SpecError(f"it has two parameters {parameter.name[:80]!r}")
            properties[parameter.name] = self._schema(raw)
            if parameter.place == "path" or raw.get("required") is True:
                required.append(parameter.name)
            parameters.append(parameter)
        in_path = {parameter.name for parameter in parameters if parameter.place == "path"}
        if set(_PLACEHOLDER.findall(self._path)) != in_path:
            raise SpecError("its path and its parameters of the path differ")
        media_type = None
        if "requestBody" in node and method not in ("get", "head"):
            body, _ = self._references.follow(node["requestBody"])
            media_type, schema = self._body(body)
            if BODY in properties:
                raise SpecError(f"it has a parameter {BODY!r} beside its body")
            properties[BODY] = schema
            required += [BODY] if body.get("required") is True else []
        schema = {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
        check_size(schema)
        description = text_in(node, "summary", "description", max_chars=_MAX_DESCRIPTION_CHARS)
        function = Function(name, description or f"{method.upper()} {self._path}", schema, effects)
        return ApiOperation(function, method.upper(), self._path, tuple(parameters), media_type)

    def _parameters(self, item: Json, node: Json) -> Iterator[Json]:
        """The operation's own, and those of the path that it does not change."""
        merged: dict[tuple[str, str], Json] = {}
        for holder in (item, node):
            listed = holder.get("parameters", [])
            for raw in listed if isinstance(listed, list) else []:
                parameter, _ = self._references.follow(raw)
                merged[str(parameter.get("name")), str(parameter.get("in"))] = parameter
        yield from merged.values()

    def _parameter(self, raw: Json) -> Parameter | None:
        """A parameter that models give; `None` of others.

        Raises:
            SpecError: If the server needs one that models do not give.
        """
        name, place = str(raw.get("name"))[:200], raw.get("in")
        if place not in ("path", "query"):
            is_set = place == "header" and name.lower() in self._set_headers | _IGNORED_HEADERS
            if raw.get("required") is True and not is_set:
                raise SpecError(f"it needs the {place} {name[:80]!r}, which is not in `headers`")
            return None
        style = raw.get("style")
        if style not in (None, "simple" if place == "path" else "form", "deepObject"):
            raise SpecError(f"the style of the parameter {name[:80]!r} is not known")
        is_json = "content" in raw
        return Parameter(
            name, place, raw.get("explode", True) is True, is_json, style == "deepObject"
        )

    def _schema(self, parameter: Json) -> Json:
        node = parameter.get("schema", {})
        content = parameter.get("content")
        if isinstance(content, dict):
            _, node = _json_of(content)
        schema = self._schemas.copy(node)
        description = text_in(parameter, "description")
        return schema | ({"description": description} if description else {})

    def _body(self, body: Json) -> tuple[str, Json]:
        media_type, node = _json_of(body.get("content"))
        return media_type, self._schemas.copy(node)


def _json_of(content: object) -> tuple[str, object]:
    """The JSON among a content's media types, with its schema."""
    for name, media in content.items() if isinstance(content, dict) else ():
        kind = str(name).partition(";")[0].strip().lower()
        if kind == "application/json" or (kind.endswith("+json") and kind.isascii()):
            return kind, media.get("schema", {}) if isinstance(media, dict) else {}
    raise SpecError("it takes no JSON")


def _text(value: object) -> str:
    """A single value as it stands in an address."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else json.dumps(value, allow_nan=False)
