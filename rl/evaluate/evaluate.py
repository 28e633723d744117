"""`evaluate`: whether a candidate policy is better than the serving one, by held-out replay.

In come outcomes of (nearly) every pair on questions that no fit has seen, and the policies
themselves, of one step or several; out comes a report with intervals over the queries and a
verdict, which gates `atlas promote`.

Utility is the router's own, `(1 - alpha) * score - alpha * cost`, with the observed score and the
normalised mean cost of the pairs that ran. Nothing here is random but the seeded resamples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rl.evaluate.held_out import HeldOut, read_held_out
from rl.evaluate.importance_sampling import OffPolicyEstimate
from rl.evaluate.looked import LookFigures
from rl.evaluate.off_policy import (
    LoggedDecisions,
    LoggedTrajectories,
    estimate,
    estimate_trajectories,
)
from rl.evaluate.policies import BootstrapInterval, MultiStep, Reached, bootstrap, reach
from rl.evaluate.verified import VerifierFigures
from rl.profile.outcomes import Outcomes
from serve_app.router.rules.base import Deciding
from serve_app.router.rules.gate import NEAR_ORACLE
from serve_app.router.rules.utility import utility
from serve_app.schemas import Pair

CANDIDATE = "candidate"
SERVING = "serving"
PATH_1, PATH_2, VOI = "path_1", "path_2", "voi"
"""Names of the candidate's two paths alone, and of the rule `voi` with its verifier, where they are
among the others."""
COLD_START = "cold_start"
"""The cards alone, where it is among the others: nothing learned can be worth less."""
BEST_SINGLE = "best_single"
"""The pair with the best mean score on these very queries; the cheaper one of equals."""
RANDOM = "random"
"""A pair drawn uniformly: its expected value, not a draw."""
ORACLE = "oracle"
"""The pair of best utility on each query, in hindsight."""

INSIDE, OUTSIDE = "inside", "outside"
_NUM_BINS = 5
_ROUNDING = 1e-9
"""A difference smaller than this is none."""

_TRADES = np.geomspace(0.005, 10, 12)
SWEEP_ALPHAS = (0.0, *(float(trade / (1 + trade)) for trade in _TRADES), 1.0)
"""Evenly spread in the logarithm of what the cost weighs beside the score."""

_Values = dict[str, NDArray[np.float64]]
"""Contender to (num_queries, 4): score, cost in US dollars, utility, steps."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How policies are compared."""

    default_alpha: float = 0.1
    """The deployment's own; the verdict is given there and at 0."""
    alphas: tuple[float, ...] = (0.0, 0.02, 0.1, 0.3, 0.6, 0.9)
    """Also reported; 0 and the default are added."""
    sweep_alphas: tuple[float, ...] = SWEEP_ALPHAS
    """Points of the frontiers, beside the reported ones. Every alpha costs one decision per policy
    and query."""
    margin: float = 0.0
    """Utility that the candidate may be worse by without it mattering; 0 asks that it is better,
    see `judge`."""
    num_resamples: int = 2000
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Figures:
    """Means over queries of one contender, or of the candidate minus the serving policy."""

    score: BootstrapInterval
    cost_usd: BootstrapInterval
    """US dollars per query."""
    utility: BootstrapInterval
    steps: float = field(default=1.0, kw_only=True)
    """Runs of a pair or of the planner per request; 1 for a rule that decides once."""


@dataclass(frozen=True)
class Comparison:
    """Contenders on the same queries, at one alpha."""

    alpha: float
    num_queries: int
    contenders: dict[str, Figures]
    difference: Figures
    """Candidate minus serving, paired by query."""


@dataclass(frozen=True, slots=True)
class Point:
    """What a policy reaches at one alpha."""

    alpha: float | None
    """`None` where it does not depend on alpha."""
    cost_usd: float
    score: float


@dataclass(frozen=True, slots=True)
class Bin:
    """Decisions of like confidence."""

    num_queries: int
    confidence: float
    """Mean of what was stated."""
    share: float
    """Of the decisions that scored within `NEAR_ORACLE` of the best pair on their query."""


@dataclass(frozen=True)
class Reliability:
    """The candidate's confidence at the default alpha against what came of it."""

    bins: tuple[Bin, ...]
    """Fifths by confidence, ascending; fewer where many are equal."""
    error: float
    """Expected calibration error: mean distance of share and confidence, weighted by queries."""


@dataclass(frozen=True, slots=True)
class PromotionVerdict:
    """Whether the candidate may serve."""

    promote: bool
    reason: str
    """With the numbers it rests on."""


