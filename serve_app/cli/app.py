"""`atlas …`: serve the graph, ask it, look at it, and manage its keys."""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from serve_app import environment
from serve_app.cli.console import (
    DEFAULT_URL,
    ConfigOption,
    KeyOption,
    UrlOption,
    api_errors,
    console,
    fail,
    load,
    next_try,
)
from serve_app.cli.doctor import doctor as doctor_command
from serve_app.cli.init import init as init_command
from serve_app.cli.keys import app as keys_app
from serve_app.cli.patterns import app as patterns_app
from serve_app.cli.pool import app as pool_app
from serve_app.cli.traces import ask_with_events
from serve_app.cli.traces import trace as trace_command
from serve_app.errors import AtlasError, ClusterDied
from serve_app.gateway.edge.hosts import is_loopback
from serve_app.schemas import MemberState, ModelMember, PoolState

app = typer.Typer(
    help="Route every request to the right model and tool.",
    no_args_is_help=True,
    add_completion=False,
)
app.add_typer(keys_app, name="keys")
app.add_typer(pool_app, name="pool")
app.add_typer(patterns_app, name="patterns")
app.command("init")(init_command)
app.command("doctor")(doctor_command)
app.command("trace")(trace_command)


@app.command()
def serve(
    config: ConfigOption,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    address: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_ADDRESS", help="Ray cluster to join; starts one here if not given."
        ),
    ] = None,
) -> None:
    """Bring the whole graph up and keep it up until Ctrl-C or SIGTERM."""
    settings = load(config)
    auth_mode = settings.gateway.auth.mode
    if auth_mode == "open" and not is_loopback(host):
        raise fail(
            f"auth.mode is 'open', which is served on loopback only, and --host is {host!r}; set "
            "gateway.auth.mode to 'required' and make a key with `atlas keys create`"
        )
    from serve_app.gateway.deployment import http_address
    from serve_app.running import end_process, running_graph

    what = f"Ray, the graph and {len(settings.models)} models"
    console.print(f"[bold]atlas-serve[/bold] {config}: starting {what} …")
    began_s = time.monotonic()

    def tell(what: str) -> None:
        _print(f"  {time.monotonic() - began_s:5.0f} s  {what}")

    try:
        with running_graph(config, host=host, port=port, address=address, tell=tell) as graph:
            # Where Serve runs already it keeps its address, whatever was asked for here.
            bound_host, bound_port = http_address()
            if auth_mode == "open":
                # The gateway would not have started otherwise.
                console.print(
                    "no API key is asked for (gateway.auth.mode: open); listening on loopback only"
                )
            _follow_pool(graph.states(), f"http://{bound_host}:{bound_port}/v1", began_s)
    except KeyboardInterrupt:
        console.print("stopped")
        end_process(0)
    except ClusterDied as error:
        fail(error.message)
        end_process(1)
    except AtlasError as error:
        raise fail(error.message) from None


def _follow_pool(states: Iterator[PoolState], url: str, began_s: float) -> None:
    """Print each change of the pool while it starts, what is missing then, and what changes later.

    Returns only by an exception, as on Ctrl-C.

    Args:
        states: Of the pool, each as it comes.
        url: Where the API answers.
        began_s: When the start began, by the monotonic clock.
    """
    known: dict[str, ModelMember] = {}

    def show(state: PoolState) -> None:
        for member in state.models:
            if _said(known.get(member.model_id)) != _said(member):
                known[member.model_id] = member
                seconds = time.monotonic() - began_s
                _print(f"  {seconds:5.0f} s  {member.model_id} {_state_text(member)}")

    with console.status("models starting (usually 1 to 3 minutes) …"):
        for state in states:
            show(state)
            if all(member.state is not MemberState.STARTING for member in state.models):
                break
    missing = state.missing()
    if missing:
        _print(f"[yellow]ready[/yellow] at {url}, but without {', '.join(missing)}:")
        for member in state.models:
            if member.reason:
                _print(f"  {member.model_id} {_state_text(member)}")
    else:
        _print(f"[green]ready[/green] at {url}   (Ctrl-C stops it)")
    _print('try: atlas ask "What is 15% of 240?"')
    for state in states:
        show(state)
        if missing and not state.missing():
            _print("[green]everything is ready[/green]")
        missing = state.missing()


