"""The cold-start rule: similarity to what each pair says of itself, minus the alpha-weighted price.

In come requests, out go the candidates of each from best to worst. It needs no outcome and no
training, so it serves from the first request on, and stays as the prior of pairs nobody has
measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve_app.config import AtlasConfig, PriceConfig
from serve_app.config.patterns.bound import typical_usd
from serve_app.router.rules.admission import Admission, affordable
from serve_app.router.rules.base import Answer, Batch, RoutingRequest, none_within_limits
from serve_app.router.rules.utility import normalised_cost, utility
from serve_app.schemas import NO_TOOL, Candidate, DecidedBy, Decision, Pair

_TYPICAL_PROMPT_TOKENS = 300
_TYPICAL_COMPLETION_TOKENS = 150
_CONFIDENCE_TEMPERATURE = 0.03
"""Utility difference that makes one pair e times as likely to be right as another."""


@dataclass(frozen=True)
class PairCard:
    """What one pair says of itself."""

    pair: Pair
    texts: tuple[str, ...]
    """Descriptor and example utterances; never empty."""
    cost_usd: float
    """Price of a typical call, in US dollars."""


def pair_cards(config: AtlasConfig) -> tuple[PairCard, ...]:
    """The card of every configured pair, and of every pattern that the router may choose.

    A pair's own examples speak for it. A pair without a card of its own borrows its model's and
    tool's examples.
    """
    own = {Pair.parse(card.pair): card for card in config.pairs}
    tools = {tool.tool_id: tool for tool in config.tools}
    cards = []
    for pair in config.all_pairs():
        model, tool, card = config.model(pair.model_id), tools.get(pair.tool_id), own.get(pair)
        descriptor = [
            model.card.description,
            tool.description if tool else "",
            card.description if card else "",
        ]
        borrowed = (*model.card.examples, *(tool.examples if tool else ()))
        examples = card.examples if card and card.examples else borrowed
        texts = (" ".join(part for part in descriptor if part) or str(pair), *examples)
        cost_usd = typical_cost_usd(
            model.price,
            config.usd_per_tool_call(pair.tool_id) if pair.tool_id != NO_TOOL else 0.0,
            tool.num_samples if tool is not None and tool.type == "best_of" else 1,
        )
        cards.append(PairCard(pair, texts, cost_usd))
    priced = {card.pair: card.cost_usd for card in cards}
    for pattern in (of for of in config.patterns if of.routable):
        texts = (pattern.answers or pattern.name, *pattern.examples)
        cost_usd = typical_usd(pattern, config, priced)
        cards.append(PairCard(Pair.of_pattern(pattern.name), texts, cost_usd))
    return tuple(cards)


def typical_cost_usd(
    price: PriceConfig, usd_per_tool_call: float = 0.0, num_samples: int = 1
) -> float:
    """US dollars of a typical call of a pair.

    Args:
        price: Of the model.
        usd_per_tool_call: Of the tool, which is called once.
        num_samples: Answers that are drawn.
    """
    return num_samples * (
        (
            price.usd_per_1m_prompt_tokens * _TYPICAL_PROMPT_TOKENS
            + price.usd_per_1m_completion_tokens * _TYPICAL_COMPLETION_TOKENS
        )
        / 1e6
        + usd_per_tool_call
    )


def pair_descriptors(
    cards: Sequence[PairCard], encode: Callable[[Sequence[str]], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """What is known of pairs beforehand, in numbers: what their descriptor says, and their price.

    Args:
        cards: The pairs.
        encode: texts -> (num_texts, dim) L2-normalised.

    Returns:
        (num_pairs, dim + 1): the embedding of the descriptor, and the normalised price.
    """
    said = encode([card.texts[0] for card in cards])
    price = normalised_cost([card.cost_usd for card in cards])
    return np.concatenate([said, price[:, None]], axis=1).astype(np.float32)


class ColdStartRule:
    """Nearest card wins; the price breaks near-ties as far as alpha says."""

    def __init__(
        self,
        cards: Sequence[PairCard],
        encode: Callable[[Sequence[str]], NDArray[np.float32]],
        top_k: int = 1,
    ) -> None:
        """Embed every card once.

        Args:
            cards: The pairs.
            encode: texts -> (num_texts, dim) L2-normalised.
            top_k: A pair's quality is the mean of this many of its nearest texts.
        """
        self._cards = tuple(cards)
        self._admission = Admission([card.pair for card in self._cards])
        self._costs_usd = np.array([card.cost_usd for card in self._cards])
        self._costs = normalised_cost(self._costs_usd)
        # Pairs that share texts share rows, so the matrix grows with the texts, not with the pairs.
        texts = sorted({text for card in self._cards for text in card.texts})
        row = {text: i for i, text in enumerate(texts)}
        self._embeddings = encode(texts).astype(np.float32)
        # (num_pairs, most texts of a card): rows of the embeddings, -1 where a card has fewer.
        most = max(top_k, *(len(card.texts) for card in self._cards))
        self._rows = np.full((len(self._cards), most), -1)
        for place, card in enumerate(self._cards):
            self._rows[place, : len(card.texts)] = [row[text] for text in card.texts]
        # A card with fewer texts than `top_k` is judged by those it has.
        self._num_counted = np.minimum(top_k, (self._rows >= 0).sum(axis=1))
        self._top_k = top_k

    def qualities(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        """Cosine similarity of the query to each pair's card, clipped to [0, 1].

        Args:
            embedding: (dim,) L2-normalised.

        Returns:
            (num_pairs,) in the order of the cards.
        """
        similarity = np.append(self._embeddings @ embedding, -np.inf)[self._rows]
        nearest = np.partition(similarity, -self._top_k, axis=1)[:, -self._top_k :]
        nearest[np.isneginf(nearest)] = 0.0
        best = nearest.sum(axis=1) / self._num_counted
        clipped: NDArray[np.float32] = np.clip(best, 0.0, 1.0).astype(np.float32)
        return clipped

    @property
    def snapshot(self) -> None:
        """Nothing was fitted, and nothing is learned."""
        return

    @property
    def clusters(self) -> None:
        """There is no path 1 without a snapshot."""
        return

    @property
    def costs_usd(self) -> NDArray[np.float32]:
        """(num_pairs,) US dollars of a typical call."""
        return self._costs_usd.astype(np.float32)

    def update(self, embedding: NDArray[np.float32], pair: Pair, score: float, owner: str) -> None:
        """Learn nothing: feedback needs a snapshot to lie beside."""

    def decide(self, batch: Batch) -> list[Answer]:
        """Order the available pairs that each caller's limits admit; all are named.

        Returns:
            Per request its decision, or `NoCandidate` if nothing is within its limits.
        """
        return [self._decide_request(request, batch) for request in batch.requests]

    def _decide_request(self, request: RoutingRequest, batch: Batch) -> Answer:
        limits = request.limits
        index = self._admission.available(batch.available)
        index = index[self._admission.admits(limits, index, batch.abilities)]
        index = index[affordable(limits, self._costs_usd[index])]
        if not len(index):
            return none_within_limits()
        quality = self.qualities(request.embedding)[index]
        cost = self._costs[index]
        gained = utility(limits.alpha, quality, cost)
        # Stable: equal utility keeps the configuration's order.
        order = np.argsort(-gained, kind="stable")
        weights = np.exp((gained - gained.max()) / _CONFIDENCE_TEMPERATURE)
        candidates = tuple(
            Candidate(
                self._cards[index[i]].pair,
                float(gained[i]),
                float(quality[i]),
                float(cost[i]),
                cost_usd=self._cards[index[i]].cost_usd,
            )
            for i in order
        )
        return Decision(
            candidates=candidates,
            path=DecidedBy.COLD_START,
            confidence=float(1 / weights.sum()),
            propensity=1.0,
            policy_version=0,
            pool_version=batch.pool_version,
        )
