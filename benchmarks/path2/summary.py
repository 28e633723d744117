"""From units to figures with intervals, and what they are held against.

Intervals resample seeds, domains and questions alike (the mean over all is what is claimed), with
the same questions for all contenders, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.path2.baselines import CASCADE, KNN, RIDGE, TOP_P
from benchmarks.path2.units import (
    ALPHAS,
    BEST_SINGLE,
    COLD_START,
    GATED,
    HINDSIGHT,
    ONE_CHOICE,
    ONE_STEP,
    ORACLE,
    PATH_1,
    PATH_2,
    TEACHER,
    VOI,
    Unit,
    joined,
)

Array = NDArray[np.float64]

REPORTED = (0.0, 0.1, 0.3)
JUDGED_ALPHA = 0.3
NUM_RESAMPLES = 1000

MIN_GAIN = 0.03
MIN_SAVING = 0.20
MAX_LOSS = 0.005
MIN_AUC = 0.70
MAX_P = 0.05
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

    `surely` asks it of the whole interval, `mean` of its middle; `covered` that it lies within.
    """

    name: str
    value: float
    low: float
    high: float
    target: float
    asked: Literal["mean", "surely", "covered"]
    holds: bool
    p: float | None = None
    """Two-sided, of a claimed difference."""


class Resamples:
    """The same resamples of seeds and questions for everything that is said of some units."""

    def __init__(
        self, units: Sequence[Unit], seed: int = 0, groups: Sequence[str] | None = None
    ) -> None:
        """Draw them; all units are of the same questions.

        Args:
            units: One per seed.
            seed: Of the draws.
            groups: (num_questions,) the domain of each; whole domains are drawn, and questions
                within them. `None`: the questions alone.
        """
        self._units = units
        rng = np.random.default_rng(seed)
        num_seeds, num_queries = len(units), units[0].score(PATH_1, 0.0).size
        self._seeds = _weights(rng, num_seeds)
        self._queries = _weights(rng, num_queries)
        if groups is not None and len(set(groups)) > 1:
            self._queries *= _group_weights(rng, np.asarray(groups))
            self._queries /= self._queries.sum(axis=1, keepdims=True)

    def means(self, values: Array) -> Array:
        """(1 + NUM_RESAMPLES,) means of (num_seeds, num_questions); the first is the plain one."""
        means: Array = ((self._seeds @ values) * self._queries).sum(axis=1)
        return means

    def figure(self, values: Array) -> dict[str, float]:
        """Mean and interval of (num_seeds, num_questions)."""
        return asdict(figure_of(self.means(values)))

    def p(self, values: Array) -> float:
        """Two-sided p-value that the mean of (num_seeds, num_questions) is 0, by the resamples."""
        draws = self.means(values)[1:]
        tail = min((draws <= 0).mean(), (draws >= 0).mean())
        return float(min(1.0, 2 * (tail * len(draws) + 1) / (len(draws) + 1)))

    def saving(self, name: str, other: str) -> Figure:
        """Share of the dollars that one saves where it is as good as another is at alpha 0.

        What reaches the other's mean score at the least mean dollars is the best mixture of two of
        its own alphas; -1 where that takes twice the dollars and more, or nothing reaches it.
        """
        saved = []
        for draw in range(len(self._queries)):
            points: dict[str, tuple[Array, Array]] = {}
            for who in (name, other):
                usd, score = (
                    np.einsum(
                        "s,saq,q->a",
                        self._seeds[draw],
                        np.stack([unit.reached[who][what] for unit in self._units]),
                        self._queries[draw],
                    )
                    for what in ("costs_usd", "score")
                )
                points[who] = usd, score
            usd, score = points[other]
            needed = _least_cost(*points[name], float(score[0]))
            saved.append(max(1 - needed / float(usd[0]), -1.0))
        return figure_of(np.array(saved))

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


def best_one_choice(units: Sequence[Unit]) -> str:
    """Who chooses once and reaches the highest mean score at alpha 0, on these very questions."""
    names = [name for name in (*ONE_CHOICE, COLD_START) if name in units[0].reached]
    return max(names, key=lambda name: scores(units, name, 0.0).mean())


def contenders(units: Sequence[Unit], of: Resamples) -> dict[str, Any]:
    """Score, utility, cost and steps of everyone at the reported alphas."""
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


