"""Errors as OpenAI writes them; the only place where an exception becomes a status code."""

from __future__ import annotations

import json
import math
from typing import Any

import orjson
from starlette.responses import Response

from serve_app.errors import (
    AtlasError,
    MethodNotAllowed,
    Unauthorized,
)


def json_bytes(value: Any) -> bytes:
    """Compact JSON in UTF-8; lone surrogates become `?`, and numbers JSON lacks become null."""
    try:
        return orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS)
    except TypeError:
        return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "replace")


class JsonResponse(Response):
    """A response whose body is rendered by orjson."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode the body."""
        return json_bytes(content)


def error_body(error: BaseException) -> dict[str, Any]:
    """The `{"error": …}` object of an exception; one not raised on purpose is not described."""
    if isinstance(error, AtlasError):
        detail = {
            "message": error.message,
            "type": error.error_type,
            "param": error.param,
            "code": error.code,
        }
    else:
        detail = {
            "message": "The server had an error. Quote the x-request-id header when you report it.",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
    return {"error": detail}


def error_status(error: BaseException) -> int:
    """The HTTP status of an exception."""
    return error.status_code if isinstance(error, AtlasError) else 500


def error_response(error: BaseException) -> JsonResponse:
    """The response for an exception, with the headers its status asks for."""
    headers: dict[str, str] = {}
    match error:
        case Unauthorized():
            headers["www-authenticate"] = "Bearer"
        case MethodNotAllowed():
            headers["allow"] = error.allow
    if isinstance(error, AtlasError) and error.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    return JsonResponse(error_body(error), error_status(error), headers)
