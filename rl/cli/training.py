"""`atlas train`, which `python -m rl.train` takes too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from rl.ppo.config import TrainConfig, load_train_config
from serve_app.cli.console import console, fail, load
from serve_app.config import AtlasConfig
from serve_app.errors import AtlasError
from serve_app.pool.desired import DesiredPool
from serve_app.questions import Question, read_questions
from serve_app.store import Store

if TYPE_CHECKING:
    from rl.ppo.loop import TrainProgress
    from rl.training import Trained


def train_command(
    config: Annotated[Path, typer.Option("--config", help="Training file, as configs/rl/*.yaml.")],
    deployment: Annotated[
        Path | None,
        typer.Option(help="Configuration of the deployment. [what the training file names]"),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Snapshot to build on: an id, newest or serving.")
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="Of PPO.", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="Of all that is drawn.", min=0)] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder of the run. [in the data folder]")
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(help="Labelled questions of a live training. [what the training file names]"),
    ] = None,
    address: Annotated[
        str,
        typer.Option(
            envvar="RAY_ADDRESS", help="Ray cluster to train on; starts one here if none runs."
        ),
    ] = "auto",
) -> None:
    """Train path 2 on the profile, or with `live` on the running pool.

    The same command goes on where one was stopped or killed.
    """
    try:
        settings, named, asked = load_train_config(config)
        asked = questions or asked
        labelled = () if settings.live is None or asked is None else read_questions(asked)
    except AtlasError as error:
        raise fail(error.message) from None
    changed = {"base": base, "iterations": iterations, "seed": seed}
    settings = settings.model_copy(
        update={name: value for name, value in changed.items() if value is not None}
    )
    place = deployment or named
    if place is None:
        raise fail(f"{config} names no deployment: give --deployment")
    _show(_train(load(place), settings, labelled, folder, address))


def _train(
    config: AtlasConfig,
    settings: TrainConfig,
    questions: tuple[Question, ...],
    folder: Path | None,
    address: str,
) -> Trained:
    """Train, and show how it goes.

    Raises:
        typer.Exit: If it cannot be done, or it was told to stop; the reason is printed.
    """
    # Not above: every other command would load RLlib.
    from rl.training import ray_for_training, train

    async def work() -> Trained:
        store = await Store.open(config.store_url())
        try:
            wanted = await DesiredPool(config, store).current()
            return await train(wanted, store, settings, show, folder=folder, questions=questions)
        finally:
            await store.close()

    bar, show = _progress_bar(settings)
    try:
        with ray_for_training(address, live=settings.live is not None), bar:
            return asyncio.run(work())
    except AtlasError as error:
        raise fail(error.message) from None
    except ConnectionError:
        raise fail(f"no Ray cluster answers at {address!r}") from None
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C; `ray job stop`, which Ray makes an exit
        console.print("stopped; the same command goes on from here")
        raise typer.Exit(130) from None


def _progress_bar(settings: TrainConfig) -> tuple[Bar, Callable[[TrainProgress], None]]:
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
    )
    task = bar.add_task("starting", total=settings.iterations, figures="")

    def show(progress: TrainProgress) -> None:
        figures = ""
        if progress.mean_return is not None:
            terms = " ".join(f"{name[2:]} {value:+.3f}" for name, value in progress.terms.items())
            figures = f"return {progress.mean_return:.3f} ({terms})"
            if progress.held_out_utility is not None:
                figures += f", held-out {progress.held_out_utility:.4f}"
            if progress.spent_usd is not None:
                figures += f", ${progress.spent_usd:.6f}"
            figures += f", {progress.eta_s:.0f} s left"
        bar.update(
            task,
            description=progress.phase,
            completed=progress.done,
            total=progress.total,
            figures=figures,
        )
        if progress.mean_return is not None and not console.is_terminal:
            line = f"{progress.done}/{progress.total} {figures}"
            console.print(line, highlight=False, soft_wrap=True)

    return bar, show


def _show(trained: Trained) -> None:
    from rl.evaluate.evaluate import show

    result = trained.result
    if trained.report is not None:
        show(trained.report, console)
    stages = ", ".join(f"{name} {value:.4f}" for name, value in result.start.utilities.items())
    console.print(f"starts from {result.start.stage} ({stages})", highlight=False)
    console.print(
        f"{result.iterations} iterations; the best at {result.best_iteration}, utility "
        f"{result.best_utility:.4f} on questions apart; path 1 keeps what it is sure of by "
        f"{trained.gate_threshold:g}",
        highlight=False,
    )
    if result.spent is not None:
        spent = result.spent
        console.print(
            f"{spent.requests} requests to the pool for ${spent.usd:.6f} in {spent.seconds:.0f} s",
            highlight=False,
        )
    if result.stopped is not None:
        console.print(f"stopped early: {result.stopped}", highlight=False)
    console.print(f"curve, events and report in {result.folder}", highlight=False, soft_wrap=True)
    console.print(
        f"snapshot [bold]{trained.snapshot_id}[/bold] is kept; `atlas promote` lets it serve",
        highlight=False,
    )
