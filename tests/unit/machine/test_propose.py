"""From what was found to a pool: which models, at which price, with which tools."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.config import AtlasConfig, LocalModelConfig, RemoteModelConfig, load_config
from serve_app.errors import ConfigError
from serve_app.machine.engines import LLAMA_CPP, OLLAMA, EngineModel, FoundEngine
from serve_app.machine.hardware import Gpu, Hardware
from serve_app.machine.propose import MAX_MODELS, Machine, Proposal, propose
from serve_app.machine.providers import look_at_keys
from serve_app.machine.writing import render, title_of, write
from tests.shipped_pools import CONFIGS, SHIPPED, text_of

SMALL_MACHINE = Hardware(cpus=2, memory_gib=8, free_gib=6)


def proposed(machine: Machine) -> Proposal:
    found = propose(machine)
    assert found is not None
    return found


def with_engine(*models: EngineModel) -> Machine:
    return Machine(SMALL_MACHINE, (FoundEngine(OLLAMA, "127.0.0.1:11434", models),))


def loaded(machine: Machine, folder: Path) -> AtlasConfig:
    """The configuration as `atlas serve` reads it."""
    path = folder / "atlas.yaml"
    write(render(proposed(machine), tuple(title_of(machine))), path, force=True)
    return load_config(path)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_pool_is_what_init_writes_for_its_machine(name: str) -> None:
    assert (CONFIGS / name).read_text() == text_of(name), "python -m tests.shipped_pools"


def test_a_model_that_calls_no_functions_gets_no_function_tools() -> None:
    machine = with_engine(EngineModel("a:3b", tools=True), EngineModel("b:3b", tools=False))
    tools = [model.settings["tools"] for model in proposed(machine).models]
    assert tools == [["none", "calculator", "python"], ["none"]]


def test_without_a_sandbox_no_tool_runs_code() -> None:
    machine = Machine(
        SMALL_MACHINE, with_engine(EngineModel("a")).engines, sandbox_missing="no Landlock"
    )
    found = proposed(machine)
    assert {tool["tool_id"] for tool in found.tools} == {"calculator"}
    assert "no tool `python`: no Landlock" in found.notes


def test_a_larger_model_is_the_dearer_one_and_one_of_unknown_size_costs_as_seven_billion() -> None:
    machine = with_engine(EngineModel("a", 1), EngineModel("b", 30), EngineModel("c"))
    prices = [m.settings["price"]["usd_per_1m_prompt_tokens"] for m in proposed(machine).models]
    assert prices == [0.01, 0.3, 0.07]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("qwen2.5-coder:7b", "Programming"),
        ("Qwen/Qwen2.5-Math-7B-Instruct", "Mathematics"),
        ("deepseek-r1:8b", "step-by-step"),
        ("qwen2-vl-7b-instruct", "pictures"),
        ("llama3.2:3b", "everyday"),
        ("mistral:7b", "any kind"),
    ],
)
def test_a_card_says_what_a_model_is_for(name: str, word: str) -> None:
    size = 3.2 if "3b" in name else 7.0
    (model,) = proposed(with_engine(EngineModel(name, size))).models
    assert word in model.settings["card"]["description"]


def test_names_that_a_pool_cannot_have_are_made_into_ones_that_it_can(tmp_path: Path) -> None:
    names = ("/m/Qwen2.5 7B.gguf", "hf.co/x/y:Q4_K_M", "atlas", "atlas:latest", "x" * 99, "é")
    config = loaded(with_engine(*map(EngineModel, names)), tmp_path)
    ids = [model.model_id for model in config.models]
    assert ids == ["Qwen2.5-7B", "y-Q4_K_M", "atlas-2", "atlas-3", "x" * 60, "model"]
    remote = [m.remote_model for m in config.models if isinstance(m, RemoteModelConfig)]
    assert remote == list(names)


def test_more_models_than_are_of_use_at_first_are_named_and_left_out() -> None:
    found = proposed(with_engine(*(EngineModel(f"m{n}") for n in range(MAX_MODELS + 2))))
    assert len(found.models) == MAX_MODELS
    assert any("m8, m9" in note for note in found.notes)


def test_a_key_is_named_and_its_value_is_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    providers = look_at_keys({"OPENAI_API_KEY": "sk-secret", "GROQ_API_KEY": ""})
    machine = Machine(SMALL_MACHINE, providers=providers)
    config = loaded(machine, tmp_path)
    assert {m.api_key_env for m in config.models if isinstance(m, RemoteModelConfig)} == {
        "OPENAI_API_KEY"
    }
    assert "sk-secret" not in (tmp_path / "atlas.yaml").read_text()
    assert any("leave this machine" in note for note in proposed(machine).notes)


def test_engines_and_keys_make_one_pool() -> None:
    engines = (FoundEngine(LLAMA_CPP, "127.0.0.1:8080", (EngineModel("q"),)),)
    machine = Machine(SMALL_MACHINE, engines, look_at_keys({"MISTRAL_API_KEY": "k"}))
    assert [m.model_id for m in proposed(machine).models] == ["q", "mistral-small-latest"]


@pytest.mark.parametrize(
    ("hardware", "ids"),
    [
        (Hardware(2, 8, 7), []),
        (Hardware(2, 16, 14), ["qwen2.5-0.5b"]),
        (Hardware(2, 32, 30), ["qwen2.5-0.5b", "qwen2.5-coder-1.5b", "qwen2.5-1.5b"]),
        (
            Hardware(8, 64, 60, (Gpu("T4", 15),)),
            ["qwen2.5-0.5b", "qwen2.5-coder-1.5b", "qwen2.5-1.5b"],
        ),
        (Hardware(8, 64, 60, (Gpu("L4", 22.5),)), ["qwen2.5-7b"]),
        (Hardware(8, 64, 60, (Gpu("L4", 22.5),) * 2), ["qwen2.5-7b", "qwen2.5-coder-7b"]),
        (
            Hardware(16, 128, 120, (Gpu("H200", 139),)),
            ["qwen2.5-7b", "qwen2.5-coder-7b", "deepseek-r1-7b"],
        ),
        (Hardware(8, 64, 60, (Gpu("old", 4),)), []),
    ],
)
def test_models_of_the_hub_are_taken_as_far_as_they_fit(
    hardware: Hardware, ids: list[str], tmp_path: Path
) -> None:
    machine = Machine(hardware, has_vllm=True)
    if not ids:
        assert propose(machine) is None
        return
    config = loaded(machine, tmp_path)
    assert [model.model_id for model in config.models] == ids
    for gpu in range(1, len(hardware.gpus) + 1):
        local = [model for model in config.models if isinstance(model, LocalModelConfig)]
        assert sum(model.bundle["GPU"] for model in local) <= len(hardware.gpus), gpu


def test_weights_that_are_not_here_are_said_to_be_downloaded() -> None:
    hardware = Hardware(2, 16, 14)
    (note,) = proposed(Machine(hardware, has_vllm=True)).notes
    assert "1.0 GB" in note
    assert "downloads them from huggingface.co" in note
    there = frozenset({"Qwen/Qwen2.5-0.5B-Instruct"})
    assert proposed(Machine(hardware, has_vllm=True, cached=there)).notes == ()


def test_without_vllm_nothing_of_the_hub_is_proposed() -> None:
    assert propose(Machine(Hardware(8, 64, 60))) is None


def test_a_file_that_is_there_is_kept_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "atlas.yaml"
    path.write_text("mine")
    text = render(proposed(with_engine(EngineModel("a"))), ())
    with pytest.raises(ConfigError, match="--force replaces it"):
        write(text, path, force=False)
    assert path.read_text() == "mine"
    write(text, path, force=True)
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]
