"""The tool whose functions are the operations of an OpenAPI file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from serve_app.config.tools import OpenApiConfig
from serve_app.errors import ToolFailed, ToolRetry
from serve_app.tools.base import Function, ManyFunctions, ToolResult
from serve_app.tools.openapi.document import SpecError, read_document
from serve_app.tools.openapi.operations import ApiOperation, read_operations, server_of
from serve_app.tools.web.addresses import WebError, allowed_entry
from serve_app.tools.web.client import WebClient, WebReply
from serve_app.tools.web.page import UNTRUSTED, is_text, text_of
from serve_app.trace_context import CURRENT

_MAX_REFUSAL_CHARS = 500
_NOT_THE_MODELS = frozenset((401, 407, 408, 425, 429))
"""Refusals that no other arguments would mend."""
_SECRET = re.compile(r"\$\{(\w+)\}")
_MIN_SECRET_CHARS = 4


class OpenApiTool(ManyFunctions):
    """Calls an HTTP API.

    Invariants:
        - Server, paths and headers come from the settings and the file; a model fills in values,
          which are encoded so that they stay values.
        - Redirects are not followed: they would carry headers elsewhere.
        - What `headers` take from the environment stands in no result and no message.
    """

    config: OpenApiConfig
    reads_functions: ClassVar[bool] = True

    def __init__(self, config: OpenApiConfig, client: WebClient | None = None) -> None:
        """Prepare; reads nothing yet.

        Args:
            config: The tool's settings.
            client: Sends the requests; `None`: as the settings say.
        """
        super().__init__(config)
        self._client = client
        self._read: tuple[str, dict[str, ApiOperation]] | None = None

    def functions(self) -> tuple[Function, ...]:
        """A function for each operation.

        Raises:
            ToolFailed: If the file cannot be used.
        """
        _, operations = self._api()
        return tuple(operation.function for operation in operations.values())

    def call(self, function: str, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        """Call an operation.

        Args:
            function: Its function's name.
            arguments: Valid against its parameters.
            deadline_s: Seconds from now for the exchange.

        Returns:
            JSON in its short form, or text; `data["status"]` is the status.

        Raises:
            ToolRetry: If the server refuses the request (4xx), with its words.
            ToolFailed: If there is no answer, or the server's is an error of its own.
            ToolTimeout: If time ran out.
        """
        server, operations = self._api()
        if function not in operations:
            raise ToolFailed(f"tool {self.tool_id!r} has no function {function!r}")
        operation = operations[function]
        target, body = operation.request(arguments)
        secrets = self._secrets()
        client = self._client or WebClient(self.config, also_allow=[allowed_entry(server)])
        headers = {
            "Accept": "application/json, text/*;q=0.5",
            **({"Content-Type": str(operation.media_type)} if body else {}),
            **self._headers(secrets),
            **(CURRENT.get() or {}),
        }
        try:
            reply = client.send(
                operation.method,
                server + target,
                deadline_s=deadline_s,
                headers=headers,
                body=body,
            )
        except WebError as error:
            raise ToolFailed(f"tool {self.tool_id!r}: {error}") from None
        return self._result(reply, secrets)

    def _result(self, reply: WebReply, secrets: Mapping[str, str]) -> ToolResult:
        shown, status = _without(secrets, _shown(reply)), reply.status
        if 200 <= status < 300:
            text = self.clip(f"{UNTRUSTED}\n{shown}" if shown else f"done: HTTP {status}")
            return ToolResult(text, {"status": status})
        if 400 <= status < 500 and status not in _NOT_THE_MODELS:
            raise ToolRetry(f"the server answers {status}: {shown[:_MAX_REFUSAL_CHARS]}")
        what = " with a redirect, which is not followed" if 300 <= status < 400 else ""
        raise ToolFailed(f"tool {self.tool_id!r}: the server answers {status}{what}")

    def _api(self) -> tuple[str, dict[str, ApiOperation]]:
        """Server and operations, read once."""
        if self._read is None:
            try:
                document = read_document(self.config.spec)
                server = server_of(document, self.config)
                self._read = server, read_operations(document, self.config)
            except SpecError as error:
                raise ToolFailed(f"tool {self.tool_id!r}: {error}") from None
        return self._read

    def _secrets(self) -> dict[str, str]:
        """The environment's values by name.

        Raises:
            ToolFailed: If one is not set.
        """
        found = {name: os.environ.get(name, "") for name in self.config.environment_names()}
        for name, value in found.items():
            if not value or not value.isprintable() or not value.isascii():
                raise ToolFailed(f"environment variable {name!r} holds no value for a header")
        return found

    def _headers(self, secrets: Mapping[str, str]) -> dict[str, str]:
        return {
            name: _SECRET.sub(lambda found: secrets[found[1]], value)
            for name, value in self.config.headers.items()
        }


def _shown(reply: WebReply) -> str:
    """A body as a model reads it."""
    if not reply.body:
        return ""
    if not is_text(reply.media_type):
        return f"[{len(reply.body)} bytes of {reply.media_type[:60] or 'no named type'!r}]"
    text = text_of(reply).strip()
    if reply.media_type.endswith("json"):
        try:
            return json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))
        except (ValueError, RecursionError):
            return text
    return text


def _without(secrets: Mapping[str, str], text: str) -> str:
    """A text without the secrets that a server may repeat."""
    for value in secrets.values():
        if len(value) >= _MIN_SECRET_CHARS:
            text = text.replace(value, "[secret]")
    return text
