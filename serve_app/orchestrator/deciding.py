"""From a query to a decision: the hops to the embedder and the router, shared by whoever waits.

While a batch is on its way, the requests that arrive form the next one, so that under load the cost
of the two hops is divided by the batch, and a lone request goes at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import AtlasError, DeadlineExceeded, InvalidRequest
from serve_app.orchestrator.engines import Deadline, call
from serve_app.schemas import Decision, Limits

_BATCH_SIZE = 32
_MAX_IN_FLIGHT = 2
"""Batches under way at once, one embedding and one deciding; full ones do not wait for this."""

_Answer = tuple[NDArray[np.float32], Decision]


@dataclass(frozen=True, slots=True)
class _Waiting:
    query: str
    limits: Limits
    deadline: Deadline
    explain: bool
    answer: asyncio.Future[_Answer]

    def settle(self, answer: _Answer | Exception) -> None:
        if self.answer.done():
            return
        if isinstance(answer, Exception):
            self.answer.set_exception(answer)
        else:
            self.answer.set_result(answer)


class Decider:
    """Asks the embedder and the router.

    Invariants:
        - Requests are taken in the order of arrival; one that left is dropped before its batch.
        - A request fails only by itself: the others of its batch do not see its error.
    """

    def __init__(self, embedder: Any, router: Any) -> None:
        """Keep the handles.

        Args:
            embedder: Handle of the `Embedder` deployment.
            router: Handle of the `Router` deployment.
        """
        self._embedder = embedder
        self._router = router
        self._waiting: deque[_Waiting] = deque()
        self._in_flight: set[asyncio.Task[None]] = set()

    async def decide(
        self, query: str, limits: Limits, deadline: Deadline, *, explain: bool = False
    ) -> _Answer:
        """The (dim,) embedding of a query, and the decision for it.

        Args:
            query: What is routed on.
            limits: What the caller allows.
            deadline: When the decision must be there.
            explain: Whether the decision names every candidate and what is like the query.

        Raises:
            NoCandidate: If no ready pair is within the limits.
            InvalidRequest: If the query cannot be embedded.
            EngineError: If the embedder or the router is away.
            DeadlineExceeded: If time is up.
        """
        answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(query, limits, deadline, explain, answer))
        self._send()
        try:
            async with asyncio.timeout(deadline.remaining_s()):
                return await answer
        except TimeoutError:
            raise DeadlineExceeded("the decision did not come within the deadline") from None

    def _send(self) -> None:
        while self._waiting and (
            len(self._in_flight) < _MAX_IN_FLIGHT or len(self._waiting) >= _BATCH_SIZE
        ):
            size = min(_BATCH_SIZE, len(self._waiting))
            taken = [self._waiting.popleft() for _ in range(size)]
            batch = [request for request in taken if not request.answer.done()]
            if batch:
                task = asyncio.get_running_loop().create_task(self._run(batch))
                self._in_flight.add(task)
                task.add_done_callback(self._landed)

    def _landed(self, task: asyncio.Task[None]) -> None:
        self._in_flight.discard(task)
        self._send()

    async def _run(self, batch: list[_Waiting]) -> None:
        try:
            await self._ask(batch)
        except InvalidRequest as error:
            if len(batch) == 1:
                batch[0].settle(error)
                return
            for request in batch:
                await self._run([request])
        except Exception as error:  # nobody awaits this task: whoever waits must hear of it
            for request in batch:
                request.settle(error)

    async def _ask(self, batch: list[_Waiting]) -> None:
        deadline = max((request.deadline for request in batch), key=lambda d: d.at_s)
        queries = [request.query for request in batch]
        embeddings = await call(self._embedder.embed.remote(queries), deadline)
        limits = [request.limits for request in batch]
        explain = [request.explain for request in batch]
        decisions: list[Decision | AtlasError] = await call(
            self._router.decide.remote(embeddings, limits, explain), deadline
        )
        for request, embedding, decision in zip(batch, embeddings, decisions, strict=True):
            request.settle(decision if isinstance(decision, AtlasError) else (embedding, decision))
