"""Tools of one's own, as a user would write them, for tools of the type `custom`."""

from __future__ import annotations

import time
from typing import Any, ClassVar

from serve_app.config.tools import CustomToolConfig
from serve_app.errors import ToolRetry
from serve_app.schemas import Effects
from serve_app.tools.base import Function, ManyFunctions, Tool, ToolResult


def parameters(**properties: Any) -> dict[str, Any]:
    """A closed schema in which everything is required."""
    return {
        "type": "object",
        "properties": properties,
        "required": sorted(properties),
        "additionalProperties": False,
    }


class Mood(Tool):
    """Says whether a text is glad."""

    parameters: ClassVar[dict[str, Any]] = parameters(query={"type": "string"})

    def __init__(self, config: CustomToolConfig, glad: str = "good") -> None:
        super().__init__(config)
        self._glad = glad

    def run(self, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        if not arguments["query"]:
            raise ToolRetry("the text is empty")
        return ToolResult("glad" if self._glad in arguments["query"] else "sad")


class Notes(ManyFunctions):
    """Keeps notes: one function without effects, and one of each other kind."""

    def functions(self) -> tuple[Function, ...]:
        number = parameters(number={"type": "number", "maximum": 10})
        return (
            Function("read_note", "Read the note of a number.", number),
            Function("write_note", "Write a note.", number, Effects.IDEMPOTENT),
            Function("send_note", "Send a note to everybody.", number, Effects.ONCE),
        )

    def call(self, function: str, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        return ToolResult(f"{function} {arguments['number']}")


class Named(ManyFunctions):
    """Functions whose names and schemas the settings give."""

    def __init__(self, config: CustomToolConfig, names: list[str], schema: Any = None) -> None:
        super().__init__(config)
        self._functions = tuple(
            Function(name, f"Does {name}.", parameters() if schema is None else schema)
            for name in names
        )

    def functions(self) -> tuple[Function, ...]:
        return self._functions

    def call(self, function: str, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        return ToolResult(function)


class Broken(Mood):
    """Cannot be made."""

    def __init__(self, config: CustomToolConfig) -> None:
        raise RuntimeError("the secret of /srv/secret")


NOTHING = object()


class Slow(Tool):
    """Takes longer than anybody waits."""

    parameters: ClassVar[dict[str, Any]] = parameters()

    def run(self, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        time.sleep(600)
        return ToolResult("late")
