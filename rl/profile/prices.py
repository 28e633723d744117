"""What outcomes cost at the prices of today, though they were paid at those of another day.

A price is no setting that an answer depends on, so a profile stays good when one changes, and its
dollars do not. Every price the pool ever had is in its history.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from serve_app.config import AtlasConfig, PriceConfig
from serve_app.router.rules.cold_start import typical_cost_usd
from serve_app.router.snapshots.build_rule import at_price
from serve_app.schemas import NO_TOOL, Pair
from serve_app.store import PoolRevision, ProfileOutcome, ProfileThought, Store, pool_history

_Paid = TypeVar("_Paid", ProfileOutcome, ProfileThought)
_Members = dict[str, dict[str, Any]]


class PriceHistory:
    """The prices of typical calls, from the pool's first kept revision until today."""

    def __init__(self, config: AtlasConfig, history: Sequence[PoolRevision]) -> None:
        """Take over the history.

        Args:
            config: The deployment as it is today.
            history: Of its pool, the oldest revision first.
        """
        self._began_unix_s = [revision.created_unix_s for revision in history]
        self._pools = [
            (
                {model["model_id"]: model for model in revision.models},
                {tool["tool_id"]: tool for tool in revision.tools},
            )
            for revision in history
        ]
        self._today = (
            {model.model_id: model.model_dump(mode="json") for model in config.models},
            {tool.tool_id: tool.model_dump(mode="json") for tool in config.tools},
        )
        self._known: dict[tuple[int, Pair], tuple[float | None, float | None]] = {}

    @classmethod
    async def read(cls, config: AtlasConfig, store: Store) -> PriceHistory:
        """The history that a store holds.

        Raises:
            StoreError: If the store is away.
        """
        return cls(config, await pool_history(store))

    def of_today(self, paid: Sequence[_Paid]) -> list[_Paid]:
        """Outcomes or thoughts with their dollars at the prices of today.

        Whatever was paid before the first kept revision stays as it was.
        """
        return [self._of_today(one) for one in paid]

    def _of_today(self, paid: _Paid) -> _Paid:
        number = bisect_right(self._began_unix_s, paid.created_unix_s)
        if not number:
            return paid
        pair = paid.pair if isinstance(paid, ProfileOutcome) else Pair(paid.model_id, NO_TOOL)
        then, now = self._typical_at(number - 1, pair)
        if then is None or now is None:
            return paid
        return replace(paid, cost_usd=at_price(paid.cost_usd, then, now))

    def _typical_at(self, number: int, pair: Pair) -> tuple[float | None, float | None]:
        """US dollars of a pair's typical call under a revision, and today."""
        if (number, pair) not in self._known:
            prices = _typical(self._pools[number], pair), _typical(self._today, pair)
            self._known[number, pair] = prices
        return self._known[number, pair]


def _typical(pool: tuple[_Members, _Members], pair: Pair) -> float | None:
    """US dollars of a pair's typical call; `None` where the pool lacks it."""
    models, tools = pool
    model, tool = models.get(pair.model_id), tools.get(pair.tool_id)
    if model is None:
        return None
    price = PriceConfig.model_validate(model["price"])
    if pair.tool_id == NO_TOOL:
        return typical_cost_usd(price)
    if tool is None:
        return None
    called = [tools[name] for name in tool.get("members", (pair.tool_id,)) if name in tools]
    usd_per_call = max((of["price_usd_per_call"] for of in called), default=0.0)
    return typical_cost_usd(price, usd_per_call, tool.get("num_samples", 1))
