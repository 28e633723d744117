"""A whole deployment: the rooms' settings, and what has to fit together across them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

from pydantic import Field, model_validator

from serve_app.config.base import BaseConfig
from serve_app.config.context import ContextConfig
from serve_app.config.embedder import EmbedderConfig
from serve_app.config.gateway import GatewayConfig
from serve_app.config.models import (
    CustomModelConfig,
    LocalModelConfig,
    ModelConfig,
    PairCardConfig,
    RemoteModelConfig,
)
from serve_app.config.patterns.language import PatternConfig
from serve_app.config.pool import PoolConfig
from serve_app.config.router import RouterConfig
from serve_app.config.rules import Rules
from serve_app.config.store import SnapshotsPlace, StoreConfig
from serve_app.config.telemetry import TelemetryConfig
from serve_app.config.tools import BestOfConfig, ToolConfig, ToolsetConfig
from serve_app.schemas import NO_TOOL, Pair

DATA_FOLDER = ".atlas-serve"
"""Name of the folder for the deployment's data, in the user's home, if no other is configured."""


class AtlasConfig(BaseConfig):
    """A whole deployment."""

    models: tuple[ModelConfig, ...] = Field(min_length=1, max_length=256)
    tools: tuple[ToolConfig, ...] = Field(default=(), max_length=256)
    pairs: tuple[PairCardConfig, ...] = ()
    """Cards of single pairs."""
    patterns: tuple[PatternConfig, ...] = Field(default=(), max_length=64)
    """Ways to answer with several calls. In a file: names of files, or of folders with them."""
    rules: Rules = ()
    """What decides before the learned rules, in its order, and a default as the last."""
    embedder: EmbedderConfig = EmbedderConfig()
    router: RouterConfig = RouterConfig()
    gateway: GatewayConfig = GatewayConfig()
    context: ContextConfig = ContextConfig()
    store: StoreConfig = StoreConfig()
    pool: PoolConfig = PoolConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    data_dir: str = f"~/{DATA_FOLDER}"
    """Folder of the store and the caches. `ATLAS_DATA_DIR` in the environment wins."""

    @model_validator(mode="after")
    def _names_fit_together(self) -> Self:
        for kind, ids in (
            ("model_id", [model.model_id for model in self.models]),
            ("tool_id", [tool.tool_id for tool in self.tools]),
        ):
            repeated = [name for name, count in Counter(ids).items() if count > 1]
            if repeated:
                raise ValueError(f"{kind} {repeated[0]!r} is used more than once; ids are unique")
        if any(model.model_id == "atlas" for model in self.models):
            raise ValueError("model_id 'atlas' is taken: it is the name that routes")
        known = {NO_TOOL, *(tool.tool_id for tool in self.tools)}
        for model in self.models:
            for tool_id in model.tools:
                if tool_id not in known:
                    raise ValueError(
                        f"model {model.model_id!r} names tool {tool_id!r}; "
                        f"configured: {sorted(known)}"
                    )
        pairs = set(self.all_pairs())
        named = [("pairs", card.pair) for card in self.pairs]
        if self.router.fallback is not None:
            named.append(("router.fallback", self.router.fallback))
        for where, pair in named:
            if Pair.parse(pair) not in pairs:
                raise ValueError(
                    f"{where}: {pair!r} is no pair of a configured model and one of its tools"
                )
        return self

    @model_validator(mode="after")
    def _members_are_function_tools(self) -> Self:
        tools = {tool.tool_id: tool for tool in self.tools}
        for toolset in (tool for tool in self.tools if isinstance(tool, ToolsetConfig)):
            for name in toolset.members:
                if name not in tools:
                    raise ValueError(
                        f"toolset {toolset.tool_id!r} names tool {name!r}; "
                        f"configured: {sorted(tools)}"
                    )
                if tools[name].kind != "function" or isinstance(tools[name], ToolsetConfig):
                    raise ValueError(
                        f"toolset {toolset.tool_id!r}: {name!r} is no tool with functions of its "
                        "own; members are tools of the kind 'function', and no toolsets"
                    )
        return self

    @model_validator(mode="after")
    def _roles_fit_together(self) -> Self:
        roles = {model.model_id: model.role for model in self.models}
        if "chat" not in roles.values():
            raise ValueError("every model is a verifier; a pool needs one that answers")
        planner = self.router.planner
        if planner is not None and roles.get(planner) != "chat":
            raise ValueError(f"router.planner: {planner!r} is no configured model")
        summarizer = self.context.summarizer
        if summarizer is not None and roles.get(summarizer) != "chat":
            raise ValueError(f"context.summarizer: {summarizer!r} is no configured model")
        for model in self.models:
            helps = model.role == "verifier" or model.model_id == planner
            if helps and model.autoscaling.min_replicas == 0:
                raise ValueError(
                    f"model {model.model_id!r}: a verifier or planner cannot scale to zero, "
                    "because no other model takes its place while it starts"
                )
        for tool in self.tools:
            verifier = tool.verifier if isinstance(tool, BestOfConfig) else None
            if verifier is not None and roles.get(verifier) != "verifier":
                raise ValueError(
                    f"tool {tool.tool_id!r}: {verifier!r} is no configured model with the role "
                    "'verifier'"
                )
        return self

    @model_validator(mode="after")
    def _content_is_kept_where_it_is_told(self) -> Self:
        tracing = self.telemetry.tracing
        if tracing is not None and tracing.content and not self.store.keep_content:
            raise ValueError("telemetry.tracing.content: needs store.keep_content, which is off")
        return self

    def all_pairs(self) -> tuple[Pair, ...]:
        """Every configured pair, in configuration order."""
        return tuple(
            Pair(model.model_id, tool_id)
            for model in self.models
            if model.role == "chat"
            for tool_id in model.tools
        )

    def all_candidates(self) -> tuple[Pair, ...]:
        """Every configured pair, and then every routable pattern."""
        routable = (pattern.name for pattern in self.patterns if pattern.routable)
        return (*self.all_pairs(), *map(Pair.of_pattern, routable))

    def called_tools(self, tool_id: str) -> tuple[ToolConfig, ...]:
        """The tools that calls of a tool go to: the members of a toolset, or the tool itself.

        Returns:
            Empty where there is no such tool.
        """
        tools = {tool.tool_id: tool for tool in self.tools}
        tool = tools.get(tool_id)
        if isinstance(tool, ToolsetConfig):
            return tuple(tools[name] for name in tool.members)
        return () if tool is None else (tool,)

    def usd_per_tool_call(self, tool_id: str) -> float:
        """US dollars of one call of a tool; of a toolset's dearest member."""
        return max((tool.price_usd_per_call for tool in self.called_tools(tool_id)), default=0.0)

    def model(self, model_id: str) -> LocalModelConfig | RemoteModelConfig | CustomModelConfig:
        """The settings of one model.

        Raises:
            KeyError: If there is no such model.
        """
        for model in self.models:
            if model.model_id == model_id:
                return model
        raise KeyError(model_id)

    def store_url(self) -> str:
        """The store's SQLAlchemy URL, environment filled in, SQLite paths absolute."""
        url = os.path.expandvars(self.store.url)
        prefix, slashes, path = url.partition(":///")
        if prefix.startswith("sqlite") and slashes and not path.startswith("/"):
            return f"{prefix}:///{self.data_path() / path}"
        return url

    def journal_path(self) -> Path:
        """The folder of the outcomes' journal, absolute."""
        return self.data_path() / self.store.journal_dir

    def snapshots_path(self) -> SnapshotsPlace:
        """Where the router snapshots are, the environment filled in."""
        location = os.path.expandvars(self.store.snapshots_dir)
        if "://" not in location:
            return SnapshotsPlace(self.data_path() / location)
        url = urlsplit(location)
        if url.scheme == "file":
            return SnapshotsPlace(Path(unquote(url.path)))
        return SnapshotsPlace(self.data_path() / "snapshots", location.rstrip("/"))

    def data_path(self) -> Path:
        """The data folder, made absolute."""
        return Path(os.environ.get("ATLAS_DATA_DIR", self.data_dir)).expanduser().absolute()
