"""Writes the Grafana dashboard and the Prometheus rules from one table.

Run: `python -m serve_app.telemetry.grafana configs/grafana`. Results: `atlas.json`, which Grafana
imports, and `rules.yaml`, which Prometheus reads as a rule file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from serve_app.schemas import MAX_DEVIATIONS
from serve_app.telemetry import metrics as m
from serve_app.telemetry.metrics import Metric

_WIDTH, _HEIGHT = 8, 7
"""Of a panel, in Grafana's units: three in a line of 24."""
_WINDOW = "$__rate_interval"
_OBJECTIVE = 0.995
"""Share of the requests that must not end with a fault of the deployment's."""
_DOLLARS_PER_HOUR = 10.0
"""Spend that somebody should look at; to be set to what is usual."""


class Panel(NamedTuple):
    """One chart."""

    title: str
    unit: str
    """Grafana's name of it."""
    lines: tuple[tuple[str, str], ...]
    """What each shows, as PromQL, and its legend."""


class Alert(NamedTuple):
    """One rule that tells somebody."""

    name: str
    expression: str
    """PromQL."""
    lasts: str
    """How long it must hold."""
    severity: str
    summary: str


def _rate(metric: Metric, by: str = "", where: str = "", window: str = _WINDOW) -> str:
    """Additions to a counter a second, in all or by a tag."""
    chosen = f"{{{where}}}" if where else ""
    grouped = f"sum by ({by}) " if by else "sum "
    return f"{grouped}(rate({metric.exported}_total{chosen}[{window}]))"


def _quantile(share: float, metric: Metric, by: str = "") -> str:
    """A quantile of a histogram, in all or by a tag."""
    labels = ", ".join(filter(None, ("le", by)))
    return (
        f"histogram_quantile({share}, "
        f"sum by ({labels}) (rate({metric.exported}_bucket[{_WINDOW}])))"
    )


def _most(metric: Metric, by: str = "", where: str = "") -> str:
    """The highest value that any gateway tells of a gauge."""
    chosen = f"{{{where}}}" if where else ""
    return (f"max by ({by}) " if by else "max ") + f"({metric.exported}{chosen})"


def _failed(window: str = _WINDOW) -> str:
    """Share of the requests that end with a fault of the deployment's."""
    failed = _rate(m.GATEWAY_REQUESTS, where='status=~"5.."', window=window)
    return f"{failed} / {_rate(m.GATEWAY_REQUESTS, window=window)}"


def _middle_and_high(metric: Metric) -> tuple[tuple[str, str], ...]:
    return ((_quantile(0.5, metric), "p50"), (_quantile(0.95, metric), "p95"))


