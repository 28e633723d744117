"""Tool calls as models write them: read with care, and told apart from answers.

A call that an engine's parser cannot read comes as text. Such a text is never an answer: where
tools were offered, a reply with a call's mark in it, or with the beginning or the end of a call's
JSON, is a failed call. Where no tool was offered a text is passed on as it is, because it may well
be about tool calls.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Sequence
from typing import Any

from serve_app.errors import ToolRetry, UnreadableCall
from serve_app.models.reply import ChoicePiece

_MARKS = ("<tool_call", "</tool_call", "[TOOL_CALLS]", "<|python_tag|>", "<function=", "</function")
"""How the formats that vLLM's parsers read begin and end a call; parts of it in a text show that
the parser did not read it."""
_LONGEST_MARK = max(map(len, _MARKS))
_HOLD_CHARS = 512
"""Calls that cannot be read are short: a longer text is passed on as it comes."""
_MAX_ARGUMENTS_CHARS = 1 << 17
_MAX_DEPTH = 32
_MAX_DIGITS = 308
"""Of a whole number: with more, what takes it for a float fails in ways of its own."""

UNREADABLE = "the model wrote a tool call that cannot be read"


def read_arguments(text: str) -> dict[str, Any]:
    """A call's arguments.

    Args:
        text: As the model wrote them.

    Raises:
        ToolRetry: If they are no JSON object, or one that is too large or too deep.
    """
    if len(text) > _MAX_ARGUMENTS_CHARS:
        raise ToolRetry(f"the arguments are longer than {_MAX_ARGUMENTS_CHARS} characters")
    try:
        arguments = json.loads(
            text or "{}", parse_constant=_no_constant, parse_float=_float, parse_int=_int
        )
        depth = _depth(arguments)
    except json.JSONDecodeError as error:
        raise ToolRetry(f"the arguments are not JSON: {error.msg}") from None
    except RecursionError:
        depth = _MAX_DEPTH + 1
    except ValueError:  # NaN, or a number that others cannot read
        raise ToolRetry("the arguments are not JSON: a number is out of range") from None
    if depth > _MAX_DEPTH:
        raise ToolRetry(f"the arguments are nested more than {_MAX_DEPTH} deep")
    if not isinstance(arguments, dict):
        raise ToolRetry("the arguments must be a JSON object")
    return arguments


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError("no number of double precision")
    return number


def _int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError("no number of double precision")
    return int(digits)


def _depth(value: Any) -> int:
    """How deep a parsed value is nested; counts no further than what is too deep."""
    depth, level = 0, [value]
    while level and depth <= _MAX_DEPTH:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth


def looks_like_call(text: str, names: Collection[str]) -> bool:
    """Whether a reply is, or holds, a call that the engine's parser did not read.

    Args:
        text: A model's text, where tools were offered.
        names: Of the tools that were offered.
    """
    if any(mark in text for mark in _MARKS):
        return True
    end = text.rstrip()
    if end.endswith("}}") and text.count("}") > text.count("{"):
        return True  # the end of a call whose beginning went into a call that was read, or nowhere
    begin = re.match(r'\s*(?:```(?:json)?\s*)?\{\s*"name"\s*:\s*"([^"\n]{1,256})"', text)
    return begin is not None and begin[1] in names


class ReplyGate:
    """Holds the pieces of a reply back until they are known to be no call.

    That is at the end of a short reply, and after `_HOLD_CHARS` of a longer one. A mark that comes
    in what was thought to be an answer ends the stream with an error.
    """

    def __init__(self, names: Collection[str], *, passes_calls: bool) -> None:
        """Begin shut.

        Args:
            names: Of the tools that were offered.
            passes_calls: Whether calls that were read are part of the answer.
        """
        self._names = names
        self._passes_calls = passes_calls
        self._held: list[Sequence[ChoicePiece]] = []
        self._texts: dict[int, str] = {}
        """By choice: its text until it is judged, the last few characters afterwards."""
        self._stays_shut = False
        self.is_open = False

    def feed(self, choices: Sequence[ChoicePiece]) -> list[Sequence[ChoicePiece]]:
        """Take a piece; give those that can go on.

        Raises:
            UnreadableCall: If it shows that what went on was no answer.
        """
        if not self._stays_shut:
            for choice in choices:
                so_far = self._texts.get(choice.number, "")
                self._texts[choice.number] = so_far + (choice.text or "")
        if self.is_open:
            if any(mark in text for text in self._texts.values() for mark in _MARKS):
                raise UnreadableCall(UNREADABLE)
            self._forget()
            return [choices]
        self._held.append(choices)
        has_call = any(choice.calls for choice in choices)
        is_long = sum(map(len, self._texts.values())) > _HOLD_CHARS
        if self._stays_shut or not (is_long or (self._passes_calls and has_call)):
            return []
        self._stays_shut = any(looks_like_call(text, self._names) for text in self._texts.values())
        self._forget()
        if self._stays_shut:
            return []
        self.is_open = True
        return self.rest()

    def rest(self) -> list[Sequence[ChoicePiece]]:
        """What is held back still."""
        held, self._held = self._held, []
        return held

    def _forget(self) -> None:
        self._texts = {index: text[-_LONGEST_MARK:] for index, text in self._texts.items()}
