"""What a route takes and answers, declared beside its handler; the OpenAPI document reads it.

Nothing here is looked at while a request runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True, eq=False, slots=True)
class Shape:
    """A named JSON schema of what comes back; other shapes in it become references to them."""

    name: str
    schema: dict[str, Any]


@dataclass(frozen=True, slots=True)
class DocumentedAnswer:
    """One way in which an operation answers."""

    description: str
    content: Shape | type[BaseModel]
    """Of the JSON body."""
    status: int = 200
    as_events: bool = False
    """Whether it may come as server-sent events too."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What the document says of a route that its method, its path and its access do not say."""

    operation_id: str
    summary: str
    answer: DocumentedAnswer
    body: type[BaseModel] | None = None
    """What the request's body is validated as."""
    errors: tuple[int, ...] = ()
    """Statuses of errors beside those that every route has with such an access or a body."""
    also: tuple[DocumentedAnswer, ...] = ()
    """Further answers, of other statuses."""
