"""What the settings of all tools have in common."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve_app.schemas import Effects, ToolKind

TOOL_ID_PATTERN = r"^[A-Za-z][A-Za-z0-9_-]{0,62}$"
IMPORT_PATH_PATTERN = r"^[\w.]+:\w+$"
"""`module:Class`."""
MAX_DESCRIPTION_CHARS = 4000
Examples = Annotated[tuple[Annotated[str, Field(max_length=2000)], ...], Field(max_length=256)]
"""Utterances of a card; each is embedded when the pool changes, beside the live queries."""

Phrases = dict[str, tuple[Annotated[str, Field(min_length=1, max_length=200)], ...]]
MAX_PHRASES = 2048
"""Of one tool. Each is embedded when its functions change."""


class ToolSettings(BaseModel):
    """What every kind of tool has. Unknown keys fail, values never change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    kind: ToolKind
    """How the tool joins a model; each type fixes it or its choices."""

    tool_id: str = Field(pattern=TOOL_ID_PATTERN)
    """Name used by clients, models, the router and the metrics; unique in the pool."""

    description: str = Field(default="", max_length=MAX_DESCRIPTION_CHARS)
    """What the tool does, in words; shown to models and read by the router."""

    examples: Examples = ()
    """Utterances that should reach this tool."""

    effects: Effects = Effects.NONE
    """What a call does to the world outside its sandbox: `none`; `idempotent`, which is no more
    when it is done twice; or `once`, which must not happen twice: only requests with an
    `Idempotency-Key` may make such a call. A tool of several functions may say of each what it
    does."""

    exposed: bool = False
    """Whether MCP clients may call the functions of this tool at `/mcp`; for tools of kind
    `function`. A function with `effects: once` is left out: MCP has no idempotency key."""

    price_usd_per_call: float = Field(default=0.0, ge=0, le=1000)
    """Price of one call, in US dollars."""

    timeout_s: float = Field(default=10.0, gt=0, le=3600)
    """Longest run of one call, in seconds; a caller's shorter deadline wins."""

    num_cpus: float = Field(default=0.1, ge=0)
    """CPUs each running call reserves in Ray."""

    memory_bytes: int | None = Field(default=None, gt=0)
    """Memory each running call reserves in Ray; `None` reserves nothing."""

    max_concurrency: int = Field(default=4, ge=1, le=256)
    """Calls running at once for one gateway replica."""

    max_queued: int = Field(default=64, ge=0, le=10_000)
    """Calls that may wait for a free place; more are refused as busy."""

    max_result_chars: int = Field(default=8192, ge=64, le=1 << 20)
    """Longest text a model gets back; the rest is cut and said to be."""

    @property
    def dedicated_worker(self) -> bool:
        """Whether its tasks get worker processes of their own, because a cold one is slow."""
        return False

    @model_validator(mode="after")
    def _only_functions_are_exposed(self) -> Self:
        if self.exposed and self.kind != "function":
            raise ValueError(
                f"exposed: tool {self.tool_id!r} is of kind {self.kind!r}; only tools of kind "
                "'function' can be called by MCP clients"
            )
        return self


class ManyFunctionsSettings(ToolSettings):
    """What tools have that may offer several functions."""

    top_k: int = Field(default=8, ge=1, le=128)
    """Functions a model is offered at once: where the tool has more, those that fit the query."""

    phrases: Phrases = Field(default_factory=dict, max_length=512)
    """How users ask for single functions, by the name under which each is offered. No model sees
    them: they help to select what fits a query. A name that the tool does not have is ignored."""

    @model_validator(mode="after")
    def _phrases_can_be_embedded(self) -> Self:
        if (number := sum(map(len, self.phrases.values()))) > MAX_PHRASES:
            raise ValueError(f"phrases: {number} together; at most {MAX_PHRASES}")
        return self
