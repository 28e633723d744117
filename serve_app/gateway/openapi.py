"""The OpenAPI document, written from the table of routes.

A row says what its operation takes and answers; the rest follows from its method, its path and its
access. The routes are plain Starlette, because generated ones cost more per request than everything
else at the edge. A test sends generated requests against the document.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from serve_app.config import LimitsConfig
from serve_app.gateway.edge.idempotency import MAX_KEY_CHARS
from serve_app.gateway.edge.operation import DocumentedAnswer, Operation, Shape
from serve_app.gateway.edge.routes import PUBLIC, Endpoint
from serve_app.gateway.json_schema import DescribedSchema
from serve_app.gateway.shapes import ERROR

Json = dict[str, Any]

_REF = "#/components/schemas/{model}"

_ALWAYS = (403, 421, 431)
_WITH_KEY = (401, 429, 500, 503)
_WITH_BODY = (400, 408, 413, 415)
_POSTED = (409, 422)
"""Errors that the edge, or what every handler shares, may answer with."""

_REASONS = {
    400: "A field is wrong.",
    401: "No API key, or an unknown one.",
    403: "The key lacks the scope; without keys, the caller is on another machine.",
    404: "No such model, tool, pair, request or job.",
    408: "The body did not arrive in time.",
    409: "The same was said already, or the job is over; or the request with this "
    "`Idempotency-Key` is under way, its outcome unknown, or its answer not kept.",
    413: "The body is too large.",
    415: "The body is not plain JSON.",
    422: "The `Idempotency-Key` came with another request before.",
    421: "The `Host` is none that is served here.",
    429: "Too many requests, of this key or in all; see Retry-After.",
    431: "The headers are too large.",
    500: "The server's fault.",
    502: "The model failed.",
    503: "Nothing can serve this now.",
    504: "The time is up.",
}


_IDEMPOTENCY_KEY: Json = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": (
        "Sent again with the same body, the request is not done again: its first answer comes "
        "back, with the header `idempotent-replayed: true`."
    ),
    "schema": {"type": "string", "pattern": f"^[!-~]{{1,{MAX_KEY_CHARS}}}$"},
}


def openapi_document(
    endpoints: Sequence[Endpoint], limits: LimitsConfig, auth_mode: Literal["open", "required"]
) -> Json:
    """The document for a gateway with these routes and limits."""
    declared = [(route, route.operation) for route in endpoints if route.operation is not None]
    schemas = _Schemas([operation for _, operation in declared])
    paths: Json = {}
    for endpoint, described in declared:
        operation = _operation(endpoint, described, schemas)
        if auth_mode == "required" and endpoint.rule.access != PUBLIC:
            operation["security"] = [{"key": []}]
        paths.setdefault(endpoint.path_format, {})[endpoint.method.lower()] = operation
    _tighten(schemas.components, limits)
    document: Json = {
        "openapi": "3.1.0",
        "info": {
            "title": "atlas-serve",
            "version": package_version(),
            "description": (
                "OpenAI-compatible chat completions. `model: atlas` routes each request to a "
                "(model, tool) pair or a pattern; `<model_id>`, `<model_id>@<tool_id>` or "
                "`pattern:<name>` pins one. `/mcp`, where it is on, is left out here: it describes "
                "itself to MCP clients."
            ),
        },
        "paths": paths,
        "components": {"schemas": schemas.components},
    }
    if auth_mode == "required":
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def package_version() -> str:
    """Of atlas-serve; `0` where the package is not installed."""
    try:
        return version("atlas-serve")
    except PackageNotFoundError:
        return "0"


class _Schemas:
    """The schemas of what the operations take and answer, and references to them.

    Attributes:
        components: Schemas by name; a shape is among them once it was referred to.
    """

    def __init__(self, operations: Sequence[Operation]) -> None:
        models: dict[tuple[type[BaseModel], JsonSchemaMode], None] = {}
        for operation in operations:
            if operation.body is not None:
                models[operation.body, "validation"] = None
            for answer in (operation.answer, *operation.also):
                if not isinstance(answer.content, Shape):
                    models[answer.content, "serialization"] = None
        self._refs, definitions = models_json_schema(
            list(models), ref_template=_REF, schema_generator=DescribedSchema
        )
        self.components: Json = definitions.get("$defs", {})

    def taken(self, model: type[BaseModel]) -> Json:
        """A reference to what a request's body is validated as."""
        return self._refs[model, "validation"]

    def given(self, content: Shape | type[BaseModel]) -> Json:
        """A reference to what comes back."""
        if not isinstance(content, Shape):
            return self._refs[content, "serialization"]
        if content.name not in self.components:
            self.components[content.name] = self._referring(content.schema)
        return {"$ref": _REF.format(model=content.name)}

    def _referring(self, value: Any) -> Any:
        """A part of a schema, with references in the place of shapes."""
        if isinstance(value, Shape):
            return self.given(value)
        if isinstance(value, dict):
            return {name: self._referring(part) for name, part in value.items()}
        return value


def _tighten(schemas: Json, limits: LimitsConfig) -> None:
    """Write the configured limits into the generated schemas."""
    chat = schemas["ChatRequest"]["properties"]
    chat["messages"]["maxItems"] = limits.max_messages
    for name, most in (
        ("n", limits.max_n),
        ("max_tokens", limits.max_completion_tokens),
        ("max_completion_tokens", limits.max_completion_tokens),
    ):
        _variant(chat[name], "integer")["maximum"] = most
    _variant(chat["tools"], "array")["maxItems"] = limits.max_tools
    options = schemas["AtlasOptions"]["properties"]
    _variant(options["deadline_s"], "number")["maximum"] = limits.max_deadline_s
    _variant(options["max_steps"], "integer")["maximum"] = limits.max_steps


def _variant(schema: Json, kind: str) -> Json:
    """The non-null variant of an optional field."""
    found: Json = next(variant for variant in schema["anyOf"] if variant.get("type") == kind)
    return found


def _operation(endpoint: Endpoint, declared: Operation, schemas: _Schemas) -> Json:
    statuses = {*_ALWAYS, *declared.errors}
    if endpoint.rule.access != PUBLIC:
        statuses.update(_WITH_KEY)
    if declared.body is not None:
        statuses.update(_WITH_BODY)
    if endpoint.method == "POST":
        statuses.update(_POSTED)
    answers = [DocumentedAnswer(_REASONS[status], ERROR, status) for status in sorted(statuses)]
    answers += [declared.answer, *declared.also]
    operation: Json = {
        "operationId": declared.operation_id,
        "summary": declared.summary,
        "responses": {str(answer.status): _response(answer, schemas) for answer in answers},
    }
    if declared.body is not None:
        content = {"application/json": {"schema": schemas.taken(declared.body)}}
        operation["requestBody"] = {"required": True, "content": content}
    parameters = [_path_parameter(name) for name in endpoint.param_convertors]
    if endpoint.method == "POST":
        parameters.append(_IDEMPOTENCY_KEY)
    if parameters:
        operation["parameters"] = parameters
    return operation


def _response(answer: DocumentedAnswer, schemas: _Schemas) -> Json:
    content: Json = {"application/json": {"schema": schemas.given(answer.content)}}
    if answer.as_events:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "description": answer.description,
        "headers": {"x-request-id": {"schema": {"type": "string"}}},
        "content": content,
    }


def _path_parameter(name: str) -> Json:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1},
    }