def _print(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _said(member: ModelMember | None) -> tuple[object, ...]:
    """What is printed of a model."""
    if member is None:
        return ()
    return (member.state, member.reason, member.retry_unix_s, member.waits_for)


def _state_text(member: ModelMember) -> str:
    """A model's state, what failed of it, and when that is tried again."""
    colour = {"ready": "green", "failed": "red"}.get(member.state.value, "yellow")
    why = ""
    if member.reason:
        why = f": {escape(member.reason)}; {next_try(member.retry_unix_s)}"
    elif member.waits_for is not None:
        why = f": waits for {member.waits_for}"
    return f"[{colour}]{member.state.value}[/{colour}]{why}"


@app.command()
def ask(
    question: str,
    alpha: Annotated[
        float | None, typer.Option(help="Cost-quality dial in [0, 1]; 0 = quality only.")
    ] = None,
    pair: Annotated[
        str, typer.Option(help="Model, model@tool or pattern:NAME to use instead of routing.")
    ] = "atlas",
    explain: Annotated[bool, typer.Option(help="Show every candidate's scores.")] = False,
    stream: Annotated[bool, typer.Option(help="Print the answer as it comes.")] = False,
    trace: Annotated[
        bool, typer.Option(help="Show each decision and call as it begins and ends.")
    ] = False,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "none",
) -> None:
    """Ask one question and show the answer, the pair that gave it, its cost and its time."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key=api_key)
    options: dict[str, Any] = {"explain": explain} | ({} if alpha is None else {"alpha": alpha})
    request: dict[str, Any] = {
        "model": pair,
        "messages": [{"role": "user", "content": question}],
        "extra_body": {"atlas": options},
    }
    with api_errors(url):
        if trace:
            options["events"] = True
            extension = ask_with_events(client, request)
        elif stream:
            extension = None
            for chunk in client.chat.completions.create(stream=True, **request):
                extension = (chunk.model_extra or {}).get("atlas", extension)
                for choice in chunk.choices:
                    console.print(
                        choice.delta.content or "",
                        end="",
                        markup=False,
                        highlight=False,
                        soft_wrap=True,
                    )
            console.print()
        else:
            completion = client.chat.completions.create(**request)
            extension = (completion.model_extra or {}).get("atlas")
            console.print(
                completion.choices[0].message.content or "", markup=False, highlight=False
            )
    _show_extension(extension or {})


def _show_extension(extension: dict[str, Any]) -> None:
    """One line on how the answer came about, and the tables behind it."""
    usage = extension.get("usage", {})
    tokens = usage.get("prompt_tokens", 0) + usage.get("completion_tokens", 0)
    parts = (
        f"{extension.get('pair')}",
        f"{extension.get('path')} (confidence {extension.get('confidence', 0):.2f})",
        f"{extension.get('seconds', 0):.2f} s",
        f"{tokens} tokens",
        f"${extension.get('cost_usd', 0):.6f}",
    )
    console.print(f"[dim]{' · '.join(parts)}[/dim]", highlight=False, soft_wrap=True)
    for step in extension.get("steps", ()):
        for call in step.get("tool_calls", ()):
            called = call.get("function") or call["tool_id"]
            console.print(
                f"[dim]  {called}({json.dumps(call['arguments'])})[/dim]", highlight=False
            )
    if "decision" in extension:
        _show_decision(extension["decision"])


def _show_decision(decision: dict[str, Any]) -> None:
    """Every candidate's scores, and what the profile holds like the query."""
    table = Table("pair", "utility", "quality", "95%", "cost", "USD", title="candidates")
    for candidate in decision["candidates"]:
        table.add_row(
            candidate["pair"],
            f"{candidate['utility']:.3f}",
            f"{candidate['quality']:.3f}",
            f"{candidate['quality_low']:.2f} to {candidate['quality_high']:.2f}",
            f"{candidate['cost']:.3f}",
            f"{candidate['cost_usd']:.7f}",
        )
    console.print(table)
    distance = decision.get("distance_quantile")
    versions = f"policy {decision['policy_version']}, pool {decision['pool_version']}"
    parts = [
        f"{decision['path']} (confidence {decision['confidence']:.2f})",
        f"propensity {decision['propensity']:.3f}",
        *([f"farther than {distance:.0%} of the profile"] if distance is not None else []),
        versions,
    ]
    console.print(f"[dim]{' · '.join(parts)}[/dim]", highlight=False, soft_wrap=True)
    cluster = decision.get("cluster")
    if cluster is not None:
        console.print(f"[dim]cluster {cluster['index']}, such as:[/dim]", highlight=False)
        for example in cluster["examples"]:
            console.print(f"  {example}", style="dim", highlight=False, markup=False)


@app.command()
def explain(
    question: str,
    alpha: Annotated[
        float | None, typer.Option(help="Cost-quality dial in [0, 1]; 0 = quality only.")
    ] = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "none",
) -> None:
    """Show how a question would be routed, and why; nothing runs."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key=api_key)
    body = {
        "model": "atlas",
        "messages": [{"role": "user", "content": question}],
        "atlas": {} if alpha is None else {"alpha": alpha},
    }
    with api_errors(url):
        decision = client.post("/route", cast_to=object, body=body)
    assert isinstance(decision, dict)
    _show_decision(decision)


@app.command("environment")
def environment_command() -> None:
    """Print what to export before `ray start` on the nodes of a cluster."""
    for name, value in environment.node_settings().items():
        print(f"export {name}={shlex.quote(value)}")


@app.command()
def status(
    address: Annotated[str, typer.Option(envvar="RAY_ADDRESS", help="Ray cluster.")] = "auto",
) -> None:
    """Show the deployments, their replicas and queues, and the pool."""
    from serve_app.running import cluster_status

    try:
        deployments, pool = cluster_status(address)
    except ConnectionError as error:
        raise fail(str(error)) from None
    table = Table(
        "application", "deployment", "status", "replicas", "ongoing requests", title="deployments"
    )
    for row in deployments:
        table.add_row(
            row.application,
            row.deployment,
            row.status,
            str(row.replicas),
            str(row.ongoing_requests),
        )
    console.print(table)
    if pool is None:
        console.print("the pool controller does not answer")
        return
    table = Table("model", "state", "reason", "pairs", title=f"pool, version {pool.pool_version}")
    for member in pool.models:
        pairs = ", ".join(p.tool_id for p in pool.pairs if p.model_id == member.model_id)
        reason = f"{member.reason}; {next_try(member.retry_unix_s)}" if member.reason else ""
        table.add_row(member.model_id, member.state.value, reason, pairs)
    console.print(table)


def main() -> None:
    """Entry point of `python -m serve_app.cli.app`."""
    logging.basicConfig(level=os.environ.get("ATLAS_LOG_LEVEL", "WARNING"))
    app()


if __name__ == "__main__":
    main()
