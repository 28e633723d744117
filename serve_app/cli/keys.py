"""`atlas keys …`: make keys, list, limit and revoke them, and see what they have used."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.table import Column, Table

from serve_app.cli.console import ConfigOption, console, fail, load
from serve_app.errors import AtlasError, NotFound
from serve_app.schemas import AccessLists

if TYPE_CHECKING:
    from serve_app.store import PeriodUsage, Store

T = TypeVar("T")

_Names = Annotated[
    list[str] | None, typer.Option(help="A name; may be repeated. A pattern is a model.")
]

app = typer.Typer(help="API keys of the gateway.", no_args_is_help=True)


def with_store(config: Path, work: Callable[[Store], Awaitable[T]]) -> T:
    """Do something with the store of a deployment; ends the command with its error."""
    from serve_app.store import Store

    settings = load(config)

    async def run() -> T:
        store = await Store.open(settings.store_url())
        try:
            return await work(store)
        finally:
            await store.close()

    try:
        return asyncio.run(run())
    except (AtlasError, ValueError) as error:
        raise fail(str(error)) from None


@app.command("create")
def keys_create(
    name: str,
    config: ConfigOption,
    scope: Annotated[
        list[str] | None, typer.Option(help="chat, feedback or admin; may be repeated.")
    ] = None,
    model: _Names = None,
    tool: _Names = None,
    not_model: _Names = None,
    not_tool: _Names = None,
) -> None:
    """Make a key and show it, this once. By default it may use every model and tool."""
    from serve_app.store import create_key

    scopes = scope or ["chat", "feedback"]
    lists = AccessLists(
        models=None if model is None else frozenset(model),
        tools=None if tool is None else frozenset(tool),
        not_models=frozenset(not_model or ()),
        not_tools=frozenset(not_tool or ()),
    )
    key_id, key = with_store(config, lambda store: create_key(store, name, scopes, lists))
    console.print(f"{key_id}  {name}  {', '.join(scopes)}", highlight=False)
    console.print(key, highlight=False, soft_wrap=True)
    console.print("[dim]Only its hash is kept: note it now.[/dim]")


@app.command("list")
def keys_list(config: ConfigOption) -> None:
    """List the keys, never their secrets."""
    from serve_app.store import list_keys

    keys = with_store(config, list_keys)
    # Never cut: it is what `atlas keys revoke` takes.
    table = Table(Column("id", no_wrap=True), "name", "scopes", "created", "revoked")
    for key in keys:
        table.add_row(
            key.key_id,
            key.name,
            ", ".join(sorted(key.scopes)),
            _minute(key.created_unix_s),
            _minute(key.revoked_unix_s),
        )
    console.print(table)


def _minute(unix_s: float | None) -> str:
    return "" if unix_s is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s))


@app.command("revoke")
def keys_revoke(key_id: str, config: ConfigOption) -> None:
    """Revoke a key; gateways notice within seconds."""
    from serve_app.store import revoke_key

    with_store(config, lambda store: revoke_key(store, key_id))
    console.print(f"{key_id} revoked", highlight=False)


@app.command("limit")
def keys_limit(
    key_id: str,
    config: ConfigOption,
    per: Annotated[
        str | None,
        typer.Option(help="hour, day, week (from Monday) or month, in UTC."),
    ] = None,
    usd: Annotated[float | None, typer.Option(help="Dollars in each period.")] = None,
    tokens: Annotated[
        float | None, typer.Option(help="Tokens of prompts and completions in each period.")
    ] = None,
    requests: Annotated[float | None, typer.Option(help="Requests in each period.")] = None,
    remove: Annotated[
        bool, typer.Option(help="Take the limits away; with --per those of that period.")
    ] = False,
) -> None:
    """Limit what a key may use, or take limits away; gateways notice within seconds."""
    from serve_app.store import remove_limits, set_limit, usage_of

    amounts = {"usd": usd, "tokens": tokens, "requests": requests}
    if remove:
        if any(amount is not None for amount in amounts.values()):
            raise fail("--remove takes limits away; leave --usd, --tokens and --requests out")
        with_store(config, lambda store: remove_limits(store, key_id, per))
    elif per is None:
        raise fail("--per says for how long a limit holds: hour, day, week or month")
    else:
        with_store(config, lambda store: set_limit(store, key_id, per, amounts))
    _show_usage({key_id: with_store(config, lambda store: usage_of(store, key_id))})


@app.command("usage")
def keys_usage(
    config: ConfigOption,
    key_id: Annotated[str | None, typer.Argument(help="All keys if not given.")] = None,
) -> None:
    """Show what keys have used this hour, day, week and month, and what they may use."""
    from serve_app.store import list_keys, usage_of

    async def read(store: Store) -> dict[str, list[PeriodUsage]]:
        known = [key.key_id for key in await list_keys(store)]
        if key_id is not None and key_id not in known:
            raise NotFound(f"no API key {key_id!r}; `atlas keys list` shows them")
        return {of: await usage_of(store, of) for of in known if key_id in (None, of)}

    _show_usage(with_store(config, read))


def _show_usage(usages: dict[str, list[PeriodUsage]]) -> None:
    """A line per key and period: what is spent of what is allowed, and when that begins anew."""
    table = Table(Column("id", no_wrap=True), "per", "USD", "tokens", "requests", "begins anew")
    for key_id, periods in usages.items():
        for period in periods:
            table.add_row(
                key_id,
                period.per.value,
                *(_amount(period, unit) for unit in ("usd", "tokens", "requests")),
                time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(period.resets_unix_s)),
            )
    console.print(table)


def _amount(period: PeriodUsage, unit: str) -> str:
    spent, limit = getattr(period.spent, unit), period.limit.get(unit)
    words = "{:.6g}" if unit == "usd" else "{:,.0f}"
    return words.format(spent) + ("" if limit is None else f" of {words.format(limit)}")
