"""Router: the Serve deployment that decides; a thin shell around the rules of this room."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.config import AtlasConfig
from serve_app.errors import AtlasError, NoCandidate
from serve_app.models.watcher import PoolWatcher
from serve_app.router.clusters import ClusterRule, Prior
from serve_app.router.cold_start import ColdStartRule, pair_cards, pair_descriptors
from serve_app.router.following import Following, PolicyFollower
from serve_app.schemas import Decision, Limits, Pair

_NUM_CANDIDATES = 16
"""Named in a decision that is not explained: more than any request may try."""


class Router:
    """Chooses a pair per request.

    Invariants:
        - A request reads the rule and the pool once, so its decision and the versions it reports
          fit together.
        - It chooses only among pairs whose model answered its last check.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: AtlasConfig, embedder: Any, controller: Any
    ) -> None:
        """Embed the cards, then follow the pool and the store."""
        cards = pair_cards(config)
        texts = sorted({text for card in cards for text in card.texts})
        vectors = dict(zip(texts, await embedder.embed.remote(texts), strict=True))

        def encode(wanted: Sequence[str]) -> NDArray[np.float32]:
            return np.stack([vectors[text] for text in wanted])

        cold_start = ColdStartRule(cards, encode, config.router.example_top_k)
        prior = Prior(
            pairs=tuple(card.pair for card in cards),
            costs_usd=np.array([card.cost_usd for card in cards], np.float32),
            similarities=cold_start.qualities,
            descriptors=pair_descriptors(cards, encode),
        )
        self._follower = PolicyFollower(config, cold_start, prior)
        self._watcher = PoolWatcher(controller)
        await self._watcher.first()
        await self._follower.refresh()
        self._follow_task = asyncio.get_running_loop().create_task(self._follower.follow())

    async def decide(
        self,
        embeddings: NDArray[np.float32],
        limits: Sequence[Limits],
        explain: Sequence[bool],
    ) -> list[Decision | AtlasError]:
        """The candidates for each query, from best to worst.

        Args:
            embeddings: (batch, dim) L2-normalised query embeddings.
            limits: What the caller of each allows.
            explain: Whether to name every candidate, and what the profile holds like the query.

        Returns:
            Per query its decision, or `NoCandidate` if no ready pair is within its limits.
        """
        pool = self._watcher.state
        ready = pool.ready_pairs()
        return [
            self._decide(embedding, allowed, ready, pool.pool_version, explained)
            for embedding, allowed, explained in zip(embeddings, limits, explain, strict=True)
        ]

    async def following(self) -> Following:
        """Which policy this replica serves with."""
        return self._follower.state()

    def _decide(
        self,
        embedding: NDArray[np.float32],
        limits: Limits,
        ready: tuple[Pair, ...],
        pool_version: int,
        explain: bool,
    ) -> Decision | AtlasError:
        began_s = time.perf_counter()
        if not ready:
            return NoCandidate("no model of the pool is ready")
        rule, policy_version = self._follower.rule, self._follower.policy_version
        try:
            if isinstance(rule, ClusterRule):
                named = None if explain else _NUM_CANDIDATES
                decision = rule.decide(embedding, limits, ready, pool_version, num_candidates=named)
                if explain:
                    decision = replace(decision, likeness=rule.likeness(embedding))
            else:
                decision = rule.decide(embedding, limits, ready, pool_version)
        except AtlasError as error:
            return error
        seconds = time.perf_counter() - began_s
        return replace(decision, policy_version=policy_version, seconds=seconds)
