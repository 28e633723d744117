"""Makes a conversation fit the context of the model that is to answer.

In come the messages of a call; out go messages that fit, with the system message and the last user
turn whole. Long tool results are cut in the middle; then the oldest turns are left out but for
those that are most like the question, and of what is left out the sentences that share words with
the question stay, or a model's summary. What was left out is put on record. A call that fits is
passed on after a sum of its bytes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from serve_app.budget import Deadline
from serve_app.config.context import ContextConfig
from serve_app.content import Message
from serve_app.errors import AtlasError, ContextTooLong
from serve_app.models.protocol import ChatBody
from serve_app.orchestrator.fitting import LEAST_RESULT_TOKENS, Fitting
from serve_app.orchestrator.likeness import TextLikeness
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.tokens import TokenCounter
from serve_app.orchestrator.trace import SpanKind

logger = logging.getLogger(__name__)

_RECENT_SHARE = 0.25
"""Of the room for earlier turns, that goes to the newest of them, whatever they say."""
_WHOLE_SHARE = 0.85
"""Of the same, that goes to whole turns; the rest to sentences of the others."""
_WHOLE_SHARE_SUMMED_UP = 0.6
"""The same where the rest goes to a summary."""

Summarize = Callable[[PairWork, Sequence[Message], int], Awaitable[str]]
"""A summary of messages, in no more than so many tokens; may raise any `AtlasError`."""


@dataclass
class _Left:
    """What was left out, for the record."""

    results_cut: int = 0
    turns: list[int] = field(default_factory=list)
    """Numbers of the turns that are not there whole; the first is 1."""
    sentences: int = 0
    """Of them, that stay."""
    is_summed_up: bool = False


class ContextFitter:
    """Fits conversations; one per gateway replica."""

    def __init__(
        self,
        config: ContextConfig,
        counter: TokenCounter,
        likeness: TextLikeness,
        summarize: Summarize | None = None,
    ) -> None:
        """Join the parts.

        Args:
            config: Whether, and how.
            counter: Counts tokens.
            likeness: Compares turns with the question.
            summarize: Sums up what is left out; `None`: sentences of it are kept.
        """
        self._config = config
        self._counter = counter
        self._likeness = likeness
        self._summarize = summarize

    async def fitted(self, work: PairWork, body: ChatBody, window: float) -> ChatBody:
        """The request with a conversation that fits.

        `max_tokens` is lowered to what the window leaves; at least half of the window is the
        prompt's.

        Args:
            work: The run of the pair.
            body: The request.
            window: Tokens that its model takes, prompt and answer together.

        Raises:
            ContextTooLong: If what has to stay whole is too long.
        """
        if math.isinf(window):
            return body
        messages, tools = body["messages"], body.get("tools") or ()
        most = body["max_tokens"]
        if self._counter.at_most(messages, tools) + most <= window:
            return body
        model_id, left_tokens = work.pair.model_id, int(window) - self._counter.at_most((), tools)
        room = left_tokens - min(most, int(window) // 2)
        counts = await self._counter.of_messages(model_id, messages)
        if (total := sum(counts)) <= room:
            return body | {"max_tokens": min(most, left_tokens - total)}
        with work.span.child(SpanKind.CONTEXT, model_id) as span:
            span.attributes |= {"window": int(window), "prompt_tokens": total}
            if not self._config.fit:
                raise _too_long(model_id, total, room)
            fitting = Fitting(model_id, list(messages), counts, room, self._counter)
            left = await self._shorten(work, fitting)
            span.attributes |= {
                "kept_tokens": fitting.total,
                "results_cut": left.results_cut,
                "turns": len(fitting.parts.turns) + 1,
                "turns_left_out": len(left.turns),
                "left_out": _ranges(left.turns),
                "sentences_kept": left.sentences,
                "summed_up": left.is_summed_up,
            }
        tokens = min(most, left_tokens - fitting.total)
        return body | {"messages": fitting.kept(), "max_tokens": tokens}

    def told(self, model_id: str, body: ChatBody, prompt_tokens: int) -> None:
        """Learn from what an engine says that a prompt took."""
        if not body.get("tools"):
            self._counter.told(model_id, body["messages"], prompt_tokens)

    def refused(self, model_id: str) -> None:
        """Learn that an engine found a prompt too long that was thought to fit."""
        self._counter.forget(model_id)

    async def _shorten(self, work: PairWork, fitting: Fitting) -> _Left:
        """Cut results, leave turns out, keep what is worth keeping of them.

        Raises:
            ContextTooLong: If the rest does not fit.
        """
        left, parts = _Left(), fitting.parts
        left.results_cut = await fitting.cut_results()
        if fitting.fixed > fitting.room:
            raise _too_long(fitting.model_id, fitting.fixed, fitting.room)
        if fitting.total <= fitting.room:
            return left
        room = max(int(fitting.room * self._config.fill), fitting.fixed) - fitting.fixed
        whole = await self._chosen(fitting, room, work.budget.deadline)
        left.turns = [n + 1 for n in range(len(parts.turns)) if n not in whole]
        gone = [parts.turns[number - 1] for number in left.turns]
        room -= sum(fitting.cost(parts.turns[number]) for number in whole)
        fitting.leave_out(gone)
        most = room - 3 * self._counter.per_message(fitting.model_id)
        if self._summarize is not None and most >= LEAST_RESULT_TOKENS:
            told = [fitting.messages[place] for turn in gone for place in turn]
            try:
                said = await self._summarize(work, told, most)
                left.is_summed_up = await fitting.begin_with(said, room)
            except AtlasError as error:
                logger.warning("no summary (%s); sentences are kept", error.message)
        if not left.is_summed_up:
            left.sentences = await fitting.keep_sentences(gone, room)
        return left

    async def _chosen(self, fitting: Fitting, room: int, deadline: Deadline) -> set[int]:
        """Which earlier turns stay whole: the newest, and of the others the most like ones."""
        turns = fitting.parts.turns
        most = room * (_WHOLE_SHARE if self._summarize is None else _WHOLE_SHARE_SUMMED_UP)
        costs = [fitting.cost(turn) for turn in turns]
        whole, used = set[int](), 0
        for number in reversed(range(len(turns))):
            if used + costs[number] > room * _RECENT_SHARE:
                break
            whole.add(number)
            used += costs[number]
        older = [number for number in range(len(turns)) if number not in whole]
        texts = [fitting.text(turns[number]) for number in older]
        scores = await self._likeness.scores(fitting.question, texts, deadline)
        newest_first = older[::-1]  # among those that are equally like it
        for place in np.argsort(-scores[::-1], kind="stable"):
            number = newest_first[int(place)]
            if used + costs[number] <= most:
                whole.add(number)
                used += costs[number]
        return whole


def _too_long(model_id: str, tokens: int, room: int) -> ContextTooLong:
    return ContextTooLong(
        f"messages: the model {model_id!r} has room for a prompt of {max(room, 0)} tokens; what "
        f"has to stay whole takes about {tokens}",
        "messages",
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as `1-3,7`."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
