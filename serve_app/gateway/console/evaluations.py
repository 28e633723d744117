"""What is shown of policies: an evaluation, a training, and trials beside what serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve_app.gateway.console.shaping import IntervalBar, share_of
from serve_app.schemas import Pair
from serve_app.store import Job, Mode, Policy
from serve_app.store.choices import Choices, ShadowChoices

Json = dict[str, Any]

_FREE_SHARE = 0.1
"""Of the least price: where a logarithmic axis shows what is free."""
_ALONE = "one pair alone"
_MAX_TRAININGS = 2


@dataclass(frozen=True, slots=True)
class Contender:
    """What one policy reached in an evaluation: means, and the 95% interval of the utility."""

    name: str
    utility: IntervalBar
    score: float
    cost_usd: float


def comparison(report: Json) -> list[Contender]:
    """The contenders of an evaluation at the deployment's own alpha, the best first.

    Of a report that another version wrote, what cannot be read is not shown.
    """
    try:
        alpha = report["settings"]["default_alpha"]
        figures = next(one for one in report["at_alpha"] if one["alpha"] == alpha)["contenders"]
        contenders = [
            Contender(
                name,
                IntervalBar(*(float(of["utility"][end]) for end in ("mean", "low", "high"))),
                float(of["score"]["mean"]),
                float(of["cost_usd"]["mean"]),
            )
            for name, of in figures.items()
        ]
    except (KeyError, TypeError, ValueError, StopIteration):
        return []
    return sorted(contenders, key=lambda one: -one.utility.middle)


def pareto_chart(report: Json) -> Json | None:
    """What each policy reaches at which price while alpha rises, and what each pair does alone.

    `None` for a report without frontiers.
    """
    try:
        curves = {
            name: [(float(point["cost_usd"]), float(point["score"])) for point in points]
            for name, points in report["frontiers"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    paid = [cost for points in curves.values() for cost, _ in points if cost > 0]
    free_usd = min(paid, default=1.0) * _FREE_SHARE
    lines: dict[str, dict[float, float]] = {}
    for name, points in curves.items():
        line = lines.setdefault(_ALONE if Pair.is_name(name) else name, {})
        for cost, score in points:
            at = max(cost, free_usd)
            line[at] = max(score, line.get(at, score))
    if _ALONE in lines:
        lines[_ALONE] = lines.pop(_ALONE)  # last, so that the lines have the first colours
    costs = sorted({cost for line in lines.values() for cost in line})
    return {
        "title": "Score by dollars a question",
        "unit": "",
        "x": {"label": "dollars a question", "unit": "$", "is_log": True},
        "times": costs,
        "series": [
            {
                "label": name.replace("_", " "),
                "values": [line.get(cost) for cost in costs],
                "is_scattered": name == _ALONE,
            }
            for name, line in lines.items()
        ],
        "lines": [],
    }


def training_charts(jobs: Sequence[Job]) -> list[Json]:
    """The curves of the trainings under way; where there is none, of the last one."""
    trainings = [job for job in jobs if len(job.progress.get("curve") or ()) > 1]
    running = [job for job in trainings if not job.is_over]
    return [_training_chart(job) for job in (running or trainings[:1])[:_MAX_TRAININGS]]


def _training_chart(job: Job) -> Json:
    curve = job.progress["curve"]
    named = {"return of an episode": "mean_return", "utility on questions apart": "utility"}
    return {
        "title": f"Training {job.job_id}",
        "unit": "",
        "x": {"label": "iteration", "unit": "", "is_log": False},
        "times": [point["iteration"] for point in curve],
        "series": [
            {"label": label, "values": [point.get(name) for point in curve]}
            for label, name in named.items()
        ],
        "lines": [],
    }


@dataclass(frozen=True, slots=True)
class Standing:
    """What one of several policies that run at once did, since the trials began."""

    policy: Policy
    requests: int
    error_share: float | None
    """`None`: it decides nothing, or decided nothing yet; so with the others."""
    cost_usd: float | None
    """Mean of a request."""
    seconds: float | None
    """Mean of a request."""
    confidence: float | None
    """Mean."""
    agreed: float | None
    """Of a policy in the shadow: share of the requests that it would have sent where they went."""
    verdicts: int
    """Of a policy in the shadow: on those requests."""
    win_rate: IntervalBar | None


def standing(
    policy: Policy, choices: Choices | None, would_be: Sequence[ShadowChoices]
) -> Standing:
    """One row of the comparison.

    Args:
        policy: Serves, or is on trial.
        choices: What it decided.
        would_be: What it would have decided, where it is in the shadow.
    """
    if policy.mode is Mode.SHADOW:
        count = sum(one.requests for one in would_be)
        verdicts, wins = sum(one.verdicts for one in would_be), sum(one.wins for one in would_be)
        confidence = (
            sum(one.confidence * one.requests for one in would_be) / count if count else None
        )
        agreed = sum(one.agreed for one in would_be) / count if count else None
        return Standing(
            policy, count, None, None, None, confidence, agreed, verdicts, share_of(wins, verdicts)
        )
    if choices is None or not choices.requests:
        return Standing(policy, 0, None, None, None, None, None, 0, None)
    count = choices.requests
    return Standing(
        policy,
        count,
        choices.errors / count,
        choices.cost_usd / count,
        choices.seconds / count,
        choices.confidence / count,
        None,
        choices.verdicts,
        share_of(choices.wins, choices.verdicts),
    )


def reason_of(report: Mapping[str, Any]) -> str:
    """Why an evaluation spoke for its candidate, or against it."""
    verdict = report.get("verdict")
    return str(verdict.get("reason", "")) if isinstance(verdict, dict) else ""
