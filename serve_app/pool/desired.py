"""The desired pool: the file's models, tools, patterns and rules, and what admins changed.

The store holds it, one revision after another (`serve_app.store.pool`); the controller brings the
cluster there. A member that an admin changed stays as the admin left it until the file's own text
of that member changes: the later word counts. All rules together are one member. Every revision is
a configuration that can work. What a member may name is up to the file (`AllowList`), when it is
added and when it is read again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter, ValidationError

from serve_app.config import AtlasConfig, ModelConfig, PriceConfig
from serve_app.config.patterns.check import check_pattern
from serve_app.config.patterns.language import PatternConfig
from serve_app.config.rule_check import check_rules
from serve_app.config.rules import Rules
from serve_app.config.tools import ToolConfig, ToolsetConfig
from serve_app.errors import ConfigError, Conflict, InvalidRequest, NotFound, StoreError
from serve_app.pool.allow_list import AllowList
from serve_app.schemas import NO_TOOL, Pair
from serve_app.store import PoolRevision, Store, add_pool, newest_pool
from serve_app.tools.builtin.toolset import check_tools

logger = logging.getLogger(__name__)

Json = dict[str, Any]
Members = dict[str, Json]
"""Id to settings, in the pool's order."""
WrittenRules = tuple[Json, ...]
"""Rules as JSON, in their order."""

_TRIES = 20
_MODEL: TypeAdapter[ModelConfig] = TypeAdapter(ModelConfig)
_TOOL: TypeAdapter[ToolConfig] = TypeAdapter(ToolConfig)
_RULES: TypeAdapter[Rules] = TypeAdapter(Rules)


def members_of(config: AtlasConfig) -> tuple[Members, Members, Members]:
    """Models, tools and patterns of a configuration by id, as JSON."""
    return (
        {model.model_id: model.model_dump(mode="json") for model in config.models},
        {tool.tool_id: tool.model_dump(mode="json") for tool in config.tools},
        {pattern.name: pattern.as_written() for pattern in config.patterns},
    )


def written_rules(config: AtlasConfig) -> WrittenRules:
    """The rules of a configuration as JSON."""
    return tuple(rule.model_dump(mode="json", exclude_unset=True) for rule in config.rules)


def with_pool(
    config: AtlasConfig,
    models: Members,
    tools: Members,
    patterns: Members,
    rules: WrittenRules = (),
) -> AtlasConfig:
    """A configuration with another pool.

    What elsewhere names a pair, model or tool that is not there is left out: the pool comes and
    goes, and what names its parts must not keep it from doing so. A pattern or rule stays: the one
    does not answer until what it names is there again, the other lets requests pass.

    Raises:
        InvalidRequest: If it cannot work; the message names the setting.
    """
    tools = {name: _with_known_members(of, tools) for name, of in tools.items()}
    tools = {name: of for name, of in tools.items() if of.get("members") != []}
    known = {NO_TOOL, *tools}
    admitted = []
    for settings in models.values():
        usable = [tool_id for tool_id in settings["tools"] if tool_id in known]
        admitted.append({**settings, "tools": usable or [NO_TOOL]})
    pairs = {Pair(model["model_id"], tool) for model in admitted for tool in model["tools"]}
    router = config.router
    changed: Json = {}
    if router.fallback is not None and Pair.parse(router.fallback) not in pairs:
        changed["fallback"] = None
    if router.planner not in models:
        changed["planner"] = None
    whole = {
        **{name: getattr(config, name) for name in AtlasConfig.model_fields},
        "models": admitted,
        "tools": list(tools.values()),
        "patterns": list(patterns.values()),
        "rules": rules,
        "pairs": tuple(card for card in config.pairs if Pair.parse(card.pair) in pairs),
        "router": router.model_copy(update=changed),
    }
    try:
        return AtlasConfig.model_validate(whole)
    except ValidationError as error:
        raise InvalidRequest(f"the pool cannot work so: {error.errors()[0]['msg']}") from None


def _with_known_members(tool: Json, tools: Members) -> Json:
    """A toolset with those of its members that are there; any other tool as it is."""
    if "members" not in tool:
        return tool
    return {**tool, "members": [name for name in tool["members"] if name in tools]}


