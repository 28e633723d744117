"""`atlas pool …`: look at the pool and change it while it serves, over HTTP."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.live import Live
from rich.table import Table

from serve_app.cli.console import (
    DEFAULT_URL,
    AdminClient,
    KeyOption,
    UrlOption,
    console,
    fail,
    next_try,
)

app = typer.Typer(help="Change the pool while it serves.", no_args_is_help=True)
_POLL_S = 0.5
_COLOURS = {"ready": "green", "failed": "red"}

Settings = Annotated[
    str, typer.Argument(help="JSON, or a YAML or JSON file, of one model or tool as in `models:`.")
]
WaitOption = Annotated[bool, typer.Option("--wait", help="Return when it is done, or has failed.")]


@app.command("list")
def list_command(url: UrlOption = DEFAULT_URL, api_key: KeyOption = "none") -> None:
    """List the models and tools."""
    admin = AdminClient(url, api_key)
    console.print(_models_table(admin.call("GET", "/models")))
    table = Table("tool", "type", "USD per call", "models")
    for row in admin.call("GET", "/tools")["data"]:
        models = ", ".join(pair.partition("@")[0] for pair in row["pairs"])
        price = row.get("price_usd_per_call", 0.0)
        table.add_row(row["tool_id"], row.get("type", ""), f"{price:g}", models)
    console.print(table)


@app.command()
def status(
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "none",
    watch: Annotated[bool, typer.Option("--watch", help="Keep showing it, until Ctrl-C.")] = False,
) -> None:
    """Show where each model stands."""
    admin = AdminClient(url, api_key)
    table = _models_table(admin.call("GET", "/models"))
    if not watch:
        console.print(table)
        return
    try:
        with Live(table, console=console, auto_refresh=False) as live:
            while True:
                time.sleep(_POLL_S)
                live.update(_models_table(admin.call("GET", "/models")), refresh=True)
    except KeyboardInterrupt:
        return


@app.command("add-model")
def add_model(
    settings: Settings,
    wait: WaitOption = False,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "none",
) -> None:
    """Add a model; it is routed to when it is warm."""
    _change(AdminClient(url, api_key), "POST", "/models", "added", wait, _read(settings))


@app.command("update-model")
def update_model(
    settings: Settings,
    wait: WaitOption = False,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "none",
) -> None:
    """Give a model other settings; the new one takes over when it is warm."""
    model = _read(settings)
    path = f"/models/{model.get('model_id')}"
    _change(AdminClient(url, api_key), "PUT", path, "changed", wait, model)


@app.command("remove-model")
def remove_model(
    model_id: str,
    wait: WaitOption = False,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "none",
) -> None:
    """Take a model out; what is under way ends first."""
    _change(AdminClient(url, api_key), "DELETE", f"/models/{model_id}", "removed", wait)


@app.command("set-price")
def set_price(
    model_id: str,
    prompt: Annotated[float, typer.Option(help="US dollars per million prompt tokens.")],
    completion: Annotated[float, typer.Option(help="US dollars per million completion tokens.")],
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "none",
) -> None:
    """Change what a model's tokens cost."""
    price = {"usd_per_1m_prompt_tokens": prompt, "usd_per_1m_completion_tokens": completion}
    AdminClient(url, api_key).call("PATCH", f"/models/{model_id}", price)
    console.print(f"{model_id} changed", highlight=False)


@app.command("add-tool")
def add_tool(
    settings: Settings,
    model: Annotated[
        list[str] | None, typer.Option(help="Model that may use it; may be repeated. All if none.")
    ] = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "none",
) -> None:
    """Add a tool."""
    tool = _read(settings)
    AdminClient(url, api_key).call("POST", "/tools", {"tool": tool, "models": model})
    console.print(f"{tool['tool_id']} added", highlight=False)


