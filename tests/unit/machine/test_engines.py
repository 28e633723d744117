"""Servers of models on loopback are told apart by what they say, and only they are asked."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from serve_app.errors import ConfigError
from serve_app.machine import engines
from serve_app.machine.engines import (
    EngineModel,
    billions_of,
    checked_address,
    default_addresses,
    look_at_engines,
)
from tests import model_servers
from tests.model_servers import stub_engine


def look(answers: Mapping[str, Any]) -> engines.FoundEngine:
    with stub_engine(answers) as server:
        (found,) = look_at_engines([server.address])
    assert found.base_url == f"http://{server.address}/v1"
    return found


def test_ollama_tells_what_its_models_can_do() -> None:
    found = look(model_servers.OLLAMA)
    assert found.kind == engines.OLLAMA
    assert found.models == (EngineModel("llama3.2:3b", 3.2, 8192, vision=False, tools=True),)


def test_what_ollama_has_and_is_no_use_here_is_left_out_with_the_reason() -> None:
    embeds, cloud = look(model_servers.OLLAMA).left_out
    assert embeds == "nomic-embed-text:latest: does not chat"
    assert cloud.startswith("gpt-oss:120b-cloud: runs in Ollama's cloud")


def test_a_model_of_the_cloud_is_not_asked_about() -> None:
    with stub_engine(model_servers.OLLAMA) as server:
        look_at_engines([server.address])
    assert "/api/show llama3.2:3b" in server.asked
    assert not any("cloud" in path for path in server.asked)


def test_llama_cpp_is_not_taken_for_ollama_whose_calls_it_answers() -> None:
    found = look(model_servers.LLAMA_CPP)
    assert found.kind == engines.LLAMA_CPP
    (model,) = found.models
    assert (model.context_tokens, model.tools, model.vision) == (16384, True, False)
    assert model.billions == pytest.approx(7.6, abs=0.1)


def test_lm_studio_tells_which_of_its_models_see() -> None:
    found = look(model_servers.LM_STUDIO)
    assert found.kind == engines.LM_STUDIO
    assert found.models == (EngineModel("qwen2-vl-7b-instruct", 7, 4096, vision=True),)


def test_vllm_tells_the_length_of_its_context() -> None:
    found = look(model_servers.VLLM)
    assert found.kind == engines.VLLM
    assert found.models == (EngineModel("Qwen/Qwen2.5-Math-7B-Instruct", 7, 4096),)


def test_another_server_with_openai_s_api_is_taken_by_its_names() -> None:
    found = look({"/v1/models": {"data": [{"id": "mine-3b", "owned_by": "me"}]}})
    assert (found.kind, found.models) == (engines.OTHER, (EngineModel("mine-3b", 3),))


@pytest.mark.parametrize(
    "answers",
    [
        {},
        {"/v1/models": ["no", "mapping"]},
        {"/v1/models": {"data": [{"id": 7}, "text"]}},
        {"/v1/models": {"data": [{"id": "atlas", "owned_by": "atlas-serve"}]}},
        {"/v1/models": {"data": [{"id": "x" * engines._MAX_ANSWER_BYTES}]}},
    ],
    ids=["404", "a list", "broken entries", "this project", "endless"],
)
def test_what_is_no_server_of_models_is_not_there(answers: dict[str, Any]) -> None:
    with stub_engine(answers) as server:
        assert look_at_engines([server.address]) == ()


def test_an_address_where_nothing_listens_is_not_there() -> None:
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        assert look_at_engines([f"127.0.0.1:{bound.getsockname()[1]}"]) == ()


@pytest.mark.parametrize("said", ["192.168.1.2:11434", "ollama.com:443", "127.0.0.1", "::1", ""])
def test_an_address_that_is_not_on_loopback_or_has_no_port_is_refused(said: str) -> None:
    with pytest.raises(ConfigError, match="no loopback address with a port"):
        checked_address(said)


def test_an_address_on_loopback_may_be_said_as_a_url() -> None:
    assert checked_address("http://localhost:9000/v1") == "127.0.0.1:9000"


def test_ollama_s_own_variable_is_followed_on_loopback_only() -> None:
    usual = default_addresses({})
    assert default_addresses({"OLLAMA_HOST": "http://127.0.0.1:9999"})[4:] == ("127.0.0.1:9999",)
    assert default_addresses({"OLLAMA_HOST": "192.168.1.2:11434"}) == usual
    assert default_addresses({"OLLAMA_HOST": "0.0.0.0:9999"})[4:] == ("127.0.0.1:9999",)


@pytest.mark.parametrize(
    ("text", "billions"),
    [("7.6B", 7.6), ("494.03M", 0.49403), ("qwen2.5:3b", 3), ("qwen2.5-coder", None), ("", None)],
)
def test_the_size_of_a_model_is_read_from_its_name(text: str, billions: float | None) -> None:
    assert billions_of(text) == (billions if billions is None else pytest.approx(billions))


_contacted: list[Any] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _contacted is not None and event in ("socket.connect", "socket.getaddrinfo"):
        _contacted.append(arguments[1] if event == "socket.connect" else arguments[0])


@pytest.fixture
def contacted() -> Iterator[list[Any]]:
    """Every address and name that is connected to or looked up."""
    global _contacted
    sys.addaudithook(_audit)  # it stays, and does nothing later
    _contacted = []
    yield _contacted
    _contacted = None


def test_nothing_but_loopback_is_contacted_though_proxies_and_keys_are_there(
    contacted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://192.0.2.1:3128")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with stub_engine(model_servers.OLLAMA) as server:
        look_at_engines([*default_addresses({}), server.address])
    hosts = {said[0] if isinstance(said, tuple) else said for said in contacted}
    assert hosts == {"127.0.0.1"}
