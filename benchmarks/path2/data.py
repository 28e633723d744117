"""What a run learns from and is judged on, and learning from a part of it.

A bench is a profile (or an outcome table) as two replay tables. A router may learn from some of its
training questions and pairs; both paths then know nothing of the others but their cards.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rl.fit.dataset import Dataset, read_dataset
from rl.fit.fit import fit
from rl.fit.selection import FitSettings
from rl.ppo.beliefs import groups_of, make_views, newcomer_view
from rl.ppo.config import TrainConfig
from rl.ppo.loop import TrainProgress, train_policy
from rl.ppo.replay import answer_encoder, make_table
from rl.ppo.rollout import choose_gate
from rl.ppo.table import ReplayTable
from rl.ppo.verifier import fit_verifier
from rl.profile.outcomes import Outcomes
from rl.training import split_table
from serve_app.config import AtlasConfig
from serve_app.errors import ConfigError
from serve_app.router.policy.policy_net import PolicyNet
from serve_app.router.rules.beliefs import Prior
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.gate import settle_rows
from serve_app.router.rules.policy_rule import LearnedRule
from serve_app.router.snapshots.build_rule import read_cards
from serve_app.router.snapshots.snapshot import (
    GATE_THRESHOLD,
    RouterSnapshot,
    load_snapshot,
    save_snapshot,
)
from serve_app.store import Store

LEAST_ASKED = 0.5
"""Share of the test questions below which a pair is left out."""

Float = NDArray[np.float32]
Index = NDArray[np.intp]


@dataclass(frozen=True)
class Bench:
    """A profile as both sides of a run."""

    outcomes: Outcomes
    """Of the training questions."""
    train: ReplayTable
    """The same, without views."""
    test: ReplayTable
    """Of the held-out questions, without views; the same pairs."""
    prior: Prior | None
    """What the cards say of the pairs; `None` without cards."""
    descriptors: Float | None
    """(num_pairs, descriptor) as `fit` takes them."""
    likeness: Float | None
    """(num_train, num_pairs) similarity of the training questions to the cards."""
    config: AtlasConfig | None = None

    @property
    def mark(self) -> str:
        """Hash of the pairs, the questions, and what came of them."""
        digest = hashlib.sha256(repr(self.test.pairs).encode())
        for table in (self.train, self.test):
            for array in (table.embeddings, table.score, table.costs_usd):
                digest.update(array.tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Lesson:
    """What may be learnt from, and how."""

    rows: Index
    """Training questions."""
    columns: Index
    """Pairs."""
    seed: int
    fit: FitSettings
    train: TrainConfig


@dataclass(frozen=True)
class Learnt:
    """A snapshot with a policy, ready to be asked."""

    snapshot: RouterSnapshot
    net: PolicyNet
    threshold: float
    seed: int = 0
    train: ReplayTable | None = None
    """What it was learnt from, where what it did not see is known of it too; else `None`."""
    evidence: Evidence | None = None


@dataclass(frozen=True)
class Evidence:
    """What path 1 and the verifier said of training questions that they had not seen."""

    alone: Float
    """(V, num_train, num_pairs) as of `Judges.alone`."""
    decided: Float
    """(num_train, num_pairs) expected scores by which path 1 decides."""

    def save(self, path: Path) -> None:
        """Write it."""
        np.savez_compressed(path, alone=self.alone, decided=self.decided)

    @classmethod
    def read(cls, path: Path) -> Evidence | None:
        """As it was written; `None`: there is none."""
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["alone"], arrays["decided"])


class NamedEncoder(Protocol):
    """Makes everything that a router sees of a text."""

    name: str

    def __call__(self, texts: Sequence[str]) -> Float:
        """(num_texts, dim) unit vectors."""


def read_bench(config: AtlasConfig, encoder: NamedEncoder | None = None) -> Bench:
    """The profile of a deployment, from its store.

    Args:
        config: The deployment.
        encoder: Of the queries, the answers and the cards; `None` takes the deployment's.

    Raises:
        ConfigError: If there is none.
        StoreError: If the store is away.
    """
    train, test = asyncio.run(_read(config))
    if encoder is not None:
        train, test = (_encoded(dataset, encoder) for dataset in (train, test))
    knowledge = read_cards(config, encoder)
    answers = encoder or answer_encoder(config)

    def laid_out(dataset: Dataset) -> ReplayTable:
        outcomes = dataset.outcomes
        likeness = knowledge.likeness_of(outcomes.embeddings, outcomes.pairs)
        return make_table(dataset, knowledge.descriptors_of(outcomes.pairs), likeness, answers)

    return Bench(
        outcomes=train.outcomes,
        train=laid_out(train),
        test=laid_out(test),
        prior=knowledge.prior,
        descriptors=knowledge.descriptors_of(train.outcomes.pairs),
        likeness=knowledge.likeness_of(train.outcomes.embeddings, train.outcomes.pairs),
        config=config,
    )


def complete(bench: Bench) -> Bench:
    """Keep the pairs that most test questions were asked of, and the questions that all answered.

    Every contender has to be judged on the same questions. Pairs that were asked fewer than half of
    the test questions are left out first, then questions that a remaining pair was not asked.

    Raises:
        ConfigError: If there is none.
    """
    measured = bench.test.measured[0]
    columns = np.flatnonzero(measured.mean(axis=0) >= LEAST_ASKED)
    rows = np.flatnonzero(measured[:, columns].all(axis=1))
    if not len(columns) or not len(rows):
        raise ConfigError("no held-out question of the profile was asked of every pair")
    if len(columns) == len(bench.test.pairs) and len(rows) == len(measured):
        return bench
    everyone = np.arange(bench.train.num_queries)
    return replace(
        bench,
        outcomes=part_of(bench.outcomes, everyone, columns),
        train=bench.train.select(pairs=columns),
        test=bench.test.select(queries=rows, pairs=columns),
        descriptors=None if bench.descriptors is None else bench.descriptors[columns],
        likeness=None if bench.likeness is None else bench.likeness[:, columns],
    )


async def _read(config: AtlasConfig) -> tuple[Dataset, Dataset]:
    store = await Store.open(config.store_url())
    try:
        train, test = [await read_dataset(config, store, split) for split in ("train", "held_out")]
    finally:
        await store.close()
    return train, test


def _encoded(dataset: Dataset, encoder: NamedEncoder) -> Dataset:
    """The same with the queries' embeddings made by another encoder."""
    outcomes = dataset.outcomes
    vectors = encoder(outcomes.queries)
    return replace(dataset, outcomes=replace(outcomes, encoder=encoder.name, embeddings=vectors))


