"""Servers of models on loopback: Ollama, llama.cpp, LM Studio, vLLM, and others with OpenAI's API.

`GET /v1/models` says what answers at an address (`owned_by`); the server's own API then says what
its models can do. Only loopback addresses are asked, without a proxy and without a key; redirects
are not followed, and what does not answer within seconds, or answers anything else, is not there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx2

from serve_app.errors import ConfigError
from serve_app.gateway.edge.hosts import is_loopback

OLLAMA, LLAMA_CPP, LM_STUDIO, VLLM = "Ollama", "llama.cpp", "LM Studio", "vLLM"
OTHER = "OpenAI-compatible server"

DEFAULT_PORTS = {OLLAMA: 11434, LLAMA_CPP: 8080, LM_STUDIO: 1234, VLLM: 8000}
"""Where each listens unless it is told otherwise."""
_OURS = "atlas-serve"
_CONNECT_S = 1.0
_ANSWER_S = 5.0
_MAX_ANSWER_BYTES = 4 << 20
_OLLAMA_CONTEXT = 4096
"""Tokens that Ollama gives a model's context, unless it is told otherwise; it cuts what is longer
without a word."""
_SIZE = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)\s*([BM])(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class EngineModel:
    """A model that a server has, as far as the server tells."""

    name: str
    """Its name there."""
    billions: float | None = None
    """Parameters."""
    context_tokens: int | None = None
    """Tokens that its context has as it is served."""
    vision: bool = False
    tools: bool | None = None
    """Whether it calls functions; `None`: the server does not tell."""
    thinks: bool = False


@dataclass(frozen=True)
class FoundEngine:
    """A server that answers."""

    kind: str
    address: str
    """Host and port."""
    models: tuple[EngineModel, ...] = ()
    left_out: tuple[str, ...] = ()
    """Models that are no use here, each with the reason."""

    @property
    def base_url(self) -> str:
        """Of its OpenAI-compatible API."""
        return f"http://{self.address}/v1"


def default_addresses(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Where servers listen as a rule, and where `OLLAMA_HOST` says, if that is on loopback."""
    addresses = [f"127.0.0.1:{port}" for port in DEFAULT_PORTS.values()]
    if said := environment.get("OLLAMA_HOST"):
        host, _, port = said.rpartition("://")[2].rstrip("/").rpartition(":")
        if host in ("0.0.0.0", "localhost"):  # all addresses of this machine
            host = "127.0.0.1"
        if port.isdigit() and is_loopback(host.strip("[]")):
            addresses.append(f"{host}:{port}")
    return tuple(dict.fromkeys(addresses))


def checked_address(said: str) -> str:
    """Host and port of a loopback address that somebody named.

    Raises:
        ConfigError: If it is another machine's, or names no port.
    """
    address = said.rpartition("://")[2].partition("/")[0]
    host, _, port = address.rpartition(":")
    if not is_loopback(host.strip("[]")) or not port.isdigit() or int(port) > 65_535:
        raise ConfigError(f"{said!r} is no loopback address with a port, as 127.0.0.1:11434")
    return address.replace("localhost", "127.0.0.1")


def look_at_engines(addresses: Sequence[str]) -> tuple[FoundEngine, ...]:
    """The servers that answer at loopback addresses, in their order; asks all of them at once."""
    with ThreadPoolExecutor(max_workers=max(1, len(addresses))) as pool:
        found = pool.map(_look, addresses)
        return tuple(engine for engine in found if engine is not None)


def model_names(base_url: str) -> tuple[str, ...] | None:
    """The models that a server on loopback lists; `None`: it does not answer."""
    with _client(base_url.removesuffix("/").removesuffix("/v1")) as client:
        listed = _listed(client)
    return None if listed is None else tuple(entry["id"] for entry in listed)


def _client(base_url: str) -> httpx2.Client:
    timeout = httpx2.Timeout(_ANSWER_S, connect=_CONNECT_S)
    return httpx2.Client(
        base_url=base_url, timeout=timeout, trust_env=False, follow_redirects=False
    )


def _look(address: str) -> FoundEngine | None:
    with _client(f"http://{address}") as client:
        listed = _listed(client)
        if listed is None:
            return None
        owners = {str(entry.get("owned_by")) for entry in listed}
        if _OURS in owners:
            return None
        if "llamacpp" in owners:
            return FoundEngine(LLAMA_CPP, address, tuple(_of_llama_cpp(client, listed)))
        if "vllm" in owners:
            return FoundEngine(VLLM, address, tuple(_of_vllm(listed)))
        if tags := _mappings(_ask(client, "/api/tags"), "models"):
            models, left_out = _of_ollama(client, tags)
            return FoundEngine(OLLAMA, address, models, left_out)
        if entries := _mappings(_ask(client, "/api/v0/models"), "data"):
            return FoundEngine(LM_STUDIO, address, tuple(_of_lm_studio(entries)))
        models = tuple(EngineModel(entry["id"], billions_of(entry["id"])) for entry in listed)
        return FoundEngine(OTHER, address, models) if models else None


