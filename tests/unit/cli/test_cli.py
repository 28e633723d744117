"""Every `atlas` command is run: here with a real store and a real gateway, those that need a
cluster as far as they come without one, and whole in the tests named below."""

from __future__ import annotations

import ast
import asyncio
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

import click
import pytest
import typer
import yaml
from typer.testing import CliRunner

import rl.cli.app  # noqa: F401  # adds the commands of the learning loop
from serve_app import running
from serve_app.cli.app import app
from serve_app.cli.console import AdminClient, console
from serve_app.config import AtlasConfig, load_config
from serve_app.config.tools import McpConfig
from serve_app.running import DeploymentRow
from serve_app.schemas import MemberState, ModelMember, Pair, PoolState
from serve_app.store import (
    Store,
    find_key,
    hash_key,
    mcp_definitions,
    newest_pool,
    note_definitions,
)
from tests.gateway_fakes import Loopback, gateway_config, running_gateway
from tests.profile_data import fill, make_config

CLUSTER = {
    "serve": "tests/serve",
    "status": "tests/serve",
    "profile": "tests/serve/test_learning.py",
    "train": "tests/rl/test_train.py",
    "rules fit": "tests/unit/rl/test_fit_rules.py",
    "rules test": "tests/unit/rl/test_fit_rules.py",
}
"""Commands that only begin here, and what runs them, or what they call, whole."""
ELSEWHERE = {"init": "tests/unit/cli/test_init.py", "doctor": "tests/unit/cli/test_init.py"}
"""Commands that another module runs whole."""
WHOLE = (
    *ELSEWHERE, "ask", "explain", "trace", "environment", "keys create", "keys list", "keys revoke",
    "keys limit", "keys usage", "fit",
    "evaluate", "promote", "rollback", "snapshots", "pool list", "pool status",
    "pool add-model", "pool update-model", "pool remove-model", "pool set-price", "pool add-tool",
    "pool remove-tool", "pool accept-tool",
    "patterns check", "patterns list", "patterns add", "patterns remove",
    "rules list", "rules set",
)  # fmt: skip


def commands(group: Any = None, prefix: str = "") -> Iterator[str]:
    found: Any = typer.main.get_command(app) if group is None else group
    for name, command in found.commands.items():
        if isinstance(command, click.Group) or hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name


