"""The rules in front of the learned ones, followed for one request after another.

Keyword rules see the text before anything is embedded; then the query is embedded, once, for the
semantic rules and the router; then models decide. The first rule that is sure enough names
candidates, or narrows what the router chooses among. What arrives at the end goes to the default.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve_app.budget import Caps, Deadline
from serve_app.config import AtlasConfig
from serve_app.config.rules import (
    DEFAULT,
    LEARNED,
    ROUTE,
    DefaultRuleConfig,
    KeywordRuleConfig,
    LlmRuleConfig,
    Rules,
    SemanticRuleConfig,
    TargetConfig,
    default_of,
    fit_fault,
    targets_of,
)
from serve_app.errors import AtlasError
from serve_app.orchestrator.answer import mean_logprob_of, text_of
from serve_app.orchestrator.decision_client import Decider
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.pairs.runner import PairRunner
from serve_app.orchestrator.patterns.view import by_deadline
from serve_app.orchestrator.reachable import Reachable
from serve_app.orchestrator.run import Run
from serve_app.orchestrator.trace import Span, SpanKind
from serve_app.router.rules.judgement import Judgement
from serve_app.router.rules.keyword import KeywordRule, Texts
from serve_app.router.rules.llm import messages_of, read_label, sampling_of
from serve_app.router.rules.semantic import SemanticRule
from serve_app.schemas import (
    NO_TOOL,
    Candidate,
    DecidedBy,
    Decision,
    Hop,
    Limits,
    Pair,
    PoolState,
)

logger = logging.getLogger(__name__)

_EMBEDDED_AT_ONCE = 64
_EMBED_TIMEOUT_S = 60.0
_START_PATIENCE_S = 60.0
"""How long a gateway waits at its start for the utterances; then it serves without them for a
while."""
_RETRY_S = 2.0
_LLM_CALLS = 2
"""Of a model that decides: the second one where the engine refuses log-probabilities."""
_LLM_SHARE = 0.5
"""Of the time that is left, what a model that decides may take."""

_PATHS = {
    "keyword": DecidedBy.KEYWORD,
    "semantic": DecidedBy.SEMANTIC,
    "llm": DecidedBy.LLM,
    "default": DecidedBy.DEFAULT,
}

_Vector = NDArray[np.float32]


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


class _Compiled(NamedTuple):
    """Rules that are ready to be followed."""

    rules: Rules = ()
    keyword: tuple[KeywordRule, ...] = ()
    semantic: tuple[SemanticRule, ...] = ()
    llm: tuple[LlmRuleConfig, ...] = ()
    default: DefaultRuleConfig | None = None


class RuleFollower:
    """Follows the pool's rules; one per gateway replica.

    Invariants:
        - A request reads the rules once, and follows these to its end.
        - New rules serve once their utterances are embedded; until then the ones before them do.
        - A rule that is not sure, or cannot send the request where it wants, lets it pass: no
          request fails because of a rule.
    """

    def __init__(self, pairs: PairRunner, decider: Decider, config: AtlasConfig) -> None:
        """Follow the rules of a configuration; call in an event loop.

        Args:
            pairs: Runs the models that decide.
            decider: Embeds.
            config: The deployment.
        """
        self._pairs = pairs
        self._decider = decider
        self._now = _Compiled()
        self._wanted: Rules = ()
        self._loading: asyncio.Task[None] | None = None
        self._reachable = Reachable(PoolState(-1, (), (), ()), config)
        self._take(config)

    def use(self, pool: PoolState, config: AtlasConfig) -> None:
        """Take over a changed pool."""
        self._reachable = Reachable(pool, config)
        self._take(config)

    async def start(self) -> None:
        """Wait for the first rules' utterances to be embedded; not for ever."""
        if self._loading is not None:
            await asyncio.wait([self._loading], timeout=_START_PATIENCE_S)

    def close(self) -> None:
        """Stop what is under way."""
        if self._loading is not None:
            self._loading.cancel()

    def _take(self, config: AtlasConfig) -> None:
        if config.rules == self._wanted:
            return
        self.close()
        self._wanted = config.rules
        semantic = []
        for rule in config.rules:
            if isinstance(rule, SemanticRuleConfig):
                fault = fit_fault(rule, config.embedder.model)
                if fault is None:
                    semantic.append(rule)
                else:
                    logger.error("%s; it is left out", fault)
        if semantic:
            work = self._load(config.rules, semantic)
            self._loading = asyncio.get_running_loop().create_task(work)
        else:
            self._loading = None
            self._now = _compiled(config.rules, ())

    async def _load(self, rules: Rules, semantic: Sequence[SemanticRuleConfig]) -> None:
        """Embed what new rules need, and put them in force."""
        before = self._now.semantic
        ready: list[SemanticRule] = []
        for config in semantic:
            known = next((rule for rule in before if rule.config == config), None)
            while known is None:
                try:
                    known = SemanticRule(config, await self._embedded(config))
                except AtlasError as error:
                    logger.warning("rule %s: cannot embed its utterances: %s", config.name, error)
                    await asyncio.sleep(_RETRY_S)
            ready.append(known)
        self._now = _compiled(rules, ready)

    async def _embedded(self, rule: SemanticRuleConfig) -> _Vector:
        """(num_utterances, dim), route by route."""
        texts = [text for route in rule.routes for text in route.utterances]
        parts = []
        for begin in range(0, len(texts), _EMBEDDED_AT_ONCE):
            deadline = Deadline.after(_EMBED_TIMEOUT_S)
            parts.append(
                await self._decider.embed(texts[begin : begin + _EMBEDDED_AT_ONCE], deadline)
            )
        return np.concatenate(parts)

    async def decide(self, run: Run, limits: Limits) -> Ruled:
        """Follow the rules until one decides, or the router is to.

        Args:
            run: The request.
            limits: What its caller allows.

        Raises:
            AtlasError: If the query cannot be embedded.
        """
        rules = self._now
        ruled = Ruled(limits, default=rules.default)
        if rules.default is None:
            return ruled
        following = _Following(run, ruled, self._reachable)
        texts = Texts(run.call.messages)
        for keyword in rules.keyword:
            with following.hop(keyword.config) as hop:
                if keyword.matches(texts):
                    hop.found(Judgement(keyword.config.name, 1.0, 1.0))
            if following.is_decided:
                return ruled
        query = run.call.query
        if rules.semantic and query.strip():
            ruled.embedding = await self._decider.embed_query(query, run.budget.deadline)
            for semantic in rules.semantic:
                with following.hop(semantic.config) as hop:
                    hop.found(semantic.judge(ruled.embedding))
                if following.is_decided:
                    return ruled
        for llm in rules.llm:
            await self._ask(llm, run, query, following)
            if following.is_decided:
                return ruled
        if not rules.default.learned:
            following.to_default()
        return ruled

    async def _ask(self, rule: LlmRuleConfig, run: Run, query: str, following: _Following) -> None:
        """Have a model decide; whatever goes wrong with it, the request passes."""
        with following.hop(rule) as hop:
            pair = Pair(rule.model, NO_TOOL)
            if not query.strip():
                hop.note = "there is no text to judge"
                return
            if not following.reachable.admitted([pair], run.call.limits):
                hop.note = f"the model {rule.model!r} is not allowed, or does not answer"
                return
            left_s = run.budget.seconds_left
            budget = run.budget.child(
                Deadline.after(min(rule.seconds, left_s * _LLM_SHARE)), Caps(model_calls=_LLM_CALLS)
            )
            call = replace(
                run.call,
                messages=messages_of(rule, query),
                sampling=sampling_of(rule),
                tools=(),
                tool_choice=None,
                note=None,
            )
            work = PairWork(pair=pair, call=call, budget=budget, span=hop.span, wants_logprobs=True)
            try:
                choices = await by_deadline(self._pairs.run(work), budget, f"the rule {rule.name}")
            except AtlasError as error:
                hop.note = error.message
                return
            judgement = read_label(rule, text_of(choices), mean_logprob_of(choices))
            if judgement is None:
                hop.note = "the answer is none of the labels"
            hop.found(judgement)

    def after(self, run: Run, ruled: Ruled, decision: Decision) -> Decision:
        """A decision of the router's, or the default's where the router is not sure enough.

        Args:
            run: The request.
            ruled: What the rules made of it.
            decision: The router's.
        """
        default = ruled.default
        if default is None:
            return decision
        outside = decision.path is DecidedBy.OUT_OF_DISTRIBUTION
        confidence = 0.0 if outside else decision.confidence
        floor = 0.0 if ruled.is_narrowed else default.floor
        stays = confidence >= floor
        hop = Hop(
            LEARNED,
            "learned",
            stays,
            str(decision.path),
            decision.confidence,
            confidence,
            floor,
            decision.seconds,
        )
        ruled.hops.append(hop)
        if not stays:
            _Following(run, ruled, self._reachable).to_default()
            if ruled.decision is not None:
                return ruled.decision
            ruled.hops[-2] = replace(hop, decided=True)
        return replace(decision, hops=tuple(ruled.hops))


