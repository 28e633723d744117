"""One question to the router: requests in, a decision for each out, whatever rule answers.

`RoutingRequest` travels from the orchestrator to a router replica; the replica adds the pool and
hands a `Batch` to a `Rule`. A candidate is a `Pair` everywhere, a pattern's too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import AtlasError, NoCandidate
from serve_app.router.rules.admission import NO_ABILITIES, Abilities
from serve_app.schemas import Decision, Limits, Pair, Seen

if TYPE_CHECKING:  # the rules import this module
    from serve_app.router.rules.clusters import ClusterRule
    from serve_app.router.snapshots.snapshot import RouterSnapshot

Answer = Decision | AtlasError
"""What a request gets: its decision, or the reason why there is none."""

UNKNOWN: NDArray[np.float32] = np.empty(0, np.float32)
"""Stands for an embedding that is not known."""
_NUM_CANDIDATES = 16
"""More than any request may try."""


@dataclass(frozen=True, slots=True)
class RoutingRequest:
    """One request that asks what to do next."""

    embedding: NDArray[np.float32]
    """(dim,) L2-normalised, of the query; `UNKNOWN` where the text is the query."""
    limits: Limits
    """Needs, dollars and steps of the whole request; seconds from now on."""
    history: tuple[Seen, ...] = ()
    """What its steps showed, in their order; empty for a new request."""
    last_answer: NDArray[np.float32] | None = None
    """(dim,) embedding of what the pair that ran last answered; `None`: it gave no answer."""
    answers: tuple[NDArray[np.float32] | None, ...] = ()
    """(dim,) embedding of each step's answer, as far as they are known."""
    explain: bool = False
    """Whether to name every candidate, and what the profile holds like the query."""
    request_id: str | None = None
    """Decides whether a canary gets the request; `None`: no canary does."""
    policy_version: int | None = None
    """Of the policy that the request began with; `None` for a new one."""
    as_fitted: bool = False
    """Whether the policy decides without what it learned since it was fitted, and without chance;
    `policy_version` may name it for a new request too."""
    text: str | None = None
    """What is not embedded yet: the query of a new request, or the last answer of one under way."""
    was_unsure: bool = False
    """Whether a first look at the text was not enough, so that the encoder has to look."""

    @property
    def is_known(self) -> bool:
        """Whether the query is embedded."""
        return bool(len(self.embedding))

    def with_vector(self, vector: NDArray[np.float32]) -> RoutingRequest:
        """This request with a (dim,) vector in place of its text."""
        if self.is_known:
            return replace(self, last_answer=vector, text=None)
        return replace(self, embedding=vector, text=None)

    @property
    def num_candidates(self) -> int | None:
        """The best candidates that are named; `None` names all."""
        return None if self.explain else _NUM_CANDIDATES


@dataclass(frozen=True, slots=True)
class Routed:
    """What a router replica says to one request."""

    answer: Answer | None
    """`None`: a first look was not enough. Ask again, with `was_unsure`."""
    embedding: NDArray[np.float32] | None = None
    """(dim,) of the text, where the encoder looked at it for this answer."""
    embedding_s: float = 0.0
    """Seconds that took."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that are decided together, and the pool as it is now."""

    requests: tuple[RoutingRequest, ...]
    available: tuple[Pair, ...]
    """Candidates that answer now."""
    pool_version: int
    planner: str | None = None
    """Model that thinks, where it answers now; `None`: there is none."""
    abilities: Abilities = field(default_factory=lambda: NO_ABILITIES)
    """What the pool's candidates can take."""

    def part(self, numbers: Sequence[int]) -> Batch:
        """Some of the requests, by their places, with the same pool."""
        return replace(self, requests=tuple(self.requests[number] for number in numbers))

    def can_think(self, request: RoutingRequest) -> bool:
        """Whether there is a planner, and the caller admits it."""
        models = request.limits.models
        return self.planner is not None and (models is None or self.planner in models)


class Deciding(Protocol):
    """Whatever answers "which candidate for this request"; all that an evaluation needs."""

    @property
    def snapshot(self) -> RouterSnapshot | None:
        """What was fitted; `None`: nothing was, and there is nothing to learn."""
        ...

    def decide(self, batch: Batch) -> list[Answer]:
        """What each request does next: for a new one, the candidates from best to worst.

        Returns:
            Per request its decision, or `NoCandidate` if nothing is within its limits.
        """
        ...


class Rule(Deciding, Protocol):
    """A rule as it serves: it decides, has prices, and learns."""

    @property
    def clusters(self) -> ClusterRule | None:
        """Path 1 of the snapshot; `None` without a snapshot."""
        ...

    @property
    def costs_usd(self) -> NDArray[np.float32]:
        """(num_pairs,) US dollars of a run of each pair that the rule knows."""
        ...

    def update(self, embedding: NDArray[np.float32], pair: Pair, score: float, owner: str) -> None:
        """Learn from one feedback.

        A pair that the rule does not know is ignored; a rule without a snapshot learns nothing.

        Args:
            embedding: (dim,) of the query that was answered.
            pair: The pair that answered it.
            score: In [0, 1]; clipped.
            owner: Who gave it: the id of an API key, or `LOCAL_OWNER`.
        """
        ...


def decide_one(
    rule: Deciding,
    request: RoutingRequest,
    available: tuple[Pair, ...],
    pool_version: int = 0,
    planner: str | None = None,
) -> Decision:
    """The decision for one request; arguments as of `Batch`.

    Raises:
        NoCandidate: If nothing is within its limits. Guessing a pair here would hide it.
    """
    (answer,) = rule.decide(Batch((request,), available, pool_version, planner))
    if isinstance(answer, AtlasError):
        raise answer
    return answer


def none_within_limits() -> NoCandidate:
    """The refusal of a request whose limits leave no candidate."""
    return NoCandidate("no pair that answers now is within the request's limits")
