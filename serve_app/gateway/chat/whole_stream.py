"""A stream as one piece: what is kept of it for a request that comes again."""

from __future__ import annotations

from typing import Any

from serve_app.gateway.chat.chunk_shaper import DONE, ChunkShaper, event_bytes, head_of
from serve_app.orchestrator.answer import Choice, ChunkMerger

Json = dict[str, Any]


class WholeStream:
    """Puts chunks together, and makes of them as few as a client can read.

    Events of spans are left out: they were of the first time.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._merger = ChunkMerger()
        self._head: Json = {}
        self._usage: Json | None = None

    def add(self, chunk: Json) -> None:
        """Take a chunk as the orchestrator gave it."""
        self._usage = chunk.get("usage") or self._usage
        if chunk.get("choices"):
            self._head = head_of(chunk)
            self._merger.add(chunk["choices"])

    def body(self, shaper: ChunkShaper, extension: Json) -> bytes:
        """The stream of one chunk for each choice.

        Args:
            shaper: Puts usage and the `atlas` object where the client expects them.
            extension: The `atlas` object.
        """
        chunks = [self._head | {"choices": [_piece(of)]} for of in self._merger.choices()]
        if self._usage is not None:
            chunks.append(self._head | {"choices": [], "usage": self._usage})
        shaped = [shaped for chunk in chunks for shaped in shaper.feed(chunk)]
        return b"".join(map(event_bytes, [*shaped, shaper.finish(extension)])) + DONE


def _piece(choice: Choice) -> Choice:
    """A choice of a whole completion as the one piece of its stream."""
    delta = {"content": "", **choice["message"]}
    if delta.get("tool_calls"):
        delta["tool_calls"] = [
            {"index": index, **call} for index, call in enumerate(delta["tool_calls"])
        ]
    return {
        "index": choice["index"],
        "delta": delta,
        "logprobs": choice.get("logprobs"),
        "finish_reason": choice.get("finish_reason"),
    }
