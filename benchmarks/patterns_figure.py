"""The figure of a patterns run: what each kind of question gets, from whom, with 95% intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_KINDS = {
    "best pair": "#b8b8b8",
    "best pattern": "#4477aa",
    "atlas without patterns": "#ddaa33",
    "atlas": "#cc6677",
}


def contenders(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """What is shown: set of questions -> contender -> its row.

    Args:
        rows: As in the JSON: name, questions, score, low, high.
    """
    shown: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        name = str(row["name"])
        kind = "best pair" if "@" in name else "best pattern" if name not in _KINDS else name
        best = shown.setdefault(str(row["questions"]), {})
        if kind not in best or row["score"] > best[kind]["score"]:
            best[kind] = row
    return shown


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the figure.

    Args:
        rows: As in the JSON.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    shown = contenders(rows)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(_KINDS)
    for place, (kind, colour) in enumerate(_KINDS.items()):
        there = [(x, of[kind]) for x, of in enumerate(shown.values()) if kind in of]
        centres = [x + (place - (len(_KINDS) - 1) / 2) * width for x, _ in there]
        scores = [row["score"] for _, row in there]
        reach = [
            [max(row["score"] - row["low"], 0.0) for _, row in there],
            [max(row["high"] - row["score"], 0.0) for _, row in there],
        ]
        axes.bar(centres, scores, width, yerr=reach, color=colour, label=kind, ecolor="#555555")
    axes.set_xticks(range(len(shown)), list(shown), rotation=20)
    axes.set(ylabel="score", ylim=(0, 1.05))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(_KINDS), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=120)
