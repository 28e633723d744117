"""`python -m benchmarks.nano`: train the bundled models, evaluate them, write their questions."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from benchmarks.nano.registry import (
    QUESTION_SETS,
    SHAPES,
    TOKENS,
    load_generator,
    weights_dir,
)
from serve_app.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="The bundled offline models.")
console = Console()


@app.command("train")
def train_command(
    name: Annotated[str, typer.Argument(help="math, facts or code")],
    out: Annotated[Path | None, typer.Option(help="Folder to write [shipped weights]")] = None,
    minutes: Annotated[float | None, typer.Option(help="Wall-clock budget")] = None,
    tokens: Annotated[int | None, typer.Option(help="Token budget [per model]")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    warm_start: Annotated[Path | None, typer.Option(help="Weights to continue from")] = None,
    muon_lr: Annotated[float, typer.Option()] = 0.02,
    adamw_lr: Annotated[float, typer.Option()] = 3e-3,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per step, with padding")] = 2048,
    split_share: Annotated[float, typer.Option(help="Share of splits", min=0, max=0.9)] = 0.0,
    repair_share: Annotated[float, typer.Option(help="Share of repairs", min=0, max=0.9)] = 0.0,
    sql_share: Annotated[float, typer.Option(help="Share of SQL", min=0, max=0.9)] = 0.0,
    clock_share: Annotated[float, typer.Option(help="Share of clock calls", min=0, max=0.9)] = 0.0,
    checkpoint_minutes: Annotated[
        float | None, typer.Option(help="Minutes between checkpoints [none]")
    ] = None,
) -> None:
    """Train one model from scratch on this machine's CPU."""
    _log_to_console()
    _check_name(name)
    from benchmarks.nano.skills import with_skills
    from benchmarks.nano.trainer import TrainingSettings, train

    if minutes is None and tokens is None:
        tokens = TOKENS[name]
    settings = TrainingSettings(
        shape=SHAPES[name],
        minutes=minutes,
        tokens=tokens,
        seed=seed,
        muon_lr=muon_lr,
        adamw_lr=adamw_lr,
        batch_tokens=batch_tokens,
        warm_start=warm_start,
        checkpoint_minutes=checkpoint_minutes,
    )
    try:
        generator = with_skills(
            load_generator(name),
            split_share=split_share,
            repair_share=repair_share,
            sql_share=sql_share,
            clock_share=clock_share,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    train(f"nano-{name}", generator, out or weights_dir(name), settings)


@app.command("eval")
def eval_command(
    names: Annotated[list[str] | None, typer.Argument(help="Models [all]")] = None,
    model_dir: Annotated[Path | None, typer.Option(help="Weights, for one model")] = None,
    n: Annotated[int, typer.Option(help="Questions per cell", min=1)] = 300,
    seed: Annotated[int, typer.Option()] = 1,
    skills: Annotated[bool, typer.Option(help="Measure its skills too")] = False,
    wrong: Annotated[Path | None, typer.Option(help="JSONL of wrong answers to write")] = None,
) -> None:
    """Evaluate models through vLLM; prints the table and saves it next to the weights."""
    _log_to_console()
    from benchmarks.nano.evaluate import evaluate_model, save, show

    chosen = names or list(SHAPES)
    for name in chosen:
        _check_name(name)
    if model_dir is not None and len(chosen) != 1:
        raise typer.BadParameter("--model-dir goes with exactly one model name")
    everything, mistakes = [], []
    for name in chosen:
        rows, missed = evaluate_model(name, model_dir, n=n, seed=seed, skills=skills)
        save(rows, (model_dir or weights_dir(name)) / "eval.json", seed=seed)
        everything += rows
        mistakes += missed
    show(everything, console)
    if wrong is not None:
        wrong.write_text("".join(json.dumps(m) + "\n" for m in mistakes), encoding="utf-8")
    if not all(row.passed for row in everything):
        raise typer.Exit(code=1)


@app.command("questions")
def questions_command(
    out: Annotated[Path, typer.Argument(help="JSONL file to write")],
    train: Annotated[
        int, typer.Option(help="Questions per model in trained wordings", min=0)
    ] = 240,
    held_out: Annotated[int, typer.Option(help="Questions per model in new wordings", min=0)] = 60,
    seed: Annotated[int, typer.Option()] = 2,
    names: Annotated[
        list[str] | None, typer.Option("--name", help="Models, database, clock [all]")
    ] = None,
) -> None:
    """Write labelled questions for `atlas profile`; by default those that ship."""
    from benchmarks.nano.labelled import question_set

    chosen = names or list(QUESTION_SETS)
    for name in chosen:
        _check_name(name, QUESTION_SETS)
    try:
        questions = question_set(chosen, {"seen": train, "held_out": held_out}, seed)
    except ConfigError as error:
        raise typer.BadParameter(error.message) from None
    out.write_text("".join(question.to_line() for question in questions), encoding="utf-8")
    console.print(f"{len(questions)} questions -> {out}")


@app.command("composed")
def composed_command(
    out: Annotated[Path, typer.Argument(help="JSONL file to write")],
    train: Annotated[int, typer.Option(help="Questions in trained wordings", min=0)] = 400,
    held_out: Annotated[int, typer.Option(help="Questions in new wordings", min=0)] = 400,
    seed: Annotated[int, typer.Option()] = 3,
) -> None:
    """Write questions that take several calls; by default those that ship."""
    from benchmarks.nano.composed import composed_questions

    questions = composed_questions({"seen": train, "held_out": held_out}, seed)
    out.write_text("".join(question.to_line() for question in questions), encoding="utf-8")
    console.print(f"{len(questions)} questions -> {out}")


@app.command("tiers")
def tiers_command(
    out: Annotated[Path, typer.Argument(help="JSONL file to write")],
    train: Annotated[int, typer.Option(help="Questions per domain in trained wordings")] = 80,
    held_out: Annotated[int, typer.Option(help="Questions per domain in new wordings")] = 160,
    seed: Annotated[int, typer.Option()] = 5,
) -> None:
    """Write the questions of configs/nano-tiers.yaml, and its incomplete sets of sources."""
    from benchmarks.nano.tiers import FOLDER, tiers_questions, write_shelves

    questions = tiers_questions({"seen": train, "held_out": held_out}, seed)
    out.write_text("".join(question.to_line() for question in questions), encoding="utf-8")
    write_shelves()
    console.print(f"{len(questions)} questions -> {out}; sources -> {FOLDER}")


@app.command("scope")
def scope_command() -> None:
    """Write the texts of the rule `scope`: utterances, and labelled ones to fit it on."""
    from benchmarks.nano.scope import FOLDER, write_scope

    write_scope()
    console.print(f"known.txt, fit.jsonl -> {FOLDER}")


@app.command("bugs")
def bugs_command(
    out: Annotated[Path, typer.Argument(help="JSONL file to write")],
    count: Annotated[int, typer.Option(help="Bugs", min=1)] = 480,
    seed: Annotated[int, typer.Option()] = 4,
) -> None:
    """Write the corpus of similar bugs; by default the one that ships."""
    from benchmarks.nano.bugs import write_bugs

    write_bugs(out, count, seed)
    console.print(f"{count} bugs -> {out}")


@app.command("database")
def database_command(
    out: Annotated[Path | None, typer.Argument(help="SQLite file [the one that ships]")] = None,
) -> None:
    """Write the database of the tool `database`."""
    from benchmarks.nano import shop

    shop.write_database(out or shop.PATH)
    console.print(f"customers, products, orders -> {out or shop.PATH}")


def _check_name(name: str, names: Iterable[str] = SHAPES) -> None:
    if name not in names:
        raise typer.BadParameter(f"no nano model {name!r}; choose one of {', '.join(names)}")


def _log_to_console() -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console)]
    )


if __name__ == "__main__":
    app()
