"""`atlas …` as a whole: the commands of serving, and those of the learning loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

from rl.cli.rules import app as rules_app
from rl.cli.training import train_command
from serve_app.cli.app import app as app
from serve_app.cli.console import ConfigOption, console, fail, load
from serve_app.config import AtlasConfig
from serve_app.errors import AtlasError
from serve_app.pool.desired import DesiredPool
from serve_app.schemas import Pair
from serve_app.store import Mode, Store

T = TypeVar("T")

app.add_typer(rules_app, name="rules")

AddressOption = Annotated[
    str, typer.Option(envvar="RAY_ADDRESS", help="Ray cluster that serves the pool.")
]


@app.command("profile")
def profile_command(
    questions: Annotated[Path, typer.Option(help="JSONL or Parquet: id, query, gold, metric.")],
    config: ConfigOption,
    model: Annotated[
        list[str] | None, typer.Option(help="Models to measure; may be repeated. [all]")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="model@tool that judges answers of the metric 'judge'.")
    ] = None,
    planner: Annotated[
        str | None,
        typer.Option(
            help="Model that thinks once about each question; every pair runs a second time with "
            "its thought. Training reads what router.planner thought. [router.planner]"
        ),
    ] = None,
    sample: Annotated[
        float,
        typer.Option(help="Share of the pairs each training question gets.", min=0.001, max=1),
    ] = 1.0,
    samples: Annotated[
        int, typer.Option(help="Runs of each pair on each question; all count.", min=1, max=100)
    ] = 1,
    temperature: Annotated[float, typer.Option(help="Of the models' answers.", min=0, max=2)] = 0.0,
    max_cost_usd: Annotated[float | None, typer.Option(help="Stop before this is spent.")] = None,
    concurrency: Annotated[int, typer.Option(help="Questions under way at once.", min=1)] = 4,
    again: Annotated[bool, typer.Option(help="Measure also what is measured already.")] = False,
    errors_again: Annotated[
        bool, typer.Option(help="Measure anew what ended in an error, as a tool's time-out.")
    ] = False,
    wait_s: Annotated[
        float, typer.Option(help="Longest wait for models that are not ready.", min=0)
    ] = 300.0,
    address: AddressOption = "auto",
) -> None:
    """Measure every pair of the running pool on labelled questions; goes on where it stopped."""
    from rl.profile.run import ProfileSettings, Progress, profile
    from serve_app.questions import read_questions
    from serve_app.running import joined

    settings = ProfileSettings(
        models=frozenset(model) if model else None,
        judge=None if judge is None else Pair.parse(judge),
        planner=planner,
        sample=sample,
        samples=samples,
        temperature=temperature,
        max_cost_usd=max_cost_usd,
        concurrency=concurrency,
        again=again,
        errors_again=errors_again,
        wait_s=wait_s,
    )
    deployment = load(config)
    try:
        asked = read_questions(questions)
    except AtlasError as error:
        raise fail(error.message) from None
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("${task.fields[cost]:.6f}"),
        console=console,
    )
    task = bar.add_task("profile", total=None, cost=0.0)

    said: set[tuple[str, ...]] = {()}

    def show(progress: Progress) -> None:
        if progress.waiting_for not in said:
            said.add(progress.waiting_for)
            waited_for = "; ".join(progress.waiting_for)
            bar.console.print(f"waiting: {waited_for}", highlight=False, markup=False)
        bar.update(task, total=progress.total, completed=progress.done, cost=progress.cost_usd)

    async def work(deployment: AtlasConfig, store: Store) -> Progress:
        return await profile(deployment, asked, store, settings, show)

    try:
        with joined(address), bar:
            done = _with_store(deployment, work)
    except ConnectionError as error:
        raise fail(str(error)) from None
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        raise typer.Exit(130) from None
    console.print(
        f"{done.done} outcomes measured, {done.skipped} were there, ${done.cost_usd:.6f}",
        highlight=False,
    )
    if done.errors:
        console.print(
            f"{done.errors} of them ended in an error and count as wrong, the last in: "
            f"{done.last_error}; --errors-again measures those anew",
            highlight=False,
        )
    if done.thoughts:
        console.print(f"{done.thoughts} of them are thoughts of the planner", highlight=False)
    if done.judged:
        share = done.judge_agreed / done.judged
        console.print(f"the judge said the same in both orders in {share:.0%} of {done.judged}")
    if done.stopped:
        console.print(f"stopped early: {done.stopped}")
    if done.left_out:
        why = "; ".join(done.left_out_because)
        raise fail(
            f"{len(done.left_out)} pairs are left out, because they did not answer: "
            f"{', '.join(done.left_out)} ({escape(why)}). Run it again when they do, or name the "
            "models to measure with --model"
        )
    if done.failed:
        raise fail(f"{done.failed} are missing, because their engine was away; run it again")


_GROUPS = ("candidate", "question")
"""Within which a verifier tells right answers from wrong ones."""


@app.command("fit")
def fit_command(
    config: ConfigOption,
    seed: Annotated[int, typer.Option()] = 0,
    traffic: Annotated[
        bool, typer.Option(help="Count rated requests too, of no key many (rl/fit/traffic.py).")
    ] = True,
    voi: Annotated[
        bool, typer.Option("--voi", help="Ask again where another answer is worth its price.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write a copy of the snapshot to.")
    ] = None,
) -> None:
    """Fit a router on the outcomes measured so far. It does not serve before `atlas promote`."""
    from rl.fit.selection import FitSettings
    from rl.publish import fit_snapshot
    from serve_app.router.snapshots.snapshot import LOOK, VERIFIER, save_snapshot

    deployment = load(config)
    began_s = time.monotonic()

    async def work(deployment: AtlasConfig, store: Store) -> Any:
        return await fit_snapshot(
            deployment, store, FitSettings(seed=seed), with_traffic=traffic, by_value=voi
        )

    with console.status("fitting …"):
        snapshot_id, snapshot = _with_store(deployment, work)
    about = snapshot.metadata
    scales = ", ".join(
        f"{scale.num_clusters} clusters ({scale.nearest} nearest) {scale.weight:.0%}"
        for scale in snapshot.scales
    )
    console.print(
        f"snapshot [bold]{snapshot_id}[/bold]: {about['num_outcomes']} outcomes of "
        f"{len(snapshot.pairs)} pairs on {about['num_queries']} queries, "
        f"{time.monotonic() - began_s:.1f} s",
        highlight=False,
    )
    console.print(
        f"{scales}; head {snapshot.head_weight:.0%}; cross-validated "
        f"{about['cross_validated']:.4f}",
        highlight=False,
    )
    if VERIFIER in about:
        within = (about[VERIFIER]["new_questions"][f"auc_within_{of}"] for of in _GROUPS)
        told = [
            f"{'unknown' if auc is None else f'{auc:.3f}'} within a {of}"
            for auc, of in zip(within, _GROUPS, strict=True)
        ]
        console.print(f"verifier: AUC {', '.join(told)}", highlight=False)
    if LOOK in about:
        console.print(
            f"first look: decides {about[LOOK]['share']:.0%} of questions like these, expected to "
            f"lose {about[LOOK]['loss']:.4f} of utility",
            highlight=False,
        )
    if outdated := about["num_outdated"]:
        console.print(
            f"{outdated} outcomes were left out: their model or tool had other settings then; "
            "`atlas profile` measures those anew",
            highlight=False,
        )
    if out is not None:
        try:
            save_snapshot(snapshot, out)
        except AtlasError as error:
            raise fail(error.message) from None
        console.print(f"written to {out}", highlight=False)


app.command("train")(train_command)


@app.command("evaluate")
def evaluate_command(
    config: ConfigOption,
    candidate: Annotated[
        str, typer.Argument(help="Snapshot id, newest, serving or cold-start.")
    ] = "newest",
    against: Annotated[str, typer.Option(help="What it is held against.")] = "serving",
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.json and the figures.")
    ] = None,
) -> None:
    """Hold a snapshot against another on the held-out questions."""
    from rl.comparison import evaluate_snapshot, write_report
    from rl.evaluate.evaluate import show
    from rl.publish import resolve

    deployment = load(config)

    async def work(deployment: AtlasConfig, store: Store) -> Any:
        names = await resolve(store, candidate), await resolve(store, against)
        return await evaluate_snapshot(deployment, store, *names)

    with console.status("evaluating …"):
        report = _with_store(deployment, work)
    show(report, console)
    if out is not None:
        write_report(report, out)
        console.print(f"report and figures in {out}", highlight=False)


_PROMOTED = {
    Mode.SERVING: "serves",
    Mode.CANARY: "serves {share:.1%} of the requests",
    Mode.SHADOW: "is asked and not obeyed,",
}


@app.command("promote")
def promote_command(
    config: ConfigOption,
    candidate: Annotated[str, typer.Argument(help="Snapshot id, newest or cold-start.")] = "newest",
    force: Annotated[bool, typer.Option(help="Whatever the evaluation says.")] = False,
    canary: Annotated[
        float | None, typer.Option(help="Share of the requests that it gets, for example 0.05.")
    ] = None,
    shadow: Annotated[bool, typer.Option(help="Log what it would do, and do not do it.")] = False,
    expect_version: Annotated[
        int | None, typer.Option(help="Refuse it unless this policy serves; 0 for none.", min=0)
    ] = None,
) -> None:
    """Evaluate a snapshot against the serving one, and let it serve if it is not worse."""
    from rl.evaluate.evaluate import show
    from rl.publish import promote_evaluated, resolve, trial_of

    deployment = load(config)
    if canary is not None and (shadow or not 0 < canary < 1):
        raise fail("--canary takes a share between 0 and 1, and does not go with --shadow")
    mode, share = trial_of(canary, shadow=shadow)

    async def work(deployment: AtlasConfig, store: Store) -> Any:
        snapshot_id = await resolve(store, candidate)
        promoted = await promote_evaluated(
            deployment,
            store,
            snapshot_id,
            force=force,
            mode=mode,
            share=share,
            expect_version=expect_version,
        )
        return snapshot_id, *promoted

    with console.status("evaluating …"):
        snapshot_id, version, report = _with_store(deployment, work)
    if report is None:
        console.print("[yellow]too little was measured to evaluate it[/yellow]")
    else:
        show(report, console)
    console.print(
        f"[green]policy {version}[/green]: {snapshot_id or 'the cold-start rule'} "
        f"{_PROMOTED[mode].format(share=share)} within {deployment.router.refresh_interval_s:g} s",
        highlight=False,
    )


@app.command("rollback")
def rollback_command(
    config: ConfigOption,
    expect_version: Annotated[
        int | None,
        typer.Option(
            help="Policy to take back; needed to go back further after a rollback.", min=1
        ),
    ] = None,
) -> None:
    """Let what served before serve again, under a new version."""
    from rl.publish import roll_back

    version, snapshot_id = _with_store(
        load(config), lambda _, store: roll_back(store, expect_version)
    )
    console.print(
        f"[green]policy {version}[/green]: {snapshot_id or 'the cold-start rule'} serves again",
        highlight=False,
    )


@app.command("snapshots")
def snapshots_command(config: ConfigOption) -> None:
    """List the snapshots, and which of them served when."""
    from serve_app.store import list_policies, list_snapshots

    async def work(deployment: AtlasConfig, store: Store) -> Any:
        return await list_snapshots(store), await list_policies(store)

    snapshots, policies = _with_store(load(config), work)
    table = Table("snapshot", "made", "queries", "outcomes", "cross-validated")
    for snapshot in snapshots:
        about = snapshot.about
        table.add_row(
            snapshot.snapshot_id,
            _when(snapshot.created_unix_s),
            str(about.get("num_queries", "")),
            str(about.get("num_outcomes", "")),
            f"{about.get('cross_validated', float('nan')):.4f}",
        )
    console.print(table)
    table = Table("policy", "snapshot", "as", "since", "why")
    for policy in policies:
        table.add_row(
            str(policy.policy_version),
            policy.snapshot_id or "cold-start",
            policy.mode + (f" {policy.share:.0%}" if policy.mode is Mode.CANARY else ""),
            _when(policy.created_unix_s),
            policy.reason,
        )
    console.print(table)


def _when(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))


def _with_store(config: AtlasConfig, work: Callable[[AtlasConfig, Store], Awaitable[T]]) -> T:
    """Run something with the deployment's store open, and the pool that is wanted now.

    Raises:
        typer.Exit: If it cannot be done; the reason is printed.
    """

    async def opened() -> T:
        store = await Store.open(config.store_url())
        try:
            return await work(await DesiredPool(config, store).current(), store)
        finally:
            await store.close()

    try:
        return asyncio.run(opened())
    except AtlasError as error:
        raise fail(error.message) from None


def main() -> None:
    """Entry point of `atlas`."""
    try:
        app()
    except ModuleNotFoundError as error:
        missing = f"{error.name} is not installed; the learning commands need atlas-serve[rl]"
        raise SystemExit(missing) from None
