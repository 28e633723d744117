"""The training loop: PPO iterations, measured on questions apart, checkpointed, stopped early.

In come tables and settings, out come the best weights and the curve. Everything is written into one
run folder; the same call on the same folder goes on where a run was cut off, and ends where it
would have ended.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import COMPONENT_METRICS_LOGGER

from rl.evaluate.figures import draw_training
from rl.ppo.algorithm import make_algorithm
from rl.ppo.algorithm_state import load_state, save_state
from rl.ppo.backend import Backend, ReplayBackend
from rl.ppo.config import TrainConfig, ValidationConfig
from rl.ppo.module import START_KL
from rl.ppo.randomise import as_unknown
from rl.ppo.rollout import Chooser, Greedy, roll_out
from rl.ppo.run_folder import Checkpoint, RunFolder
from rl.ppo.sampling import TERMS
from rl.ppo.spend import CapReached, Ledger, Spent
from rl.ppo.table import ReplayTable
from rl.ppo.warm_start import WarmStart, described, warm_start
from serve_app.errors import TrainingStopped
from serve_app.router.policy.policy_net import PolicyNet

logger = logging.getLogger(__name__)

_MODULE = "default_policy"
_LEARNER_METRICS = {
    "entropy": "entropy",
    "kl": "mean_kl_loss",
    "kl_coeff": "curr_kl_coeff",
    "policy_loss": "policy_loss",
    "vf_loss": "vf_loss",
    "vf_explained_var": "vf_explained_var",
    "start_kl": START_KL,
}
"""Names of ours, and RLlib's."""


@dataclass(frozen=True)
class TrainProgress:
    """How far training is, after an iteration."""

    phase: Literal["reading", "starting", "training", "evaluating"]
    done: int
    """Iterations; while `starting`, updates of the warm start's stage."""
    total: int
    mean_return: float | None = None
    """Of the episodes of this iteration."""
    terms: Mapping[str, float] = field(default_factory=dict)
    """Mean of each term of the reward per episode; they sum to the return."""
    held_out_utility: float | None = None
    """Of the last measurement on questions that are not trained on; `None` before the first."""
    best_utility: float | None = None
    best_iteration: int | None = None
    seconds_per_iteration: float = 0.0
    eta_s: float = 0.0
    """Seconds until the last iteration; training may stop before it."""
    spent_usd: float | None = None
    """Dollars that a live run has paid so far; `None` where the record is replayed."""

    def to_json(self) -> dict[str, Any]:
        """As it goes into a job's row."""
        plain: dict[str, Any] = {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }
        plain["terms"] = {name: round(value, 6) for name, value in self.terms.items()}
        if self.phase == "reading":
            plain["eta_s"] = None
        return plain


@dataclass(frozen=True)
class TrainResult:
    """What training came to."""

    tensors: Mapping[str, NDArray[np.float32]]
    """The best weights by held-out utility; see `PolicyNet`."""
    curve: tuple[Mapping[str, Any], ...]
    """One row per iteration: `iteration`, `mean_return`, the terms, `episode_steps`, `score`,
    `cost_usd`, `seconds`, RLlib's learner figures, where it was measured `utility` and `utilities`,
    and of a live run `spent_usd` and `requests` so far."""
    best_iteration: int
    """0: the weights that it started with."""
    best_utility: float
    """Mean over the alphas and views of the validation."""
    iterations: int
    """That were run; fewer than asked for where training stopped early."""
    settings: TrainConfig
    folder: Path
    start: WarmStart
    """What PPO started with; the best weights where nothing it found was better."""
    spent: Spent | None = None
    """By a live run; `None` where the record was replayed."""
    stopped: str | None = None
    """Which cap ended a live run before its last iteration."""

    def net(self) -> PolicyNet:
        """The network with the best weights."""
        return PolicyNet(self.tensors)


@dataclass
class _State:
    """What a checkpoint holds beside RLlib's part."""

    iteration: int = 0
    best_iteration: int = 0
    best_utility: float = -math.inf
    best: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)

    def to_checkpoint(self) -> Checkpoint:
        document = {
            "iteration": self.iteration,
            "best_iteration": self.best_iteration,
            "best_utility": self.best_utility,
            "curve": self.curve,
        }
        return Checkpoint(self.iteration, document, self.best)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> _State:
        return cls(**checkpoint.document, best=dict(checkpoint.tensors))


