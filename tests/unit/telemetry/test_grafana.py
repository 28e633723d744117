"""The shipped dashboard and alert rules show metrics that a gateway really exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from serve_app.errors import EngineUnavailable
from serve_app.schemas import DecidedBy, Drift, Pair
from serve_app.store import publish
from serve_app.telemetry import ALL_METRICS, STORE_DROPPED, STORE_RECOVERED, STORE_SPILLED
from serve_app.telemetry import TOOLS_MCP_CHANGED as MCP_CHANGED
from serve_app.telemetry.grafana import files
from tests.executor_fakes import reply
from tests.telemetry_fakes import observed, observed_config

FOLDER = Path("configs/grafana")
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
OF_TROUBLE = {of.exported for of in (STORE_DROPPED, STORE_RECOVERED, STORE_SPILLED, MCP_CHANGED)}
"""Told where a store is away, a process was killed, or an MCP server changed."""


def expressions() -> Iterator[str]:
    dashboard = json.loads((FOLDER / "atlas.json").read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for group in yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


def series() -> set[str]:
    return {name for text in expressions() for name in re.findall(r"\batlas_\w+", text)}


def test_the_files_are_what_the_table_says() -> None:
    for name, text in files().items():
        assert (FOLDER / name).read_text() == text, "run python -m serve_app.telemetry.grafana"


def test_every_series_is_one_of_a_declared_metric_and_every_metric_is_shown() -> None:
    known = {of.exported + end: of for of in ALL_METRICS for end in SUFFIXES[of.kind]}
    assert series() <= known.keys()
    assert {known[name] for name in series()} == set(ALL_METRICS)


def test_labels_are_those_of_the_metrics() -> None:
    known = {of.exported + end: {*of.tags, "le"} for of in ALL_METRICS for end in SUFFIXES[of.kind]}
    for text in expressions():
        tags = set.union(*(known[name] for name in re.findall(r"\batlas_\w+", text)))
        grouped = {word for by in re.findall(r"by \((.*?)\)", text) for word in by.split(", ")}
        chosen = set(re.findall(r'(\w+)(?:=|!=|=~)"', text))
        assert grouped | chosen <= tags, text


def test_brackets_are_closed() -> None:
    for text in expressions():
        for opened, closed in ("()", "[]", "{}"):
            assert text.count(opened) == text.count(closed), text


async def test_what_is_shown_is_exported_by_a_running_gateway(tmp_path: Path) -> None:
    config = observed_config(tmp_path)
    models = tuple(model.model_copy(update={"max_retries": 1}) for model in config.models)
    async with observed(config.model_copy(update={"models": models})) as gateway:
        gateway.engines.says["small"] = lambda body: (
            reply(calls=('{"expression": "1 + 1"}',))
            if body.get("tools") and body["messages"][-1]["role"] == "user"
            else "two"
        )
        asked = await gateway.ask(model="pattern:composed", stream=True)
        assert asked.status_code == 200
        gateway.chooser.path = DecidedBy.OUT_OF_DISTRIBUTION
        gateway.engines.says["small"] = EngineUnavailable("away")
        asked = await gateway.ask()
        await gateway.outcomes.flush(60)
        body = {"request_id": asked.json()["id"].removeprefix("chatcmpl-"), "score": 1.0}
        await gateway.client.post(f"{gateway.url}/v1/feedback", json=body)
        await gateway.ask(model="small", atlas={"max_cost_usd": 1e-12})
        await publish(gateway.store, None, "a test")
        gateway.chooser.drifted = (Drift(Pair("small", "none"), 31.0, 0.8, 0.4, -3.5),)
        await gateway.gauges.tell()
        await gateway.outcomes.flush(60)
        exported = set(await gateway.samples())
    missing = {name for name in series() - exported if not name.startswith(tuple(OF_TROUBLE))}
    assert missing == set()
