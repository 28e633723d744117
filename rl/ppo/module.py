"""The policy network as an RLlib module of the new API stack, and its learner.

`RoutingModule` adds nothing to `TorchPolicyNet`.
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

from rl.ppo.torch_policy_net import TorchPolicyNet

START_KL, START_KL_COEFF = "start_kl", "start_kl_coeff"
_KL_COEFF = "kl_coeff"


class RoutingModule(TorchRLModule, ValueFunctionAPI):
    """`TorchPolicyNet` for RLlib.

    `model_config` has under `start` the tensors that it starts with, as `TorchPolicyNet.to_tensors`
    gives them. The observation space is that of `rl.ppo.env.spaces_of`.
    """

    def setup(self) -> None:
        """Make the network; takes nothing from torch's global generator."""
        self.net = TorchPolicyNet.from_tensors(self.model_config["start"]).train()
        # Not part of the module's own weights: it never changes, and is not to be sent anywhere.
        self._start = (TorchPolicyNet.from_tensors(self.model_config["start"]),)

    def logits_at_start(self, observation: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, P + 2) those of the first weights."""
        with torch.no_grad():
            logits: torch.Tensor = self._start[0](observation)[0]
        return logits

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
    """RLlib's PPO learner, which stays near where it started.

    Its checkpoints hold all that the next update depends on. `learner_config_dict` has under
    `start_kl_coeff` the weight of the KL divergence from the first policy.
    """

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> torch.Tensor:
        """PPO's loss, and the divergence from the first policy."""
        loss: torch.Tensor = super().compute_loss_for_module(
            module_id=module_id, config=config, batch=batch, fwd_out=fwd_out
        )
        weight = config.learner_config_dict[START_KL_COEFF]
        if not weight:
            return loss
        now = fwd_out[Columns.ACTION_DIST_INPUTS].log_softmax(dim=1)
        module = self.module[module_id].unwrapped()
        before = module.logits_at_start(batch[Columns.OBS]).log_softmax(dim=1)
        apart: torch.Tensor = (now.exp() * (now - before)).sum(dim=1).mean()
        self.metrics.log_value((module_id, START_KL), apart, window=1)
        total: torch.Tensor = loss + weight * apart
        return total

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
