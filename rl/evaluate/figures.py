"""The figures of an evaluation, and the curve of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rl.evaluate.evaluate import CANDIDATE, ORACLE, RANDOM, SERVING, EvaluationReport
from serve_app.router.rules.gate import NEAR_ORACLE
from serve_app.schemas import Pair

_COLOURS = {CANDIDATE: "#cc3311", SERVING: "#0077bb", ORACLE: "#aaaaaa", RANDOM: "#000000"}
_OTHER_COLOURS = ("#44aa99", "#ddaa33", "#aa4499", "#88ccee")
_MAX_LABELS = 20
"""More single pairs than this are points without a name."""
_TERM_LABELS = {"r_out": "outcome", "r_fmt": "format", "r_sel": "selection", "r_cost": "cost"}


def draw_pareto(report: EvaluationReport, path: Path) -> None:
    """Draw what each policy's sweep of alpha reaches, among the pairs alone, chance and hindsight.

    Args:
        report: The evaluation.
        path: PNG file to write.
    """
    # The figure's own API has no state shared between threads, unlike pyplot.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    paid = [
        point.cost_usd
        for points in report.frontiers.values()
        for point in points
        if point.cost_usd > 0
    ]
    least_usd = min(paid, default=1.0) / 10  # where what is free is drawn
    pairs = [name for name in report.frontiers if Pair.is_name(name)]
    others = [name for name in report.frontiers if name not in (*pairs, *_COLOURS)]
    colours = _COLOURS | {
        name: _OTHER_COLOURS[number % len(_OTHER_COLOURS)] for number, name in enumerate(others)
    }
    for name in pairs:
        (point,) = report.frontiers[name]
        place = (max(point.cost_usd, least_usd), point.score)
        axes.plot(*place, "o", color="#999999", markersize=5, zorder=2)
        if len(pairs) <= _MAX_LABELS:
            axes.annotate(
                name, place, xytext=(4, -9), textcoords="offset points", fontsize=7, color="#666666"
            )
    for name in [*others, ORACLE, RANDOM, SERVING, CANDIDATE]:
        points = report.frontiers[name]
        axes.plot(
            [max(point.cost_usd, least_usd) for point in points],
            [point.score for point in points],
            "x" if name == RANDOM else ".-",
            color=colours[name],
            linewidth=2.2 if name == CANDIDATE else 1.2,
            markersize=7 if name == RANDOM else 5,
            zorder=4 if name == CANDIDATE else 3,
            label=name.replace("_", " "),
        )
    axes.set(xscale="log", xlabel="US dollars per query", ylabel="mean score")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=130)


def draw_reliability(report: EvaluationReport, path: Path) -> None:
    """Draw the candidate's stated confidence against the share of its decisions that were right.

    Args:
        report: The evaluation.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.5), layout="constrained")
    axes = figure.subplots()
    bins = report.reliability.bins
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
    axes.plot(
        [one.confidence for one in bins],
        [one.share for one in bins],
        "o-",
        color=_COLOURS[CANDIDATE],
        markersize=5,
    )
    axes.set(
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
        xlabel="stated confidence",
        ylabel=f"share within {100 * NEAR_ORACLE:g} points of the best pair",
        title=f"calibration error {report.reliability.error:.3f}",
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=130)


def draw_training(curve: Sequence[Mapping[str, Any]], best_iteration: int, path: Path) -> None:
    """Draw a training run: the return, its terms, and the utility on questions apart.

    Args:
        curve: Rows as `rl.ppo.loop.TrainResult.curve`.
        best_iteration: Whose weights were kept; marked.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    iterations = [row["iteration"] for row in curve]
    above.plot(iterations, [row["mean_return"] for row in curve], color="#000000", label="return")
    for (name, label), colour in zip(_TERM_LABELS.items(), _OTHER_COLOURS, strict=True):
        values = [row[name] for row in curve]
        above.plot(iterations, values, color=colour, linewidth=1, label=label)
    above.set(ylabel="mean per episode, in training")
    measured = [row for row in curve if "utility" in row]
    steps = [row["iteration"] for row in measured]
    below.plot(
        steps,
        [row["utility"] for row in measured],
        color=_COLOURS[CANDIDATE],
        linewidth=2,
        label="mean",
    )
    for number, alpha in enumerate(_alphas_of(measured)):
        below.plot(
            steps,
            [_at_alpha(row["utilities"], alpha) for row in measured],
            color=_OTHER_COLOURS[number % len(_OTHER_COLOURS)],
            linewidth=1,
            label=f"alpha {alpha}",
        )
    below.axvline(best_iteration, color="#bbbbbb", linewidth=1, linestyle="--")
    below.set(xlabel="iteration", ylabel="utility, questions apart")
    for axes in (above, below):
        axes.legend(frameon=False, fontsize=8, ncols=3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=130)


def _alphas_of(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """The alphas of the measurements, as they are written."""
    places = measured[0]["utilities"] if measured else {}
    return sorted({place.partition("/")[2] for place in places}, key=float)


def _at_alpha(utilities: Mapping[str, float], alpha: str) -> float:
    """Mean over the views."""
    values = [utility for place, utility in utilities.items() if place.endswith(f"/{alpha}")]
    return sum(values) / len(values)
