"""Gateway: the Serve deployment callers talk to; joins the HTTP API to the orchestrator."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from ray import serve
from starlette.types import ASGIApp

from serve_app.config import AtlasConfig
from serve_app.errors import AtlasError
from serve_app.gateway.app import build_api
from serve_app.gateway.edge.hosts import require_loopback
from serve_app.gateway.gauges import Gauges
from serve_app.gateway.purses import Purses
from serve_app.jobs import Jobs, RayLauncher
from serve_app.orchestrator.orchestrator import Orchestrator
from serve_app.schemas import ChatCall, Report
from serve_app.store import Journal, OutcomeLog, Retention, Store
from serve_app.telemetry import RayMetrics, count_request
from serve_app.telemetry.tracing import tracing_of

logger = logging.getLogger(__name__)


def http_address() -> tuple[str | None, int]:
    """Host and port that Serve's HTTP servers listen on; asks Serve's controller, blocking.

    They are set by whoever starts Serve first on a cluster; what later ones ask for is ignored.
    """
    options = serve.context._get_global_client().http_config
    return options.host, options.port


@serve.ingress()
class Gateway:
    """HTTP in and out.

    Invariants:
        - A request that is not answered ends with an error in OpenAI's shape by its deadline.
        - Writing outcomes never delays or fails an answer; those of answered requests outlive this
          process.
        - A store that is away stops neither its start nor its answers.
        - Where no key is asked for, it does not start unless Serve listens on loopback only.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: AtlasConfig, embedder: Any, router: Any, controller: Any
    ) -> None:
        """Open the store and join the parts.

        Raises:
            ConfigError: If no key is asked for and Serve listens beyond this machine.
        """
        host, _ = await asyncio.to_thread(http_address)
        require_loopback(config.gateway.auth.mode, host)
        self._config = config
        self._metrics = RayMetrics()
        self._tracing = tracing_of(config.telemetry.tracing)
        self._store = await Store.open(config.store_url(), must_answer=False)

        async def embed(texts: Sequence[str]) -> list[bytes]:
            vectors = await embedder.embed.remote(list(texts))
            return [vector.astype("<f4").tobytes() for vector in vectors]

        self._outcomes = OutcomeLog(
            self._store,
            flush_interval_s=config.store.flush_interval_s,
            max_pending=config.store.max_pending,
            journal=Journal(config.journal_path(), config.store.max_journal_bytes),
            embed=embed,
            metrics=self._metrics,
        )
        self._outcomes.start()
        self._purses = Purses(self._store, self._outcomes, config.gateway.limits.max_deadline_s)
        self._retention = Retention(self._store, config.store.retention_days)
        self._retention.start()
        self._orchestrator = Orchestrator(config, embedder, router, controller, self._record)
        await self._orchestrator.start()
        self._gauges = Gauges(self._orchestrator, self._store, self._metrics)
        self._gauges.start()

    def _record(self, report: Report, alpha: float) -> None:
        """Put a finished request into the outcome log, count it, and tell its trace."""
        self._outcomes.record(report, alpha)
        try:
            count_request(self._metrics, report)
        except Exception:  # a fault in what is counted costs no answer
            logger.exception("request %s is not counted", report.request_id)
        self._tracing.ran(report)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Serve asks for the application after the constructor."""
        jobs = Jobs(self._config, self._store, RayLauncher())
        return build_api(
            self._orchestrator,
            self._store,
            self._outcomes,
            jobs,
            self._config,
            self._metrics,
            self._purses,
            self._tracing,
        )

    async def measure(self, call: ChatCall) -> tuple[Report, AtlasError | None]:
        """Run a pinned request for a profile; see `Orchestrator.measure`."""
        return await self._orchestrator.measure(call)

    async def __del__(self) -> None:
        """Serve's shutdown hook: write what is pending."""
        await self._gauges.close()
        self._orchestrator.close()
        await self._purses.close()
        await self._retention.close()
        await self._outcomes.close()
        await self._store.close()
        await self._tracing.close()
