"""The built-in patterns, which run the candidates of a decision: a line for each."""

from collections.abc import Callable, Mapping

from serve_app.orchestrator.engine import Engine
from serve_app.orchestrator.patterns.base import Pattern
from serve_app.orchestrator.patterns.policy import PolicyLoop
from serve_app.orchestrator.patterns.single import Single

PATTERNS: Mapping[str, Callable[[Engine], Pattern]] = {"single": Single, "policy": PolicyLoop}