@app.command("remove-tool")
def remove_tool(tool_id: str, url: UrlOption = DEFAULT_URL, api_key: KeyOption = "none") -> None:
    """Take a tool out, and its pairs with it."""
    AdminClient(url, api_key).call("DELETE", f"/tools/{tool_id}")
    console.print(f"{tool_id} removed", highlight=False)


@app.command("accept-tool")
def accept_tool(
    server: Annotated[str, typer.Argument(help="Tool id of an MCP server.")],
    function: Annotated[str, typer.Argument(help="Its function, by the server's own name.")],
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "none",
) -> None:
    """Offer a function of an MCP server whose definition is new or changed."""
    admin = AdminClient(url, api_key)
    rows = {row["tool_id"]: row for row in admin.call("GET", "/tools")["data"]}
    functions = {f["name"]: f for f in rows.get(server, {}).get("functions", [])}
    if function not in functions:
        raise fail(f"{server!r} has no function {function!r}; it has {sorted(functions)}")
    seen = functions[function]
    body = {"function": function, "sha256": seen["sha256"]}
    admin.call("POST", f"/tools/{server}/accept", body)
    console.print(
        f"{function} accepted: {seen['description']}", highlight=False, markup=False, soft_wrap=True
    )


def _read(settings: str) -> dict[str, Any]:
    """Settings from a file or from the argument itself.

    Raises:
        typer.Exit: If they are neither.
    """
    try:
        if settings.lstrip().startswith("{"):
            parsed = json.loads(settings)
        else:
            parsed = yaml.safe_load(Path(settings).read_text())
    except OSError as error:
        raise fail(f"cannot read {settings!r}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise fail(f"{settings!r} is neither JSON nor YAML: {error}") from None
    if not isinstance(parsed, dict):
        raise fail("one model or tool is a mapping of its settings")
    return parsed


def _change(
    admin: AdminClient,
    method: str,
    path: str,
    done: str,
    wait: bool,
    body: dict[str, Any] | None = None,
) -> None:
    """Change one model, say that it is taken, and see it through if asked to."""
    taken = admin.call(method, path, body)
    console.print(f"{taken['model_id']} {done}", highlight=False)
    if wait:
        _wait(admin, taken)


def _wait(admin: AdminClient, taken: dict[str, Any]) -> None:
    """Show each change of a model until it is where it should be, or has failed."""
    model_id, began_s, known = taken["model_id"], time.monotonic(), None
    with console.status(f"{model_id} …"):
        while True:
            answer = admin.call("GET", "/models")
            row = next((row for row in answer["data"] if row["model_id"] == model_id), None)
            is_seen = (answer["revision"] or 0) >= taken["revision"]
            said = ("gone", None) if row is None else (row["state"], row["reason"])
            if is_seen and said != known:
                known, (state, reason) = said, said
                why = f": {reason}" if reason else ""
                colour = _COLOURS.get(state, "yellow")
                seconds = time.monotonic() - began_s
                console.print(f"  {seconds:5.1f} s  {model_id} [{colour}]{state}[/{colour}]{why}")
            if is_seen and said[0] == "failed":
                raise typer.Exit(1)
            if is_seen and (row is None or (said[0] == "ready" and not row["updating"])):
                return
            time.sleep(_POLL_S)


def _models_table(answer: dict[str, Any]) -> Table:
    title = f"pool, version {answer['pool_version']}"
    table = Table("model", "state", "replicas", "USD per 1M tokens", "tools", "reason", title=title)
    for row in answer["data"]:
        colour = _COLOURS.get(row["state"], "yellow")
        price = row.get("price")
        table.add_row(
            row["model_id"],
            f"[{colour}]{row['state']}[/{colour}]",
            "" if row["replicas"] is None else str(row["replicas"]),
            "{usd_per_1m_prompt_tokens:g} / {usd_per_1m_completion_tokens:g}".format(**price)
            if price
            else "",
            ", ".join(pair.partition("@")[2] for pair in row["pairs"]),
            f"{row['reason']}; {next_try(row.get('retry_unix_s'))}" if row["reason"] else "",
        )
    return table
