"""What a run of a pair gives: pieces of an answer on their way, and the whole of it at the end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from serve_app.schemas import ToolCall, Usage


@dataclass(frozen=True)
class Delta:
    """Choices of one OpenAI chunk, on their way to the caller."""

    choices: list[dict[str, Any]]


@dataclass
class StepResult:
    """What one run of a pair produced, or a failed run until it failed."""

    choices: list[dict[str, Any]] = field(default_factory=list)
    """Choices of an OpenAI completion: message, finish_reason, logprobs."""
    usage: Usage = field(default_factory=Usage)
    tool_calls: list[ToolCall] = field(default_factory=list)

    @property
    def answer(self) -> str | None:
        """The text of the first choice."""
        return self.choices[0]["message"].get("content") if self.choices else None

    @property
    def mean_logprob(self) -> float | None:
        """Mean token log-probability of the first choice, where it was asked for."""
        tokens = (
            (self.choices[0].get("logprobs") or {}).get("content") if self.choices else None
        ) or []
        return sum(token["logprob"] for token in tokens) / len(tokens) if tokens else None


@dataclass
class _Parts:
    """One streamed choice so far."""

    texts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None


class ChunkMerger:
    """Streamed choices put together into those of a whole completion."""

    def __init__(self) -> None:
        """Begin with none."""
        self._parts: dict[int, _Parts] = {}

    def add(self, choices: Iterable[dict[str, Any]]) -> None:
        """Add the choices of a chunk; checked ones (`models.engine_output`)."""
        for choice in choices:
            parts = self._parts.setdefault(choice["index"], _Parts())
            delta = choice["delta"]
            if delta.get("content"):
                parts.texts.append(delta["content"])
            for piece in delta.get("tool_calls") or ():
                _add_call(parts.calls, piece)
            parts.logprobs += (choice.get("logprobs") or {}).get("content") or ()
            parts.finish_reason = choice.get("finish_reason") or parts.finish_reason

    def choices(self) -> list[dict[str, Any]]:
        """The choices as a whole completion has them, in their order."""
        return [_merged(index, parts) for index, parts in sorted(self._parts.items())]


def _add_call(calls: list[dict[str, Any]], piece: dict[str, Any]) -> None:
    while len(calls) <= piece["index"]:
        calls.append({"id": "", "name": [], "arguments": []})
    call, function = calls[piece["index"]], piece.get("function") or {}
    call["id"] = call["id"] or piece.get("id") or ""
    for part in ("name", "arguments"):
        if function.get(part):
            call[part].append(function[part])


def _merged(index: int, parts: _Parts) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": "".join(parts.texts) or None}
    if parts.calls:
        message["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {part: "".join(call[part]) for part in ("name", "arguments")},
            }
            for call in parts.calls
        ]
    choice: dict[str, Any] = {"index": index, "message": message}
    if parts.logprobs:
        choice["logprobs"] = {"content": parts.logprobs}
    if parts.finish_reason:
        choice["finish_reason"] = parts.finish_reason
    return choice


def text_only(choice: dict[str, Any]) -> dict[str, Any] | None:
    """A streamed choice without tool calls and ending, or `None` where no text is left."""
    content = choice["delta"].get("content")
    if not content:
        return None
    kept = {"index": choice["index"], "delta": {"content": content}}
    return kept | ({"logprobs": choice["logprobs"]} if choice.get("logprobs") else {})


def whole_delta(choices: list[dict[str, Any]]) -> Delta:
    """The choices of a whole completion as one streamed piece."""
    pieces = []
    for choice in choices:
        piece = finish(choice) | {"delta": {"content": choice["message"].get("content") or ""}}
        if choice.get("logprobs"):
            piece["logprobs"] = choice["logprobs"]
        pieces.append(piece)
    return Delta(pieces)


def finish(choice: dict[str, Any]) -> dict[str, Any]:
    """The end of a whole completion's choice as a streamed one."""
    return {
        "index": choice["index"],
        "delta": {},
        "finish_reason": choice.get("finish_reason") or "stop",
    }
