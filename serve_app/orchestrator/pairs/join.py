"""What joins a model and a tool, and what a join works with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from serve_app.models.reply import Choice
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.pairs.paid import PaidModels, PaidTools
from serve_app.orchestrator.pairs.selection import FunctionSelector


@dataclass(frozen=True)
class JoinParts:
    """The pool as a join sees it."""

    models: PaidModels
    tools: PaidTools
    selector: FunctionSelector
    """Where a tool has many functions, says which are offered."""
    max_tool_rounds: int
    """Replies with calls in them before the model has to answer."""
    max_calls_per_reply: int
    """Calls of one reply that are run."""


Join = Callable[[PairWork, JoinParts], Awaitable[list[Choice]]]
"""Runs a pair, and returns the choices of its answer."""