class _Following:
    """One request on its way through the rules."""

    def __init__(self, run: Run, ruled: Ruled, reachable: Reachable) -> None:
        self.reachable = reachable
        self.is_decided = False
        self._run = run
        self._ruled = ruled

    def hop(self, rule: KeywordRuleConfig | SemanticRuleConfig | LlmRuleConfig) -> _HopUnderWay:
        """Begin a rule's hop."""
        span = self._run.trace.root.child(SpanKind.RULE, rule.name)
        return _HopUnderWay(rule, self, span)

    def end(self, under_way: _HopUnderWay) -> None:
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
            narrowed = _narrowed(limits, target)
            if not self.reachable.routable(narrowed):
                return False, "nothing of what it leaves can take the request"
            self._ruled.limits, self._ruled.is_narrowed = narrowed, True
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


class _HopUnderWay:
    """A rule that looks at a request: a context manager that ends with its block."""

    def __init__(
        self,
        rule: KeywordRuleConfig | SemanticRuleConfig | LlmRuleConfig,
        following: _Following,
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

    def __enter__(self) -> _HopUnderWay:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began_s
        if kind is None:
            self._following.end(self)
        self.span.end(None if kind is None else kind.__name__)


def _compiled(rules: Rules, semantic: Sequence[SemanticRule]) -> _Compiled:
    return _Compiled(
        rules=rules,
        keyword=tuple(KeywordRule(of) for of in rules if isinstance(of, KeywordRuleConfig)),
        semantic=tuple(semantic),
        llm=tuple(of for of in rules if isinstance(of, LlmRuleConfig)),
        default=default_of(rules),
    )


def _narrowed(limits: Limits, target: TargetConfig) -> Limits:
    """Limits that leave what a rule and the caller both allow."""
    among = target.among
    assert among is not None
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
