"""A process reward model on the real engine: the scores are those of the same weights in torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import serve
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2Model

from serve_app.config import LocalModelConfig, ScoringConfig
from serve_app.errors import InvalidRequest
from serve_app.models.deploy import DEPLOYING, build_model
from serve_app.models.reply import read_reply
from serve_app.models.verifier import read_score, scoring_body

pytestmark = [pytest.mark.serve, pytest.mark.usefixtures("ray_session")]

NANO = Path("configs/nano/weights/nano-math")
QUESTION = "What is 3 + 4?"
MAX_TOKENS = 256
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of the kind of Qwen2.5-Math-PRM, tiny and random."""
    folder = tmp_path_factory.mktemp("reward-model")
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    tokenizer.add_special_tokens({"additional_special_tokens": [ScoringConfig().step_token]})
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        architectures=["Qwen2ForProcessRewardModel"],
        vocab_size=len(tokenizer) + 63 & ~63,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    body = Qwen2Model(config)
    head = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2)
    ).requires_grad_(False)
    named = {f"model.{name}": tensor for name, tensor in body.state_dict().items()}
    named |= {f"score.{name}": tensor for name, tensor in head.state_dict().items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    return folder


def in_torch(weights: Path, answer: str) -> float:
    """The product of the steps' probabilities, by the model's own recipe."""
    tokenizer = AutoTokenizer.from_pretrained(weights)
    scoring = ScoringConfig()
    marked = "".join(step + scoring.step_token for step in answer.split("\n\n"))
    text = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": scoring.system},
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": marked},
        ],
        tokenize=False,
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    named = load_file(weights / "model.safetensors")
    body = Qwen2Model(Qwen2Config.from_pretrained(weights))
    body.load_state_dict(
        {n.removeprefix("model."): t for n, t in named.items() if n.startswith("model.")}
    )
    with torch.no_grad():
        hidden = body(ids).last_hidden_state[0]
        inner = torch.relu(hidden @ named["score.0.weight"].T + named["score.0.bias"])
        logits = inner @ named["score.2.weight"].T + named["score.2.bias"]
    at_steps = ids[0] == tokenizer.convert_tokens_to_ids(scoring.step_token)
    return float(logits.softmax(-1)[at_steps, 1].prod())


@pytest.fixture(scope="module")
def verifier(weights: Path) -> Iterator[Any]:
    """The model as its own application, beside the pool."""
    tokenizer = AutoTokenizer.from_pretrained(weights)
    step_tag_id = tokenizer.convert_tokens_to_ids(ScoringConfig().step_token)
    config = LocalModelConfig(
        model_id="judge",
        role="verifier",
        model_source=str(weights),
        bundle={"CPU": 0.1},
        num_cpus=0.01,
        engine_kwargs={
            "runner": "pooling",
            "pooler_config": {"step_tag_id": step_tag_id},
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": MAX_TOKENS,
            "kv_cache_memory_bytes": 64 << 20,
            "distributed_executor_backend": "uni",
        },
        env={
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
        },
    )
    name = "judge-alone"  # an application named like a model's, and not in the pool, is deleted
    try:
        # In a task: the engine's modules are not for a process that takes warnings for errors.
        ray.get(ray.remote(num_cpus=0, runtime_env=DEPLOYING)(_deploy).remote(config, name))
        handle = serve.get_app_handle(name)
        if not handle.is_initialized:
            handle._init(_run_router_in_separate_loop=True)  # here is no event loop
        yield handle
    finally:
        serve.delete(name)


def _deploy(config: LocalModelConfig, name: str) -> None:
    serve.run(build_model(config), name=name, route_prefix=None)


def rate(verifier: Any, answer: str) -> float:
    body = scoring_body(QUESTION, answer)
    return read_score(read_reply(verifier.complete.remote(body).result(timeout_s=PATIENCE_S)))


@pytest.mark.timeout(900)
def test_answers_get_the_scores_of_the_model_s_own_recipe(weights: Path, verifier: Any) -> None:
    answers = ["7", "3 + 4 = 7.\n\nThe answer is 7.", "8\n\n9\n\n10"]
    given = [rate(verifier, answer) for answer in answers]
    assert given == pytest.approx([in_torch(weights, answer) for answer in answers], rel=1e-3)
    assert len({round(score, 3) for score in given}) == len(answers)
    # Then, on the engine that is up: what does not fit is the request's fault.
    with pytest.raises(InvalidRequest, match="context length"):
        rate(verifier, "x " * 2 * MAX_TOKENS)
