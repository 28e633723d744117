"""The figure of a scale run: what grows how, and what a request costs of each process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.scale.growth import Growth
from benchmarks.scale.requests import Cost


def draw(growths: Sequence[Growth], costs: Mapping[str, Cost], path: Path) -> None:
    """Write the figure.

    Args:
        growths: What was measured; those in milliseconds are drawn.
        costs: By kind of request.
        path: PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (grows, request) = pyplot.subplots(1, 2, figsize=(13, 4.6), layout="constrained")
    for growth in (of for of in growths if of.unit == "ms"):
        sizes = list(growth.points)
        grows.plot(sizes, list(growth.points.values()), "o-", markersize=4, label=growth.name)
    grows.set(xscale="log", yscale="log", xlabel="how many", ylabel="ms", title="What grows how")
    grows.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    bottom = [0.0] * len(costs)
    parts = sorted({part for cost in costs.values() for part in cost.cpu_ms})
    for part in parts:
        heights = [cost.cpu_ms.get(part, 0.0) for cost in costs.values()]
        request.bar(list(costs), heights, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    request.set(ylabel="ms of a core", title="CPU for each request, engine apart")
    request.tick_params(axis="x", rotation=12)
    request.legend(frameon=False, fontsize=8)
    for axes in (grows, request):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
