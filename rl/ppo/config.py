"""Settings of training, read from YAML: what `atlas train --config` names, and a train job takes.

PPO's settings have RLlib's own names. Unknown keys fail, values never change.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from rl.ppo.randomise import EnvSettings
from serve_app.config.base import BaseConfig
from serve_app.errors import ConfigError

Schedule = Annotated[list[tuple[int, float]], Field(min_length=2)]
"""[[step, value], …] between which RLlib interpolates; the first step is 0."""


class NetConfig(BaseConfig):
    """Sizes of `rl.ppo.torch_policy_net.TorchPolicyNet`."""

    width: int = Field(default=64, ge=4, le=1024)
    """Of the tokens."""
    num_heads: int = Field(default=4, ge=1, le=64)
    """Of the attention; divides the width."""
    num_layers: int = Field(default=1, ge=1, le=16)
    """Rounds of attention."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide width {self.width}")
        return self


class AugmentationConfig(BaseConfig):
    """What is done to embeddings in training: it must not learn the questions by heart."""

    noise: float = Field(default=0.5, ge=0, le=10)
    """Length of the random vector added to an embedding, which has length 1."""
    drop: float = Field(default=0.25, ge=0, le=1)
    """Probability that a state's embeddings are zeros."""
    scramble: float = Field(default=1.0, ge=0, le=1)
    """Probability that the embeddings and descriptors of a state are scrambled (see
    `rl.ppo.sampling.augmented`), in the views where path 1 was not fitted on such queries: there
    the policy has to do without what it knows of the profile's own kinds."""
    scramble_known: float = Field(default=0.5, ge=0, le=1)
    """The same in the first view."""


class ValidationConfig(BaseConfig):
    """How a policy is judged while it trains: greedily, on questions it does not train on."""

    share: float = Field(default=0.15, gt=0, le=0.5)
    """Of the training questions, chosen by a hash of each. The held-out split stays untouched."""
    alphas: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)] = (
        0.0,
        0.02,
        0.1,
        0.3,
    )
    """Where the utility is measured; its mean over these and the table's views decides."""
    every: int = Field(default=5, ge=1)
    """Iterations between two measurements."""
    patience: int | None = Field(default=100, ge=1)
    """Iterations without a new best after which training stops; `None` never stops early."""


class WarmStartConfig(BaseConfig):
    """Where PPO starts: what the record alone teaches, before anything is tried.

    The network begins as the rule `voi`. What did best on the questions apart is where PPO starts,
    that rule included.
    """

    one_step: int = Field(default=100, ge=0, le=100_000)
    """Updates by the exact expected utility of one run: all outcomes are known, so nothing has to
    be drawn."""
    imitation: int = Field(default=150, ge=0, le=100_000)
    """Updates towards what the teacher says each action is worth; see `rl.ppo.teacher`."""
    batch: int = Field(default=256, ge=1, le=65536)
    """States of an update."""
    lr: float = Field(default=1e-3, gt=0)


class LiveConfig(BaseConfig):
    """How the running pool is driven, and what that may cost.

    The dollars and seconds are of the whole run, however often it is taken up again. At a cap it
    ends as if it had stopped early, with the best weights so far; the same request is paid once.
    """

    max_cost_usd: float = Field(gt=0, allow_inf_nan=False)
    """No request is sent that could exceed it, going by the dearest one of its pair in the profile
    and in this run."""
    max_seconds: float = Field(default=3600.0, gt=0, allow_inf_nan=False)
    """No request is sent after it; those under way have `deadline_s` to end."""
    concurrency: int = Field(default=16, ge=1, le=256)
    """Requests under way at once."""
    deadline_s: float = Field(default=120.0, gt=0, le=3600)
    """Of one request."""
    judge: Annotated[str, Field(pattern=r"^[^@\s]{1,64}@[^@\s]{1,64}$")] | None = None
    """`model_id@tool_id` that judges answers to questions of the metric `judge`."""


_CAPS = {"max_cost_usd", "max_seconds", "concurrency"}
"""Of `LiveConfig`: how far and how fast a run goes, not what it is."""


