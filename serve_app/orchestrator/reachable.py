"""What rules may send a request to: what answers now, within the request's needs and lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from serve_app.config import AtlasConfig
from serve_app.config.abilities import abilities_of
from serve_app.orchestrator.patterns.declared import can_be_pattern
from serve_app.router.rules.admission import Admission
from serve_app.schemas import NO_TOOL, ChatCall, Limits, MemberState, Pair, PoolState


class Reachable:
    """The candidates of a pool at one version."""

    def __init__(self, pool: PoolState, config: AtlasConfig) -> None:
        """Index a pool.

        Args:
            pool: What answers now.
            config: Says what models can take.
        """
        self.pool_version = max(0, pool.pool_version)
        plain = [
            Pair(member.model_id, NO_TOOL)
            for member in pool.models
            if member.state is MemberState.READY
        ]
        patterns = map(Pair.of_pattern, pool.ready_patterns())
        named = tuple(dict.fromkeys([*pool.ready_candidates(), *plain, *patterns]))
        self._index = {pair: number for number, pair in enumerate(named)}
        self._routable = pool.ready_candidates()
        self._admission = Admission(named)
        self._abilities = abilities_of(config)

    def admitted(self, pairs: Iterable[Pair], limits: Limits) -> list[Pair]:
        """Those of some candidates that answer now, and that a request's needs and lists admit."""
        there = [pair for pair in pairs if pair in self._index]
        index = np.array([self._index[pair] for pair in there], np.intp)
        admits = self._admission.admits(limits, index, self._abilities)
        return [pair for pair, may in zip(there, admits.tolist(), strict=True) if may]

    def candidates(self, names: Sequence[str], call: ChatCall, limits: Limits) -> list[Pair]:
        """Those of some named candidates that can take a request, in their order."""
        pairs = self.admitted(map(Pair.parse, names), limits)
        takes_patterns = can_be_pattern(call)
        return [pair for pair in pairs if takes_patterns or not pair.is_pattern]

    def routable(self, limits: Limits) -> list[Pair]:
        """What the router could choose within some limits."""
        return self.admitted(self._routable, limits)
