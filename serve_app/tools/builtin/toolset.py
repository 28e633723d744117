"""Several tools under one id; their functions must have different names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from serve_app.config.tools import CustomToolConfig, ToolConfig, ToolsetConfig
from serve_app.errors import ConfigError, ToolFailed
from serve_app.tools.base import Function, ManyFunctions, Tool, ToolResult


class Toolset(ManyFunctions):
    """What models and the router read of a toolset; its calls go to its members.

    The functions are the members', which the process that runs the tools knows.
    """

    def functions(self) -> tuple[Function, ...]:
        """None of its own."""
        return ()

    def call(self, function: str, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        """Refuse: the member is called.

        Raises:
            ToolFailed: Always.
        """
        raise ToolFailed(f"toolset {self.tool_id!r} has no function {function!r} of its own")


def functions_by_owner(
    toolset: str, members: Mapping[str, tuple[Function, ...]]
) -> dict[str, tuple[str, Function]]:
    """By name, each function with the member that has it.

    Args:
        toolset: Its id.
        members: The functions of each member.

    Raises:
        ConfigError: If two members have a function of one name.
    """
    owners: dict[str, tuple[str, Function]] = {}
    for member, functions in members.items():
        for function in functions:
            if function.name in owners:
                raise ConfigError(
                    f"toolset {toolset!r}: {owners[function.name][0]!r} and {member!r} both have a "
                    f"function {function.name!r}; names are unique in a toolset"
                )
            owners[function.name] = member, function
    return owners


def check_tools(configs: Iterable[ToolConfig]) -> None:
    """See that classes of your own can be made, and that no toolset has two functions of one name.

    Args:
        configs: Settings of every tool of the pool.

    Raises:
        ConfigError: If not; the message names the tools.
    """
    # Not at the top: the registry makes what is defined here.
    from serve_app.tools.registry import build_tool

    settings = {config.tool_id: config for config in configs}
    made: dict[str, Tool] = {}
    for config in settings.values():
        if isinstance(config, CustomToolConfig):
            made[config.tool_id] = build_tool(config)
    for config in settings.values():
        if isinstance(config, ToolsetConfig):
            for name in config.members:
                made[name] = made.get(name) or build_tool(settings[name])
            members = {name: _functions_of(made[name]) for name in config.members}
            functions_by_owner(config.tool_id, members)


def _functions_of(tool: Tool) -> tuple[Function, ...]:
    """What a tool can tell of its functions now; none where it cannot."""
    try:
        return tool.functions()
    except ToolFailed:
        return ()