def differences(
    units: Sequence[Unit], pairs: Sequence[tuple[str, str]], of: Resamples
) -> dict[str, Any]:
    """Score and utility of one contender minus those of another, at the reported alphas."""
    there = units[0].reached
    return {
        f"{one} minus {other}": {
            f"alpha {alpha:g}": {
                what.__name__: of.figure(what(units, one, alpha) - what(units, other, alpha))
                for what in (scores, utilities)
            }
            for alpha in REPORTED
        }
        for one, other in pairs
        if one in there and other in there
    }


COMPARED = (
    *((GATED, other) for other in (VOI, COLD_START, KNN, RIDGE, TOP_P, CASCADE, TEACHER)),
    (VOI, PATH_1),
    (VOI, COLD_START),
    (GATED, PATH_1),
    (GATED, PATH_2),
    (PATH_2, PATH_1),
    (GATED, BEST_SINGLE),
    (GATED, HINDSIGHT),
    (PATH_2, BEST_SINGLE),
    (PATH_2, HINDSIGHT),
    (PATH_2, ONE_STEP),
)


def section(units: Sequence[Unit], groups: Sequence[str] | None = None) -> dict[str, Any]:
    """All that is said of some units of the same questions.

    Args:
        units: One per seed.
        groups: As of `Resamples`.
    """
    of = Resamples(units, groups=groups)
    best = best_one_choice(units)
    return {
        "num_seeds": len(units),
        "num_questions": int(units[0].score(PATH_1, 0.0).size),
        "contenders": contenders(units, of),
        "differences": differences(units, COMPARED, of),
        "best_one_choice": {
            "name": best,
            "difference": of.figure(scores(units, GATED, 0.0) - scores(units, best, 0.0)),
            "p": of.p(scores(units, GATED, 0.0) - scores(units, best, 0.0)),
            "saving": asdict(of.saving(GATED, best)),
        },
        "p_over_path_1": of.p(scores(units, GATED, 0.0) - scores(units, PATH_1, 0.0)),
        "hypervolume": {name: _hypervolume(units, name) for name in units[0].reached},
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
    """The primary comparisons of the sections that are there, and what growth and changes ask.

    At most six are primary. Those that claim a difference hold where it is large enough and its
    p-value, by Holm's correction over all primary ones, is below 0.05.
    """
    primary: list[Target] = []
    if inside := result.get("in_distribution"):
        of = inside["best_one_choice"]
        name = f"in distribution: gated minus {of['name']} (the best one choice), score at alpha 0"
        primary.append(_claimed(name, of, MIN_GAIN))
        name = f"in distribution: dollars saved at the score of {of['name']}"
        primary.append(held_against(name, of["saving"], MIN_SAVING))
    if unseen := result.get("leave_one_domain_out"):
        primary += _of_unseen(unseen)
    if tables := result.get("tables"):
        worst = min(
            (of["differences"][f"{GATED} minus {PATH_1}"]["alpha 0"]["scores"]
             for parts in tables.values() for of in _sections(parts)),
            key=lambda figure: figure["value"],
        )  # fmt: skip
        name = "real tables: gated minus path 1, score at alpha 0, the worst"
        primary.append(held_against(name, worst, -MAX_LOSS))
    found = _corrected(primary)
    judged = f"alpha {JUDGED_ALPHA:g}"
    for name, of in result.get("growth", {}).items():
        found.append(
            held_against(f"growth by {name}: share of relearning", of["share"], MIN_GROWTH_SHARE)
        )
    for name, of in result.get("changes", {}).items():
        figure = of["differences"][f"{GATED} minus {HINDSIGHT}"][judged]["utilities"]
        found.append(held_against(f"{name}: gated minus best single, utility", figure, 0.0))
    if live := result.get("live"):
        figure = Figure(**live["live_minus_replay"]["score"])
        found.append(
            Target(
                f"live minus replay, score of {live['num_questions']} requests",
                figure.value,
                figure.low,
                figure.high,
                0.0,
                "covered",
                figure.low <= 0.0 <= figure.high,
            )
        )
    return [asdict(target) for target in found]


def _of_unseen(unseen: Mapping[str, Any]) -> list[Target]:
    """What is asked of domains that were left out."""
    found = []
    over_cards = {
        domain: of["differences"][f"{GATED} minus {COLD_START}"]["alpha 0"]["scores"]
        for domain, of in unseen["domains"].items()
        if f"{GATED} minus {COLD_START}" in of["differences"]
    }
    if over_cards:
        # Not surely below: the upper end decides.
        domain = min(over_cards, key=lambda name: over_cards[name]["high"])
        high = over_cards[domain]["high"]
        name = f"unseen domain: gated minus cold start, upper end, the worst ({domain})"
        found.append(held_against(name, Figure(high, high, high), 0.0))
    whole = unseen["all"]
    over_path_1 = {
        "difference": whole["differences"][f"{GATED} minus {PATH_1}"]["alpha 0"]["scores"],
        "p": whole["p_over_path_1"],
    }
    found.append(_claimed("unseen domains: gated minus path 1, score at alpha 0", over_path_1, 0.0))
    told = unseen.get("told_apart")
    if told is not None:
        best = told["best_one_choice"]
        name = (
            f"unseen domains of verifier AUC {MIN_AUC:g} and more: gated minus {best['name']}, "
            "score at alpha 0"
        )
        found.append(_claimed(name, best, MIN_GAIN))
    return found


def _sections(parts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = [parts["in_distribution"]]
    if "leave_one_task_out" in parts:
        found.append(parts["leave_one_task_out"]["all"])
    return found


def _claimed(name: str, of: Mapping[str, Any], target: float) -> Target:
    """A difference that has to be as large as the target, and surely above nothing."""
    figure = Figure(**of["difference"])
    holds = figure.value >= target and figure.value > 0
    return Target(
        name, figure.value, figure.low, figure.high, target, "surely", holds, float(of["p"])
    )


def _corrected(primary: list[Target]) -> list[Target]:
    """With Holm's p-values (1979) in place of their own; those of 0.05 and more do not hold."""
    claims = sorted(
        (target for target in primary if target.p is not None), key=lambda of: of.p or 0.0
    )
    corrected: dict[str, float] = {}
    least = 0.0
    for rank, target in enumerate(claims):
        assert target.p is not None
        least = max(least, min(1.0, (len(claims) - rank) * target.p))
        corrected[target.name] = least
    return [
        replace(of, p=corrected[of.name], holds=of.holds and corrected[of.name] < MAX_P)
        if of.name in corrected
        else of
        for of in primary
    ]


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


def _group_weights(rng: np.random.Generator, groups: NDArray[np.str_]) -> Array:
    """(1 + NUM_RESAMPLES, num_questions) how often each question's group is drawn."""
    names, place = np.unique(groups, return_inverse=True)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), NUM_RESAMPLES)
    drawn: Array = np.concatenate([np.ones((1, len(names))), counts])[:, place]
    return drawn


