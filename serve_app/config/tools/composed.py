"""Settings of tools that are made of others: several offered as one, and classes of your own."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from serve_app.config.tools.base import (
    IMPORT_PATH_PATTERN,
    MAX_DESCRIPTION_CHARS,
    TOOL_ID_PATTERN,
    ManyFunctionsSettings,
)

_MEMBERS_OWN = (
    "effects",
    "price_usd_per_call",
    "timeout_s",
    "num_cpus",
    "memory_bytes",
    "max_concurrency",
    "max_queued",
    "max_result_chars",
)
"""Settings that a call takes from the member whose function it calls."""


class ToolsetConfig(ManyFunctionsSettings):
    """The functions of several tools, offered together."""

    type: Literal["toolset"] = "toolset"
    kind: Literal["function"] = "function"
    description: str = Field(min_length=1, max_length=MAX_DESCRIPTION_CHARS)
    """What the tools are for together, in words; read by the router."""

    members: tuple[Annotated[str, Field(pattern=TOOL_ID_PATTERN)], ...] = Field(
        min_length=1, max_length=64
    )
    """Ids of function tools of the configuration. A call goes by its member's settings: price,
    limits, places."""

    @model_validator(mode="after")
    def _members_are_named_once(self) -> Self:
        if len(set(self.members)) < len(self.members):
            raise ValueError(f"members: each is named once, got {list(self.members)}")
        return self

    @model_validator(mode="after")
    def _calls_go_by_the_members(self) -> Self:
        for name in _MEMBERS_OWN:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: a call goes by its member's; set it there")
        return self


class CustomToolConfig(ManyFunctionsSettings):
    """A tool that is a class of your own, a subclass of `serve_app.tools.base.Tool`."""

    type: Literal["custom"] = "custom"
    kind: Literal["function", "context"] = "function"
    """`function` offers the tool to the model; `context` calls it with `{"query": …}` first, and
    puts its text before the question."""

    import_path: str = Field(pattern=IMPORT_PATH_PATTERN)
    """`module:Class`; the class is made with this configuration, and with `settings` as keyword
    arguments. Imported by gateways too, which read its functions."""

    settings: dict[str, Any] = Field(default_factory=dict)

    own_worker: bool = True
    """Whether its calls have worker processes of their own, because what the class loads takes a
    while; else they share those of the tools that load nothing."""

    @property
    def dedicated_worker(self) -> bool:
        """As `own_worker` says."""
        return self.own_worker
