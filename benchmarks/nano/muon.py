"""Muon for small networks on a CPU: momentum, then each update's matrix is orthogonalised.

`torch.optim.Muon` iterates in bfloat16, which a CPU without bfloat16 instructions runs slower than
the backward pass itself. This one iterates in float32 and batches equal shapes.

Reference: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(updates: Tensor, num_steps: int = 5) -> Tensor:
    """Push the singular values of each matrix towards 1 with a quintic Newton-Schulz iteration.

    Args:
        updates: (num_matrices, rows, columns) float32.
        num_steps: Iterations; 5 leaves singular values between about 0.7 and 1.2.

    Returns:
        (num_matrices, rows, columns) float32.
    """
    a, b, c = _COEFFICIENTS
    is_tall = updates.shape[-2] > updates.shape[-1]
    x: Tensor = updates.mT if is_tall else updates
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if is_tall else x
    return result


class Muon:
    """Muon with Nesterov momentum and decoupled weight decay, for 2-D weights only.

    The step size is `lr * sqrt(max(1, rows / columns))`, as in the reference.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.05,
    ) -> None:
        self.lr = lr
        self._momentum = momentum
        self._weight_decay = weight_decay
        groups: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            if parameter.ndim != 2:
                raise ValueError(f"Muon takes 2-D weights, got shape {tuple(parameter.shape)!r}")
            groups[tuple(parameter.shape)].append(parameter)
        self._groups = list(groups.values())
        self._buffers = [torch.zeros(len(g), *g[0].shape) for g in self._groups]

    @torch.no_grad()
    def step(self) -> None:
        """Apply one update from the gradients at hand."""
        for group, buffer in zip(self._groups, self._buffers, strict=True):
            gradients = torch.stack([p.grad for p in group if p.grad is not None])
            buffer.lerp_(gradients, 1 - self._momentum)
            updates = orthogonalize(gradients.lerp(buffer, self._momentum))
            rows, columns = updates.shape[-2:]
            step_size = self.lr * max(1.0, rows / columns) ** 0.5
            for parameter, update in zip(group, updates, strict=True):
                parameter.mul_(1 - self.lr * self._weight_decay)
                parameter.add_(update, alpha=-step_size)
