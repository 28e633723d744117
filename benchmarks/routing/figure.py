"""The figures of a routing run: score against log cost per table, and the gate's reliability."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLOURS = {
    "oracle": "#bbbbbb",
    "best_arm_per_task": "#777777",
    "random": "#000000",
    "best_single": "#222222",
    "knn_guarded": "#88ccee",
    "kmeans_paper": "#ddaa33",
    "ridge": "#44aa99",
    "mlp": "#aa4499",
    "atlas": "#cc3311",
}
Frontiers = Mapping[str, tuple[list[float], list[float]]]


def draw_frontiers(table: str, frontiers: Frontiers, path: Path) -> None:
    """Write one table's figure.

    Args:
        table: Its name.
        frontiers: method -> costs in US dollars and scores, ascending; single arms have one point.
        path: PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    end = max(costs_usd[-1] for costs_usd, _ in frontiers.values())
    for method, (costs_usd, scores) in frontiers.items():
        if method in COLOURS:
            axes.step(
                [*costs_usd, end],
                [*scores, scores[-1]],
                where="post",
                color=COLOURS[method],
                linewidth=2.2 if method == "atlas" else 1.2,
                zorder=3 if method == "atlas" else 2,
                label=method,
            )
        else:
            axes.plot(costs_usd, scores, "o", color="#99999988", markersize=4, zorder=1)
    axes.set(xscale="log", xlabel="US dollars per query", ylabel="mean score", title=table)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_reliability(calibrations: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write the reliability plot: stated confidence against the share that was right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4.5), layout="constrained")
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
    for table, entry in calibrations.items():
        axes.plot(entry["confidence"], entry["share_near_oracle"], "o-", markersize=4, label=table)
    axes.set(xlabel="stated confidence", ylabel="share within 2 points of the oracle pair")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