def train_policy(
    source: Backend | ReplayTable,
    validation: ReplayTable,
    settings: TrainConfig,
    folder: Path,
    on_progress: Callable[[TrainProgress], None] | None = None,
    *,
    should_stop: Callable[[], bool] | None = None,
    ledger: Ledger | None = None,
) -> TrainResult:
    """Train path 2. Ray must be initialised; blocks, and works in any thread.

    Training takes no Ray resource, unless `num_env_runners` is above 0 and that many CPUs are free
    (see `rl.ppo.algorithm.make_algorithm`).

    Args:
        source: What runs the pairs on the questions to train on, with views that were not fitted on
            them; a table is replayed.
        validation: Questions apart, judged greedily; picks the weights that are kept.
        settings: Of the training.
        folder: The run's; one that is there goes on from its last checkpoint. Gets `config.json`,
            `checkpoints/`, `tensorboard/`, `curve.png` and `result.json`.
        on_progress: Called after every iteration.
        should_stop: Asked after every iteration, and before every request of a live run.
        ledger: What a live `source` sends its requests through. At its cap training ends with the
            best weights so far.

    Raises:
        ConfigError: If the tables do not work with the settings, the folder is another run's, or it
            is being trained in.
        TrainingStopped: If `should_stop` said so, the pool is away, or a cap was reached before
            there are weights to keep. The same call goes on.
    """
    should_stop = should_stop or (lambda: False)
    backend = ReplayBackend(source) if isinstance(source, ReplayTable) else source
    threads = torch.get_num_threads()
    # Of this thread: OpenMP has a number for each.
    torch.set_num_threads(settings.torch_threads)
    try:
        with (
            RunFolder(folder, _identity(backend.table, validation, settings)) as run,
            nullcontext() if ledger is None else ledger.opened(should_stop),
        ):
            start = _started(run, backend.table, validation, settings, on_progress, should_stop)
            algorithm = make_algorithm(backend, settings, start.tensors)
            try:
                state = _resumed(run, algorithm, start)
                loop = _Loop(algorithm, run, state, validation, settings, ledger)
                loop.run(on_progress, should_stop)
            finally:
                algorithm.stop()
            result = TrainResult(
                tensors=state.best,
                curve=tuple(state.curve),
                best_iteration=state.best_iteration,
                best_utility=state.best_utility,
                iterations=state.iteration,
                settings=settings,
                folder=folder,
                start=start,
                spent=None if ledger is None else ledger.spent,
                stopped=loop.stopped,
            )
            draw_training(result.curve, result.best_iteration, run.path / "curve.png")
            run.finish(
                {
                    "best_iteration": result.best_iteration,
                    "best_utility": result.best_utility,
                    "iterations": result.iterations,
                    "start": described(start),
                    "spent": None if result.spent is None else asdict(result.spent),
                    "stopped": result.stopped,
                    "curve": list(result.curve),
                }
            )
            return result
    finally:
        torch.set_num_threads(threads)


def validate(
    chooser: Chooser, table: ReplayTable, settings: ValidationConfig, max_steps: int
) -> dict[str, float]:
    """Mean utility of a chooser's decisions, by view and alpha.

    The views after the first stand for kinds of queries that path 1 does not know. The network was
    trained on those very kinds, so there it is shown scrambled embeddings and descriptors.

    Args:
        chooser: For example `Greedy` with path 2's network.
        table: Questions it is not trained on.
        settings: Has the alphas.
        max_steps: Of a request.

    Returns:
        `<view>/<alpha>` to utility; the view is its index in the table.
    """
    unknown = as_unknown(table)
    return {
        f"{view}/{alpha:g}": float(
            np.mean(
                [
                    roll_out(chooser, seen, alpha, max_steps=max_steps, view=view).utility(alpha)
                    for seen in (unknown if view else [table])
                ]
            )
        )
        for view in range(len(table.views))
        for alpha in settings.alphas
    }


