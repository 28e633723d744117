"""Router: the Serve deployment that decides; a thin shell around the rules of this room."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from serve_app.config import AtlasConfig
from serve_app.errors import AtlasError, NoCandidate
from serve_app.models.watcher import PoolWatcher
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.cold_start import ColdStartRule, pair_cards
from serve_app.router.serving.follower import Following, PolicyFollower, Serving
from serve_app.router.serving.rollback import PolicyGuard
from serve_app.router.snapshots.build_rule import Cards, read_cards
from serve_app.schemas import Decision, Limits, MemberState, Pair, PoolState, Seen, ShadowDecision

if TYPE_CHECKING:  # it imports torch, which only a policy needs
    from serve_app.router.rules.policy_rule import LearnedRule

logger = logging.getLogger(__name__)

_NUM_CANDIDATES = 16
"""Named in a decision that is not explained: more than any request may try."""

_RETRY_S = 1.0
_EMBED_TIMEOUT_S = 300.0
"""How long the embedder may take for the texts of all cards; it may be starting itself."""

_Answer = Decision | AtlasError


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
                vectors = await self._embedder.embed.remote(new)
            self._vectors |= dict(zip(new, vectors, strict=True))
        self._vectors = {text: self._vectors[text] for text in sorted(texts)}
        known = self._vectors

        def encode(wanted: Sequence[str]) -> NDArray[np.float32]:
            return np.stack([known[text] for text in wanted])

        return read_cards(config, encode)

    async def decide(
        self,
        embeddings: NDArray[np.float32],
        limits: Sequence[Limits],
        explain: Sequence[bool],
        histories: Sequence[tuple[Seen, ...]] | None = None,
        last_answers: Sequence[NDArray[np.float32] | None] | None = None,
        request_ids: Sequence[str | None] | None = None,
        policy_versions: Sequence[int | None] | None = None,
    ) -> list[Decision | AtlasError]:
        """What each request does next: for a new one, the candidates from best to worst.

        Args:
            embeddings: (batch, dim) L2-normalised query embeddings.
            limits: What the caller of each allows; seconds from now on.
            explain: Whether to name every candidate, and what the profile holds like the query.
            histories: What the steps of each showed so far; `None` where all are new.
            last_answers: (dim,) embedding of the last answer of each, where there is one.
            request_ids: Decide which requests a canary gets; `None` gives it none.
            policy_versions: Of the policy that each began with; `None` for a new one.

        Returns:
            Per query its decision, or `NoCandidate` if no ready pair is within its limits, or the
            policy it began with is gone.
        """
        size = len(limits)
        histories = histories or [()] * size
        last_answers = last_answers or [None] * size
        request_ids = request_ids or [None] * size
        policy_versions = policy_versions or [None] * size
        pool = self._watcher.state
        answers: list[_Answer] = [NoCandidate("no model of the pool is ready")] * size
        if not pool.ready_pairs():
            return answers
        groups: dict[int, tuple[Serving, list[int]]] = {}
        for number in range(size):
            version = policy_versions[number]
            serving = (
                self._follower.choose(request_ids[number])
                if version is None
                else await self._follower.began_with(version)
            )
            if serving is None:
                answers[number] = NoCandidate(f"policy {version} is gone")
                continue
            groups.setdefault(serving.policy_version, (serving, []))[1].append(number)
        for serving, numbers in groups.values():
            batch = [
                _Asked(
                    embeddings[number],
                    limits[number],
                    histories[number],
                    last_answers[number],
                    explain[number],
                )
                for number in numbers
            ]
            decided = self._decide(serving, batch, pool)
            for number, answer in zip(numbers, decided, strict=True):
                answers[number] = answer
        new = [number for number in range(size) if policy_versions[number] is None]
        self._ask_shadow(answers, new, embeddings, limits, pool)
        return answers

    async def following(self) -> Following:
        """Which policies this replica serves with."""
        return self._follower.state()

    def _decide(self, serving: Serving, batch: Sequence[_Asked], pool: PoolState) -> list[_Answer]:
        """The decisions of one policy."""
        began_s = time.perf_counter()
        rule, ready = serving.rule, pool.ready_pairs()
        if isinstance(rule, ColdStartRule | ClusterRule):
            answers = [self._decide_alone(rule, asked, ready, pool) for asked in batch]
        else:
            answers = self._decide_together(rule, batch, ready, pool)
        seconds = time.perf_counter() - began_s
        return [
            answer
            if isinstance(answer, AtlasError)
            else replace(answer, policy_version=serving.policy_version, seconds=seconds)
            for answer in answers
        ]

    @staticmethod
    def _decide_alone(
        rule: ColdStartRule | ClusterRule, asked: _Asked, ready: tuple[Pair, ...], pool: PoolState
    ) -> _Answer:
        version, embedding = pool.pool_version, asked.embedding
        try:
            if isinstance(rule, ColdStartRule):
                return rule.decide(embedding, asked.limits, ready, version)
            named = None if asked.explain else _NUM_CANDIDATES
            decision = rule.decide(embedding, asked.limits, ready, version, num_candidates=named)
        except AtlasError as error:
            return error
        if asked.explain:
            decision = replace(decision, likeness=rule.likeness(embedding))
        return decision

    def _decide_together(
        self,
        rule: LearnedRule,
        batch: Sequence[_Asked],
        ready: tuple[Pair, ...],
        pool: PoolState,
    ) -> list[_Answer]:
        from serve_app.router.rules.policy_rule import Asked

        answers = rule.decide_batch(
            [
                Asked(
                    asked.embedding,
                    asked.limits,
                    asked.history,
                    asked.last_answer,
                    self._can_think(asked.limits, pool),
                    None if asked.explain else _NUM_CANDIDATES,
                )
                for asked in batch
            ],
            ready,
            pool.pool_version,
        )
        return [
            replace(answer, likeness=rule.likeness(asked.embedding))
            if asked.explain and isinstance(answer, Decision)
            else answer
            for asked, answer in zip(batch, answers, strict=True)
        ]

    def _can_think(self, limits: Limits, pool: PoolState) -> bool:
        """Whether there is a planner that answers now, and the caller admits it."""
        planner = self._planner
        if planner is None or not (limits.models is None or planner in limits.models):
            return False
        return any(
            member.model_id == planner and member.state is MemberState.READY
            for member in pool.models
        )

    def _ask_shadow(
        self,
        answers: list[_Answer],
        new: Sequence[int],
        embeddings: NDArray[np.float32],
        limits: Sequence[Limits],
        pool: PoolState,
    ) -> None:
        """Note in the first decisions what the policy in the shadow would have done."""
        shadow = self._follower.shadow
        if shadow is None or not new:
            return
        batch = [_Asked(embeddings[number], limits[number]) for number in new]
        try:
            decided = self._decide(shadow, batch, pool)
        except Exception:  # whatever is wrong with it, nobody asked for its opinion
            logger.exception("policy %d in the shadow failed", shadow.policy_version)
            return
        for number, would_be in zip(new, decided, strict=True):
            answer = answers[number]
            if isinstance(answer, AtlasError) or isinstance(would_be, AtlasError):
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


@dataclass(frozen=True, slots=True)
class _Asked:
    """One request of a batch."""

    embedding: NDArray[np.float32]
    limits: Limits
    history: tuple[Seen, ...] = ()
    last_answer: NDArray[np.float32] | None = None
    explain: bool = False
