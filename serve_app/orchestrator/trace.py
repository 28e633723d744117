"""What happened in one request: a tree of spans, from which report, log line and rows are read.

A span has its id from its beginning, so whatever looks at a request under way can name what it
sees. Use is charged to a span and to every span above it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Literal, Self

from serve_app.errors import AtlasError
from serve_app.schemas import Fact, Route, SpanKind, SpanRecord, Step, ToolCall, Usage
from serve_app.signals import Certainty
from serve_app.trace_context import CURRENT, Carrier, TraceContext

__all__ = ["MAX_SPANS", "Listener", "Phase", "Span", "SpanKind", "Trace", "Turn"]

MAX_SPANS = 256
"""Spans kept of one request, steps not counted: limits of their own bound those."""
MAX_BYTES = 1 << 20
"""Bytes of arguments and results of tools kept of one request."""
MAX_CONTENT_BYTES = 64 << 10
"""Bytes of texts in the records of one request, where content is kept."""
MAX_ATTRIBUTES = 16
"""Attributes in a span's record."""
MAX_ATTRIBUTE_CHARS = 200
"""Of an attribute's name and of its value."""
MAX_ERROR_CHARS = 500
"""Of an error in a record."""

Phase = Literal["begin", "end"]
Listener = Callable[[Phase, "Span"], None]
"""Hears of a span when it begins and when it ends; must neither wait nor raise."""

