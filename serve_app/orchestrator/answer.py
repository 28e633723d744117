"""Answers as OpenAI's choices: whole, in pieces, and put together from pieces."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from serve_app.schemas import DecidedBy, Pair, StopReason

Choice = dict[str, Any]
"""A choice of an OpenAI completion (message, finish_reason, logprobs), or of a chunk (delta)."""


@dataclass(frozen=True)
class Answer:
    """What a step, or a request as a whole, came to."""

    choices: list[Choice]
    """Of a whole completion."""
    pair: Pair
    """Which gave it."""
    path: DecidedBy
    """Who decided on the pair."""
    step: int
    """Number of the step that gave it."""
    stop: StopReason = StopReason.ANSWERED
    """Why nothing more was done."""
    is_partial: bool = False
    """Whether a cap cut it short; `stop` says which."""
    sources: tuple[dict[str, Any], ...] = ()
    """What the answer of a pattern rests on."""


def text_of(choices: list[Choice]) -> str | None:
    """The text of the first choice; `None`: it has none."""
    return choices[0]["message"].get("content") if choices else None


def mean_logprob_of(choices: list[Choice]) -> float | None:
    """Mean token log-probability of the first choice; `None`: the engine gave none."""
    given = (choices[0].get("logprobs") or {}) if choices else {}
    tokens = given.get("content") or []
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

    def add(self, choices: Iterable[Choice]) -> None:
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

    def choices(self) -> list[Choice]:
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


def _merged(index: int, parts: _Parts) -> Choice:
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
    choice: Choice = {"index": index, "message": message}
    if parts.logprobs:
        choice["logprobs"] = {"content": parts.logprobs}
    if parts.finish_reason:
        choice["finish_reason"] = parts.finish_reason
    return choice


def text_only(choice: Choice) -> Choice | None:
    """A streamed choice without tool calls and ending, or `None` where no text is left."""
    content = choice["delta"].get("content")
    if not content:
        return None
    kept = {"index": choice["index"], "delta": {"content": content}}
    return kept | ({"logprobs": choice["logprobs"]} if choice.get("logprobs") else {})


def pieces_of(choices: list[Choice]) -> list[Choice]:
    """The choices of a whole completion as one streamed piece."""
    pieces = []
    for choice in choices:
        piece = finish(choice) | {"delta": {"content": choice["message"].get("content") or ""}}
        if choice.get("logprobs"):
            piece["logprobs"] = choice["logprobs"]
        pieces.append(piece)
    return pieces


def finish(choice: Choice) -> Choice:
    """The end of a whole completion's choice as a streamed one."""
    return {
        "index": choice["index"],
        "delta": {},
        "finish_reason": choice.get("finish_reason") or "stop",
    }
