"""Names of metrics, declared once.

Slash-grouped names are ours; a sink maps them to what its backend allows (`gateway/requests`
becomes `atlas_gateway_requests` in Prometheus). Tags are names from the configuration or from
enumerations, never keys, owners or ids.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """One metric: what is counted or measured, and by which tags it is split."""

    name: str
    kind: Literal["counter", "histogram", "gauge"]
    description: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()
    """Histogram bucket bounds, in the metric's own unit."""

    @property
    def exported(self) -> str:
        """Its name in Prometheus; a counter is told with `_total` behind it."""
        return "atlas_" + self.name.replace("/", "_")


_TENTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
)

GATEWAY_REQUESTS = Metric(
    "gateway/requests", "counter", "HTTP requests answered.", ("route", "status")
)
GATEWAY_SECONDS = Metric(
    "gateway/seconds", "histogram", "Seconds from arrival to the last byte.", ("route",), _SECONDS
)
GATEWAY_ONGOING = Metric("gateway/ongoing", "gauge", "HTTP requests being worked on.")
GATEWAY_FIRST_PIECE_SECONDS = Metric(
    "gateway/first_piece_seconds",
    "histogram",
    "Seconds from arrival to the first piece of a streamed answer.",
    ("candidate",),
    _SECONDS,
)
GATEWAY_TOKENS = Metric(
    "gateway/tokens",
    "counter",
    "Tokens of finished requests, answered or not; kind is prompt or completion.",
    ("candidate", "kind"),
)
GATEWAY_COST_USD = Metric(
    "gateway/cost_usd",
    "counter",
    "Dollars spent on finished requests, answered or not.",
    ("candidate",),
)
LIMITS_REFUSED = Metric(
    "limits/refused", "counter", "Requests that a limit ended or kept out.", ("limit",)
)
ROUTER_DECISIONS = Metric(
    "router/decisions",
    "counter",
    "First decisions of finished requests, by who decided and what was chosen.",
    ("path", "candidate"),
)
ROUTER_SECONDS = Metric(
    "router/seconds",
    "histogram",
    "Seconds from the question to the router to its decision, with the embedding.",
    ("path",),
    _SECONDS,
)
ROUTER_CONFIDENCE = Metric(
    "router/confidence", "histogram", "How sure the router was.", ("path",), _TENTHS
)
ROUTER_OUT_OF_DISTRIBUTION = Metric(
    "router/out_of_distribution", "counter", "Requests unlike everything that was profiled."
)
ROUTER_DRIFT = Metric(
    "router/drift",
    "gauge",
    "How far verdicts are from what the profile expects of a candidate, in standard deviations; "
    "0 until there are enough.",
    ("candidate",),
)
POLICY_VERSION = Metric(
    "policy/version", "gauge", "Version of the policy that serves or is on trial.", ("mode",)
)
POLICY_SHARE = Metric(
    "policy/share", "gauge", "Share of the requests that a policy on trial gets.", ("mode",)
)
POLICY_TAKEN_BACK = Metric(
    "policy/taken_back", "gauge", "Version of the last policy that was rolled back."
)
RUN_STEPS = Metric(
    "run/steps",
    "counter",
    "Steps of requests: runs of candidates and thoughts.",
    ("kind", "outcome"),
)
RUN_FALLBACKS = Metric(
    "run/fallbacks",
    "counter",
    "Candidates that failed and were followed by another, by what the failure was.",
    ("reason",),
)
RUN_STOPS = Metric(
    "run/stops", "counter", "Finished requests by why nothing more was done.", ("stop",)
)
MODEL_CALLS = Metric("model/calls", "counter", "Calls of models.", ("model", "outcome"))
MODEL_SECONDS = Metric(
    "model/seconds", "histogram", "Seconds of a call of a model.", ("model",), _SECONDS
)
MODEL_RETRIES = Metric(
    "model/retries", "counter", "Calls of a model that were made again after a failure.", ("model",)
)
TOOL_CALLS = Metric("tool/calls", "counter", "Calls of tools.", ("tool", "outcome"))
TOOL_SECONDS = Metric(
    "tool/seconds", "histogram", "Seconds of a call of a tool.", ("tool",), _SECONDS
)
FEEDBACK_VERDICTS = Metric(
    "feedback/verdicts",
    "counter",
    "Verdicts by users: good is a score of one half or more.",
    ("candidate", "verdict"),
)
POOL_STATE = Metric(
    "pool/state", "gauge", "1 for the state that a model is in.", ("model", "state")
)
POOL_BREAKER = Metric(
    "pool/breaker", "gauge", "1 while calls of a model are held back in a gateway.", ("model",)
)
STORE_WRITTEN = Metric(
    "store/outcomes_written", "counter", "Finished requests written to the store."
)
STORE_DROPPED = Metric(
    "store/outcomes_dropped",
    "counter",
    "Finished requests lost: queue and journal were full, or a row bad.",
)
STORE_WAITING = Metric(
    "store/outcomes_waiting", "gauge", "Finished requests not yet written to the store."
)
STORE_SPILLED = Metric(
    "store/outcomes_spilled",
    "counter",
    "Finished requests left to the journal alone: the queue was full, or the process ended.",
)
STORE_RECOVERED = Metric(
    "store/outcomes_recovered", "counter", "Finished requests written for a process that ended."
)
TOOLS_MCP_CHANGED = Metric(
    "tools/mcp_changed",
    "counter",
    "Functions of MCP servers that are not offered because their definition changed or is new.",
    ("tool",),
)

ALL_METRICS = (
    GATEWAY_REQUESTS,
    GATEWAY_SECONDS,
    GATEWAY_ONGOING,
    GATEWAY_FIRST_PIECE_SECONDS,
    GATEWAY_TOKENS,
    GATEWAY_COST_USD,
    LIMITS_REFUSED,
    ROUTER_DECISIONS,
    ROUTER_SECONDS,
    ROUTER_CONFIDENCE,
    ROUTER_OUT_OF_DISTRIBUTION,
    ROUTER_DRIFT,
    POLICY_VERSION,
    POLICY_SHARE,
    POLICY_TAKEN_BACK,
    RUN_STEPS,
    RUN_FALLBACKS,
    RUN_STOPS,
    MODEL_CALLS,
    MODEL_SECONDS,
    MODEL_RETRIES,
    TOOL_CALLS,
    TOOL_SECONDS,
    FEEDBACK_VERDICTS,
    POOL_STATE,
    POOL_BREAKER,
    STORE_WRITTEN,
    STORE_DROPPED,
    STORE_WAITING,
    STORE_SPILLED,
    STORE_RECOVERED,
    TOOLS_MCP_CHANGED,
)
