"""Answers in OpenAI's form: whole completions, and the chunks of streams."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from serve_app.models.reply import Choice, ChoicePiece
from serve_app.orchestrator.answer import Answer
from serve_app.orchestrator.run import Piece
from serve_app.schemas import ChatCall, Pair

Json = dict[str, Any]


def completion(call: ChatCall, answer: Answer, extension: Json) -> Json:
    """A `chat.completion` object.

    Args:
        call: What was asked.
        answer: What is answered.
        extension: The `atlas` object.
    """
    return {
        "id": f"chatcmpl-{call.request_id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": extension["pair"],
        "choices": [_written(of, "message", message(of), call) for of in answer.choices],
        "usage": extension["usage"],
        "atlas": extension,
    }


def message(choice: Choice) -> Json:
    """The message of a choice."""
    said: Json = {"role": "assistant", "content": choice.text}
    if choice.calls:
        said["tool_calls"] = [called.written() for called in choice.calls]
    return said | _given(choice.extra)


class ChunkWriter:
    """Writes the `chat.completion.chunk` objects of one stream.

    The first one has an `atlas` object that names the pair and the path. One without choices has an
    `atlas` object with the `event`: a span that began or ended.
    """

    def __init__(self, call: ChatCall) -> None:
        """Begin the answer to a call."""
        self._call = call
        self._head = {
            "id": f"chatcmpl-{call.request_id}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
        }
        self._opened: set[int] = set()

    def chunks(self, piece: Piece) -> Iterator[Json]:
        """The chunks of a piece, one for each choice."""
        pair, path, choices, event = piece
        if event is not None:
            told = {"type": event.phase, "span": event.span._asdict()}
            atlas = {"path": path.value, "event": told}
            yield {**self._head, "model": str(pair), "choices": [], "atlas": atlas}
        for choice in choices:
            chunk = {**self._head, "model": str(pair)}
            if not self._opened:
                chunk["atlas"] = {"pair": str(pair), "path": path.value}
            said = choice.extra
            if choice.number not in self._opened:
                self._opened.add(choice.number)
                said = {"role": "assistant", "content": "", **said}
            delta = _given(said)
            if choice.text is not None:
                delta["content"] = choice.text
            if choice.calls:
                delta["tool_calls"] = choice.calls
            chunk["choices"] = [_written(choice, "delta", delta, self._call)]
            yield chunk

    def whole(self, pair: Pair, choice: Choice) -> Json:
        """A whole choice as one chunk."""
        delta = message(choice)
        if choice.calls:
            delta["tool_calls"] = [
                {"index": index, **call} for index, call in enumerate(delta["tool_calls"])
            ]
        written = _written(choice, "delta", delta, self._call)
        return {**self._head, "model": str(pair), "choices": [written]}


def _given(said: Mapping[str, Any]) -> Json:
    return {name: value for name, value in said.items() if value is not None}


def _written(choice: Choice | ChoicePiece, name: str, said: Json, call: ChatCall) -> Json:
    return {
        "index": choice.number,
        name: said,
        "logprobs": choice.logprobs if call.sampling.get("logprobs") else None,
        "finish_reason": choice.finish_reason,
        **choice.remarks,
    }
