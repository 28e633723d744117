"""Metrics, log lines, and what Serve logs. Importing this needs no Ray."""

from serve_app.telemetry.metrics import (
    ALL_METRICS,
    GATEWAY_COST_USD,
    GATEWAY_ONGOING,
    GATEWAY_REQUESTS,
    GATEWAY_SECONDS,
    GATEWAY_TOKENS,
    STORE_DROPPED,
    STORE_RECOVERED,
    STORE_SPILLED,
    STORE_WAITING,
    STORE_WRITTEN,
    TOOLS_MCP_CHANGED,
    Metric,
    MetricSink,
    NoMetrics,
    RayMetrics,
)
from serve_app.telemetry.request_line import RequestLine
from serve_app.telemetry.serve_logs import SERVE_LOGGING, log_files_kept

__all__ = [
    "ALL_METRICS",
    "GATEWAY_COST_USD",
    "GATEWAY_ONGOING",
    "GATEWAY_REQUESTS",
    "GATEWAY_SECONDS",
    "GATEWAY_TOKENS",
    "SERVE_LOGGING",
    "STORE_DROPPED",
    "STORE_RECOVERED",
    "STORE_SPILLED",
    "STORE_WAITING",
    "STORE_WRITTEN",
    "TOOLS_MCP_CHANGED",
    "Metric",
    "MetricSink",
    "NoMetrics",
    "RayMetrics",
    "RequestLine",
    "log_files_kept",
]
