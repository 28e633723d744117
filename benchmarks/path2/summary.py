"""From units to figures with intervals, and what they are held against.

Intervals resample seeds and questions alike (the mean over both is what is claimed), with the same
questions for all contenders, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.path2.units import (
    ALPHAS,
    BEST_SINGLE,
    GATED,
    HINDSIGHT,
    ONE_STEP,
    ORACLE,
    PATH_1,
    PATH_2,
    Unit,
    joined,
)

Array = NDArray[np.float64]

REPORTED = (0.0, 0.1, 0.3)
JUDGED_ALPHA = 0.3
NUM_RESAMPLES = 1000

MIN_ORACLE_SHARE = 0.95
MIN_UNSEEN_GAIN = 0.10
MIN_GROWTH_SHARE = 0.70


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Target:
    """One figure and what it is held against.

    `surely` asks it of the whole interval, `mean` of its middle.
    """

    name: str
    value: float
    low: float
    high: float
    target: float
    asked: Literal["mean", "surely"]
    holds: bool


class Resamples:
    """The same resamples of seeds and questions for everything that is said of some units."""

    def __init__(self, units: Sequence[Unit], seed: int = 0) -> None:
        """Draw them; all units are of the same questions."""
        self._units = units
        rng = np.random.default_rng(seed)
        num_seeds, num_queries = len(units), units[0].score(PATH_1, 0.0).size
        self._seeds = _weights(rng, num_seeds)
        self._queries = _weights(rng, num_queries)

    def means(self, values: Array) -> Array:
        """(1 + NUM_RESAMPLES,) means of (num_seeds, num_questions); the first is the plain one."""
        means: Array = ((self._seeds @ values) * self._queries).sum(axis=1)
        return means

    def figure(self, values: Array) -> dict[str, float]:
        """Mean and interval of (num_seeds, num_questions)."""
        return asdict(figure_of(self.means(values)))

    def equal_cost(self, alpha: float, axis: Literal["cost", "costs_usd"]) -> Figure:
        """Utility that path 2 gains by its later steps, at the mean cost that it has with them.

        One step reaches, at that cost, what the best mixture of two of its own alphas reaches.
        """
        row = ALPHAS.index(alpha)
        per_seed = [
            {
                (name, what): self._queries @ unit.reached[name][what].T
                for name in (PATH_2, ONE_STEP)
                for what in ("score", axis)
            }
            for unit in self._units
        ]
        gains = np.array(
            [
                [
                    of[PATH_2, "score"][draw, row]
                    - _envelope(
                        of[ONE_STEP, axis][draw],
                        of[ONE_STEP, "score"][draw],
                        of[PATH_2, axis][draw, row],
                    )
                    for of in per_seed
                ]
                for draw in range(len(self._queries))
            ]
        )
        return figure_of((1 - alpha) * (gains * self._seeds).sum(axis=1))


def figure_of(draws: Array) -> Figure:
    """The first as the value, the others as the interval."""
    low, high = np.percentile(draws[1:], [2.5, 97.5])
    return Figure(float(draws[0]), float(low), float(high))


def scores(units: Sequence[Unit], name: str, alpha: float) -> Array:
    """(num_seeds, num_questions)."""
    return np.stack([unit.score(name, alpha) for unit in units])


def utilities(units: Sequence[Unit], name: str, alpha: float) -> Array:
    """(num_seeds, num_questions)."""
    return np.stack([unit.utility(name, alpha) for unit in units])


def contenders(units: Sequence[Unit]) -> dict[str, Any]:
    """Score, utility, cost and steps of everyone at the reported alphas."""
    of = Resamples(units)
    return {
        f"alpha {alpha:g}": {
            name: {
                "score": of.figure(scores(units, name, alpha)),
                "utility": of.figure(utilities(units, name, alpha)),
                "cost_usd": _plain(units, name, "costs_usd", alpha),
                "steps": _plain(units, name, "steps", alpha),
            }
            for name in units[0].reached
        }
        for alpha in REPORTED
    }


def differences(units: Sequence[Unit], pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Score and utility of one contender minus those of another, at the reported alphas."""
    of = Resamples(units)
    return {
        f"{one} minus {other}": {
            f"alpha {alpha:g}": {
                what.__name__: of.figure(what(units, one, alpha) - what(units, other, alpha))
                for what in (scores, utilities)
            }
            for alpha in REPORTED
        }
        for one, other in pairs
    }


