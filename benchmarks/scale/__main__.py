"""How does the cost of deciding, storing and serving grow, and what does some traffic need?

How: `python -m benchmarks.scale --out FILE.json [--parts decide,rules,functions,store,requests]`.
Whole, it takes three quarters of an hour on two cores: fits of 10 million outcomes, 10 million
requests in two stores, and a load test of 15 minutes; `--quick` leaves out the largest sizes. A
part that is not asked for stays in the file as it is. From what a request costs of each process it
simulates what 100, 1,000 and 10,000 requests per second need. Results: the JSON, a figure beside
it, tables on the terminal.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.scale import deciding, load, requests, stores
from benchmarks.scale.figure import draw
from benchmarks.scale.growth import Growth
from benchmarks.scale.requests import Cost
from benchmarks.scale.simulation import (
    Autoscaling,
    Change,
    Traffic,
    replicas_for,
    simulate,
)
from benchmarks.serving import machine, show_targets
from benchmarks.stats import Target

PARTS = ("decide", "rules", "functions", "store", "requests")
RATES = (100.0, 1_000.0, 10_000.0)
_MIX = {
    "named": 0.2,
    "routed, like the profile": 0.6,
    "routed, unlike the profile": 0.2,
}
"""Share of each kind of request in the traffic that is simulated."""
_SIMULATED_REQUESTS = 60_000
_CORES_PER_NODE = 16
console = Console(stderr=True, width=120)


def traffic_of(costs: dict[str, Cost], requests_per_s: float) -> Traffic:
    """Traffic of the mix: of each stage the mean cost over the kinds that pass it."""
    service_s, shares = {}, {}
    for stage, kinds in (
        ("Gateway", tuple(_MIX)),
        ("Router", tuple(_MIX)[1:]),
        ("Embedder", tuple(_MIX)[2:]),
    ):
        shares[stage] = sum(_MIX[kind] for kind in kinds)
        total = sum(_MIX[kind] * costs[kind].cpu_ms.get(stage, 0.0) for kind in kinds)
        service_s[stage] = total / shares[stage] / 1e3
    return Traffic(requests_per_s, service_s, shares)


def sized(costs: dict[str, Cost]) -> list[dict[str, Any]]:
    """What each rate needs, and how that behaves: at rest, doubled, and without a node."""
    rows = []
    for rate in RATES:
        traffic = traffic_of(costs, rate)
        replicas = replicas_for(traffic)
        nodes = max(2, -(-sum(replicas.values()) // (_CORES_PER_NODE - 4)))
        seconds = _SIMULATED_REQUESTS / rate
        rest, _ = simulate(traffic, replicas, seconds)
        rows.append(
            {
                "requests_per_s": rate,
                "replicas": replicas,
                "nodes": nodes,
                "saturates_first": max(
                    replicas,
                    key=lambda of: rate * traffic.shares[of] * traffic.service_s[of] / replicas[of],
                ),
                "p50_ms": rest.quantile_ms(0.5),
                "p99_ms": rest.quantile_ms(0.99),
                **_changing(traffic, replicas, nodes),
            }
        )
    return rows


def _changing(traffic: Traffic, replicas: dict[str, int], nodes: int) -> dict[str, float]:
    """The 99th percentile while traffic doubles or a node is gone, and after it."""
    if traffic.requests_per_s > 1_000:  # the same at ten times the rate, and too much to simulate
        return {}
    at_s, seconds, scaling = 20.0, 90.0, Autoscaling()
    found = {}
    for name, change in (
        ("doubled", Change(at_s, rate_factor=2.0)),
        ("node_lost", Change(at_s, lost_share=1 / nodes)),
    ):
        latencies, _ = simulate(traffic, replicas, seconds, scaling, (change,))
        found[f"{name}_p99_ms"] = latencies.quantile_ms(0.99, at_s, at_s + 30)
        found[f"{name}_after_p99_ms"] = latencies.quantile_ms(0.99, seconds - 15)
    return found


def targets(growths: dict[str, Growth], tested: dict[str, Any] | None) -> list[Target]:
    """What must not grow, and must not fail."""
    wanted = {
        "decision over outcomes": 0.15,
        "memory of the rule over outcomes": 0.15,
        "sqlite: a trace": 0.15,
        "postgresql: a trace": 0.15,
        "sqlite: a verdict": 0.15,
        "postgresql: a verdict": 0.15,
        "decision over candidates": 1.3,
        "keyword rules": 1.3,
        "utterances of a semantic rule": 1.3,
    }
    held = [
        Target(f"{name}, exponent", growths[name].exponent, "<=", most)
        for name, most in wanted.items()
        if name in growths
    ]
    if tested is not None:
        failed = float(tested["summary"]["errors"])
        held.append(Target("load: requests that failed", failed, "<=", 0.0))
        held.append(Target("load: growth of memory", tested["memory_growth"], "<=", 0.03))
    return held


def main() -> None:
    """Measure, simulate, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="leave out the largest sizes")
    parser.add_argument("--load-seconds", type=float, default=900.0, help="of the load test")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each kind of request")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {min(unknown)!r}; the parts are {', '.join(PARTS)}")
    record: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    record["machine"] = machine()
    growths = {
        name: Growth(name, of["unit"], {int(size): cost for size, cost in of["points"].items()})
        for name, of in record.get("growth", {}).items()
    }
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(parts))

        def advance(what: str) -> None:
            progress.update(task, description=what)

        def keep(found: list[Growth]) -> None:
            growths.update({growth.name: growth for growth in found})
            record["growth"] = {name: growth.as_json() for name, growth in growths.items()}

        for part in parts:
            if part == "decide":
                keep(deciding.by_candidates(advance, _sizes(deciding.CANDIDATES, options.quick)))
                keep(deciding.by_outcomes(advance, _sizes(deciding.OUTCOMES, options.quick)))
            elif part == "rules":
                keep(deciding.by_rules(advance, _sizes(deciding.RULES, options.quick)))
            elif part == "functions":
                keep(deciding.by_functions(advance))
            elif part == "store":
                found, scans = stores.by_requests(advance, _sizes(stores.REQUESTS, options.quick))
                keep(found)
                record["whole_tables_read_for"] = scans
            else:
                with requests.graph_of_instant_engines(advance) as port:
                    costs = requests.measured(advance, port, options.seconds)
                    record["requests"] = {kind: asdict(cost) for kind, cost in costs.items()}
                    _write(options.out, record)
                    tested = load.run(advance, port, options.load_seconds)
                record["load"] = {**asdict(tested), "memory_growth": tested.growth}
            _write(options.out, record)
            progress.advance(task)
        costs = {kind: Cost(**cost) for kind, cost in record.get("requests", {}).items()}
        if costs:
            advance("simulating")
            record["needs"] = sized(costs)
    held = targets(growths, record.get("load"))
    record["targets"] = [target.as_json() for target in held]
    _write(options.out, record)
    draw(list(growths.values()), costs, options.out.with_suffix(".png"))
    _show(growths, record)
    show_targets(held)


def _sizes(sizes: tuple[int, ...], quick: bool) -> tuple[int, ...]:
    return sizes[:2] if quick else sizes


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def _show(growths: dict[str, Growth], record: dict[str, Any]) -> None:
    """Print what was measured."""
    table = Table("what", "unit", "by size", "growth")
    for growth in growths.values():
        points = "  ".join(f"{size:,}: {cost:.3g}" for size, cost in growth.points.items())
        table.add_row(growth.name, growth.unit, points, f"{growth.word} ({growth.exponent:.2f})")
    console.print(table)
    for kind, cost in record.get("requests", {}).items():
        parts = "  ".join(f"{part} {ms:.2f}" for part, ms in cost["cpu_ms"].items())
        rate = cost["requests_per_s"]
        console.print(f"{kind}: {rate:.0f}/s, ms of CPU: {parts}", highlight=False)
    for row in record.get("needs", []):
        console.print(row)


if __name__ == "__main__":
    main()
