"""Local models in Ray's and vLLM's words: the GPU pool is wired as configured, without a GPU."""

import warnings
from typing import Any

import pytest

from serve_app.config import LocalModelConfig, load_config

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's own imports deprecate things
    from serve_app.models.local import llm_config

GPU_POOL = load_config("configs/gpu-7b.yaml").models
GPU_MODELS = [model for model in GPU_POOL if isinstance(model, LocalModelConfig)]


def engine_config(model: LocalModelConfig) -> Any:
    return llm_config(model).get_engine_config()


@pytest.mark.parametrize("model", GPU_MODELS, ids=lambda model: model.model_id)
def test_a_gpu_model_asks_for_its_gpu_and_for_nothing_vllm_does_not_know(
    model: LocalModelConfig,
) -> None:
    from vllm import AsyncEngineArgs

    engine = engine_config(model)
    assert engine.placement_bundles == [{"GPU": 1, "CPU": 2}]
    assert set(engine.engine_kwargs) <= set(AsyncEngineArgs.__dataclass_fields__)


def test_tensor_parallelism_asks_for_a_bundle_per_rank() -> None:
    model = GPU_MODELS[0].model_copy(update={"engine_kwargs": {"tensor_parallel_size": 4}})
    assert engine_config(model).placement_bundles == [{"GPU": 1, "CPU": 2}] * 4


def test_a_cpu_model_asks_for_no_gpu() -> None:
    model = load_config("configs/nano.yaml").models[0]
    assert isinstance(model, LocalModelConfig)
    assert engine_config(model).placement_bundles == [{"CPU": 0.2}]