class TrainConfig(BaseConfig):
    """Settings of one training run."""

    iterations: int = Field(default=250, ge=1, le=1_000_000)
    """Of RLlib; the paper's number. Each samples one batch and learns from it."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of everything that is drawn."""
    base: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")] = "newest"
    """Snapshot whose path 1 the policy goes with: an id, `newest` or `serving`."""

    live: LiveConfig | None = None
    """Samples on the running pool instead of the profile's record; `None` replays the record. Path
    1's beliefs, and what the policy is judged by, are the profile's either way."""

    train_batch_size_per_learner: int = Field(default=4096, ge=16)
    """Steps per iteration."""
    minibatch_size: int = Field(default=1024, ge=1)
    num_epochs: int = Field(default=3, ge=1, le=100)
    lr: Annotated[float, Field(gt=0)] | Schedule = 5e-4
    gamma: float = Field(default=1.0, ge=0, le=1)
    lambda_: float = Field(default=0.95, ge=0, le=1)
    clip_param: float = Field(default=0.2, gt=0, le=10)
    vf_clip_param: float = Field(default=10.0, gt=0)
    vf_loss_coeff: float = Field(default=0.5, ge=0)
    kl_coeff: float = Field(default=0.2, ge=0)
    """Where the adaptive weight of the KL term starts; 0 leaves the term out."""
    kl_target: float = Field(default=0.01, gt=0)
    start_kl_coeff: float = Field(default=0.1, ge=0)
    """Weight of the KL divergence of the policy from the one that PPO started with."""
    entropy_coeff: Annotated[float, Field(ge=0)] | Schedule = 0.0
    """Draws follow the worth of actions already, so exploration needs no reward of its own."""
    grad_clip: float | None = Field(default=0.5, gt=0)
    """Largest global norm of the gradient; `None` does not clip."""

    num_env_runners: int = Field(default=0, ge=0, le=1024)
    """Sampling processes on the cluster; 0 samples in the training process."""
    num_cpus_per_env_runner: float = Field(default=1.0, gt=0)
    """Ray CPUs that each reserves. Where not all of them are free, sampling stays in the training
    process: nothing waits for, or is taken from, what serves."""
    num_envs_per_env_runner: int = Field(default=256, ge=1, le=65536)
    """Episodes that a sampling process steps side by side."""
    torch_threads: int = Field(default=1, ge=1, le=256)
    """Of the network in the training process. Beside other work on the same cores several threads
    wait for each other, and one alone is faster."""

    warm_start: WarmStartConfig = WarmStartConfig()
    net: NetConfig = NetConfig()
    env: EnvSettings = EnvSettings()
    augmentation: AugmentationConfig = AugmentationConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint_every: int = Field(default=25, ge=1)
    """Iterations between two checkpoints."""

    @model_validator(mode="after")
    def _batches_fit(self) -> Self:
        if self.minibatch_size > self.train_batch_size_per_learner:
            raise ValueError(
                f"minibatch_size {self.minibatch_size} is above train_batch_size_per_learner "
                f"{self.train_batch_size_per_learner}"
            )
        rows = self.num_envs_per_env_runner * max(1, self.num_env_runners)
        if self.train_batch_size_per_learner % rows:
            raise ValueError(
                f"train_batch_size_per_learner {self.train_batch_size_per_learner} is no multiple "
                f"of the {rows} episodes side by side (num_envs_per_env_runner times "
                "num_env_runners)"
            )
        for name in ("lr", "entropy_coeff"):
            schedule = getattr(self, name)
            if isinstance(schedule, list) and (
                schedule[0][0] != 0
                or any(before[0] >= after[0] for before, after in itertools.pairwise(schedule))
            ):
                raise ValueError(f"the steps of {name} must start at 0 and rise")
        return self

    @model_validator(mode="after")
    def _samples_here(self) -> Self:
        if self.live is not None and self.num_env_runners:
            raise ValueError(
                f"num_env_runners {self.num_env_runners} does not go with live: such sampling "
                "waits for the pool, not for CPUs, and one process keeps to its caps; raise "
                "live.concurrency instead"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same one, as plain JSON; a run goes on under other caps."""
        plain = self.model_dump(mode="json", exclude={"base", "live"})
        if self.live is not None:
            plain["live"] = self.live.model_dump(mode="json", exclude=_CAPS)
        return plain

    def digest(self) -> str:
        """12 characters that tell training by these settings from training by others."""
        plain = json.dumps(self.identity(), sort_keys=True)
        return hashlib.sha256(plain.encode()).hexdigest()[:12]


def parse_train_config(settings: dict[str, Any]) -> TrainConfig:
    """Settings as a mapping, for example of a job.

    Raises:
        ConfigError: Naming the first wrong one.
    """
    try:
        return TrainConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"training settings: {place}: {first['msg']}") from None


class TrainFile(NamedTuple):
    """What a training file says."""

    settings: TrainConfig
    deployment: Path | None
    """The deployment's configuration, where the key `deployment` names it."""
    questions: Path | None
    """The labelled questions of a live training, where the key `questions` names them."""


def load_train_config(path: Path) -> TrainFile:
    """Read a training file; the paths in it are relative to it.

    Raises:
        ConfigError: If it cannot be read or does not work.
    """
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(read, dict):
        raise ConfigError(f"{path}: expected settings, found {type(read).__name__}")
    named: dict[str, Path | None] = {}
    for name in ("deployment", "questions"):
        place = read.pop(name, None)
        if place is not None and not isinstance(place, str):
            raise ConfigError(f"{path}: {name} must be a path, not {place!r}")
        named[name] = None if place is None else (path.parent / place).resolve()
    try:
        settings = parse_train_config(read)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from None
    return TrainFile(settings, **named)
