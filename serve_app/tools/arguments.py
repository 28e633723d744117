"""Checks a model's arguments against a function's JSON schema, in bounded time.

A schema may come from outside, and so its patterns: they run as RE2, in linear time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema
import re2
from jsonschema.protocols import Validator

from serve_app.errors import ToolRetry

_SHOWN_CHARS = 300


def _pattern(
    validator: Validator, pattern: str, instance: Any, schema: Any
) -> Iterator[jsonschema.ValidationError]:
    """A text that the pattern is not found in; what RE2 cannot read holds no text back."""
    if not isinstance(instance, str):
        return
    try:
        found = re2.search(pattern, instance)
    except re2.error:
        return
    if not found:
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


_Validator = jsonschema.validators.extend(  # type: ignore[no-untyped-call]
    jsonschema.Draft202012Validator, {"pattern": _pattern}
)


class ArgumentsCheck:
    """Of one function."""

    def __init__(self, function: str, parameters: dict[str, Any]) -> None:
        """Of a function with these parameters.

        Args:
            function: Its name, for the messages.
            parameters: A JSON schema of an object.
        """
        self._function = function
        self._validator = _Validator(parameters)

    def check(self, arguments: Any) -> None:
        """See that arguments fit.

        Raises:
            ToolRetry: If they do not; says what to change.
        """
        try:
            error = jsonschema.exceptions.best_match(self._validator.iter_errors(arguments))
        except (ArithmeticError, RecursionError):  # a number of hundreds of digits
            raise ToolRetry(f"tool {self._function!r}: a value is out of range") from None
        if error is None:
            return
        where = ".".join(str(part) for part in error.absolute_path)
        reason = error.message
        if len(reason) > _SHOWN_CHARS:  # both ends: the value comes first, what is wrong last
            half = _SHOWN_CHARS // 2
            reason = f"{reason[:half]} … {reason[-half:]}"
        raise ToolRetry(f"tool {self._function!r}: {f'{where}: ' if where else ''}{reason}")
