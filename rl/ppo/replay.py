"""From outcomes to the table that a policy is trained and evaluated on.

In comes what the store (or a table of outcomes) holds, out goes a `ReplayTable` of dense arrays.
The beliefs in it are never of a fit that saw the query: path 1 knows the queries it was fitted on
better than any it will serve.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from rl.fit.dataset import Dataset, read_dataset
from rl.fit.selection import FitSettings
from rl.fit.voters import voters_of
from rl.ppo.beliefs import (
    QUICK_FIT,
    columns_of,
    groups_of,
    make_views,
    newcomer_view,
    view_of,
)
from rl.ppo.judges import Judges
from rl.ppo.table import Bool, Float, Index, ReplayTable, View
from serve_app.config import AtlasConfig
from serve_app.embedder import TextEncoder, find_model
from serve_app.embedder.onnx_export import source_key
from serve_app.errors import ConfigError
from serve_app.private_files import make_private_folder
from serve_app.router.policy.features import DESCRIPTOR_DIM, NO_ANSWER, project
from serve_app.router.policy.verifier import Verifier
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.snapshots.build_rule import read_cards, repriced
from serve_app.router.snapshots.snapshot import RouterSnapshot
from serve_app.signals import NUMBERS
from serve_app.store import Store
from serve_app.tools.builtin.best_of import answer_key

__all__ = [
    "QUICK_FIT",
    "ReplayTable",
    "View",
    "answer_encoder",
    "groups_of",
    "make_table",
    "make_views",
    "newcomer_view",
    "read_replay",
    "view_of",
    "with_rule",
]

Encode = Callable[[Sequence[str]], Float]
"""texts -> (num_texts, dim) L2-normalised."""

_ENCODE_AT_ONCE = 64


async def read_replay(
    config: AtlasConfig,
    store: Store,
    split: str,
    *,
    views: Literal["cross"] | RouterSnapshot | None = "cross",
    settings: FitSettings | None = None,
) -> ReplayTable:
    """The newest outcome of every configured pair on every labelled question, as a table.

    With the outcomes after a thought of the deployment's planner, where they were recorded.

    Args:
        config: The deployment.
        store: Where the outcomes are.
        split: `train` or `held_out`.
        views: `cross` fits path 1 anew without each query's fold and group; a snapshot gives its
            own beliefs; `None` gives none.
        settings: Of the fits behind `cross`.

    Raises:
        ConfigError: If there is no outcome.
        SnapshotError: If the snapshot does not fit the configuration.
        StoreError: If the store is away.
    """
    dataset = await read_dataset(config, store, split)
    cards = read_cards(config)
    outcomes = dataset.outcomes
    descriptors = cards.descriptors_of(outcomes.pairs)
    likeness = cards.likeness_of(outcomes.embeddings, outcomes.pairs)
    table = make_table(dataset, descriptors, likeness, answer_encoder(config))
    if views is None:
        return table
    if views == "cross":
        groups = groups_of(dataset.domains, outcomes.embeddings)
        return replace(
            table,
            views=make_views(outcomes, groups, descriptors, likeness, settings),
            new_models=newcomer_view(outcomes, "model_id", descriptors, likeness, settings),
            new_tools=newcomer_view(outcomes, "tool_id", descriptors, likeness, settings),
        )
    return with_rule(table, ClusterRule(repriced(views, cards), cards.prior))


def answer_encoder(config: AtlasConfig) -> Encode:
    """The deployment's encoder for the answers of a profile; what it encoded once it keeps on disk.

    The same weights and texts find their file under the data folder's `cache`.
    """
    folder = config.data_path() / "cache"
    encoder = TextEncoder(config.embedder, folder)
    source = [source_key(find_model(config.embedder.model)), config.embedder.max_tokens]

    def encode(texts: Sequence[str]) -> Float:
        content = json.dumps([*source, *texts]).encode()
        path = folder / f"answers-{hashlib.sha256(content).hexdigest()[:16]}.npy"
        if path.exists():
            kept: Float = np.load(path, allow_pickle=False)
            return kept
        vectors = np.zeros((len(texts), encoder.dim), np.float32)
        # Texts of one length together: padding costs as much as words do.
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        for start in range(0, len(order), _ENCODE_AT_ONCE):
            batch = order[start : start + _ENCODE_AT_ONCE]
            vectors[batch] = encoder.encode([texts[number] for number in batch])
        make_private_folder(folder)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            np.save(file, vectors)
        # Under its name only when it is whole: another job may read it at any time.
        os.replace(file.name, path)
        return vectors

    return encode


def make_table(
    dataset: Dataset,
    descriptors: Float | None = None,
    likeness: Float | None = None,
    encode: Encode | None = None,
) -> ReplayTable:
    """Lay out outcomes as a table without views; the last of several of one pair on a query counts.

    Where thoughts were recorded, T is 2. Where the answers were not kept, no two are taken to say
    the same.

    Args:
        dataset: Outcomes, answers and domains.
        descriptors: (P, descriptor) of the pairs, price last; `None` knows nothing of them.
        likeness: (N, P) similarity of the queries to the pairs' cards in [0, 1]; `None` is 0.
        encode: Embeds the answers; `None` leaves their embeddings zero.

    Raises:
        ConfigError: If the dataset's columns differ in length.
    """
    outcomes, thoughts = dataset.outcomes, dataset.thoughts
    parts = (dataset,) if thoughts is None else (dataset, thoughts.after)
    num_queries, num_pairs = len(outcomes.embeddings), len(outcomes.pairs)
    shape = (len(parts), num_queries, num_pairs)
    for part in parts:
        _check(part)

    def laid_out(column: Callable[[Dataset], Float | None], missing: float) -> Float:
        dense = np.full(shape, missing, np.float32)
        for time, part in enumerate(parts):
            values = column(part)
            if values is not None and len(values):
                dense[time, part.outcomes.query_index, part.outcomes.pair_index] = values
        return dense

    measured = np.zeros(shape, np.bool_)
    for time, part in enumerate(parts):
        measured[time, part.outcomes.query_index, part.outcomes.pair_index] = True
    costs_usd, pair_costs_usd = _known_costs(
        laid_out(lambda part: part.outcomes.costs_usd, np.nan), measured
    )
    seconds = laid_out(lambda part: part.outcomes.seconds, np.nan)
    keys, rows, vectors = _answers(parts, shape, encode)
    signals = np.full((*shape, len(NUMBERS)), np.nan, np.float32)
    for time, part in enumerate(parts):
        if part.signals is not None:
            place = (time, part.outcomes.query_index, part.outcomes.pair_index)
            signals[place] = part.signals
    nothing = np.zeros(num_queries, np.float32)
    return ReplayTable(
        encoder=outcomes.encoder,
        pairs=outcomes.pairs,
        embeddings=outcomes.embeddings.astype(np.float32),
        domains=tuple(dataset.domains),
        score=laid_out(lambda part: part.outcomes.score, 0.0),
        costs_usd=costs_usd,
        seconds=seconds,
        logprob=laid_out(lambda part: part.logprob, np.nan),
        tool_errors=laid_out(lambda part: part.tool_errors, 0.0),
        measured=measured,
        answer_key=keys,
        answer_row=rows,
        answer_embeddings=vectors,
        similarity=(
            np.zeros(shape[1:], np.float32) if likeness is None else likeness.astype(np.float32)
        ),
        descriptors=(
            np.zeros((num_pairs, DESCRIPTOR_DIM), np.float32)
            if descriptors is None
            else project(descriptors)
        ),
        pair_costs_usd=pair_costs_usd,
        pair_seconds=_means(seconds[0], 0.0),
        think_cost_usd=nothing if thoughts is None else _or_mean(thoughts.costs_usd),
        think_seconds=nothing if thoughts is None else _or_mean(thoughts.seconds),
        views=(),
        queries=outcomes.queries,
        voters=voters_of(keys[0]),
        signals=signals,
    )


def _check(dataset: Dataset) -> None:
    """See that there is one of each for every outcome, or none.

    Raises:
        ConfigError: If not.
    """
    for name in ("answers", "logprob", "tool_errors"):
        column = getattr(dataset, name)
        if column is not None and len(column) not in {0, len(dataset.outcomes.score)}:
            raise ConfigError(f"there are not as many {name} as outcomes")


def _or_mean(values: Float) -> Float:
    """(N,) with the mean of those that are known in place of those that are not."""
    return np.where(np.isfinite(values), values, _means(values[:, None], 0.0)).astype(np.float32)


def with_rule(table: ReplayTable, rule: ClusterRule) -> ReplayTable:
    """A table seen with a served rule: its beliefs and chances, the dollars and seconds it expects.

    Raises:
        ConfigError: If the rule does not know one of the table's pairs.
    """
    columns = columns_of(rule, table.pairs)
    snapshot, judges = rule.snapshot, None
    if snapshot.verifier:
        num_known = len(snapshot.pairs)
        judges = Judges(
            verifiers=(Verifier(snapshot.verifier, num_known),),
            of=np.zeros((1, table.num_queries), np.intp),
            places=np.where(columns < num_known, columns, -1),
        )
    return replace(
        table,
        judges=judges,
        caution=snapshot.caution,
        pair_costs_usd=rule.costs_usd[columns].astype(np.float32),
        pair_seconds=rule.seconds[columns].astype(np.float32),
        voters=rule.voters[columns],
        views=(view_of(rule, table.embeddings, table.pairs),),
    )


def _means(values: Float, missing: float) -> Float:
    """(P,) mean of the finite values of each column; `missing` where there is none."""
    known = np.isfinite(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0.0).sum(axis=0, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), missing).astype(np.float32)


def _known_costs(costs_usd: Float, measured: Bool) -> tuple[Float, Float]:
    """Dollars without a gap, and each pair's mean.

    An unknown cost is the pair's mean; without any, the pool's geometric mean, as in the fit.
    """
    means = _means(costs_usd[0], np.nan)
    paid = means[np.isfinite(means) & (means > 0)].astype(np.float64)
    typical = float(np.exp(np.log(paid).mean())) if len(paid) else 0.0
    means = np.where(np.isfinite(means), means, typical).astype(np.float32)
    filled = np.where(np.isfinite(costs_usd) & measured, costs_usd, means)
    return filled.astype(np.float32), means


def _answers(
    parts: Sequence[Dataset], shape: tuple[int, int, int], encode: Encode | None
) -> tuple[Index, Index, Float]:
    """Keys and rows of the answers, both `shape`, and the embeddings of the distinct ones.

    An answer says the same before a thought and after it.
    """
    dim = parts[0].outcomes.embeddings.shape[1]
    keys = np.full(shape, NO_ANSWER, np.intp)
    rows = np.zeros(shape, np.intp)
    texts: dict[str, int] = {}
    said: dict[tuple[int, str], int] = {}
    # Keys from here on are of answers that were not kept.
    beyond = sum(len(part.answers) for part in parts)
    for time, part in enumerate(parts):
        query_index, pair_index = part.outcomes.query_index, part.outcomes.pair_index
        if not part.answers:
            keys[time, query_index, pair_index] = beyond + time * shape[2] + pair_index
            continue
        entries = zip(query_index.tolist(), pair_index.tolist(), part.answers, strict=True)
        for query, pair, answer in entries:
            key = answer_key(answer)
            if answer is None or key is None:
                keys[time, query, pair] = NO_ANSWER
                rows[time, query, pair] = 0
                continue
            keys[time, query, pair] = said.setdefault((query, key), len(said))
            rows[time, query, pair] = texts.setdefault(answer, len(texts) + 1)
    vectors = np.zeros((len(texts) + 1, dim), np.float32)
    if encode is not None and texts:
        vectors[1:] = encode(list(texts))
    return keys, rows, vectors
