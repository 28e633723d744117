"""Rollouts for RLlib without a Python object per episode: an env runner and its learner connector.

Episodes are one to a few steps long, so RLlib's own runner spends an iteration on making thousands
of them. Here `num_envs` episodes run side by side in numpy, and what comes back is one `Fragment`:
arrays over time and rows, from which the connector makes the train batch at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_AGENT_ID, DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.metrics import (
    EPISODE_LEN_MEAN,
    EPISODE_RETURN_MEAN,
    NUM_AGENT_STEPS_SAMPLED,
    NUM_AGENT_STEPS_SAMPLED_LIFETIME,
    NUM_ENV_STEPS_SAMPLED,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    NUM_EPISODES,
    NUM_EPISODES_LIFETIME,
    NUM_MODULE_STEPS_SAMPLED,
    NUM_MODULE_STEPS_SAMPLED_LIFETIME,
    WEIGHTS_SEQ_NO,
)

from rl.ppo.backend import Backend
from rl.ppo.env import spaces_of
from rl.ppo.episodes import Episodes
from rl.ppo.randomise import SECONDS_BLUR, EnvSettings
from serve_app.router.policy.features import DESCRIPTOR_DIM, LOG_SECONDS

Float = NDArray[np.float32]

TERMS = ("r_out", "r_fmt", "r_sel", "r_cost")
"""Of the reward, as `rl.ppo.episodes` names them; each is logged as its mean per episode."""


@dataclass(frozen=True)
class Augmentation:
    """What is done to embeddings before the network sees them; see `config.AugmentationConfig`."""

    noise: float = 0.0
    """Length of the random vector that is added to an embedding, which has length 1."""
    drop: float = 0.0
    """Probability that a state's embeddings are zeros."""
    scramble: float = 0.0
    """Probability that a state is scrambled, in all views but the first; see `augmented`."""
    scramble_known: float = 0.0
    """The same in the first view."""


@dataclass(frozen=True)
class Fragment:
    """T steps of B episodes side by side; an episode that ends makes room for the next."""

    observation: Mapping[str, Float]
    """(T * B, ...) each, one step of all rows after another."""
    actions: NDArray[np.int64]
    """(T * B,)"""
    logits: Float
    """(T * B, actions) of the policy that acted."""
    logp: Float
    """(T * B,) of the actions."""
    rewards: Float
    """(T, B)"""
    values: Float
    """(T + 1, B) the critic's, the last of the states the fragment ends in."""
    done: NDArray[np.bool_]
    """(T, B) the episode ended at this step."""

    def __len__(self) -> int:
        """Steps."""
        return len(self.actions)


def advantages(fragment: Fragment, gamma: float, lambda_: float) -> Float:
    """(T, B) generalised advantage estimates (Schulman et al., 2016, equation 16).

    `A_t = sum_l (gamma lambda)^l delta_{t+l}` with `delta_t = r_t + gamma V_{t+1} - V_t`, within an
    episode; one that the fragment cuts off goes on with the critic's value.
    """
    estimates = np.zeros_like(fragment.rewards)
    following = np.zeros_like(fragment.rewards[0])
    for step in reversed(range(len(fragment.rewards))):
        goes_on = ~fragment.done[step]
        delta = fragment.rewards[step] - fragment.values[step]
        delta += gamma * fragment.values[step + 1] * goes_on
        following = delta + gamma * lambda_ * following * goes_on
        estimates[step] = following
    return estimates