class _Loop:
    """The iterations of one call."""

    def __init__(
        self,
        algorithm: Algorithm,
        run: RunFolder,
        state: _State,
        validation: ReplayTable,
        settings: TrainConfig,
        ledger: Ledger | None,
    ) -> None:
        self._algorithm, self._run, self._state = algorithm, run, state
        self._validation, self._settings, self._ledger = validation, settings, ledger
        self.stopped: str | None = None
        """The cap that ended it."""

    def run(
        self,
        on_progress: Callable[[TrainProgress], None] | None,
        should_stop: Callable[[], bool],
    ) -> None:
        """Iterate to the end, or a cap.

        Raises:
            TrainingStopped: See `train_policy`; there is a checkpoint.
        """
        state, pace = self._state, _Pace()
        with self._run.event_writer(state.iteration) as events:
            while not self._is_over():
                try:
                    row = self._iterate()
                except CapReached as cap:
                    events.write(self._end_at(cap))
                    return
                except TrainingStopped:
                    self._save()
                    raise
                pace.add(row["seconds"])
                events.write(row)
                stopped = should_stop()
                if (
                    stopped
                    or self._is_over()
                    or state.iteration % self._settings.checkpoint_every == 0
                ):
                    self._save()
                if on_progress is not None:
                    on_progress(_progress(state, self._settings, pace))
                if stopped:
                    raise TrainingStopped(
                        f"stopped after {state.iteration} iterations; it can go on"
                    )

    def _iterate(self) -> dict[str, Any]:
        """One iteration, measured where it is due; the row that it adds to the curve."""
        began_s = time.monotonic()
        state, settings = self._state, self._settings
        if self._ledger is not None:
            self._ledger.check()
        _seed(settings.seed, state.iteration)
        row = _row(state.iteration + 1, self._algorithm.train())
        state.iteration += 1
        due = state.iteration % settings.validation.every == 0
        if due or state.iteration == settings.iterations:
            self._measure(row)
        if self._ledger is not None:
            spent = self._ledger.spent
            row |= {"spent_usd": spent.usd, "requests": spent.requests}
        row["seconds"] = time.monotonic() - began_s
        state.curve.append(row)
        return row

    def _measure(self, row: dict[str, Any]) -> None:
        """Put the utility of the weights as they are into a row, and keep the best ones."""
        state, settings = self._state, self._settings
        tensors = self._algorithm.get_module().net.to_tensors()
        utilities = validate(
            Greedy(PolicyNet(tensors)),
            self._validation,
            settings.validation,
            settings.env.max_steps,
        )
        row["utilities"] = utilities
        row["utility"] = float(np.mean(list(utilities.values())))
        if row["utility"] > state.best_utility:
            state.best_utility, state.best_iteration = row["utility"], state.iteration
            state.best = tensors

    def _end_at(self, cap: CapReached) -> dict[str, Any]:
        """Stop with what was learned so far; the last row of the curve.

        Raises:
            TrainingStopped: If nothing was.
        """
        state = self._state
        if not state.curve:
            raise TrainingStopped(
                f"{cap.message}; not one iteration was over, so nothing was learned. What was "
                "bought is kept: the same run goes on under a higher cap"
            )
        row = state.curve[-1]
        if "utility" not in row:
            self._measure(row)
        self._save()
        self.stopped = cap.message
        logger.warning("stopped after %d iterations: %s", state.iteration, cap.message)
        return row

    def _save(self) -> None:
        """Write a checkpoint, once there is something to go on from."""
        if self._state.iteration:
            self._run.save(
                self._state.to_checkpoint(),
                lambda folder: save_state(self._algorithm.get_state(), folder),
            )

    def _is_over(self) -> bool:
        """Whether all iterations are done, or the last ones brought nothing new."""
        state = self._state
        if state.iteration >= self._settings.iterations:
            return True
        patience = self._settings.validation.patience
        if not state.best or patience is None:
            return False
        return state.iteration - state.best_iteration >= patience


