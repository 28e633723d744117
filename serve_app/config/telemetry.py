"""What is told to the outside of what the deployment does: traces."""

from __future__ import annotations

from pydantic import Field

from serve_app.config.base import BaseConfig


class TracingConfig(BaseConfig):
    """Where OpenTelemetry spans go, and of which requests.

    `OTEL_EXPORTER_OTLP_HEADERS` in the environment holds what the collector asks for, as a key.
    """

    endpoint: str = Field(pattern=r"^https?://[^\s]+$")
    """Address that takes OTLP over HTTP, with its path: `http://127.0.0.1:4318/v1/traces`."""
    service_name: str = "atlas-serve"
    """`service.name` of every span."""
    sample_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of the requests that are traced, among those whose caller does not decide it."""
    follow_caller: bool = True
    """Whether the `sampled` flag of a caller's `traceparent` decides in place of the ratio."""
    content: bool = False
    """Whether spans have questions, answers, arguments and results; needs `store.keep_content`."""
    max_queue_spans: int = Field(default=4096, ge=1)
    """Spans that wait for the collector; more are dropped."""
    max_batch_spans: int = Field(default=512, ge=1)
    """Spans sent at once."""
    interval_s: float = Field(default=2.0, gt=0)
    """Longest time that a span waits for others to be sent with."""


class TelemetryConfig(BaseConfig):
    """Traces; metrics are always at `/metrics`."""

    tracing: TracingConfig | None = None
    """`None`: nothing is traced."""