def _least_cost(costs: Array, scores: Array, wanted: float) -> float:
    """The least mean cost at which the best mixture of two points reaches a mean score."""
    if scores.max() < wanted:
        return float("inf")
    reach = [float(costs[row]) for row in range(len(costs)) if scores[row] >= wanted]
    for low in range(len(costs)):
        for high in range(len(costs)):
            if scores[low] < wanted <= scores[high] and costs[low] < costs[high]:
                share = (wanted - scores[low]) / (scores[high] - scores[low])
                reach.append(float(costs[low] + share * (costs[high] - costs[low])))
    return min(reach)


def _hypervolume(units: Sequence[Unit], name: str) -> float:
    """Mean score reached for so many dollars, over all dollars up to the oracle's most.

    The area under the staircase of the points by alpha, dollars on a linear scale.
    """
    usd, score = (
        np.mean([unit.reached[name][what].mean(axis=1) for unit in units], axis=0)
        for what in ("costs_usd", "score")
    )
    most = max(float(unit.reached[ORACLE]["costs_usd"].mean(axis=1).max()) for unit in units)
    order = np.argsort(usd, kind="stable")
    edges = np.concatenate([[0.0], np.minimum(usd[order], most), [most]])
    heights = np.concatenate([[0.0], np.maximum.accumulate(score[order])])
    return float((np.diff(edges) * heights).sum() / most)


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
