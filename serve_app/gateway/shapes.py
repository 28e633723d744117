"""JSON schemas of what comes back, for the OpenAPI document.

Responses are written as plain dicts, without a model in between: an engine's own fields pass
through. So the objects may have further fields than these.
"""

from __future__ import annotations

from typing import Any

from serve_app.gateway.edge.operation import Shape

Json = dict[str, Any]

_STRING: Json = {"type": "string"}
_NUMBER: Json = {"type": "number"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_SHARE: Json = {"type": "number", "minimum": 0, "maximum": 1}
_NULLABLE_STRING: Json = {"type": ["string", "null"]}


def _object(required: Json, optional: Json | None = None) -> Json:
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **(optional or {})},
    }


def _array(of: Shape | Json) -> Json:
    return {"type": "array", "items": of}


def _list_of(data: Shape | Json, **further: Json) -> Json:
    return _object({"object": {"const": "list"}, "data": _array(data), **further})


def _change(kind: str, name: str) -> Json:
    return _object(
        {
            "object": {"const": f"atlas.{kind}"},
            name: _STRING,
            "change": {"enum": ["accepted", "added", "changed", "removed"]},
            "revision": _COUNT,
        }
    )


ERROR = Shape(
    "Error",
    _object(
        {
            "error": _object(
                {
                    "message": _STRING,
                    "type": _STRING,
                    "param": _NULLABLE_STRING,
                    "code": _NULLABLE_STRING,
                }
            )
        }
    ),
)

_DECIDED: Json = {
    "pair": _STRING,
    "path": _STRING,
    "confidence": _SHARE,
    "propensity": _SHARE,
    "policy_version": _COUNT,
    "pool_version": _COUNT,
    "seconds": _NUMBER,
}

_CANDIDATE = Shape(
    "Candidate",
    _object(
        {
            "pair": _STRING,
            "utility": _NUMBER,
            "quality": _SHARE,
            "quality_low": _SHARE,
            "quality_high": _SHARE,
            "cost": _NUMBER,
            "cost_usd": _NUMBER,
        }
    ),
)

_HOP = Shape(
    "Hop",
    _object(
        {
            "rule": _STRING,
            "kind": {"enum": ["keyword", "semantic", "llm", "learned", "default"]},
            "decided": {"type": "boolean"},
            "label": _NULLABLE_STRING,
            "score": {"type": ["number", "null"]},
            "confidence": {"type": ["number", "null"]},
            "floor": _SHARE,
            "seconds": _NUMBER,
            "cost_usd": _NUMBER,
            "note": _NULLABLE_STRING,
        }
    ),
)

DECISION = Shape(
    "Decision",
    _object(
        {
            "object": {"const": "atlas.decision"},
            "request_id": _STRING,
            "alpha": _SHARE,
            "action": {"enum": ["route", "think"]},
            **_DECIDED,
            "look": {"enum": ["static", "encoder", None]},
            "distance_quantile": {"type": ["number", "null"]},
            "cluster": {"type": ["object", "null"]},
            "candidates": _array(_CANDIDATE),
            "hops": _array(_HOP),
        }
    ),
)

_USAGE = Shape(
    "Usage",
    _object({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT}),
)

_STEP_TOOL_CALL = Shape(
    "StepToolCall",
    _object(
        {
            "tool_id": _STRING,
            "function": _NULLABLE_STRING,
            "arguments": {"type": "object"},
            "ok": {"type": "boolean"},
            "seconds": _NUMBER,
            "sources": {"type": "array"},
        }
    ),
)

_STEP = Shape(
    "Step",
    _object(
        {
            "action": {"enum": ["route", "think"]},
            "pair": _STRING,
            "path": _STRING,
            "propensity": _SHARE,
            "policy_version": _COUNT,
            "seconds": _NUMBER,
            "usage": _USAGE,
            "cost_usd": _NUMBER,
            "error": _NULLABLE_STRING,
            "mean_logprob": {"type": ["number", "null"]},
            "tool_calls": _array(_STEP_TOOL_CALL),
        }
    ),
)

_COMPLETED = Shape(
    "Completed",
    _object(
        {
            **_DECIDED,
            "request_id": _STRING,
            "alpha": _SHARE,
            "steps": _array(_STEP),
            "answer_step": {"type": ["integer", "null"], "minimum": 0},
            "usage": _USAGE,
            "cost_usd": _NUMBER,
        },
        {
            "decision": {"type": "object"},
            "chances": {"type": "array", "items": {"type": ["number", "null"]}},
        },
    ),
)

_CHOICE = _object(
    {"index": _COUNT, "message": {"type": "object"}, "finish_reason": _NULLABLE_STRING}
)

CHAT_COMPLETION = Shape(
    "ChatCompletion",
    _object(
        {
            "id": _STRING,
            "object": {"const": "chat.completion"},
            "created": _COUNT,
            "model": _STRING,
            "choices": _array(_CHOICE),
            "atlas": _COMPLETED,
        },
        {"usage": _USAGE},
    ),
)

FEEDBACK = Shape(
    "Feedback",
    _object({"object": {"const": "atlas.feedback"}, "request_id": _STRING, "score": _SHARE}),
)

MODEL = Shape(
    "Model",
    _object(
        {
            "id": _STRING,
            "object": {"const": "model"},
            "created": _COUNT,
            "owned_by": _STRING,
            "atlas": _object(
                {"kind": {"enum": ["router", "model", "pair", "pattern"]}, "state": _STRING}
            ),
        }
    ),
)
MODEL_LIST = Shape("ModelList", _list_of(MODEL))

ADMIN_LIST = Shape(
    "AdminList",
    _list_of({"type": "object"}, pool_version=_COUNT, revision={"type": ["integer", "null"]}),
)
MODEL_CHANGE = Shape("ModelChange", _change("model", "model_id"))
TOOL_CHANGE = Shape("ToolChange", _change("tool", "tool_id"))
PATTERN_CHANGE = Shape("PatternChange", _change("pattern", "name"))
RULES_CHANGE = Shape(
    "RulesChange",
    _object({"object": {"const": "atlas.rules"}, "count": _COUNT, "revision": _COUNT}),
)

_SNAPSHOT = _object(
    {"snapshot_id": _STRING, "about": {"type": "object"}, "created_unix_s": _NUMBER}
)
_POLICY = _object(
    {
        "policy_version": _COUNT,
        "snapshot_id": _NULLABLE_STRING,
        "reason": _STRING,
        "created_unix_s": _NUMBER,
        "mode": {"enum": ["serving", "canary", "shadow"]},
        "share": _SHARE,
        "taken_back": {"type": ["integer", "null"]},
    }
)
SNAPSHOT_LIST = Shape("SnapshotList", _list_of(_SNAPSHOT, policies=_array(_POLICY)))

JOB = Shape(
    "Job",
    _object(
        {
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
    ),
)
JOB_LIST = Shape("JobList", _list_of(JOB))

STATUS = Shape("Status", _object({"status": _STRING}))
DOCUMENT = Shape("Document", {"type": "object"})
