"""The figure of a serving run: latency, throughput, and how far each target is reached."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.stats import Summary

COLOURS = {
    "noop": "#b8b8b8",
    "direct": "#7f9fbf",
    "pinned": "#4477aa",
    "routed": "#cc6677",
    "profiled": "#88ccaa",
    "litellm": "#ddaa33",
}


def draw(
    scenarios: Mapping[str, Mapping[str, Summary]], targets: list[dict[str, Any]], path: Path
) -> None:
    """Write the figure.

    Args:
        scenarios: phase -> endpoint -> figures; needs `closed_1` and `closed_16`.
        targets: As in the JSON: name, value, target, holds.
        path: PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (latency, throughput, reached) = pyplot.subplots(
        1, 3, figsize=(13, 4), width_ratios=[1, 1, 1.3], layout="constrained"
    )
    names = list(scenarios["closed_1"])
    colours = [COLOURS.get(name, "#888888") for name in names]
    p50 = [scenarios["closed_1"][name].p50_ms or 0.0 for name in names]
    p99 = [scenarios["closed_1"][name].p99_ms or 0.0 for name in names]
    bars = latency.bar(names, p50, color=colours)
    latency.bar_label(bars, fmt="%.1f")
    latency.plot(names, p99, "k_", markersize=14, label="p99")
    latency.set(title="Latency at concurrency 1", ylabel="ms (bar: p50)")
    latency.legend(frameon=False)
    rates = [scenarios["closed_16"][name].requests_per_s for name in names]
    throughput.bar_label(throughput.bar(names, rates, color=colours), fmt="%.0f")
    throughput.set(title="Throughput at concurrency 16", ylabel="requests/s")
    reached.axis("off")
    reached.set_title("Targets")
    for row, target in enumerate(targets):
        text = f"{target['name']}: {target['value']:.4g}  ({target['target']})"
        colour = "#228833" if target["holds"] else "#cc3311"
        reached.text(0, 0.95 - 0.95 * row / len(targets), text, fontsize=8, color=colour)
    for axes in (latency, throughput):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", rotation=30)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
