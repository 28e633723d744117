"""Sends finished requests to an OpenTelemetry collector, in batches, behind the answers.

OpenTelemetry is imported where tracing is switched on, and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Protocol

from serve_app.config.telemetry import TracingConfig
from serve_app.errors import ConfigError
from serve_app.schemas import Report
from serve_app.telemetry.conventions import GENAI_CONVENTIONS
from serve_app.telemetry.projection import SpanView, VerdictView, run_spans, server_span
from serve_app.telemetry.request_line import RequestLine
from serve_app.trace_context import TraceContext, begin_trace

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

logger = logging.getLogger(__name__)

_NS = 1_000_000_000


class Tracing(Protocol):
    """Where traces go."""

    def begin(self, headers: Mapping[bytes, bytes], request_id: str) -> TraceContext | None:
        """The trace of a request that arrived; `None`: nothing is traced."""
        ...

    def ran(self, report: Report) -> None:
        """Tell what a run that ended now came to; must neither wait nor raise."""
        ...

    def served(self, trace: TraceContext, line: RequestLine, verdict: VerdictView | None) -> None:
        """Tell of an HTTP request that ended now; must neither wait nor raise."""
        ...

    async def close(self) -> None:
        """Send what waits, and stop."""
        ...


class NoTracing:
    """Traces nothing."""

    def begin(self, headers: Mapping[bytes, bytes], request_id: str) -> TraceContext | None:
        """No trace."""
        return None

    def ran(self, report: Report) -> None:
        """Do nothing."""

    def served(self, trace: TraceContext, line: RequestLine, verdict: VerdictView | None) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""


class OtlpTracing:
    """Sends spans over OTLP/HTTP.

    Invariants:
        - No request waits for the collector: spans are queued, and dropped when the queue is full.
        - Questions, answers, arguments and results are told only where the settings say so.
    """

    def __init__(self, config: TracingConfig) -> None:
        """Start the thread that sends.

        Raises:
            ConfigError: If OpenTelemetry is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        except ImportError:
            raise ConfigError(
                "telemetry.tracing needs OpenTelemetry: pip install 'atlas-serve[tracing]'"
            ) from None
        self._config = config
        ours = version("atlas-serve")
        self._resource = Resource.create(
            {"service.name": config.service_name, "service.version": ours}
        )
        self._scope = InstrumentationScope(
            "atlas-serve", ours, attributes={"atlas.genai_conventions": GENAI_CONVENTIONS}
        )
        self._processor = BatchSpanProcessor(
            OTLPSpanExporter(endpoint=config.endpoint),
            max_queue_size=config.max_queue_spans,
            max_export_batch_size=min(config.max_batch_spans, config.max_queue_spans),
            schedule_delay_millis=1000 * config.interval_s,
        )
        self._reports: dict[str, Report] = {}
        """Of sampled requests under way, where content is told."""

    def begin(self, headers: Mapping[bytes, bytes], request_id: str) -> TraceContext | None:
        """See `Tracing.begin`."""
        config = self._config
        return begin_trace(
            headers, request_id, config.sample_ratio, follow_caller=config.follow_caller
        )

    def ran(self, report: Report) -> None:
        """See `Tracing.ran`."""
        trace = report.trace
        if trace is None or not trace.is_sampled:
            return
        if self._config.content:
            self._reports[report.request_id] = report
        began_ns = time.time_ns() - int((report.spans[0].seconds or 0.0) * _NS)
        self._tell(trace, run_spans(report, began_ns, content=self._config.content))

    def served(self, trace: TraceContext, line: RequestLine, verdict: VerdictView | None) -> None:
        """See `Tracing.served`."""
        report = self._reports.pop(line.request_id, None)
        if trace.is_sampled:
            content = self._config.content
            view = server_span(line, time.time_ns(), verdict, report, content=content)
            self._tell(trace, [view])

    def _tell(self, trace: TraceContext, views: Iterable[SpanView]) -> None:
        """Queue spans; whatever is wrong with one, the request goes on."""
        try:
            for view in views:
                self._processor.on_end(self._span(trace, view))
        except Exception:
            logger.exception("request %s: its trace is not told", trace.request_id)

    async def close(self) -> None:
        """See `Tracing.close`."""
        await asyncio.to_thread(self._processor.shutdown)

    def _span(self, trace: TraceContext, view: SpanView) -> ReadableSpan:
        """A span as the exporter takes it.

        Made whole and not by a tracer, because a tracer's span has an id of the tracer's making,
        and the calls that were part of this one were told its id long ago.
        """
        from opentelemetry.sdk.trace import Event, ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, TraceFlags, TraceState
        from opentelemetry.trace.status import Status, StatusCode

        def context(span_id: str, *, remote: bool) -> SpanContext:
            return SpanContext(
                int(trace.trace_id, 16),
                int(span_id, 16),
                is_remote=remote,
                trace_flags=TraceFlags(TraceFlags.SAMPLED),
                trace_state=TraceState.from_header([trace.tracestate]),
            )

        if view.parent is not None:
            parent = context(trace.span_id(view.parent), remote=False)
        elif trace.caller_span_id is not None:
            parent = context(trace.caller_span_id, remote=True)
        else:
            parent = None
        events = [] if view.event is None else [Event(*view.event, timestamp=view.ended_ns)]
        failed = view.error is not None
        return ReadableSpan(
            view.name,
            context=context(trace.span_id(view.number), remote=False),
            parent=parent,
            resource=self._resource,
            attributes=view.attributes,
            events=events,
            kind=SpanKind[view.kind.upper()],
            status=Status(StatusCode.ERROR, view.error) if failed else Status(),
            start_time=view.began_ns,
            end_time=view.ended_ns,
            instrumentation_scope=self._scope,
        )


def tracing_of(config: TracingConfig | None) -> Tracing:
    """What settings ask for.

    Raises:
        ConfigError: If that cannot be had here.
    """
    return NoTracing() if config is None else OtlpTracing(config)
