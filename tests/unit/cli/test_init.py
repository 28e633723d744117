"""`atlas init` and `atlas doctor`: what they say, write and end with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.ports import free_port
from rl.cli.app import app
from serve_app.cli.console import console
from serve_app.config import load_config
from serve_app.machine.providers import PROVIDERS
from tests import model_servers
from tests.model_servers import stub_engine

PAGE = (Path(__file__).parents[3] / "docs/configuration.md").read_text()


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without keys, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "width", 300)
    for name in [provider.key_variable for provider in PROVIDERS] + ["ATLAS_DATA_DIR"]:
        monkeypatch.delenv(name, raising=False)


def run(*words: str, answer: str | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words), input=answer)
    return result.exit_code, result.output


def test_init_writes_a_configuration_of_what_answers_and_doctor_finds_it_well() -> None:
    with stub_engine(model_servers.OLLAMA) as server:
        code, said = run("init", "--yes", "--engine", server.address)
        assert code == 0, said
        assert f"Ollama at {server.address}" in said
        assert "next: atlas doctor, then atlas serve" in said
        (model,) = load_config("atlas.yaml").models
        assert model.model_id == "llama3.2-3b"
        code, said = run("doctor", "--port", str(free_port()))
    assert "model llama3.2-3b: answers at" in said
    assert "ok  sandbox: code runs confined, for python" in said
    assert "0 would fail" in said, said
    assert code == 0


def test_init_asks_before_it_writes() -> None:
    with stub_engine(model_servers.OLLAMA) as server:
        code, said = run("init", "--engine", server.address, answer="n\n")
        assert (code, Path("atlas.yaml").exists()) == (1, False)
        assert "Write atlas.yaml?" in said
        assert run("init", "--engine", server.address, answer="y\n")[0] == 0
    assert Path("atlas.yaml").exists()


def test_init_replaces_no_file_unless_told_to() -> None:
    Path("atlas.yaml").write_text("mine")
    with stub_engine(model_servers.OLLAMA) as server:
        code, said = run("init", "--yes", "--engine", server.address)
        assert code == 1
        assert "--force replaces it" in said
        assert server.asked == []
        assert Path("atlas.yaml").read_text() == "mine"
        assert run("init", "--yes", "--force", "--engine", server.address)[0] == 0
    assert load_config("atlas.yaml").models


def test_init_that_finds_nothing_says_what_could_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    code, said = run("init", "--yes", "--engine", f"127.0.0.1:{free_port()}")
    assert code == 1
    for way in ("no vLLM", "ollama pull", "export OPENAI_API_KEY", "make serve"):
        assert way in said
    assert not Path("atlas.yaml").exists()


def test_init_asks_no_other_machine() -> None:
    code, said = run("init", "--yes", "--engine", "192.0.2.1:11434")
    assert code == 1
    assert "'192.0.2.1:11434' is no loopback address" in said


def test_a_command_without_a_configuration_says_how_to_get_one() -> None:
    code, said = run("serve")
    assert code == 1
    assert "`atlas init` writes one" in said


def test_doctor_without_a_configuration_fails_and_says_how_to_get_one() -> None:
    code, said = run("doctor", "--port", str(free_port()))
    assert code == 1
    assert "FAILS  configuration: there is no atlas.yaml" in said
    assert "`atlas init` writes one" in said


def test_doctor_names_the_setting_that_is_wrong() -> None:
    Path("atlas.yaml").write_text("models: []")
    code, said = run("doctor", "--port", str(free_port()))
    assert code == 1
    assert "models" in said.partition("FAILS  configuration")[2]


def shown(command: str) -> list[str]:
    """What the page on configuration shows that a command prints."""
    (block,) = re.findall(rf"^```console\n\$ {command}\n(.*?)^```$", PAGE, re.M | re.S)
    return str(block).splitlines()


def test_init_says_what_the_page_shows() -> None:
    with (
        stub_engine(model_servers.OLLAMA) as ollama,
        stub_engine(model_servers.LLAMA_CPP) as llama_cpp,
    ):
        engines = ("--engine", ollama.address, "--engine", llama_cpp.address)
        code, said = run("init", *engines, answer="y\n")
    assert code == 0
    said = said.replace(ollama.address, "127.0.0.1:11434")
    said = said.replace(llama_cpp.address, "127.0.0.1:8080")

    def words(lines: list[str]) -> list[list[str]]:
        """Without the lines of the table, and without what is this machine's."""
        plain = [re.sub(r"[─-╿]", "", line.partition("GiB of memory")[2] or line) for line in lines]
        return [line.split() for line in plain if line.strip()]

    assert words(said.splitlines()) == words(shown("atlas init"))


def test_doctor_looks_at_what_the_page_shows() -> None:
    with stub_engine(model_servers.OLLAMA) as ollama:
        with stub_engine(model_servers.LLAMA_CPP) as llama_cpp:
            engines = ("--engine", ollama.address, "--engine", llama_cpp.address)
            assert run("init", "--yes", *engines)[0] == 0
        code, said = run("doctor", "--port", str(free_port()))
    assert code == 1

    def subjects(lines: list[str]) -> list[str]:
        found = [re.match(r"(?:ok|warning|FAILS)  ([^:]+):", line) for line in lines]
        return [match[1] for match in found if match is not None]

    assert subjects(said.splitlines()) == subjects(shown("atlas doctor"))
    assert "FAILS  model qwen2.5-coder-7b-instruct-q4_k_m: nothing answers" in said
