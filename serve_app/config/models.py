"""The models of the pool: where each runs, what it costs, and what it is good at."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from serve_app.capabilities import Capabilities
from serve_app.config.base import BaseConfig
from serve_app.config.deployment import AutoscalingConfig, check_target
from serve_app.config.tools import MAX_DESCRIPTION_CHARS, Examples
from serve_app.schemas import NO_TOOL

MODEL_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"

_COMMIT = re.compile(r"[0-9a-f]{40}|\$\{\w+\}")
"""A hub's commit, or the environment variable that holds one."""


class PriceConfig(BaseConfig):
    """What a model's tokens cost, in US dollars per million tokens."""

    usd_per_1m_prompt_tokens: float = Field(default=0.0, ge=0, le=10_000)
    usd_per_1m_completion_tokens: float = Field(default=0.0, ge=0, le=10_000)
    usd_per_1m_cached_prompt_tokens: float | None = Field(default=None, ge=0, le=10_000)
    """Of prompt tokens that the model has in its cache: what a conversation of a session saves by
    staying. `None`: nothing of a local model, whose engine reads them again at no cost; of every
    other one what prompt tokens cost."""


class CardConfig(BaseConfig):
    """What something is good at, in words: the prior of the router before any outcome is known."""

    description: str = Field(default="", max_length=MAX_DESCRIPTION_CHARS)
    examples: Examples = ()
    """Utterances it should get; all of them are embedded before a change of the pool counts."""


class CapabilitiesConfig(BaseConfig):
    """What a model can take. A request that needs what a model cannot take never gets to it."""

    vision: bool = False
    """Whether it looks at pictures."""
    json_schema: bool = True
    """Whether its answers can be held to a JSON schema (`response_format`)."""
    tools: bool | None = None
    """Whether it calls functions of the caller's. `None`: of a local model, whether its
    `engine_kwargs` turn a tool parser on; of every other one yes."""
    context_tokens: int | None = Field(default=None, ge=1)
    """Tokens that prompt and answer may have together. `None`: of a local model, `max_model_len` of
    its `engine_kwargs`, or what the `config.json` of its folder says; else not known, and nothing
    is too long."""


class PairCardConfig(CardConfig):
    """The card of one pair; added to its model's and its tool's."""

    pair: str
    """`model_id@tool_id`."""


class ModelBase(BaseConfig):
    """What every kind of model has."""

    model_id: str = Field(pattern=MODEL_ID_PATTERN)
    """Name used by clients, the router and the metrics; unique in the pool."""
    card: CardConfig = CardConfig()
    capabilities: CapabilitiesConfig = CapabilitiesConfig()
    price: PriceConfig = PriceConfig()
    tools: tuple[str, ...] = (NO_TOOL,)
    """Tool ids this model may work with; each makes a pair."""
    max_ongoing_requests: int = Field(default=64, ge=1)
    """Requests one replica works on at once."""
    autoscaling: AutoscalingConfig = AutoscalingConfig()
    max_completion_tokens: int = Field(default=1024, ge=1)
    """Upper bound on generated tokens per call, and the default when the caller names none."""
    role: Literal["chat", "verifier"] = "chat"
    """A `verifier` answers a question and its answer with a score. It makes no pair: nothing is
    routed to it, and tools of type `best_of` ask it."""

    @model_validator(mode="after")
    def _target_can_be_reached(self) -> Self:
        check_target(self.autoscaling, self.max_ongoing_requests)
        return self

    def able(self) -> Capabilities:
        """What it can take, with what follows from its other settings."""
        said = self.capabilities
        tools = self._calls_tools() if said.tools is None else said.tools
        context = said.context_tokens or self._context_tokens() or math.inf
        return Capabilities(said.vision, said.json_schema, tools, context)

    @property
    def cached_usd_per_1m(self) -> float:
        """US dollars of a million prompt tokens that are in its cache."""
        said = self.price.usd_per_1m_cached_prompt_tokens
        return self.price.usd_per_1m_prompt_tokens if said is None else said

    def _calls_tools(self) -> bool:
        return True

    def _context_tokens(self) -> int | None:
        return None


class ScoringConfig(BaseConfig):
    """How a process reward model reads an answer; the defaults are those of Qwen2.5-Math-PRM."""

    system: str = "Please reason step by step, and put your final answer within \\boxed{}."
    """Before the question."""
    step_separator: str = Field(default="\n\n", min_length=1)
    """What lies between two steps of an answer."""
    step_token: str = Field(default="<extra_0>", min_length=1)
    """Put after each step; where it stands, the step is judged."""
    positive_label: int = Field(default=1, ge=0)
    """Index of the class that says that a step is right."""
    combine: Literal["product", "min", "last"] = "product"
    """From the steps' scores to the answer's: `product` is the probability that every step is
    right."""


