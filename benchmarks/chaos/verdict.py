"""What the answers and the actions say, and what it is held against."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.chaos.actions import Done
from benchmarks.chaos.load import Answer
from benchmarks.stats import Target, percentile

GRACE_MS = 250.0
"""How long after its deadline a request may end."""
WHOLE_S = 60.0
MIN_SUCCESS = 0.999
FAILURES_SHOWN = 40

_KILLS = frozenset(
    {
        "kill gateway",
        "kill router",
        "kill embedder",
        "kill engine",
        "kill tool worker",
        "kill controller",
        "kill Serve's controller",
        "kill vLLM",
        "remove node",
    }
)


@dataclass
class Phase:
    """A part of the run."""

    name: str
    began_unix_s: float
    ended_unix_s: float = 0.0
    actions: list[Done] = field(default_factory=list)

    def answers(self, answers: Sequence[Answer]) -> list[Answer]:
        """Those to requests that began in it."""
        return [a for a in answers if self.began_unix_s <= a.began_unix_s < self.ended_unix_s]


@dataclass(frozen=True)
class Orphans:
    """What was left at the end that nobody wants."""

    applications: tuple[str, ...]
    tasks: tuple[str, ...]
    processes: tuple[str, ...]


def struck_by(answer: Answer, actions: Sequence[Done]) -> Done | None:
    """The kill that a request was in flight at, if any: it may have been on that process."""
    for action in actions:
        if (
            action.name in _KILLS
            and answer.began_unix_s <= action.done_unix_s
            and answer.ended_unix_s >= action.began_unix_s
        ):
            return action
    return None


def figures(phase: Phase, answers: Sequence[Answer], deadline_s: float) -> dict[str, Any]:
    """Counts and times of a phase.

    Args:
        phase: Which.
        answers: All of the run.
        deadline_s: Of each request.
    """
    own = phase.answers(answers)
    failed = [answer for answer in own if answer.failed]
    in_flight = [answer for answer in own if struck_by(answer, phase.actions)]
    whole = [answer.latency_ms for answer in own if not answer.failed]
    return {
        "phase": phase.name,
        "seconds": phase.ended_unix_s - phase.began_unix_s,
        "requests": len(own),
        "streamed": sum(answer.streamed for answer in own),
        "failed": len(failed),
        "success": 1 - len(failed) / len(own) if own else 0.0,
        "in_flight_at_a_kill": len(in_flight),
        "failed_in_flight_at_a_kill": sum(answer.failed for answer in in_flight),
        "failed_otherwise": sum(not struck_by(answer, phase.actions) for answer in failed),
        "endings": dict(Counter(answer.ending for answer in own)),
        "too_late": sum(a.latency_ms > deadline_s * 1e3 + GRACE_MS for a in own),
        "latency_ms": {f"p{share}": percentile(whole, share) for share in (50, 95, 99, 100)},
        "failures": [
            asdict(answer)
            | {
                "after_s": answer.began_unix_s - phase.began_unix_s,
                "last_action": _last_action(answer, phase.actions),
            }
            for answer in failed[:FAILURES_SHOWN]
        ],
        "actions": [
            asdict(action) | {"after_s": action.began_unix_s - phase.began_unix_s}
            for action in phase.actions
        ],
    }


def _last_action(answer: Answer, actions: Sequence[Done]) -> str:
    """What had begun last when a request ended."""
    before = [action for action in actions if action.began_unix_s <= answer.ended_unix_s]
    return f"{before[-1].name} ({before[-1].what})" if before else ""


def cut_streams(answers: Sequence[Answer], actions: Sequence[Done]) -> tuple[int, int]:
    """Streams that broke off without an error event.

    Returns:
        Those that the process which writes the stream may have died under (a gateway was killed, or
        a node removed, while they ran), and all others.
    """
    writers = [action for action in actions if action.name in ("kill gateway", "remove node")]
    cut = [a for a in answers if a.streamed and a.status == 200 and a.ending == "cut"]
    without_writer = sum(struck_by(answer, writers) is not None for answer in cut)
    return without_writer, len(cut) - without_writer


def slowest(actions: Iterable[Done]) -> float:
    """Seconds until everything was whole again after any of these, at most."""
    return max((a.whole_s if a.whole_s is not None else math.inf for a in actions), default=0.0)


def targets(
    calm: dict[str, Any] | None,
    storm: dict[str, Any] | None,
    phases: Sequence[Phase],
    answers: Sequence[Answer],
    orphans: Orphans,
    min_calm_requests: int,
) -> list[Target]:
    """What is held against what.

    Args:
        calm: Figures of the phase without faults.
        storm: Figures of the phase with faults.
        phases: All of them.
        answers: All of the run.
        orphans: What was left.
        min_calm_requests: The fewest that count.
    """
    held = []
    if calm is not None:
        held += [
            Target("without faults: requests", float(calm["requests"]), ">=",
                   float(min_calm_requests)),
            Target("without faults: failed", float(calm["failed"]), "<=", 0.0),
        ]  # fmt: skip
    if storm is not None:
        held += [
            Target("share of requests answered", storm["success"], ">=", MIN_SUCCESS),
            Target("failed, not in flight at a kill", float(storm["failed_otherwise"]), "<=", 0.0),
        ]
    actions = [action for phase in phases for action in phase.actions]
    late = sum(part["too_late"] for part in (calm, storm) if part is not None)
    held += [
        Target("ended later than deadline + 250 ms", float(late), "<=", 0.0),
        Target("streams cut without an error event, their writer alive",
               float(cut_streams(answers, actions)[1]), "<=", 0.0),
        Target("slowest until everything was whole again after a fault, s",
               slowest(action for action in actions if action.is_fault), "<=", WHOLE_S),
        Target("changes that never came to their end",
               float(sum(action.whole_s is None for action in actions)), "<=", 0.0),
        Target("orphan applications", float(len(orphans.applications)), "<=", 0.0),
        Target("orphan tasks", float(len(orphans.tasks)), "<=", 0.0),
        Target("orphan processes", float(len(orphans.processes)), "<=", 0.0),
    ]  # fmt: skip
    return held
