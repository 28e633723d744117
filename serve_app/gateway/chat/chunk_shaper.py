"""The shape of a stream: what OpenAI's clients expect of its chunks, and chunks as events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from serve_app.gateway.edge.errors import json_bytes

Json = dict[str, Any]

DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""


class ChunkShaper:
    """Puts usage and the `atlas` object where clients expect them.

    With `include_usage`, both ride on a last chunk without choices, as OpenAI sends it. Without,
    every chunk has a choice, because clients index it: so the object rides on the last of those,
    and a chunk that may be the last is held back until the next one shows that it was not. An
    event, which the caller asked for, has no choice, and passes at once.
    """

    def __init__(self, *, include_usage: bool) -> None:
        """Shape one stream."""
        self._include_usage = include_usage
        self._held: Json | None = None
        self._head: Json = {}

    def anew(self) -> ChunkShaper:
        """One for the same client, that has shaped nothing."""
        return ChunkShaper(include_usage=self._include_usage)

    def feed(self, chunk: Json) -> Iterator[Json]:
        """Take a chunk; give those that can be sent now."""
        if not chunk.get("choices"):
            if "event" in chunk.get("atlas", {}):
                self._head = self._head or head_of(chunk)
                yield chunk
            return
        self._head = head_of(chunk)
        if self._include_usage:
            chunk["usage"] = None
            yield chunk
            return
        if self._held is not None:
            yield self._held
            self._held = None
        if any(choice.get("finish_reason") for choice in chunk["choices"]):
            self._held = chunk
        else:
            yield chunk

    def finish(self, extension: Json) -> Json:
        """The last chunk."""
        if self._include_usage:
            used = extension["usage"]
            return {**self._head, "choices": [], "usage": used, "atlas": extension}
        last = self._held
        if last is None:
            choice = {"index": 0, "delta": {}, "finish_reason": None}
            last = {**self._head, "choices": [choice]}
        last["atlas"] = extension
        return last


def head_of(chunk: Json) -> Json:
    """What all chunks of a stream have in common."""
    return {name: chunk[name] for name in ("id", "object", "created", "model") if name in chunk}


def event_bytes(event: Json) -> bytes:
    """A chunk as a server-sent event."""
    return b"data: " + json_bytes(event) + b"\n\n"
