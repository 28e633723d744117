"""The OpenAPI document, written from the wire models rather than from the routes.

The routes are plain Starlette, because generated ones cost more per request than everything else
at the edge; so this page must say what they do. A test sends generated requests against it.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic.json_schema import models_json_schema

from serve_app.config import LimitsConfig, PriceConfig
from serve_app.config.patterns.language import PatternConfig
from serve_app.gateway.chat.trajectory import Trajectory
from serve_app.gateway.chat.wire import (
    ChatRequest,
    FeedbackRequest,
    ModelSubmission,
    ToolSubmission,
)
from serve_app.jobs import JobSubmission

Json = dict[str, Any]

_REF = "#/components/schemas/{model}"


def openapi_document(limits: LimitsConfig, auth_mode: Literal["open", "required"]) -> Json:
    """The document for a gateway with these limits."""
    _, definitions = models_json_schema(
        [
            (ChatRequest, "validation"),
            (FeedbackRequest, "validation"),
            (JobSubmission, "validation"),
            (ModelSubmission, "validation"),
            (ToolSubmission, "validation"),
            (PatternConfig, "validation"),
            (PriceConfig, "validation"),
            (Trajectory, "serialization"),
        ],
        ref_template=_REF,
    )
    schemas: Json = definitions["$defs"]
    _tighten(schemas, limits)
    schemas |= _response_schemas()
    document: Json = {
        "openapi": "3.1.0",
        "info": {
            "title": "atlas-serve",
            "version": _version(),
            "description": (
                "OpenAI-compatible chat completions. `model: atlas` routes each request to a "
                "(model, tool) pair or a pattern; `<model_id>`, `<model_id>@<tool_id>` or "
                "`pattern:<name>` pins one."
            ),
        },
        "paths": _paths(),
        "components": {"schemas": schemas},
    }
    if auth_mode == "required":
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for operations in document["paths"].values():
            for operation in operations.values():
                if operation.pop("x-needs-key"):
                    operation["security"] = [{"key": []}]
    else:
        for operations in document["paths"].values():
            for operation in operations.values():
                del operation["x-needs-key"]
    return document


def _version() -> str:
    try:
        return version("atlas-serve")
    except PackageNotFoundError:
        return "0"


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


def _paths() -> Json:
    chat_body = _body("ChatRequest")
    return {
        "/v1/chat/completions": {
            "post": _operation(
                "createChatCompletion",
                "Answer a chat, whole or as server-sent events.",
                {"200": _completion_response()},
                body=chat_body,
                errors=(400, 404, 408, 413, 415, 429, 431, 500, 502, 503, 504),
            )
        },
        "/v1/route": {
            "post": _operation(
                "decide",
                "Decide only, and show every candidate's scores.",
                {"200": _json_response("The decision.", "Decision")},
                body=chat_body,
                errors=(400, 404, 408, 413, 415, 429, 431, 500, 502, 503, 504),
            )
        },
        "/v1/feedback": {
            "post": _operation(
                "giveFeedback",
                "Give a score to one of your requests, once.",
                {"200": _json_response("Kept.", "Feedback")},
                body=_body("FeedbackRequest"),
                errors=(400, 404, 408, 409, 413, 415, 429, 431, 500, 503),
            )
        },
        "/v1/trajectories/{request_id}": {
            "get": _operation(
                "getTrajectory",
                "What happened in one of your requests: decisions, calls and checks as a tree.",
                {"200": _json_response("The request, and its spans.", "Trajectory")},
                errors=(404, 429, 431, 500, 503),
                parameters=[_path_parameter("request_id")],
            )
        },
        "/v1/models": {
            "get": _operation(
                "listModels",
                "Everything a request may name as `model`.",
                {"200": _json_response("The pool.", "ModelList")},
                errors=(429, 431, 500),
            )
        },
        "/v1/models/{model_id}": {
            "get": _operation(
                "getModel",
                "One entry of the list of models.",
                {"200": _json_response("The model or pair.", "Model")},
                errors=(404, 429, 431, 500),
                parameters=[_path_parameter("model_id")],
            )
        },
        "/v1/admin/models": {
            "get": _operation(
                "adminListModels",
                "Models with state and settings.",
                {"200": _json_response("The models.", "AdminList")},
                errors=(429, 431, 500),
            ),
            "post": _operation(
                "addModel",
                "Add a model; it gets requests when it is warm.",
                {"202": _json_response("Accepted.", "ModelChange")},
                body=_body("ModelSubmission"),
                errors=_CHANGE_ERRORS,
            ),
        },
        "/v1/admin/models/{model_id}": {
            "put": _operation(
                "updateModel",
                "Change a model's settings; the new version takes over when it is warm.",
                {"202": _json_response("Accepted.", "ModelChange")},
                body=_body("ModelSubmission"),
                errors=_CHANGE_ERRORS,
                parameters=[_path_parameter("model_id")],
            ),
            "patch": _operation(
                "setPrice",
                "Change what a model's tokens cost.",
                {"200": _json_response("Done.", "ModelChange")},
                body=_body("PriceConfig"),
                errors=_CHANGE_ERRORS,
                parameters=[_path_parameter("model_id")],
            ),
            "delete": _operation(
                "removeModel",
                "Remove a model; requests that it works on end first.",
                {"202": _json_response("Accepted.", "ModelChange")},
                errors=(400, 404, 429, 431, 500),
                parameters=[_path_parameter("model_id")],
            ),
        },
        "/v1/admin/tools": {
            "get": _operation(
                "adminListTools",
                "Tools with settings.",
                {"200": _json_response("The tools.", "AdminList")},
                errors=(429, 431, 500),
            ),
            "post": _operation(
                "addTool",
                "Add a tool to some models, or to all.",
                {"202": _json_response("Accepted.", "ToolChange")},
                body=_body("ToolSubmission"),
                errors=_CHANGE_ERRORS,
            ),
        },
        "/v1/admin/tools/{tool_id}": {
            "delete": _operation(
                "removeTool",
                "Remove a tool and its pairs.",
                {"202": _json_response("Accepted.", "ToolChange")},
                errors=(400, 404, 429, 431, 500),
                parameters=[_path_parameter("tool_id")],
            )
        },
        "/v1/admin/patterns": {
            "get": _operation(
                "adminListPatterns",
                "Patterns with their nodes, whether each answers now, and its worst case.",
                {"200": _json_response("The patterns.", "AdminList")},
                errors=(429, 431, 500),
            ),
            "post": _operation(
                "putPattern",
                "Add a pattern, or give one other nodes.",
                {"202": _json_response("Accepted.", "PatternChange")},
                body=_body("PatternConfig"),
                errors=_CHANGE_ERRORS,
            ),
        },
        "/v1/admin/patterns/{name}": {
            "delete": _operation(
                "removePattern",
                "Remove a pattern.",
                {"202": _json_response("Accepted.", "PatternChange")},
                errors=(400, 404, 429, 431, 500),
                parameters=[_path_parameter("name")],
            )
        },
        "/v1/admin/snapshots": {
            "get": _operation(
                "adminListSnapshots",
                "Router snapshots, and which of them served when.",
                {"200": _json_response("The snapshots.", "SnapshotList")},
                errors=(429, 431, 500),
            )
        },
        "/v1/admin/jobs": {
            "post": _operation(
                "submitJob",
                "Profile, fit, train, evaluate, promote or roll back, behind the response.",
                {"201": _json_response("Accepted.", "Job")},
                body=_body("JobSubmission"),
                errors=(400, 408, 413, 415, 429, 431, 500, 503),
            ),
            "get": _operation(
                "listJobs",
                "The last jobs, the newest first.",
                {"200": _json_response("The jobs.", "JobList")},
                errors=(429, 431, 500),
            ),
        },
        "/v1/admin/jobs/{job_id}": {
            "get": _operation(
                "getJob",
                "One job with its progress, whole or as server-sent events.",
                {"200": _with_events(_json_response("The job, or its changes as events.", "Job"))},
                errors=(404, 429, 431, 500),
                parameters=[_path_parameter("job_id")],
            ),
            "delete": _operation(
                "cancelJob",
                "End a job and free what it holds.",
                {"200": _json_response("Cancelled.", "Job")},
                errors=(404, 409, 429, 431, 500),
                parameters=[_path_parameter("job_id")],
            ),
        },
        "/healthz": {
            "get": _operation(
                "isAlive",
                "Whether this process answers.",
                {"200": _json_response("The process answers.", "Status")},
                errors=(431,),
                needs_key=False,
            )
        },
        "/readyz": {
            "get": _operation(
                "isReady",
                "Whether a request can be served.",
                {
                    "200": _json_response("A request can be served.", "Status"),
                    "503": _json_response("Nothing in the pool is ready.", "Status"),
                },
                errors=(431, 500),
                needs_key=False,
            )
        },
        "/openapi.json": {
            "get": _operation(
                "getOpenApi",
                "This document.",
                {"200": _json_response("The OpenAPI document.", "Document")},
                errors=(431,),
                needs_key=False,
            )
        },
    }


_CHANGE_ERRORS = (400, 404, 408, 409, 413, 415, 429, 431, 500, 503)

_REASONS = {
    400: "A field is wrong.",
    401: "No API key, or an unknown one.",
    403: "The key lacks the scope; without keys, the caller is on another machine.",
    404: "No such model, tool, pair, request or job.",
    408: "The body did not arrive in time.",
    409: "The same was said already, or the job is over.",
    413: "The body is too large.",
    415: "The body is not plain JSON.",
    421: "The `Host` is none that is served here.",
    429: "Too many requests, of this key or in all; see Retry-After.",
    431: "The headers are too large.",
    500: "The server's fault.",
    502: "The model failed.",
    503: "Nothing can serve this now.",
    504: "The time is up.",
}


def _operation(
    operation_id: str,
    summary: str,
    responses: Json,
    *,
    errors: tuple[int, ...],
    body: Json | None = None,
    parameters: list[Json] | None = None,
    needs_key: bool = True,
) -> Json:
    statuses = (*errors, 421, 401, 403, 503) if needs_key else (*errors, 421, 403)
    operation: Json = {
        "operationId": operation_id,
        "summary": summary,
        "responses": {
            **{str(s): _json_response(_REASONS[s], "Error") for s in sorted(set(statuses))},
            **responses,
        },
        "x-needs-key": needs_key,
    }
    if body is not None:
        operation["requestBody"] = body
    if parameters is not None:
        operation["parameters"] = parameters
    return operation


def _path_parameter(name: str) -> Json:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1},
    }


def _body(schema: str) -> Json:
    content = {"application/json": {"schema": {"$ref": _REF.format(model=schema)}}}
    return {"required": True, "content": content}


def _json_response(description: str, schema: str) -> Json:
    return {
        "description": description,
        "headers": {"x-request-id": {"schema": {"type": "string"}}},
        "content": {"application/json": {"schema": {"$ref": _REF.format(model=schema)}}},
    }


def _completion_response() -> Json:
    return _with_events(
        _json_response("The completion, or its chunks as events.", "ChatCompletion")
    )


def _with_events(response: Json) -> Json:
    """A response that may come as server-sent events too."""
    response["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return response


def _object(required: Json, optional: Json | None = None) -> Json:
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **(optional or {})},
    }


_STRING: Json = {"type": "string"}
_NUMBER: Json = {"type": "number"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_SHARE: Json = {"type": "number", "minimum": 0, "maximum": 1}
_NULLABLE_STRING: Json = {"type": ["string", "null"]}


def _ref(model: str) -> Json:
    return {"$ref": _REF.format(model=model)}


def _list(of: Json) -> Json:
    return {"type": "array", "items": of}


def _change(kind: str, name: str | None = None) -> Json:
    return _object(
        {
            "object": {"const": f"atlas.{kind}"},
            name or f"{kind}_id": _STRING,
            "change": {"enum": ["added", "changed", "removed"]},
            "revision": _COUNT,
        }
    )


def _response_schemas() -> Json:
    """What comes back. Objects may have further fields: engines add their own."""
    decided = {
        "pair": _STRING,
        "path": _STRING,
        "confidence": _SHARE,
        "propensity": _SHARE,
        "policy_version": _COUNT,
        "pool_version": _COUNT,
        "seconds": _NUMBER,
    }
    candidate = {
        "pair": _STRING,
        "utility": _NUMBER,
        "quality": _SHARE,
        "quality_low": _SHARE,
        "quality_high": _SHARE,
        "cost": _NUMBER,
        "cost_usd": _NUMBER,
    }
    step = {
        "action": {"enum": ["route", "think"]},
        "pair": _STRING,
        "path": _STRING,
        "propensity": _SHARE,
        "policy_version": _COUNT,
        "seconds": _NUMBER,
        "usage": _ref("Usage"),
        "cost_usd": _NUMBER,
        "error": _NULLABLE_STRING,
        "mean_logprob": {"type": ["number", "null"]},
        "tool_calls": _list(_ref("StepToolCall")),
    }
    tool_call = {
        "tool_id": _STRING,
        "arguments": {"type": "object"},
        "ok": {"type": "boolean"},
        "seconds": _NUMBER,
        "sources": {"type": "array"},
    }
    usage = {"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT}
    extension = {
        **decided,
        "request_id": _STRING,
        "alpha": _SHARE,
        "steps": _list(_ref("Step")),
        "answer_step": {"type": ["integer", "null"], "minimum": 0},
        "usage": _ref("Usage"),
        "cost_usd": _NUMBER,
    }
    error = {
        "message": _STRING,
        "type": _STRING,
        "param": _NULLABLE_STRING,
        "code": _NULLABLE_STRING,
    }
    choice = {
        "index": _COUNT,
        "message": {"type": "object"},
        "finish_reason": _NULLABLE_STRING,
    }
    completion = {
        "id": _STRING,
        "object": {"const": "chat.completion"},
        "created": _COUNT,
        "model": _STRING,
        "choices": _list(_object(choice)),
        "atlas": _ref("Completed"),
    }
    model = {
        "id": _STRING,
        "object": {"const": "model"},
        "created": _COUNT,
        "owned_by": _STRING,
        "atlas": _object(
            {"kind": {"enum": ["router", "model", "pair", "pattern"]}, "state": _STRING}
        ),
    }
    job = {
        "object": {"const": "atlas.job"},
        "job_id": _STRING,
        "kind": _STRING,
        "state": {"enum": ["queued", "running", "succeeded", "failed", "cancelled"]},
        "settings": {"type": "object"},
        "progress": {"type": "object"},
        "result": {"type": ["object", "null"]},
        "error": _NULLABLE_STRING,
        "created_unix_s": _NUMBER,
        "updated_unix_s": _NUMBER,
    }
    snapshot = {"snapshot_id": _STRING, "about": {"type": "object"}, "created_unix_s": _NUMBER}
    policy = {
        "policy_version": _COUNT,
        "snapshot_id": _NULLABLE_STRING,
        "reason": _STRING,
        "created_unix_s": _NUMBER,
        "mode": {"enum": ["serving", "canary", "shadow"]},
        "share": _SHARE,
        "taken_back": {"type": ["integer", "null"]},
    }
    return {
        "Job": _object(job),
        "JobList": _object({"object": {"const": "list"}, "data": _list(_ref("Job"))}),
        "SnapshotList": _object(
            {
                "object": {"const": "list"},
                "data": _list(_object(snapshot)),
                "policies": _list(_object(policy)),
            }
        ),
        "Error": _object({"error": _object(error)}),
        "Usage": _object(usage),
        "StepToolCall": _object(tool_call),
        "Step": _object(step),
        "Candidate": _object(candidate),
        "Decision": _object(
            {
                "object": {"const": "atlas.decision"},
                "request_id": _STRING,
                "alpha": _SHARE,
                "action": {"enum": ["route", "think"]},
                **decided,
                "distance_quantile": {"type": ["number", "null"]},
                "cluster": {"type": ["object", "null"]},
                "candidates": _list(_ref("Candidate")),
            }
        ),
        "Completed": _object(extension, {"decision": {"type": "object"}}),
        "ChatCompletion": _object(completion, {"usage": _ref("Usage")}),
        "Feedback": _object(
            {"object": {"const": "atlas.feedback"}, "request_id": _STRING, "score": _SHARE}
        ),
        "Model": _object(model),
        "ModelList": _object({"object": {"const": "list"}, "data": _list(_ref("Model"))}),
        "AdminList": _object(
            {
                "object": {"const": "list"},
                "data": _list({"type": "object"}),
                "pool_version": _COUNT,
                "revision": {"type": ["integer", "null"]},
            }
        ),
        "ModelChange": _change("model"),
        "ToolChange": _change("tool"),
        "PatternChange": _change("pattern", "name"),
        "Status": _object({"status": _STRING}),
        "Document": {"type": "object"},
    }
