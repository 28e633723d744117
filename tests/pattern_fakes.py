"""Declared patterns on the real engine, in front of models and tools that do as they are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from serve_app.budget import UNLIMITED, Budget, Caps, Deadline
from serve_app.config import AtlasConfig
from serve_app.config.patterns.check import check_patterns
from serve_app.config.patterns.language import PatternConfig
from serve_app.models.reply import ChoicePiece
from serve_app.orchestrator.answer import text_of
from serve_app.orchestrator.decision_client import Decider
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.pairs.runner import PairRunner
from serve_app.orchestrator.patterns.declared import Composed, PatternRunner
from serve_app.orchestrator.trace import Span, Trace
from serve_app.router.rules.base import Routed, RoutingRequest
from serve_app.schemas import Candidate, ChatCall, DecidedBy, Decision, Limits, Pair
from serve_app.tools.base import ToolResult
from serve_app.tools.runner import ToolRunner
from tests.path2_fakes import Engines, Handle, WordEmbedder

MODELS = ("small", "large", "lead")


def pattern(text: str) -> PatternConfig:
    """A pattern as a file has it."""
    return PatternConfig.model_validate(yaml.safe_load(text))


def pattern_config(folder: Path, *patterns: str, **extra: Any) -> AtlasConfig:
    """Three models, a judge and tools, with patterns that are checked."""
    remote = {
        "type": "remote",
        "base_url": "http://127.0.0.1:1/v1",
        "remote_model": "x",
        "max_retries": 0,
        "max_completion_tokens": 64,
    }
    prices = dict(zip(MODELS, (1.0, 100.0, 10.0), strict=True))
    config = AtlasConfig.model_validate(
        {
            "models": [
                remote
                | {
                    "model_id": name,
                    "tools": ["none", "calculator"] if name == "small" else ["none"],
                    "price": {
                        "usd_per_1m_prompt_tokens": usd,
                        "usd_per_1m_completion_tokens": usd,
                    },
                }
                for name, usd in prices.items()
            ]
            + [remote | {"model_id": "judge", "role": "verifier"}],
            "tools": [
                {"type": "calculator", "tool_id": "calculator", "price_usd_per_call": 1e-4},
                {"type": "retrieval", "tool_id": "handbook", "corpus": str(folder)},
                {"type": "python", "tool_id": "python"},
                {"type": "debug", "tool_id": "debug"},
                {"type": "retrieval", "tool_id": "bugs", "corpus": str(folder)},
            ],
            "patterns": [pattern(text) for text in patterns],
            "data_dir": str(folder),
        }
        | extra
    )
    check_patterns(config)
    return config


class Tools(ToolRunner):
    """Tools whose results are told.

    Attributes:
        says: By tool: a text, a `ToolResult`, an error, or a function of the arguments.
        calls: Every call, in its order.
    """

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__(config.tools)
        self.says: dict[str, Any] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []

    async def run(
        self, tool_id: str, arguments: Any, *, deadline_s: float, function: str | None = None
    ) -> ToolResult:
        self.calls.append((tool_id, arguments))
        said = self.says.get(tool_id, "100")
        if callable(said):
            said = said(arguments)
        if isinstance(said, Exception):
            raise said
        price_usd = self.tool(tool_id).config.price_usd_per_call
        return said if isinstance(said, ToolResult) else ToolResult(said, cost_usd=price_usd)


class Chooser:
    """A router that orders pairs as it is told.

    Attributes:
        order: Pairs, best first, with what it expects of them.
        limits: Of every question.
    """

    def __init__(self) -> None:
        self.order: dict[Pair, float] = {Pair("small", "none"): 0.6, Pair("large", "none"): 0.9}
        self.limits: list[Limits] = []
        self.path = DecidedBy.CLUSTERS

    async def decide(self, requests: Sequence[RoutingRequest]) -> list[Routed]:
        self.limits += [request.limits for request in requests]
        candidates = tuple(Candidate(pair, q, q, 0.0) for pair, q in self.order.items())
        decision = Decision(candidates, self.path, 1.0, 1.0, 1, 7)
        return [Routed(decision, WordEmbedder.one(of.text or "")) for of in requests]


class PatternBench:
    """One deployment with patterns."""

    def __init__(self, folder: Path, *patterns: str, says: Mapping[str, Any] | None = None) -> None:
        self.config = pattern_config(folder, *patterns)
        self.engines = Engines(says=dict(says or {}))
        self.tools = Tools(self.config)
        self.chooser = Chooser()
        self.pairs = PairRunner(self.config, self.engines, self.tools)
        self.router = Handle(self.chooser)
        self.decider = Decider(Handle(WordEmbedder()), self.router)
        self.runner = PatternRunner(self.pairs, self.decider, self.config)
        self.trace = Trace("req_1")
        self.pieces: list[ChoicePiece] = []
        self.budget = Budget(Deadline.after(30))

    async def run(
        self,
        question: str = "What is it?",
        *,
        name: str | None = None,
        stream: bool = False,
        seconds: float = 30.0,
        caps: Caps = UNLIMITED,
        messages: tuple[dict[str, Any], ...] | None = None,
        **sampling: Any,
    ) -> Composed:
        """Run the first pattern, or the one that is named."""
        call = ChatCall(
            request_id="req_1",
            model="atlas",
            messages=messages or ({"role": "user", "content": question},),
            sampling=sampling,
            limits=Limits(alpha=0.0, deadline_s=seconds),
        )

        async def emit(choices: Sequence[ChoicePiece]) -> None:
            self.pieces.extend(choices)

        self.trace = Trace("req_1")
        self.budget = Budget(Deadline.after(seconds), caps)
        work = PairWork(
            Pair.of_pattern(name or self.config.patterns[0].name),
            call,
            self.budget,
            self.trace.root,
            emit if stream else None,
        )
        return await self.runner.run(work)

    async def ask(self, question: str = "What is it?", **how: Any) -> str:
        """The text of the answer."""
        return text_of((await self.run(question, **how)).choices) or ""

    def prompts(self, model_id: str) -> list[str]:
        """The last message of each request that a model got."""
        return [body["messages"][-1]["content"] for body in self.engines.asked(model_id)]

    def spans(self, name: str) -> list[Span]:
        """Spans of a name."""
        return [span for span in self.trace.root.walk() if span.name == name]
