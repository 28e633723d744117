"""A proposed pool as a configuration file with comments."""

from __future__ import annotations

import os
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from serve_app.config import load_config
from serve_app.errors import ConfigError
from serve_app.machine.propose import Machine, Proposal

_WIDTH = 118
_PAIRS = (
    "Each pair of a model and one of its tools is something that the router can choose. Cards say "
    "what a model is good at until outcomes do. Prices of models that run here are assumed, by "
    "their size: set what your machine costs you."
)
_MORE_TOOLS = (
    "More tools are one entry each (docs/tools.md), named in the `tools` of the models that use "
    "them; for texts of yours that models look things up in:"
)
_TEXTS = {"type": "retrieval", "tool_id": "retrieval", "corpus": "./texts"}
_OPEN = (
    "No key is asked for, so only this machine is served. For others: `required`, and "
    "`atlas keys create`."
)


def render(proposal: Proposal, title: Sequence[str], *, data_dir: str | None = None) -> str:
    """The text of the file.

    Args:
        proposal: The pool.
        title: What the first lines say, each a paragraph.
        data_dir: Folder of the store; `None` keeps the default, in the user's home.
    """
    lines = [line for paragraph in title for line in _comment(paragraph)]
    lines += [line for note in proposal.notes for line in _comment(f"Note: {note}.")]
    lines += ["", *_comment(_PAIRS), "models:"]
    for model in proposal.models:
        lines += _comment(model.about, indent="  ")
        for number, (name, value) in enumerate(model.settings.items()):
            lines += _entry(name, value, indent="  - " if number == 0 else "    ")
    lines += ["", *_comment(_MORE_TOOLS), f"#   - {_flow(_TEXTS)}"]
    if proposal.tools:
        lines += ["tools:", *(f"  - {_flow(tool)}" for tool in proposal.tools)]
    lines += [
        "",
        *_comment(_OPEN),
        "gateway:",
        "  auth: {mode: open}",
        "  # Long enough for an engine that loads a model when it is asked first.",
        "  limits: {default_deadline_s: 180}",
    ]
    if data_dir is not None:
        lines += ["", "# Requests, outcomes and snapshots.", f"data_dir: {data_dir}"]
    return "\n".join(lines) + "\n"


def title_of(machine: Machine) -> Iterator[str]:
    """What a file says of the machine that it was written for."""
    yield (
        "Written by `atlas init`; `atlas serve` runs it, `atlas doctor` says what would keep it "
        "from running. docs/configuration.md has every setting."
    )
    hardware = machine.hardware
    parts = [f"{hardware.cpus} CPUs, {hardware.memory_gib:.0f} GiB of memory"]
    parts += [f"{gpu.name} with {gpu.memory_gib:.0f} GiB" for gpu in hardware.gpus]
    parts += [f"{engine.kind} at {engine.address}" for engine in machine.engines]
    parts += [f"a key in {provider.key_variable}" for provider in machine.providers]
    if not machine.engines and not machine.providers:
        parts.append("no server of models on loopback, and no API key in the environment")
    yield "Found: " + "; ".join(parts) + "."


def write(text: str, path: Path, *, force: bool) -> None:
    """Write a configuration, once it is known to load.

    Args:
        text: The file.
        path: Where it goes.
        force: Whether a file that is there is replaced.

    Raises:
        ConfigError: If a file is there already, the folder cannot be written to, or the
            configuration does not load.
    """
    try:
        descriptor, draft = tempfile.mkstemp(dir=path.absolute().parent, suffix=".yaml")
        try:
            with os.fdopen(descriptor, "w") as out:
                out.write(text)
            load_config(draft)
            with path.open("w" if force else "x") as out:
                out.write(text)
        finally:
            os.unlink(draft)
    except FileExistsError:
        raise ConfigError(f"{str(path)!r} is there already; --force replaces it") from None
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be written: {error.strerror}") from error


def _comment(text: str, indent: str = "") -> list[str]:
    wrapped = textwrap.wrap(text, _WIDTH - len(indent) - 2, break_on_hyphens=False)
    return [f"{indent}# {line}" for line in wrapped]


def _entry(name: str, value: Any, indent: str) -> list[str]:
    """A setting on one line, or on one for each of its own where that would be too long."""
    line = f"{indent}{name}: {_flow(value)}"
    if len(line) <= _WIDTH or not isinstance(value, dict):
        return [line]
    deeper = " " * (len(indent) + 2)
    return [f"{indent}{name}:", *(f"{deeper}{key}: {_flow(of)}" for key, of in value.items())]


def _flow(value: Any) -> str:
    """A value on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("...\n").strip()
