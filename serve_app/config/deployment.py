"""Resources and scaling of a deployment."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from serve_app.config.base import BaseConfig


class AutoscalingConfig(BaseConfig):
    """Replica bounds of one deployment; Ray Serve's own names."""

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    target_ongoing_requests: float = Field(default=16, gt=0)
    """Ongoing requests per replica that Serve aims for."""
    upscale_delay_s: float = Field(default=10, ge=0)
    downscale_delay_s: float = Field(default=300, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}"
            )
        return self


class DeploymentConfig(BaseConfig):
    """Resources and scaling of one of our own deployments."""

    num_cpus: float = Field(default=0.1, ge=0)
    """CPUs each replica reserves in Ray; fractions are fine."""
    max_ongoing_requests: int = Field(default=256, ge=1)
    """Requests a replica works on at once; more wait in the caller's queue."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Custom Ray resources each replica needs, for example `{cpu_node: 0.001}`: only nodes that
    have them get replicas."""
    max_replicas_per_node: int | None = Field(default=None, ge=1, le=100)
    """With 1, no node takes two replicas down with it; there can be no more than nodes, then."""
    autoscaling: AutoscalingConfig = AutoscalingConfig()

    @model_validator(mode="after")
    def _target_can_be_reached(self) -> Self:
        check_target(self.autoscaling, self.max_ongoing_requests)
        return self


def check_target(autoscaling: AutoscalingConfig, max_ongoing_requests: int) -> None:
    """Refuse a target that no replica can be above: nothing would ever scale up.

    Raises:
        ValueError: If it is one.
    """
    target = autoscaling.target_ongoing_requests
    scales = autoscaling.max_replicas > max(1, autoscaling.min_replicas)
    if scales and target >= max_ongoing_requests:
        raise ValueError(
            f"target_ongoing_requests {target:g} has to be below max_ongoing_requests "
            f"{max_ongoing_requests}"
        )
