"""PolicyFollower: a router replica's own rule, kept equal to what the store says serves.

Every replica asks the store by itself, so a new one, a restarted one and an old one agree: the
last policy published that loads, and on top of it every verdict since that policy was fitted.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from serve_app.config import AtlasConfig
from serve_app.errors import AtlasError, SnapshotError
from serve_app.router.clusters import ClusterRule, Prior
from serve_app.router.cold_start import ColdStartRule
from serve_app.router.library import SnapshotLibrary
from serve_app.router.snapshot import RouterSnapshot, load_snapshot
from serve_app.schemas import Pair
from serve_app.store import (
    Policy,
    Store,
    add_snapshot,
    publish,
    read_verdicts,
    serving_policies,
    verdict_ids,
)

logger = logging.getLogger(__name__)

LEARNED_UNTIL = "learned_until_unix_s"
"""Metadata of a snapshot: verdicts up to this time were fitted, later ones are learned online."""

_MAX_REPLAYED = 20_000
"""Verdicts learned at once at most; the discount makes older ones weigh next to nothing."""
_OVERLAP_S = 120.0
"""A verdict may become visible this much later than its time says: clocks differ, and embeddings of
pinned requests are written behind the answer."""
_COMPLAIN_EVERY_S = 30.0


@dataclass(frozen=True)
class Following:
    """What a replica serves with."""

    policy_version: int
    """0 before the first policy."""
    snapshot_id: str | None
    """`None` is the cold-start rule."""
    verdicts: int
    """Learned since the policy was loaded."""
    refused: str | None
    """Why the newest policy, or the configuration's snapshot, does not serve."""


@dataclass
class _Serving:
    """A policy in service."""

    policy: Policy
    rule: ColdStartRule | ClusterRule
    learned: set[str] = field(default_factory=set)
    """Request ids of the verdicts that were learned and may be seen again."""
    num_learned: int = 0


