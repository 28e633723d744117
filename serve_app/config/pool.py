"""How the pool is brought up, and what may be added to it over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from serve_app.config.base import BaseConfig

SAFE_ENGINE_KWARGS = (
    "block_size", "code_revision", "convert", "cpu_offload_gb", "data_parallel_size",
    "disable_log_stats", "disable_sliding_window", "dtype", "enable_auto_tool_choice",
    "enable_chunked_prefill", "enable_expert_parallel", "enable_prefix_caching", "enforce_eager",
    "gpu_memory_utilization", "kv_cache_dtype", "kv_cache_memory_bytes",
    "long_prefill_token_threshold", "max_logprobs", "max_model_len", "max_num_batched_tokens",
    "max_num_seqs",
    "num_gpu_blocks_override", "pipeline_parallel_size", "quantization", "reasoning_parser",
    "revision", "runner", "seed", "tensor_parallel_size", "tokenizer_revision", "tool_call_parser",
)  # fmt: skip
"""Engine arguments that are numbers, switches or names out of vLLM's own lists: none of them names
code, a file, an address or a secret."""

_CODE_ENGINE_KWARGS = frozenset((
    "distributed_executor_backend", "hf_overrides", "io_processor_plugin", "kv_transfer_config",
    "load_format", "logits_processors", "model_class_overrides", "reasoning_parser_plugin",
    "scheduler_cls", "tool_parser_plugin", "trust_remote_code", "worker_cls",
    "worker_extension_cls",
))  # fmt: skip
"""Engine arguments that have an engine run code that somebody names."""


class RemoteOriginConfig(BaseConfig):
    """One place where models added over HTTP may be."""

    origin: str = Field(pattern=r"^https?://[A-Za-z0-9.\[\]:-]+$")
    """Scheme, host and, where it is not the scheme's own, port: `https://api.openai.com`. Naming it
    allows it, whatever address it stands for, also a loopback or link-local one."""
    api_key_env: str | None = None
    """Environment variable whose key may be sent there; `None` allows models without a key. Several
    entries of one origin allow several keys."""


class AdminApiConfig(BaseConfig):
    """What models and tools may name that come over HTTP, and not from this file.

    It holds for what the store keeps of them, too: what is not allowed any more is left out of the
    pool. A model or tool of this file keeps what the file gives it when an admin changes the rest.
    """

    engine_kwargs: tuple[str, ...] = SAFE_ENGINE_KWARGS
    """Engine arguments of local models, each with a number, a truth value or a plain word."""
    model_roots: tuple[Path, ...] = ()
    """Folders below which a local model's weights may lie; beside them a hub id may be named."""
    remotes: tuple[RemoteOriginConfig, ...] = ()
    """Where remote models, MCP servers, search servers and APIs may be, and which key each
    gets. Empty: none of these over HTTP."""
    corpora_root: Path | None = None
    """Folder below which a retrieval tool's corpus, an sql tool's database and a files tool's root
    may lie; `None` allows none."""
    specs_root: Path | None = None
    """Folder below which the OpenAPI file of a tool may lie; `None` allows none."""
    python_packages: tuple[str, ...] = ()
    """Packages that a python tool may load."""
    max_sandbox_mb: int = Field(default=1024, ge=16, le=65536)
    """Largest `memory_mb` of a python or sql tool, and largest `max_disk_bytes` in MiB."""

    @model_validator(mode="after")
    def _names_no_code(self) -> Self:
        for name in self.engine_kwargs:
            if name in _CODE_ENGINE_KWARGS:
                raise ValueError(
                    f"engine_kwargs: {name!r} has an engine run code that somebody names; give it "
                    "to single models in the configuration file"
                )
        roots = [root for root in (self.corpora_root, self.specs_root) if root is not None]
        for folder in (*self.model_roots, *roots):
            if not folder.is_absolute() or folder == Path(folder.root):
                raise ValueError(
                    f"{str(folder)!r} is no folder to allow: name one by its absolute path, or "
                    "with ./ relative to this file"
                )
        return self


class PoolConfig(BaseConfig):
    """How the pool is brought up."""

    start_timeout_s: float = Field(default=900.0, gt=0)
    """A model not running by then is failed."""
    cold_start_wait_s: float = Field(default=120.0, gt=0)
    """How long a request waits for a model that was scaled to zero, where no other may answer it;
    then it gets 503 with Retry-After."""
    retry_initial_s: float = Field(default=30.0, gt=0)
    """How long after it failed a model is started again; doubles with every failure."""
    retry_max_s: float = Field(default=600.0, gt=0)
    """Longest pause before a failed model is started again."""
    max_parallel_starts: int = Field(default=4, ge=1)
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Custom Ray resources that the controller needs, as in `DeploymentConfig`."""
    health_interval_s: float = Field(default=5.0, gt=0)
    """How often a pool at rest is looked at."""
    allow_custom_models: bool = False
    """Whether models of type `custom`, which name code to run, can be added over HTTP."""
    allow_custom_tools: bool = False
    """The same of tools of type `custom`. Gateways import what such a tool names."""
    allow_commands: bool = False
    """Whether MCP servers that are commands can be added over HTTP: they run code."""
    admin_api: AdminApiConfig = AdminApiConfig()
