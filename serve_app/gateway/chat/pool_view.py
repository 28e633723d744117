"""What callers see of the pool: names that exist, and OpenAI's list of models."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.capabilities import NO_NEEDS, UNKNOWN, Capabilities, Needs, common
from serve_app.config import AtlasConfig
from serve_app.config.abilities import abilities_of
from serve_app.config.patterns.bound import QUESTION_BYTES, bound_of
from serve_app.config.patterns.language import PatternConfig
from serve_app.config.rules import SemanticRuleConfig, fit_fault
from serve_app.errors import (
    ContextTooLong,
    Forbidden,
    InvalidRequest,
    ModelNotFound,
    NoCandidate,
)
from serve_app.gateway.chat.wire import ROUTED_MODEL
from serve_app.orchestrator.patterns.declared import check_call
from serve_app.router.rules.admission import Admission
from serve_app.schemas import (
    NO_TOOL,
    AccessLists,
    ChatCall,
    MemberState,
    ModelMember,
    Pair,
    PatternMember,
    PoolState,
)

Json = dict[str, Any]

_NEEDED = {
    "messages": "look at pictures",
    "response_format": "be held to a JSON schema",
    "tools": "call functions of the caller's",
}
"""What a model has to do because of a field."""


class PoolView:
    """The pool at one version, indexed by name."""

    def __init__(self, pool: PoolState, config: AtlasConfig) -> None:
        """Index a pool; `config` has the prices."""
        self.pool = pool
        self._config = config
        self._members = {member.model_id: member for member in pool.models}
        self._pairs = {str(pair): pair for pair in pool.pairs}
        self._patterns = {str(pattern.pair): pattern for pattern in pool.patterns}
        self._tools = frozenset(pool.tools) | {pair.tool_id for pair in pool.pairs}
        self._abilities = abilities_of(config)
        self._common = common([UNKNOWN, *self._abilities.values()])
        plain = (Pair(model_id, NO_TOOL) for model_id in self._members)
        routable = pool.candidates()
        named = tuple(dict.fromkeys([*routable, *plain, *(p.pair for p in pool.patterns)]))
        self._named = {pair: number for number, pair in enumerate(named)}
        self._admission = Admission(named)
        self._routable = np.arange(len(routable), dtype=np.intp)

    def check_names(self, call: ChatCall) -> None:
        """Refuse a call whose allow-lists name what is not there.

        Raises:
            InvalidRequest: If one does.
        """
        self._check_names(call.limits.models, {**self._members, **self._patterns}, "models")
        self._check_names(call.limits.tools, self._tools, "tools")

    def within(self, call: ChatCall, denied: AccessLists, of_key: AccessLists) -> ChatCall:
        """A call whose allow-lists leave what its deny-lists and its key's lists leave.

        Args:
            call: As the caller sent it.
            denied: The caller's deny-lists.
            of_key: What the caller's key may use.

        Raises:
            InvalidRequest: If a deny-list names what is not there.
            Forbidden: If the key may not use what the call names as its model.
        """
        models = frozenset([*self._members, *self._patterns])
        self._check_names(denied.not_models, models, "not_models")
        self._check_names(denied.not_tools, self._tools, "not_tools")
        pinned = None if call.model == ROUTED_MODEL else Pair.parse(call.model)
        limits = call.limits
        for lists in (of_key, denied):
            may_models, may_tools = lists.allowed_models(models), lists.allowed_tools(self._tools)
            if lists is of_key and pinned is not None:
                _check_key(pinned, may_models, may_tools)
            if may_models is not None:
                kept = models if limits.models is None else limits.models
                limits = replace(limits, models=kept & may_models)
            if may_tools is not None:
                kept = self._tools if limits.tools is None else limits.tools
                limits = replace(limits, tools=kept & may_tools)
        return call if limits is call.limits else replace(call, limits=limits)

    def check(self, call: ChatCall) -> None:
        """Refuse a call that names what is not there.

        Raises:
            ModelNotFound: If `model` names nothing in the pool.
            NoCandidate: If it names a model that does not answer now.
            InvalidRequest: If an allow-list names what is not there, or forbids the pinned pair; or
                if nothing that may answer can take what the call needs.
        """
        limits, needs = call.limits, call.needs
        if call.model == ROUTED_MODEL:
            if self._common.take(needs):
                return
            listed = self._admission.listed(limits, self._routable)
            self._check_needs(needs, self._routable[listed], "no model that may answer can")
            return
        if call.model in self._patterns:
            self._check_pattern(call)
            pinned = self._named[self._patterns[call.model].pair]
            self._check_needs(
                needs, np.array([pinned], np.intp), f"the pattern {call.model!r} cannot"
            )
            return
        pair = self._pairs.get(call.model)
        member = self._members.get(call.model if pair is None else pair.model_id)
        if member is None:
            raise ModelNotFound(
                f"the model {_shortened(call.model)!r} does not exist; see /v1/models", "model"
            )
        if member.state is not MemberState.READY:
            reason = f": {member.reason}" if member.reason else ""
            raise NoCandidate(f"model {member.model_id!r} is {member.state}{reason}", "model")
        if limits.models is not None and member.model_id not in limits.models:
            raise InvalidRequest(
                f"atlas.models does not allow the pinned model {member.model_id!r}", "atlas.models"
            )
        if pair is not None and limits.tools is not None and pair.tool_id not in limits.tools:
            raise InvalidRequest(
                f"atlas.tools does not allow the pinned tool {pair.tool_id!r}", "atlas.tools"
            )
        pinned = self._named[pair or Pair(member.model_id, NO_TOOL)]
        self._check_needs(
            needs, np.array([pinned], np.intp), f"the model {member.model_id!r} cannot"
        )

    def _check_needs(self, needs: Needs, may_answer: NDArray[np.intp], who: str) -> None:
        """Refuse what none of those can take that may answer; where nobody may, say nothing.

        Raises:
            ContextTooLong: If the conversation is longer than the context of each.
            InvalidRequest: If it is something else; the message names the field.
        """
        left = may_answer
        for field, need in needs.each() if len(left) else ():
            left = left[self._admission.able(need, left, self._abilities)]
            if len(left):
                continue
            if need.prompt_tokens:
                raise ContextTooLong(
                    f"{field}: {who} take a conversation of {need.prompt_tokens} tokens or more",
                    field,
                )
            needed = _NEEDED[field] if need != NO_NEEDS else "answer without a picture"
            raise InvalidRequest(f"{field}: {who} {needed}", field)

    def _check_pattern(self, call: ChatCall) -> None:
        pattern, allowed = self._patterns[call.model], call.limits.models
        check_call(call)
        if allowed is not None and call.model not in allowed:
            raise InvalidRequest(
                f"atlas.models does not allow the pinned pattern {call.model!r}", "atlas.models"
            )
        if pattern.name not in self.pool.ready_patterns():
            why = pattern.missing or "a model that it needs does not answer"
            raise NoCandidate(f"the pattern {call.model!r} does not answer now: {why}", "model")

    @staticmethod
    def _check_names(
        wanted: frozenset[str] | None, known: frozenset[str] | dict[str, Any], field: str
    ) -> None:
        for name in sorted(wanted or ()):
            if name not in known:
                raise InvalidRequest(
                    f"atlas.{field}: {_shortened(name)!r} is not in the pool", f"atlas.{field}"
                )

    def entries(self) -> list[Json]:
        """What a request may name as `model`: the router, each model, each pair, each pattern."""
        return [
            self._entry(ROUTED_MODEL),
            *(self._entry(model_id) for model_id in self._members),
            *(self._entry(name) for name in self._pairs),
            *(self._entry(name) for name in self._patterns),
        ]

    def entry(self, name: str) -> Json:
        """One entry of the list.

        Raises:
            ModelNotFound: If there is none of that name.
        """
        known = {ROUTED_MODEL, *self._members, *self._pairs, *self._patterns}
        if name not in known:
            raise ModelNotFound(
                f"the model {_shortened(name)!r} does not exist; see /v1/models", "model"
            )
        return self._entry(name)

    def _entry(self, name: str) -> Json:
        if name == ROUTED_MODEL:
            ready = any(member.state is MemberState.READY for member in self._members.values())
            extension: Json = {
                "kind": "router",
                "state": str(MemberState.READY if ready else MemberState.STARTING),
                "pool_version": self.pool.pool_version,
            }
            return _openai_model(name, 0.0, extension)
        if name in self._patterns:
            return _openai_model(name, 0.0, self._pattern_state(self._patterns[name]))
        pair = self._pairs.get(name)
        member = self._members[name if pair is None else pair.model_id]
        extension = {
            "kind": "model" if pair is None else "pair",
            "state": str(member.state),
            "reason": member.reason,
            "pool_version": self.pool.pool_version,
        }
        if pair is not None:
            extension |= {"model_id": pair.model_id, "tool_id": pair.tool_id}
        return _openai_model(name, member.since_unix_s, extension | self._price(member, pair))

    def _pattern_state(self, pattern: PatternMember) -> Json:
        ready = pattern.name in self.pool.ready_patterns()
        return {
            "kind": "pattern",
            "state": str(MemberState.READY) if ready else "unavailable",
            "reason": pattern.missing,
            "pool_version": self.pool.pool_version,
        }

    def _price(self, member: ModelMember, pair: Pair | None) -> Json:
        """Prices of what the configuration knows; nothing for a model that is leaving."""
        models = {model.model_id: model for model in self._config.models}
        tools = {tool.tool_id: tool for tool in self._config.tools}
        if member.model_id not in models:
            return {}
        price: Json = models[member.model_id].price.model_dump()
        if pair is not None and pair.tool_id in tools:
            price["usd_per_tool_call"] = self._config.usd_per_tool_call(pair.tool_id)
        return {"price": price}

    def admin_models(self) -> list[Json]:
        """Each model with its state and settings; no address, path, environment or key."""
        configured = {model.model_id: model for model in self._config.models}
        rows = []
        for member in self.pool.models:
            row: Json = {
                "model_id": member.model_id,
                "state": str(member.state),
                "reason": member.reason,
                "since_unix_s": member.since_unix_s,
                "retry_unix_s": member.retry_unix_s,
                "waits_for": member.waits_for,
                "updating": member.updating,
                "replicas": member.num_replicas,
                "pairs": [str(p) for p in self.pool.pairs if p.model_id == member.model_id],
                "cold_pairs": [f"{member.model_id}@{t}" for t in sorted(member.cold_tools)],
            }
            model = configured.get(member.model_id)
            if model is not None:
                row |= {
                    "type": model.type,
                    "description": model.card.description,
                    "price": model.price.model_dump(),
                    "capabilities": _shown_capabilities(model.able()),
                    "max_ongoing_requests": model.max_ongoing_requests,
                    "max_completion_tokens": model.max_completion_tokens,
                    "autoscaling": model.autoscaling.model_dump(),
                }
            rows.append(row)
        return rows

    def admin_patterns(self) -> list[Json]:
        """Each pattern with its nodes, whether it answers now, and its worst case."""
        configured = {pattern.name: pattern for pattern in self._config.patterns}
        rows = []
        for member in self.pool.patterns:
            row: Json = {"name": member.name, **self._pattern_state(member)}
            row["routable"] = member.routable
            pattern = configured.get(member.name)
            if pattern is not None:
                row["pattern"] = pattern.as_written()
            if pattern is not None and member.missing is None:
                row["worst_case"] = worst_case(pattern, self._config)
            rows.append(row)
        return rows

    def admin_rules(self) -> list[Json]:
        """Each rule in its order, with what keeps it from deciding."""
        encoder = self._config.embedder.model
        return [
            {
                "rule": rule.model_dump(mode="json", exclude_unset=True),
                "reason": fit_fault(rule, encoder)
                if isinstance(rule, SemanticRuleConfig)
                else None,
            }
            for rule in self._config.rules
        ]

    def admin_tools(self) -> list[Json]:
        """Each tool with its settings; no path, environment or key."""
        configured = {tool.tool_id: tool for tool in self._config.tools}
        rows = []
        for tool_id in sorted(self._tools):
            row: Json = {
                "tool_id": tool_id,
                "pairs": [str(p) for p in self.pool.pairs if p.tool_id == tool_id],
            }
            tool = configured.get(tool_id)
            if tool is not None:
                row |= {
                    "type": tool.type,
                    "description": tool.description,
                    "exposed": tool.exposed,
                    "price_usd_per_call": tool.price_usd_per_call,
                    "timeout_s": tool.timeout_s,
                    "max_concurrency": tool.max_concurrency,
                    "max_queued": tool.max_queued,
                }
            rows.append(row)
        return rows


def _shown_capabilities(able: Capabilities) -> Json:
    context = able.context_tokens
    told = able._asdict() | {"context_tokens": None if math.isinf(context) else int(context)}
    del told["text_alone"]  # of a model always true
    return told


def worst_case(pattern: PatternConfig, config: AtlasConfig) -> Json:
    """The most that a pattern uses for a conversation of `QUESTION_BYTES`."""
    bound = bound_of(pattern, config, QUESTION_BYTES)
    return {
        "question_bytes": QUESTION_BYTES,
        "model_calls": int(bound.model_calls),
        "tool_calls": int(bound.tool_calls),
        "tokens": int(bound.tokens),
        "usd": bound.usd,
        "seconds": min(bound.seconds, config.gateway.limits.default_deadline_s),
    }


def _check_key(
    pinned: Pair, may_models: frozenset[str] | None, may_tools: frozenset[str] | None
) -> None:
    for name, allowed in ((pinned.model_id, may_models), (pinned.tool_id, may_tools)):
        if allowed is not None and name not in allowed:
            raise Forbidden(f"this API key may not use {_shortened(name)!r}")


def _openai_model(name: str, created_unix_s: float, extension: Json) -> Json:
    return {
        "id": name,
        "object": "model",
        "created": int(created_unix_s),
        "owned_by": "atlas-serve",
        "atlas": extension,
    }


def _shortened(name: str) -> str:
    return name if len(name) <= 80 else name[:80] + "…"
