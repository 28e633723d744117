"""Configuration: what ships loads, what cannot work is refused with the setting's name."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from serve_app.config import AtlasConfig, load_config
from serve_app.errors import ConfigError

CONFIGS = sorted([*Path("configs").glob("*.yaml"), *Path("configs/bench").glob("*.yaml")])

MINIMAL = """
models:
  - {type: remote, model_id: a, base_url: "http://127.0.0.1:1/v1", remote_model: x, tools: [none,
    calculator]}
tools:
  - {type: calculator, tool_id: calculator}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_shipped_config_loads(path: Path) -> None:
    config = load_config(path)
    assert config.all_pairs()


def test_pairs_are_models_times_their_tools(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert [str(pair) for pair in config.all_pairs()] == ["a@none", "a@calculator"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("tool_id: calculator", "tool_id: abacus"), "'calculator'"),
        (("model_id: a,", "model_id: a, surprise: 1,"), "surprise"),
        (("model_id: a,", "model_id: atlas,"), "atlas"),
        (("model_id: a,", "model_id: 'a@b',"), "model_id"),
        (("type: remote", "type: psychic"), "psychic"),
        (("http://127.0.0.1:1/v1", "ftp://x"), "base_url"),
    ],
)
def test_a_setting_that_cannot_work_is_named(
    tmp_path: Path, change: tuple[str, str], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(write(tmp_path, MINIMAL.replace(*change)))


def test_the_same_model_twice_is_refused(tmp_path: Path) -> None:
    parsed = yaml.safe_load(MINIMAL)
    parsed["models"] *= 2
    with pytest.raises(ConfigError, match="more than once"):
        load_config(write(tmp_path, yaml.safe_dump(parsed)))


@pytest.mark.parametrize("text", ["- a\n- b", "models: [", ""])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load_config(write(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml")


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    text = "models:\n  - {type: local, model_id: a, model_source: ./weights}\n"
    config = load_config(write(tmp_path, text))
    assert config.models[0].model_source == str(tmp_path / "weights")  # type: ignore[union-attr]


def test_the_store_lies_in_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATLAS_DATA_DIR", str(tmp_path))
    config: AtlasConfig = load_config(write(tmp_path, MINIMAL))
    assert config.store_url() == f"sqlite+aiosqlite:///{tmp_path}/atlas.db"


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    """The modules in a process that has read a configuration."""
    code = (
        "import sys; from serve_app.config import load_config; load_config('configs/gpu-7b.yaml'); "
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("heavy", ["torch", "vllm", "ray", "transformers", "ray.rllib"])
def test_configs_load_without_heavy_libraries(loaded: set[str], heavy: str) -> None:
    assert "serve_app.config" in loaded
    assert heavy not in loaded


def test_serving_imports_neither_rllib_nor_the_trainer() -> None:
    code = (
        "import sys, serve_app.graph, serve_app.cli.app, serve_app.running; "
        "sys.exit(any(name in sys.modules for name in "
        "('ray.rllib', 'rl', 'benchmarks.nano.trainer', 'vllm', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0
