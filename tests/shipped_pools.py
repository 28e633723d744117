"""The shipped pools that `atlas init` would write on some machine; `python -m tests.shipped_pools`
writes them anew."""

from __future__ import annotations

from pathlib import Path

from serve_app.machine.engines import OLLAMA, EngineModel, FoundEngine
from serve_app.machine.hardware import Hardware
from serve_app.machine.propose import Machine, propose
from serve_app.machine.writing import render

CONFIGS = Path(__file__).parents[1] / "configs"

_OLLAMA = FoundEngine(
    OLLAMA,
    "127.0.0.1:11434",
    (
        EngineModel("llama3.2:3b", 3.2, 4096, tools=True),
        EngineModel("qwen2.5-coder:7b", 7.6, 4096, tools=True),
        EngineModel("deepseek-r1:8b", 8.2, 4096, tools=False, thinks=True),
        EngineModel("gemma3:4b", 4.3, 4096, vision=True, tools=False),
    ),
)
_NEW = "`atlas init` writes such a file for the models that are on your machine."

SHIPPED = {
    "ollama.yaml": (
        Machine(Hardware(8, 32.0, 24.0), (_OLLAMA,)),
        (
            "Models that Ollama serves on this machine; Ollama gets them with `ollama pull` and "
            "their names below.",
            _NEW,
        ),
    ),
    "small.yaml": (
        Machine(Hardware(4, 32.0, 28.0), has_vllm=True),
        (
            "Models of 0.5 to 1.5 billion parameters from the hub, on vLLM: for a machine with 4 "
            "CPUs and 24 GiB of free memory. With less, take models out from below.",
            "For a small GPU (16 GB or more; extra `gpu`) give each model `bundle: {GPU: 0.33, "
            "CPU: 1}` and, among its engine_kwargs, `gpu_memory_utilization: 0.3`, in place of "
            "num_cpus, env, enforce_eager, kv_cache_memory_bytes and "
            "distributed_executor_backend; `atlas init` writes it so where it finds a GPU.",
        ),
    ),
}
"""Name of each file: the machine, and what the file's first lines say."""


def text_of(name: str) -> str:
    machine, title = SHIPPED[name]
    proposal = propose(machine)
    assert proposal is not None
    return render(proposal, title)


if __name__ == "__main__":
    for name in SHIPPED:
        (CONFIGS / name).write_text(text_of(name))
