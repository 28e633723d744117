"""The policy network as an RLlib module of the new API stack, and its learner.

`RoutingModule` adds nothing to `PolicyNet`: what RLlib trains is what a snapshot serves.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.torch import TorchRLModule

from serve_app.router.policy.policy_net import PolicyNet

_KL_COEFF = "kl_coeff"


class RoutingModule(TorchRLModule, ValueFunctionAPI):
    """`PolicyNet` for RLlib.

    `model_config` has under `net` the network's `width`, `num_heads` and `num_layers`, and under
    `net_seed` where its first weights come from. The observation space is that of
    `rl.ppo.env.spaces_of`.
    """

    def setup(self) -> None:
        """Make the network; takes nothing from torch's global generator."""
        dim = self.observation_space["query"].shape[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.model_config["net_seed"])
            self.net = PolicyNet(dim, **self.model_config["net"])

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Logits of the actions, and as the embeddings the values: they come in one pass."""
        logits, values = self.net(batch[Columns.OBS])
        return {Columns.ACTION_DIST_INPUTS: logits, Columns.EMBEDDINGS: values}

    def compute_values(self, batch: dict[str, Any], embeddings: Any | None = None) -> torch.Tensor:
        """(B,) the values, from the pass that was made anyway where it is given."""
        values: torch.Tensor
        if embeddings is not None:
            values = embeddings
        else:
            _, values = self.net(batch[Columns.OBS])
        return values


class RoutingLearner(PPOTorchLearner):
    """RLlib's PPO learner, whose checkpoints hold all that the next update depends on."""

    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As RLlib's, and the current weight of the KL term, which RLlib leaves out."""
        state: dict[str, Any] = super().get_state(
            components, not_components=not_components, **kwargs
        )
        coefficient = self.curr_kl_coeffs_per_module[DEFAULT_MODULE_ID]
        return state | {_KL_COEFF: float(coefficient)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Undo `get_state`."""
        super().set_state(state)
        if _KL_COEFF in state:
            self.curr_kl_coeffs_per_module[DEFAULT_MODULE_ID].data.fill_(state[_KL_COEFF])