COMPARED = (
    (GATED, PATH_1),
    (GATED, PATH_2),
    (PATH_2, PATH_1),
    (GATED, BEST_SINGLE),
    (GATED, HINDSIGHT),
    (PATH_2, BEST_SINGLE),
    (PATH_2, HINDSIGHT),
    (PATH_2, ONE_STEP),
)


def section(units: Sequence[Unit]) -> dict[str, Any]:
    """All that is said of some units of the same questions."""
    of = Resamples(units)
    share = of.means(utilities(units, GATED, JUDGED_ALPHA)) / of.means(
        utilities(units, ORACLE, JUDGED_ALPHA)
    )
    return {
        "num_seeds": len(units),
        "num_questions": int(units[0].score(PATH_1, 0.0).size),
        "contenders": contenders(units),
        "differences": differences(units, COMPARED),
        "share_of_oracle": asdict(figure_of(share)),
        "steps_at_equal_cost": {
            f"alpha {alpha:g}": {
                axis: asdict(of.equal_cost(alpha, axis)) for axis in ("cost", "costs_usd")
            }
            for alpha in REPORTED
        },
    }


def changed(units: Sequence[Unit], whole: Sequence[Unit]) -> dict[str, Any]:
    """Score and utility of each path less what it has when nothing is changed.

    Path 2 held to one step is set against path 2 as it is, so that what was trained on one step is
    also seen asked with one.

    Args:
        units: One per seed.
        whole: The same questions and seeds.
    """
    of = Resamples(units)
    compared = {name: name for name in (GATED, PATH_1, PATH_2)} | {ONE_STEP: PATH_2}
    return {
        name: {
            f"alpha {alpha:g}": {
                what.__name__: of.figure(what(units, name, alpha) - what(whole, against, alpha))
                for what in (scores, utilities)
            }
            for alpha in REPORTED
        }
        for name, against in compared.items()
    }


def over_domains(by_domain: Mapping[str, Sequence[Unit]]) -> list[Unit]:
    """Per seed all domains' questions as one unit."""
    return [joined(units) for units in zip(*by_domain.values(), strict=True)]


def growth_share(
    without: Sequence[Unit], added: Sequence[Unit], again: Sequence[Unit], contender: str
) -> Figure:
    """Share of the gain of learning anew that adding by card alone brings, in utility."""

    def means(units: Sequence[Unit]) -> Array:
        return Resamples(units).means(utilities(units, contender, JUDGED_ALPHA))

    floor, there, ceiling = means(without), means(added), means(again)
    gain = ceiling - floor
    shares = (there - floor) / np.where(np.abs(gain) > 1e-6, gain, np.nan)
    known = shares[np.isfinite(shares)]
    return figure_of(known) if len(known) > 1 else Figure(0.0, 0.0, 0.0)


def held_against(
    name: str,
    figure: Mapping[str, float] | Figure,
    target: float,
    asked: Literal["mean", "surely"] = "mean",
) -> Target:
    """A figure that has to reach something."""
    of = figure if isinstance(figure, Figure) else Figure(**figure)
    reached = of.value if asked == "mean" else of.low
    holds = reached > target if asked == "surely" else reached >= target
    return Target(name, of.value, of.low, of.high, target, asked, bool(holds))


