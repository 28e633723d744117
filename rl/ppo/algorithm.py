"""RLlib's PPO as training uses it: our network, our sampling, and no resource that is not free."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from rl.ppo.backend import Backend
from rl.ppo.config import TrainConfig
from rl.ppo.env import spaces_of
from rl.ppo.module import START_KL_COEFF, RoutingLearner, RoutingModule
from rl.ppo.sampling import Augmentation, BackendBox, FragmentEnvRunner, FragmentsToBatch

logger = logging.getLogger(__name__)


def make_algorithm(
    backend: Backend, settings: TrainConfig, start: Mapping[str, NDArray[np.float32]]
) -> Algorithm:
    """Build PPO over a backend; `stop()` it when done. Ray must be initialised.

    The learner and, without env runners on the cluster, the sampling run in this process and
    reserve nothing of Ray. Env runners are actors that reserve `num_cpus_per_env_runner` each; they
    die with this process.

    Args:
        backend: Has the questions to train on, and runs the pairs.
        settings: Of the training.
        start: The first weights; see `TorchPolicyNet.from_tensors`.
    """
    num_env_runners = env_runners_that_fit(settings)
    rows = settings.num_envs_per_env_runner * max(1, num_env_runners)
    table = backend.table
    observation_space, action_space = spaces_of(table.embeddings.shape[1], table.num_pairs)
    # They warn of what is set here on purpose, and of RLlib's own deprecated calls.
    for name in ("ray.rllib", "ray._common.deprecation"):
        logging.getLogger(name).setLevel(logging.ERROR)
    config = (
        PPOConfig()
        .environment(
            observation_space=observation_space,
            action_space=action_space,
            env_config={
                "box": BackendBox(backend, travels=num_env_runners > 0),
                "settings": settings.env,
                "augmentation": Augmentation(**settings.augmentation.model_dump()),
            },
        )
        .env_runners(
            env_runner_cls=FragmentEnvRunner,
            num_env_runners=num_env_runners,
            num_cpus_per_env_runner=settings.num_cpus_per_env_runner,
            num_envs_per_env_runner=settings.num_envs_per_env_runner,
            rollout_fragment_length=settings.train_batch_size_per_learner // rows,
        )
        .learners(
            num_learners=0,
            learner_class=RoutingLearner,
            learner_connector=functools.partial(
                FragmentsToBatch, gamma=settings.gamma, lambda_=settings.lambda_
            ),
            add_default_connectors_to_learner_pipeline=False,
        )
        .rl_module(
            rl_module_spec=RLModuleSpec(
                module_class=RoutingModule,
                model_config={"start": dict(start)},
            )
        )
        .training(
            train_batch_size_per_learner=settings.train_batch_size_per_learner,
            minibatch_size=settings.minibatch_size,
            num_epochs=settings.num_epochs,
            shuffle_batch_per_epoch=True,
            lr=_scheduled(settings.lr),
            gamma=settings.gamma,
            lambda_=settings.lambda_,
            clip_param=settings.clip_param,
            vf_clip_param=settings.vf_clip_param,
            vf_loss_coeff=settings.vf_loss_coeff,
            use_kl_loss=settings.kl_coeff > 0,
            kl_coeff=settings.kl_coeff,
            kl_target=settings.kl_target,
            entropy_coeff=_scheduled(settings.entropy_coeff),
            grad_clip=settings.grad_clip,
            learner_config_dict={START_KL_COEFF: settings.start_kl_coeff},
        )
        .debugging(seed=settings.seed, log_level="ERROR", log_sys_usage=False)
    )
    # The name says the opposite: it leaves out RLlib's look at every gradient, which takes a tenth
    # of the time. `train_policy` looks at the loss.
    config.torch_skip_nan_gradients = True
    algorithm: Algorithm = config.build_algo()
    # RLlib makes a folder for logs in the home folder, and writes nothing into it.
    with contextlib.suppress(OSError):
        Path(algorithm.logdir).rmdir()
    return algorithm


def env_runners_that_fit(settings: TrainConfig) -> int:
    """Sampling processes that find free CPUs now: all that are wanted, or none."""
    wanted = settings.num_env_runners
    if not wanted:
        return 0
    free = float(ray.available_resources().get("CPU", 0.0))
    if free < wanted * settings.num_cpus_per_env_runner:
        logger.warning(
            "%d env runners want %g CPUs, and %g are free: sampling in the training process",
            wanted,
            wanted * settings.num_cpus_per_env_runner,
            free,
        )
        return 0
    return wanted


def _scheduled(value: float | list[tuple[int, float]]) -> Any:
    """As RLlib takes it."""
    return [list(point) for point in value] if isinstance(value, list) else value
