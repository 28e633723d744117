"""From what was found on a machine to a pool that works on it: models, cards, prices, tools.

What answers on loopback and what has a key in the environment makes the pool. Where there is
neither, open models of the hub do, on vLLM, as far as they fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from serve_app.machine.engines import OLLAMA, EngineModel, FoundEngine, billions_of
from serve_app.machine.hardware import Hardware
from serve_app.machine.hub import Placed, place
from serve_app.machine.providers import Offer, Provider

MAX_MODELS = 8
"""Models of engines that are proposed; more can be added by hand."""
_MAX_ID_CHARS = 63
_USD_PER_BILLION = 0.01
"""Assumed price of a million prompt tokens for each billion of parameters that run here, in US
dollars: it makes small models the cheaper ones. Completion tokens cost twice as much."""
_BILLIONS = 7.0
"""Assumed where a model's size is not known."""

_CALCULATOR = {"type": "calculator", "tool_id": "calculator"}
_PYTHON = {"type": "python", "tool_id": "python"}
_BEST_OF = {"type": "best_of", "tool_id": "best_of", "num_samples": 3}


@dataclass(frozen=True)
class Machine:
    """All that was found."""

    hardware: Hardware
    engines: tuple[FoundEngine, ...] = ()
    providers: tuple[Provider, ...] = ()
    has_vllm: bool = False
    cached: frozenset[str] = frozenset()
    """Repositories of the hub whose weights are on this machine."""
    sandbox_missing: str = ""
    """Why no code can be run in the sandbox here; empty: it can."""


@dataclass(frozen=True)
class ProposedModel:
    """A model as the configuration names it, and what is said of it there."""

    settings: dict[str, Any]
    about: str

    @property
    def model_id(self) -> str:
        """Its name in the pool."""
        return str(self.settings["model_id"])


@dataclass(frozen=True)
class Proposal:
    """A pool for a machine."""

    models: tuple[ProposedModel, ...]
    tools: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()
    """What its user should know before it starts."""


@dataclass(frozen=True)
class _Trait:
    """What a kind of model is for."""

    description: str
    examples: tuple[str, ...]


_CODE = _Trait(
    "Programming: writing, explaining and mending code.",
    ("Write a Python function that merges two sorted lists.", "Why does this loop never end?"),
)
_MATHS = _Trait(
    "Mathematics: word problems, equations and proofs.",
    ("Solve 3x + 7 = 25.", "Prove that the sum of two odd numbers is even."),
)
_REASONING = _Trait(
    "Hard questions that need long step-by-step reasoning.",
    (
        "Find all integer solutions of x^2 - 3y^2 = 1 below 1000.",
        "Which of these three plans fails first, and why?",
    ),
)
_PICTURES = _Trait(
    "Questions about pictures: charts, documents, scenes; and questions of any kind.",
    ("What does this chart say about 2019?", "How many people are in this picture?"),
)
_SHORT = _Trait(
    "Short everyday questions and small talk.",
    ("What is the capital of Peru?", "Write a haiku about rain."),
)
_GENERAL = _Trait(
    "Questions of any kind: knowledge, writing, summaries, plans.",
    ("Explain why the sky is blue in two sentences.", "Plan a three-day trip to Lisbon."),
)
_STRONG = _Trait(
    "Hard reasoning, long documents, difficult code and mathematics.",
    (
        "Find all integer solutions of x^2 - 3y^2 = 1 below 1000.",
        "Refactor this module into three classes.",
    ),
)
_BY_NAME = (
    (re.compile(r"cod(e|er|ing)|starcoder|devstral", re.IGNORECASE), _CODE),
    (re.compile(r"math", re.IGNORECASE), _MATHS),
    (re.compile(r"(^|[-_/])(r1|qwq|o1|think\w*|reason\w*)([-_:.]|$)", re.IGNORECASE), _REASONING),
    (re.compile(r"(^|[-_/\d])(vl|vision|llava\w*)([-_:.]|$)", re.IGNORECASE), _PICTURES),
)
_SHORT_BILLIONS = 4.0
"""Below it, a model is for short questions."""


def propose(machine: Machine) -> Proposal | None:
    """The pool for a machine; `None`: nothing was found, and no model of the hub fits."""
    ids: set[str] = {"atlas"}
    code = not machine.sandbox_missing
    models = list(_of_engines(machine.engines, ids, code=code))
    notes = [f"left out: {reason}" for engine in machine.engines for reason in engine.left_out]
    if len(models) > MAX_MODELS:
        names = ", ".join(model.model_id for model in models[MAX_MODELS:])
        notes.append(f"left out, because {MAX_MODELS} are enough to begin with: {names}")
        del models[MAX_MODELS:]
    if any(engine.kind == OLLAMA for engine in machine.engines):
        notes.append(
            "Ollama cuts prompts that are longer than its context, without a word: raise "
            "OLLAMA_CONTEXT_LENGTH there and context_tokens here together"
        )
    for provider in machine.providers:
        models += _of_provider(provider, ids, code=code)
    if machine.providers:
        names = ", ".join(provider.name for provider in machine.providers)
        notes.append(f"prompts that go to {names} leave this machine and cost money there")
    if not models:
        placed = place(machine.hardware) if machine.has_vllm else ()
        models = [_of_hub(one, machine.hardware.cpus, code=code) for one in placed]
        notes += _about_weights(placed, machine.cached)
    if not models:
        return None
    if machine.sandbox_missing:
        notes.append(f"no tool `python`: {machine.sandbox_missing}")
    used = {tool_id for model in models for tool_id in model.settings["tools"]}
    tools = tuple(t for t in (_CALCULATOR, _PYTHON, _BEST_OF) if t["tool_id"] in used)
    return Proposal(tuple(models), tools, tuple(notes))


