"""What a model says, read from OpenAI's form: whole, in pieces, and put together from pieces.

In come completions and chunks that `engine_output` has checked. What else an engine says in them is
kept for the caller, who gets it as it came.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from serve_app.schemas import Usage

Json = dict[str, Any]

_READ_OF_CHOICE = frozenset({"index", "message", "delta", "logprobs", "finish_reason"})
_READ_OF_DELTA = frozenset({"content", "tool_calls"})
_READ_OF_MESSAGE = _READ_OF_DELTA | {"role"}
_READ_OF_CALL = frozenset({"id", "type", "function"})
_FOR_NOBODY = frozenset({"stop_reason", "token_ids", "routed_experts", "prompt_token_ids"})
"""Fields of vLLM's choices that no client of OpenAI's knows."""


@dataclass(frozen=True, slots=True)
class FunctionRequest:
    """A call of a function that a model asks for."""

    id: str
    name: str
    arguments: str
    """As the model wrote them."""
    extra: Json = field(default_factory=dict)
    """What else the engine says of it, which it may want to be told again."""

    def written(self) -> Json:
        """In OpenAI's form, as models and callers read it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function, **self.extra}


class ChoicePiece(NamedTuple):
    """A part of a choice, as a stream brings it; a tuple, because every token makes one."""

    number: int
    """Of the choice, among those of its answer."""
    text: str | None = None
    logprobs: Json | None = None
    """As the engine gave them, for the caller; `tokens_of` reads them."""
    finish_reason: str | None = None
    extra: Mapping[str, Any] = MappingProxyType({})
    """What else is said in the message, for the caller; also that it has no text or no calls."""
    remarks: Mapping[str, Any] = MappingProxyType({})
    """What else is said of the choice, for the caller."""
    calls: Sequence[Json] = ()
    """Pieces of calls, as the engine gave them; `ChunkMerger` reads them."""

    def text_only(self) -> ChoicePiece | None:
        """Without calls and ending; `None`: no text is left."""
        return ChoicePiece(self.number, self.text, self.logprobs) if self.text else None


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer of a model to a request, which may ask for several."""

    number: int
    """Of the choice, among those of its answer."""
    text: str | None = None
    logprobs: Json | None = None
    """As of a piece."""
    finish_reason: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """As of a piece."""
    remarks: Mapping[str, Any] = field(default_factory=dict)
    """As of a piece."""
    calls: tuple[FunctionRequest, ...] = ()
    has_thought: bool = False
    """Whether the engine gave a thought beside the text."""

    @property
    def tokens(self) -> Sequence[Mapping[str, Any]]:
        """As `tokens_of` reads them."""
        return tokens_of(self.logprobs)

    def ending(self) -> ChoicePiece:
        """Its end as a stream brings it."""
        return ChoicePiece(self.number, finish_reason=self.finish_reason or "stop")

    def as_piece(self) -> ChoicePiece:
        """Its text and its end as one piece of a stream."""
        return self.ending()._replace(text=self.text or "", logprobs=self.logprobs)


def tokens_of(logprobs: Json | None) -> Sequence[Mapping[str, Any]]:
    """Each token's `logprob` and `top_logprobs`; empty: the engine gave none."""
    return (logprobs or {}).get("content") or ()


@dataclass(frozen=True, slots=True)
class ModelReply:
    """A whole answer of a model."""

    choices: list[Choice]
    usage: Usage | None
    """Without its price; `None`: the engine does not say."""


def read_reply(completion: Json) -> ModelReply:
    """A whole completion."""
    choices = [_read_choice(choice) for choice in completion["choices"]]
    return ModelReply(choices, _read_usage(completion))


def read_chunk(chunk: Json) -> tuple[list[ChoicePiece], Usage | None]:
    """The choices of a chunk, and the usage where it is said there."""
    return [_read_piece(choice) for choice in chunk.get("choices") or ()], _read_usage(chunk)


def _read_choice(choice: Json) -> Choice:
    message: Json = choice["message"]
    return Choice(
        choice["index"],
        message.get("content"),
        choice.get("logprobs"),
        choice.get("finish_reason"),
        _extra(message, _READ_OF_MESSAGE),
        _remarks(choice),
        tuple(map(_read_call, message.get("tool_calls") or ())),
        bool(message.get("reasoning") or message.get("reasoning_content")),
    )


def _read_piece(choice: Json) -> ChoicePiece:
    delta: Json = choice.get("delta") or {}
    return ChoicePiece(
        choice["index"],
        delta.get("content"),
        choice.get("logprobs"),
        choice.get("finish_reason"),
        _extra(delta, _READ_OF_DELTA),
        _remarks(choice),
        delta.get("tool_calls") or (),
    )


def _extra(message: Json, read: frozenset[str]) -> Json:
    """The other fields of a message or a delta, and those that say that there is nothing."""
    return {
        name: value
        for name, value in message.items()
        if (name not in read or not value) and name != "reasoning"
    }


def _remarks(choice: Json) -> Json:
    return {
        name: value
        for name, value in choice.items()
        if name not in _READ_OF_CHOICE and name not in _FOR_NOBODY
    }


def _read_call(call: Json) -> FunctionRequest:
    function = call["function"]
    extra = {name: value for name, value in call.items() if name not in _READ_OF_CALL}
    return FunctionRequest(call["id"], function["name"], function["arguments"], extra)


def _read_usage(said: Json) -> Usage | None:
    usage = said.get("usage")
    if not usage:
        return None
    return Usage(usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0)


@dataclass
class _CallParts:
    """One streamed call so far."""

    id: str = ""
    names: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)


@dataclass
class _Parts:
    """One streamed choice so far."""

    texts: list[str] = field(default_factory=list)
    calls: list[_CallParts] = field(default_factory=list)
    tokens: list[Any] = field(default_factory=list)
    finish_reason: str | None = None

    def whole(self, number: int) -> Choice:
        """The choice."""
        return Choice(
            number,
            "".join(self.texts) or None,
            {"content": self.tokens} if self.tokens else None,
            self.finish_reason,
            calls=tuple(
                FunctionRequest(call.id, "".join(call.names), "".join(call.arguments))
                for call in self.calls
            ),
        )


class ChunkMerger:
    """Pieces put together into whole choices."""

    def __init__(self) -> None:
        """Begin with none."""
        self._parts: dict[int, _Parts] = {}

    def add(self, pieces: Iterable[ChoicePiece]) -> None:
        """Add pieces, in their order."""
        for piece in pieces:
            parts = self._parts.setdefault(piece.number, _Parts())
            if piece.text:
                parts.texts.append(piece.text)
            for call in piece.calls:
                _add_call(parts.calls, call)
            parts.tokens += tokens_of(piece.logprobs)
            parts.finish_reason = piece.finish_reason or parts.finish_reason

    def choices(self) -> list[Choice]:
        """What they come to, in the order of the choices."""
        return [parts.whole(number) for number, parts in sorted(self._parts.items())]


def _add_call(calls: list[_CallParts], piece: Json) -> None:
    while len(calls) <= piece["index"]:
        calls.append(_CallParts())
    call, function = calls[piece["index"]], piece.get("function") or {}
    call.id = call.id or piece.get("id") or ""
    if function.get("name"):
        call.names.append(function["name"])
    if function.get("arguments"):
        call.arguments.append(function["arguments"])
