"""Settings of the tool whose functions are the operations of an OpenAPI file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from serve_app.config.tools.base import MAX_DESCRIPTION_CHARS, ManyFunctionsSettings
from serve_app.config.tools.web import PLAIN_URL_PATTERN, WebSettings
from serve_app.schemas import Effects

OperationId = Annotated[str, Field(min_length=1, max_length=200)]

_ENVIRONMENT_NAME = re.compile(r"\$\{(\w+)\}")
_OF_THE_CLIENT = frozenset((
    "accept-encoding", "connection", "content-length", "content-type", "expect", "host",
    "keep-alive", "te", "trailer", "transfer-encoding", "upgrade",
))  # fmt: skip
"""Headers that frame a request."""


class OpenApiConfig(WebSettings, ManyFunctionsSettings):
    """Calls the operations of an HTTP API as its OpenAPI 3 file describes them."""

    type: Literal["http"] = "http"
    kind: Literal["function"] = "function"
    description: str = Field(min_length=1, max_length=MAX_DESCRIPTION_CHARS)
    """What the API is for, in words; read by the router."""

    spec: Path
    """OpenAPI 3.0 or 3.1, as JSON or YAML. Every machine that runs a gateway or tools has it."""

    server: str | None = Field(default=None, pattern=PLAIN_URL_PATTERN, max_length=2000)
    """Address that the paths are below, `https://crm.internal/v2`; allowed by being named here.
    `None`: the file's first server, which must be absolute and without variables."""

    operations: tuple[OperationId, ...] | None = Field(default=None, min_length=1, max_length=256)
    """Ids of the operations that are offered; `None`: all of the file."""

    operation_effects: dict[OperationId, Effects] = Field(default_factory=dict)
    """Effects of single operations. Else GET and HEAD have none, PUT and DELETE are `idempotent`,
    and POST and PATCH are `once`."""

    headers: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")],
        Annotated[str, Field(max_length=2000, pattern=r"^[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?$")],
    ] = Field(default_factory=dict)
    """Headers of every request; `${NAME}` is filled from the environment of the tool's worker:
    `Authorization: Bearer ${CRM_API_KEY}`. Models cannot set any."""

    def environment_names(self) -> frozenset[str]:
        """The environment variables that `headers` names."""
        return frozenset(
            name for value in self.headers.values() for name in _ENVIRONMENT_NAME.findall(value)
        )

    @model_validator(mode="after")
    def _headers_leave_the_framing_alone(self) -> Self:
        wrong = sorted(name for name in self.headers if name.lower() in _OF_THE_CLIENT)
        if wrong:
            raise ValueError(f"headers: {wrong} are set by the client itself")
        if len({name.lower() for name in self.headers}) < len(self.headers):
            raise ValueError("headers: each is named once, in whatever letters")
        return self

    @model_validator(mode="after")
    def _effects_are_the_operations_own(self) -> Self:
        if self.effects is not Effects.NONE:
            raise ValueError("effects: say it of single operations, in operation_effects")
        unknown = sorted(set(self.operation_effects) - set(self.operations or ()))
        if self.operations is not None and unknown:
            raise ValueError(f"operation_effects: {unknown} are not among operations")
        return self
