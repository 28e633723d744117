"""From a query to a decision: the hops to the embedder and the router, shared by whoever waits.

While a batch is on its way, the requests that arrive form the next one, so that under load the cost
of the two hops is divided by the batch, and a lone request goes at once. A request under way asks
again in the same batches, with the text of its last answer in place of its query.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from serve_app.budget import Deadline
from serve_app.errors import AtlasError, DeadlineExceeded, InvalidRequest, ReplicaDied
from serve_app.models.clients import call
from serve_app.orchestrator.recovery import again, pause_s
from serve_app.router.rules.base import UNKNOWN, Routed, RoutingRequest
from serve_app.schemas import Action, Candidate, Decision, Fact, Fixed, Limits, Seen

_BATCH_SIZE = 32
_MAX_IN_FLIGHT = 2
"""Batches under way at once, one embedding and one deciding; full ones do not wait for this."""

_MAX_KEPT = 2_048
"""Embeddings of the last different queries that are kept; some 4 MB."""

_TOLD_CANDIDATES = 3
"""Best candidates that a decision's span tells of."""
_MAX_DEATHS = 3
"""Replicas of the embedder or the router that may die over one request before it fails."""

_Vector = NDArray[np.float32]
_Answer = tuple[_Vector | None, Decision | None]


class _Embed(Protocol):
    def remote(self, texts: list[str], alone: bool = False, /) -> Any: ...


class EmbedderHandle(Protocol):
    """What is called on the `Embedder` deployment."""

    @property
    def embed(self) -> _Embed:
        """Answers with (num_texts, dim)."""
        ...

    @property
    def embed_lasting(self) -> _Embed:
        """The same, for texts that every start asks for."""
        ...


class _Decide(Protocol):
    def remote(self, requests: list[RoutingRequest], /) -> Any: ...


class RouterHandle(Protocol):
    """What is called on the `Router` deployment."""

    @property
    def decide(self) -> _Decide:
        """Answers with a `Routed` per request."""
        ...


@dataclass(frozen=True, slots=True)
class UnderWay:
    """What a request brings that was decided on before."""

    embedding: _Vector
    """(dim,) of its query."""
    policy_version: int
    """Of the policy that it began with."""
    history: tuple[Seen, ...]
    """What its steps showed."""
    answer: str | None = None
    """Text of the last answer, where it was not embedded yet."""
    answer_embedding: _Vector | None = None
    """(dim,) of the last answer, where it was."""
    fixed: Fixed | None = None
    """Of a request that is to have the same result again."""
    answers: tuple[_Vector | None, ...] = ()
    """(dim,) of each step's answer, as far as they were embedded."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    query: str
    limits: Limits | None
    """`None`: no decision is wanted, only the embedding."""
    deadline: Deadline
    explain: bool
    request_id: str | None
    under_way: UnderWay | None
    embedding: _Vector | None
    """(dim,) of the query, where it is known already."""
    fixed: Fixed | None
    facts: dict[str, Fact] | None
    """Of the span that is about the question; `None`: there is none."""
    began_s: float
    """Monotonic clock."""
    answer: asyncio.Future[_Answer]

    @property
    def text(self) -> str | None:
        """What is not embedded yet."""
        if self.embedding is not None:
            return None
        return self.query if self.under_way is None else self.under_way.answer

    def embedded(self, began_s: float, seconds: float) -> None:
        """Say when its text was embedded, and how long that took."""
        if self.facts is not None:
            after_s = round(max(0.0, began_s - self.began_s), 6)
            self.facts.update(embedding_after_s=after_s, embedding_s=round(seconds, 6))

    def settle(self, answer: _Answer | Exception) -> None:
        if self.answer.done():
            return
        if isinstance(answer, Exception):
            self.answer.set_exception(answer)
        else:
            self.answer.set_result(answer)


def facts_of(decision: Decision) -> dict[str, Fact]:
    """What a decision's span tells of it."""
    facts: dict[str, Fact] = {"action": str(decision.action)}
    if decision.action is Action.ROUTE:
        facts["pair"] = str(decision.pair)
        facts["candidates"] = ", ".join(map(_expected, decision.candidates[:_TOLD_CANDIDATES]))
    if decision.answer_step is not None:
        facts["answer_step"] = decision.answer_step
    known = [chance for chance in decision.chances if chance is not None]
    if known:
        facts |= {"answers": len(known), "best_chance": max(known)}
    if decision.look is not None:
        facts["look"] = str(decision.look)
    return facts | {
        "path": str(decision.path),
        "confidence": decision.confidence,
        "propensity": decision.propensity,
        "policy_version": decision.policy_version,
    }


def _expected(candidate: Candidate) -> str:
    """The score expected of a candidate, with its 95% interval."""
    interval = f"[{candidate.low:.2f} to {candidate.high:.2f}]"
    return f"{candidate.pair} {candidate.quality:.2f} {interval}"


