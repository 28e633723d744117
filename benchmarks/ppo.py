"""How fast path 2 is trained: steps of its environment, and iterations of PPO on them.

`python -m benchmarks.ppo` builds a made-up profile of the nano pool's size. It steps the vectorised
and the single environment with random legal actions, turn by turn in one process, and then trains
some iterations with the shipped settings. It prints steps per second and seconds per iteration, and
what they come to against the targets. `--iterations 250` trains to the end, `--iterations 0` not at
all; `--out FILE.json` keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.stats import Target
from rl.ppo.env import EnvSettings, Episodes, RoutingEnv, VectorRoutingEnv
from rl.ppo.table import ReplayTable, View
from serve_app.router.policy.features import DESCRIPTOR_DIM
from serve_app.schemas import Pair

MIN_SPEEDUP = 5.0
"""Of the vectorised environment over the single one."""
NUM_ITERATIONS, MAX_MINUTES = 250, 6.0
"""A whole training, and how long it may take on two cores."""
SETTINGS = Path(__file__).parents[1] / "configs" / "rl" / "ppo_router.yaml"

console = Console()


@dataclass(frozen=True, slots=True)
class EnvFigures:
    """Steps of episodes per second; medians over the rounds."""

    single_steps_per_s: float
    """`RoutingEnv`, its resets included."""
    vector_steps_per_s: float
    """`VectorRoutingEnv`; what only replaces an ended episode is no step."""
    episodes_steps_per_s: float
    """`Episodes`, which the vector environment wraps."""
    speedup: float
    """Vector over single: median of the ratios of neighbouring rounds."""
    vector_step_ms: float
    """One step of all."""
    num_envs: int
    num_pairs: int
    num_queries: int


@dataclass(frozen=True, slots=True)
class TrainingFigures:
    """Iterations of PPO, with everything a training does between them."""

    iterations: int
    seconds: float
    """From the first to the last, validation and checkpoints included."""
    seconds_per_iteration: float
    """Median of sampling and learning alone."""
    minutes_of_250: float
    """What a whole training comes to at this pace."""
    steps_per_iteration: int
    torch_threads: int


def made_up_table(num_queries: int = 720, num_pairs: int = 15, dim: int = 384) -> ReplayTable:
    """A profile of random outcomes; how fast it steps does not depend on what is in it."""
    rng = np.random.default_rng(0)
    shape = (1, num_queries, num_pairs)

    def drawn(*size: int) -> NDArray[np.float32]:
        return rng.random(size, np.float32)

    view = View(
        quality=drawn(*shape[1:]),
        spread=0.1 * drawn(*shape[1:]),
        overall=drawn(*shape[1:]),
        outside=drawn(*shape[1:]),
        distance_quantile=drawn(num_queries),
        confidence=drawn(num_queries),
        inside=np.ones(num_queries, np.bool_),
    )
    num_tools = 5
    return ReplayTable(
        encoder="random",
        pairs=tuple(Pair(f"m{i // num_tools}", f"t{i % num_tools}") for i in range(num_pairs)),
        embeddings=drawn(num_queries, dim),
        domains=("",) * num_queries,
        score=np.round(drawn(*shape)),
        costs_usd=1e-5 * drawn(*shape),
        seconds=drawn(*shape),
        logprob=-drawn(*shape),
        tool_errors=np.zeros(shape, np.float32),
        measured=np.ones(shape, np.bool_),
        answer_key=rng.integers(3, size=shape).astype(np.intp),
        answer_row=rng.integers(1, 2000, size=shape).astype(np.intp),
        answer_embeddings=drawn(2000, dim),
        similarity=drawn(*shape[1:]),
        descriptors=drawn(num_pairs, DESCRIPTOR_DIM),
        pair_costs_usd=1e-5 * drawn(num_pairs),
        pair_seconds=drawn(num_pairs),
        think_cost_usd=np.zeros(num_queries, np.float32),
        think_seconds=np.zeros(num_queries, np.float32),
        views=(view, view),
    )


def legal_at_random(mask: NDArray[Any], rng: np.random.Generator) -> NDArray[np.int64]:
    """(B,) one legal action each."""
    actions: NDArray[np.int64] = np.where(mask > 0, rng.random(mask.shape), -1.0).argmax(axis=-1)
    return actions


def step_singly(env: RoutingEnv, rng: np.random.Generator, num_steps: int) -> float:
    """Seconds that so many steps take, resets included and the choice of actions left out."""
    observation, _ = env.reset()
    seconds = 0.0
    for _ in range(num_steps):
        action = int(legal_at_random(observation["mask"], rng))
        began_s = time.perf_counter()
        observation, _, terminated, _, _ = env.step(action)
        if terminated:
            observation, _ = env.reset()
        seconds += time.perf_counter() - began_s
    return seconds / num_steps


def step_together(env: VectorRoutingEnv, rng: np.random.Generator, num_steps: int) -> float:
    """Seconds per step of one episode."""
    observation, _ = env.reset()
    seconds, taken = 0.0, 0
    for _ in range(num_steps):
        actions = legal_at_random(observation["mask"], rng)
        taken += int(env.core.active.sum())
        began_s = time.perf_counter()
        observation, *_ = env.step(actions)
        seconds += time.perf_counter() - began_s
    return seconds / taken


def step_episodes(episodes: Episodes, rng: np.random.Generator, num_steps: int) -> float:
    """Seconds per step of one episode, every row stepped every time."""
    episodes.reset()
    observation = episodes.observe()
    seconds = 0.0
    for _ in range(num_steps):
        actions = legal_at_random(observation["mask"], rng)
        began_s = time.perf_counter()
        _, done, _ = episodes.step(actions)
        episodes.reset(np.flatnonzero(done))
        observation = episodes.observe()
        seconds += time.perf_counter() - began_s
    return seconds / (num_steps * episodes.num_envs)


def measure_env(table: ReplayTable, num_envs: int, rounds: int, num_steps: int) -> EnvFigures:
    """Step all three in turn.

    Args:
        table: What is replayed.
        num_envs: Requests side by side.
        rounds: Turns.
        num_steps: Steps of each in one turn; the single environment takes ten times as many.
    """
    settings = EnvSettings(max_pairs=max(32, table.num_pairs))
    rng = np.random.default_rng(1)
    single, vector, episodes = (
        RoutingEnv(table, settings),
        VectorRoutingEnv(table, num_envs, settings),
        Episodes(table, num_envs, settings),
    )
    kinds: dict[str, Callable[[int], float]] = {
        "single": lambda steps: step_singly(single, rng, 10 * steps),
        "vector": lambda steps: step_together(vector, rng, steps),
        "episodes": lambda steps: step_episodes(episodes, rng, steps),
    }
    for run in kinds.values():
        run(5)  # warming up
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, run in kinds.items():
            seconds[name].append(run(num_steps))
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    return EnvFigures(
        single_steps_per_s=1 / median["single"],
        vector_steps_per_s=1 / median["vector"],
        episodes_steps_per_s=1 / median["episodes"],
        speedup=float(np.median(np.divide(seconds["single"], seconds["vector"]))),
        vector_step_ms=1e3 * num_envs * median["vector"],
        num_envs=num_envs,
        num_pairs=table.num_pairs,
        num_queries=table.num_queries,
    )


def measure_training(table: ReplayTable, iterations: int) -> TrainingFigures:
    """Train with the shipped settings, in a Ray of this process's own."""
    import ray

    from rl.ppo.config import TrainConfig, load_train_config
    from rl.ppo.loop import TrainProgress, train_policy

    settings = load_train_config(SETTINGS)[0] if SETTINGS.exists() else TrainConfig()
    settings = settings.model_copy(
        update={
            "iterations": iterations,
            # Random outcomes teach nothing; what is timed is a training to the end.
            "validation": settings.validation.model_copy(update={"patience": None}),
        }
    )
    rows = np.arange(table.num_queries)
    is_apart = rows % 7 == 0
    ended_s: list[float] = []

    def note(progress: TrainProgress) -> None:
        if progress.phase == "training" and progress.done:
            ended_s.append(time.perf_counter())

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = train_policy(
                table.select(queries=rows[~is_apart]),
                table.select(queries=rows[is_apart]),
                settings,
                Path(folder) / "run",
                note,
            )
    finally:
        ray.shutdown()
    # The first iteration also warms up what the others find warm.
    seconds = ended_s[-1] - ended_s[0]
    pace = seconds / max(len(ended_s) - 1, 1)
    return TrainingFigures(
        iterations=result.iterations,
        seconds=seconds,
        seconds_per_iteration=float(np.median([row["seconds"] for row in result.curve])),
        minutes_of_250=NUM_ITERATIONS * pace / 60,
        steps_per_iteration=settings.train_batch_size_per_learner,
        torch_threads=settings.torch_threads,
    )


