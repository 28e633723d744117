"""The curve of a training in its job's row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rl.jobs import MAX_POINTS, TrainingCurve


@dataclass(frozen=True)
class Iteration:
    """Progress of a training after an iteration."""

    done: int
    total: int = 2000
    mean_return: float | None = 0.123456
    held_out_utility: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {"done": self.done}


def test_a_curve_has_a_point_for_each_iteration_and_none_before_the_first() -> None:
    curve = TrainingCurve()
    assert curve.with_progress(Iteration(0, mean_return=None)).to_json()["curve"] == []
    curve.with_progress(Iteration(1))
    curve.with_progress(Iteration(2, held_out_utility=0.5))
    told = curve.with_progress(Iteration(2, held_out_utility=0.5)).to_json()
    assert told == {
        "done": 2,
        "curve": [
            {"iteration": 1, "mean_return": 0.1235, "utility": None},
            {"iteration": 2, "mean_return": 0.1235, "utility": 0.5},
        ],
    }


def test_a_long_curve_is_thinned_evenly() -> None:
    curve = TrainingCurve()
    for done in range(1, 1001):
        told = curve.with_progress(Iteration(done))
    points = [point["iteration"] for point in told.to_json()["curve"]]
    assert len(points) <= MAX_POINTS
    assert points == list(range(8, 1001, 8))
    assert (told.done, told.total) == (1000, 2000)
