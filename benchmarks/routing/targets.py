"""What a routing run is held against, and its summary as text."""

from __future__ import annotations

from collections.abc import Mapping
from operator import mul
from typing import Any

REFERENCE_AIQ_LOG = {
    "llmrouter": 0.635,
    "gsm8k_modeltool": 0.858,
    "apibench_modeltool": 0.792,
    "bfcl": 0.905,
    "routerbench3": 0.765,
}
"""`aiq_log` on the shared `test` splits of the best of k-means, kNN and ridge, chosen on the test
split itself."""
ENVELOPE_SLACK = 0.005
SINGLE_SLACK = 0.01
MIN_MEAN_GAIN = 0.005
MAX_FIT_S = 60.0
MAX_FIT_GIB = 4.0
MAX_DECISION_MS = {"20": 0.2, "5000": 2.0}
MAX_GROWTH = 1.5
"""Decision cost at 10^6 outcomes over that at 10^3: flat, up to the noise of a shared machine."""
SMALL_TEST = 100
"""Tables with fewer test queries are reported, not judged."""
_EPSILON = 5e-4
"""The published figures are rounded to three decimals."""


def targets(result: Mapping[str, Any], ours: str) -> list[dict[str, Any]]:
    """Every target as `{name, value, target, holds}`."""
    rows: list[dict[str, Any]] = []

    def at_least(name: str, value: float, target: float) -> None:
        rows.append({"name": name, "value": value, "target": target, "holds": value >= target})

    def at_most(name: str, value: float, target: float) -> None:
        rows.append({"name": name, "value": value, "target": target, "holds": value <= target})

    def area(table: str, method: str) -> float:
        return float(result["tables"][table][method]["aiq_log"].value)

    judged = [
        table for table in result["tables"] if result["fitted"][table]["num_test"] >= SMALL_TEST
    ]
    known = [table for table in REFERENCE_AIQ_LOG if table in judged]
    if not result["settings"]["heldout"]:
        for table in known:
            at_least(f"aiq_log/{table}", area(table, ours), REFERENCE_AIQ_LOG[table] - _EPSILON)
        if len(known) == len(REFERENCE_AIQ_LOG):
            gains = [area(table, ours) - REFERENCE_AIQ_LOG[table] for table in known]
            at_least("aiq_log/mean gain over the reference", sum(gains) / len(gains), MIN_MEAN_GAIN)
    for table in judged:
        margin = area(table, ours) - area(table, "single_arm_envelope")
        at_least(f"aiq_log minus single-arm envelope/{table}", margin, -ENVELOPE_SLACK)
        rises = result["calibration"][table]["rises"]
        at_least(f"confidence rises/{table}", float(rises), 1.0)
    for table, tasks in result["leave_one_task_out"].items():
        sizes = [entry["num_queries"] for entry in tasks.values()]
        differences = [entry["max_score_minus_best_single"] for entry in tasks.values()]
        mean = sum(map(mul, sizes, differences)) / max(sum(sizes), 1)
        at_least(f"unseen tasks minus best single, mean/{table}", mean, -SINGLE_SLACK)
        for task, entry in tasks.items():
            difference = entry["max_score_minus_best_single"]
            at_least(f"unseen task minus best single/{table}/{task}", difference, -SINGLE_SLACK)
    measured = result.get("decision")
    if measured:
        for number, limit in MAX_DECISION_MS.items():
            took_ms = measured["decision_ms_by_pairs"][number]
            at_most(f"decision ms at {number} pairs", took_ms, limit)
        by_outcomes = list(measured["decision_ms_by_outcomes"].values())
        at_most(
            "decision ms, 10^6 over 10^3 outcomes", by_outcomes[-1] / by_outcomes[0], MAX_GROWTH
        )
        at_most("fit s at 10^6 outcomes", measured["fit_s_by_outcomes"]["1000000"], MAX_FIT_S)
        at_most("peak memory GiB", measured["peak_rss_gib"], MAX_FIT_GIB)
    return rows


def summary(result: Mapping[str, Any], ours: str) -> str:
    """One table of `aiq_log` by table and method, in Markdown, and the targets below it."""
    methods = ["single_arm_envelope", "kmeans_paper", "knn_guarded", "ridge", "mlp", ours, "oracle"]
    lines = [
        "| table | " + " | ".join(methods) + " | reference |",
        "| --- |" + " ---: |" * (len(methods) + 1),
    ]
    for table, by_method in result["tables"].items():
        cells = []
        for method in methods:
            figure = by_method[method]["aiq_log"]
            interval = f" ({figure.low:.3f}-{figure.high:.3f})" if method == ours else ""
            cells.append(f"{figure.value:.4f}{interval}")
        reference = REFERENCE_AIQ_LOG.get(table)
        cells.append(f"{reference:.3f}" if reference else "")
        lines.append(f"| {table} | " + " | ".join(cells) + " |")
    lines.append("")
    for row in result["targets"]:
        sign = "holds " if row["holds"] else "MISSED"
        lines.append(f"{sign} {row['name']}: {row['value']:.4f} (target {row['target']:.4f})")
    return "\n".join(lines) + "\n"