class DesiredPool:
    """Reads and changes the pool that is wanted.

    Invariants:
        - A change is made on top of the newest revision, or made again.
        - What the store holds is a configuration that can work.
        - What is read of it names nothing that the file does not allow.
    """

    def __init__(self, config: AtlasConfig, store: Store) -> None:
        """Of a deployment.

        Args:
            config: As in its file.
            store: Holds the revisions.
        """
        self._config = config
        self._store = store
        self._allowed = AllowList(config)
        self._file_rules = _hash_of(written_rules(config))

    async def current(self) -> AtlasConfig:
        """The configuration with the pool that is wanted now.

        Raises:
            StoreError: If the store is away.
        """
        newest = await newest_pool(self._store)
        return self._as_allowed(*self._wanted(newest), self._wanted_rules(newest))

    def of(self, revision: PoolRevision) -> AtlasConfig:
        """The configuration with the pool of a revision, without what the file does not allow."""
        return self._as_allowed(*_members(revision), revision.rules)

    async def apply_file(self) -> PoolRevision:
        """Take over what changed in the file since it was last applied, and nothing else.

        Returns:
            The revision that has it.

        Raises:
            StoreError: If the store is away.
        """
        models, tools, patterns = members_of(self._config)
        file = {"models": models, "tools": tools, "patterns": patterns, "rules": self._file_rules}
        for _ in range(_TRIES):
            newest = await newest_pool(self._store)
            if newest is not None and newest.from_file == file:
                return newest
            rules = self._wanted_rules(newest)
            members = self._wanted(newest)
            written = await self._write(newest, *members, rules, file, "the configuration")
            if written is not None:
                return written
        raise StoreError("the pool is being changed by too many at once; try again")

    async def add_model(self, model: ModelConfig) -> int:
        """Add a model.

        Returns:
            The revision of the pool that has it.

        Raises:
            Conflict: If there is one of that id.
            InvalidRequest: If the pool cannot work with it, or the file does not allow it.
            StoreError: If the store is away.
        """
        self._allowed.check_model(model)

        def change(models: Members, tools: Members, patterns: Members) -> None:
            if model.model_id in models:
                raise Conflict(f"model {model.model_id!r} is in the pool; PUT changes it")
            _check_tools(model, tools)
            models[model.model_id] = model.model_dump(mode="json")

        return await self._change(f"added model {model.model_id}", change)

    async def update_model(self, model: ModelConfig) -> int:
        """Give a model other settings; as `add_model`, and `NotFound` without it."""
        self._allowed.check_model(model)

        def change(models: Members, tools: Members, patterns: Members) -> None:
            _find(models, "model", model.model_id)
            _check_tools(model, tools)
            models[model.model_id] = model.model_dump(mode="json")

        return await self._change(f"changed model {model.model_id}", change)

    async def set_price(self, model_id: str, price: PriceConfig) -> int:
        """Change what a model's tokens cost; the revision.

        Raises:
            NotFound: If there is no such model.
            StoreError: If the store is away.
        """

        def change(models: Members, tools: Members, patterns: Members) -> None:
            settings = _find(models, "model", model_id)
            models[model_id] = {**settings, "price": price.model_dump(mode="json")}

        return await self._change(f"changed the price of model {model_id}", change)

    async def remove_model(self, model_id: str) -> int:
        """Take a model out; the last one stays. Returns the revision.

        Raises:
            NotFound: If there is no such model.
            InvalidRequest: If it is the only one.
            StoreError: If the store is away.
        """

        def change(models: Members, tools: Members, patterns: Members) -> None:
            _find(models, "model", model_id)
            if len(models) == 1:
                raise InvalidRequest(f"model {model_id!r} is the only one, and a pool needs one")
            del models[model_id]

        return await self._change(f"removed model {model_id}", change)

    async def add_tool(self, tool: ToolConfig, model_ids: tuple[str, ...] | None) -> int:
        """Add a tool.

        Args:
            tool: Its settings.
            model_ids: Models that may work with it; `None` is all that answer.

        Returns:
            The revision of the pool that has it.

        Raises:
            Conflict: If there is one of that id.
            InvalidRequest: If the file does not allow it.
            NotFound: If there is no such model.
            StoreError: If the store is away.
        """
        self._allowed.check_tool(tool)
        tool_id = tool.tool_id

        def change(models: Members, tools: Members, patterns: Members) -> None:
            if tool_id in tools:
                raise Conflict(f"tool {tool_id!r} is in the pool; remove it first")
            _check_members(tool, tools)
            tools[tool_id] = tool.model_dump(mode="json")
            try:
                check_tools(with_pool(self._config, models, tools, patterns).tools)
            except ConfigError as error:
                raise InvalidRequest(error.message, "tool") from None
            answering = [name for name, of in models.items() if of["role"] == "chat"]
            for model_id in answering if model_ids is None else model_ids:
                settings = _find(models, "model", model_id)
                if tool_id not in settings["tools"]:
                    models[model_id] = {**settings, "tools": [*settings["tools"], tool_id]}

        return await self._change(f"added tool {tool_id}", change)

    async def remove_tool(self, tool_id: str) -> int:
        """Take a tool out, and its pairs with it; the revision.

        Raises:
            NotFound: If there is no such tool.
            StoreError: If the store is away.
        """

        def change(models: Members, tools: Members, patterns: Members) -> None:
            _find(tools, "tool", tool_id)
            del tools[tool_id]
            for model_id, settings in models.items():
                kept = [name for name in settings["tools"] if name != tool_id]
                models[model_id] = {**settings, "tools": kept or [NO_TOOL]}

        return await self._change(f"removed tool {tool_id}", change)

    async def put_pattern(self, pattern: PatternConfig) -> tuple[int, bool]:
        """Add a pattern, or give one other nodes.

        Returns:
            The revision of the pool that has it, and whether it is new.

        Raises:
            InvalidRequest: If it cannot run on the pool that is wanted, or the file does not allow
                it.
            StoreError: If the store is away.
        """
        self._allowed.check_pattern(pattern)
        is_new = True

        def change(models: Members, tools: Members, patterns: Members) -> None:
            nonlocal is_new
            is_new = pattern.name not in patterns
            patterns[pattern.name] = pattern.as_written()
            config = with_pool(self._config, models, tools, patterns)
            try:
                check_pattern(pattern, {of.name: of for of in config.patterns}, config)
            except ConfigError as error:
                raise InvalidRequest(error.message) from None

        return await self._change(f"pattern {pattern.name}", change), is_new

    async def remove_pattern(self, name: str) -> int:
        """Take a pattern out; those that ask it do not answer any more. Returns the revision.

        Raises:
            NotFound: If there is no such pattern.
            StoreError: If the store is away.
        """

        def change(models: Members, tools: Members, patterns: Members) -> None:
            _find(patterns, "pattern", name)
            del patterns[name]

        return await self._change(f"removed pattern {name}", change)

    async def put_rules(self, rules: Rules) -> int:
        """Put other rules in place of all there are; the revision.

        Raises:
            InvalidRequest: If one names what the wanted pool does not have, or its calibration is
                of another encoder or of other utterances.
            StoreError: If the store is away.
        """
        written = tuple(rule.model_dump(mode="json", exclude_unset=True) for rule in rules)

        def check(models: Members, tools: Members, patterns: Members) -> None:
            try:
                check_rules(with_pool(self._config, models, tools, patterns, written))
            except ConfigError as error:
                raise InvalidRequest(error.message, "rules") from None

        return await self._change(f"{len(rules)} rules", check, written)

    def _as_allowed(
        self, models: Members, tools: Members, patterns: Members, rules: WrittenRules
    ) -> AtlasConfig:
        """The configuration with these, less what the file does not allow.

        If the rest cannot work, the file's own pool is used.
        """
        check_model, check_tool = self._allowed.check_model, self._allowed.check_tool
        check_nodes = self._allowed.check_pattern
        models = _kept(models, "model", lambda of: check_model(_MODEL.validate_python(of)))
        tools = _kept(tools, "tool", lambda of: check_tool(_TOOL.validate_python(of)))
        patterns = _kept(
            patterns, "pattern", lambda of: check_nodes(PatternConfig.model_validate(of))
        )
        try:
            _RULES.validate_python(rules)
        except ValidationError as error:
            logger.error("the rules are left out: %s", error.errors()[0]["msg"])
            rules = ()
        try:
            return with_pool(self._config, models, tools, patterns, rules)
        except InvalidRequest as error:
            logger.error("the file's own pool is used: %s", error.message)
            return self._config

    def _wanted(self, newest: PoolRevision | None) -> tuple[Members, Members, Members]:
        """A revision's models, tools and patterns, with what changed in the file since."""
        models, tools, patterns = members_of(self._config)
        if newest is None:
            return models, tools, patterns
        held_models, held_tools, held_patterns = _members(newest)
        before = newest.from_file
        return (
            _merged(held_models, before["models"], models),
            _merged(held_tools, before["tools"], tools),
            _merged(held_patterns, before.get("patterns", {}), patterns),
        )

    def _wanted_rules(self, newest: PoolRevision | None) -> WrittenRules:
        """A revision's rules, or the file's where those changed since."""
        if newest is None or newest.from_file.get("rules", "") != self._file_rules:
            return written_rules(self._config)
        return newest.rules

    async def _change(
        self,
        what: str,
        change: Callable[[Members, Members, Members], None],
        rules: WrittenRules | None = None,
    ) -> int:
        """Make a change on top of the newest revision; the revision it is in.

        Args:
            what: The change, in words.
            change: Makes it.
            rules: The new rules; `None`: they stay.
        """
        for _ in range(_TRIES):
            newest = await newest_pool(self._store) or await self.apply_file()
            members = _members(newest)
            change(*members)
            kept = newest.rules if rules is None else rules
            with_pool(self._config, *members, kept)
            written = await self._write(newest, *members, kept, newest.from_file, what)
            if written is not None:
                return written.revision
        raise StoreError("the pool is being changed by too many at once; try again")

    async def _write(
        self,
        newest: PoolRevision | None,
        models: Members,
        tools: Members,
        patterns: Members,
        rules: WrittenRules,
        from_file: Json,
        change: str,
    ) -> PoolRevision | None:
        """The next revision, as written; `None` if somebody else was first."""
        return await add_pool(
            self._store,
            1 if newest is None else newest.revision + 1,
            models=tuple(models.values()),
            tools=tuple(tools.values()),
            patterns=tuple(patterns.values()),
            rules=rules,
            from_file=from_file,
            change=change,
        )


