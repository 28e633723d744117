"""Conversations that stay on their candidate while switching would cost more than it gains.

The candidate that answered last has the conversation in its prompt cache; any other one would read
it anew. The router's utilities are about a question alone, so the price of the conversation is
added to both sides before they are compared: at the price of cached tokens where it stays.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from serve_app.config import ModelConfig
from serve_app.content import text_of_content
from serve_app.schemas import Candidate, ChatCall, DecidedBy, Decision, Pair, Report

_MAX_SESSIONS = 10_000
_KEPT_S = 3600.0
"""After the last answer; prompt caches keep a prefix for less."""
_CHARS_PER_TOKEN = 3
_LEARNED = frozenset({DecidedBy.COLD_START, DecidedBy.CLUSTERS, DecidedBy.OUT_OF_DISTRIBUTION})
"""Who decides by the utilities of single questions, which a conversation may outweigh."""
_LEAST_WIDTH = 1e-6
"""Of a range of costs, as the utility has it."""


@dataclass(frozen=True, slots=True)
class _Last:
    """What is known of a conversation."""

    pair: Pair
    """Who answered last."""
    tokens: int
    """Of its last prompt and answer."""
    at_s: float
    """Monotonic clock."""


class Sessions:
    """The conversations of one gateway replica; the newest ones are remembered."""

    def __init__(self) -> None:
        """Know none yet."""
        self._last: OrderedDict[str, _Last] = OrderedDict()
        self._models: dict[str, ModelConfig] = {}

    def use(self, models: Sequence[ModelConfig]) -> None:
        """Take over a changed pool."""
        self._models = {model.model_id: model for model in models}

    def answered(self, session: str, report: Report) -> None:
        """Remember who answered a conversation."""
        step = report.final_step
        if step is None or step.pair.is_pattern or step.error is not None:
            return
        tokens = step.usage.prompt_tokens + step.usage.completion_tokens
        self._last[session] = _Last(step.pair, tokens, time.monotonic())
        self._last.move_to_end(session)
        if len(self._last) > _MAX_SESSIONS:
            self._last.popitem(last=False)

    def stay(self, call: ChatCall, decision: Decision) -> Decision:
        """The decision, or one that stays with who answered the conversation last."""
        last = self._last.get(call.session)
        if last is None or decision.path not in _LEARNED or decision.pair == last.pair:
            return decision
        if time.monotonic() - last.at_s > _KEPT_S:
            return decision
        held = next((of for of in decision.candidates if of.pair == last.pair), None)
        if held is None:  # it does not answer now, or the request's limits leave it out
            return decision
        chars = sum(len(text_of_content(m.get("content"))) for m in call.messages)
        tokens = min(last.tokens, chars // _CHARS_PER_TOKEN)
        alpha, scale = call.limits.alpha, _Scale(decision.candidates)
        best = decision.candidates[0]
        cached, read = self._usd(held.pair, tokens, cached=True), self._usd(best.pair, tokens)
        stays = (1 - alpha) * held.quality - alpha * scale.cost(held, cached)
        switches = (1 - alpha) * best.quality - alpha * scale.cost(best, read)
        if switches > stays:
            return decision
        others = tuple(of for of in decision.candidates if of is not held)
        return replace(decision, candidates=(held, *others), path=DecidedBy.SESSION, propensity=1.0)

    def _usd(self, pair: Pair, tokens: int, *, cached: bool = False) -> float:
        """US dollars of reading a conversation; 0 of a pattern, which reads it in its own way."""
        model = self._models.get(pair.model_id)
        if model is None:
            return 0.0
        price = model.cached_usd_per_1m if cached else model.price.usd_per_1m_prompt_tokens
        return tokens * price / 1e6


class _Scale:
    """The log scale of the router's costs, read from two of its candidates."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        paid = [of for of in candidates if of.cost_usd > 0 and of.cost > 0]
        dear = max(paid, key=lambda of: of.cost_usd, default=None)
        cheap = min(
            (of for of in candidates if of.cost_usd > 0), key=lambda of: of.cost_usd, default=None
        )
        self._per_log = 0.0
        """Cost for each natural logarithm of dollars; 0: prices do not differ."""
        if dear is not None and cheap is not None and dear.cost > cheap.cost:
            width = math.log(dear.cost_usd / cheap.cost_usd)
            self._per_log = (dear.cost - cheap.cost) / width if width > _LEAST_WIDTH else 0.0

    def cost(self, candidate: Candidate, added_usd: float) -> float:
        """A candidate's cost with so many dollars more."""
        if candidate.cost_usd <= 0:
            return candidate.cost
        more = math.log1p(added_usd / candidate.cost_usd)
        return candidate.cost + self._per_log * more
