"""Training path 2: by command, as a job, or under `ray job submit`.

Reads the profile, trains on most of its training questions (on their recorded outcomes, or live on
the running pool), keeps the weights that did best on the rest of them, chooses the gate, keeps the
snapshot and evaluates it on the held-out questions. It does not serve before `atlas promote`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray

from rl.comparison import evaluate_snapshot, write_report
from rl.evaluate.evaluate import EvaluationReport
from rl.ppo.backend import Backend, ReplayBackend
from rl.ppo.config import TrainConfig
from rl.ppo.live import Pool, ServedPool, live_backend, ready_pairs
from rl.ppo.loop import TrainProgress, TrainResult, table_digest, train_policy
from rl.ppo.replay import read_replay
from rl.ppo.rollout import choose_gate
from rl.ppo.spend import Ledger
from rl.ppo.table import ReplayTable
from rl.ppo.verifier import with_judges
from rl.ppo.warm_start import described
from rl.publish import SERVING, keep_snapshot, resolve
from serve_app.config import AtlasConfig
from serve_app.errors import ConfigError, NotFound, SnapshotError
from serve_app.questions import Question
from serve_app.ray_cluster import connect
from serve_app.router.snapshots.library import SnapshotLibrary
from serve_app.router.snapshots.snapshot import GATE_THRESHOLD, THINKS, RouterSnapshot
from serve_app.store import Store

logger = logging.getLogger(__name__)

T = TypeVar("T")

RUNS_FOLDER = "training"
"""Of the data folder: has a folder for each run."""
REPORT_FOLDER, PUBLISHED_FILE = "report", "snapshot_id"
"""Of a run's folder: the evaluation, and the id of the snapshot that came of it."""

_OBJECT_STORE = 100 << 20
"""Bytes of a cluster of our own: the weights pass through it."""


@dataclass(frozen=True)
class Trained:
    """What came of a training run."""

    snapshot_id: str
    result: TrainResult
    report: EvaluationReport | None
    """On the held-out questions, against the serving policy; `None` where that cannot be."""
    gate_threshold: float
    """Confidence from which path 1 keeps a request; above 1 it keeps none."""

    def to_json(self) -> dict[str, Any]:
        """As a job's result."""
        result = self.result
        return {
            "snapshot_id": self.snapshot_id,
            "iterations": result.iterations,
            "best_iteration": result.best_iteration,
            "held_out_utility": result.best_utility,
            "gate_threshold": self.gate_threshold,
            "start": described(result.start),
            "seed": result.settings.seed,
            "folder": str(result.folder),
            "spent": None if result.spent is None else asdict(result.spent),
            "stopped": result.stopped,
            "report": None if self.report is None else self.report.to_json(),
        }


async def train(
    config: AtlasConfig,
    store: Store,
    settings: TrainConfig,
    on_progress: Callable[[TrainProgress], None] | None = None,
    *,
    folder: Path | None = None,
    questions: Sequence[Question] = (),
    pool: Pool | None = None,
) -> Trained:
    """Train a policy, and keep a snapshot with it. Ray must be initialised.

    The same call goes on where one was cut off. Cancelled, it leaves a checkpoint. A live training
    that reaches its cap keeps a snapshot of what it learned until then.

    Args:
        config: The deployment.
        store: Where outcomes and snapshots are.
        settings: Of the training.
        on_progress: Called after every iteration, and before what comes first and last.
        folder: The run's; `None` takes one in the data folder that is named after the settings and
            the outcomes.
        questions: What is right, for a live training: the profiled training questions, and others
            that it leaves out.
        pool: What a live training drives; `None` takes the graph of this process's cluster.

    Raises:
        ConfigError: If there are too few outcomes, or the settings do not work with them or with
            the pool.
        NotFound: If there is no snapshot to build on.
        SnapshotError: If that snapshot is damaged.
        StoreError: If the store is away.
        TrainingStopped: If a live training reached its cap before there was anything to keep, or
            the pool went away. Nothing is kept but the run's folder; the same call goes on.
    """
    tell = on_progress or (lambda progress: None)
    base_id, base = await _read_base(config, store, settings.base)
    pool = pool or ServedPool()
    live = settings.live
    ready = () if live is None else await ready_pairs(live, questions, pool)
    tell(TrainProgress("reading", 0, settings.iterations))
    replay = replace(await read_replay(config, store, "train"), caution=base.caution)
    if base.verifier:
        replay = await asyncio.to_thread(with_judges, replay)
    table, validation = split_table(replay, settings.validation.share)
    folder = folder or _open_folder(config.data_path() / RUNS_FOLDER, settings, table)
    backend: Backend = ReplayBackend(table)
    ledger: Ledger | None = None
    if live is not None:
        backend, ledger = live_backend(config, table, questions, live, ready, pool, folder)
    result = await _in_thread(
        lambda should_stop: train_policy(
            backend, validation, settings, folder, tell, should_stop=should_stop, ledger=ledger
        )
    )
    tell(TrainProgress("evaluating", result.iterations, settings.iterations))
    threshold = choose_gate(
        result.net(), validation, caution=base.caution, max_steps=settings.env.max_steps
    )
    snapshot_id = await keep_snapshot(
        config,
        store,
        with_policy(base, result, threshold, base_id=base_id, thinks=bool(backend.can_think.any())),
    )
    report = await _evaluated(config, store, snapshot_id)
    if report is not None:
        write_report(report, folder / REPORT_FOLDER)
    (folder / PUBLISHED_FILE).write_text(snapshot_id)
    return Trained(snapshot_id, result, report, threshold)


