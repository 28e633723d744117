"""Open models of the hub that vLLM runs here, chosen by the memory that they take."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serve_app.machine.hardware import Gpu, Hardware


@dataclass(frozen=True)
class HubModel:
    """A model of the hub."""

    model_id: str
    repository: str
    billions: float
    weights_gb: float
    """What is downloaded, in 10⁹ bytes."""
    context_tokens: int
    calls_tools: bool = True


SMALL = (
    HubModel("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", 0.5, 1.0, 32_768),
    HubModel("qwen2.5-coder-1.5b", "Qwen/Qwen2.5-Coder-1.5B-Instruct", 1.5, 3.1, 32_768),
    HubModel("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B-Instruct", 1.5, 3.1, 32_768),
)
"""For one machine's CPU, or a small GPU. In the order in which they are taken; Apache-2.0."""
LARGE = (
    HubModel("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", 7.6, 15.2, 32_768),
    HubModel("qwen2.5-coder-7b", "Qwen/Qwen2.5-Coder-7B-Instruct", 7.6, 15.2, 32_768),
    HubModel(
        "deepseek-r1-7b", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 7.6, 15.2, 131_072, False
    ),
)
"""For GPUs; Apache-2.0, the last one MIT."""

_LARGE_GIB = 21.0
"""GPU memory of a 7B model in bfloat16: weights, activations, and room for conversations."""
_GRAPH_GIB = 3.0
"""Memory of Ray and of everything but the models."""


@dataclass(frozen=True)
class Placed:
    """A model and the room it gets."""

    model: HubModel
    gpu_share: float = 0.0
    """Share of one GPU; 0: on the CPU."""

    @property
    def startup_gib(self) -> float:
        """Memory of the machine that its start takes at its peak."""
        return 4.0 + 2.1 * self.model.billions


def place(hardware: Hardware) -> tuple[Placed, ...]:
    """The models that fit: on the GPUs where there are any, else on the CPU."""
    if hardware.gpus:
        return _on_gpus(hardware.gpus)
    free_gib, placed = hardware.free_gib - _GRAPH_GIB, []
    for model in SMALL:
        free_gib -= Placed(model).startup_gib
        if free_gib >= 0:
            placed.append(Placed(model))
    return tuple(placed)


def _on_gpus(gpus: Sequence[Gpu]) -> tuple[Placed, ...]:
    """One model for each GPU, several for one that has the room."""
    largest = max(gpu.memory_gib for gpu in gpus)
    models, needed_gib = (LARGE, _LARGE_GIB) if largest >= _LARGE_GIB else (SMALL, 5.0)
    fitting = [gpu for gpu in gpus if gpu.memory_gib >= needed_gib]
    if not fitting:
        return ()
    # Ray may put any share on any GPU, so the smallest one says how many share one.
    room = math.floor(min(gpu.memory_gib for gpu in fitting) / needed_gib)
    per_gpu = min(room, math.ceil(len(models) / len(fitting)))
    share = math.floor(100 / per_gpu) / 100
    return tuple(Placed(model, share) for model in models[: per_gpu * len(fitting)])


def cached_weights(repository: str) -> bool:
    """Whether weights of a repository of the hub are in this machine's cache."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()
    folder = cache / f"models--{repository.replace('/', '--')}" / "snapshots"
    return any(folder.glob("*/*.safetensors"))
