"""PolicyFollower: a router replica's own rules, kept equal to what the store says serves.

Every replica asks the store by itself, so a new one, a restarted one and an old one agree: the
last policy published that loads, the trials beside it, and on top of each every verdict since it
was fitted.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve_app.config import AtlasConfig
from serve_app.embedder import TokenTable
from serve_app.errors import AtlasError, ConfigError, SnapshotError
from serve_app.router.rules.base import Rule
from serve_app.router.rules.first_look import FirstLook
from serve_app.router.snapshots.build_rule import Cards, RuleSettings, build_rule, check_fit
from serve_app.router.snapshots.library import SnapshotLibrary
from serve_app.router.snapshots.snapshot import RouterSnapshot, load_snapshot
from serve_app.schemas import Drift
from serve_app.store import (
    Mode,
    Policy,
    Store,
    add_snapshot,
    find_policy,
    publish,
    read_verdicts,
    serving_policies,
    trial_policies,
    verdict_ids,
)

logger = logging.getLogger(__name__)

_MAX_REPLAYED = 20_000
"""Verdicts learned at once at most; the discount makes older ones weigh next to nothing."""
_REPLAYED_PER_KEY = 60
"""Verdicts of one API key on one pair learned at once at most; earlier ones weigh less than 1e-7
beside the last ones (see `voices.OWN_DISCOUNT`)."""
_LEARNED_AT_ONCE = 50
"""Verdicts that are replayed before other work of the event loop gets a turn."""
_OVERLAP_S = 120.0
"""A verdict may become visible this much later than its time says: clocks differ, and a missing
embedding is written behind the answer."""
_COMPLAIN_EVERY_S = 30.0
_MAX_FITTED = 8
"""Policies that are kept as they were fitted, for requests that want the same result again."""
_MAX_RETIRED = 16
"""Policies that are kept for the requests that began with them."""


@dataclass(frozen=True)
class Served:
    """What a replica serves with."""

    policy_version: int
    """0 before the first policy."""
    snapshot_id: str | None
    """`None` is the cold-start rule."""
    verdicts: int
    """Learned since the policy was loaded."""
    refused: str | None
    """Why the newest policy, or the configuration's snapshot, does not serve."""
    canary: int | None = None
    """Version of the policy that a share of the requests gets."""
    shadow: int | None = None
    """Version of the policy that is asked and not obeyed."""


@dataclass
class Serving:
    """A policy in service, on trial, or kept for the requests that began with it."""

    policy: Policy
    rule: Rule
    look: FirstLook | None = None
    """Decides whether a query needs the encoder; `None`: every one does."""
    learned: set[str] = field(default_factory=set)
    """Request ids of the verdicts that were learned and may be seen again."""
    num_learned: int = 0

    @property
    def policy_version(self) -> int:
        """Version of the policy; 0 is the rule before the first."""
        return self.policy.policy_version


