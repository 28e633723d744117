"""The figures of a run: score against cost, in and out of distribution, and what steps bring."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.path2.units import GATED, ONE_STEP, ORACLE, PATH_1, PATH_2, Unit
from rl.ppo.table import ReplayTable

_COLOURS = {
    GATED: "#cc3311",
    PATH_2: "#ee99aa",
    ONE_STEP: "#ddaa33",
    PATH_1: "#0077bb",
    ORACLE: "#aaaaaa",
}


def draw_frontiers(parts: dict[str, Sequence[Unit]], table: ReplayTable, path: Path) -> None:
    """Draw what everyone's sweep of alpha reaches, and every pair alone.

    Args:
        parts: Title to the units of the same questions, one per seed; the lines are their means.
        table: The test questions.
        path: PNG file to write.
    """
    # The figure's own API has no state shared between threads, unlike pyplot.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(parts), 4.6), layout="constrained")
    panels = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for axes, (title, units) in zip(panels, parts.items(), strict=True):
        axes.plot(
            table.costs_usd[0].mean(axis=0), table.score[0].mean(axis=0), "o", color="#99999988",
            markersize=4,
        )  # fmt: skip
        for name, colour in _COLOURS.items():
            costs_usd, scores = (
                np.mean([unit.reached[name][what].mean(axis=1) for unit in units], axis=0)
                for what in ("costs_usd", "score")
            )
            order = np.argsort(costs_usd)
            axes.plot(
                costs_usd[order],
                scores[order],
                ".-",
                color=colour,
                linewidth=2.2 if name == GATED else 1.2,
                zorder=4 if name == GATED else 3,
                label=name,
            )
        axes.set(xscale="log", xlabel="US dollars per query", title=title)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="mean score")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, format="png", dpi=130)