class _Pace:
    """Seconds per iteration, by the latest of them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        self.seconds = seconds if not self.seconds else 0.9 * self.seconds + 0.1 * seconds


def _progress(state: _State, settings: TrainConfig, pace: _Pace) -> TrainProgress:
    row = state.curve[-1]
    measured = next((r["utility"] for r in reversed(state.curve) if "utility" in r), None)
    return TrainProgress(
        phase="training",
        done=state.iteration,
        total=settings.iterations,
        mean_return=row["mean_return"],
        terms={name: row[name] for name in TERMS},
        held_out_utility=measured,
        best_utility=None if measured is None else state.best_utility,
        best_iteration=None if measured is None else state.best_iteration,
        seconds_per_iteration=pace.seconds,
        eta_s=pace.seconds * (settings.iterations - state.iteration),
        spent_usd=row.get("spent_usd"),
    )


def _row(iteration: int, result: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the curve from what RLlib reports.

    Raises:
        FloatingPointError: If the loss is not finite any more.
    """
    sampled, learned = result["env_runners"], result["learners"][_MODULE]
    row: dict[str, Any] = {
        "iteration": iteration,
        "mean_return": float(sampled["episode_return_mean"]),
        "episode_steps": float(sampled["episode_len_mean"]),
        "score": float(sampled["score"]),
        "cost_usd": float(sampled["cost_usd"]),
    }
    row |= {name: float(sampled[name]) for name in TERMS}
    row |= {
        ours: float(learned[theirs])
        for ours, theirs in _LEARNER_METRICS.items()
        if theirs in learned
    }
    if not math.isfinite(row["policy_loss"] + row["vf_loss"]):
        raise FloatingPointError(f"the loss of iteration {iteration} is not finite: lower lr")
    return row


def _started(
    run: RunFolder,
    table: ReplayTable,
    validation: ReplayTable,
    settings: TrainConfig,
    on_progress: Callable[[TrainProgress], None] | None,
    should_stop: Callable[[], bool],
) -> WarmStart:
    """The first weights of a run, learned or as its folder has them.

    Raises:
        TrainingStopped: If `should_stop` said so before they were learned.
    """
    kept = WarmStart.read(run.path)
    if kept is not None:
        return kept

    def measure(chooser: Chooser) -> float:
        utilities = validate(chooser, validation, settings.validation, settings.env.max_steps)
        return float(np.mean(list(utilities.values())))

    def tell(stage: str, done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(TrainProgress("starting", done, total))
        if should_stop():
            raise TrainingStopped("stopped before the first iteration; the same call begins anew")

    start = warm_start(table, validation, settings, measure, tell)
    logger.info("PPO starts from %s: %s", start.stage, start.utilities)
    start.save(run.path)
    return start


def _resumed(run: RunFolder, algorithm: Algorithm, start: WarmStart) -> _State:
    """The state of the last checkpoint, which the algorithm takes over too; else a new one."""
    found = run.last_checkpoint()
    if found is None:
        return _State(best_utility=start.utility, best=dict(start.tensors))
    checkpoint, algorithm_path = found
    held = load_state(algorithm_path)
    # The counts first: RLlib hands them on to the sampling with the rest.
    algorithm.set_state({COMPONENT_METRICS_LOGGER: held[COMPONENT_METRICS_LOGGER]})
    algorithm.set_state(held)
    logger.info("going on after iteration %d", checkpoint.iteration)
    return _State.of(checkpoint)


def _seed(seed: int, iteration: int) -> None:
    """Start every global generator anew, so that an iteration does not depend on a process."""
    drawn = int(np.random.default_rng([seed, iteration]).integers(2**32))
    random.seed(drawn)
    np.random.seed(drawn)  # RLlib shuffles with it
    torch.manual_seed(drawn)


def _identity(table: ReplayTable, validation: ReplayTable, settings: TrainConfig) -> dict[str, Any]:
    """What makes two runs the same one."""
    return {
        "settings": settings.identity(),
        "table": table_digest(table),
        "validation": table_digest(validation),
    }


def table_digest(table: ReplayTable) -> str:
    """Tells a table from others by its questions and outcomes."""
    digest = hashlib.sha256(repr(table.pairs).encode())
    for array in (table.embeddings, table.score, table.costs_usd, table.measured):
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
