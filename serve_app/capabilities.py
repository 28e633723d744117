"""What a request needs of whoever answers it, and what a model or pattern can take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from serve_app.content import Message, has_pictures, text_of_content

_CHARS_PER_TOKEN = 8
"""More than a token holds on average, blanks left out, except of one character over and over."""


class Needs(NamedTuple):
    """What a request needs."""

    vision: bool = False
    """It has pictures."""
    json_schema: bool = False
    """Its answer has to fit a JSON schema."""
    tools: bool = False
    """It has functions of its own that the model may call."""
    prompt_tokens: int = 0
    """What its messages take of a context when they are shortened, at the very least."""

    def each(self) -> Iterator[tuple[str, Needs]]:
        """Every need alone, with the field of the request that it comes from.

        Whether there are pictures is part of each: without one, what reads them is out.
        """
        yield "messages", Needs(self.vision)
        if self.json_schema:
            yield "response_format", Needs(self.vision, json_schema=True)
        if self.tools:
            yield "tools", Needs(self.vision, tools=True)
        yield "messages", Needs(self.vision, prompt_tokens=self.prompt_tokens)


NO_NEEDS = Needs()


class Capabilities(NamedTuple):
    """What a candidate can take; the defaults are those of one that nothing is known of."""

    vision: bool = False
    json_schema: bool = True
    tools: bool = True
    context_tokens: float = math.inf
    """Infinite: not known."""
    text_alone: bool = True
    """It can answer a request without pictures; one that reads pictures cannot."""

    def take(self, needs: Needs) -> bool:
        """Whether these are enough for a request."""
        return (
            self.vision >= needs.vision
            and self.json_schema >= needs.json_schema
            and self.tools >= needs.tools
            and self.context_tokens >= needs.prompt_tokens
            and (self.text_alone or needs.vision)
        )


UNKNOWN = Capabilities()


def common(of: Iterable[Capabilities]) -> Capabilities:
    """What each of several can take."""
    return Capabilities(*(min(values) for values in zip(*of, strict=True)))


def needs_of(
    messages: Sequence[Message],
    sampling: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]],
    tool_choice: Any,
) -> Needs:
    """What a request needs; the arguments are fields of a `ChatCall`."""
    wanted = sampling.get("response_format")
    return Needs(
        vision=has_pictures(messages),
        json_schema=wanted is not None and wanted["type"] == "json_schema",
        tools=bool(tools) and tool_choice != "none",
        prompt_tokens=sum(_fewest_tokens(message) for message in _whole(messages)),
    )


def _whole(messages: Sequence[Message]) -> Iterator[Message]:
    """The messages that no fitting shortens: the instructions, and the last question."""
    asked = max((n for n, m in enumerate(messages) if m["role"] == "user"), default=-1)
    return (m for n, m in enumerate(messages) if n == asked or m["role"] == "system")


def _fewest_tokens(message: Message) -> int:
    text = text_of_content(message.get("content"))
    return (len(text) - text.count(" ") - text.count("\n")) // _CHARS_PER_TOKEN
