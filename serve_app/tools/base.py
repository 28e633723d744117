"""What a tool is: a typed description for models and a synchronous `run` inside a Ray worker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from serve_app.config.tools import ToolSettings
from serve_app.errors import ToolFailed
from serve_app.schemas import Effects, ToolKind

NO_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {},
    "required": [],
    "additionalProperties": False,
}
"""Schema of a tool that is never called with arguments."""

NO_OUTPUT = "[no output]"
"""What a tool that runs code says where the code printed nothing."""


@dataclass(frozen=True)
class Function:
    """What a model may call of a tool."""

    name: str
    """Unique among the functions that are offered together."""

    description: str

    parameters: dict[str, Any]
    """A JSON schema of an object with `additionalProperties` false."""

    effects: Effects = Effects.NONE
    """What a call does to the world outside its sandbox; decides whether a call that was lost is
    made again."""

    def schema(self) -> dict[str, Any]:
        """The function as an entry of OpenAI's `tools`."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": self.parameters,
            },
        }


@dataclass(frozen=True)
class ToolResult:
    """What one call produced; crosses process borders."""

    text: str
    """What the model sees; never longer than the tool's `max_result_chars`."""

    data: dict[str, Any] = field(default_factory=dict)
    """JSON-able details, for example `{"sources": [...]}`."""

    seconds: float = 0.0
    """Wall time of the call as the gateway saw it."""

    cost_usd: float = 0.0
    """Price of the call, in US dollars."""


class Tool(ABC):
    """One capability, built from its settings inside the process that runs it.

    Most tools are one function, which has the tool's name: they have `parameters` and `run`. A tool
    of several functions is a `ManyFunctions`.

    Invariants:
        - `parameters` is a JSON schema of an object with `additionalProperties` false; arguments
          are checked against it before `run` is dispatched, so `run` may rely on it.
        - `run` raises only `ToolRetry` (the model may try again), `ToolFailed` or `ToolTimeout`.
        - `run` ends at its deadline, and so does everything it started.
        - `run` of a tool with effects raises `ToolRetry` only before the effect.
    """

    parameters: ClassVar[dict[str, Any]] = NO_PARAMETERS

    reads_functions: ClassVar[bool] = False
    """Whether `functions` reads a file, the first time: event loops have a thread call it."""

    def __init__(self, config: ToolSettings) -> None:
        """Keep the settings; heavy state is made in `warm`.

        Args:
            config: The tool's settings.
        """
        self.config = config

    @property
    def tool_id(self) -> str:
        """The tool's name in the pool."""
        return self.config.tool_id

    @property
    def description(self) -> str:
        """What the tool does, for models and the router."""
        return self.config.description

    @property
    def kind(self) -> ToolKind:
        """How the tool joins a model."""
        return self.config.kind

    def functions(self) -> tuple[Function, ...]:
        """What a model may call; the same in every process, and cheap, see `reads_functions`."""
        effects = self.config.effects
        return (Function(self.tool_id, self.description, self.parameters, effects),)

    def warm(self) -> None:
        """Load what the first call would otherwise wait for; calling it again costs nothing."""
        return

    @abstractmethod
    def run(self, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        """Do the work.

        Args:
            arguments: Valid against `parameters`.
            deadline_s: Seconds from now until the result is worthless.

        Returns:
            The result; the runner fills in seconds and cost.

        Raises:
            ToolRetry: If other arguments could succeed.
            ToolFailed: If the call failed for good; `ToolTimeout` when time ran out.
        """

    def call(self, function: str, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        """Call one of the functions; see `run`, which is the only one of most tools.

        Args:
            function: Its name.
            arguments: Valid against its parameters.
            deadline_s: Seconds from now until the result is worthless.

        Raises:
            ToolRetry, ToolFailed: As `run`.
        """
        return self.run(arguments, deadline_s)

    def recorded(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What reports and traces keep of a call's arguments: all of them, for most tools."""
        return arguments

    def clip(self, text: str) -> str:
        """Bound a text for the model to `max_result_chars`, saying what was cut."""
        limit = self.config.max_result_chars
        if len(text) <= limit:
            return text
        note = f"\n[cut: {len(text)} characters]"
        return text[: limit - len(note)] + note


class ManyFunctions(Tool):
    """A tool of several functions: `functions` and `call` are its own."""

    @abstractmethod
    def functions(self) -> tuple[Function, ...]:
        """What a model may call; cheap, and the same in every process."""

    @abstractmethod
    def call(self, function: str, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        """Call one of the functions; see `Tool.call`."""

    def run(self, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        """Refuse: there is no one function.

        Raises:
            ToolFailed: Always.
        """
        raise ToolFailed(f"tool {self.tool_id!r} has several functions; name one")
