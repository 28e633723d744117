"""One run of a pair: what it is given, and where its pieces and its record go."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.budget import Budget
from serve_app.content import pictures_of, text_of_content, with_pictures
from serve_app.models.reply import ChoicePiece
from serve_app.orchestrator.planning import with_note
from serve_app.orchestrator.recovery import Recovery
from serve_app.orchestrator.trace import Span, SpanKind
from serve_app.schemas import ChatCall, Pair, ToolCall

Emit = Callable[[Sequence[ChoicePiece]], Awaitable[None]]
"""Sends pieces of an answer on their way, at most one of each choice."""


@dataclass
class PairWork:
    """A run of a pair under way."""

    pair: Pair
    call: ChatCall
    budget: Budget
    """When the run must be done, and what it may use."""
    span: Span
    """Where it is put on record."""
    emit: Emit | None = None
    """Takes pieces as they are known to be final; `None`: the answer is wanted whole."""
    recovery: Recovery = field(default_factory=Recovery)
    """Of the whole request."""
    has_next: bool = False
    """Whether another candidate takes over if this one fails."""
    wants_logprobs: bool = False
    """Whether to have the engine's log-probabilities, where it gives them."""
    embedding: NDArray[np.float32] | None = None
    """(dim,) of the query, where it is known."""
    num_sent: int = 0
    """Pieces that are on their way."""

    def __post_init__(self) -> None:
        """Begin with the caller's messages."""
        self.messages: list[dict[str, Any]] = [dict(message) for message in self.call.messages]
        """What the model is told; joins add to them."""

    async def send(self, choices: Sequence[ChoicePiece]) -> None:
        """Send pieces on their way, if they are wanted."""
        if self.emit is not None:
            self.num_sent += 1
            await self.emit(choices)

    def change_question(self, change: Callable[[str], str]) -> None:
        """Change the text of the last user message; its pictures stay.

        Args:
            change: Makes the new text of the old one.
        """
        for message in reversed(self.messages):
            if message["role"] == "user":
                old = message.get("content")
                message["content"] = with_pictures(change(text_of_content(old)), pictures_of(old))
                return

    def add_note(self) -> None:
        """Put what the planner said before the question, whatever a tool put there."""
        note = self.call.note
        if note is not None:
            self.change_question(lambda question: with_note(note, question))

    def refused(self, arguments: dict[str, Any], reason: str, function: str | None = None) -> None:
        """Put a call of the pair's tool on record that was not run.

        Args:
            arguments: Of the call, as far as they could be read.
            reason: Why.
            function: Which of the tool's functions; `None`: one that is not offered.
        """
        tool_id = self.pair.tool_id
        with self.span.child(SpanKind.TOOL, function or tool_id) as span:
            span.called(ToolCall(tool_id, arguments, False, reason, 0.0, function=function))