def _members(revision: PoolRevision) -> tuple[Members, Members, Members]:
    return (
        {settings["model_id"]: settings for settings in revision.models},
        {settings["tool_id"]: settings for settings in revision.tools},
        {settings["name"]: settings for settings in revision.patterns},
    )


def _hash_of(rules: WrittenRules) -> str:
    """SHA-256 of rules; empty of none."""
    return hashlib.sha256(json.dumps(rules).encode()).hexdigest() if rules else ""


def _merged(held: Members, before: Members, file: Members) -> Members:
    """What is held, with what changed in the file since it was last applied."""
    merged = {
        name: settings for name, settings in held.items() if name in file or name not in before
    }
    return merged | {
        name: settings for name, settings in file.items() if before.get(name) != settings
    }


def _kept(members: Members, kind: str, check: Callable[[Json], None]) -> Members:
    """Those that pass a check; the others are logged."""
    kept = {}
    for name, settings in members.items():
        try:
            check(settings)
        except (InvalidRequest, ValidationError) as error:
            reason = error.message if isinstance(error, InvalidRequest) else "settings out of range"
            logger.error("%s %r is left out of the pool: %s", kind, name, reason)
        else:
            kept[name] = settings
    return kept


def _find(members: Members, kind: str, name: str) -> Json:
    if name not in members:
        raise NotFound(f"there is no {kind} {name!r} in the pool")
    return members[name]


def _check_members(tool: ToolConfig, tools: Members) -> None:
    for name in tool.members if isinstance(tool, ToolsetConfig) else ():
        if name not in tools:
            raise InvalidRequest(
                f"toolset {tool.tool_id!r} names tool {name!r}; the pool has: {sorted(tools)}",
                "tool.members",
            )


def _check_tools(model: ModelConfig, tools: Members) -> None:
    for tool_id in model.tools:
        if tool_id != NO_TOOL and tool_id not in tools:
            raise InvalidRequest(
                f"model {model.model_id!r} names tool {tool_id!r}; "
                f"the pool has: {sorted({NO_TOOL, *tools})}",
                "tools",
            )