def with_policy(
    base: RouterSnapshot,
    result: TrainResult,
    gate_threshold: float,
    *,
    base_id: str,
    thinks: bool,
) -> RouterSnapshot:
    """A snapshot of path 1 with the trained policy beside it.

    Args:
        base: Path 1; a policy it has is replaced.
        result: The training.
        gate_threshold: Confidence from which path 1 keeps a request.
        base_id: The snapshot id of `base`.
        thinks: Whether it was trained with a planner.
    """
    about: dict[str, Any] = dict(base.metadata) | {
        "kind": "ppo",
        "base": base_id,
        "train_seed": result.settings.seed,
        "iterations": result.iterations,
        "best_iteration": result.best_iteration,
        "held_out_utility": result.best_utility,
        "start": described(result.start),
        "trained_unix_s": time.time(),
        THINKS: int(thinks),
    }
    if result.spent is not None:
        about["spent_usd"] = result.spent.usd
    threshold = np.array([gate_threshold], np.float32)
    return replace(base, policy=dict(result.tensors) | {GATE_THRESHOLD: threshold}, metadata=about)


def split_table(table: ReplayTable, share: float) -> tuple[ReplayTable, ReplayTable]:
    """Questions to train on, and questions apart; a question is always on the same side.

    Args:
        table: All of them.
        share: Of those apart, in (0, 1).

    Raises:
        ConfigError: If either side is empty.
    """
    place = np.array(
        [
            int.from_bytes(hashlib.blake2b(vector.tobytes(), digest_size=8).digest()) / 2**64
            for vector in table.embeddings
        ]
    )
    apart = np.flatnonzero(place < share)
    rest = np.flatnonzero(place >= share)
    if not len(apart) or not len(rest):
        raise ConfigError(
            f"{table.num_queries} questions are too few to keep a share of {share:g} apart: "
            "profile more"
        )
    return table.select(queries=rest), table.select(queries=apart)


@contextmanager
def ray_for_training(address: str, *, live: bool = False) -> Iterator[None]:
    """A cluster to train on: the running one, or where there is none, one of this process's own.

    Args:
        address: Of the running one; `auto` looks for it.
        live: Whether training drives a graph; then only a running cluster will do.

    Raises:
        ConnectionError: If another address than `auto` does not answer, or none does and `live`.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    try:
        connect(address, **quiet)
    except ConnectionError:
        if live or address != "auto":
            raise
        connect("local", include_dashboard=False, object_store_memory=_OBJECT_STORE, **quiet)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


async def _read_base(config: AtlasConfig, store: Store, name: str) -> tuple[str, RouterSnapshot]:
    """The snapshot to build on.

    Raises:
        NotFound: If there is none.
        SnapshotError: If it is damaged.
    """
    snapshot_id = await resolve(store, name)
    if snapshot_id is None:
        raise NotFound(f"{name!r} is no fitted snapshot, and path 2 builds on one: run `atlas fit`")
    return snapshot_id, SnapshotLibrary(config.snapshots_path()).load(snapshot_id, policy_version=1)


async def _in_thread(work: Callable[[Callable[[], bool]], T]) -> T:
    """Do blocking work beside the event loop; cancelled, it is told to stop and waited for."""
    stop = threading.Event()
    task = asyncio.ensure_future(asyncio.to_thread(work, stop.is_set))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        with contextlib.suppress(Exception):
            await task
        raise


async def _evaluated(
    config: AtlasConfig, store: Store, snapshot_id: str
) -> EvaluationReport | None:
    """The snapshot on the held-out questions; `None`, and a line in the log, if that cannot be."""
    try:
        return await evaluate_snapshot(config, store, snapshot_id, await resolve(store, SERVING))
    except (ConfigError, SnapshotError) as error:
        logger.warning("snapshot %s is kept, but not evaluated: %s", snapshot_id, error.message)
        return None


def _open_folder(root: Path, settings: TrainConfig, table: ReplayTable) -> Path:
    """The folder of the run with these settings and questions that has not published yet."""
    name = f"{settings.digest()}-{table_digest(table)[:8]}"
    for number in itertools.count(1):
        folder = root / f"{name}-{number}"
        if not (folder / PUBLISHED_FILE).exists():
            return folder
    raise AssertionError