def atlas(command: str, *arguments: object, code: int = 0) -> str:
    """Run a command; what it printed."""
    result = CliRunner().invoke(app, [*command.split(), *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_width", 200)
    monkeypatch.delenv("ATLAS_DATA_DIR", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file, whose store holds a profile."""
    folder = tmp_path_factory.mktemp("deployment")
    config = make_config(folder)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))

    async def filled() -> None:
        store = await Store.open(config.store_url())
        await fill(config, store, 80)
        await store.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ATLAS_DATA_DIR", raising=False)
        asyncio.run(filled())
    return path


def in_store(path: Path, work: Callable[[Store], Any]) -> Any:
    async def opened() -> Any:
        config: AtlasConfig = load_config(path)
        store = await Store.open(config.store_url())
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(opened())


def test_every_command_is_listed_here() -> None:
    assert set(commands()) == {*WHOLE, *CLUSTER}
    assert all(Path(place).exists() for place in CLUSTER.values())


@pytest.mark.parametrize("command", sorted({*WHOLE, *CLUSTER}))
def test_every_command_has_help(command: str) -> None:
    assert "Usage:" in CliRunner().invoke(app, [*command.split(), "--help"]).output


def test_keys_are_limited_and_their_use_is_shown(deployment: Path) -> None:
    option = ("--config", deployment)
    key_id = atlas("keys create", "a team", *option).split()[0]
    assert " 0 of 5 " in atlas("keys limit", key_id, "--usd", 5, "--per", "day", *option)
    shown = atlas("keys limit", key_id, "--tokens", 1e6, "--per", "day", *option)
    assert " 0 of 5 " in shown
    assert " 0 of 1,000,000 " in shown
    assert " 0 of 30 " in atlas("keys limit", key_id, "--usd", 30, "--per", "month", *option)
    assert " 0 of 5 " in atlas("keys usage", key_id, *option)
    assert " 0 of 30 " in atlas("keys usage", *option)
    left = atlas("keys limit", key_id, "--remove", "--per", "day", *option)
    assert " 0 of 5 " not in left
    assert " 0 of 30 " in left
    assert " of " not in atlas("keys limit", key_id, "--remove", *option)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--usd", -1, "--per", "day"), "above 0"),
        (("--usd", 0, "--per", "day"), "above 0"),
        (("--usd", "nan", "--per", "day"), "above 0"),
        (("--usd", "inf", "--per", "day"), "above 0"),
        (("--requests", 0.5, "--per", "day"), "1 at least"),
        (("--usd", 1, "--per", "yesterday"), "got 'yesterday'"),
        (("--usd", 1), "--per"),
        (("--per", "day"), "none was given"),
        (("--usd", 1, "--remove"), "--remove"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(
    deployment: Path, arguments: tuple[object, ...], word: str
) -> None:
    option = ("--config", deployment)
    key_id = atlas("keys create", "a team", *option).split()[0]
    assert word in atlas("keys limit", key_id, *arguments, *option, code=1)
    assert "error:" in atlas("keys limit", "key_0", "--usd", 1, "--per", "day", *option, code=1)
    assert "error:" in atlas("keys usage", "key_0", *option, code=1)


def test_keys_are_made_listed_and_revoked(deployment: Path) -> None:
    option = ("--config", deployment)
    assert "revoked" in atlas("keys list", *option)  # the heading of an empty table
    made = atlas("keys create", "for the tests", *option, "--scope", "admin", "--scope", "chat")
    key_id, key = re.findall(r"key_\w+|atlas_\S+", made)
    listed = atlas("keys list", *option)
    assert key_id in listed
    assert "for the tests" in listed
    assert "admin, chat" in listed
    assert key not in listed
    assert in_store(deployment, lambda store: find_key(store, hash_key(key))) is not None
    assert f"{key_id} revoked" in atlas("keys revoke", key_id, *option)
    assert in_store(deployment, lambda store: find_key(store, hash_key(key))) is None
    (row,) = (line for line in atlas("keys list", *option).splitlines() if key_id in line)
    assert len(re.findall(r"\d{4}-\d\d-\d\d \d\d:\d\d", row)) == 2  # made, and revoked
    assert "error:" in atlas("keys revoke", "key_0", *option, code=1)
    assert "error:" in atlas("keys create", "x", *option, "--scope", "everything", code=1)


def test_the_id_of_a_key_is_whole_on_a_narrow_screen(
    deployment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = atlas("keys create", "a name that is rather long " * 5, "--config", deployment)
    monkeypatch.setattr(console, "_width", 60)
    (key_id,) = re.findall(r"key_\w+", made)
    assert key_id in atlas("keys list", "--config", deployment)


def test_a_store_that_is_away_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = make_config(tmp_path, store={"url": f"sqlite+aiosqlite:///{tmp_path}/file/atlas.db"})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    for command in ("keys list", "snapshots", "rollback"):
        assert "cannot open the store" in atlas(command, "--config", path, code=1)


def test_a_policy_is_fitted_evaluated_promoted_and_rolled_back(
    deployment: Path, tmp_path: Path
) -> None:
    option = ("--config", deployment)
    assert "nothing was ever promoted" in atlas("rollback", *option, code=1)
    fitted = atlas("fit", *option, "--out", tmp_path / "copy")
    (snapshot_id,) = re.findall(r"snapshot (\w+):", fitted)
    assert (tmp_path / "copy" / "snapshot.json").exists()
    assert snapshot_id in atlas("snapshots", *option)
    assert "utility" in atlas("evaluate", *option, "--against", "cold-start")
    refused = atlas("promote", *option, "--force", "--expect-version", 3, code=1)
    assert "policy 0 serves, and not 3" in refused
    assert "policy 1" in atlas("promote", *option, "--force", "--expect-version", 0)
    assert "serves already" in atlas("promote", *option, "--force", code=1)
    assert "cold-start rule serves again" in atlas("rollback", *option)
    assert "rolled back already" in atlas("rollback", *option, code=1)
    assert "policy 2 is" in atlas("rollback", *option, "--expect-version", 1, code=1)
    assert "rolled back from policy 1" in atlas("snapshots", *option)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with running_gateway(tmp_path_factory.mktemp("gateway")) as loopback:
        yield loopback


def test_a_question_is_asked_and_explained(gateway: Loopback) -> None:
    option = ("--url", gateway.url)
    assert "one two" in atlas("ask", "one two", *option, "--alpha", 0.5)
    assert "one two" in atlas("ask", "one two", *option, "--stream")
    request_id = gateway.orchestrator.calls[-1].request_id
    assert "pair small@calculator" in atlas("trace", request_id, *option)
    assert "small@calculator" in atlas("explain", "one two", *option)
    assert "nothing answers at" in atlas("ask", "x", "--url", "http://127.0.0.1:1", code=1)
    assert "nothing answers at" in atlas("explain", "x", "--url", "http://127.0.0.1:1", code=1)


def test_the_pool_is_shown_and_changed(gateway: Loopback, tmp_path: Path) -> None:
    option = ("--url", gateway.url)

    def wanted() -> dict[str, Any]:
        newest = gateway.run(lambda: newest_pool(gateway.store))
        assert newest is not None
        return {
            **{m["model_id"]: m for m in newest.models},
            **{t["tool_id"]: t for t in newest.tools},
        }

    assert "small" in atlas("pool list", *option)
    assert "broken" in atlas("pool status", *option)
    model = {"type": "local", "model_id": "fresh", "model_source": "org/model"}
    file = tmp_path / "model.yaml"
    file.write_text(yaml.safe_dump(model))
    atlas("pool add-model", file, *option)
    assert wanted()["fresh"]["max_ongoing_requests"] == 64
    atlas("pool update-model", json.dumps({**model, "max_ongoing_requests": 3}), *option)
    assert wanted()["fresh"]["max_ongoing_requests"] == 3
    atlas("pool set-price", "fresh", "--prompt", 1, "--completion", 2, *option)
    assert wanted()["fresh"]["price"]["usd_per_1m_completion_tokens"] == 2
    tool = json.dumps({"type": "best_of", "tool_id": "few"})
    atlas("pool add-tool", tool, "--model", "fresh", *option)
    assert "few" in wanted()["fresh"]["tools"]
    atlas("pool remove-tool", "few", *option)
    atlas("pool remove-model", "fresh", *option)
    assert not {"few", "fresh"} & set(wanted())
    evil = json.dumps({**model, "env": {"LD_PRELOAD": "x"}})
    assert "env: only the configuration file" in atlas("pool add-model", evil, *option, code=1)


def test_a_changed_function_of_a_server_is_shown_and_accepted(tmp_path: Path) -> None:
    clock = McpConfig(tool_id="clock", command="clock", env={"SECRET": "s3cret"})
    config = gateway_config()
    config = config.model_copy(update={"tools": (*config.tools, clock)})
    loopback = Loopback(config, f"sqlite+aiosqlite:///{tmp_path}/atlas.db")
    loopback.start()
    try:
        pool = loopback.orchestrator.pool()
        loopback.orchestrator._pool = replace(pool, tools=(*pool.tools, "clock"))
        option = ("--url", loopback.url)
        refused = atlas("pool accept-tool", "clock", "now", *option, code=1)
        assert "'clock' has no function 'now'" in refused

        def note(sha256: str, *, accept: bool) -> None:
            listed = {"now": (sha256, f"The time, says {sha256[0]}.")}
            loopback.run(lambda: note_definitions(loopback.store, "clock", listed, accept=accept))

        note("a" * 64, accept=True)
        note("b" * 64, accept=True)
        rows = AdminClient(loopback.url, "none").call("GET", "/tools")["data"]
        (row,) = (row for row in rows if row["tool_id"] == "clock")
        (function,) = row["functions"]
        assert function == {
            "name": "now",
            "state": "changed",
            "sha256": "b" * 64,
            "description": "The time, says b.",
        }
        assert "s3cret" not in json.dumps(rows)
        assert "now accepted: The time, says b." in atlas(
            "pool accept-tool", "clock", "now", *option
        )
        (seen,) = loopback.run(lambda: mcp_definitions(loopback.store))
        assert seen.state == "accepted"
    finally:
        loopback.stop()


CHAIN = """
name: chain
do:
  - ask: {id: draft, pair: small@none, prompt: "Draft: {{question}}"}
  - ask: {pair: large, prompt: "Mend: {{draft}}"}
"""


def test_patterns_are_listed_and_changed(gateway: Loopback, tmp_path: Path) -> None:
    option = ("--url", gateway.url)

    def wanted() -> dict[str, Any]:
        newest = gateway.run(lambda: newest_pool(gateway.store))
        return {} if newest is None else {of["name"]: of for of in newest.patterns}

    file = tmp_path / "chain.yaml"
    file.write_text(CHAIN)
    assert "pattern:chain added" in atlas("patterns add", file, *option)
    assert wanted()["chain"]["do"][1] == {"ask": {"pair": "large", "prompt": "Mend: {{draft}}"}}
    file.write_text(CHAIN + "routable: false\n")
    assert "pattern:chain changed" in atlas("patterns add", file, *option)
    assert "pattern:hello" in atlas("patterns list", *option)
    assert "pattern:chain removed" in atlas("patterns remove", "chain", *option)
    assert "chain" not in wanted()
    assert "there is no pattern" in atlas("patterns remove", "chain", *option, code=1)
    file.write_text(CHAIN.replace("large", "nobody"))
    assert "no pair 'nobody@none'" in atlas("patterns add", file, *option, code=1)


RULES = """
rules:
  - {type: keyword, name: bills, any: [invoice], use: [large]}
  - {type: default, use: [small]}
"""


def test_rules_are_listed_and_changed(gateway: Loopback, tmp_path: Path) -> None:
    option = ("--url", gateway.url)
    file = tmp_path / "rules.yaml"
    settings = gateway.config.model_dump(mode="json", exclude_unset=True)
    file.write_text(yaml.safe_dump(settings | yaml.safe_load(RULES)))
    assert "2 rules serve from revision" in atlas("rules set", file, *option)
    newest = gateway.run(lambda: newest_pool(gateway.store))
    assert newest is not None
    assert [rule["type"] for rule in newest.rules] == ["keyword", "default"]
    assert "rule" in atlas("rules list", *option)
    gone = yaml.safe_load(RULES.replace("[large]", "[gone]"))
    file.write_text(yaml.safe_dump(settings | gone))
    assert "error:" in atlas("rules set", file, *option, code=1)


SHIPPED = sorted(Path("configs/patterns").resolve().glob("*.yaml"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_worst_case_of_each_shipped_pattern_is_shown(file: Path) -> None:
    shown = atlas("patterns check", file)
    assert f"pattern:{file.stem}" in shown
    assert "worst case" in shown


def test_a_pattern_that_cannot_run_is_refused_with_its_node(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("name: bad\ndo: [{ask: {pair: nano-math, uses: [nothing]}}]\n")
    said = atlas("patterns check", file, code=1)
    assert "pattern 'bad', node do[0].ask: there is no 'nothing'" in said


def test_what_a_cluster_needs_is_printed() -> None:
    assert "export RAY_SERVE_" in atlas("environment")


def test_the_state_of_a_cluster_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray says is made up; the command's own part is real."""
    member = ModelMember("small", MemberState.FAILED, "no memory")
    pool = PoolState(7, (member,), (), (Pair("small", "none"),))
    rows = [DeploymentRow("atlas", "Gateway", "HEALTHY", 2, 3)]
    monkeypatch.setattr(running, "cluster_status", lambda _: (rows, pool))
    shown = atlas("status", "--address", "127.0.0.1:1")
    for said in ("Gateway", "HEALTHY", "version 7", "failed", "no memory"):
        assert said in shown
    monkeypatch.setattr(running, "cluster_status", lambda _: (rows, None))
    assert "the pool controller does not answer" in atlas("status", "--address", "127.0.0.1:1")

    def nobody(address: str) -> Any:
        raise ConnectionError("nothing serves on a Ray cluster here")

    monkeypatch.setattr(running, "cluster_status", nobody)
    assert "nothing serves" in atlas("status", "--address", "127.0.0.1:1", code=1)


def test_what_cannot_begin_says_why(deployment: Path, tmp_path: Path) -> None:
    option, missing = ("--config", deployment), tmp_path / "missing"
    refused = atlas("serve", *option, "--host", "0.0.0.0", code=1)
    assert "served on loopback only" in refused
    assert "error:" in atlas("profile", *option, "--questions", missing, code=1)
    assert "error:" in atlas("train", "--config", missing, code=1)
    assert "error:" in atlas("rules fit", missing, *option, code=1)
    assert "has no rules" in atlas("rules test", missing, *option, code=1)


def test_every_command_is_run_here() -> None:
    calls = [node for node in ast.walk(ast.parse(Path(__file__).read_text())) if is_call(node)]
    run = {call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)}
    assert run == {*WHOLE, *CLUSTER} - set(ELSEWHERE)
    assert all(Path(place).exists() for place in ELSEWHERE.values())


def is_call(node: ast.AST) -> TypeGuard[ast.Call]:
    """Whether a piece of this module runs a command."""
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "atlas"
    )
