"""`vote`: several are asked, and most of them decide."""

from __future__ import annotations

import asyncio
import math
import sys
from dataclasses import dataclass, field, replace

from serve_app.config.patterns.language import ROUTE, AskNode, VoteNode
from serve_app.errors import AtlasError, EngineError
from serve_app.orchestrator.patterns.chain import run_node
from serve_app.orchestrator.patterns.view import NodeView, Result, Status, end, is_cap
from serve_app.orchestrator.trace import SpanKind
from serve_app.schemas import PATTERN_PREFIX, DecidedBy, Limits, Pair
from serve_app.tools.builtin.best_of import answer_key

_SURE = (0.05, 0.95)
"""Range in which a quality is believed."""
_LEAST_WEIGHT = 0.1
"""Of the voice of a pair that is more often wrong than right: it may still break a tie."""


@dataclass
class _Side:
    """Those who say the same."""

    weight: float = 0.0
    first: int = sys.maxsize
    """Place of its first voice in the list; the side of the earlier one wins a tie."""
    results: list[tuple[float, Result]] = field(default_factory=list)

    @property
    def best(self) -> Result:
        """What its weightiest voice said."""
        return max(self.results, key=lambda pair: pair[0])[1]


async def run(node: VoteNode, view: NodeView) -> Result:
    """Ask all at once; end as soon as no voice that is still to come can change the outcome.

    Where the same result is wanted again, all are waited for.

    Returns:
        The answer of the weightiest voice of the winning side. `data` has `sides`, each with its
        `answer`, `weight` and `pairs`, and `conflict`, whether there was more than one. It is
        partial where voices that a cap ended could have changed the outcome; a refusal where
        nobody answers and somebody refuses.

    Raises:
        AtlasError: If nobody answers.
    """
    weights = await _weights(node, view)
    inner = replace(view, streams=False)
    tasks = [asyncio.ensure_future(run_node(ask, inner)) for ask in node.of]
    sides: dict[str, _Side] = {}
    failures: list[AtlasError] = []
    cut_short, refused = 0.0, None
    try:
        left = dict(zip(tasks, weights, strict=True))
        while left and not _is_decided(sides, sum(left.values())):
            done, _ = await asyncio.wait(left, return_when=view.until)
            for task in sorted(done, key=tasks.index):
                weight, result = left.pop(task), task.result()
                key = answer_key(result.text) if result.is_usable else None
                if result.status is Status.REFUSED:
                    refused = result
                if result.failure is not None:
                    failures.append(result.failure)
                    cut_short += weight if key is None and is_cap(result.failure) else 0.0
                if key is not None:
                    side, place = sides.setdefault(key, _Side()), tasks.index(task)
                    side.weight += weight
                    side.first = min(side.first, place)
                    side.results.append((weight, _named(result, node.of[place])))
    finally:
        await end(*tasks)
    if not sides:
        if refused is not None:
            return refused
        raise next(iter(sorted(failures, key=is_cap)), EngineError("nobody gave an answer"))
    ordered = sorted(sides.values(), key=lambda side: (-side.weight, side.first))
    said = [
        {
            "answer": side.best.shown,
            "weight": round(side.weight, 4),
            "pairs": [str(result.pair) for _, result in side.results],
        }
        for side in ordered
    ]
    view.span.attributes |= {
        "sides": len(said),
        "voices": sum(len(side.results) for side in ordered),
        "weight": round(ordered[0].weight, 4),
    }
    best = replace(ordered[0].best, data={"sides": said, "conflict": len(said) > 1})
    if best.status is not Status.OK or not cut_short or _is_decided(sides, cut_short):
        return best
    return replace(best, status=Status.PARTIAL, failure=next(filter(is_cap, failures)))


def _named(result: Result, ask: AskNode) -> Result:
    """A voice with a pair to name it by: where a pattern spoke, the pattern."""
    is_pattern = ask.pair.startswith(PATTERN_PREFIX)
    return replace(result, pair=Pair.parse(ask.pair)) if is_pattern else result


def _is_decided(sides: dict[str, _Side], weight_left: float) -> bool:
    weights = sorted((side.weight for side in sides.values()), reverse=True)
    return bool(weights) and weights[0] > sum(weights[1:2]) + weight_left


async def _weights(node: VoteNode, view: NodeView) -> list[float]:
    """The weight of each voice; all the same where nothing is profiled or the router is away."""
    pairs = [
        None if ask.pair == ROUTE or ask.pair.startswith(PATTERN_PREFIX) else Pair.parse(ask.pair)
        for ask in node.of
    ]
    if node.weights == "equal" or not any(pairs):
        return [1.0] * len(pairs)
    limits = Limits(
        alpha=0.0,
        deadline_s=view.budget.deadline.remaining_s(),
        models=frozenset(pair.model_id for pair in pairs if pair is not None),
    )
    patience = view.budget.part(0.25).deadline
    try:
        with view.span.child(SpanKind.DECISION, "weights"):
            _, decision = await view.parts.decider.decide(
                view.question, limits, patience, explain=True, fixed=view.work.call.fixed
            )
    except AtlasError:
        return [1.0] * len(pairs)
    if decision.path is DecidedBy.COLD_START:
        return [1.0] * len(pairs)  # how like a card is to the question is no probability
    quality = {candidate.pair: candidate.quality for candidate in decision.candidates}
    return [log_odds(quality.get(pair, 0.5)) if pair else 1.0 for pair in pairs]


def log_odds(quality: float) -> float:
    """What a voice weighs that is right with this probability (Nitzan and Paroush, 1982).

    Args:
        quality: In [0, 1].
    """
    low, high = _SURE
    believed = min(max(quality, low), high)
    return max(_LEAST_WEIGHT, math.log(believed / (1 - believed)))
