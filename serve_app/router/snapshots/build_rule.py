"""From a snapshot to the rule that decides: one way, for every router replica and for the gate.

Whoever judges a snapshot builds its rule here, so that what is judged is what will serve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from serve_app.config import AtlasConfig
from serve_app.errors import SnapshotError
from serve_app.router.rules.base import Rule
from serve_app.router.rules.beliefs import Prior
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.cold_start import ColdStartRule, PairCard, pair_cards, pair_descriptors
from serve_app.router.rules.voi import VoiRule
from serve_app.router.snapshots.snapshot import RouterSnapshot
from serve_app.schemas import Pair

if TYPE_CHECKING:  # it imports torch, which only a policy needs
    from serve_app.router.rules.policy_rule import LearnedRule

Dollars = TypeVar("Dollars", float, NDArray[np.float32])

Encode = Callable[[Sequence[str]], NDArray[np.float32]]
"""texts -> (num_texts, dim) L2-normalised."""


@dataclass(frozen=True)
class Cards:
    """What the pairs of a pool say of themselves, embedded."""

    cold_start: ColdStartRule
    prior: Prior

    @classmethod
    def read(cls, cards: Sequence[PairCard], encode: Encode, top_k: int) -> Cards:
        """Embed the cards.

        Args:
            cards: Of the pairs.
            encode: Embeds their texts.
            top_k: As of `ColdStartRule`.
        """
        cold_start = ColdStartRule(cards, encode, top_k)
        prior = Prior(
            pairs=tuple(card.pair for card in cards),
            costs_usd=np.array([card.cost_usd for card in cards], np.float32),
            similarities=cold_start.qualities,
            descriptors=pair_descriptors(cards, encode),
        )
        return cls(cold_start, prior)

    def costs_usd(self) -> dict[str, float]:
        """US dollars of a typical call of each pair, by pair."""
        prior = self.prior
        return {
            str(pair): float(cost)
            for pair, cost in zip(prior.pairs, prior.costs_usd.tolist(), strict=True)
        }

    def descriptors_of(self, pairs: Sequence[Pair]) -> NDArray[np.float32]:
        """(num_pairs, descriptor) of some of the pairs."""
        assert self.prior.descriptors is not None
        return self.prior.descriptors[self._rows(pairs)]

    def likeness_of(
        self, embeddings: NDArray[np.float32], pairs: Sequence[Pair]
    ) -> NDArray[np.float32]:
        """(num_queries, num_pairs) similarity of queries to the cards of some of the pairs."""
        columns = self._rows(pairs)
        return np.stack([self.cold_start.qualities(of)[columns] for of in embeddings])

    def _rows(self, pairs: Sequence[Pair]) -> list[int]:
        index = {pair: row for row, pair in enumerate(self.prior.pairs)}
        return [index[pair] for pair in pairs]


def read_cards(config: AtlasConfig, encode: Encode | None = None) -> Cards:
    """Embed the cards of a deployment.

    Args:
        config: The deployment.
        encode: Embeds their texts; `None` loads the deployment's encoder into this process.
    """
    if encode is None:
        # Only here: a router replica asks the embedder's replicas.
        from serve_app.embedder import TextEncoder

        encode = TextEncoder(config.embedder, config.data_path() / "cache").encode
    return Cards.read(pair_cards(config), encode, config.router.example_top_k)


@dataclass(frozen=True)
class RuleSettings:
    """How a rule decides, beside what its snapshot says."""

    encoder: str
    """Embeds the queries; a snapshot of another one is refused."""
    fallback: Pair | None = None
    """Gets queries outside the profiled distribution; `None`: the pair that is best overall."""
    epsilon: float = 0.0
    """Share of the decisions that are explored."""
    method: Literal["epsilon_greedy", "thompson"] = "epsilon_greedy"

    @classmethod
    def of(cls, config: AtlasConfig, *, explores: bool) -> RuleSettings:
        """Those of a deployment.

        Args:
            config: The deployment.
            explores: Whether as configured; a rule that is judged never explores.
        """
        fallback, exploration = config.router.fallback, config.router.exploration
        return cls(
            encoder=config.embedder.model,
            fallback=None if fallback is None else Pair.parse(fallback),
            epsilon=exploration.epsilon if explores else 0.0,
            method=exploration.method,
        )


def build_rule(snapshot: RouterSnapshot | None, cards: Cards, settings: RuleSettings) -> Rule:
    """The rule of a snapshot, at the prices of today.

    Args:
        snapshot: As fitted; `None` is the cold-start rule.
        cards: Of the pool as it is now.
        settings: Of the deployment.

    Raises:
        SnapshotError: If the snapshot does not fit the encoder or the pool, or its policy is
            damaged.
    """
    if snapshot is None:
        return cards.cold_start
    check_fit(snapshot, cards, settings.encoder)
    build: type[ClusterRule | LearnedRule | VoiRule] = ClusterRule
    if snapshot.policy:
        # Only here: it takes torch.
        from serve_app.router.rules.policy_rule import LearnedRule

        build = LearnedRule
    elif snapshot.decides_by_value:
        build = VoiRule
    return build(
        repriced(snapshot, cards),
        cards.prior,
        epsilon=settings.epsilon,
        method=settings.method,
        fallback=settings.fallback,
    )


def check_fit(snapshot: RouterSnapshot, cards: Cards, encoder: str) -> None:
    """Refuse a snapshot that cannot decide in this deployment.

    Raises:
        SnapshotError: If it is of another encoder, or knows none of the pairs.
    """
    if snapshot.encoder != encoder:
        raise SnapshotError(
            f"the snapshot was fitted with encoder {snapshot.encoder!r}, and {encoder!r} embeds"
        )
    if not set(snapshot.pairs) & set(cards.prior.pairs):
        raise SnapshotError("the snapshot knows no pair of this pool")


def repriced(snapshot: RouterSnapshot, cards: Cards) -> RouterSnapshot:
    """A snapshot with its dollars at the prices of today.

    Args:
        snapshot: As fitted; one that does not say under which prices stays as it is.
        cards: Have the typical calls of today.
    """
    then, now = snapshot.card_costs_usd, cards.costs_usd()
    costs_usd, pair_costs_usd = snapshot.costs_usd.copy(), snapshot.pair_costs_usd.copy()
    for column, pair in enumerate(map(str, snapshot.pairs)):
        if pair in then and pair in now:
            of_cluster, of_pair = costs_usd[:, column], pair_costs_usd[column]
            costs_usd[:, column] = at_price(of_cluster, then[pair], now[pair])
            pair_costs_usd[column] = at_price(of_pair, then[pair], now[pair])
    return replace(snapshot, costs_usd=costs_usd, pair_costs_usd=pair_costs_usd)


def at_price(costs_usd: Dollars, then_usd: float, now_usd: float) -> Dollars:
    """Dollars that a pair took when its typical call cost one price, at another.

    They change as the typical call does; a pair that was free gets the price of one.

    Args:
        costs_usd: What was paid.
        then_usd: The typical call's price at that time.
        now_usd: Its price today.
    """
    if math.isclose(then_usd, now_usd, rel_tol=1e-5):
        return costs_usd
    if then_usd > 0:
        return costs_usd * (now_usd / then_usd)
    return costs_usd * 0 + now_usd
