"""Which verdicts of users count in a fit, so that no API key decides what it says.

In come verdicts, out come those that count. Where no key is asked for, all do. Of those with a
key, one pair and one region of the profile at a time: three keys or more must have rated the pair
there, none of them counts more often than half as often as the others together, and the two whose
scores are highest and lowest on average are left out, as `router.rules.voices` does while serving.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from rl.fit import estimators
from rl.fit.estimators import Float
from serve_app.schemas import LOCAL_OWNER
from serve_app.store import Verdict

logger = logging.getLogger(__name__)

_NUM_REGIONS = 32
_QUESTIONS_PER_REGION = 4
"""On average at least; a small profile has fewer regions."""


def fair_verdicts(verdicts: Sequence[Verdict], questions: Float) -> list[Verdict]:
    """The verdicts that count, in their order.

    Args:
        verdicts: Oldest first.
        questions: (num_questions, dim) embeddings of the profile's questions: the regions are
            theirs, so that no traffic moves them.
    """
    of_keys = [verdict for verdict in verdicts if verdict.owner != LOCAL_OWNER]
    if not of_keys:
        return list(verdicts)
    number = max(1, min(_NUM_REGIONS, len(questions) // _QUESTIONS_PER_REGION))
    centroids = estimators.k_means(questions, number, seed=0)
    asked = np.stack([np.frombuffer(verdict.embedding, "<f4") for verdict in of_keys])
    regions = estimators.assign(asked, centroids, 1, 1.0).argmax(axis=1)
    cells = defaultdict(list)
    for verdict, region in zip(of_keys, regions.tolist(), strict=True):
        cells[verdict.pair, region].append(verdict)
    kept = {verdict.request_id for cell in cells.values() for verdict in _fair_in(cell)}
    logger.info("%d of %d verdicts given with a key count", len(kept), len(of_keys))
    return [
        verdict
        for verdict in verdicts
        if verdict.owner == LOCAL_OWNER or verdict.request_id in kept
    ]


def _fair_in(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Those of one cell that count: the last ones of each key, without the two extreme keys."""
    by_owner: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        by_owner[verdict.owner].append(verdict)
    share = _share([len(given) for given in by_owner.values()])
    if not share:
        return []
    last = {owner: given[-share:] for owner, given in by_owner.items()}
    ranked = sorted(last, key=lambda owner: (float(np.mean([v.score for v in last[owner]])), owner))
    return [verdict for owner in ranked[1:-1] for verdict in last[owner]]


def _share(counts: Sequence[int]) -> int:
    """The most verdicts of one key that are no more than half of all others' that count."""
    share = max(counts)
    while share * 3 > (total := sum(min(count, share) for count in counts)):
        share = total // 3
    return share
