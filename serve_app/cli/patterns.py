"""`atlas patterns …`: check a pattern's file, and change patterns while they serve."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.tree import Tree

from serve_app.cli.console import (
    DEFAULT_URL,
    AdminClient,
    KeyOption,
    NanoConfigOption,
    UrlOption,
    console,
    fail,
    load,
)
from serve_app.config import AtlasConfig
from serve_app.config.patterns.bound import QUESTION_BYTES, Bound, Bounds, bound_of
from serve_app.config.patterns.check import check_pattern, children, tail_asks
from serve_app.config.patterns.files import read_pattern
from serve_app.config.patterns.language import AskNode, BranchNode, NodeBase, PatternConfig
from serve_app.errors import ConfigError

app = typer.Typer(help="Check patterns, and change them while they serve.", no_args_is_help=True)

FileArgument = Annotated[Path, typer.Argument(help="YAML file of one pattern.")]


@app.command()
def check(
    file: FileArgument,
    config: NanoConfigOption = Path("configs/nano.yaml"),
    question_bytes: Annotated[
        int, typer.Option(min=1, help="Length of the conversation that the worst case is for.")
    ] = QUESTION_BYTES,
) -> None:
    """Check a pattern against a deployment; show its nodes and its worst case."""
    deployment = load(config)
    pattern = _read(file)
    others = tuple(of for of in deployment.patterns if of.name != pattern.name)
    deployment = deployment.model_copy(update={"patterns": (*others, pattern)})
    try:
        check_pattern(pattern, {of.name: of for of in others}, deployment)
    except ConfigError as error:
        raise fail(error.message) from None
    console.print(_tree(pattern, deployment, question_bytes), highlight=False)
    bound = bound_of(pattern, deployment, question_bytes)
    most_s = deployment.gateway.limits.default_deadline_s
    table = Table(title=f"worst case, for a conversation of {question_bytes} bytes")
    for name in ("model calls", "tool calls", "tokens", "USD", "seconds"):
        table.add_column(name, justify="right")
    table.add_row(
        f"{bound.model_calls:.0f}",
        f"{bound.tool_calls:.0f}",
        f"{bound.tokens:,.0f}",
        f"{bound.usd:.6g}",
        f"{bound.seconds:g}" if math.isfinite(bound.seconds) else f"{most_s:g} (the deadline)",
    )
    console.print(table)


@app.command("list")
def list_command(url: UrlOption = DEFAULT_URL, api_key: KeyOption = "none") -> None:
    """List the patterns, whether they answer now, and their worst cases."""
    table = Table("pattern", "state", "routed to", "calls", "USD at most", "reason")
    for row in AdminClient(url, api_key).call("GET", "/patterns")["data"]:
        colour = "green" if row["state"] == "ready" else "yellow"
        worst: dict[str, Any] = row.get("worst_case", {})
        calls = worst.get("model_calls", 0) + worst.get("tool_calls", 0)
        table.add_row(
            f"pattern:{row['name']}",
            f"[{colour}]{row['state']}[/{colour}]",
            "yes" if row["routable"] else "no",
            str(calls) if worst else "",
            f"{worst['usd']:.6f}" if worst else "",
            row["reason"] or "",
        )
    console.print(table)


@app.command()
def add(file: FileArgument, url: UrlOption = DEFAULT_URL, api_key: KeyOption = "none") -> None:
    """Add a pattern, or give one other nodes."""
    pattern = _read(file)
    taken = AdminClient(url, api_key).call("POST", "/patterns", pattern.as_written())
    console.print(f"pattern:{taken['name']} {taken['change']}", highlight=False)


@app.command()
def remove(name: str, url: UrlOption = DEFAULT_URL, api_key: KeyOption = "none") -> None:
    """Take a pattern out; patterns that ask it do not answer any more."""
    AdminClient(url, api_key).call("DELETE", f"/patterns/{name}")
    console.print(f"pattern:{name} removed", highlight=False)


def _read(file: Path) -> PatternConfig:
    try:
        return read_pattern(file)
    except ConfigError as error:
        raise fail(error.message) from None


def _tree(pattern: PatternConfig, config: AtlasConfig, question_bytes: int) -> Tree:
    """The nodes of a pattern, each with its worst case."""
    bounds = Bounds(config, question_bytes)
    streaming = {id(ask) for ask in tail_asks(pattern)}

    def grow(tree: Tree, nodes: Any, seen: dict[str, NodeBase]) -> None:
        seen = dict(seen)
        for node in nodes:
            bound = bounds.of_node(node, seen)
            branch = tree.add(f"{_words(node)}  [dim]{_figures(bound)}[/dim]")
            if id(node) in streaming:
                branch.add("[green]streams[/green]")
            if isinstance(node, BranchNode):
                for case in node.cases:
                    when = ", ".join(f"{name} {_says(of)}" for name, of in case.when.items())
                    grow(branch.add(f"when {when}"), case.do, seen)
                if node.otherwise:
                    grow(branch.add("else"), node.otherwise, seen)
            else:
                grow(branch, children(node), seen)
            if node.id is not None:
                seen[node.id] = node

    tree = Tree(f"pattern:{pattern.name}")
    grow(tree, pattern.do, {})
    return tree


def _says(condition: Any) -> str:
    return " ".join(f"{name} {value}" for name, value in condition.model_dump().items() if value)


def _words(node: NodeBase) -> str:
    name = f"{node.kind} {node.id}" if node.id is not None else node.kind
    return f"{name} ({node.pair})" if isinstance(node, AskNode) else name


def _figures(bound: Bound) -> str:
    parts = []
    if bound.model_calls:
        parts.append(f"{bound.model_calls:.0f} model calls")
    if bound.tool_calls:
        parts.append(f"{bound.tool_calls:.0f} tool calls")
    if bound.usd:
        parts.append(f"${bound.usd:.6f}")
    return ", ".join(parts)
