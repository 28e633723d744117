"""Runs pairs: finds how the pair's tool joins its model, and has the join run."""

from __future__ import annotations

from collections.abc import Mapping

from serve_app.config import AtlasConfig
from serve_app.config.tools import OcrConfig
from serve_app.errors import InvalidRequest
from serve_app.models.clients import ModelClients
from serve_app.models.reply import Choice
from serve_app.orchestrator.direct import DirectTools
from serve_app.orchestrator.pairs import context, function, plain, sampling
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.pairs.join import Join, JoinParts
from serve_app.orchestrator.pairs.paid import PaidModels, PaidTools
from serve_app.orchestrator.pairs.selection import Embed, FunctionSelector
from serve_app.schemas import ChatCall, ToolKind
from serve_app.tools.runner import ToolRunner

JOINS: Mapping[ToolKind, Join] = {
    "none": plain.run,
    "function": function.run,
    "context": context.run,
    "sampling": sampling.run,
}


class PairRunner:
    """Runs pairs; one per gateway replica."""

    def __init__(
        self,
        config: AtlasConfig,
        clients: ModelClients,
        runner: ToolRunner | None = None,
        embed: Embed | None = None,
    ) -> None:
        """Take the configured tools; `start` gets their workers ready.

        Args:
            config: The deployment.
            clients: Handles to the models.
            runner: Runs the tools; `None` makes one.
            embed: The deployment's encoder; `None`: functions and turns are selected by words
                alone.
        """
        self._runner = runner or ToolRunner(config.tools, config.data_path() / "cache")
        limits = config.gateway.limits
        self.parts = JoinParts(
            PaidModels(clients, config.context, embed, config.gateway.breaker_failures),
            PaidTools(self._runner),
            FunctionSelector(embed),
            limits.max_tool_rounds,
            limits.max_calls_per_reply,
        )
        self.parts.models.use(config.models)
        self._kinds: dict[str, ToolKind] = {tool.tool_id: tool.kind for tool in config.tools}
        self.direct = DirectTools(self._runner)
        """The tools, for a caller that calls them itself."""

    def reads_pictures(self, tool_id: str) -> bool:
        """Whether a tool is for requests with pictures alone."""
        return tool_id in self._runner and isinstance(self._runner.tool(tool_id).config, OcrConfig)

    def use(self, config: AtlasConfig) -> None:
        """Take over a changed pool; what was there stays usable for requests under way."""
        self.parts.models.use(config.models)
        self._runner.use(config.tools)
        self._kinds |= {tool.tool_id: tool.kind for tool in config.tools}

    async def start(self) -> None:
        """Start the tools' workers and keep them warm."""
        await self._runner.start()

    def close(self) -> None:
        """Let go of the tools' workers, and give up what is under way."""
        self._runner.close()
        self.parts.models.close()

    def kind(self, tool_id: str) -> ToolKind:
        """How a tool joins a model, also one that cannot be made."""
        return self._kinds.get(tool_id, "none")

    def check_key(self, tool_id: str, call: ChatCall) -> None:
        """Refuse a request that could only fail for want of an idempotency key.

        Raises:
            KeyRequired: If the tool acts once, whatever is called of it, and there is none.
        """
        self.parts.tools.check_key(tool_id, call)

    async def run(self, work: PairWork) -> list[Choice]:
        """Run a pair on a request; nothing re-writes what the model said.

        Returns:
            The choices of its answer.

        Raises:
            InvalidRequest: If the engine refuses the request.
            UnfitForPair: If another pair may take the request: this one's context, its tool or its
                price does not fit.
            EngineError, ToolFailed, DeadlineExceeded: If the run fails.
        """
        kind, num_choices = self.kind(work.pair.tool_id), work.call.sampling.get("n", 1)
        if kind in ("function", "sampling") and num_choices > 1:
            raise InvalidRequest(
                f"n: the pair {work.pair} gives one answer, got {num_choices}", "n"
            )
        if work.pair.tool_id in self._runner:
            await self._runner.ready(work.pair.tool_id, work.budget.deadline.remaining_s())
        return await JOINS[kind](work, self.parts)
