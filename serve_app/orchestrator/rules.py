"""The rules in front of the learned ones, followed for one request after another.

Keyword rules see the text before anything is embedded; then the query is embedded, once, for the
semantic rules and the router; then models decide. The first rule that is sure enough names
candidates, or narrows what the router chooses among. What arrives at the end goes to the default.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve_app.budget import Caps, Deadline
from serve_app.config import AtlasConfig
from serve_app.config.rules import (
    LEARNED,
    DefaultRuleConfig,
    KeywordRuleConfig,
    LlmRuleConfig,
    Rules,
    SemanticRuleConfig,
    default_of,
    fit_fault,
)
from serve_app.errors import AtlasError
from serve_app.orchestrator.answer import mean_logprob_of, text_of
from serve_app.orchestrator.decision_client import Decider
from serve_app.orchestrator.hops import Ruled, RulesWalk
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.pairs.runner import PairRunner
from serve_app.orchestrator.patterns.view import by_deadline
from serve_app.orchestrator.reachable import Reachable
from serve_app.orchestrator.run import Run
from serve_app.router.rules.judgement import Judgement
from serve_app.router.rules.keyword import KeywordRule, Texts
from serve_app.router.rules.llm import messages_of, read_label, sampling_of
from serve_app.router.rules.semantic import SemanticRule
from serve_app.schemas import (
    NO_TOOL,
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

_Vector = NDArray[np.float32]


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
            part = texts[begin : begin + _EMBEDDED_AT_ONCE]
            parts.append(await self._decider.embed_lasting(part, deadline))
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
        following = RulesWalk(run, ruled, self._reachable)
        texts = Texts(run.call.messages)
        for keyword in rules.keyword:
            with following.hop(keyword.config) as hop:
                if keyword.matches(texts):
                    hop.found(Judgement(keyword.config.name, 1.0, 1.0))
            if following.is_decided:
                return ruled
        query = run.call.query
        if rules.semantic and query.strip():
            ruled.embedding = await self._decider.embed_query(
                query, run.budget.deadline, run.call.fixed
            )
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

    async def _ask(self, rule: LlmRuleConfig, run: Run, query: str, following: RulesWalk) -> None:
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
        stays = confidence >= floor or decision.path is DecidedBy.SESSION
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
            RulesWalk(run, ruled, self._reachable).to_default()
            if ruled.decision is not None:
                return ruled.decision
            ruled.hops[-2] = replace(hop, decided=True)
        return replace(decision, hops=tuple(ruled.hops))


def _compiled(rules: Rules, semantic: Sequence[SemanticRule]) -> _Compiled:
    return _Compiled(
        rules=rules,
        keyword=tuple(KeywordRule(of) for of in rules if isinstance(of, KeywordRuleConfig)),
        semantic=tuple(semantic),
        llm=tuple(of for of in rules if isinstance(of, LlmRuleConfig)),
        default=default_of(rules),
    )