def targets(env: EnvFigures, training: TrainingFigures | None = None) -> list[Target]:
    """A vectorised environment five times as fast as the single one; a training within minutes."""
    held = [Target("vectorised steps/s over single", env.speedup, ">=", MIN_SPEEDUP)]
    if training is not None:
        name = f"minutes of {NUM_ITERATIONS} iterations"
        held.append(Target(name, training.minutes_of_250, "<=", MAX_MINUTES))
    return held


def show(env: EnvFigures, training: TrainingFigures | None, held: list[Target]) -> None:
    """Print the figures and what was reached."""
    table = Table("environment", "steps/s", title=f"{env.num_envs} at once, {env.num_pairs} pairs")
    table.add_row("one at a time", f"{env.single_steps_per_s:,.0f}")
    table.add_row("vectorised", f"{env.vector_steps_per_s:,.0f}")
    table.add_row("without Gymnasium", f"{env.episodes_steps_per_s:,.0f}")
    console.print(table)
    if training is not None:
        console.print(
            f"{training.iterations} iterations of {training.steps_per_iteration} steps: "
            f"{training.seconds_per_iteration:.2f} s each, {training.seconds:.1f} s in all",
            highlight=False,
        )
    for target in held:
        mark = "[green]holds[/green]" if target.holds else "[red]missed[/red]"
        wanted = f"{target.relation} {target.target:g}"
        console.print(f"{target.name}: {target.value:.1f} ({wanted}) {mark}", highlight=False)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--num-envs", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60, help="of each in one round")
    parser.add_argument("--iterations", type=int, default=25, help="of PPO")
    args = parser.parse_args()
    table = made_up_table()
    env = measure_env(table, args.num_envs, args.rounds, args.steps)
    training = measure_training(table, args.iterations) if args.iterations else None
    held = targets(env, training)
    show(env, training, held)
    if args.out is not None:
        record = {
            "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
            "env": asdict(env),
            "training": None if training is None else asdict(training),
            "targets": [target.as_json() for target in held],
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=2) + "\n")
        console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