class LocalModelConfig(ModelBase):
    """A model that vLLM runs on this cluster, through `ray.serve.llm`."""

    type: Literal["local"] = "local"
    model_source: str
    """A folder (starting with `.` or `/`) or a hub id."""
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """vLLM engine arguments, vLLM's own names. With `trust_remote_code` a model of the hub needs
    `revision` and `code_revision`: a commit, or `${NAME}` for an environment variable with one."""
    bundle: dict[str, float] = Field(default_factory=lambda: {"CPU": 1.0})
    """Resources of each engine worker (Ray's names: CPU, GPU); one bundle per tensor- and
    pipeline-parallel rank."""
    num_cpus: float = Field(default=0.1, ge=0)
    """CPUs the Serve replica in front of the engine reserves."""
    accelerator_type: str | None = None
    """Ray accelerator type, for example `A100`; `None` takes any node with the resources."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the engine processes."""
    startup_memory_gib: float = Field(default=3.0, gt=0)
    """Memory one start takes at its peak; starts run side by side only as far as the node's free
    memory allows."""
    scoring: ScoringConfig = ScoringConfig()
    """Read where the role is `verifier`."""

    @property
    def cached_usd_per_1m(self) -> float:
        """US dollars of a million prompt tokens that are in its cache."""
        return self.price.usd_per_1m_cached_prompt_tokens or 0.0

    def _calls_tools(self) -> bool:
        arguments = self.engine_kwargs
        return bool(arguments.get("enable_auto_tool_choice") and arguments.get("tool_call_parser"))

    def _context_tokens(self) -> int | None:
        length = self.engine_kwargs.get("max_model_len")
        if length is None and self.model_source.startswith("/"):
            length = _context_of_weights(self.model_source)
        return length if isinstance(length, int) and length > 0 else None

    @model_validator(mode="after")
    def _remote_code_is_pinned(self) -> Self:
        if not self.engine_kwargs.get("trust_remote_code") or self.model_source[:1] in ("/", "."):
            return self
        for name in ("revision", "code_revision"):
            if not _COMMIT.fullmatch(str(self.engine_kwargs.get(name, ""))):
                raise ValueError(
                    f"trust_remote_code runs code out of {self.model_source!r}: set "
                    f"engine_kwargs.{name} to a commit (40 hexadecimal digits) that you have read, "
                    "or to ${NAME} for an environment variable that holds one"
                )
        return self


class RemoteModelConfig(ModelBase):
    """A model behind an OpenAI-compatible HTTP endpoint."""

    type: Literal["remote"] = "remote"
    base_url: str = Field(pattern=r"^https?://")
    """The endpoint's base, ending in `/v1` as a rule."""
    remote_model: str
    """The model's name there."""
    api_key_env: str | None = None
    """Environment variable that holds the key; `None` sends none."""
    connect_timeout_s: float = Field(default=5.0, gt=0)
    max_retries: int = Field(default=2, ge=0, le=5)
    """How often the orchestrator asks again after connection errors, 408, 429 and 5xx, before any
    byte of an answer."""
    health_path: str | None = Field(default="/models", pattern=r"^/[A-Za-z0-9._~/-]{0,200}$")
    """Path under `base_url` asked before the model counts as ready; `None` skips the question."""


class CustomModelConfig(ModelBase):
    """A model served by a class of your own that speaks `models.protocol`."""

    type: Literal["custom"] = "custom"
    import_path: str = Field(pattern=r"^[\w.]+:\w+$")
    """`module:Class`; the class is made with `settings` as keyword arguments."""
    settings: dict[str, Any] = Field(default_factory=dict)
    num_cpus: float = Field(default=0.1, ge=0)


@functools.lru_cache(maxsize=256)
def _context_of_weights(folder: str) -> Any:
    """`max_position_embeddings` of the weights in a folder; `None`: not to be read here."""
    try:
        with open(Path(folder, "config.json"), "rb") as file:
            said = json.load(file)
    except (OSError, ValueError):
        return None
    if not isinstance(said, dict):
        return None
    text = said.get("text_config")  # of a model that also sees
    return (text if isinstance(text, dict) else said).get("max_position_embeddings")


ModelConfig = Annotated[
    LocalModelConfig | RemoteModelConfig | CustomModelConfig, Field(discriminator="type")
]