_QUOTING = (SpanKind.TOOL, SpanKind.VALIDATION)
"""Kinds of spans whose errors repeat what a tool was given or a model said."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one reply of a model shows beside its text."""

    certainty: Certainty | None
    """`None`: the engine gave no log-probabilities."""
    called: bool
    """Whether it calls a tool."""


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
    is_kept: bool = True
    """Whether the trace has it."""
    seconds: float | None = None
    """`None`: it is under way."""
    error: str | None = None
    """Why it failed; `None`: it did not."""
    fault: str | None = None
    """Class of the exception that ended it; `None`: none did."""
    usage: Usage = field(default_factory=Usage)
    """Of it and everything below."""
    attributes: dict[str, Fact] = field(default_factory=dict)
    """Small facts, as a verdict or a count; a record has `MAX_ATTRIBUTES` of them."""
    step: Step | None = None
    """What a step came to."""
    tool_call: ToolCall | None = None
    """What a call of a tool came to."""
    turn: Turn | None = None
    """What a reply of a model shows."""
    arguments: str | None = None
    """What a tool was given, as JSON, where content is kept."""
    text: str | None = None
    """What a model said or a tool gave, where content is kept."""
    children: list[Span] = field(default_factory=list)
    outer: Carrier | None = None
    """What calls were told before this one began."""

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
        if self.is_kept:
            self.trace.tell("end", self)

    def called(self, call: ToolCall) -> None:
        """Say what a call of a tool came to, as far as there is room for the words."""
        self.tool_call = self.trace.fitted(call)
        if self.trace.keeps_content:
            given = json.dumps(call.arguments, ensure_ascii=False, default=str)
            self.arguments, self.text = self.trace.cut(given), self.trace.cut(call.text)

    def said(self, text: str | None) -> None:
        """Say what a model said; kept where content is, as far as there is room."""
        if self.trace.keeps_content and text is not None:
            self.text = self.trace.cut(text)

    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Calls of tools below this span, in the order they began."""
        return tuple(span.tool_call for span in self.walk() if span.tool_call is not None)

    def walk(self) -> Iterator[Span]:
        """This span and those below it, in the order they began."""
        yield self
        for child in self.children:
            yield from child.walk()

    def kept_above(self) -> Span | None:
        """The nearest span above that the trace has; `None`: this is the request itself."""
        above = self.parent
        while above is not None and not above.is_kept:
            above = above.parent
        return above

    def route(self) -> Route:
        """Names of the spans from the request's candidate down to this one, of those kept."""
        above = self.kept_above()
        return () if above is None else (*above.route(), self.name)

    def record(self) -> SpanRecord:
        """What may be told of it as it is now."""
        above = self.kept_above()
        return SpanRecord(
            span_id=self.span_id,
            parent_id=None if above is None else above.span_id,
            kind=self.kind,
            name=self.name,
            began_s=self.began_s - self.trace.began_s,
            seconds=self.seconds,
            error=self._told_error(),
            prompt_tokens=self.usage.prompt_tokens,
            completion_tokens=self.usage.completion_tokens,
            cost_usd=self.usage.cost_usd,
            attributes=_bounded(self.attributes) if self.attributes else {},
            arguments=self.arguments,
            text=self.text,
        )

    def _told_error(self) -> str | None:
        """Why it failed, in words only where those repeat nothing, or content is kept."""
        error = self.error
        if error is None:
            return "failed" if self.tool_call is not None and not self.tool_call.ok else None
        if self.kind in _QUOTING and not self.trace.keeps_content:
            return self.fault or "failed"
        return error[:MAX_ERROR_CHARS]

    def __enter__(self) -> Self:
        """It has begun already; calls of others in the block are told that they are part of it."""
        if self.trace.context is not None:
            self.outer = CURRENT.get()
            CURRENT.set(self.trace.context.carrier(self._told().span_id))
        return self

    def _told(self) -> Span:
        """Itself, or the nearest span above that the trace has."""
        return self if self.is_kept else self.kept_above() or self.trace.root

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it, with the error that ends the block."""
        if self.trace.context is not None:
            CURRENT.set(self.outer)
        self.fault = None if kind is None else kind.__name__
        self.end(error.message if isinstance(error, AtlasError) else self.fault)


class Trace:
    """The spans of one request.

    Invariants:
        - At most `MAX_SPANS` spans and every step are kept, with at most `MAX_BYTES` of what tools
          were given and gave.
        - What is not kept is counted, and its use is charged all the same; nobody hears of it.
        - A record has no word of a prompt, an answer, an argument or a result unless content is
          kept, and then at most `MAX_CONTENT_BYTES` in all.
    """

    def __init__(
        self,
        name: str,
        listen: Listener | None = None,
        *,
        keeps_content: bool = False,
        context: TraceContext | None = None,
    ) -> None:
        """Begin.

        Args:
            name: Of the request.
            listen: Hears of each span that is kept; `None`: nobody does.
            keeps_content: Whether records have what models and tools said.
            context: The W3C trace that calls of others are told of; `None`: they are told nothing.
        """
        self.num_begun = 0
        self.num_dropped = 0
        """Spans that were not kept."""
        self.keeps_content = keeps_content
        self.context = context
        self.began_s = time.monotonic()
        self._listen = listen
        self._bytes_left = MAX_BYTES
        self._content_left = MAX_CONTENT_BYTES
        self.root = self.begin(SpanKind.REQUEST, name, None)

    def begin(self, kind: SpanKind, name: str, parent: Span | None) -> Span:
        """Begin a span; see `Span.child`."""
        span = Span(self.num_begun, parent, kind, name, self, time.monotonic())
        self.num_begun += 1
        is_step = kind is SpanKind.PAIR or kind is SpanKind.THOUGHT
        if is_step or self.num_begun - self.num_dropped <= MAX_SPANS:
            if (above := span.kept_above()) is not None:
                above.children.append(span)
        else:
            self.num_dropped += 1
            span.is_kept = False
        if span.is_kept:
            self.tell("begin", span)
        return span

    def tell(self, phase: Phase, span: Span) -> None:
        """Have the listener hear of a span."""
        if self._listen is not None:
            self._listen(phase, span)

    def fitted(self, call: ToolCall) -> ToolCall:
        """A call with no more words than there is room for."""
        size = len(call.text) + len(repr(call.arguments)) + len(repr(call.data))
        if size > self._bytes_left:
            text = call.text[: self._bytes_left]
            call = replace(call, arguments={}, text=text, data={})
            size = len(text)
        self._bytes_left -= size
        return call

    def cut(self, text: str) -> str:
        """As much of a text as there is room for in the records."""
        kept = text.encode("utf-8", "replace")[: self._content_left]
        self._content_left -= len(kept)
        return kept.decode("utf-8", "ignore")

    def steps(self) -> list[Step]:
        """What the steps that have ended came to, in the order they began."""
        return [span.step for span in self.root.walk() if span.step is not None]

    def records(self) -> tuple[SpanRecord, ...]:
        """What may be told of the spans as they are now, each after the one above it."""
        return tuple(span.record() for span in self.root.walk())


def _bounded(attributes: dict[str, Fact]) -> dict[str, Fact]:
    """The first attributes, none too long, and no number that JSON lacks."""
    kept: dict[str, Fact] = {}
    for name, value in list(attributes.items())[:MAX_ATTRIBUTES]:
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)
        short = value[:MAX_ATTRIBUTE_CHARS] if isinstance(value, str) else value
        kept[name[:MAX_ATTRIBUTE_CHARS]] = short
    return kept
