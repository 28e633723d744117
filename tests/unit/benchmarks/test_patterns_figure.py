"""What the figure of the patterns benchmark shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.patterns_figure import contenders, draw


def row(name: str, score: float) -> dict[str, Any]:
    return {"name": name, "questions": "hops", "score": score, "low": 0.0, "high": 1.0}


ROWS = [
    row("atlas", 0.5),
    row("a@none", 0.1),
    row("b@none", 0.3),
    row("pattern:p", 0.7),
    row("pattern:q", 0.6),
]


def test_the_best_of_each_kind_is_shown() -> None:
    shown = {kind: of["name"] for kind, of in contenders(ROWS)["hops"].items()}
    assert shown == {"atlas": "atlas", "best pair": "b@none", "best pattern": "pattern:p"}


def test_the_figure_is_a_picture(tmp_path: Path) -> None:
    draw(ROWS, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
