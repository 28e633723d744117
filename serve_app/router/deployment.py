"""Router: the Serve deployment that decides; a thin shell around the rules of this room."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.budget import Deadline
from serve_app.config import AtlasConfig
from serve_app.config.abilities import abilities_of
from serve_app.errors import AtlasError, InvalidRequest, NoCandidate
from serve_app.models.clients import call
from serve_app.models.watcher import PoolWatcher
from serve_app.router.rules.admission import Abilities
from serve_app.router.rules.base import Answer, Batch, Routed, RoutingRequest
from serve_app.router.rules.cold_start import pair_cards
from serve_app.router.serving.follower import PolicyFollower, Served, Serving
from serve_app.router.serving.rollback import PolicyGuard
from serve_app.router.snapshots.build_rule import Cards, read_cards
from serve_app.schemas import Decision, Drift, Look, MemberState, PoolState, ShadowDecision

logger = logging.getLogger(__name__)

_RETRY_S = 1.0
_EMBED_TIMEOUT_S = 300.0
"""How long the embedder may take for the texts of all cards; it may be starting itself."""


class Router:
    """Chooses a pair per request.

    Invariants:
        - A request reads the rule and the pool once, so its decision and the versions it reports
          fit together; asked again, it gets the rule that it began with.
        - It chooses only among pairs whose model answered its last check.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: AtlasConfig, embedder: Any, controller: Any
    ) -> None:
        """Embed the cards, then follow the pool and the store."""
        self._embedder = embedder
        self._vectors: dict[str, NDArray[np.float32]] = {}
        """Embeddings of what the cards say, by text."""
        self._pool_changed = asyncio.Event()
        self._watcher = PoolWatcher(controller, lambda _: self._pool_changed.set())
        pool = await self._watcher.first()
        self._known = pool.config or config
        """The configuration with the pool whose cards the rules know."""
        self._abilities = abilities_of(self._known)
        self._abilities_of = pool
        """The pool as it was when the abilities were read."""
        self._follower = PolicyFollower(config, await self._read_cards(self._known))
        await self._follower.refresh()
        self._planner = config.router.planner
        self._guard = PolicyGuard(config, self._follower)
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._follower.follow()),
            loop.create_task(self._guard.watch()),
            loop.create_task(self._follow_pool()),
        ]

    async def _follow_pool(self) -> None:
        """Have the rules know the cards and prices of a changed pool, for ever."""
        while True:
            await self._pool_changed.wait()
            self._pool_changed.clear()
            config = self._watcher.state.config
            if config is None or config == self._known:
                continue
            try:
                await self._follower.use_cards(await self._read_cards(config))
                self._known = config
            except Exception:
                logger.exception("the cards of the changed pool cannot be read; trying again")
                await asyncio.sleep(_RETRY_S)
                self._pool_changed.set()

    async def _read_cards(self, config: AtlasConfig) -> Cards:
        """What the pairs of a pool say of themselves."""
        texts = {text for card in pair_cards(config) for text in card.texts}
        new = sorted(texts - self._vectors.keys())
        if new:
            async with asyncio.timeout(_EMBED_TIMEOUT_S):
                vectors = await self._embedder.embed_lasting.remote(new)
            self._vectors |= dict(zip(new, vectors, strict=True))
        self._vectors = {text: self._vectors[text] for text in sorted(texts)}
        known = self._vectors

        def encode(wanted: Sequence[str]) -> NDArray[np.float32]:
            return np.stack([known[text] for text in wanted])

        return read_cards(config, encode)

    async def decide(self, requests: Sequence[RoutingRequest]) -> list[Routed]:
        """What each request does next: for a new one, the candidates from best to worst.

        A query whose embedding is not known gets a first look. Where the first look decides none of
        the batch, the router asks the embedder. Where it decides some, the others come back with
        `was_unsure`, so that no request waits for an embedding that the request does not need.

        Returns:
            Per request its decision, or `NoCandidate` if no ready pair is within its limits, or the
            policy it began with is gone.

        Raises:
            InvalidRequest: If a text cannot be embedded.
            AtlasError: If the encoder is away.
        """
        pool = self._watcher.state
        ready = pool.ready_candidates()
        if not ready:
            return [Routed(NoCandidate("no model of the pool is ready"))] * len(requests)
        servings = [await self._serving(request) for request in requests]
        queries = _Queries(requests, servings, self._follower.shadow)
        embedding_s = 0.0
        if queries.unsure and not queries.may_wait:
            began_s = time.perf_counter()
            queries.embedded(await self._embed([requests[n] for n in queries.unsure]))
            embedding_s = time.perf_counter() - began_s
        answers: list[Answer | None] = [None] * len(requests)
        groups: dict[tuple[int, bool], tuple[Serving, list[int]]] = {}
        for number, serving in enumerate(servings):
            if serving is None:
                answers[number] = _gone(requests[number])
            elif number not in queries.unsure:
                which = (serving.policy_version, requests[number].as_fitted)
                groups.setdefault(which, (serving, []))[1].append(number)
        batch = Batch(
            tuple(queries.requests),
            ready,
            pool.pool_version,
            self._ready_planner(pool),
            self._abilities_in(pool),
        )
        for serving, numbers in groups.values():
            decided = _decide(serving, batch.part(numbers))
            for number, answer in zip(numbers, decided, strict=True):
                answers[number] = queries.told(number, answer)
        self._ask_shadow(answers, batch)
        return [
            Routed(answer, queries.vectors.get(number), embedding_s)
            for number, answer in enumerate(answers)
        ]

    async def _embed(self, requests: Sequence[RoutingRequest]) -> NDArray[np.float32]:
        """(num_requests, dim) embeddings of the texts of requests.

        Raises:
            AtlasError: If one of them cannot be embedded, or the encoder is away.
        """
        deadline = Deadline.after(max(request.limits.deadline_s for request in requests))
        alone = any(request.as_fitted for request in requests)
        texts = [request.text or "" for request in requests]
        vectors: NDArray[np.float32] = await call(
            self._embedder.embed.remote(texts, *((True,) if alone else ())), deadline
        )
        return vectors

    async def _serving(self, request: RoutingRequest) -> Serving | None:
        """The policy of a request; `None`: it is gone, or there never was one."""
        version = request.policy_version
        if request.as_fitted:
            return await self._follower.as_fitted(version)
        if version is None:
            return self._follower.choose(request.request_id)
        return await self._follower.began_with(version)

    async def following(self) -> Served:
        """Which policies this replica serves with."""
        return self._follower.state()

    async def drifts(self) -> tuple[Drift, ...]:
        """How far verdicts on each pair are from its profile."""
        return self._follower.drifts()

    def _abilities_in(self, pool: PoolState) -> Abilities:
        """What the candidates of a pool can take."""
        if self._abilities_of is not pool:
            self._abilities = abilities_of(pool.config or self._known)
            self._abilities_of = pool
        return self._abilities

    def _ready_planner(self, pool: PoolState) -> str | None:
        """The planner, where it answers now."""
        is_ready = any(
            member.model_id == self._planner and member.state is MemberState.READY
            for member in pool.models
        )
        return self._planner if is_ready else None

    def _ask_shadow(self, answers: list[Answer | None], batch: Batch) -> None:
        """Note in the first decisions what the policy in the shadow would have done."""
        shadow = self._follower.shadow
        new = [
            number
            for number, of in enumerate(batch.requests)
            if of.policy_version is None and not of.as_fitted and answers[number] is not None
        ]
        if shadow is None or not new:
            return
        try:
            decided = _decide(shadow, batch.part(new))
        except Exception:  # whatever is wrong with it, nobody asked for its opinion
            logger.exception("policy %d in the shadow failed", shadow.policy_version)
            return
        for number, would_be in zip(new, decided, strict=True):
            answer = answers[number]
            if not isinstance(answer, Decision) or isinstance(would_be, AtlasError):
                continue
            noted = ShadowDecision(
                policy_version=would_be.policy_version,
                action=would_be.action,
                pair=would_be.pair,
                path=would_be.path,
                confidence=would_be.confidence,
                propensity=would_be.propensity,
            )
            answers[number] = replace(answer, shadow=noted)


