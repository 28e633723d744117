"""Local models in Ray's and vLLM's words: the GPU pool is wired as configured, without a GPU."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig

from serve_app.config import LocalModelConfig, PriceConfig, load_config
from serve_app.errors import ConfigError, EngineError, InvalidRequest
from serve_app.models.deploy import build_model, deployment_name

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's own imports deprecate things
    from ray.llm._internal.serve.engines.vllm.vllm_engine import _get_vllm_engine_config

    from serve_app.models.local import JsonLLMServer, _raise_if_error, llm_config
    from serve_app.models.process_reward import ProcessRewardServer

pytestmark = pytest.mark.serial  # what builds a GPU graph starts Ray

NANO = Path("configs/nano/weights").absolute()
GPU_POOL = load_config("configs/gpu-7b.yaml").models
GPU_MODELS = [model for model in GPU_POOL if isinstance(model, LocalModelConfig)]
STAND_INS = sorted(folder for folder in NANO.iterdir() if folder.is_dir())

UNKNOWN_HERE = "qwen3-vl-8b-instruct"
"""vLLM looks into a model that sees with torchvision, which the lock for CPUs leaves out."""

SMALL_MODELS = [
    model
    for model in load_config("configs/small.yaml").models
    if isinstance(model, LocalModelConfig)
]

QWEN = {"model_type": "qwen2", "hidden_size": 3584, "num_attention_heads": 28}
LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32}
PUBLISHED = {
    "qwen2.5-7b-instruct": ("Qwen2ForCausalLM", 32768, QWEN),
    "llama-3.1-8b-instruct": ("LlamaForCausalLM", 131072, LLAMA),
    "internlm3-8b-instruct": ("InternLM3ForCausalLM", 32768, LLAMA),
    "deepseek-r1-distill-qwen-7b": ("Qwen2ForCausalLM", 131072, QWEN),
    "qwen2.5-coder-7b-instruct": ("Qwen2ForCausalLM", 32768, QWEN),
    "qwen2.5-math-prm-7b": ("Qwen2ForProcessRewardModel", 4096, QWEN),
}
"""What the models' own config.json say that vLLM checks settings against: architecture, positions
and shape."""


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNLM3_COMMIT", COMMIT)


def filled(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        name: COMMIT if value == "${INTERNLM3_COMMIT}" else value
        for name, value in settings.items()
    }


def engine_config(model: LocalModelConfig) -> Any:
    return llm_config(model).get_engine_config()


def resolved_by_vllm(
    model: LocalModelConfig, architecture: str, positions: int, shape: dict[str, Any], folder: Path
) -> Any:
    """What vLLM makes of a model's settings, with what the model's own config.json says."""
    (folder / "config.json").write_text(
        json.dumps(
            shape
            | {"architectures": [architecture], "max_position_embeddings": positions}
            | {"num_hidden_layers": 2, "num_key_value_heads": 4, "dtype": "bfloat16"}
        )
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).symlink_to(STAND_INS[0] / name)
    _, resolved = _get_vllm_engine_config(
        llm_config(model.model_copy(update={"model_source": str(folder)}))
    )
    return resolved


def in_its_place(model: LocalModelConfig) -> LocalModelConfig:
    """The same model with nano weights on a CPU."""
    weights = STAND_INS[GPU_MODELS.index(model) % len(STAND_INS)]
    return model.model_copy(update={"model_source": str(weights), "bundle": {"CPU": 0.2}})


def test_every_model_of_the_gpu_pool_is_known_here() -> None:
    assert {model.model_id for model in GPU_MODELS} == {UNKNOWN_HERE, *PUBLISHED}
    assert len(GPU_MODELS) == len(GPU_POOL)


@pytest.mark.parametrize("model", GPU_MODELS, ids=lambda model: model.model_id)
def test_a_gpu_model_asks_for_its_gpu_and_for_nothing_vllm_does_not_know(
    model: LocalModelConfig,
) -> None:
    from vllm import AsyncEngineArgs

    engine = engine_config(model)
    assert engine.placement_bundles == [{"GPU": 1, "CPU": 2}]
    assert set(engine.engine_kwargs) <= set(AsyncEngineArgs.__dataclass_fields__)


@pytest.mark.parametrize(
    "model",
    [model for model in GPU_MODELS if model.model_id in PUBLISHED],
    ids=lambda model: model.model_id,
)
def test_vllm_accepts_the_engine_settings(
    model: LocalModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture, positions, shape = PUBLISHED[model.model_id]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    published = model.model_copy(update={"bundle": {"CPU": 1}})
    resolved = resolved_by_vllm(published, architecture, positions, shape, tmp_path)
    assert resolved.model_config.architecture == architecture
    assert resolved.structured_outputs_config.backend == "xgrammar"


@pytest.mark.parametrize("model", SMALL_MODELS, ids=lambda model: model.model_id)
def test_vllm_accepts_the_settings_of_the_small_pool(
    model: LocalModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shape = QWEN | {"hidden_size": 1536, "num_attention_heads": 12}
    resolved = resolved_by_vllm(model, "Qwen2ForCausalLM", 32768, shape, tmp_path)
    assert resolved.scheduler_config.max_num_seqs == model.engine_kwargs["max_num_seqs"]
    assert resolved.model_config.max_model_len == model.engine_kwargs["max_model_len"]
    assert resolved.model_config.max_model_len == model.engine_kwargs["max_model_len"]
    assert (resolved.model_config.runner_type == "pooling") == (model.role == "verifier")


@pytest.mark.parametrize("model", GPU_MODELS, ids=lambda model: model.model_id)
def test_the_gpu_graph_is_wired_with_nano_weights_in_each_place(model: LocalModelConfig) -> None:
    stand_in = in_its_place(model)
    deployment = build_model(stand_in)._bound_deployment
    given = deployment.init_kwargs["llm_config"]
    assert deployment.name == deployment_name(stand_in)
    assert deployment.name.startswith(f"{model.model_id}-")
    # Serve's own part of the replica and the engine's worker, in one placement group.
    assert sum(b.get("CPU", 0) for b in deployment._replica_config.placement_group_bundles) == 1.2
    assert given.engine_kwargs == {
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        **filled(model.engine_kwargs),
    }
    assert given.model_loading_config.model_source == stand_in.model_source
    assert deployment.func_or_class is not None
    served_by = ProcessRewardServer if model.role == "verifier" else JsonLLMServer
    assert issubclass(deployment.func_or_class, served_by)
    assert ("scoring" in deployment.init_kwargs) == (model.role == "verifier")
    assert deployment.max_ongoing_requests == model.max_ongoing_requests
    autoscaling = deployment._deployment_config.autoscaling_config
    assert isinstance(autoscaling, AutoscalingConfig)
    assert autoscaling.max_replicas == model.autoscaling.max_replicas
    # Prompts are written by the template that comes with the weights.
    assert "chat_template" not in given.engine_kwargs
    assert (Path(stand_in.model_source) / "chat_template.jinja").exists()


@pytest.mark.parametrize("model", GPU_MODELS, ids=lambda model: model.model_id)
def test_a_model_with_function_tools_has_a_parser_that_vllm_knows(model: LocalModelConfig) -> None:
    from vllm.tool_parsers import ToolParserManager

    settings = model.engine_kwargs
    if {"calculator", "python"} & set(model.tools):
        assert settings["enable_auto_tool_choice"] is True
        assert ToolParserManager.get_tool_parser(settings["tool_call_parser"])
    else:
        assert "tool_call_parser" not in settings


def test_remote_code_runs_at_the_commit_in_the_environment_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (model,) = (m for m in GPU_MODELS if m.engine_kwargs.get("trust_remote_code"))
    given = llm_config(model).engine_kwargs
    assert (given["revision"], given["code_revision"]) == (COMMIT, COMMIT)
    for value in ("", "main", COMMIT[:-1]):
        monkeypatch.setenv("INTERNLM3_COMMIT", value)
        with pytest.raises(ConfigError, match="'INTERNLM3_COMMIT' has to hold the commit"):
            llm_config(model)


def test_two_settings_of_a_model_are_two_applications() -> None:
    model = in_its_place(GPU_MODELS[0])
    longer = model.model_copy(update={"engine_kwargs": {"max_model_len": 32768}})
    price = PriceConfig(usd_per_1m_completion_tokens=7)
    dearer = model.model_copy(update={"price": price})
    assert deployment_name(model) != deployment_name(longer)
    assert deployment_name(model) == deployment_name(dearer)


def test_tensor_parallelism_asks_for_a_bundle_per_rank() -> None:
    model = GPU_MODELS[0].model_copy(update={"engine_kwargs": {"tensor_parallel_size": 4}})
    assert engine_config(model).placement_bundles == [{"GPU": 1, "CPU": 2}] * 4


def test_a_cpu_model_asks_for_no_gpu() -> None:
    model = load_config("configs/nano.yaml").models[0]
    assert isinstance(model, LocalModelConfig)
    assert engine_config(model).placement_bundles == [{"CPU": 0.2}]


STRUCTURED = {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (STRUCTURED, "response_format"),
        ({"tools": [{}], "tool_choice": "required"}, "tools"),
    ],
)
def test_a_schema_that_the_engine_gives_up_on_is_the_callers_matter(
    body: dict[str, Any], param: str
) -> None:
    given_up = {"error": {"code": 500, "message": "Internal server error"}}
    with pytest.raises(InvalidRequest, match="simplify it") as caught:
        _raise_if_error(given_up, body)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("body", "code"), [({}, 500), ({"tools": [{}], "tool_choice": "auto"}, 500), (STRUCTURED, 503)]
)
def test_an_engine_that_fails_otherwise_is_to_blame(body: dict[str, Any], code: int) -> None:
    with pytest.raises(EngineError):
        _raise_if_error({"error": {"code": code, "message": "x"}}, body)


def test_what_a_compiler_says_leaves_without_its_source_file() -> None:
    place = "[22:06:56] /project/cpp/json_schema_converter.cc:4944: "
    message = f"Failed to transform json schema into a grammar: {place}enum must not be empty"
    with pytest.raises(InvalidRequest) as caught:
        _raise_if_error({"error": {"code": 400, "message": message}}, STRUCTURED)
    assert caught.value.message == message.replace(place, "")
