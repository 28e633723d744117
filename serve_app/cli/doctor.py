"""`atlas doctor`: what would keep a deployment from running here, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from serve_app.cli.console import ConfigOption, console
from serve_app.config import load_config
from serve_app.errors import ConfigError
from serve_app.machine.checks import Check, Level, check_machine, failure, ok
from serve_app.machine.hardware import look_at_hardware
from serve_app.machine.setting_checks import check_settings

_MARKS = {Level.OK: "[green]ok[/green]", Level.WARNING: "[yellow]warning[/yellow]"}
_FAILED = "[red]FAILS[/red]"


def doctor(
    config: ConfigOption,
    host: Annotated[str, typer.Option(help="Address it is to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port it is to listen on.")] = 8000,
) -> None:
    """Say what would fail when this configuration is served here; exit code 1 if anything would."""
    counts = dict.fromkeys(Level, 0)
    for check in _checks(config, host, port):
        counts[check.level] += 1
        mark = _MARKS.get(check.level, _FAILED)
        console.print(
            f"{mark}  {escape(check.subject)}: {escape(check.found)}",
            highlight=False,
            soft_wrap=True,
        )
        if check.mend:
            console.print(f"    {escape(check.mend)}", highlight=False, soft_wrap=True)
    failures, warnings = counts[Level.FAILURE], counts[Level.WARNING]
    console.print(f"{failures} would fail, {warnings} could be better", highlight=False)
    if failures:
        raise typer.Exit(1)


def _checks(path: Path, host: str, port: int) -> Iterator[Check]:
    hardware = look_at_hardware()
    yield from check_machine(hardware, host, port)
    if not path.exists():
        yield failure("configuration", f"there is no {path}", "`atlas init` writes one")
        return
    try:
        config = load_config(path)
    except ConfigError as error:
        yield failure("configuration", error.message, "correct the settings that are named")
        return
    yield ok("configuration", f"{path} loads; pairs: {len(config.all_pairs())}")
    yield from check_settings(config, hardware, host)