class FragmentsToBatch(ConnectorV2):
    """Learner connector: fragments in, PPO's train batch with advantages and value targets out."""

    def __init__(self, *args: Any, gamma: float, lambda_: float, **kwargs: Any) -> None:
        """As RLlib makes connectors.

        Args:
            args: RLlib's.
            gamma: Discount.
            lambda_: Of the advantage estimates.
            kwargs: RLlib's.
        """
        super().__init__(*args, **kwargs)
        self._gamma, self._lambda = gamma, lambda_

    def __call__(
        self, *, batch: dict[str, Any], episodes: list[Fragment], **_: Any
    ) -> dict[str, Any]:
        """Make the batch of the one module there is."""
        estimates = [advantages(fragment, self._gamma, self._lambda) for fragment in episodes]
        targets = [
            (estimate + fragment.values[:-1]).ravel()
            for estimate, fragment in zip(estimates, episodes, strict=True)
        ]
        flat = np.concatenate([estimate.ravel() for estimate in estimates])
        flat = (flat - flat.mean()) / max(1e-4, float(flat.std()))

        def joined(parts: list[Any]) -> torch.Tensor:
            # What came from another process is not writable, which torch does not support.
            is_ours = len(parts) == 1 and parts[0].flags.writeable
            return torch.from_numpy(parts[0] if is_ours else np.concatenate(parts))

        batch[DEFAULT_MODULE_ID] = {
            Columns.OBS: {
                name: joined([fragment.observation[name] for fragment in episodes])
                for name in episodes[0].observation
            },
            Columns.ACTIONS: joined([fragment.actions for fragment in episodes]),
            Columns.ACTION_DIST_INPUTS: joined([fragment.logits for fragment in episodes]),
            Columns.ACTION_LOGP: joined([fragment.logp for fragment in episodes]),
            Postprocessing.ADVANTAGES: torch.from_numpy(flat),
            Postprocessing.VALUE_TARGETS: joined(targets),
        }
        return batch


class BackendBox:
    """Carries a backend through RLlib's configuration, which is copied and pickled at every turn.

    Copies share the backend. Pickled, it holds the backend only where runners in other processes
    need it; a checkpoint of training in one process stays small.
    """

    def __init__(self, backend: Backend | None, *, travels: bool) -> None:
        """Take a backend.

        Args:
            backend: It.
            travels: Whether it goes along when pickled.
        """
        self.backend = backend
        self.travels = travels

    def __deepcopy__(self, memo: dict[int, Any]) -> BackendBox:
        """Itself."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled."""
        return {"backend": self.backend if self.travels else None, "travels": self.travels}


