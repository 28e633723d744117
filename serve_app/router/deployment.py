"""Router: the Serve deployment that decides; a thin shell around the rules of this room."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.config import AtlasConfig
from serve_app.errors import AtlasError, NoCandidate
from serve_app.models.watcher import PoolWatcher
from serve_app.router.cold_start import ColdStartRule, pair_cards
from serve_app.schemas import Decision, Limits, Pair


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
        """Embed the cards, then follow the pool."""
        cards = pair_cards(config)
        texts = sorted({text for card in cards for text in card.texts})
        vectors = dict(zip(texts, await embedder.embed.remote(texts), strict=True))
        self._rule = ColdStartRule(
            cards,
            lambda wanted: np.stack([vectors[text] for text in wanted]),
            config.router.example_top_k,
        )
        self._watcher = PoolWatcher(controller)
        await self._watcher.first()

    async def decide(
        self, embeddings: NDArray[np.float32], limits: Sequence[Limits]
    ) -> list[Decision | AtlasError]:
        """The candidates for each query, from best to worst.

        Args:
            embeddings: (batch, dim) L2-normalised query embeddings.
            limits: What the caller of each allows.

        Returns:
            Per query its decision, or `NoCandidate` if no ready pair is within its limits.
        """
        pool = self._watcher.state
        ready = pool.ready_pairs()
        return [
            self._decide(embedding, allowed, ready, pool.pool_version)
            for embedding, allowed in zip(embeddings, limits, strict=True)
        ]

    def _decide(
        self,
        embedding: NDArray[np.float32],
        limits: Limits,
        ready: tuple[Pair, ...],
        pool_version: int,
    ) -> Decision | AtlasError:
        began_s = time.perf_counter()
        if not ready:
            return NoCandidate("no model of the pool is ready")
        try:
            decision = self._rule.decide(embedding, limits, ready, pool_version)
        except AtlasError as error:
            return error
        return replace(decision, seconds=time.perf_counter() - began_s)
