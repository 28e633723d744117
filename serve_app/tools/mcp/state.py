"""How a session with an MCP server stands; needs no SDK."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SessionState:
    """How a session stands; crosses process borders."""

    is_up: bool = False
    reason: str | None = None
    """Why it is not up; `None` while it is, and before the first try has ended."""
    definitions: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Of each function the server lists: its own name to the hash of its definition, and its
    description as it would be offered."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Functions that cannot be offered, and why."""
