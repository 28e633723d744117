"""One request on its way through the rules: what each found, and where that sends it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from serve_app.config.rules import (
    DEFAULT,
    ROUTE,
    AmongConfig,
    DefaultRuleConfig,
    KeywordRuleConfig,
    LlmRuleConfig,
    SemanticRuleConfig,
    TargetConfig,
    targets_of,
)
from serve_app.orchestrator.reachable import Reachable
from serve_app.orchestrator.run import Run
from serve_app.orchestrator.trace import Span, SpanKind
from serve_app.router.rules.judgement import Judgement
from serve_app.schemas import Candidate, DecidedBy, Decision, Hop, Limits, Pair

_PATHS = {
    "keyword": DecidedBy.KEYWORD,
    "semantic": DecidedBy.SEMANTIC,
    "llm": DecidedBy.LLM,
    "default": DecidedBy.DEFAULT,
}

_Vector = NDArray[np.float32]
_Rule = KeywordRuleConfig | SemanticRuleConfig | LlmRuleConfig


@dataclass
class Ruled:
    """What the rules made of a request."""

    limits: Limits
    """What the router may choose among."""
    decision: Decision | None = None
    """`None`: the router decides."""
    embedding: _Vector | None = None
    """(dim,) of the query; `None`: it was not embedded."""
    default: DefaultRuleConfig | None = None
    """Of the rules that were followed; `None`: there are no rules."""
    hops: list[Hop] = field(default_factory=list)
    is_narrowed: bool = False
    """Whether a rule left the choice to the router, so that the default has no part in it."""


class RulesWalk:
    """One request on its way through the rules."""

    def __init__(self, run: Run, ruled: Ruled, reachable: Reachable) -> None:
        self.reachable = reachable
        self.is_decided = False
        self._run = run
        self._ruled = ruled

    def hop(self, rule: _Rule) -> HopUnderWay:
        """Begin a rule's hop."""
        span = self._run.trace.root.child(SpanKind.RULE, rule.name)
        return HopUnderWay(rule, self, span)

    def end(self, under_way: HopUnderWay) -> None:
        """Decide as a rule has found, if it is sure enough and the target can be reached."""
        rule, judgement = under_way.rule, under_way.judgement
        floor = 0.0 if isinstance(rule, KeywordRuleConfig) else rule.floor
        decided, target = False, None
        if judgement is not None and judgement.confidence >= floor:
            target = dict(targets_of(rule))[judgement.label]
            decided, under_way.note = self._goes(target, judgement, rule.type)
        hop = Hop(
            rule.name,
            rule.type,
            decided,
            None if judgement is None else judgement.label,
            None if judgement is None else judgement.score,
            None if judgement is None else judgement.confidence,
            floor,
            under_way.seconds,
            under_way.span.usage.cost_usd,
            under_way.note,
        )
        self._put(hop, under_way.span)
        if decided and target is not None and target.use == (DEFAULT,):
            self.to_default()
        self._with_hops()
        self.is_decided = decided

    def _goes(
        self, target: TargetConfig, judgement: Judgement, kind: str
    ) -> tuple[bool, str | None]:
        """Whether a request can go where a rule sends it; and where to, or why not."""
        limits = self._ruled.limits
        if target.use == (ROUTE,):
            self._ruled.is_narrowed = True
            return True, "the learned rules choose"
        if target.use == (DEFAULT,):
            if self._default_candidates():
                return True, "the default"
            return False, "the default cannot take it"
        if target.among is not None:
            left = narrowed(limits, target.among)
            if not self.reachable.routable(left):
                return False, "nothing of what it leaves can take the request"
            self._ruled.limits, self._ruled.is_narrowed = left, True
            return True, "the learned rules choose among what it leaves"
        wanted = target.use or ()
        candidates = self.reachable.candidates(wanted, self._run.call, limits)
        if not candidates:
            return False, f"{', '.join(wanted)}: cannot take it now"
        self._ruled.decision = self._decision(candidates, _PATHS[kind], judgement.confidence)
        return True, ", ".join(wanted)

    def to_default(self) -> None:
        """Send the request to the default, if the default can take it."""
        candidates = self._default_candidates()
        note = None if candidates else "the default cannot take it"
        with self._run.trace.root.child(SpanKind.RULE, DEFAULT) as span:
            hop = Hop(DEFAULT, "default", bool(candidates), DEFAULT, note=note)
            self._put(hop, span)
        if candidates:
            self._ruled.decision = self._decision(candidates, DecidedBy.DEFAULT, 1.0)
            self.is_decided = True
        self._with_hops()

    def _default_candidates(self) -> list[Pair]:
        default = self._ruled.default
        if default is None:
            return []
        return self.reachable.candidates(default.use, self._run.call, self._ruled.limits)

    def _decision(self, candidates: list[Pair], path: DecidedBy, confidence: float) -> Decision:
        """A rule's decision; of no policy, and nothing was explored."""
        return Decision(
            candidates=tuple(Candidate(pair, 0.0, 0.0, 0.0) for pair in candidates),
            path=path,
            confidence=confidence,
            propensity=1.0,
            policy_version=0,
            pool_version=self.reachable.pool_version,
        )

    def _put(self, hop: Hop, span: Span) -> None:
        """Put a hop on record."""
        self._ruled.hops.append(hop)
        facts = {
            "kind": hop.kind,
            "decided": hop.decided,
            "label": hop.label,
            "score": hop.score,
            "confidence": hop.confidence,
            "floor": hop.floor,
            "note": hop.note,
        }
        span.attributes |= {name: fact for name, fact in facts.items() if fact is not None}

    def _with_hops(self) -> None:
        """Have the decision tell of every hop."""
        if self._ruled.decision is not None:
            hops = tuple(self._ruled.hops)
            seconds = sum(hop.seconds for hop in hops)
            self._ruled.decision = replace(self._ruled.decision, hops=hops, seconds=seconds)


class HopUnderWay:
    """A rule that looks at a request: a context manager that ends with its block."""

    def __init__(
        self,
        rule: _Rule,
        following: RulesWalk,
        span: Span,
    ) -> None:
        self.rule = rule
        self.span = span
        self.judgement: Judgement | None = None
        self.note: str | None = None
        self.seconds = 0.0
        self._following = following
        self._began_s = time.perf_counter()

    def found(self, judgement: Judgement | None) -> None:
        """Say what the rule found."""
        self.judgement = judgement

    def __enter__(self) -> HopUnderWay:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began_s
        if kind is None:
            self._following.end(self)
        self.span.end(None if kind is None else kind.__name__)


def narrowed(limits: Limits, among: AmongConfig) -> Limits:
    """Limits that leave what a rule and the caller both allow."""
    candidates = limits.candidates
    if among.candidates is not None:
        named = frozenset(map(Pair.parse, among.candidates))
        candidates = named if candidates is None else candidates & named
    return replace(
        limits,
        models=_both(limits.models, among.models),
        tools=_both(limits.tools, among.tools),
        candidates=candidates,
    )


def _both(allowed: frozenset[str] | None, named: Sequence[str] | None) -> frozenset[str] | None:
    if named is None:
        return allowed
    return frozenset(named) if allowed is None else allowed & frozenset(named)
