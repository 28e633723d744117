"""`atlas init`: a first configuration, out of what is on this machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from serve_app.cli.console import DEFAULT_CONFIG, console, fail
from serve_app.config import DATA_FOLDER
from serve_app.errors import ConfigError
from serve_app.machine.checks import sandbox_missing
from serve_app.machine.engines import (
    DEFAULT_PORTS,
    checked_address,
    default_addresses,
    look_at_engines,
)
from serve_app.machine.hardware import look_at_hardware
from serve_app.machine.hub import LARGE, SMALL, cached_weights
from serve_app.machine.propose import Machine, Proposal, propose
from serve_app.machine.providers import PROVIDERS, look_at_keys
from serve_app.machine.writing import render, title_of, write

_NOTHING = """\
Nothing was found that could answer: no server of models on loopback, no API key in the environment,
and {why}. One of these, then `atlas init` again:
  ollama pull qwen2.5:3b          a model on this machine, without vLLM
  export OPENAI_API_KEY=…         models behind an API; others: {keys}
or serve the bundled nano models from a clone of the repository, without a download: make serve"""


def init(
    out: Annotated[Path, typer.Option(help="File to write.")] = DEFAULT_CONFIG,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing; for scripts.")] = False,
    force: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="Loopback address of a server of models, as 127.0.0.1:8001; may be repeated. "
            "[where Ollama, llama.cpp, LM Studio and vLLM listen as a rule]"
        ),
    ] = None,
) -> None:
    """Look at this machine and write a configuration for it; contacts loopback addresses only."""
    if out.exists() and not force:
        raise fail(f"{escape(repr(str(out)))} is there already; --force replaces it")
    try:
        addresses = tuple(map(checked_address, engine)) if engine else default_addresses()
    except ConfigError as error:
        raise fail(escape(error.message)) from None
    with console.status("looking at this machine …"):
        machine = Machine(
            hardware=look_at_hardware(),
            engines=look_at_engines(addresses),
            providers=look_at_keys(),
            has_vllm=importlib.util.find_spec("vllm") is not None,
            cached=frozenset(
                model.repository for model in (*SMALL, *LARGE) if cached_weights(model.repository)
            ),
            sandbox_missing=sandbox_missing(),
        )
    _show_machine(machine)
    proposal = propose(machine)
    if proposal is None:
        why = "too little memory for a model of the hub" if machine.has_vllm else "no vLLM"
        keys = ", ".join(provider.key_variable for provider in PROVIDERS[1:])
        _print(_NOTHING.format(why=why, keys=keys))
        raise typer.Exit(1)
    _show_proposal(proposal)
    if not yes and not typer.confirm(f"Write {out}?", default=True):
        raise typer.Exit(1)
    try:
        text = render(proposal, tuple(title_of(machine)), data_dir=f"./{DATA_FOLDER}")
        write(text, out, force=force)
    except ConfigError as error:
        raise fail(escape(error.message)) from None
    _print(f"[green]written[/green] {escape(str(out))}")
    named = "" if out == DEFAULT_CONFIG else f" --config {out}"
    taken = any(e.address.endswith(f":{DEFAULT_PORTS['vLLM']}") for e in machine.engines)
    port = " --port 8001" if taken else ""
    _print(f"next: atlas doctor{escape(named)}{port}, then atlas serve{escape(named)}{port}")


def _show_machine(machine: Machine) -> None:
    for line in list(title_of(machine))[1:]:
        _print(escape(line))


def _show_proposal(proposal: Proposal) -> None:
    table = Table("model", "where", "tools", "USD per 1M tokens", title="proposed pool")
    for model in proposal.models:
        price = model.settings["price"]
        table.add_row(
            model.model_id,
            model.settings.get("base_url", model.settings.get("model_source")),
            ", ".join(model.settings["tools"]),
            f"{price['usd_per_1m_prompt_tokens']:g} / {price['usd_per_1m_completion_tokens']:g}",
        )
    console.print(table)
    for note in proposal.notes:
        _print(f"[yellow]note:[/yellow] {escape(note)}")


def _print(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)