def _of_engines(
    engines: Sequence[FoundEngine], ids: set[str], *, code: bool
) -> Iterator[ProposedModel]:
    for engine in engines:
        for model in engine.models:
            size = model.billions
            about = f"{engine.kind} at {engine.address}"
            if size is not None:
                about += f"; {size:.3g} billion parameters"
            able = {
                "vision": model.vision or None,
                "tools": model.tools,
                "context_tokens": model.context_tokens,
            }
            settings: dict[str, Any] = {
                "type": "remote",
                "model_id": _model_id(model.name, ids),
                "base_url": engine.base_url,
                "remote_model": model.name,
                "price": _price_here(size),
                "capabilities": {name: value for name, value in able.items() if value is not None},
                "tools": _tools(calls=model.tools is not False, code=code, samples=False),
                "card": _card(_trait_of(model)),
            }
            yield ProposedModel({k: v for k, v in settings.items() if v != {}}, about)


def _of_provider(provider: Provider, ids: set[str], *, code: bool) -> Iterator[ProposedModel]:
    for offer in provider.offers:
        settings: dict[str, Any] = {
            "type": "remote",
            "model_id": _model_id(offer.name, ids),
            "base_url": provider.base_url,
            "remote_model": offer.name,
            "api_key_env": provider.key_variable,
            "price": _price_of(offer),
            "tools": _tools(calls=True, code=code, samples=offer.strong),
            "card": _card(_STRONG if offer.strong else _GENERAL),
        }
        if not provider.lists_models:
            settings["health_path"] = None
        about = f"{provider.name}. Name and price as known early in 2026: check both there"
        yield ProposedModel(settings, about)


def _of_hub(placed: Placed, cpus: int, *, code: bool) -> ProposedModel:
    model = placed.model
    on_gpu = placed.gpu_share > 0
    engine: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 8192}
    where: dict[str, Any]
    if on_gpu:
        where = {"bundle": {"GPU": placed.gpu_share, "CPU": 1}}
        # A little of each share stays free for what the driver takes.
        engine["gpu_memory_utilization"] = round(0.92 * placed.gpu_share, 2)
        engine["enable_prefix_caching"] = True
    else:
        # Engines that share the processors: none is bound to some of them.
        threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(max(1, cpus // 2))}
        where = {
            "bundle": {"CPU": 0.2},
            "num_cpus": 0.05,
            "max_ongoing_requests": 32,
            "env": threads,
        }
        engine |= {"max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 30, "enforce_eager": True}
        engine["distributed_executor_backend"] = "uni"
    if model.calls_tools:
        engine |= {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    settings: dict[str, Any] = {
        "type": "local",
        "model_id": model.model_id,
        "model_source": model.repository,
        "price": _price_here(model.billions),
        "tools": _tools(calls=model.calls_tools, code=code, samples=False),
        **where,
        "startup_memory_gib": round(placed.startup_gib, 1),
        "engine_kwargs": engine,
        "card": _card(_trait_of(EngineModel(model.model_id, model.billions))),
    }
    place_name = "a GPU" if on_gpu else "the CPU"
    about = f"vLLM on {place_name}; weights of {model.weights_gb:.1f} GB from huggingface.co"
    return ProposedModel(settings, about)


def _about_weights(placed: Sequence[Placed], cached: frozenset[str]) -> Iterator[str]:
    missing = [one.model for one in placed if one.model.repository not in cached]
    if missing:
        size_gb = sum(model.weights_gb for model in missing)
        yield (
            f"weights of {size_gb:.1f} GB are not on this machine: the first `atlas serve` "
            "downloads them from huggingface.co, and without a network these models fail"
        )


def _tools(*, calls: bool, code: bool, samples: bool) -> list[str]:
    tools = ["none"]
    if calls:
        tools += ["calculator", *(["python"] if code else [])]
    return [*tools, *(["best_of"] if samples else [])]


def _price_here(billions: float | None) -> dict[str, float]:
    prompt = round(_USD_PER_BILLION * (billions or _BILLIONS), 3)
    return {
        "usd_per_1m_prompt_tokens": prompt,
        "usd_per_1m_completion_tokens": round(2 * prompt, 3),
    }


def _price_of(offer: Offer) -> dict[str, float]:
    return {
        "usd_per_1m_prompt_tokens": offer.usd_per_1m_prompt_tokens,
        "usd_per_1m_completion_tokens": offer.usd_per_1m_completion_tokens,
    }


def _card(trait: _Trait) -> dict[str, Any]:
    return {"description": trait.description, "examples": list(trait.examples)}


def _trait_of(model: EngineModel) -> _Trait:
    for pattern, trait in _BY_NAME:
        if pattern.search(model.name):
            return trait
    if model.vision:
        return _PICTURES
    if model.thinks:
        return _REASONING
    size = model.billions or billions_of(model.name) or _BILLIONS
    return _SHORT if size < _SHORT_BILLIONS else _GENERAL


def _model_id(name: str, ids: set[str]) -> str:
    """A name for the pool out of an engine's: without folders and file ending, and not taken."""
    short = name.rstrip("/").rpartition("/")[2].removesuffix(".gguf").removesuffix(":latest")
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", short).lstrip("._-")[: _MAX_ID_CHARS - 3] or "model"
    model_id, number = plain, 1
    while model_id in ids:
        number += 1
        model_id = f"{plain}-{number}"
    ids.add(model_id)
    return model_id
