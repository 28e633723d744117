"""The base of all settings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class BaseConfig(BaseModel):
    """Unknown keys fail, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
