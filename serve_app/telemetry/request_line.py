"""The log line of a request, its field names declared once."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields


@dataclass(slots=True)
class RequestLine:
    """The one log line of a request; field names are the log's, in this order.

    Filled while the request runs, written when its last byte is out. `None` fields are left out.
    """

    request_id: str
    method: str = ""
    route: str = ""
    """Path of the request."""
    status: int = 0
    """HTTP status; 499 when the client left before the end."""
    seconds: float = 0.0
    model: str | None = None
    """What the client asked for."""
    pair: str | None = None
    """What answered."""
    path: str | None = None
    """Who decided."""
    policy_version: int | None = None
    owner: str | None = None
    steps: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost_usd: float | None = None
    error: str | None = None
    """Class of the error."""
    stop: str | None = None
    """Why nothing more was done for the request: a `schemas.StopReason`."""
    client_request_id: str | None = None

    def __str__(self) -> str:
        """`key=value` pairs; text that could be taken for more than a value is quoted."""
        values = ((name, getattr(self, name)) for name in _REQUEST_LINE_FIELDS)
        return " ".join(f"{name}={_logged(value)}" for name, value in values if value is not None)


def _logged(value: str | int | float) -> str:
    if isinstance(value, float):
        return f"{value:.6f}"
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


_PLAIN = re.compile(r"[!#-<>-~]+")
_REQUEST_LINE_FIELDS = tuple(spec.name for spec in fields(RequestLine))
