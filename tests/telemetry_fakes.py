"""A whole gateway in this process whose telemetry can be looked at: real HTTP, edge, orchestrator,
store and metrics, in front of engines, tools and a router that do as they are told."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import prometheus_client
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from serve_app.config import AtlasConfig
from serve_app.gateway.app import build_api
from serve_app.gateway.gauges import Gauges
from serve_app.jobs import Jobs
from serve_app.models.clients import ModelClients
from serve_app.orchestrator.orchestrator import Orchestrator
from serve_app.schemas import Drift, Report
from serve_app.store import OutcomeLog, Store
from serve_app.telemetry import Metric, count_request
from serve_app.telemetry.sinks import SeriesBound
from serve_app.telemetry.tracing import tracing_of
from serve_app.tools.base import ToolResult
from tests.gateway_fakes import IdleLauncher
from tests.path2_fakes import Controller, Engines, Handle, WordEmbedder
from tests.pattern_fakes import Chooser, Tools, pattern_config

COMPOSED = """
name: composed
answers: "a question about the handbook that needs a number"
do:
  - retrieve: {id: found, corpus: handbook, top_k: 2}
  - parallel:
      id: sums
      do:
        - ask: {pair: small@calculator, prompt: "Sum: {{question}}"}
        - ask: {pair: large, prompt: "Think: {{question}}"}
  - ask: {id: answer, pair: route, prompt: "{{found}} {{sums}} {{question}}"}
answer: answer
"""


class ScriptedRouter(Chooser):
    """A router that orders pairs, and says how they drift, as it is told.

    Attributes:
        drifted: What verdicts say of its pairs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drifted: tuple[Drift, ...] = ()

    async def drifts(self) -> tuple[Drift, ...]:
        return self.drifted


class LocalMetrics:
    """Metrics of this process alone, by Prometheus' own client."""

    def __init__(self) -> None:
        self._registry = prometheus_client.CollectorRegistry()
        self._made: dict[str, Any] = {}
        self._series = SeriesBound()

    def record(self, metric: Metric, value: float = 1.0, /, **tags: str) -> None:
        assert set(tags) == set(metric.tags), metric.name
        if metric.name not in self._made:
            self._made[metric.name] = self._make(metric)
        made, bounded = self._made[metric.name], self._series.bounded(metric, tags)
        series = made.labels(*bounded) if bounded else made
        match metric.kind:
            case "counter":
                series.inc(value)
            case "gauge":
                series.set(value)
            case "histogram":
                series.observe(value)

    async def page(self) -> str:
        return prometheus_client.generate_latest(self._registry).decode()

    def _make(self, metric: Metric) -> Any:
        about = (metric.exported, metric.description, metric.tags)
        if metric.kind == "histogram":
            return prometheus_client.Histogram(
                *about, buckets=metric.boundaries, registry=self._registry
            )
        kinds = {"counter": prometheus_client.Counter, "gauge": prometheus_client.Gauge}
        return kinds[metric.kind](*about, registry=self._registry)


Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]


def samples_of(page: str) -> Samples:
    """What a page of metrics says: by name and labels, the values."""
    found: Samples = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


@dataclass
class Observed:
    """One gateway."""

    url: str
    client: httpx2.AsyncClient
    store: Store
    outcomes: OutcomeLog
    metrics: LocalMetrics
    gauges: Gauges
    engines: Any
    tools: Tools
    chooser: ScriptedRouter
    orchestrator: Orchestrator
    reports: list[Report]

    async def ask(
        self, question: str = "How many?", headers: dict[str, str] | None = None, **body: Any
    ) -> httpx2.Response:
        wanted = {"model": "atlas", "messages": [{"role": "user", "content": question}]}
        return await self.client.post(
            f"{self.url}/v1/chat/completions", json=wanted | body, headers=headers
        )

    async def samples(self) -> Samples:
        """What `/metrics` says."""
        response = await self.client.get(f"{self.url}/metrics")
        assert response.status_code == 200
        return samples_of(response.text)


def observed_config(folder: Path, *patterns: str, **extra: Any) -> AtlasConfig:
    return pattern_config(folder, *(patterns or (COMPOSED,)), **extra)


@asynccontextmanager
async def observed(
    config: AtlasConfig, clients: ModelClients | None = None
) -> AsyncIterator[Observed]:
    """A gateway of this configuration; `None` has engines that say hello."""
    store = await Store.open(f"sqlite+aiosqlite:///{config.data_path() / 'atlas.db'}")
    metrics = LocalMetrics()
    outcomes = OutcomeLog(store, flush_interval_s=0.02, metrics=metrics)
    outcomes.start()
    tracing = tracing_of(config.telemetry.tracing)
    engines, chooser, reports = clients or Engines(), ScriptedRouter(), list[Report]()

    def record(report: Report, alpha: float) -> None:
        reports.append(report)
        outcomes.record(report, alpha)
        count_request(metrics, report)
        tracing.ran(report)

    orchestrator = Orchestrator(
        config,
        Handle(WordEmbedder()),
        Handle(chooser),
        Handle(Controller(config)),
        record,
        engines,
    )
    await orchestrator._watcher.first()
    tools = Tools(config)
    tools.says["handbook"] = ToolResult(
        "[1] Ten.", {"sources": [{"id": "s1", "title": "t", "text": "Ten."}]}
    )
    orchestrator._pairs._runner = orchestrator._pairs.parts.tools._runner = tools
    jobs = Jobs(config, store, IdleLauncher())
    app = build_api(orchestrator, store, outcomes, jobs, config, metrics, tracing=tracing)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
    serving = asyncio.create_task(server._serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    gauges = Gauges(orchestrator, store, metrics)
    async with httpx2.AsyncClient(timeout=60) as client:
        try:
            yield Observed(
                url,
                client,
                store,
                outcomes,
                metrics,
                gauges,
                engines,
                tools,
                chooser,
                orchestrator,
                reports,
            )
        finally:
            server.should_exit = True
            await serving
            await outcomes.close()
            orchestrator._watcher._task.cancel()
            orchestrator.close()
            await store.close()
            await tracing.close()
