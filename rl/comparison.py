"""Holds a snapshot against another on the held-out questions, as a router would serve with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rl.evaluate.evaluate import (
    CANDIDATE,
    COLD_START,
    PATH_1,
    PATH_2,
    SERVING,
    VOI,
    EvaluationReport,
    EvaluationSettings,
    evaluate,
)
from rl.evaluate.figures import draw_pareto, draw_reliability
from rl.evaluate.held_out import read_held_out
from rl.evaluate.looked import LookFigures, look_figures
from rl.evaluate.off_policy import LoggedDecisions, logged_trajectories
from rl.evaluate.policies import MultiStep
from rl.evaluate.verified import VerifierFigures
from rl.fit.dataset import MAX_VERDICTS, Dataset, read_dataset
from serve_app.config import AtlasConfig
from serve_app.embedder import TokenTable
from serve_app.errors import ConfigError
from serve_app.router.rules.base import Deciding, Rule
from serve_app.router.rules.first_look import FirstLook
from serve_app.router.snapshots.build_rule import Cards, RuleSettings, build_rule, read_cards
from serve_app.router.snapshots.library import SnapshotLibrary
from serve_app.router.snapshots.snapshot import RULE, VOI_RULE, RouterSnapshot
from serve_app.store import Store, Verdict, rated_trajectories, read_verdicts, verdict_ids

if TYPE_CHECKING:
    from rl.ppo.table import ReplayTable

MAX_TRAJECTORIES = 5_000
"""Rated requests of path 2 that are judged at most, the newest: each is decided anew."""


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
        for name, snapshot_id in ((CANDIDATE, candidate), (SERVING, against))
    }
    dataset = await read_dataset(config, store, "held_out")
    others: dict[str, Deciding | MultiStep] = {COLD_START: cards.cold_start}
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
        policies[SERVING],
        others=others,
        logged=_logged(config, verdicts),
        logged_requests=logged_trajectories(rated, config.all_candidates(), config.embedder.model),
        stepping=rules,
        settings=EvaluationSettings(
            default_alpha=config.router.default_alpha, margin=config.router.promotion_margin
        ),
    )
    look = _looked(config, rules[CANDIDATE], dataset, report.settings)
    return replace(report, verifier=verified, look=look)


def _looked(
    config: AtlasConfig, rule: Rule, dataset: Dataset, settings: EvaluationSettings
) -> LookFigures | None:
    """What the first look of a snapshot does; `None`: it has none that this deployment can use."""
    if rule.clusters is None or not rule.clusters.snapshot.looks_first:
        return None
    try:
        table = TokenTable(config.embedder)
    except ConfigError:
        return None
    held_out = read_held_out(dataset.outcomes, dataset.domains)
    return look_figures(
        FirstLook(rule.clusters.snapshot.look, rule.clusters, table),
        rule,
        held_out,
        [dataset.outcomes.queries[row] for row in held_out.rows],
        settings.default_alpha,
        num_resamples=settings.num_resamples,
        seed=settings.seed,
    )


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


def write_report(report: EvaluationReport, folder: Path) -> None:
    """Write `report.json`, `pareto.png` and `reliability.png` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report.to_json(), indent=1))
    draw_pareto(report, folder / "pareto.png")
    draw_reliability(report, folder / "reliability.png")
