"""Typed settings of a whole deployment, read from YAML; imports pydantic only.

Unknown keys fail, values never change after loading, relative paths are relative to the
configuration file, and secrets are named by environment variable, never written here.
"""

from serve_app.config.atlas import DATA_FOLDER, AtlasConfig
from serve_app.config.deployment import AutoscalingConfig, DeploymentConfig
from serve_app.config.embedder import EmbedderConfig
from serve_app.config.gateway import (
    AuthConfig,
    GatewayConfig,
    GatewayDeploymentConfig,
    IdempotencyConfig,
    LimitsConfig,
)
from serve_app.config.load import load_config
from serve_app.config.models import (
    MODEL_ID_PATTERN,
    CapabilitiesConfig,
    CardConfig,
    CustomModelConfig,
    LocalModelConfig,
    ModelBase,
    ModelConfig,
    PairCardConfig,
    PriceConfig,
    RemoteModelConfig,
    ScoringConfig,
)
from serve_app.config.pool import SAFE_ENGINE_KWARGS, AdminApiConfig, PoolConfig, RemoteOriginConfig
from serve_app.config.router import ExplorationConfig, RollbackConfig, RouterConfig
from serve_app.config.store import SnapshotsPlace, StoreConfig

__all__ = [
    "DATA_FOLDER",
    "MODEL_ID_PATTERN",
    "SAFE_ENGINE_KWARGS",
    "AdminApiConfig",
    "AtlasConfig",
    "AuthConfig",
    "AutoscalingConfig",
    "CapabilitiesConfig",
    "CardConfig",
    "CustomModelConfig",
    "DeploymentConfig",
    "EmbedderConfig",
    "ExplorationConfig",
    "GatewayConfig",
    "GatewayDeploymentConfig",
    "IdempotencyConfig",
    "LimitsConfig",
    "LocalModelConfig",
    "ModelBase",
    "ModelConfig",
    "PairCardConfig",
    "PoolConfig",
    "PriceConfig",
    "RemoteModelConfig",
    "RemoteOriginConfig",
    "RollbackConfig",
    "RouterConfig",
    "ScoringConfig",
    "SnapshotsPlace",
    "StoreConfig",
    "load_config",
]
