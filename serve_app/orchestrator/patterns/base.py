"""What a pattern is."""

from __future__ import annotations

from typing import Protocol

from serve_app.orchestrator.answer import Answer
from serve_app.orchestrator.run import Run


class Pattern(Protocol):
    """A way to answer a request with calls of pairs; one object for all requests.

    A pattern runs steps on the engine, which puts them on record within the run's budget. What is
    sent to the run's `emit` has reached the caller: nothing can replace the answer from then on.
    """

    async def run(self, run: Run) -> Answer:
        """Answer a request that was decided on.

        Raises:
            AtlasError: If there is no answer.
        """
        ...
