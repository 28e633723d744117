"""Learned policies written by hand, so that a test knows what they do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from rl.ppo.torch_policy_net import TorchPolicyNet
from serve_app.router.policy.features import DESCRIPTOR_DIM
from serve_app.router.snapshots.snapshot import GATE_THRESHOLD, THINKS, RouterSnapshot
from tests.router_data import DIM, make_snapshot

QUALITY = DESCRIPTOR_DIM + 2
"""Column of a pair's expected score among its features."""
ALWAYS_POLICY = 2.0
"""A threshold that no confidence reaches."""


def make_policy(
    *, think: float = -15.0, answer: float = -10.0, threshold: float = ALWAYS_POLICY, dim: int = DIM
) -> dict[str, NDArray[np.float32]]:
    """A policy that takes the best pair not tried yet, whatever the rule `voi` says.

    Args:
        think: Logit of `think`; those of pairs are their expected scores, in [0, 1].
        answer: Logit of `answer`.
        threshold: Confidence from which path 1 keeps a request.
        dim: Of the embeddings.
    """
    net = TorchPolicyNet(dim, width=8, num_heads=2, num_layers=1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.worth_weight.zero_()
        net.candidate.weight[0, QUALITY] = 1.0
        net.candidate_logit.weight[0, 0] = 1.0
        net.slot_logits.bias.copy_(torch.tensor([think, answer]))
    return net.to_tensors() | {GATE_THRESHOLD: np.array([threshold], np.float32)}


def with_policy(snapshot: RouterSnapshot | None = None, **policy: float) -> RouterSnapshot:
    """A snapshot with such a policy; arguments as of `make_policy`."""
    return replace(
        snapshot or make_snapshot(),
        policy=make_policy(**policy),  # type: ignore[arg-type]
        metadata={THINKS: 1},
    )