ROWS: dict[str, tuple[Panel, ...]] = {
    "Traffic": (
        Panel("Requests", "reqps", ((_rate(m.GATEWAY_REQUESTS, "status"), "{{status}}"),)),
        Panel("Failed requests", "percentunit", ((_failed(), "5xx"),)),
        Panel("Time to the last byte", "s", _middle_and_high(m.GATEWAY_SECONDS)),
        Panel("Time to the first piece", "s", _middle_and_high(m.GATEWAY_FIRST_PIECE_SECONDS)),
        Panel("Under way", "short", ((f"sum ({m.GATEWAY_ONGOING.exported})", "requests"),)),
        Panel("Ended by a limit", "reqps", ((_rate(m.LIMITS_REFUSED, "limit"), "{{limit}}"),)),
    ),
    "Routing": (
        Panel("Candidates", "reqps", ((_rate(m.ROUTER_DECISIONS, "candidate"), "{{candidate}}"),)),
        Panel("Who decides", "reqps", ((_rate(m.ROUTER_DECISIONS, "path"), "{{path}}"),)),
        Panel(
            "Unlike everything profiled",
            "percentunit",
            (
                (
                    f"{_rate(m.ROUTER_OUT_OF_DISTRIBUTION)} / {_rate(m.ROUTER_DECISIONS)}",
                    "share of requests",
                ),
            ),
        ),
        Panel(
            "Confidence",
            "percentunit",
            ((_quantile(0.5, m.ROUTER_CONFIDENCE, "path"), "{{path}}"),),
        ),
        Panel("Time to decide", "s", _middle_and_high(m.ROUTER_SECONDS)),
        Panel(
            "Verdicts against the profile",
            "short",
            ((_most(m.ROUTER_DRIFT, "candidate"), "{{candidate}}, standard deviations"),),
        ),
        Panel(
            "Good verdicts",
            "percentunit",
            (
                (
                    _rate(m.FEEDBACK_VERDICTS, "candidate", 'verdict="good"', "1h")
                    + f" / {_rate(m.FEEDBACK_VERDICTS, 'candidate', window='1h')}",
                    "{{candidate}}",
                ),
            ),
        ),
        Panel("Policies", "short", ((_most(m.POLICY_VERSION, "mode"), "{{mode}}"),)),
        Panel(
            "On trial",
            "percentunit",
            ((_most(m.POLICY_SHARE, "mode", 'mode!="serving"'), "{{mode}}"),),
        ),
    ),
    "Runs": (
        Panel("Steps", "ops", ((_rate(m.RUN_STEPS, "kind, outcome"), "{{kind}} {{outcome}}"),)),
        Panel("Fallbacks", "ops", ((_rate(m.RUN_FALLBACKS, "reason"), "{{reason}}"),)),
        Panel("Why runs stop", "ops", ((_rate(m.RUN_STOPS, "stop"), "{{stop}}"),)),
    ),
    "Models": (
        Panel("Calls", "ops", ((_rate(m.MODEL_CALLS, "model, outcome"), "{{model}} {{outcome}}"),)),
        Panel(
            "Time of a call, p95", "s", ((_quantile(0.95, m.MODEL_SECONDS, "model"), "{{model}}"),)
        ),
        Panel("Retries", "ops", ((_rate(m.MODEL_RETRIES, "model"), "{{model}}"),)),
        Panel(
            "Not ready",
            "short",
            ((_most(m.POOL_STATE, "model, state", 'state!="ready"'), "{{model}} {{state}}"),),
        ),
        Panel("Breaker open", "short", ((_most(m.POOL_BREAKER, "model"), "{{model}}"),)),
    ),
    "Tools": (
        Panel("Calls", "ops", ((_rate(m.TOOL_CALLS, "tool, outcome"), "{{tool}} {{outcome}}"),)),
        Panel("Time of a call, p95", "s", ((_quantile(0.95, m.TOOL_SECONDS, "tool"), "{{tool}}"),)),
        Panel(
            "Functions that changed",
            "short",
            ((_rate(m.TOOLS_MCP_CHANGED, "tool"), "{{tool}}"),),
        ),
    ),
    "Money": (
        Panel(
            "Dollars an hour",
            "currencyUSD",
            ((f"3600 * {_rate(m.GATEWAY_COST_USD, 'candidate')}", "{{candidate}}"),),
        ),
        Panel("Tokens a second", "short", ((_rate(m.GATEWAY_TOKENS, "kind"), "{{kind}}"),)),
    ),
    "Store": (
        Panel("Written", "ops", ((_rate(m.STORE_WRITTEN), "requests"),)),
        Panel("Waiting", "short", ((f"sum ({m.STORE_WAITING.exported})", "requests"),)),
        Panel(
            "Not written at once",
            "ops",
            (
                (_rate(m.STORE_DROPPED), "lost"),
                (_rate(m.STORE_SPILLED), "left to the journal"),
                (_rate(m.STORE_RECOVERED), "written for a process that ended"),
            ),
        ),
    ),
}


def _burns(times: float, long: str, short: str) -> str:
    """Whether the error budget is used up so many times faster than it may be."""
    most = f"{times * (1 - _OBJECTIVE):g}"
    return f"({_failed(long)} > {most}) and ({_failed(short)} > {most})"


_SPEND_HOURLY = f"3600 * {_rate(m.GATEWAY_COST_USD, window='1h')}"
_CANARY_SHARE = _most(m.POLICY_SHARE, where='mode="canary"')

