"""A model's summary of the turns that are left out of a conversation; each is made once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from serve_app.budget import Budget
from serve_app.content import Message, text_of_content
from serve_app.errors import EngineError
from serve_app.models.protocol import ChatBody
from serve_app.models.reply import ModelReply
from serve_app.orchestrator.answer import text_of
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.trace import Span

_INSTRUCTION = (
    "Sum up the conversation below. Keep names, numbers, decisions and what is still open. "
    "Answer with the summary alone."
)
_SHARE = 0.25
"""Of the time left that a summary may take."""
_MAX_TOKENS = 512
_MAX_CHARS = 100_000
"""Of a conversation that is summed up, where the model's context is not known; the last ones."""
_MAX_KEPT = 1024


class Models(Protocol):
    """What a summary needs of the pool's models; `PaidModels` has it."""

    def window(self, model_id: str) -> float:
        """Tokens of prompt and answer that a model takes together; infinite: not known."""
        ...

    async def complete_all(
        self,
        work: PairWork,
        model_id: str,
        bodies: Sequence[ChatBody],
        budget: Budget,
        span: Span,
    ) -> list[ModelReply]:
        """Whole answers of a model."""
        ...


class Summarizer:
    """Sums up turns; keeps its last summaries by what they sum up."""

    def __init__(self, model_id: str, models: Models) -> None:
        """Know no summary yet.

        Args:
            model_id: Who sums up.
            models: Asked for it, and paid.
        """
        self._model_id = model_id
        self._models = models
        self._kept: OrderedDict[bytes, str] = OrderedDict()

    async def __call__(self, work: PairWork, messages: Sequence[Message], most_tokens: int) -> str:
        """A summary of messages.

        Args:
            work: The run that pays for it.
            messages: What is summed up.
            most_tokens: Of the summary.

        Raises:
            BudgetExceeded: If the request's budget does not cover it.
            EngineError: If the model says nothing.
            AtlasError: What the model fails with.
        """
        max_tokens = min(most_tokens, _MAX_TOKENS)
        text = "\n".join(
            f"{message['role']}: {said}"
            for message in messages
            if (said := text_of_content(message.get("content")))
        )
        # A token has a byte at least, and a character four at most.
        most_chars = min(_MAX_CHARS, (self._models.window(self._model_id) - max_tokens) / 4 - 100)
        text = text[-max(1, int(most_chars)) :]
        key = hashlib.blake2b(f"{max_tokens} {text}".encode("utf-8", "replace")).digest()
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
            return kept
        body: ChatBody = {
            "messages": [
                {"role": "system", "content": _INSTRUCTION},
                {"role": "user", "content": text},
            ],
            "max_tokens": max_tokens,
            "temperature": 0.0,
        }
        budget = work.budget.part(_SHARE)
        (reply,) = await self._models.complete_all(work, self._model_id, [body], budget, work.span)
        summary = (text_of(reply.choices) or "").strip()
        if not summary:
            raise EngineError("the summary is empty")
        self._kept[key] = summary
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
        return summary
