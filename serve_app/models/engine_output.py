"""What an engine says, checked where it enters: types, numbers, sizes, counts.

Every answer and every chunk of every kind of model passes here on its way out of the model's
process (`boundary.guarded`). So whatever runs a request can rely on the shape of an OpenAI
completion, and no engine can fill a gateway's memory. Fields that nobody here reads stay as they
are; they only count as bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from serve_app.errors import EngineError
from serve_app.models.protocol import ChatBody

Json = dict[str, Any]

MAX_ANSWER_BYTES = 64 << 20
"""Bytes of one answer's JSON, all its chunks together, however many tokens were allowed."""
MAX_CHUNK_BYTES = 4 << 20
"""Bytes of one chunk's JSON."""
MAX_CALLS = 128
"""Tool calls in one choice of a reply, as many as a message of a caller may have."""

_BASE_BYTES = 1 << 20
_BYTES_PER_TOKEN = 1024
"""A streamed token comes in an envelope of some 250 bytes."""
_BYTES_PER_LOGPROB = 256
"""One token with its log-probability and its bytes."""
_NO_MAX_TOKENS = 8192
"""Tokens taken for the limit on bytes where the request named no limit on tokens."""
_MAX_ARGUMENTS_CHARS = 1 << 20


class _Part(BaseModel):
    """Read strictly; what is not named here is not looked at."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


_Id = Annotated[str, Field(min_length=1, max_length=256)]
_Name = Annotated[str, Field(min_length=1, max_length=256)]
_Arguments = Annotated[str, Field(max_length=_MAX_ARGUMENTS_CHARS)]
_Index = Annotated[int, Field(ge=0)]
_Tokens = Annotated[int, Field(ge=0, le=10**9)]


class _Function(_Part):
    name: _Name
    arguments: _Arguments


class _Call(_Part):
    id: _Id
    type: Literal["function"] = "function"
    function: _Function


class _Message(_Part):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: Annotated[list[_Call], Field(max_length=MAX_CALLS)] | None = None


class _FunctionPiece(_Part):
    name: Annotated[str, Field(max_length=256)] | None = None
    arguments: _Arguments | None = None


class _CallPiece(_Part):
    index: Annotated[int, Field(ge=0, lt=MAX_CALLS)]
    id: Annotated[str, Field(max_length=256)] | None = None
    function: _FunctionPiece | None = None


class _Delta(_Part):
    role: Literal["assistant", ""] | None = None
    content: str | None = None
    tool_calls: Annotated[list[_CallPiece], Field(max_length=MAX_CALLS)] | None = None


class _Likely(_Part):
    logprob: float


class _Token(_Likely):
    top_logprobs: list[_Likely] | None = None


class _Logprobs(_Part):
    content: list[_Token] | None = None


class _AnyChoice(_Part):
    index: _Index
    finish_reason: Annotated[str, Field(max_length=64)] | None = None
    logprobs: _Logprobs | None = None


class _Choice(_AnyChoice):
    message: _Message


class _ChoicePiece(_AnyChoice):
    delta: _Delta | None = None


class _Usage(_Part):
    prompt_tokens: _Tokens | None = None
    completion_tokens: _Tokens | None = None


class _Completion(_Part):
    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Usage | None = None


class _Chunk(_Part):
    choices: list[_ChoicePiece] | None = None
    usage: _Usage | None = None


_Parsed = TypeVar("_Parsed", bound=_Part)

_COMPLETION = TypeAdapter(_Completion)
_CHUNK = TypeAdapter(_Chunk)


def checked_completion(completion: Any, body: ChatBody) -> Json:
    """A whole answer, as it is, if it is one.

    Args:
        completion: What the engine gave.
        body: The request that it answers.

    Raises:
        EngineError: If it is no answer to this request.
    """
    _check_size(completion, _max_bytes(body))
    parsed = _parsed(_COMPLETION, completion)
    _check_indices([choice.index for choice in parsed.choices], body)
    result: Json = completion
    return result


class StreamChecker:
    """Checks the chunks of one answer, in their order."""

    def __init__(self, body: ChatBody) -> None:
        """Begin with none.

        Args:
            body: The request that they answer.
        """
        self._body = body
        self._left_bytes = _max_bytes(body)
        self._named: dict[tuple[int, int], list[bool]] = {}
        """Choice and call to whether its id and its name came."""

    def checked(self, batch: Any) -> list[Json]:
        """Some chunks, as they are, if they are some.

        Raises:
            EngineError: If one is none, or they go past what was asked for.
        """
        if not isinstance(batch, list):
            raise EngineError("the engine's answer is not a list of chunks")
        for chunk in batch:
            self._left_bytes -= _check_size(chunk, min(self._left_bytes, MAX_CHUNK_BYTES))
            for choice in _parsed(_CHUNK, chunk).choices or ():
                _check_indices([choice.index], self._body)
                self._note_calls(choice)
        return batch

    def end(self) -> None:
        """Check what only the end shows.

        Raises:
            EngineError: If a tool call came without an id or a name.
        """
        if not all(all(parts) for parts in self._named.values()):
            raise EngineError("the engine's answer has a tool call without an id or a name")

    def _note_calls(self, choice: _ChoicePiece) -> None:
        for piece in (choice.delta.tool_calls if choice.delta else None) or ():
            # A call that is left out leaves an empty one in its place.
            for number in range(piece.index + 1):
                self._named.setdefault((choice.index, number), [False, False])
            parts = self._named[choice.index, piece.index]
            parts[0] |= bool(piece.id)
            parts[1] |= bool(piece.function and piece.function.name)


def _max_bytes(body: ChatBody) -> int:
    """What an answer to this request may take, with room to spare."""
    tokens = int(body.get("max_tokens") or _NO_MAX_TOKENS) * int(body.get("n") or 1)
    per_token = _BYTES_PER_TOKEN
    if body.get("logprobs"):
        per_token += _BYTES_PER_LOGPROB * (4 + int(body.get("top_logprobs") or 0))
    return min(MAX_ANSWER_BYTES, _BASE_BYTES + tokens * per_token)


def _check_size(value: Any, most: int) -> int:
    try:
        size = len(orjson.dumps(value))
    except (TypeError, RecursionError):  # too deep, not text, a number without end, or no JSON
        raise EngineError("the engine's answer cannot be written as JSON") from None
    if size > most:
        raise EngineError(f"the engine's answer is too large: {size} bytes where {most} are left")
    return size


def _parsed(adapter: TypeAdapter[_Parsed], value: Any) -> _Parsed:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise EngineError(
            f"the engine's answer is no chat completion: {where[:80]}: {first['msg'][:120]}"
        ) from None


def _check_indices(indices: Sequence[int], body: ChatBody) -> None:
    num_choices = int(body.get("n") or 1)
    if len(set(indices)) < len(indices) or max(indices) >= num_choices:
        raise EngineError(
            f"the engine's answer has choices {list(indices)[:8]}; {num_choices} were asked for"
        )
