"""TorchPolicyNet: the network of path 2 while it learns.

`serve_app.router.policy.policy_net` says what it is, and is the same network without gradients.
This one gives the value of a state too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from serve_app.router.policy.features import DESCRIPTOR_DIM, NUM_CONTEXT, NUM_FEATURES
from serve_app.router.policy.policy_net import (
    HEADS_KEY,
    ILLEGAL_LOGIT,
    LOGIT_REACH,
    NORM_EPSILON,
    NUM_SLOTS,
    WORTH_WEIGHT_KEY,
    checked,
)

WORTH_WEIGHT = 30.0
"""Logits that one point of utility is worth: of two actions 0.05 apart the better one is taken 4
times as often, where actions are drawn."""


class TorchPolicyNet(nn.Module):
    """Scores a set of candidates, as `PolicyNet` does, and says what the state is worth.

    The slots together become the value.
    """

    worth_weight: Tensor

    def __init__(self, dim: int, width: int = 64, num_heads: int = 4, num_layers: int = 2) -> None:
        """Draw weights from torch's global generator; the logits start as those of the rule `voi`.

        Args:
            dim: Of the embeddings of queries and answers.
            width: Of the tokens.
            num_heads: Of the attention; divides the width.
            num_layers: Rounds of attention, at least 1.

        Raises:
            ValueError: If a number is out of range.
        """
        super().__init__()
        if min(dim, width, num_heads, num_layers) < 1 or width % num_heads:
            raise ValueError(
                f"dim {dim}, width {width}, num_heads {num_heads} and num_layers {num_layers} do "
                "not make a network: each is at least 1, and num_heads divides the width"
            )
        self.num_heads = num_heads
        self.query = nn.Linear(dim, width)
        self.answer = nn.Linear(dim, width, bias=False)
        self.context = nn.Linear(NUM_CONTEXT, width, bias=False)
        self.to_tokens = nn.Linear(width, width)
        self.to_slots = nn.Linear(width, NUM_SLOTS * width)
        self.candidate = nn.Linear(NUM_FEATURES, width, bias=False)
        self.layers = nn.ModuleList(_Round(width, num_heads) for _ in range(num_layers))
        self.candidate_logit = nn.Linear(width, 1)
        self.slot_logits = nn.Linear(NUM_SLOTS * width, 2)
        self.critic = nn.Linear(NUM_SLOTS * width, width)
        self.value = nn.Linear(width, 1)
        self.register_buffer(WORTH_WEIGHT_KEY, torch.tensor([WORTH_WEIGHT]))
        for head in (self.candidate_logit, self.slot_logits):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        # What training never shows stays without a say in serving.
        with torch.no_grad():
            for weight in (
                self.query.weight,
                self.answer.weight,
                self.candidate.weight[:, :DESCRIPTOR_DIM],
            ):
                weight.zero_()

    def forward(self, observation: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Score a batch of states.

        Args:
            observation: As `features.encode` makes it, as float32 tensors: `query` and `answer`
                (B, dim), `context` (B, NUM_CONTEXT), `candidates` (B, P, NUM_FEATURES), `worth`
                and `mask` (B, P + 2). A candidate whose row is zero is not there.

        Returns:
            Logits (B, P + 2), `ILLEGAL_LOGIT` where the mask is 0, and values (B,).
        """
        candidates, mask = observation["candidates"], observation["mask"]
        size = len(candidates)
        request = torch.relu(
            self.query(observation["query"])
            + self.answer(observation["answer"])
            + self.context(observation["context"])
        )
        slots = self.to_slots(request).view(size, NUM_SLOTS, -1)
        tokens = torch.relu(self.candidate(candidates) + self.to_tokens(request)[:, None, :])
        absent = (candidates == 0).all(dim=2)
        for layer in self.layers:
            tokens, slots = layer(tokens, slots, absent)
        seen = slots.reshape(size, -1)
        logits = torch.cat([self.candidate_logit(tokens)[:, :, 0], self.slot_logits(seen)], dim=1)
        logits = LOGIT_REACH * torch.tanh(logits / LOGIT_REACH)
        logits = logits + self.worth_weight * observation["worth"]
        values = self.value(torch.relu(self.critic(seen)))[:, 0]
        return logits.masked_fill(mask == 0, ILLEGAL_LOGIT), values

    def to_tensors(self) -> dict[str, NDArray[np.float32]]:
        """The weights by name, as a snapshot keeps them; copies."""
        tensors = {
            name: tensor.detach().cpu().numpy().astype(np.float32, copy=True)
            for name, tensor in self.state_dict().items()
        }
        return tensors | {HEADS_KEY: np.array([self.num_heads], np.float32)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[np.floating]]) -> TorchPolicyNet:
        """The network that `to_tensors` gave, in evaluation mode.

        Raises:
            SnapshotError: As `PolicyNet` does.
        """
        weights = checked(tensors)
        # Its first weights are of no use, and must cost the caller none of its random numbers.
        with torch.random.fork_rng(devices=[]):
            net = cls(weights.dim, weights.width, weights.num_heads, weights.num_layers)
        net.load_state_dict(
            {name: torch.tensor(of, dtype=torch.float32) for name, of in weights.tensors.items()}
        )
        return net.eval()


class _Round(nn.Module):
    """The slots look at all tokens; every token takes in what they saw.

    A head's keys and values are linear in the tokens, so the slots' side of the product carries
    their weights: there are two slots and many tokens.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self._num_heads = num_heads
        part = width // num_heads
        self.norm = nn.LayerNorm(width, NORM_EPSILON)
        self.asked = nn.Linear(width, width, bias=False)
        self.keys = nn.Parameter(torch.randn(num_heads, part, width) / math.sqrt(width))
        self.values = nn.Parameter(torch.randn(num_heads, width, part) / math.sqrt(width))
        self.seen = nn.Linear(width, width)
        self.widen = nn.Linear(NUM_SLOTS * width, 2 * width)
        self.narrow = nn.Linear(2 * width, NUM_SLOTS * width)
        self.told = nn.Linear(NUM_SLOTS * width, width)
        self.token = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor, slots: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
        """Take (B, P, width) tokens, (B, 2, width) slots, and (B, P) which tokens are not there."""
        size, _, width = tokens.shape
        # Of one head after another, because a head has weights of its own: (heads, B * 2, part).
        asked = self.asked(self.norm(slots)).view(2 * size, self._num_heads, -1).transpose(0, 1)
        keyed = (asked @ self.keys).view(self._num_heads, size, 2, width).permute(1, 0, 2, 3)
        keyed = keyed.reshape(size, -1, width) / math.sqrt(width // self._num_heads)
        scores = keyed @ tokens.transpose(1, 2)
        weights = scores.masked_fill(absent[:, None, :], ILLEGAL_LOGIT).softmax(dim=2)
        read = (weights @ tokens).view(size, self._num_heads, 2, width).transpose(0, 1)
        read = read.reshape(self._num_heads, 2 * size, width) @ self.values
        slots = slots + self.seen(read.transpose(0, 1).reshape(size, 2, width))
        mixed = self.narrow(torch.relu(self.widen(slots.reshape(size, -1))))
        slots = slots + mixed.view_as(slots)
        told = self.told(slots.reshape(size, -1))
        return tokens + torch.relu(self.token(tokens) + told[:, None, :]), slots