class FragmentEnvRunner(EnvRunner, Checkpointable):
    """Samples fragments of episodes.

    `env_config` has the `box` with the backend, the episodes' `settings` (`EnvSettings`) and the
    `augmentation`. All draws of a fragment follow from the seed and the number of steps sampled
    before it, so a run that is taken up again goes on as it would have.
    """

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        """As RLlib makes runners."""
        super().__init__(config=config, **kwargs)
        self.num_envs = self.config.num_envs_per_env_runner
        self._weights_seq_no = 0
        self.make_env()
        self.make_module()

    def assert_healthy(self) -> None:
        """Nothing can be missing: the constructor made everything."""

    def make_env(self) -> None:
        """Lay out the episodes."""
        chosen = self.config.env_config
        backend: Backend = chosen["box"].backend
        settings: EnvSettings = chosen["settings"]
        self._augmentation: Augmentation = chosen["augmentation"]
        self.env = Episodes(backend, self.num_envs, settings)
        self._spaces = spaces_of(backend.table.embeddings.shape[1], backend.table.num_pairs)

    def make_module(self) -> None:
        """Make the network, with its value head."""
        spec = self.config.get_rl_module_spec(spaces=self.get_spaces(), inference_only=False)
        self.module = spec.build()

    def get_spaces(self) -> dict[str, Any]:
        """Observation and action space, under the names RLlib looks for."""
        return {
            INPUT_ENV_SPACES: self._spaces,
            INPUT_ENV_SINGLE_SPACES: self._spaces,
            DEFAULT_MODULE_ID: self._spaces,
        }

    def sample(self, **_: Any) -> list[Fragment]:
        """One fragment of `rollout_fragment_length` steps of each row."""
        length = self.config.get_rollout_fragment_length(self.worker_index or 0)
        seed = [self._seed or 0, self.num_env_steps_sampled_lifetime]
        random = np.random.default_rng(seed)
        episodes = self.env
        episodes.seed(int(random.integers(2**62)))
        episodes.reset()
        steps: dict[str, list[Any]] = {}
        ended: dict[str, list[Any]] = {name: [] for name in (*TERMS, "score", "steps", "cost_usd")}
        for _step in range(length):
            observation = self._observe(random)
            logits, values = self._forward(observation)
            actions, logp = _drawn(logits, random)
            reward, done, info = episodes.step(actions)
            taken: dict[str, Any] = {
                "observation": observation,
                "actions": actions,
                "logits": logits,
                "logp": logp,
                "rewards": reward,
                "values": values,
                "done": done,
            }
            for name, array in taken.items():
                steps.setdefault(name, []).append(array)
            for name, kept in ended.items():
                kept.append(_of_ended(info, name, done))
            episodes.reset(np.flatnonzero(done))
        # The value of what comes after, for the episodes that the fragment cuts off.
        _logits, values = self._forward(self._observe(random))
        steps["values"].append(values)
        self._log({name: np.concatenate(kept) for name, kept in ended.items()}, length)
        return [
            Fragment(
                observation={
                    name: np.concatenate([one[name] for one in steps["observation"]])
                    for name in steps["observation"][0]
                },
                actions=np.concatenate(steps["actions"]),
                logits=np.concatenate(steps["logits"]),
                logp=np.concatenate(steps["logp"]),
                rewards=np.stack(steps["rewards"]),
                values=np.stack(steps["values"]),
                done=np.stack(steps["done"]),
            )
        ]

    def get_metrics(self) -> Any:
        """What was logged since the last call."""
        return self.metrics.reduce()

    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The weights, and how many steps were sampled."""
        state: dict[str, Any] = {
            NUM_ENV_STEPS_SAMPLED_LIFETIME: self.num_env_steps_sampled_lifetime
        }
        if self._check_component(COMPONENT_RL_MODULE, components, not_components):
            state[COMPONENT_RL_MODULE] = self.module.get_state(**kwargs)
            state[WEIGHTS_SEQ_NO] = self._weights_seq_no
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over weights that are newer, and counts."""
        if COMPONENT_RL_MODULE in state:
            number = state.get(WEIGHTS_SEQ_NO, 0)
            if number == 0 or number > self._weights_seq_no:
                import ray

                weights = state[COMPONENT_RL_MODULE]
                if isinstance(weights, ray.ObjectRef):
                    weights = ray.get(weights)
                self.module.set_state(weights.get(DEFAULT_MODULE_ID, weights))
            self._weights_seq_no = max(number, self._weights_seq_no)
        if NUM_ENV_STEPS_SAMPLED_LIFETIME in state:
            self.num_env_steps_sampled_lifetime = state[NUM_ENV_STEPS_SAMPLED_LIFETIME]

    def get_ctor_args_and_kwargs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a checkpoint keeps to make another one."""
        return (), {"config": self.config}

    def get_checkpointable_components(self) -> list[tuple[str, Any]]:
        """The module."""
        return [(COMPONENT_RL_MODULE, self.module)]

    def _observe(self, random: np.random.Generator) -> dict[str, Float]:
        return augmented(self.env.observe(), self.env.view, self._augmentation, random)

    def _forward(self, observation: Mapping[str, Float]) -> tuple[Float, Float]:
        tensors = {name: torch.from_numpy(array) for name, array in observation.items()}
        with torch.inference_mode():
            out = self.module.forward_exploration({Columns.OBS: tensors})
        return out[Columns.ACTION_DIST_INPUTS].numpy(), out[Columns.EMBEDDINGS].numpy()

    def _log(self, ended: Mapping[str, NDArray[Any]], length: int) -> None:
        """Log the episodes that ended, and the counts that RLlib goes by."""
        num_steps, num_episodes = length * self.num_envs, len(ended["score"])
        self.num_env_steps_sampled_lifetime += num_steps
        if num_episodes:
            means = {name: float(np.nanmean(values)) for name, values in ended.items()}
            means[EPISODE_RETURN_MEAN] = sum(means[name] for name in TERMS)
            means[EPISODE_LEN_MEAN] = means.pop("steps")
            for name, value in means.items():
                self.metrics.log_value(name, value, window=1)
        for key, value, how in (
            (NUM_ENV_STEPS_SAMPLED, num_steps, "sum"),
            ((NUM_AGENT_STEPS_SAMPLED, DEFAULT_AGENT_ID), num_steps, "sum"),
            ((NUM_MODULE_STEPS_SAMPLED, DEFAULT_MODULE_ID), num_steps, "sum"),
            (NUM_EPISODES, num_episodes, "sum"),
            (NUM_ENV_STEPS_SAMPLED_LIFETIME, num_steps, "lifetime_sum"),
            ((NUM_AGENT_STEPS_SAMPLED_LIFETIME, DEFAULT_AGENT_ID), num_steps, "lifetime_sum"),
            ((NUM_MODULE_STEPS_SAMPLED_LIFETIME, DEFAULT_MODULE_ID), num_steps, "lifetime_sum"),
            (NUM_EPISODES_LIFETIME, num_episodes, "lifetime_sum"),
        ):
            self.metrics.log_value(key, value, reduce=how)


def augmented(
    observation: Mapping[str, Float],
    views: NDArray[np.intp],
    settings: Augmentation,
    random: np.random.Generator,
) -> dict[str, Float]:
    """An observation as training shows it; what is zero stays zero.

    Scrambled, every dimension keeps or changes its sign by chance, the same for all vectors of a
    state: what is alike stays alike, and says nothing of what it was. The pairs' seconds, which
    would tell them apart, are blurred.

    Args:
        observation: As `Episodes.observe` gives it.
        views: (B,) of the table, of each state.
        settings: How much of it is done.
        random: Draws.
    """
    changed = dict(observation)
    size, dim = observation["query"].shape
    chance = np.where(views > 0, settings.scramble, settings.scramble_known)
    scrambled = np.flatnonzero(random.random(size) < chance)
    signs = random.integers(0, 2, (len(scrambled), dim + DESCRIPTOR_DIM), np.int8) * 2 - 1
    for name in ("query", "answer"):
        vectors = observation[name].copy()
        vectors[scrambled] *= signs[:, :dim]
        if settings.noise > 0:
            scale = np.float32(settings.noise / np.sqrt(dim))
            noise = scale * random.standard_normal(vectors.shape, np.float32)
            vectors += noise * (vectors != 0).any(axis=1, keepdims=True)
        if settings.drop > 0:
            vectors *= random.random((size, 1)) >= settings.drop
        changed[name] = vectors
    candidates = observation["candidates"].copy()
    candidates[scrambled, :, :DESCRIPTOR_DIM] *= signs[:, None, dim:]
    there = (candidates[scrambled] != 0).any(axis=2)
    blur = SECONDS_BLUR * random.standard_normal(there.shape, np.float32)
    candidates[scrambled, :, LOG_SECONDS] += blur * there
    changed["candidates"] = candidates
    return changed


def _of_ended(info: Mapping[str, NDArray[Any]], name: str, done: NDArray[np.bool_]) -> Any:
    """What the episodes that ended came to; the cost is a term of every step."""
    return -1.0 * info["total_cost"][done] if name == "r_cost" else info[name][done]


def _drawn(logits: Float, random: np.random.Generator) -> tuple[NDArray[np.int64], Float]:
    """(B,) actions drawn by the Gumbel-max trick, and (B,) their log-probabilities."""
    noise = random.gumbel(size=logits.shape).astype(np.float32)
    actions = (logits + noise).argmax(axis=1)
    shifted = logits - logits.max(axis=1, keepdims=True)
    logp = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return actions.astype(np.int64), logp[np.arange(len(logits)), actions]