class PolicyFollower:
    """Follows the store; `rule` is what serves now.

    Invariants:
        - A policy that cannot be loaded, or was fitted with another encoder, never serves; the one
          before it goes on.
        - A policy learns a verdict once.
        - A policy that was replaced, if it is one of the last 16, stays until no request that began
          with it can be under way.
    """

    def __init__(self, config: AtlasConfig, cards: Cards) -> None:
        """Begin with the cold-start rule.

        Args:
            config: The deployment.
            cards: Serve before the first policy, and say what a policy does not know of its pairs.
        """
        self._config = config
        self._settings = RuleSettings.of(config, explores=True)
        self._fitted_settings = RuleSettings.of(config, explores=False)
        self._cards = cards
        self._library = SnapshotLibrary(config.snapshots_path())
        self._store: Store | None = None
        self._main = Serving(Policy(0, None, "before the first policy", 0.0), cards.cold_start)
        self._trials: dict[Mode, Serving] = {}
        self._retired: dict[int, tuple[float, Serving]] = {}
        """Version to when it may go (monotonic clock), and the policy."""
        self._fitted: dict[int, Serving] = {}
        """Policies that neither learn nor explore, by version."""
        self._table: TokenTable | None = None
        """Of the encoder's tokens, once a first look needed it."""
        self._offered = False
        """Whether the configuration's snapshot was put before the store."""
        self._refused: dict[int, tuple[float, str]] = {}
        """Policy version (0: the configuration's snapshot) to when it may be tried again, and
        why it does not serve."""
        self._next_complaint_s = 0.0
        self.at_work = asyncio.Lock()
        """Held while this replica's background work is with the store: one thing at a time, so that
        no policy is loaded twice."""

    async def use_cards(self, cards: Cards) -> None:
        """Take over what the cards of a changed pool say, in every policy that decides.

        Requests under way keep the rule that they began with.

        Raises:
            AtlasError: If a policy cannot be loaded again; all stays as it was then.
        """
        async with self.at_work:
            before, self._cards = self._cards, cards
            try:
                main = await self._again(self._main)
                trials = {mode: await self._again(held) for mode, held in self._trials.items()}
            except AtlasError:
                self._cards = before
                raise
            self._main, self._trials = main, trials
            self._fitted.clear()

    async def _again(self, serving: Serving) -> Serving:
        """A policy under the cards as they are now; the cards alone where it knows none of them."""
        if serving.policy.snapshot_id is not None and self._store is not None:
            try:
                return await self._load(self._store, serving.policy)
            except SnapshotError as error:
                logger.error("policy %d: %s", serving.policy_version, error.message)
        return Serving(serving.policy, self._cards.cold_start)

    @property
    def rule(self) -> Rule:
        """What serves, trials aside."""
        return self._main.rule

    @property
    def policy_version(self) -> int:
        """Version of the policy that serves; 0 before the first."""
        return self._main.policy_version

    @property
    def store(self) -> Store | None:
        """The store, once it answered."""
        return self._store

    def costs_usd(self) -> NDArray[np.float32]:
        """(num_pairs,) US dollars of a run of each pair, as far as the serving policy knows."""
        return self.rule.costs_usd

    @property
    def canary(self) -> Serving | None:
        """The policy that a share of the requests gets."""
        return self._trials.get(Mode.CANARY)

    @property
    def shadow(self) -> Serving | None:
        """The policy that is asked and not obeyed."""
        return self._trials.get(Mode.SHADOW)

    def state(self) -> Served:
        """What serves now, and what was refused."""
        serving, version = self._main, self.policy_version
        refused = {of: why for of, (_, why) in self._refused.items() if of > version or of == 0}
        return Served(
            version,
            serving.policy.snapshot_id,
            serving.num_learned,
            refused[max(refused)] if refused else None,
            self.canary.policy_version if self.canary else None,
            self.shadow.policy_version if self.shadow else None,
        )

    def drifts(self) -> tuple[Drift, ...]:
        """How far verdicts are from what the snapshot that serves lets expect, by pair."""
        clusters = self._main.rule.clusters
        return () if clusters is None else clusters.drifts()

    def choose(self, request_id: str | None) -> Serving:
        """The policy of a new request: the same one at every replica that has loaded it."""
        canary = self.canary
        if canary is None or request_id is None or share_of(request_id) >= canary.policy.share:
            return self._main
        return canary

    async def began_with(self, policy_version: int) -> Serving | None:
        """The policy of a request under way; `None` if it is gone.

        One that this replica has not seen is loaded: another replica may have been first.
        """
        held = self._held(policy_version)
        if held is not None or self._store is None:
            return held
        async with self.at_work:
            held = self._held(policy_version)
            if held is not None:
                return held
            try:
                policy = await find_policy(self._store, policy_version)
                if policy is None:
                    return None
                serving = await self._load(self._store, policy)
            except AtlasError as error:
                logger.warning("policy %d cannot be had: %s", policy_version, error.message)
                return None
            self._retire(serving)
            return serving

    async def as_fitted(self, policy_version: int | None) -> Serving | None:
        """A policy as it was fitted: it has learned no verdict since, and does not explore.

        Args:
            policy_version: Which one; `None`: the one that serves, trials aside.

        Returns:
            `None` if there is no such policy, or it cannot be loaded.
        """
        version = self.policy_version if policy_version is None else policy_version
        if version in self._fitted:
            return self._fitted[version]
        async with self.at_work:
            held = self._held(version)
            try:
                policy = held.policy if held is not None else await self._find(version)
                if policy is None:
                    return None
                serving = await asyncio.to_thread(self._built, policy, self._fitted_settings)
            except AtlasError as error:
                logger.warning("policy %d cannot be had as fitted: %s", version, error.message)
                return None
            while len(self._fitted) >= _MAX_FITTED:
                del self._fitted[next(iter(self._fitted))]
            self._fitted[version] = serving
            return serving

    async def _find(self, policy_version: int) -> Policy | None:
        """A policy that this replica does not hold.

        Raises:
            StoreError: If the store is away.
        """
        return None if self._store is None else await find_policy(self._store, policy_version)

    async def follow(self) -> None:
        """Look at the store for ever."""
        while True:
            await asyncio.sleep(self._config.router.refresh_interval_s)
            await self.refresh()

    async def refresh(self) -> None:
        """Take over new policies and trials, and learn from new verdicts.

        Never raises: while the store is away, what serves goes on serving.
        """
        async with self.at_work:
            await self._refresh()

    async def _refresh(self) -> None:
        try:
            if self._store is None:
                self._store = await Store.open(self._config.store_url(), must_answer=False)
            if not self._offered:
                await self._offer_configured(self._store)
                self._offered = True
            await self._follow_policy(self._store)
            await self._follow_trials(self._store)
            for serving in (self._main, *self._trials.values()):
                await self._learn(self._store, serving, time.time() - _OVERLAP_S)
            self._forget_retired()
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
            check_fit(snapshot, self._cards, self._settings.encoder)
        except SnapshotError as error:
            self._refused[0] = (math.inf, error.message)
            logger.error("router.snapshot is refused: %s", error.message)
            return
        snapshot_id = await asyncio.to_thread(self._library.add, snapshot)
        await add_snapshot(store, snapshot_id, snapshot.metadata)
        await publish(store, snapshot_id, "named in the configuration", once=True)

    async def _follow_policy(self, store: Store) -> None:
        """Load the newest policy that is sound, unless it serves already."""
        for policy in await serving_policies(store):
            if policy.policy_version <= self.policy_version:
                return
            serving = await self._try(store, policy)
            if serving is not None:
                self._retire(self._main)
                self._main = serving
                logger.info("policy %d serves", policy.policy_version)
                return

    async def _follow_trials(self, store: Store) -> None:
        """Have the newest sound trial of each mode beside what serves, and no other."""
        wanted: dict[Mode, Serving] = {}
        for policy in await trial_policies(store):
            if policy.mode in wanted:
                continue
            held = self._trials.get(policy.mode)
            if held is None or held.policy_version != policy.policy_version:
                held = await self._try(store, policy)
            if held is not None:
                wanted[policy.mode] = held
        for mode, serving in self._trials.items():
            if wanted.get(mode) is not serving:
                self._retire(serving)
        self._trials = wanted

    async def _try(self, store: Store, policy: Policy) -> Serving | None:
        """A policy, loaded; `None` where it is refused, until it may be tried again."""
        version = policy.policy_version
        retry_s, _ = self._refused.get(version, (0.0, ""))
        if time.monotonic() < retry_s:
            return None
        held = self._held(version)
        if held is not None:
            return held
        try:
            serving = await self._load(store, policy)
        except AtlasError as error:
            # Tried again: on a shared folder a snapshot may be seen late.
            self._refused[version] = (time.monotonic() + _COMPLAIN_EVERY_S, error.message)
            logger.error("policy %d is refused: %s", version, error.message)
            return None
        self._refused.pop(version, None)
        return serving

    async def _load(self, store: Store, policy: Policy) -> Serving:
        """A policy with every verdict since it was fitted.

        Raises:
            SnapshotError: If its snapshot is damaged or does not fit.
            StoreError: If the store is away.
        """
        serving = await asyncio.to_thread(self._built, policy, self._settings)
        await self._learn(store, serving, 0.0)
        return serving

    def _built(self, policy: Policy, settings: RuleSettings) -> Serving:
        """A policy as it was fitted.

        Raises:
            SnapshotError: If its snapshot is damaged or does not fit.
        """
        if policy.snapshot_id is None:
            return Serving(policy, self._cards.cold_start)
        snapshot = self._library.load(policy.snapshot_id, policy.policy_version)
        rule = build_rule(snapshot, self._cards, settings)
        return Serving(policy, rule, self._look(snapshot, rule))

    def _look(self, snapshot: RouterSnapshot, rule: Rule) -> FirstLook | None:
        """The first look of a snapshot, where it has one and this deployment's encoder allows it.

        Raises:
            SnapshotError: If it is damaged.
        """
        if not snapshot.looks_first or rule.clusters is None:
            return None
        try:
            self._table = self._table or TokenTable(self._config.embedder)
        except ConfigError as error:
            logger.warning("every query needs the encoder: %s", error.message)
            return None
        return FirstLook(snapshot.look, rule.clusters, self._table)

    def _everything(self) -> Iterator[Serving]:
        yield self._main
        yield from self._trials.values()
        for _, serving in self._retired.values():
            yield serving

    def _held(self, policy_version: int) -> Serving | None:
        return next((s for s in self._everything() if s.policy_version == policy_version), None)

    def _retire(self, serving: Serving) -> None:
        """Keep a policy for the requests that began with it."""
        until_s = time.monotonic() + self._config.gateway.limits.max_deadline_s
        self._retired[serving.policy_version] = (until_s, serving)

    def _forget_retired(self) -> None:
        now_s = time.monotonic()
        in_use = {serving.policy_version for serving in (self._main, *self._trials.values())}
        kept = {
            version: entry
            for version, entry in self._retired.items()
            if entry[0] > now_s and version not in in_use
        }
        self._retired = dict(list(kept.items())[-_MAX_RETIRED:])

    @staticmethod
    async def _learn(store: Store, serving: Serving, since_unix_s: float) -> None:
        """Learn the verdicts since a time that were not learned yet, in the order they came."""
        rule, snapshot = serving.rule, serving.rule.snapshot
        if snapshot is None:
            return
        ids = await verdict_ids(
            store,
            max(since_unix_s, snapshot.learned_until_unix_s),
            _MAX_REPLAYED,
            per_key=_REPLAYED_PER_KEY,
        )
        new = [request_id for request_id in ids if request_id not in serving.learned]
        for number, verdict in enumerate(await read_verdicts(store, new)):
            embedding = np.frombuffer(verdict.embedding, "<f4")
            if len(embedding) == snapshot.dim:
                rule.update(embedding, verdict.pair, verdict.score, verdict.owner)
                serving.num_learned += 1
            serving.learned.add(verdict.request_id)
            if number % _LEARNED_AT_ONCE == _LEARNED_AT_ONCE - 1:
                await asyncio.sleep(0)
        serving.learned &= set(ids)


def share_of(request_id: str) -> float:
    """Where a request lies in [0, 1), by a hash of its id: evenly spread, the same everywhere."""
    digest = hashlib.sha256(request_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