def _listed(client: httpx2.Client) -> list[dict[str, Any]] | None:
    """What `/v1/models` lists; `None`: nothing that speaks OpenAI's API answers."""
    said = _ask(client, "/v1/models")
    if not isinstance(said, dict) or not isinstance(said.get("data"), list | None):
        return None
    return [entry for entry in _mappings(said, "data") if isinstance(entry.get("id"), str)]


def _ask(client: httpx2.Client, path: str, body: Any = None) -> Any:
    """One answer, parsed; `None`: none, or no JSON."""
    method = "GET" if body is None else "POST"
    try:
        with client.stream(method, path, json=body) as response:
            taken = b""
            for part in response.iter_bytes():
                taken += part
                if len(taken) > _MAX_ANSWER_BYTES:
                    return None
        return json.loads(taken) if response.status_code == 200 else None
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, RecursionError):
        return None


def _mappings(said: Any, name: str) -> list[dict[str, Any]]:
    entries = said.get(name) if isinstance(said, dict) else None
    return [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []


def _of_ollama(
    client: httpx2.Client, tags: Sequence[dict[str, Any]]
) -> tuple[tuple[EngineModel, ...], tuple[str, ...]]:
    models, left_out = [], []
    for tag in tags:
        name = tag.get("model") or tag.get("name")
        if not isinstance(name, str):
            continue
        if tag.get("remote_host") or name.endswith(("-cloud", ":cloud")):
            left_out.append(f"{name}: runs in Ollama's cloud, which prompts would be sent to")
            continue
        shown = _ask(client, "/api/show", {"model": name})
        shown = shown if isinstance(shown, dict) else {}
        able = shown.get("capabilities")
        able = able if isinstance(able, list) else None
        if able is not None and "completion" not in able:
            left_out.append(f"{name}: does not chat")
            continue
        details = tag.get("details")
        size = details.get("parameter_size") if isinstance(details, dict) else None
        models.append(
            EngineModel(
                name=name,
                billions=billions_of(str(size)) or billions_of(name),
                context_tokens=_ollama_context(shown),
                vision="vision" in (able or ()),
                tools=None if able is None else "tools" in able,
                thinks="thinking" in (able or ()),
            )
        )
    return tuple(models), tuple(left_out)


def _ollama_context(shown: Mapping[str, Any]) -> int:
    """Tokens that Ollama loads a model with: what its Modelfile says, or the default."""
    said = re.search(r"^num_ctx\s+(\d+)$", str(shown.get("parameters", "")), re.MULTILINE)
    wanted = int(said[1]) if said else _OLLAMA_CONTEXT
    about = shown.get("model_info")
    longest = [
        length
        for key, length in (about.items() if isinstance(about, dict) else ())
        if key.endswith(".context_length") and isinstance(length, int) and length > 0
    ]
    return min([wanted, *longest])


def _of_llama_cpp(client: httpx2.Client, listed: Sequence[dict[str, Any]]) -> Iterator[EngineModel]:
    props = _ask(client, "/props")
    props = props if isinstance(props, dict) else {}
    context = _inside(props, "default_generation_settings", "n_ctx")
    tools = _inside(props, "chat_template_caps", "supports_tools")
    for entry in listed:
        name = entry["id"]
        parameters = _inside(entry, "meta", "n_params")
        yield EngineModel(
            name=name,
            billions=parameters / 1e9 if isinstance(parameters, int) else billions_of(name),
            context_tokens=context if isinstance(context, int) and context > 0 else None,
            vision=_inside(props, "modalities", "vision") is True,
            tools=tools if isinstance(tools, bool) else None,
        )


def _of_vllm(listed: Sequence[dict[str, Any]]) -> Iterator[EngineModel]:
    for entry in listed:
        length = entry.get("max_model_len")
        context = length if isinstance(length, int) and length > 0 else None
        yield EngineModel(entry["id"], billions_of(entry["id"]), context)


def _of_lm_studio(entries: Sequence[dict[str, Any]]) -> Iterator[EngineModel]:
    for entry in entries:
        name, able = entry.get("id"), entry.get("capabilities")
        if not isinstance(name, str) or entry.get("type") not in ("llm", "vlm"):
            continue
        length = entry.get("loaded_context_length")
        yield EngineModel(
            name=name,
            billions=billions_of(name),
            context_tokens=length if isinstance(length, int) and length > 0 else None,
            vision=entry.get("type") == "vlm",
            tools="tool_use" in able if isinstance(able, list) else None,
        )


def _inside(said: Mapping[str, Any], *names: str) -> Any:
    value: Any = said
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def billions_of(text: str) -> float | None:
    """Parameters that a name or a size tells, in billions: `7.6B`, `494M`, `qwen2.5:3b`."""
    found = _SIZE.search(text)
    if found is None:
        return None
    return float(found[1]) * (1.0 if found[2] in "bB" else 1e-3)
