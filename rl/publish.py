"""From outcomes to a policy that serves: fit, keep, promote, roll back.

Fitting publishes nothing. A promotion is one row in the store; every router replica sees it within
its refresh interval and swaps between two requests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from rl.comparison import evaluate_snapshot
from rl.evaluate.evaluate import EvaluationReport
from rl.fit.dataset import read_dataset
from rl.fit.fit import fit
from rl.fit.look import fit_look
from rl.fit.selection import FitSettings
from rl.fit.voters import answer_keys, voters_of
from rl.profile.outcomes import NotMeasured, Outcomes
from serve_app.config import AtlasConfig
from serve_app.embedder import TokenTable
from serve_app.errors import ConfigError, Conflict, NotFound, PromotionRefused
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.snapshots.build_rule import Cards, read_cards
from serve_app.router.snapshots.library import SnapshotLibrary
from serve_app.router.snapshots.snapshot import (
    CARD_COSTS,
    LEARNED_UNTIL,
    LOOK,
    RULE,
    VERIFIER,
    VOI_RULE,
    VOTERS,
    RouterSnapshot,
)
from serve_app.store import (
    Mode,
    Policy,
    Store,
    add_snapshot,
    list_policies,
    list_snapshots,
    publish,
    serving_policies,
    trial_policies,
)

logger = logging.getLogger(__name__)

NEWEST = "newest"
SERVING = "serving"
COLD_START = "cold-start"
"""Names that stand for a snapshot id."""


async def fit_snapshot(
    config: AtlasConfig,
    store: Store,
    settings: FitSettings | None = None,
    *,
    with_traffic: bool = True,
    by_value: bool = False,
) -> tuple[str, RouterSnapshot]:
    """Fit a snapshot on the outcomes in the store, and keep it; it does not serve yet.

    Args:
        config: The deployment.
        store: Where the outcomes are.
        settings: What is tried.
        with_traffic: Whether rated requests count too; else they are learned online again.
        by_value: Whether the rule `voi` is to serve it, and not cluster routing alone.

    Returns:
        Its id, and the snapshot.

    Raises:
        ConfigError: If there are no outcomes, or none to fit a verifier on where `by_value` asks
            for one.
        StoreError: If the store is away.
    """
    began_unix_s = time.time()
    dataset = await read_dataset(config, store, "train", with_traffic=with_traffic)
    outcomes, cards = dataset.outcomes, read_cards(config)
    snapshot = fit(
        outcomes,
        settings,
        descriptors=cards.descriptors_of(outcomes.pairs),
        likeness=cards.likeness_of(outcomes.embeddings, outcomes.pairs),
    )
    about = dict(snapshot.metadata) | {
        VOTERS: voters_of(answer_keys(dataset)).tolist(),
        "num_verdicts": dataset.num_verdicts,
        "num_outdated": dataset.num_outdated,
        "fitted_unix_s": began_unix_s,
        LEARNED_UNTIL: began_unix_s if with_traffic else 0.0,
        CARD_COSTS: cards.costs_usd(),
    }
    verifier = await _fit_verifier(config, store, cards, settings)
    if by_value and verifier is None:
        raise ConfigError(
            "the rule voi needs a verifier, and too few answers were profiled to fit one: "
            "run `atlas profile`"
        )
    if verifier is not None:
        arrays, about[VERIFIER] = verifier
        snapshot = replace(snapshot, verifier=arrays)
    if by_value:
        about[RULE] = VOI_RULE
    look = _fit_look(config, cards, snapshot, outcomes)
    if look is not None:
        arrays, about[LOOK] = look
        snapshot = replace(snapshot, look=arrays)
    snapshot = replace(snapshot, metadata=about)
    return await keep_snapshot(config, store, snapshot), snapshot


def _fit_look(
    config: AtlasConfig, cards: Cards, snapshot: RouterSnapshot, outcomes: Outcomes
) -> tuple[dict[str, NDArray[Any]], dict[str, float]] | None:
    """A first look fitted on the profile, and what to expect of it; `None`: there is none."""
    try:
        table = TokenTable(config.embedder)
    except ConfigError as error:
        logger.warning("no first look: %s", error.message)
        return None
    rule = ClusterRule(snapshot, cards.prior)
    return fit_look(rule, outcomes.queries, outcomes.embeddings, table)


async def _fit_verifier(
    config: AtlasConfig, store: Store, cards: Cards, settings: FitSettings | None
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
    """A verifier fitted on the profile, and how good it is; `None`: there are too few answers."""
    from rl.ppo.beliefs import domain_views
    from rl.ppo.replay import answer_encoder, make_table
    from rl.ppo.verified import report_of
    from rl.ppo.verifier import LEAST_ANSWERS, fit_verifier

    dataset = await read_dataset(config, store, "train")
    if sum(answer is not None for answer in dataset.answers) < LEAST_ANSWERS:
        return None
    outcomes = dataset.outcomes
    descriptors = cards.descriptors_of(outcomes.pairs)
    likeness = cards.likeness_of(outcomes.embeddings, outcomes.pairs)
    table = make_table(dataset, descriptors, likeness, answer_encoder(config))
    views = domain_views(outcomes, dataset.domains, descriptors, likeness, settings)
    fitted = fit_verifier(replace(table.without_thoughts(), views=views))
    return None if fitted is None else (fitted.arrays, report_of(fitted, dataset.domains))


async def keep_snapshot(config: AtlasConfig, store: Store, snapshot: RouterSnapshot) -> str:
    """Put a snapshot into the library and the store.

    Returns:
        Its id.
    """
    snapshot_id = SnapshotLibrary(config.snapshots_path()).add(snapshot)
    await add_snapshot(store, snapshot_id, snapshot.metadata)
    return snapshot_id


async def resolve(store: Store, name: str) -> str | None:
    """The snapshot id that a name stands for; `None` is the cold-start rule.

    Args:
        store: Where snapshots are known.
        name: An id or a unique beginning of one, `newest`, `serving` or `cold-start`.

    Raises:
        NotFound: If there is none.
    """
    if name == COLD_START:
        return None
    if name == SERVING:
        policies = await serving_policies(store, limit=1)
        return policies[0].snapshot_id if policies else None
    known = [info.snapshot_id for info in await list_snapshots(store)]
    if name == NEWEST:
        if not known:
            raise NotFound("there is no snapshot yet: run `atlas fit`")
        return known[0]
    found = [snapshot_id for snapshot_id in known if snapshot_id.startswith(name)]
    if len(found) != 1:
        raise NotFound(f"{len(found) or 'no'} snapshots are named {name!r}")
    return found[0]


async def promote_evaluated(
    config: AtlasConfig,
    store: Store,
    candidate: str | None,
    *,
    force: bool = False,
    mode: Mode = Mode.SERVING,
    share: float = 1.0,
    expect_version: int | None = None,
) -> tuple[int, EvaluationReport | None]:
    """Evaluate a snapshot against the serving one, and let it serve if it is not worse.

    Args:
        config: The deployment.
        store: Where outcomes and snapshots are.
        candidate: A snapshot id; `None` is the cold-start rule.
        force: Whatever the evaluation says.
        mode: Whether it serves, or goes on trial; into the shadow, where it does no harm, it may
            go whatever the evaluation says.
        share: Of the requests that a trial gets, in (0, 1].
        expect_version: The serving policy that it takes the place of; `None` takes whichever serves
            when this begins.

    Returns:
        The policy version it serves as, and the evaluation; `None` where too little was measured
        for one, and it serves all the same.

    Raises:
        Conflict: If another policy serves than the expected one, this snapshot serves already, or
            a policy was published while this one was judged.
        PromotionRefused: If it is worse, or that cannot be said with confidence.
        NotMeasured, ConfigError, SnapshotError, StoreError: As `evaluate_snapshot`.
    """
    newest = await _newest_version(store)
    serving = next(iter(await serving_policies(store, limit=1)), None)
    serving_version = 0 if serving is None else serving.policy_version
    if expect_version is not None and expect_version != serving_version:
        raise Conflict(f"policy {serving_version} serves, and not {expect_version}; look again")
    is_served = serving is not None and serving.snapshot_id == candidate
    if is_served and mode is Mode.SERVING and newest == serving_version:
        raise Conflict(f"this snapshot serves already, as policy {serving_version}")
    excused = force or mode is Mode.SHADOW
    report = None
    try:
        against = None if serving is None else serving.snapshot_id
        report = await evaluate_snapshot(config, store, candidate, against)
    except NotMeasured as error:
        if not excused:
            raise
        reason = f"forced: {error.message}"
    else:
        if not report.verdict.promote and not excused:
            raise PromotionRefused(f"refused: {report.verdict.reason}")
        reason = ("forced: " if not report.verdict.promote else "") + report.verdict.reason
    described = None if report is None else report.to_json()
    version = await publish(
        store, candidate, reason, described, mode=mode, share=share, if_newest=newest
    )
    if version is None:
        raise Conflict("another policy was published while this one was judged; evaluate it again")
    return version, report


async def _newest_version(store: Store) -> int:
    """The newest publication of any kind; 0 before the first."""
    newest = await list_policies(store, limit=1)
    return newest[0].policy_version if newest else 0


def trial_of(canary: float | None, *, shadow: bool) -> tuple[Mode, float]:
    """What a promotion is for, and its share of the requests.

    Args:
        canary: Share that a canary gets, in (0, 1); `None` is no canary.
        shadow: Whether it goes into the shadow.
    """
    if shadow:
        return Mode.SHADOW, 1.0
    return (Mode.SERVING, 1.0) if canary is None else (Mode.CANARY, canary)


async def promote(
    store: Store,
    snapshot_id: str | None,
    reason: str,
    report: Mapping[str, Any] | None = None,
    *,
    mode: Mode = Mode.SERVING,
    share: float = 1.0,
) -> int:
    """Let a snapshot serve, or put it on trial.

    Returns:
        The policy version it serves as.
    """
    version = await publish(store, snapshot_id, reason, report, mode=mode, share=share)
    assert version is not None
    return version


async def roll_back(store: Store, expect_version: int | None = None) -> tuple[int, str | None]:
    """Publish again what served before the serving policy, under a new version.

    While a canary is out, that is what serves beside it: the canary ends. What was rolled back
    itself is not gone back to.

    Args:
        store: Where policies are.
        expect_version: The policy to take back. `None` takes back whichever serves, but for one
            that a rollback published: the same request sent twice must not go back twice.

    Returns:
        The new version, and the snapshot that serves; `None` is the cold-start rule.

    Raises:
        ConfigError: If nothing was ever published.
        Conflict: If that policy is not the one that would be taken back, a rollback has just been
            made, or a policy was published meanwhile.
    """
    newest = await _newest_version(store)
    policies = await serving_policies(store, limit=1000)
    if not policies:
        raise ConfigError("nothing was ever promoted")
    serving = policies[0]
    before = _before(policies)
    trials = await trial_policies(store)
    canary = next((policy for policy in trials if policy.mode is Mode.CANARY), None)
    if canary is not None:
        serving, before = canary, serving.snapshot_id
    taken_back = serving.policy_version
    if expect_version is None and serving.taken_back is not None:
        raise Conflict(
            f"policy {serving.taken_back} has been rolled back already, by policy {taken_back}; "
            f"to go back further, say expect_version {taken_back}"
        )
    if expect_version is not None and expect_version != taken_back:
        raise Conflict(
            f"policy {expect_version} is not the one to take back: policy {taken_back} is"
        )
    reason = f"rolled back from policy {taken_back}"
    version = await publish(store, before, reason, take_back=taken_back, if_newest=newest)
    if version is None:
        raise Conflict("another policy was published meanwhile; look which one serves")
    return version, before


def _before(policies: Sequence[Policy]) -> str | None:
    """The snapshot that served before the one that serves; `None` is the cold-start rule.

    A rollback takes a publication out and stands for the one below it, so a later rollback goes
    further back.

    Args:
        policies: Publications that serve or served, the newest first; at least one.
    """
    standing: list[tuple[set[int], str | None]] = []
    for policy in reversed(policies):
        if policy.taken_back is not None:
            standing = [entry for entry in standing if policy.taken_back not in entry[0]]
            if standing and standing[-1][1] == policy.snapshot_id:
                standing[-1][0].add(policy.policy_version)
                continue
        standing.append(({policy.policy_version}, policy.snapshot_id))
    serving = standing[-1][1]
    return next((name for _, name in reversed(standing) if name != serving), None)
