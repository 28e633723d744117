"""Settings of a training that is over in seconds."""

from __future__ import annotations

from typing import Any

SETTINGS: dict[str, Any] = {
    "iterations": 4,
    "train_batch_size_per_learner": 256,
    "minibatch_size": 128,
    "num_envs_per_env_runner": 64,
    "net": {"width": 16, "num_heads": 2},
    "warm_start": {"one_step": 2, "imitation": 2, "batch": 32},
    "env": {"max_steps": 2},
    "validation": {"share": 0.3, "alphas": [0.0], "every": 2},
}
