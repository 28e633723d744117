"""Gymnasium environments over `rl.ppo.episodes`: one request each, or many in one step.

Observation: a dict of float32 arrays as `serve_app.router.policy.features.encode` gives them, with
`max_pairs` rows of candidates; those beyond the table's pairs are zero and masked.

Action: 0 .. max_pairs - 1 runs that pair, max_pairs thinks, max_pairs + 1 answers. What the mask
does not allow ends the episode with `R_fmt`. An episode also ends when nothing but to answer is
left.

Reward: the sum of the terms of `rl.ppo.reward`, which `info` has apart (see
`rl.ppo.episodes.Stepped`).
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from rl.ppo.backend import Backend
from rl.ppo.episodes import Episodes, Stepped
from rl.ppo.randomise import EnvSettings
from rl.ppo.table import ReplayTable
from serve_app.errors import ConfigError
from serve_app.router.policy.features import NUM_CONTEXT, NUM_FEATURES, answer_action, think_action

__all__ = ["EnvSettings", "Episodes", "RoutingEnv", "Stepped", "VectorRoutingEnv", "spaces_of"]

Float = NDArray[np.float32]
Observation = dict[str, Float]

_LARGEST = 1e3
"""No number of an observation is larger; most are within 1."""


def spaces_of(dim: int, max_pairs: int) -> tuple[spaces.Dict, spaces.Discrete[np.int64]]:
    """Observation and action space of one request.

    Args:
        dim: Of the embeddings.
        max_pairs: Rows of candidates.
    """

    def box(*shape: int, low: float = -_LARGEST, high: float = _LARGEST) -> spaces.Box:
        return spaces.Box(low, high, shape, np.float32)

    return spaces.Dict(
        {
            "query": box(dim),
            "answer": box(dim),
            "context": box(NUM_CONTEXT),
            "candidates": box(max_pairs, NUM_FEATURES),
            "worth": box(max_pairs + 2),
            "mask": box(max_pairs + 2, low=0.0, high=1.0),
        }
    ), spaces.Discrete(max_pairs + 2)


class _Padding:
    """Between the table's P columns and the environment's `max_pairs`."""

    def __init__(self, num_pairs: int, max_pairs: int) -> None:
        if num_pairs > max_pairs:
            raise ConfigError(
                f"the table has {num_pairs} pairs, the environment room for {max_pairs}: raise "
                "max_pairs"
            )
        self._num_pairs, self._max_pairs = num_pairs, max_pairs
        # Of padding to an action that never exists.
        self._action = np.full(max_pairs + 2, -1, np.intp)
        self._action[:num_pairs] = np.arange(num_pairs)
        self._action[think_action(max_pairs)] = think_action(num_pairs)
        self._action[answer_action(max_pairs)] = answer_action(num_pairs)

    def actions(self, actions: NDArray[np.integer]) -> NDArray[np.intp]:
        """(B,) as the episodes count them."""
        mapped: NDArray[np.intp] = self._action[actions]
        return mapped

    def observation(self, observation: Observation) -> Observation:
        """The same with `max_pairs` rows."""
        if self._num_pairs == self._max_pairs:
            return observation
        size, of = len(observation["query"]), self._num_pairs
        candidates = np.zeros((size, self._max_pairs, NUM_FEATURES), np.float32)
        candidates[:, :of] = observation["candidates"]
        padded: Observation = {"candidates": candidates}
        for name in ("worth", "mask"):
            wide = np.zeros((size, self._max_pairs + 2), np.float32)
            wide[:, :of] = observation[name][:, :of]
            wide[:, self._max_pairs :] = observation[name][:, of:]
            padded[name] = wide
        return observation | padded


class VectorRoutingEnv(gymnasium.vector.VectorEnv[Observation, NDArray[np.int64], Any]):
    """Many requests in one step, in numpy.

    An episode that ended is replaced at the next step, whose action it ignores and whose reward is
    0 (`AutoresetMode.NEXT_STEP`, which RLlib's env runners take for granted). `core` has no such
    idle step: `core.reset(rows)` starts episodes whenever the caller likes.
    """

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(
        self, backend: Backend | ReplayTable, num_envs: int, settings: EnvSettings | None = None
    ) -> None:
        """Build the spaces.

        Args:
            backend: What runs the pairs; a table is replayed.
            num_envs: Requests side by side.
            settings: What episodes are like.

        Raises:
            ConfigError: If the table has more than `max_pairs` pairs, no view or no outcome.
        """
        self.core = Episodes(backend, num_envs, settings)
        """The episodes without Gymnasium's dress; see `rl.ppo.episodes.Episodes`."""
        self.num_envs = num_envs
        self._padding = _Padding(self.core.num_pairs, self.core.settings.max_pairs)
        self.single_observation_space, self.single_action_space = spaces_of(
            self.core.table.embeddings.shape[1], self.core.settings.max_pairs
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start all episodes.

        Args:
            seed: Starts the draws anew; of a list the first counts.
            options: Arguments of `Episodes.reset`, but `rows`.
        """
        first = seed[0] if isinstance(seed, list) else seed
        if first is not None:
            self.core.seed(first)
        self.core.reset(**(options or {}))
        return self._padding.observation(self.core.observe()), {}

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[Observation, Float, NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Act in every episode; those that ended before are started anew instead.

        Returns:
            Observations, rewards, terminated, truncated (never), and the arrays of `Stepped.info`
            with a mask `_name` each, as Gymnasium has them.
        """
        ended = ~self.core.active
        reward, done, info = self.core.step(self._padding.actions(np.asarray(actions)))
        if ended.any():
            self.core.reset(np.flatnonzero(ended))
        masks = {f"_{name}": done if name in {"score", "pair"} else ~ended for name in info}
        truncated = np.zeros(self.num_envs, np.bool_)
        return (
            self._padding.observation(self.core.observe()),
            reward,
            done,
            truncated,
            info | masks,
        )


class RoutingEnv(gymnasium.Env[Observation, np.int64]):
    """One request at a time; the same episodes as `VectorRoutingEnv` with one row."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, backend: Backend | ReplayTable, settings: EnvSettings | None = None) -> None:
        """As `VectorRoutingEnv`."""
        self.core = Episodes(backend, 1, settings)
        self._padding = _Padding(self.core.num_pairs, self.core.settings.max_pairs)
        self.observation_space, self.action_space = spaces_of(
            self.core.table.embeddings.shape[1], self.core.settings.max_pairs
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: Starts the draws anew.
            options: Arguments of `Episodes.reset`, but `rows`; each a single value.
        """
        super().reset(seed=seed)
        if seed is not None:
            self.core.seed(seed)
        chosen = {name: np.atleast_1d(value) for name, value in (options or {}).items()}
        self.core.reset(**chosen)
        return self._observation(), {}

    def step(self, action: np.int64 | int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Act.

        Returns:
            Observation, reward, terminated, truncated (never), and `Stepped.info` of the one row.
        """
        reward, done, info = self.core.step(self._padding.actions(np.array([action])))
        single = {name: values[0].item() for name, values in info.items()}
        return self._observation(), float(reward[0]), bool(done[0]), False, single

    def _observation(self) -> Observation:
        observation = self._padding.observation(self.core.observe())
        return {name: values[0] for name, values in observation.items()}