def learn(bench: Bench, lesson: Lesson, folder: Path, on_progress: Callable[[str], None]) -> Learnt:
    """Fit path 1, train path 2 and choose the gate; what a folder has is not learnt again.

    Args:
        bench: The profile.
        lesson: What of it may be used.
        folder: Takes the snapshot.
        on_progress: Told what is being done.
    """
    kept, told_apart = folder / "snapshot", folder / "evidence.npz"
    rows, columns = lesson.rows, lesson.columns
    known = bench.train.select(queries=rows, pairs=columns)
    if kept.is_dir():
        return _open(load_snapshot(kept), known, Evidence.read(told_apart), lesson.seed)
    on_progress("path 1")
    outcomes = part_of(bench.outcomes, rows, columns)
    descriptors = None if bench.descriptors is None else bench.descriptors[columns]
    likeness = None if bench.likeness is None else bench.likeness[np.ix_(rows, columns)]
    settings = replace(lesson.fit, seed=lesson.seed)
    snapshot = fit(outcomes, settings, descriptors=descriptors, likeness=likeness)
    on_progress("path 1's beliefs on what it did not see")
    quick = replace(settings, num_repeats=1)
    table = known
    groups = groups_of(table.domains, table.embeddings, lesson.seed)
    rule = ClusterRule(snapshot)
    table = replace(
        table,
        views=make_views(outcomes, groups, descriptors, likeness, quick),
        new_models=newcomer_view(outcomes, "model_id", descriptors, likeness, quick),
        new_tools=newcomer_view(outcomes, "tool_id", descriptors, likeness, quick),
        pair_costs_usd=rule.costs_usd.astype(np.float32),
        pair_seconds=rule.seconds.astype(np.float32),
        caution=snapshot.caution,
    )
    on_progress("the verifier")
    evidence: Evidence | None = None
    # Outcome tables hold no answers: nothing could be told of them.
    fitted = fit_verifier(table) if table.answer_row.any() else None
    if fitted is not None:
        snapshot = replace(snapshot, verifier=fitted.arrays)
        table = replace(table, judges=fitted.judges)
        view = table.views[0]
        settled = settle_rows(
            view.quality, view.spread, view.overall, table.measured[0], snapshot.caution
        )
        decided = np.where(view.inside[:, None], settled, view.outside)
        assert fitted.judges.alone is not None
        evidence = Evidence(fitted.judges.alone, decided)
        folder.mkdir(parents=True, exist_ok=True)
        evidence.save(told_apart)

    def told(progress: TrainProgress) -> None:
        left = f", {progress.eta_s:.0f} s left" if progress.phase == "training" else ""
        on_progress(f"path 2: {progress.phase} {progress.done} of {progress.total}{left}")

    training, validation = split_table(table, lesson.train.validation.share)
    trained = train_policy(
        training,
        validation,
        lesson.train.model_copy(update={"seed": lesson.seed}),
        folder / "training",
        told,
    )
    threshold = choose_gate(
        trained.net(), validation, caution=snapshot.caution, max_steps=lesson.train.env.max_steps
    )
    tensors = {**trained.tensors, GATE_THRESHOLD: np.array([threshold], np.float32)}
    snapshot = replace(snapshot, policy=tensors)
    save_snapshot(snapshot, kept)
    return _open(snapshot, known, evidence, lesson.seed)


def _open(
    snapshot: RouterSnapshot, train: ReplayTable, evidence: Evidence | None, seed: int
) -> Learnt:
    rule = LearnedRule(snapshot)
    return Learnt(snapshot, rule.net, rule.threshold, seed, train, evidence)


def rule_of(bench: Bench, learnt: Learnt) -> ClusterRule:
    """Path 1 as it serves; pairs it was not fitted on are known by their cards."""
    return ClusterRule(learnt.snapshot, bench.prior)


def part_of(outcomes: Outcomes, rows: Index, columns: Index) -> Outcomes:
    """The outcomes of some queries and pairs, renumbered in the order given."""
    row = np.full(len(outcomes.embeddings), -1)
    row[rows] = np.arange(len(rows))
    column = np.full(len(outcomes.pairs), -1)
    column[columns] = np.arange(len(columns))
    kept = (row[outcomes.query_index] >= 0) & (column[outcomes.pair_index] >= 0)
    return replace(
        outcomes,
        embeddings=outcomes.embeddings[rows],
        pairs=tuple(outcomes.pairs[place] for place in columns),
        query_index=row[outcomes.query_index[kept]],
        pair_index=column[outcomes.pair_index[kept]],
        score=outcomes.score[kept],
        tokens=outcomes.tokens[kept],
        seconds=outcomes.seconds[kept],
        costs_usd=outcomes.costs_usd[kept],
        queries=tuple(outcomes.queries[place] for place in rows) if outcomes.queries else (),
    )
