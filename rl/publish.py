"""From outcomes to a policy that serves: fit, keep, promote, roll back.

Fitting publishes nothing. A promotion is one row in the store; every router replica sees it within
its refresh interval and swaps between two requests.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rl.evaluate.evaluate import (
    CANDIDATE,
    PATH_1,
    PATH_2,
    VOI,
    EvaluationReport,
    EvaluationSettings,
    evaluate,
)
from rl.evaluate.evaluate import COLD_START as COLD_START_POLICY
from rl.evaluate.evaluate import SERVING as SERVING_POLICY
from rl.evaluate.figures import draw_pareto, draw_reliability
from rl.evaluate.off_policy import LoggedDecisions, logged_trajectories
from rl.evaluate.policies import MultiStep
from rl.evaluate.verified import VerifierFigures
from rl.fit.dataset import MAX_VERDICTS, read_dataset
from rl.fit.fit import fit
from rl.fit.selection import FitSettings
from rl.fit.voters import answer_keys, voters_of
from rl.profile.outcomes import NotMeasured
from serve_app.config import AtlasConfig
from serve_app.errors import ConfigError, Conflict, NotFound, PromotionRefused
from serve_app.router.rules.base import Deciding, Rule
from serve_app.router.snapshots.build_rule import (
    Cards,
    RuleSettings,
    build_rule,
    read_cards,
)
from serve_app.router.snapshots.library import SnapshotLibrary
from serve_app.router.snapshots.snapshot import (
    CARD_COSTS,
    LEARNED_UNTIL,
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
    Verdict,
    add_snapshot,
    list_policies,
    list_snapshots,
    publish,
    rated_trajectories,
    read_verdicts,
    serving_policies,
    trial_policies,
    verdict_ids,
)

if TYPE_CHECKING:
    from rl.ppo.table import ReplayTable

MAX_TRAJECTORIES = 5_000
"""Rated requests of path 2 that are judged at most, the newest: each is decided anew."""

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
    snapshot = replace(snapshot, metadata=about)
    return await keep_snapshot(config, store, snapshot), snapshot


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


async def evaluate_snapshot(
    config: AtlasConfig, store: Store, candidate: str | None, against: str | None
) -> EvaluationReport:
    """Hold a snapshot against another on the held-out questions; both with what users said since.

    A snapshot with a policy answers them as it serves, step by step; each of its two paths alone is
    reported beside it.

    Args:
        config: The deployment.
        store: Where outcomes and snapshots are.
        candidate: A snapshot id; `None` is the cold-start rule.
        against: The same.

    Raises:
        NotMeasured: If too few held-out outcomes are there.
        ConfigError: If they do not fit the snapshots.
        SnapshotError: If a snapshot is damaged.
        StoreError: If the store is away.
    """
    verdicts = await read_verdicts(store, await verdict_ids(store, 0.0, MAX_VERDICTS))
    cards = read_cards(config)
    rated = await rated_trajectories(store, MAX_TRAJECTORIES)
    rules = {
        name: _rule(config, cards, snapshot_id, verdicts)
        for name, snapshot_id in ((CANDIDATE, candidate), (SERVING_POLICY, against))
    }
    dataset = await read_dataset(config, store, "held_out")
    others: dict[str, Deciding | MultiStep] = {COLD_START_POLICY: cards.cold_start}
    policies: dict[str, Deciding | MultiStep] = {}
    table: ReplayTable | None = None
    verified: dict[str, VerifierFigures] = {}
    for name, rule in rules.items():
        clusters = rule.clusters
        if clusters is None or not (clusters.snapshot.policy or clusters.snapshot.verifier):
            policies[name] = rule
            continue
        # Only here: they take torch, and the answers' embeddings.
        from rl.ppo.replay import read_replay, with_rule
        from rl.ppo.rollout import gated_policy
        from rl.ppo.stepping import ReplayedRule
        from rl.ppo.verified import verifier_figures

        if table is None:
            table = await read_replay(config, store, "held_out", views=None)
        max_steps, snapshot = config.gateway.limits.max_steps, clusters.snapshot
        policies[name] = rule
        by_value: MultiStep | None = None
        if snapshot.verifier:
            of_voi = _voi(config, cards, snapshot, verdicts)
            by_value = ReplayedRule(of_voi, table.without_thoughts(), max_steps)
        if snapshot.policy:
            gated = gated_policy(clusters, table, max_steps)
            policies[name] = gated
            if name == CANDIDATE:
                others[PATH_2] = gated.alone()
        elif by_value is not None and snapshot.decides_by_value:
            policies[name] = by_value
        if name == CANDIDATE:
            others[PATH_1] = clusters
            if by_value is not None:
                others[VOI] = by_value
                verified = verifier_figures(with_rule(table, clusters), snapshot)
    report = evaluate(
        dataset.outcomes,
        dataset.domains,
        policies[CANDIDATE],
        policies[SERVING_POLICY],
        others=others,
        logged=_logged(config, verdicts),
        logged_requests=logged_trajectories(rated, config.all_candidates(), config.embedder.model),
        stepping=rules,
        settings=EvaluationSettings(
            default_alpha=config.router.default_alpha, margin=config.router.promotion_margin
        ),
    )
    return replace(report, verifier=verified)


def _voi(
    config: AtlasConfig, cards: Cards, snapshot: RouterSnapshot, verdicts: Sequence[Verdict]
) -> Rule:
    """The rule `voi` of a snapshot, whatever rule serves it."""
    about = dict(snapshot.metadata) | {RULE: VOI_RULE}
    alone = replace(snapshot, policy={}, metadata=about)
    return _taught(
        build_rule(alone, cards, RuleSettings.of(config, explores=False)), snapshot, verdicts
    )


def _rule(
    config: AtlasConfig, cards: Cards, snapshot_id: str | None, verdicts: Sequence[Verdict]
) -> Rule:
    """What a router replica would serve with, exploration off."""
    if snapshot_id is None:
        return cards.cold_start
    snapshot = SnapshotLibrary(config.snapshots_path()).load(snapshot_id, policy_version=1)
    rule = build_rule(snapshot, cards, RuleSettings.of(config, explores=False))
    return _taught(rule, snapshot, verdicts)


def _taught(rule: Rule, snapshot: RouterSnapshot, verdicts: Sequence[Verdict]) -> Rule:
    """A rule with what users said since its snapshot was fitted."""
    for verdict in verdicts:
        if verdict.created_unix_s >= snapshot.learned_until_unix_s:
            embedding = np.frombuffer(verdict.embedding, "<f4")
            rule.update(embedding, verdict.pair, verdict.score, verdict.owner)
    return rule


def _logged(config: AtlasConfig, verdicts: Sequence[Verdict]) -> LoggedDecisions | None:
    """Rated decisions of the router, for the off-policy estimate."""
    index = {pair: row for row, pair in enumerate(config.all_candidates())}
    rated = [v for v in verdicts if v.propensity is not None and v.pair in index]
    if not rated:
        return None
    return LoggedDecisions(
        encoder=config.embedder.model,
        embeddings=np.stack([np.frombuffer(v.embedding, "<f4") for v in rated]),
        pairs=config.all_candidates(),
        chosen=np.array([index[v.pair] for v in rated]),
        propensity=np.array([v.propensity for v in rated]),
        score=np.array([v.score for v in rated]),
    )


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


def write_report(report: EvaluationReport, folder: Path) -> None:
    """Write `report.json`, `pareto.png` and `reliability.png` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report.to_json(), indent=1))
    draw_pareto(report, folder / "pareto.png")
    draw_reliability(report, folder / "reliability.png")


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