class _Queries:
    """What is known of the queries of a batch."""

    def __init__(
        self,
        requests: Sequence[RoutingRequest],
        servings: Sequence[Serving | None],
        shadow: Serving | None,
    ) -> None:
        """Look at the texts.

        Args:
            requests: Of the batch.
            servings: The policy of each.
            shadow: Is asked as well, and needs the encoder to be judged fairly; `None`: there is
                none.
        """
        self.requests = list(requests)
        """With the vectors to decide by."""
        self.unsure: list[int] = []
        """Places of the requests that the encoder has to look at."""
        self.vectors: dict[int, NDArray[np.float32]] = {}
        """(dim,) of what the encoder looked at, by place."""
        self._looks: dict[int, Look] = {}
        for number, (request, serving) in enumerate(zip(requests, servings, strict=True)):
            if request.text is None or serving is None:
                continue
            may_look = shadow is None and not request.is_known and not request.was_unsure
            vector = serving.look.look(request.text) if serving.look and may_look else None
            if vector is None:
                self.unsure.append(number)
            else:
                self.requests[number] = request.with_vector(vector)
                self._looks[number] = Look.STATIC

    @property
    def may_wait(self) -> bool:
        """Whether those that need the encoder are to come back, as a look was enough for others."""
        return bool(self._looks)

    def embedded(self, vectors: NDArray[np.float32]) -> None:
        """Take over (num_unsure, dim) embeddings; nobody is unsure any more."""
        for number, vector in zip(self.unsure, vectors, strict=True):
            self.requests[number] = self.requests[number].with_vector(vector)
            self.vectors[number] = vector
        self.unsure = []

    def told(self, number: int, answer: Answer) -> Answer:
        """An answer that says what it saw of the query."""
        if isinstance(answer, AtlasError):
            return answer
        return replace(answer, look=self._looks.get(number, Look.ENCODER))


def _gone(request: RoutingRequest) -> AtlasError:
    """Why a request has no policy."""
    version = request.policy_version
    if request.as_fitted and version is not None and not request.history:
        return InvalidRequest(
            f"atlas.policy_version: there is no policy {version} that can be loaded here",
            "atlas.policy_version",
        )
    which = "the serving policy" if version is None else f"policy {version}"
    return NoCandidate(f"{which} is gone")


def _decide(serving: Serving, batch: Batch) -> list[Answer]:
    """The decisions of one policy, with its version and the time that the batch took."""
    began_s = time.perf_counter()
    answers = serving.rule.decide(batch)
    seconds = time.perf_counter() - began_s
    return [
        answer
        if isinstance(answer, AtlasError)
        else replace(answer, policy_version=serving.policy_version, seconds=seconds)
        for answer in answers
    ]
