"""What happened in one request: a tree of spans, from which report, log line and rows are read.

A span has its id from its beginning, so whatever looks at a request under way can name what it
sees. Use is charged to a span and to every span above it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import TracebackType
from typing import Self

from serve_app.errors import AtlasError
from serve_app.schemas import Step, ToolCall, Usage

MAX_SPANS = 256
"""Spans kept of one request, steps not counted: limits of their own bound those."""
MAX_BYTES = 1 << 20
"""Bytes of arguments and results of tools kept of one request."""


class SpanKind(StrEnum):
    """What a span is about."""

    REQUEST = "request"
    """The whole of it."""
    DECISION = "decision"
    """A question to the router."""
    NODE = "node"
    """A part of a pattern."""
    PAIR = "pair"
    """A step: the run of a pair."""
    THOUGHT = "thought"
    """A step: the run of the planner."""
    MODEL = "model"
    """A call of a model."""
    TOOL = "tool"
    """A call of a tool."""
    VALIDATION = "validation"
    """A check of what a model said."""


@dataclass(slots=True)
class Span:
    """One thing that happened; a context manager that ends with its block."""

    span_id: int
    """Unique in its request."""
    parent: Span | None
    kind: SpanKind
    name: str
    """Of the model, tool, pair or node."""
    trace: Trace
    began_s: float
    """Monotonic clock."""
    seconds: float | None = None
    """`None`: it is under way."""
    error: str | None = None
    """Why it failed; `None`: it did not."""
    usage: Usage = field(default_factory=Usage)
    """Of it and everything below."""
    step: Step | None = None
    """What a step came to."""
    tool_call: ToolCall | None = None
    """What a call of a tool came to."""
    children: list[Span] = field(default_factory=list)

    def child(self, kind: SpanKind, name: str) -> Span:
        """Begin a span below this one. Beyond `MAX_SPANS` it is counted, and not kept."""
        return self.trace.begin(kind, name, self)

    def charge(self, usage: Usage) -> None:
        """Put a call's use on the bill of this span and of every span above."""
        span: Span | None = self
        while span is not None:
            span.usage.add(usage)
            span = span.parent

    def end(self, error: str | None = None) -> None:
        """Say that it is over."""
        self.seconds = time.monotonic() - self.began_s
        self.error = error

    def called(self, call: ToolCall) -> None:
        """Say what a call of a tool came to, as far as there is room for the words."""
        self.tool_call = self.trace.fitted(call)

    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Calls of tools below this span, in the order they began."""
        return tuple(span.tool_call for span in self.walk() if span.tool_call is not None)

    def walk(self) -> Iterator[Span]:
        """This span and those below it, in the order they began."""
        yield self
        for child in self.children:
            yield from child.walk()

    def __enter__(self) -> Self:
        """It has begun already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it, with the error that ends the block."""
        said = error.message if isinstance(error, AtlasError) else None
        self.end(said or (None if kind is None else kind.__name__))


class Trace:
    """The spans of one request.

    Invariants:
        - At most `MAX_SPANS` spans and every step are kept, with at most `MAX_BYTES` of what tools
          were given and gave.
        - What is not kept is counted, and its use is charged all the same.
    """

    def __init__(self, name: str) -> None:
        """Begin.

        Args:
            name: Of the request.
        """
        self.num_begun = 0
        self.num_dropped = 0
        """Spans that were not kept."""
        self._bytes_left = MAX_BYTES
        self.root = self.begin(SpanKind.REQUEST, name, None)

    def begin(self, kind: SpanKind, name: str, parent: Span | None) -> Span:
        """Begin a span; see `Span.child`."""
        span = Span(self.num_begun, parent, kind, name, self, time.monotonic())
        self.num_begun += 1
        is_step = kind is SpanKind.PAIR or kind is SpanKind.THOUGHT
        if parent is not None:
            if is_step or self.num_begun - self.num_dropped <= MAX_SPANS:
                parent.children.append(span)
            else:
                self.num_dropped += 1
        return span

    def fitted(self, call: ToolCall) -> ToolCall:
        """A call with no more words than there is room for."""
        size = len(call.text) + len(repr(call.arguments)) + len(repr(call.data))
        if size > self._bytes_left:
            text = call.text[: self._bytes_left]
            call = replace(call, arguments={}, text=text, data={})
            size = len(text)
        self._bytes_left -= size
        return call

    def steps(self) -> list[Step]:
        """What the steps that have ended came to, in the order they began."""
        return [span.step for span in self.root.walk() if span.step is not None]
