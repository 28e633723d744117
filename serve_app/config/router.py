"""How `model: atlas` decides."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from serve_app.config.base import BaseConfig
from serve_app.config.deployment import DeploymentConfig


class ExplorationConfig(BaseConfig):
    """How often a pair is tried that does not look best, so that the log can judge it later."""

    method: Literal["epsilon_greedy", "thompson"] = "epsilon_greedy"
    """`epsilon_greedy` draws uniformly; `thompson` draws by the chance that a pair is best."""
    epsilon: float = Field(default=0.0, ge=0, le=1)
    """Share of the decisions that are drawn; 0 = never. The propensity of each is logged."""


class RollbackConfig(BaseConfig):
    """When a policy that users like less than the one before is taken back by itself."""

    enabled: bool = True
    min_verdicts: int = Field(default=50, ge=2)
    """Rated requests of either policy before they are compared. Where keys are required, at least
    five keys must have rated them: see `router.serving.rollback`."""
    error_rate: float = Field(default=0.05, gt=0, lt=1)
    """Chance at most that a policy which is not worse is ever taken back, however often it is
    looked at."""
    interval_s: float = Field(default=5.0, gt=0)
    """How often they are compared."""


class RouterConfig(BaseConfig):
    """How `model: atlas` decides."""

    default_alpha: float = Field(default=0.1, ge=0, le=1)
    """Cost-quality dial when the caller names none; 0 = quality only."""
    example_top_k: int = Field(default=3, ge=1)
    """The cold-start rule takes the mean similarity of this many nearest examples."""
    snapshot: str | None = None
    """Folder of a router snapshot; promoted once, when this store first sees it."""
    fallback: str | None = None
    """`model_id@tool_id` that gets queries unlike everything profiled; `None`: the pair that is
    best overall."""
    exploration: ExplorationConfig = ExplorationConfig()
    planner: str | None = None
    """Model that thinks about a question where the learned policy asks for it; `None` never
    thinks."""
    rollback: RollbackConfig = RollbackConfig()
    promotion_margin: float = Field(default=0.0, ge=0, le=1)
    """A candidate may serve if at `default_alpha` its utility on the held-out questions is surely
    above the serving policy's less this. 0 asks that it is surely better; a little lets one follow
    that was fitted on newer outcomes and decides much alike."""
    refresh_interval_s: float = Field(default=1.0, gt=0)
    """How often a replica asks the store for a new policy and new feedback."""
    deployment: DeploymentConfig = DeploymentConfig()