def targets(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every target of the sections that are there."""
    judged = f"alpha {JUDGED_ALPHA:g}"
    found: list[Target] = []

    def difference(of: Mapping[str, Any], one: str, other: str, what: str, alpha: str) -> Any:
        return of["differences"][f"{one} minus {other}"][alpha][what]

    if inside := result.get("in_distribution"):
        found.append(
            held_against(
                "in distribution: gated utility over the oracle's",
                inside["share_of_oracle"],
                MIN_ORACLE_SHARE,
            )
        )
        for other in (HINDSIGHT, PATH_1):
            figure = difference(inside, GATED, other, "utilities", judged)
            name = f"in distribution: gated minus {other}, utility"
            found.append(held_against(name, figure, 0.0, "surely"))
    if unseen := result.get("leave_one_domain_out"):
        of = unseen["all"]
        figure = difference(of, PATH_2, PATH_1, "scores", "alpha 0")
        found.append(
            held_against("unseen domain: path 2 minus path 1, score", figure, MIN_UNSEEN_GAIN)
        )
        for other in (BEST_SINGLE, HINDSIGHT):
            figure = difference(of, PATH_2, other, "scores", "alpha 0")
            found.append(held_against(f"unseen domain: path 2 minus {other}, score", figure, 0.0))
    for name, of in (("in distribution", inside), ("unseen domain", unseen and unseen["all"])):
        if of:
            for path in (PATH_1, PATH_2):
                figure = difference(of, GATED, path, "utilities", judged)
                found.append(held_against(f"{name}: gated minus {path}, utility", figure, 0.0))
            figure = of["steps_at_equal_cost"][judged]["cost"]
            found.append(
                held_against(f"{name}: four steps minus one at equal cost", figure, 0.0, "surely")
            )
    for name, of in result.get("growth", {}).items():
        found.append(
            held_against(f"growth by {name}: share of relearning", of["share"], MIN_GROWTH_SHARE)
        )
    for name, of in result.get("changes", {}).items():
        figure = difference(of, GATED, HINDSIGHT, "utilities", judged)
        found.append(held_against(f"{name}: gated minus best single, utility", figure, 0.0))
    return [asdict(target) for target in found]


def as_text(result: Mapping[str, Any]) -> str:
    """The targets, one per line."""
    return "".join(
        f"{'holds ' if row['holds'] else 'MISSED'} {row['name']}: {row['value']:+.4f} "
        f"({row['low']:+.4f} to {row['high']:+.4f}; {row['asked']} {row['target']:g})\n"
        for row in result["targets"]
    )


def _plain(units: Sequence[Unit], name: str, what: str, alpha: float) -> float:
    row = ALPHAS.index(alpha)
    return float(np.mean([unit.reached[name][what][row].mean() for unit in units]))


def _weights(rng: np.random.Generator, size: int) -> Array:
    """(1 + NUM_RESAMPLES, size) weights of a mean; the first row is the plain one."""
    counts = rng.multinomial(size, np.full(size, 1 / size), NUM_RESAMPLES)
    weights: Array = np.concatenate([np.ones((1, size)), counts]) / size
    return weights


def _envelope(costs: Array, scores: Array, at: float) -> float:
    """The best mean score of a mixture of two points whose mean cost is `at` or less."""
    order = np.argsort(costs, kind="stable")
    costs, scores = costs[order], np.maximum.accumulate(scores[order])
    hull: list[int] = []
    for place in range(len(costs)):
        while hull and costs[hull[-1]] >= costs[place] - 1e-12:
            hull.pop()
        while len(hull) > 1 and _is_below(costs, scores, hull[-2], hull[-1], place):
            hull.pop()
        hull.append(place)
    return float(np.interp(at, costs[hull], scores[hull]))


def _is_below(costs: Array, scores: Array, first: int, middle: int, last: int) -> bool:
    rise = (scores[last] - scores[first]) / (costs[last] - costs[first])
    return bool(scores[middle] <= scores[first] + rise * (costs[middle] - costs[first]))