@dataclass(frozen=True)
class EvaluationReport:
    """All that is said of a candidate."""

    settings: EvaluationSettings
    num_queries: int
    """Held-out queries on which every pair was run."""
    num_dropped: int
    """Those on which one was not; they are left out."""
    coverage: dict[str, float]
    """Pair to the share of all held-out queries that it was run on."""
    best_single: str
    """The pair that `BEST_SINGLE` stands for."""
    at_alpha: tuple[Comparison, ...]
    """All contenders, every single pair among them, by ascending alpha."""
    domains: dict[str, Comparison]
    """Candidate, its paths alone, serving, cold start and best single at the default alpha; empty
    where no domain is known."""
    distribution: dict[str, Comparison]
    """The same `INSIDE` and `OUTSIDE` of what the candidate calls its distribution."""
    frontiers: dict[str, tuple[Point, ...]]
    """Cost and score of each policy and the oracle by ascending alpha, of `RANDOM` and of every
    pair alone."""
    reliability: Reliability
    verdict: PromotionVerdict
    off_policy: dict[str, OffPolicyEstimate] = field(default_factory=dict)
    """Of the candidate and the serving policy on logged decisions of path 1, where there were any
    and they decide once."""
    off_policy_requests: dict[str, OffPolicyEstimate] = field(default_factory=dict)
    """Of both on logged requests of path 2, where there were any."""
    verifier: dict[str, VerifierFigures] = field(default_factory=dict)
    """Of the candidate's verifier: `held_out` on the held-out answers, `new_questions` and
    `without <domain>` from its fit, on questions and domains that it did not see."""
    look: LookFigures | None = None
    """Of the candidate's first look, at the default alpha; `None`: it has none."""

    @property
    def at_default(self) -> Comparison:
        """The comparison at the deployment's own alpha."""
        return next(one for one in self.at_alpha if one.alpha == self.settings.default_alpha)

    def to_json(self) -> dict[str, Any]:
        """Plain objects, lists and finite numbers."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return plain


def evaluate(
    outcomes: Outcomes,
    domains: Sequence[str],
    candidate: Deciding | MultiStep,
    serving: Deciding | MultiStep,
    *,
    others: Mapping[str, Deciding | MultiStep] | None = None,
    logged: LoggedDecisions | None = None,
    logged_requests: LoggedTrajectories | None = None,
    stepping: Mapping[str, Deciding] | None = None,
    settings: EvaluationSettings | None = None,
) -> EvaluationReport:
    """Hold a candidate policy against the serving one.

    Args:
        outcomes: Of held-out questions, on which (nearly) every pair was run.
        domains: (num_queries,) may be empty strings.
        candidate: What may serve next. No policy may explore while it is evaluated.
        serving: What answers now.
        others: More policies by name, for example `COLD_START` or `PATH_1`; they do not count for
            the verdict.
        logged: Traffic, for the off-policy estimate of what decides once.
        logged_requests: Traffic of several steps, for that of `stepping`.
        stepping: What decides the steps of a request, by the policy's name.
        settings: How they are compared.

    Raises:
        ConfigError: If fewer than 20 queries have every pair's outcome, or a policy is
            of another encoder, knows none of the pairs, or explores.
    """
    settings = settings or EvaluationSettings()
    held_out = read_held_out(outcomes, domains)
    policies = {CANDIDATE: candidate, SERVING: serving, **(others or {})}
    reported = sorted({0.0, settings.default_alpha, *settings.alphas})
    asked = sorted({*reported, *settings.sweep_alphas})
    reached = {name: reach(name, policy, held_out, asked) for name, policy in policies.items()}
    at_alpha = tuple(
        _compare(_values(held_out, reached, asked.index(alpha), alpha), alpha, settings)
        for alpha in reported
    )
    at_default = asked.index(settings.default_alpha)
    inside = reached[CANDIDATE].inside[at_default]
    values = _values(held_out, reached, at_default, settings.default_alpha)
    grouped = (CANDIDATE, SERVING, PATH_1, PATH_2, VOI, COLD_START, BEST_SINGLE)
    values = {name: values[name] for name in grouped if name in values}
    off_policy = {}
    if logged is not None:
        off_policy = {
            name: estimate(
                name,
                policy,
                logged,
                settings.default_alpha,
                num_resamples=settings.num_resamples,
                seed=settings.seed,
            )
            for name, policy in ((CANDIDATE, candidate), (SERVING, serving))
            if not isinstance(policy, MultiStep)
        }
    off_policy_requests = {}
    if logged_requests is not None:
        off_policy_requests = {
            name: estimate_trajectories(
                name,
                rule,
                logged_requests,
                num_resamples=settings.num_resamples,
                seed=settings.seed,
            )
            for name, rule in (stepping or {}).items()
        }
    return EvaluationReport(
        settings=settings,
        num_queries=len(held_out.scores),
        num_dropped=held_out.num_dropped,
        coverage=held_out.coverage,
        best_single=str(held_out.pairs[held_out.best_single()]),
        at_alpha=at_alpha,
        domains=_groups(values, held_out.domains, settings) if any(domains) else {},
        distribution=_groups(values, np.where(inside, INSIDE, OUTSIDE), settings),
        frontiers=_frontiers(held_out, reached, asked),
        reliability=_reliability(held_out, reached[CANDIDATE], at_default),
        verdict=judge({one.alpha: one.difference.utility for one in at_alpha}, settings),
        off_policy=off_policy,
        off_policy_requests=off_policy_requests,
    )


def judge(
    differences: Mapping[float, BootstrapInterval], settings: EvaluationSettings
) -> PromotionVerdict:
    """Whether a candidate may serve: on the configured objective it is better with confidence.

    At the default alpha the 95% interval of its utility minus the serving policy's has to begin
    above `-margin`; above 0, so surely better, where there is no margin. At alpha 0, which any
    caller may ask for, it must not end below `-margin`: surely worse answers are no gain.

    Args:
        differences: Alpha to the paired difference in utility; has 0 and the default alpha.
        settings: The margin and the default alpha.
    """
    default, bound = settings.default_alpha, 0.0 - settings.margin
    said = {alpha: f"utility {differences[alpha]} at alpha {alpha:g}" for alpha in (default, 0.0)}
    faults = []
    if differences[default].low <= bound + _ROUNDING:
        faults.append(f"{said[default]}, which does not begin above {bound:g}")
    if differences[0.0].high < bound - _ROUNDING:
        faults.append(f"{said[0.0]}, which ends below {bound:g}")
    return PromotionVerdict(not faults, "; ".join(faults or said.values()))


def show(report: EvaluationReport, console: Console) -> None:
    """Print the comparison at the default alpha, the difference and the verdict."""
    shown = report.at_default
    dropped = f", {report.num_dropped} left out" if report.num_dropped else ""
    title = f"{report.num_queries} held-out queries{dropped}, alpha {shown.alpha:g}"
    table = Table("", title=title, title_justify="left")
    for heading in ("score", "$ per 1000", "utility", "steps"):
        table.add_column(heading, no_wrap=True)
    for name, figures in shown.contenders.items():
        if not Pair.is_name(name):
            table.add_row(name.replace("_", " "), *_cells(figures, ""))
    table.add_row("difference", *_cells(shown.difference, "+"), style="bold")
    console.print(table)
    outside = report.distribution.get(OUTSIDE)
    share = outside.num_queries / report.num_queries if outside else 0.0
    console.print(
        f"best single: {report.best_single}; {share:.0%} out of distribution; calibration error "
        f"{report.reliability.error:.3f}",
        highlight=False,
    )
    for where, estimates in (
        ("logged decisions of path 1", report.off_policy),
        ("logged requests of path 2", report.off_policy_requests),
    ):
        for name, known in estimates.items():
            console.print(f"{name} on {where}: {escape(_estimated(known))}", highlight=False)
    for name, of in report.verifier.items():
        console.print(f"verifier, {name}: {escape(_verified(of))}", highlight=False)
    if report.look is not None:
        told = f"decides {report.look.share:.0%}, utility {report.look.difference}"
        console.print(f"first look: {escape(told)}", highlight=False)
    word = "[green]may serve[/green]" if report.verdict.promote else "[red]refused[/red]"
    console.print(f"{word}: {escape(report.verdict.reason)}", highlight=False)


def _verified(of: VerifierFigures) -> str:
    within = ", ".join(
        f"{'none' if auc is None else f'{auc:.3f}'} within a {group}"
        for group, auc in (
            ("candidate", of.auc_within_candidate),
            ("question", of.auc_within_question),
        )
    )
    return (
        f"AUC {within}; Brier {of.brier:.3f} (candidates' rates {of.brier_of_rate:.3f}), "
        f"calibration error {of.calibration_error:.3f}; the likeliest of all answers scores "
        f"{of.chosen:.3f}, the best {of.best:.3f}"
    )


def _estimated(known: OffPolicyEstimate) -> str:
    if known.score is None or known.doubly_robust is None:
        return f"unknown: {known.reason}"
    return (
        f"{_spread(known.score, '')}, doubly robust {_spread(known.doubly_robust, '')}, "
        f"from {known.effective_size:.0f} effective requests"
    )


def _cells(figures: Figures, sign: str) -> list[str]:
    score, utility = (escape(_spread(part, sign)) for part in (figures.score, figures.utility))
    return [
        score,
        f"{1000 * figures.cost_usd.mean:{sign}.3g}",
        utility,
        f"{figures.steps:{sign}.2f}",
    ]


def _spread(part: BootstrapInterval, sign: str) -> str:
    return f"{part.mean:{sign}.3f} [{part.low:{sign}.3f}, {part.high:{sign}.3f}]"


def _values(held_out: HeldOut, reached: Mapping[str, Reached], row: int, alpha: float) -> _Values:
    """What every contender reaches on each query at one alpha, which is row `row` of `reached`."""
    size = len(held_out.scores)
    values = {}
    for name, of in reached.items():
        gained = utility(alpha, of.score[row], of.cost[row])
        columns = (of.score[row], of.costs_usd[row], gained, of.steps[row])
        values[name] = np.stack(columns, axis=1)
    single = held_out.best_single()
    alone = [held_out.values(np.full(size, column), alpha) for column in range(len(held_out.cost))]
    values[BEST_SINGLE] = alone[single]
    values[RANDOM] = np.mean(alone, axis=0)
    values[ORACLE] = held_out.values(held_out.oracle(alpha), alpha)
    return values | {str(pair): of for pair, of in zip(held_out.pairs, alone, strict=True)}


def _compare(values: _Values, alpha: float, settings: EvaluationSettings) -> Comparison:
    difference = values[CANDIDATE] - values[SERVING]
    columns = np.concatenate([*values.values(), difference], axis=1)
    intervals = bootstrap(columns, settings.num_resamples, settings.seed)
    *figures, between = (
        Figures(*intervals[start : start + 3], steps=intervals[start + 3].mean)
        for start in range(0, len(intervals), 4)
    )
    return Comparison(
        alpha=alpha,
        num_queries=len(columns),
        contenders=dict(zip(values, figures, strict=True)),
        difference=between,
    )


def _groups(
    values: _Values, labels: NDArray[np.str_], settings: EvaluationSettings
) -> dict[str, Comparison]:
    """The comparison at the default alpha on the queries of each label."""
    return {
        str(label): _compare(
            {name: of[labels == label] for name, of in values.items()},
            settings.default_alpha,
            settings,
        )
        for label in np.unique(labels)
    }


def _frontiers(
    held_out: HeldOut, reached: Mapping[str, Reached], alphas: Sequence[float]
) -> dict[str, tuple[Point, ...]]:
    rows = np.arange(len(held_out.scores))
    best = np.stack([held_out.oracle(alpha) for alpha in alphas])
    sweeps = {name: (of.costs_usd, of.score) for name, of in reached.items()}
    sweeps[ORACLE] = (held_out.costs_usd[rows, best], held_out.scores[rows, best])
    frontiers: dict[str, tuple[Point, ...]] = {}
    for name, sweep in sweeps.items():
        points: list[Point] = []
        for alpha, *means in zip(alphas, *(of.mean(axis=1).tolist() for of in sweep), strict=True):
            if not points or [points[-1].cost_usd, points[-1].score] != means:
                points.append(Point(alpha, *means))
        frontiers[name] = tuple(points)
    scores, costs_usd = held_out.scores.mean(axis=0), held_out.costs_usd.mean(axis=0)
    frontiers[RANDOM] = (Point(None, float(costs_usd.mean()), float(scores.mean())),)
    for pair, cost_usd, score in zip(held_out.pairs, costs_usd, scores, strict=True):
        frontiers[str(pair)] = (Point(None, float(cost_usd), float(score)),)
    return frontiers


def _reliability(held_out: HeldOut, reached: Reached, row: int) -> Reliability:
    scores, confidence = held_out.scores, reached.confidence[row]
    is_right = reached.score[row] >= scores.max(axis=1) - NEAR_ORACLE
    edges = np.unique(np.quantile(confidence, np.linspace(0, 1, _NUM_BINS + 1)))
    place = np.searchsorted(edges[1:-1], confidence, side="right")
    bins = tuple(
        Bin(int(part.sum()), float(confidence[part].mean()), float(is_right[part].mean()))
        for part in (place == number for number in np.unique(place))
    )
    error = sum(one.num_queries * abs(one.share - one.confidence) for one in bins) / len(scores)
    return Reliability(bins, error)
