"""What happened in one finished request, as its owner is shown it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel

from serve_app.schemas import DecidedBy, Fact, SpanKind, SpanRecord, StopReason
from serve_app.store import StoredTrace


class Shown(BaseModel):
    """A part of a response."""


class TokenCounts(Shown):
    """Tokens, as OpenAI counts them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ShownSpan(Shown):
    """One thing that happened, with what happened in it."""

    span_id: int
    """Unique in its request; 0 is the request itself."""
    kind: SpanKind
    name: str
    """Of the model, tool, pair or node."""
    began_s: float
    """Seconds after the request began."""
    seconds: float | None
    """`null`: it had not ended when the request did."""
    error: str | None
    """Why it failed; of a tool or a check the class of the error, where content is not kept."""
    usage: TokenCounts
    """Of it and everything below, as `cost_usd`."""
    cost_usd: float
    attributes: dict[str, Fact]
    arguments: str | None
    """What a tool was given, as JSON; only where `store.keep_content` is on."""
    text: str | None
    """What a model said or a tool gave; only where `store.keep_content` is on."""
    children: list[ShownSpan]
    """In the order they began."""


class FirstDecision(Shown):
    """What was chosen first, and how."""

    pair: str
    path: DecidedBy
    confidence: float
    propensity: float
    policy_version: int
    pool_version: int


class Trajectory(Shown):
    """A finished request."""

    object: Literal["atlas.trajectory"] = "atlas.trajectory"
    request_id: str
    created_unix_s: float
    """When it ended."""
    decision: FirstDecision
    stop: StopReason
    """Why nothing more was done."""
    error: str | None
    """Why it failed; `null`: it was answered."""
    usage: TokenCounts
    cost_usd: float
    seconds: float
    num_dropped: int
    """Spans beyond the most that are kept of one request; their use is counted."""
    trace: ShownSpan
    """The request itself, and everything in it."""

    @classmethod
    def of(cls, stored: StoredTrace) -> Self:
        """The response for a stored trace."""
        return cls(
            request_id=stored.request_id,
            created_unix_s=stored.created_unix_s,
            decision=FirstDecision(
                pair=str(stored.pair),
                path=stored.path,
                confidence=stored.confidence,
                propensity=stored.propensity,
                policy_version=stored.policy_version,
                pool_version=stored.pool_version,
            ),
            stop=stored.stop,
            error=stored.error,
            usage=_counts(stored.usage.prompt_tokens, stored.usage.completion_tokens),
            cost_usd=stored.usage.cost_usd,
            seconds=stored.seconds,
            num_dropped=stored.num_dropped,
            trace=_tree(stored.spans),
        )


def _tree(spans: tuple[SpanRecord, ...]) -> ShownSpan:
    """The spans below one another; each comes after the one it is part of."""
    shown: dict[int, ShownSpan] = {}
    for span in spans:
        values = span._asdict()
        usage = _counts(values.pop("prompt_tokens"), values.pop("completion_tokens"))
        above = values.pop("parent_id")
        shown[span.span_id] = ShownSpan(**values, usage=usage, children=[])
        if above is not None:
            shown[above].children.append(shown[span.span_id])
    return shown[spans[0].span_id]


def _counts(prompt: int, completion: int) -> TokenCounts:
    return TokenCounts(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )
