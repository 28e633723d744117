"""The worst case of a pattern: what it may use at most, before it runs.

The figures are upper bounds, and a run is held to them: they are the caps of its budget. Tokens are
counted as bytes, because no tokenizer makes more tokens of a text than it has bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serve_app.config.patterns.check import (
    WORD_BYTES,
    max_bytes_of,
    routed_pairs,
)
from serve_app.config.patterns.language import (
    ROUTE,
    AskNode,
    BranchNode,
    CascadeNode,
    CritiqueNode,
    NodeBase,
    ParallelNode,
    PatternConfig,
    PlanNode,
    RetrieveNode,
    ToolNode,
    VerifyNode,
    VoteNode,
)
from serve_app.config.patterns.template import references_in
from serve_app.config.tools import BestOfConfig, ManyFunctionsSettings, ToolConfig
from serve_app.content import PICTURE_TOKENS, without_pictures
from serve_app.schemas import NO_TOOL, PATTERN_PREFIX, Pair

if TYPE_CHECKING:
    from serve_app.config import AtlasConfig, ModelConfig

QUESTION_BYTES = 1000
"""Of the conversation for which a worst case is told."""
ROUTED_TRIES = 2
"""Pairs that a node tries which leaves the choice to the router: the choice, and one more."""
_MESSAGE_BYTES = 128
"""Of a message in JSON, its content left out."""
_TOKEN_BYTES = 8
"""Of the text of a token that a model wrote, where the text is read again."""
_REPAIR_BYTES = 2048
"""What a model is told of an answer that does not fit, the schema left out; or of a tool's schema,
the description left out."""
_FUNCTION_BYTES = 16 << 10
"""Of one function of a tool that has several."""
_MOST_CALLS = 128
"""Tool calls in one reply, those included that are not run; each takes a token at least."""
_REFUSED_BYTES = 256
"""What a model is told of a call that was not run."""
_DEATHS = 2
"""Calls that are made again over one request because a replica died."""


@dataclass(frozen=True)
class Bound:
    """The most that something may use."""

    model_calls: float = 0
    tool_calls: float = 0
    tokens: float = 0
    usd: float = 0.0
    seconds: float = 0.0
    """Infinite: nothing but the request's deadline limits it."""

    def then(self, other: Bound) -> Bound:
        """One after the other."""
        return self._with(other, self.seconds + other.seconds)

    def beside(self, other: Bound) -> Bound:
        """Side by side."""
        return self._with(other, max(self.seconds, other.seconds))

    def either(self, other: Bound) -> Bound:
        """One of the two."""
        return Bound(*(max(pair) for pair in zip(_values(self), _values(other), strict=True)))

    def times(self, count: int) -> Bound:
        """So many, one after the other."""
        return Bound(*(count * value for value in _values(self)))

    def within(self, seconds: float | None) -> Bound:
        """With a limit on its time."""
        least = self.seconds if seconds is None else min(self.seconds, seconds)
        return Bound(self.model_calls, self.tool_calls, self.tokens, self.usd, least)

    def _with(self, other: Bound, seconds: float) -> Bound:
        return Bound(
            self.model_calls + other.model_calls,
            self.tool_calls + other.tool_calls,
            self.tokens + other.tokens,
            self.usd + other.usd,
            seconds,
        )


def _values(bound: Bound) -> tuple[float, ...]:
    return (bound.model_calls, bound.tool_calls, bound.tokens, bound.usd, bound.seconds)


def bound_of(pattern: PatternConfig, config: AtlasConfig, question_bytes: int) -> Bound:
    """The worst case of a pattern, its own limits included.

    Args:
        pattern: A checked pattern.
        config: The deployment, with its patterns.
        question_bytes: Of all of the caller's messages.
    """
    return Bounds(config, question_bytes).of_pattern(pattern)


class Bounds:
    """Computes worst cases for questions of one size."""

    def __init__(self, config: AtlasConfig, question_bytes: int) -> None:
        """Of a deployment, see `bound_of`."""
        self._config = config
        self._question_bytes = question_bytes
        self._models: Mapping[str, ModelConfig] = {m.model_id: m for m in config.models}
        self._tools = {tool.tool_id: tool for tool in config.tools}
        self._patterns = {pattern.name: pattern for pattern in config.patterns}

    def of_pattern(self, pattern: PatternConfig) -> Bound:
        """All of a pattern."""
        bound, limits = self._chain(pattern.do, {}).then(Bound(_DEATHS)), pattern.limits
        most = Bound(
            *(
                math.inf if limit is None else limit
                for limit in (
                    limits.model_calls,
                    limits.tool_calls,
                    limits.tokens,
                    limits.usd,
                    limits.seconds,
                )
            )
        )
        return Bound(*(min(pair) for pair in zip(_values(bound), _values(most), strict=True)))

    def of_node(self, node: NodeBase, seen: Mapping[str, NodeBase]) -> Bound:
        """One node, with what is inside it.

        Args:
            node: The node.
            seen: The nodes whose results it sees, by id.
        """
        return self._of(node, seen).within(node.seconds)

    def _chain(self, nodes: Sequence[NodeBase], seen: Mapping[str, NodeBase]) -> Bound:
        known, bound = dict(seen), Bound()
        for node in nodes:
            bound = bound.then(self.of_node(node, known))
            if node.id is not None:
                known[node.id] = node
        return bound

    def _of(self, node: NodeBase, seen: Mapping[str, NodeBase]) -> Bound:
        match node:
            case AskNode():
                return self._ask(node, seen)
            case ToolNode():
                return self._tool(node.tool)
            case RetrieveNode():
                return self._tool(node.corpus)
            case BranchNode():
                bound = self._chain(node.otherwise, seen)
                for case in node.cases:
                    bound = bound.either(self._chain(case.do, seen))
                return bound
            case ParallelNode():
                return self._parallel(node, seen)
            case VoteNode():
                return self._beside([self.of_node(ask, seen) for ask in node.of])
            case CascadeNode():
                return self._cascade(node, seen)
            case CritiqueNode():
                return self._critique(node, {**seen, "draft": node.draft})
            case PlanNode():
                return self._plan(node, seen)
            case VerifyNode(verifier=str(verifier)):
                return self._verifier(verifier, max_bytes_of(seen.get(node.of)))
            case VerifyNode(tool=str(tool)):
                return self._tool(tool)
        return Bound()

    def _cascade(self, node: CascadeNode, seen: Mapping[str, NodeBase]) -> Bound:
        bound = self._chain(node.of, seen)
        if node.accept.min_logprob is not None:  # each call may be refused once because of them
            bound = bound.then(Bound(bound.model_calls))
        if node.accept.verifier is not None:
            rated = max(max_bytes_of(ask) for ask in node.of)
            once = self._verifier(node.accept.verifier, rated)
            bound = bound.then(once.times(len(node.of) - 1))
        if node.accept.examples is not None:
            bound = bound.then(self._tool(node.accept.examples).times(len(node.of) - 1))
        return bound

    def _critique(self, node: CritiqueNode, seen: Mapping[str, NodeBase]) -> Bound:
        critics = self._beside([self.of_node(critic, seen) for critic in node.critics])
        checks = [critic for critic in node.critics if isinstance(critic, VerifyNode)]
        revised = {**seen, "draft": node.revise}
        again = self._beside([self.of_node(check, revised) for check in checks])
        draft, revise = self.of_node(node.draft, seen), self.of_node(node.revise, seen)
        return draft.then(critics).then(revise).then(again)

    def _plan(self, node: PlanNode, seen: Mapping[str, NodeBase]) -> Bound:
        told = self._ask(node.lead, seen, is_told=True).within(node.lead.seconds)
        lead = self.of_node(node.lead, seen).then(told)
        bound = lead.then(self.of_node(node.worker, seen).times(node.max_subtasks))
        if isinstance(node.join, AskNode):
            bound = bound.then(self.of_node(node.join, seen))
        return bound

    def _parallel(self, node: ParallelNode, seen: Mapping[str, NodeBase]) -> Bound:
        inner = [self.of_node(branch, seen) for branch in node.do]
        bound = self._beside(inner * (1 if node.each is None else len(node.each)))
        if isinstance(node.join, AskNode):
            bound = bound.then(self.of_node(node.join, seen))
        return bound

    @staticmethod
    def _beside(bounds: Sequence[Bound]) -> Bound:
        total = Bound()
        for bound in bounds:
            total = total.beside(bound)
        return total

    def _ask(self, node: AskNode, seen: Mapping[str, NodeBase], *, is_told: bool = False) -> Bound:
        """One `ask`; where it is told of an earlier answer, with that in the prompt."""
        prompt, repaired = self._prompt_bytes(node, seen), 1
        if is_told:
            prompt += 2 * (node.max_bytes + _REPAIR_BYTES)
        if node.output is not None:
            told = node.max_bytes + len(json.dumps(node.output)) + _REPAIR_BYTES
            prompt, repaired = prompt + 2 * told, 2
        if node.pair.startswith(PATTERN_PREFIX):
            inner = self._patterns.get(node.pair.removeprefix(PATTERN_PREFIX))
            if inner is None:
                return Bound()  # it was removed; the pattern does not run
            return Bounds(self._config, prompt).of_pattern(inner).times(repaired)
        if node.pair != ROUTE:
            one = self._pair(Pair.parse(node.pair), prompt, node.max_tokens)
            return one.times(repaired)
        bound = Bound()
        for pair in routed_pairs(node, self._config):
            bound = bound.either(self._pair(pair, prompt, node.max_tokens))
        return bound.times(ROUTED_TRIES * repaired)

    def _prompt_bytes(self, node: AskNode, seen: Mapping[str, NodeBase]) -> int:
        """Of the messages in JSON, in which a character may take two bytes more."""
        templates = [text for text in (node.prompt, node.system) if text is not None]
        size = sum(len(text.encode()) for text in templates) if templates else 0
        if node.prompt is None:
            size += self._question_bytes
        for reference in references_in(templates):
            size += self._size(reference.name, seen)
        size += sum(max_bytes_of(seen.get(name)) for name in node.uses)
        return 2 * size + 2 * _MESSAGE_BYTES

    def _size(self, name: str, seen: Mapping[str, NodeBase]) -> int:
        if name == "question":
            return self._question_bytes
        return max_bytes_of(seen[name]) if name in seen else WORD_BYTES

    def _pair(self, pair: Pair, prompt: int, max_tokens: int) -> Bound:
        """One run of a pair."""
        if pair.model_id not in self._models:
            return Bound()  # it left the pool; the pattern does not run
        model, tool = self._models[pair.model_id], self._tools.get(pair.tool_id)
        tries = model.max_retries + 1 if model.type == "remote" else 1
        max_tokens = min(max_tokens, model.max_completion_tokens)
        if tool is None or pair.tool_id == NO_TOOL:
            return self._reply(model, prompt, max_tokens, tries)
        called = self._tool(tool.tool_id)
        members = self._config.called_tools(tool.tool_id)
        read = 6 * max(of.max_result_chars for of in members) + _MESSAGE_BYTES
        if tool.kind == "context":
            return called.then(self._reply(model, prompt + read, max_tokens, tries))
        if isinstance(tool, BestOfConfig):
            sampled = self._reply(model, prompt, max_tokens * tool.num_samples, tries)
            if tool.verifier is not None:
                rated = max_tokens * _TOKEN_BYTES + self._question_bytes
                sampled = sampled.then(self._verifier(tool.verifier, rated).times(tool.num_samples))
            return called.then(sampled)
        limits = self._config.gateway.limits
        rounds, per_reply = limits.max_tool_rounds, limits.max_calls_per_reply
        bound, schema = Bound(), _offered_bytes(tool, members)
        told = min(per_reply, max_tokens) * read + min(_MOST_CALLS, max_tokens) * _REFUSED_BYTES
        for number in range(rounds + 2):  # the replies with calls, the answer, one repaired
            grown = number * (max_tokens * _TOKEN_BYTES + told)
            bound = bound.then(self._reply(model, prompt + schema + grown, max_tokens, tries))
        return bound.then(called.times(min(rounds * per_reply, limits.max_tool_calls)))

    def _reply(self, model: ModelConfig, prompt: int, max_tokens: int, tries: int) -> Bound:
        price = model.price
        usd = prompt * price.usd_per_1m_prompt_tokens
        usd += max_tokens * price.usd_per_1m_completion_tokens
        return Bound(tries, 0, prompt + max_tokens, usd / 1e6, math.inf)

    def _verifier(self, model_id: str, rated: int) -> Bound:
        if model_id not in self._models:
            return Bound()
        model = self._models[model_id]
        tries = model.max_retries + 1 if model.type == "remote" else 1
        prompt = 2 * (rated + self._question_bytes) + _MESSAGE_BYTES
        return self._reply(model, prompt, model.max_completion_tokens, tries)

    def _tool(self, tool_id: str) -> Bound:
        bound = Bound()
        for tool in self._config.called_tools(tool_id):
            bound = bound.either(Bound(0, 2, 0, tool.price_usd_per_call * 2, tool.timeout_s * 2))
        return bound


def _offered_bytes(tool: ToolConfig, members: Sequence[ToolConfig]) -> int:
    """Of all functions that a model is offered of a tool."""
    each = [
        _FUNCTION_BYTES
        if isinstance(of, ManyFunctionsSettings)
        else _REPAIR_BYTES + 6 * len(of.description)
        for of in members
    ]
    return max(each) * tool.top_k if isinstance(tool, ManyFunctionsSettings) else sum(each)


def typical_usd(pattern: PatternConfig, config: AtlasConfig, priced: Mapping[Pair, float]) -> float:
    """What a run is expected to cost before any has been seen: its calls at their typical price.

    Of several ways of a branch the dearest counts, of a cascade all but the last rung, of a plan
    two parts, and of a critique no revision.

    Args:
        pattern: A checked pattern.
        config: The deployment.
        priced: US dollars of a typical call of each pair.
    """
    patterns = {of.name: of for of in config.patterns}
    tools = {tool.tool_id: config.usd_per_tool_call(tool.tool_id) for tool in config.tools}

    def chain(nodes: Sequence[NodeBase]) -> float:
        return sum(map(one, nodes))

    def one(node: NodeBase) -> float:
        match node:
            case AskNode(pair=str(pair)) if pair.startswith(PATTERN_PREFIX):
                inner = patterns.get(pair.removeprefix(PATTERN_PREFIX))
                return 0.0 if inner is None else typical_usd(inner, config, priced)
            case AskNode(pair=str(pair)) if pair == ROUTE:
                usd = [priced.get(of, 0.0) for of in routed_pairs(node, config)]
                return sum(usd) / max(1, len(usd))
            case AskNode():
                return priced.get(Pair.parse(node.pair), 0.0)
            case ToolNode():
                return tools.get(node.tool, 0.0)
            case RetrieveNode():
                return tools.get(node.corpus, 0.0)
            case BranchNode():
                return max(chain(node.otherwise), *(chain(case.do) for case in node.cases))
            case ParallelNode():
                join = one(node.join) if isinstance(node.join, AskNode) else 0.0
                return chain(node.do) * (1 if node.each is None else len(node.each)) + join
            case VoteNode():
                return chain(node.of)
            case CascadeNode():
                return chain(node.of[:-1])
            case CritiqueNode():
                return chain([node.draft, *node.critics])
            case PlanNode():
                join = one(node.join) if isinstance(node.join, AskNode) else 0.0
                return one(node.lead) + 2 * one(node.worker) + join
        return 0.0

    return chain(pattern.do)


def question_bytes(messages: Sequence[dict[str, Any]]) -> int:
    """Bytes of a conversation, as budgets count them: a picture counts as its tokens."""
    told, num_pictures = without_pictures(messages)
    text = json.dumps(told, ensure_ascii=False)
    return len(text.encode("utf-8", "surrogatepass")) + PICTURE_TOKENS * num_pictures
