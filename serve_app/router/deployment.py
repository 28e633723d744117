"""Router: the Serve deployment that decides; a thin shell around the rules of this room."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.config import AtlasConfig
from serve_app.errors import NoCandidate
from serve_app.models.watcher import PoolWatcher
from serve_app.router.cold_start import ColdStartRule, pair_cards
from serve_app.schemas import Decision, Limits


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
        vectors = dict(zip(texts, await embedder.embed_many.remote(texts), strict=True))
        self._rule = ColdStartRule(
            cards,
            lambda wanted: np.stack([vectors[text] for text in wanted]),
            config.router.example_top_k,
        )
        self._watcher = PoolWatcher(controller)
        await self._watcher.first()

    async def decide(self, embedding: NDArray[np.float32], limits: Limits) -> Decision:
        """The candidates for one query, from best to worst.

        Args:
            embedding: (dim,) L2-normalised query embedding.
            limits: What the caller allows.

        Raises:
            NoCandidate: If no ready pair is within the limits.
        """
        began_s = time.perf_counter()
        pool = self._watcher.state
        ready = pool.ready_pairs()
        if not ready:
            raise NoCandidate("no model of the pool is ready")
        decision = self._rule.decide(embedding, limits, ready, pool.pool_version)
        return replace(decision, seconds=time.perf_counter() - began_s)