ALERTS = (
    Alert(
        "AtlasErrorBudgetBurnsFast",
        _burns(14.4, "1h", "5m"),
        "2m",
        "page",
        "At this rate the month's error budget is gone in two days.",
    ),
    Alert(
        "AtlasErrorBudgetBurns",
        _burns(6.0, "6h", "30m"),
        "15m",
        "ticket",
        "At this rate the month's error budget is gone in five days.",
    ),
    Alert(
        "AtlasCandidateDrifts",
        f"min by (candidate) ({m.ROUTER_DRIFT.exported}) < -{MAX_DEVIATIONS:g}",
        "15m",
        "ticket",
        "Verdicts on {{ $labels.candidate }} are worse than its profile lets expect: profile it "
        "again.",
    ),
    Alert(
        "AtlasSpendIsHigh",
        f"{_SPEND_HOURLY} > {_DOLLARS_PER_HOUR:g}",
        "15m",
        "ticket",
        'The deployment spends {{ $value | printf "%.2f" }} dollars an hour.',
    ),
    Alert(
        "AtlasSpendRises",
        f"({_SPEND_HOURLY} > 3 * ({_SPEND_HOURLY.replace('[1h]', '[1h] offset 1d')})) "
        f"and ({_SPEND_HOURLY} > {_DOLLARS_PER_HOUR / 10:g})",
        "30m",
        "ticket",
        "The deployment spends three times what it spent a day ago.",
    ),
    Alert(
        "AtlasPolicyTakenBack",
        f"max (changes({m.POLICY_TAKEN_BACK.exported}[30m])) > 0",
        "0m",
        "ticket",
        "A policy was rolled back; /console/policies says why.",
    ),
    Alert(
        "AtlasCanaryUndecided",
        f"{_CANARY_SHARE} > 0",
        "7d",
        "ticket",
        "A canary has been on trial for a week: promote it, or end it.",
    ),
    Alert(
        "AtlasModelFailed",
        _most(m.POOL_STATE, "model", 'state="failed"') + " > 0",
        "5m",
        "ticket",
        "{{ $labels.model }} has not been answering for five minutes.",
    ),
    Alert(
        "AtlasOutcomesLost",
        f"sum (increase({m.STORE_DROPPED.exported}_total[15m])) > 0",
        "0m",
        "ticket",
        "Finished requests were not written: queue and journal are full.",
    ),
)


def dashboard() -> dict[str, Any]:
    """The dashboard, as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for row, charts in ROWS.items():
        place = {"h": 1, "w": 24, "x": 0, "y": top}
        panels.append({"type": "row", "title": row, "gridPos": place, "collapsed": False})
        top += 1
        for number, chart in enumerate(charts):
            line, column = divmod(number, 24 // _WIDTH)
            panels.append(_panel(chart, column * _WIDTH, top + line * _HEIGHT))
        top += -(-len(charts) // (24 // _WIDTH)) * _HEIGHT
    for number, panel in enumerate(panels, start=1):
        panel["id"] = number
    source = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "source"}
    return {
        "title": "Atlas",
        "uid": "atlas-serve",
        "tags": ["atlas"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [source]},
        "panels": panels,
    }


def _panel(chart: Panel, x: int, y: int) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "type": "timeseries",
        "title": chart.title,
        "datasource": source,
        "gridPos": {"h": _HEIGHT, "w": _WIDTH, "x": x, "y": y},
        "fieldConfig": {"defaults": {"unit": chart.unit, "min": None}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": source,
                "expr": expression,
                "legendFormat": legend,
            }
            for number, (expression, legend) in enumerate(chart.lines)
        ],
    }


def rules() -> dict[str, Any]:
    """The alert rules, as Prometheus reads them."""
    return {
        "groups": [
            {
                "name": "atlas",
                "rules": [
                    {
                        "alert": alert.name,
                        "expr": alert.expression,
                        "for": alert.lasts,
                        "labels": {"severity": alert.severity},
                        "annotations": {"summary": alert.summary},
                    }
                    for alert in ALERTS
                ],
            }
        ]
    }


def files() -> dict[str, str]:
    """The files by name."""
    head = "# Written by `python -m serve_app.telemetry.grafana configs/grafana`.\n"
    return {
        "atlas.json": json.dumps(dashboard(), indent=1) + "\n",
        "rules.yaml": head + yaml.safe_dump(rules(), sort_keys=False, width=100),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (folder / name).write_text(text)
