"""One wanted model: how far it is, what failed, and when it is tried again."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field, replace

from ray.serve.schema import ApplicationStatus

from serve_app.config import ModelConfig, PoolConfig
from serve_app.models.deploy import application_name
from serve_app.pool.applications import ModelApplication
from serve_app.schemas import MemberState, ModelMember, StartPhase

logger = logging.getLogger(__name__)


@dataclass
class ModelProgress:
    """One wanted model and how far it is."""

    config: ModelConfig
    member: ModelMember
    task: asyncio.Task[None] | None = None
    """Its start, warm-up or probe under way."""
    began_s: float | None = None
    """When its start began, by the monotonic clock; `None` while none is under way."""
    failures: int = 0
    retry_at_s: float = 0.0
    retry_unix_s: float | None = None
    """As `retry_at_s`, for people; `None` while nothing that failed waits for its next try."""
    suspected: bool = False
    """Whether somebody saw it fail since it was last probed."""
    warm: set[str] = field(default_factory=set)
    """Tools that it has answered a warm-up request with."""
    previous: str | None = None
    """Application with earlier settings, which answers until this one does."""

    @property
    def application(self) -> str:
        """The one that holds these settings."""
        return application_name(self.config)

    @property
    def serves(self) -> bool:
        """Whether the application with these settings answers."""
        return self.member.state is MemberState.READY and (
            self.member.application == self.application
        )

    def is_warm(self, away: frozenset[str]) -> bool:
        """Whether it has answered with each of its tools, but for those that are away."""
        return self.warm | away >= set(self.config.tools)

    def is_settled(self, away: frozenset[str]) -> bool:
        """Whether nothing is to be done for it now."""
        if self.task is not None or self.suspected:
            return False
        is_warm = self.serves and self.is_warm(away)
        return is_warm or time.monotonic() < self.retry_at_s

    def waits_for(self, application: ModelApplication | None) -> StartPhase | None:
        """What its start waits for; `None` where it is not starting.

        Args:
            application: As Serve has it; `None`: Serve has none with these settings.
        """
        if self.member.state is not MemberState.STARTING:
            return None
        if application is None:
            return StartPhase.TURN if self.began_s is None else StartPhase.DEPLOYMENT
        if application.status is ApplicationStatus.RUNNING:
            return StartPhase.ANSWERS
        return StartPhase.LOADING

    def put_off(self, pool: PoolConfig) -> None:
        """Note a failure: the next try comes after a pause that doubles with each one."""
        pause_s = min(pool.retry_initial_s * 2**self.failures, pool.retry_max_s)
        self.failures += 1
        self.retry_at_s = time.monotonic() + pause_s
        self.retry_unix_s = time.time() + pause_s

    def set(self, state: MemberState, reason: str | None, application: str | None) -> None:
        """Note the state, why, and which application answers; `None`: none does."""
        member = self.member
        if (member.state, member.reason, member.application) == (state, reason, application):
            return
        told = f" ({reason})" if reason else ""
        logger.info("model %s: %s%s", member.model_id, state.value, told)
        since_s = member.since_unix_s if member.state is state else time.time()
        self.member = replace(
            member, state=state, reason=reason, application=application, since_unix_s=since_s
        )
