"""What every model application speaks: OpenAI chat bodies in, OpenAI chat bodies out.

The bodies are plain JSON values, so that neither the gateway nor the router imports an engine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from serve_app.errors import ContextTooLong, InvalidRequest

ChatBody = dict[str, Any]
"""A chat completion request: `messages`, sampling parameters, `tools`, `tool_choice`, `logprobs`;
no `model`. On its way to the application also `trace` where the call is traced (see
`trace_context`); `boundary.guarded` takes that out."""

HEALTH_CHECK_PERIOD_S = 2.0
"""Between Serve's looks at a model's replica. It replaces one that failed three of them, and an
engine that died is of no use until then."""


_MAX_REFUSAL_CHARS = 300
_TOO_LONG = ("context length", "context window", "maximum model length", "max_model_len")
"""How vLLM, OpenAI and others say that a conversation is longer than the model's context."""


def refusal(message: str, code: Any = None) -> InvalidRequest:
    """An engine's 4xx as one of our errors.

    Args:
        message: What the engine says; the printable part of its first line is kept, and cut.
        code: The engine's `error.code`, where it has one.
    """
    first = next(iter(message.strip().splitlines()), "")
    line = "".join(c for c in first if c.isprintable()) or "the engine refuses the request"
    is_too_long = code == ContextTooLong.code or any(said in line.lower() for said in _TOO_LONG)
    return (ContextTooLong if is_too_long else InvalidRequest)(line[:_MAX_REFUSAL_CHARS])


class ModelServer(Protocol):
    """The two methods of a model's ingress deployment."""

    async def complete(self, body: ChatBody) -> dict[str, Any]:
        """Answer a request whole.

        Returns:
            An OpenAI `chat.completion` object.

        Raises:
            InvalidRequest: If the engine refuses the request (too long, for example).
            EngineError: If it fails.
        """
        ...

    def stream(self, body: ChatBody) -> AsyncIterator[list[dict[str, Any]]]:
        """Answer a request piece by piece.

        Yields:
            Batches of OpenAI `chat.completion.chunk` objects; the last one carries `usage`.

        Raises:
            InvalidRequest: As `complete`, before anything is yielded.
            EngineError: As `complete`, at any point.
        """
        ...