class PolicyFollower:
    """Follows the store; `rule` is what serves now.

    Invariants:
        - A policy that cannot be loaded, or was fitted with another encoder, never serves; the one
          before it goes on.
        - A policy learns a verdict once.
    """

    def __init__(self, config: AtlasConfig, cold_start: ColdStartRule, prior: Prior) -> None:
        """Begin with the cold-start rule.

        Args:
            config: The deployment.
            cold_start: Serves before the first policy.
            prior: What the cards say, for pairs that a policy does not know.
        """
        self.rule: ColdStartRule | ClusterRule = cold_start
        self._config = config
        self._cold_start = cold_start
        self._prior = prior
        self._library = SnapshotLibrary(config.snapshots_path())
        self._store: Store | None = None
        self._serving: _Serving | None = None
        self._offered = False
        """Whether the configuration's snapshot was put before the store."""
        self._refused: dict[int, tuple[float, str]] = {}
        """Policy version (0: the configuration's snapshot) to when it may be tried again, and
        why it does not serve."""
        self._next_complaint_s = 0.0

    @property
    def policy_version(self) -> int:
        """Version of the policy that serves; 0 before the first."""
        return self._serving.policy.policy_version if self._serving else 0

    def state(self) -> Following:
        """What serves now, and what was refused."""
        serving, version = self._serving, self.policy_version
        refused = {of: why for of, (_, why) in self._refused.items() if of > version or of == 0}
        return Following(
            version,
            serving.policy.snapshot_id if serving else None,
            serving.num_learned if serving else 0,
            refused[max(refused)] if refused else None,
        )

    async def follow(self) -> None:
        """Look at the store for ever."""
        while True:
            await asyncio.sleep(self._config.router.refresh_interval_s)
            await self.refresh()

    async def refresh(self) -> None:
        """Take over a new policy, and learn from new verdicts.

        Never raises: while the store is away, what serves goes on serving.
        """
        try:
            if self._store is None:
                self._store = await Store.open(self._config.store_url())
            if not self._offered:
                await self._offer_configured(self._store)
                self._offered = True
            await self._follow_policy(self._store)
            if self._serving is not None:
                await self._learn(self._store, self._serving, time.time() - _OVERLAP_S)
        except Exception as error:
            now_s = time.monotonic()
            if now_s >= self._next_complaint_s:
                self._next_complaint_s = now_s + _COMPLAIN_EVERY_S
                logger.warning("cannot follow the store (%r); the policy stays", error)

    async def _offer_configured(self, store: Store) -> None:
        """Publish the snapshot that the configuration names, if this store never saw it."""
        folder = self._config.router.snapshot
        if folder is None:
            return
        try:
            snapshot = await asyncio.to_thread(load_snapshot, Path(folder))
            self._check_fit(snapshot)
            snapshot_id = await asyncio.to_thread(self._library.add, snapshot)
        except SnapshotError as error:
            self._refused[0] = (math.inf, error.message)
            logger.error("router.snapshot is refused: %s", error.message)
            return
        await add_snapshot(store, snapshot_id, snapshot.metadata)
        await publish(store, snapshot_id, "named in the configuration", once=True)

    async def _follow_policy(self, store: Store) -> None:
        """Load the newest policy that is sound, unless it serves already."""
        for policy in await serving_policies(store):
            version = policy.policy_version
            if self._serving is not None and version <= self._serving.policy.policy_version:
                return
            retry_s, _ = self._refused.get(version, (0.0, ""))
            if time.monotonic() < retry_s:
                continue
            try:
                rule = await asyncio.to_thread(self._load, policy)
            except AtlasError as error:
                # Tried again: on a shared folder a snapshot may be seen late.
                self._refused[version] = (time.monotonic() + _COMPLAIN_EVERY_S, error.message)
                logger.error("policy %d is refused: %s", version, error.message)
                continue
            serving = _Serving(policy, rule)
            await self._learn(store, serving, 0.0)
            self._refused.pop(version, None)
            self.rule, self._serving = rule, serving
            logger.info("policy %d serves", version)
            return

    def _load(self, policy: Policy) -> ColdStartRule | ClusterRule:
        """The rule of a policy.

        Raises:
            SnapshotError: If its snapshot is damaged or does not fit.
        """
        if policy.snapshot_id is None:
            return self._cold_start
        snapshot = self._library.load(policy.snapshot_id, policy.policy_version)
        self._check_fit(snapshot)
        router = self._config.router
        return ClusterRule(
            snapshot,
            self._prior,
            epsilon=router.exploration.epsilon,
            method=router.exploration.method,
            fallback=None if router.fallback is None else Pair.parse(router.fallback),
        )

    def _check_fit(self, snapshot: RouterSnapshot) -> None:
        encoder = self._config.embedder.model
        if snapshot.encoder != encoder:
            raise SnapshotError(
                f"the snapshot was fitted with encoder {snapshot.encoder!r}, and {encoder!r} embeds"
            )
        if not set(snapshot.pairs) & set(self._prior.pairs):
            raise SnapshotError("the snapshot knows no pair of this pool")

    @staticmethod
    async def _learn(store: Store, serving: _Serving, since_unix_s: float) -> None:
        """Learn every verdict since a time that was not learned yet, in the order they came."""
        rule = serving.rule
        if isinstance(rule, ColdStartRule):
            return
        fitted_until_s = float(rule.snapshot.metadata.get(LEARNED_UNTIL, 0.0))
        ids = await verdict_ids(store, max(since_unix_s, fitted_until_s), _MAX_REPLAYED)
        new = [request_id for request_id in ids if request_id not in serving.learned]
        for verdict in await read_verdicts(store, new):
            embedding = np.frombuffer(verdict.embedding, "<f4")
            if len(embedding) == rule.snapshot.dim:
                rule.update(embedding, verdict.pair, verdict.score)
                serving.num_learned += 1
            serving.learned.add(verdict.request_id)
        serving.learned &= set(ids)
