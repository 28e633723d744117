"""Traces on the terminal: what happened in a request as a tree, whole or while it grows."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text
from rich.tree import Tree

from serve_app.cli.console import (
    DEFAULT_URL,
    KeyOption,
    UrlOption,
    api_errors,
    console,
)

Json = dict[str, Any]


def trace(
    request_id: Annotated[
        str, typer.Argument(help="A response's x-request-id, or its id (chatcmpl-…).")
    ],
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "none",
) -> None:
    """Show what happened in one of your requests: decisions, calls and checks as a tree."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key=api_key)
    with api_errors(url):
        found = client.get(f"/trajectories/{request_id}", cast_to=object)
    assert isinstance(found, dict)
    tree = SpanTree()
    tree.show_all(found["trace"], None)
    console.print(tree)
    console.print(_summary(found), highlight=False, markup=False, soft_wrap=True)


def _summary(found: Json) -> str:
    """How the request was decided, and how it ended."""
    decision = found["decision"]
    parts = [
        f"stop: {found['stop']}",
        f"{decision['pair']} by {decision['path']} (confidence {decision['confidence']:.2f})",
        f"policy {decision['policy_version']}, pool {decision['pool_version']}",
    ]
    if found["error"]:
        parts.append(f"error: {found['error']}")
    if found["num_dropped"]:
        parts.append(f"{found['num_dropped']} spans more are not kept")
    return " · ".join(parts)


class SpanTree:
    """The spans told so far; rich prints it."""

    def __init__(self) -> None:
        """Begin with none."""
        self._nodes: dict[int, Tree] = {}
        self._top = Tree("", hide_root=True)

    def show(self, span: Json, above: int | None) -> None:
        """Add a span below another one, or say what has become of it."""
        label, span_id = _label(span), span["span_id"]
        if span_id in self._nodes:
            self._nodes[span_id].label = label
        else:
            parent = self._top if above is None else self._nodes.get(above, self._top)
            self._nodes[span_id] = parent.add(label)

    def show_all(self, span: Json, above: int | None) -> None:
        """Add a span and all below it."""
        self.show(span, above)
        for child in span["children"]:
            self.show_all(child, span["span_id"])

    def __rich__(self) -> Tree:
        """What is printed."""
        return self._top


def _label(span: Json) -> Text:
    """A span in a line."""
    label = Text.assemble((span["kind"], "bold"), " ", span["name"], no_wrap=False)
    usage = span.get("usage", span)
    tokens = usage["prompt_tokens"] + usage["completion_tokens"]
    facts = ["…" if span["seconds"] is None else f"{span['seconds']:.3f} s"]
    facts += [f"{tokens} tokens"] if tokens else []
    facts += [f"${span['cost_usd']:.6f}"] if span["cost_usd"] else []
    facts += [f"{name}={_short(value)}" for name, value in span["attributes"].items()]
    label.append("  " + " · ".join(facts), "dim")
    if span["error"]:
        label.append(f"  {span['error']}", "red")
    for name in ("arguments", "text"):
        if span[name] is not None:
            label.append(f"\n{span[name]}", "dim italic")
    return label


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def ask_with_events(client: Any, request: Json) -> Json:
    """Ask, and show what happens and the answer as they come.

    Args:
        client: An `openai.OpenAI`.
        request: Arguments of a chat completion, `atlas.events` included.

    Returns:
        The answer's `atlas` object; empty where none came.
    """
    tree, answer = SpanTree(), Text()
    request_span: Json = {}
    extension: Json = {}
    with Live(Group(tree, answer), console=console):
        for chunk in client.chat.completions.create(stream=True, **request):
            told = (chunk.model_extra or {}).get("atlas", {})
            if "event" in told:
                span = told["event"]["span"]
                tree.show(span, span["parent_id"])
                request_span = request_span or span
            else:
                extension = told or extension
            for choice in chunk.choices:
                answer.append(choice.delta.content or "")
        if extension and request_span:  # no event tells of the request's own end
            totals = {name: extension[name] for name in ("seconds", "usage", "cost_usd")}
            tree.show(request_span | totals, None)
    if not console.is_terminal:
        console.line()  # on a terminal the display ends its last line
    return extension
