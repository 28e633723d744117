"""One request under way: what was asked, what it may still use, and what happened so far."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve_app.budget import Budget, Caps, Deadline
from serve_app.errors import AtlasError
from serve_app.models.reply import ChoicePiece
from serve_app.orchestrator.answer import Answer
from serve_app.orchestrator.channel import Channel
from serve_app.orchestrator.history import answer_numbers
from serve_app.orchestrator.recovery import Move, Recovery, fault_of
from serve_app.orchestrator.trace import Phase, Span, Trace
from serve_app.schemas import (
    ChatCall,
    Circumstances,
    DecidedBy,
    Decision,
    Limits,
    Pair,
    Report,
    SpanRecord,
    Step,
    StopReason,
)


class SpanEvent(NamedTuple):
    """A span that has begun or ended, on its way to a caller who wants to see it."""

    phase: Phase
    span: SpanRecord


class Piece(NamedTuple):
    """A part of an answer on its way to the caller."""

    pair: Pair
    path: DecidedBy
    choices: Sequence[ChoicePiece]
    event: SpanEvent | None = None
    """What is told in place of a part of the answer."""


@dataclass
class Course:
    """The decisions of a request that the learned policy decides, and what they were made on."""

    limits: Limits
    """What the router was told of the caller's."""
    embedding: NDArray[np.float32]
    """(dim,) of the query."""
    decisions: list[Decision]
    """Every one, the first one included."""
    seconds_left: list[float] = field(default_factory=list)
    """At each decision after the first."""
    answer_embeddings: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    """Of each step's answer that the router was told of."""
    recorded: list[Decision] | None = None
    """Decisions of an earlier request that are left to be taken again; `None`: it is no replay."""

    def circumstances(self, steps: list[Step]) -> Circumstances:
        """What it takes to decide the request anew, beside its decisions and steps."""
        vectors = [self.answer_embeddings.get(number) for number in range(len(steps))]
        return Circumstances(
            max_steps=self.limits.max_steps,
            max_cost_usd=self.limits.max_cost_usd,
            seconds_left=(self.limits.deadline_s, *self.seconds_left),
            answer_keys=answer_numbers(steps),
            answer_embeddings=tuple(
                None if vector is None else vector.astype("<f4").tobytes() for vector in vectors
            ),
        )


@dataclass
class Run:
    """One request under way."""

    call: ChatCall
    channel: Channel[Piece | SpanEvent] | None = None
    """Where its pieces go; `None`: the answer is wanted whole."""
    is_traffic: bool = True
    """Whether it goes into the outcome log."""
    keeps_content: bool = False
    """Whether its trace tells what models and tools said."""
    max_tool_calls: float = math.inf
    """Calls of tools that it may make in all."""
    decision: Decision | None = None
    """The first one."""
    embedding: NDArray[np.float32] | None = None
    """(dim,) of the query; `None`: nothing was routed."""
    course: Course | None = None
    """Where the policy decided first."""
    answer: Answer | None = None
    error: str | None = None
    """Why it failed; `None`: it did not."""
    stop: StopReason = StopReason.ANSWERED
    """Why nothing more was done."""
    is_sent: bool = False
    """Whether a piece of the answer is on its way."""
    recovery: Recovery = field(default_factory=Recovery)

    def __post_init__(self) -> None:
        """Begin: from now on its time runs."""
        self.began_s = time.monotonic()
        max_usd = self.call.limits.max_cost_usd
        caps = Caps(
            usd=math.inf if max_usd is None else max_usd, tool_calls=float(self.max_tool_calls)
        )
        self.budget = Budget(
            Deadline.after(self.call.limits.deadline_s), caps, parent=self.call.purse
        )
        listen = self._tell if self.call.events and self.channel is not None else None
        self.trace = Trace(
            self.call.request_id,
            listen,
            keeps_content=self.keeps_content,
            context=self.call.trace,
        )
        self._last: Report | None = None

    @property
    def is_plain(self) -> bool:
        """Whether one step is all it can take: with the caller's own tools, or several choices."""
        return bool(self.call.tools) or self.call.sampling.get("n", 1) > 1

    @property
    def steps(self) -> list[Step]:
        """The steps that have ended, in the order they began."""
        return self.trace.steps()

    async def send(self, piece: Piece) -> None:
        """Send a piece of the answer on its way, if pieces are wanted."""
        if self.channel is not None:
            self.is_sent = True
            await self.channel.send(piece)

    def _tell(self, phase: Phase, span: Span) -> None:
        """Send word of a span on its way; the bound on spans bounds what may wait."""
        if self.channel is not None:
            self.channel.offer(SpanEvent(phase, span.record()))

    def move(self, failure: AtlasError, *, another: bool) -> Move:
        """What to do after a step has failed.

        Args:
            failure: What it failed with.
            another: Whether there is another candidate.
        """
        another = another and not self.budget.deadline.is_over()
        return self.recovery.move(fault_of(failure), sent=self.is_sent, another=another)

    def end(self) -> None:
        """Nothing more happens: what the report says from now on is the last word."""
        self.trace.root.end(self.error)
        self._last = self.report()

    def report(self) -> Report:
        """What happened so far."""
        if self._last is not None:
            return self._last
        assert self.decision is not None
        steps = self.steps
        # What is taken again was not decided by the policy: nothing is to be learned of it.
        course = self.course if self.call.replay is None else None
        return Report(
            request_id=self.call.request_id,
            decision=self.decision,
            steps=tuple(steps),
            usage=self.trace.root.usage,
            seconds=time.monotonic() - self.began_s,
            query=self.call.query,
            embedding=None if self.embedding is None else self.embedding.astype("<f4").tobytes(),
            owner=self.call.owner,
            error=self.error,
            decisions=tuple(course.decisions) if course else (),
            answer_step=self.answer.step if self.answer and self.error is None else None,
            is_partial=self.answer is not None and self.answer.is_partial,
            sources=self.answer.sources if self.answer else (),
            circumstances=course.circumstances(steps) if course else None,
            stop=self.stop,
            spans=self.trace.records(),
            num_dropped=self.trace.num_dropped,
            lease_id=None if self.call.purse is None else self.call.purse.lease_id,
            trace=self.call.trace,
        )
