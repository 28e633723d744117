"""The pool's tools, called by a caller directly: no model and no run in between.

The table of recovery holds here too: a call is made again where its worker died and it had no
effect that must not happen twice.
"""

from __future__ import annotations

import logging
from typing import Any

from serve_app.budget import Deadline
from serve_app.errors import ToolWorkerDied
from serve_app.orchestrator.recovery import Fault, Move, Recovery
from serve_app.tools.base import Function, ToolResult
from serve_app.tools.runner import ToolRunner

logger = logging.getLogger(__name__)


class DirectTools:
    """Calls functions of tools on behalf of a caller."""

    def __init__(self, runner: ToolRunner) -> None:
        """Call through a gateway's runner."""
        self._runner = runner

    def functions(self, tool_id: str) -> tuple[Function, ...]:
        """What a tool offers.

        Args:
            tool_id: Its name.

        Raises:
            ToolFailed: If the pool has no such tool.
        """
        return self._runner.functions(tool_id)

    async def call(
        self, tool_id: str, function: Function, arguments: dict[str, Any], deadline: Deadline
    ) -> ToolResult:
        """Call one function of a tool.

        Args:
            tool_id: The tool.
            function: One of its functions.
            arguments: As the caller sent them; checked against the function's schema.
            deadline: When the result must be there.

        Raises:
            ToolRetry: If the arguments are wrong.
            ToolFailed: If the call fails.
        """
        recovery = Recovery()
        while True:
            recovery.begin(function.effects)
            try:
                return await self._runner.run(
                    tool_id, arguments, deadline_s=deadline.remaining_s(), function=function.name
                )
            except ToolWorkerDied:
                recovery.deaths += 1
                can = not deadline.is_over()
                if recovery.move(Fault.TOOL_DIED, again=can) is not Move.AGAIN:
                    raise
                logger.warning("tool %s: its worker died; calling it again", tool_id)