class Kept:
    """The embeddings of the last different queries.

    Invariant: at most `_MAX_KEPT` of them, and no text.
    """

    def __init__(self) -> None:
        """Start with none."""
        self._vectors: dict[bytes, _Vector] = {}

    def get(self, query: str) -> _Vector | None:
        """(dim,) of a query that was embedded before; `None`: it is not kept."""
        key = _digest(query)
        vector = self._vectors.pop(key, None)
        if vector is not None:
            self._vectors[key] = vector  # the last one again
        return vector

    def keep(self, query: str, vector: _Vector) -> None:
        """Keep one, and let the one go that was asked for the longest ago."""
        self._vectors[_digest(query)] = vector
        if len(self._vectors) > _MAX_KEPT:
            del self._vectors[next(iter(self._vectors))]


def _digest(query: str) -> bytes:
    # A lone surrogate is no text; the embedder says so.
    return hashlib.blake2b(query.encode(errors="surrogatepass"), digest_size=16).digest()


class Decider:
    """Asks the embedder and the router.

    Invariants:
        - Requests are taken in the order of arrival; one that left is dropped before its batch.
        - A request fails only by itself: the others of its batch do not see its error.
        - A query that was embedded before is not embedded again, except where the same result is
          wanted again: the last bits of a vector depend on what shared its batch.
    """

    def __init__(
        self,
        embedder: EmbedderHandle,
        router: RouterHandle,
        left_alone: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        """Keep the handles.

        Args:
            embedder: Handle of the `Embedder` deployment.
            router: Handle of the `Router` deployment.
            left_alone: Models and patterns that no decision may name now.
        """
        self._left_alone = left_alone
        self._embedder = embedder
        self._router = router
        self._kept = Kept()
        self._waiting: deque[_Waiting] = deque()
        self._in_flight: set[asyncio.Task[None]] = set()

    async def decide(
        self,
        query: str,
        limits: Limits,
        deadline: Deadline,
        *,
        explain: bool = False,
        request_id: str | None = None,
        embedding: _Vector | None = None,
        fixed: Fixed | None = None,
        facts: dict[str, Fact] | None = None,
    ) -> tuple[_Vector | None, Decision]:
        """The (dim,) embedding of a query, `None` where it needed none, and the decision for it.

        Args:
            query: What is routed on.
            limits: What the caller allows.
            deadline: When the decision must be there.
            explain: Whether the decision names every candidate and what is like the query.
            request_id: Says whether a canary gets it; `None` never.
            embedding: (dim,) of the query, as `embed_query` gave it; `None`: it is not known yet.
            fixed: Of a request that is to have the same result again.
            facts: Takes what the embedding took; `None`: that is not of interest.

        Raises:
            NoCandidate: If no ready pair is within the limits.
            InvalidRequest: If the query cannot be embedded.
            EngineError: If the embedder or the router is away.
            DeadlineExceeded: If time is up.
        """
        embedding, decision = await self._wait(
            query,
            limits,
            deadline,
            explain,
            request_id,
            embedding=embedding,
            fixed=fixed,
            facts=facts,
        )
        assert decision is not None
        return embedding, decision

    async def embed_query(
        self, query: str, deadline: Deadline, fixed: Fixed | None = None
    ) -> _Vector:
        """The (dim,) embedding of a query, in a batch with whatever else waits.

        Args:
            query: Any text.
            deadline: When the embedding must be there.
            fixed: Of a request that is to have the same result again; it shares no batch.

        Raises:
            AtlasError: As `decide`.
        """
        embedding, _ = await self._wait(query, None, deadline, fixed=fixed)
        assert embedding is not None  # every query is embedded
        return embedding

    async def decide_next(
        self,
        under_way: UnderWay,
        limits: Limits,
        deadline: Deadline,
        facts: dict[str, Fact] | None = None,
    ) -> tuple[_Vector | None, Decision]:
        """What a request under way does next.

        Args:
            under_way: Where it stands.
            limits: What the caller allows: dollars and steps in all, seconds from now on.
            deadline: When the decision must be there.
            facts: As of `decide`.

        Returns:
            The (dim,) embedding of its last answer, `None` without one, and the decision.

        Raises:
            AtlasError: As `decide`.
        """
        embedding, decision = await self._wait(
            "", limits, deadline, under_way=under_way, fixed=under_way.fixed, facts=facts
        )
        assert decision is not None
        return embedding, decision

    async def embed(self, texts: list[str], deadline: Deadline) -> _Vector:
        """(num_texts, dim) unit vectors of texts that no decision is wanted for.

        Raises:
            InvalidRequest: If one of them cannot be embedded.
            EngineError: If the embedder is away.
            DeadlineExceeded: If time is up.
        """
        return await self._embedded(self._embedder.embed, texts, deadline)

    async def embed_lasting(self, texts: list[str], deadline: Deadline) -> _Vector:
        """As `embed`, for texts of the configuration."""
        return await self._embedded(self._embedder.embed_lasting, texts, deadline)

    async def _embedded(self, method: _Embed, texts: list[str], deadline: Deadline) -> _Vector:
        vectors: _Vector = await again(
            lambda: call(method.remote(texts), deadline), deadline, _MAX_DEATHS
        )
        return vectors

    async def _wait(
        self,
        query: str,
        limits: Limits | None,
        deadline: Deadline,
        explain: bool = False,
        request_id: str | None = None,
        under_way: UnderWay | None = None,
        embedding: _Vector | None = None,
        fixed: Fixed | None = None,
        facts: dict[str, Fact] | None = None,
    ) -> _Answer:
        if fixed is not None and limits is not None:
            limits = replace(limits, deadline_s=fixed.deadline_s)
        elif limits is not None and (without := self._left_alone()):
            limits = replace(limits, without=without)
        if embedding is None and under_way is None and fixed is None:
            embedding = self._kept.get(query)
            if embedding is not None and limits is None:
                return embedding, None
        answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append(
            _Waiting(
                query,
                limits,
                deadline,
                explain,
                request_id,
                under_way,
                embedding,
                fixed,
                facts,
                time.monotonic(),
                answer,
            )
        )
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
            # By itself: the last bits of a vector depend on what shares its batch.
            parts = [[request] for request in batch if request.fixed is not None]
            parts.append([request for request in batch if request.fixed is None])
            for part in filter(None, parts):
                task = asyncio.get_running_loop().create_task(self._run(part))
                self._in_flight.add(task)
                task.add_done_callback(self._landed)

    def _landed(self, task: asyncio.Task[None]) -> None:
        self._in_flight.discard(task)
        self._send()

    async def _run(self, batch: list[_Waiting], deaths: int = 0) -> None:
        """Settle every request of a batch.

        Args:
            batch: The requests.
            deaths: Replicas that died over them before.
        """
        is_alone = len(batch) == 1
        try:
            await self._ask(batch, max_deaths=_MAX_DEATHS - deaths if is_alone else 1)
        except (InvalidRequest, ReplicaDied) as error:
            if is_alone:
                batch[0].settle(error)
                return
            # One of them is at fault, perhaps: each by itself shows which.
            died = isinstance(error, ReplicaDied)
            if died:
                await asyncio.sleep(pause_s(error, 1))
            for request in batch:
                await self._run([request], deaths + died)
        except Exception as error:  # nobody awaits this task: whoever waits must hear of it
            for request in batch:
                request.settle(error)

    async def _ask(self, batch: list[_Waiting], max_deaths: int) -> None:
        deadline = max((request.deadline for request in batch), key=lambda d: d.at_s)
        if plain := [request for request in batch if request.limits is None]:
            await self._embed(plain, deadline, max_deaths)
        asked = [
            (request, _routing_request(request, request.limits))
            for request in batch
            if request.limits is not None
        ]
        while asked:
            asked = await self._route(asked, deadline, max_deaths)

    async def _embed(self, batch: Sequence[_Waiting], deadline: Deadline, max_deaths: int) -> None:
        """Settle what no decision is wanted for."""
        texts = [request.query for request in batch]
        how = (True,) if batch[0].fixed is not None else ()
        vectors = await again(
            lambda: call(self._embedder.embed.remote(texts, *how), deadline), deadline, max_deaths
        )
        for request, vector in zip(batch, vectors, strict=True):
            self._keep(request, request.query, vector)
            request.settle((vector, None))

    async def _route(
        self, asked: list[tuple[_Waiting, RoutingRequest]], deadline: Deadline, max_deaths: int
    ) -> list[tuple[_Waiting, RoutingRequest]]:
        """Settle what the router decides on.

        Returns:
            What the encoder has to look at first.
        """
        began_s = time.monotonic()
        questions = [question for _, question in asked]
        routed: list[Routed] = await again(
            lambda: call(self._router.decide.remote(questions), deadline), deadline, max_deaths
        )
        unsure = []
        for (request, question), said in zip(asked, routed, strict=True):
            if said.answer is None:
                unsure.append((request, replace(question, was_unsure=True)))
                continue
            if isinstance(said.answer, AtlasError):
                request.settle(said.answer)
                continue
            is_new = request.under_way is None
            vector = said.embedding
            if question.text is None:
                vector = question.embedding if is_new else question.last_answer
            elif vector is not None:
                request.embedded(began_s, said.embedding_s)
                if is_new:
                    self._keep(request, question.text, vector)
            request.settle((vector, said.answer))
        return unsure

    def _keep(self, request: _Waiting, text: str, vector: _Vector) -> None:
        """Keep what a query's embedding is, unless it was made apart from others."""
        if request.fixed is None:
            self._kept.keep(text, vector)


def _routing_request(request: _Waiting, limits: Limits) -> RoutingRequest:
    """A request as the router takes it.

    Args:
        request: As it waits.
        limits: What its caller allows.
    """
    way = request.under_way
    if way is None:
        return RoutingRequest(
            UNKNOWN if request.embedding is None else request.embedding,
            limits,
            text=request.text,
            explain=request.explain,
            request_id=request.request_id,
            policy_version=None if request.fixed is None else request.fixed.policy_version,
            as_fitted=request.fixed is not None,
        )
    return RoutingRequest(
        way.embedding,
        limits,
        way.history,
        way.answer_embedding,
        way.answers,
        text=request.text,
        explain=request.explain,
        policy_version=way.policy_version,
        as_fitted=request.fixed is not None,
    )
