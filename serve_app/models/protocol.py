"""What every model application speaks: OpenAI chat bodies in, OpenAI chat bodies out.

The bodies are plain JSON values, so that neither the gateway nor the router imports an engine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

ChatBody = dict[str, Any]
"""A chat completion request: `messages`, sampling parameters, `tools`, `tool_choice`, `logprobs`;
no `model`."""

HEALTH_CHECK_PERIOD_S = 2.0
"""Between Serve's looks at a model's replica. It replaces one that failed three of them, and an
engine that died is of no use until then."""


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
