"""W3C trace context: which trace a request belongs to, and what calls of others are told of it.

Ids are made before spans are: a span's id is a hash of the request and the span's number, so a
call can name the span it is part of while the span itself is told only when the request is over.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextvars import ContextVar
from typing import NamedTuple

Carrier = Mapping[str, str]
"""The headers `traceparent` and, where the caller has one, `tracestate`."""

CURRENT: ContextVar[Carrier | None] = ContextVar("trace_carrier", default=None)
"""What a call that begins now is told; `None`: nothing is traced."""

TRACE_FIELD = "trace"
"""Of a model's request: the carrier, taken out before an engine sees the request."""

_PARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)
_STATE = re.compile(r"[\x20-\x7e]{1,512}")


class TraceContext(NamedTuple):
    """The trace of one request."""

    request_id: str
    trace_id: str
    """32 hexadecimal digits: the caller's, or else those of the request's id."""
    caller_span_id: str | None
    """16 hexadecimal digits; `None`: the trace begins here."""
    is_sampled: bool
    tracestate: str = ""

    def span_id(self, number: int) -> str:
        """The 16 hexadecimal digits of a span of the request; 0 is the request itself."""
        text = f"{self.request_id}:{number}".encode()
        return hashlib.blake2b(text, digest_size=8).hexdigest()

    def carrier(self, number: int) -> Carrier:
        """What a call is told that is part of a span."""
        flags = "01" if self.is_sampled else "00"
        told = {"traceparent": f"00-{self.trace_id}-{self.span_id(number)}-{flags}"}
        return told | {"tracestate": self.tracestate} if self.tracestate else told


def begin_trace(
    headers: Mapping[bytes, bytes], request_id: str, ratio: float, *, follow_caller: bool
) -> TraceContext:
    """The trace of a request: its caller's, or a new one.

    Args:
        headers: Of the request, by lower-case name.
        request_id: `req_` and 32 hexadecimal digits.
        ratio: Share of the requests that are sampled.
        follow_caller: Whether the caller's flag decides in place of the ratio.
    """
    found = _PARENT.fullmatch(headers.get(b"traceparent", b"").decode("latin-1"))
    if found is None or (found[1] == "00" and found[5] is not None):
        trace_id = request_id.removeprefix("req_")
        return TraceContext(request_id, trace_id, None, _in_sample(trace_id, ratio))
    trace_id = found[2]
    sampled = bool(int(found[4], 16) & 1) if follow_caller else _in_sample(trace_id, ratio)
    state = headers.get(b"tracestate", b"").decode("latin-1")
    return TraceContext(
        request_id, trace_id, found[3], sampled, state if _STATE.fullmatch(state) else ""
    )


def _in_sample(trace_id: str, ratio: float) -> bool:
    """By the last 56 bits of the trace's id, so that everybody who knows it agrees."""
    return int(trace_id[-14:], 16) < ratio * (1 << 56)
