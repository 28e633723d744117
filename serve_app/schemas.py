"""Domain types: what the gateway, the router and the orchestrator say to each other.

Plain frozen dataclasses, because they cross process borders on every request; wire models of the
HTTP API live in `gateway.wire`. A pair is written `model_id@tool_id` everywhere.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from serve_app.capabilities import NO_NEEDS, Needs, needs_of
from serve_app.content import last_question, text_of_content
from serve_app.signals import Signals
from serve_app.trace_context import TraceContext

if TYPE_CHECKING:  # they import this module
    from serve_app.config import AtlasConfig
    from serve_app.purse import Purse

NO_TOOL = "none"
"""The tool id of plain generation."""

LOCAL_OWNER = "local"
"""Owner of everything where no key is asked for: everybody."""

PATTERN_PREFIX = "pattern:"
"""Before a pattern's name, wherever a model or a pair could stand."""

ToolKind = Literal["none", "function", "context", "sampling"]
"""How a tool joins a model: not at all, as a callable function, as text in the prompt, or by
sampling and choosing."""


class Effects(StrEnum):
    """What a tool's call does to the world; each is stronger than the one before."""

    NONE = "none"
    """Nothing: a call may be repeated."""
    IDEMPOTENT = "idempotent"
    """What the same call, made again, does not do once more: a call may be repeated."""
    ONCE = "once"
    """Something that must not happen twice: a call is never repeated."""


class Pair(NamedTuple):
    """A model and a tool: the unit of routing."""

    model_id: str
    tool_id: str

    def __str__(self) -> str:
        """`model_id@tool_id`, or `pattern:<name>`."""
        return self.model_id if self.is_pattern else f"{self.model_id}@{self.tool_id}"

    @staticmethod
    def is_name(text: str) -> bool:
        """Whether a text is a pair or a pattern as they are written."""
        return "@" in text or text.startswith(PATTERN_PREFIX)

    @property
    def is_pattern(self) -> bool:
        """Whether it stands for a declared pattern."""
        return self.model_id.startswith(PATTERN_PREFIX)

    @classmethod
    def of_pattern(cls, name: str) -> Pair:
        """What stands for a declared pattern among the pairs."""
        return cls(f"{PATTERN_PREFIX}{name}", NO_TOOL)

    @classmethod
    def parse(cls, text: str) -> Pair:
        """Read `model_id@tool_id`, `model_id` for plain generation, or `pattern:<name>`."""
        model_id, _, tool_id = text.rpartition("@") if "@" in text else (text, "", NO_TOOL)
        return cls(model_id, tool_id)


class MemberState(StrEnum):
    """Where a model of the pool stands."""

    STARTING = "starting"
    """Its application is being deployed."""
    READY = "ready"
    """It answers, and the router may choose it."""
    FAILED = "failed"
    """It did not start, or died; `reason` says why. It is tried again."""
    DRAINING = "draining"
    """It was removed: what is under way ends, nothing new begins."""


class Look(StrEnum):
    """What a decision saw of the query."""

    STATIC = "static"
    """Its pooled token vectors, mapped into the encoder's space: enough for a query like the
    profiled ones."""
    ENCODER = "encoder"
    """Its embedding."""


class DecidedBy(StrEnum):
    """Who decided."""

    PINNED = "pinned"
    """The caller named the model or the pair."""
    COLD_START = "cold_start"
    """Similarity to the pairs' cards: the prior before any outcome is known."""
    CLUSTERS = "clusters"
    """Path 1: the outcomes of like questions."""
    OUT_OF_DISTRIBUTION = "out_of_distribution"
    """The query is unlike everything profiled: the pair whose card is most like it (best overall
    where cards say nothing), or the configured fallback."""
    POLICY = "policy"
    """Path 2: the learned multi-step policy."""
    VOI = "voi"
    """The value of information: how likely the answers held are right says whether another
    candidate is worth its price."""
    SESSION = "session"
    """The router would have switched; the conversation stays with who answered it last, because
    to have it read anew would cost more."""
    FALLBACK = "fallback"
    """The choice failed before the first byte, and the next-best pair took over."""
    KEYWORD = "keyword"
    """A keyword rule named the candidate."""
    SEMANTIC = "semantic"
    """A semantic rule did."""
    LLM = "llm"
    """A model of the pool did, asked by a rule."""
    DEFAULT = "default"
    """No rule was sure, or one sent the request there: the default."""


BY_STEPS = frozenset({DecidedBy.POLICY, DecidedBy.VOI})
"""Paths on which the router is asked again after each step."""
BY_RULE = frozenset({DecidedBy.KEYWORD, DecidedBy.SEMANTIC, DecidedBy.LLM, DecidedBy.DEFAULT})
"""Paths on which a rule decided, so that they say nothing of a policy."""


class Action(StrEnum):
    """What a decision asks for."""

    ROUTE = "route"
    """Run the first candidate."""
    THINK = "think"
    """Run the planner; its text joins what later steps read."""
    ANSWER = "answer"
    """Return the best answer so far, unchanged."""


class StopReason(StrEnum):
    """Why nothing more was done for a request."""

    ANSWERED = "answered"
    """There was an answer, and the pattern was content with it."""
    STEPS = "steps"
    """No further step was allowed; the best answer so far was given."""
    DEADLINE = "deadline"
    """Time was up."""
    USD = "usd"
    """No call was within the dollars left."""
    TOKENS = "tokens"
    """No call was within the tokens left."""
    MODEL_CALLS = "model_calls"
    """No further call of a model was allowed."""
    TOOL_CALLS = "tool_calls"
    """No further call of a tool was allowed."""
    REFUSED = "refused"
    """The request is wrong, or fits no candidate."""
    DECLINED = "declined"
    """A pattern found that it has no answer, and said so."""
    NO_CANDIDATE = "no_candidate"
    """Nothing in the pool could serve it."""
    FAILED = "failed"
    """The table of recovery had no move left."""
    LEFT = "left"
    """The caller went away."""
    ERROR = "error"
    """An unforeseen error."""


MAX_DEVIATIONS = 3.0
"""Of verdicts from what is expected, in standard deviations, that chance explains."""


class SpanKind(StrEnum):
    """What a span is about."""

    REQUEST = "request"
    """The whole of it."""
    DECISION = "decision"
    """A question to the router."""
    RULE = "rule"
    """A rule in front of the learned ones."""
    NODE = "node"
    """A part of a pattern."""
    PAIR = "pair"
    """A step: the run of a pair."""
    THOUGHT = "thought"
    """A step: the run of the planner."""
    CALL = "call"
    """A run of a pair inside a pattern."""
    MODEL = "model"
    """A call of a model."""
    TOOL = "tool"
    """A call of a tool."""
    CONTEXT = "context"
    """A conversation that was shortened to fit a model's context."""
    VALIDATION = "validation"
    """A check of what a model said."""


Fact = str | int | float | bool
"""A small thing that a span tells of itself, as a verdict or a count."""


class StartPhase(StrEnum):
    """What the start of a model waits for."""

    TURN = "its turn"
    """Others start, or there is too little free memory beside them."""
    DEPLOYMENT = "its deployment"
    """Its application is being put together and handed to Serve."""
    LOADING = "its replica to load"
    ANSWERS = "its first answers"
    """It answers, and is asked once with each of its tools."""


@dataclass(frozen=True, slots=True)
class ModelMember:
    """One model of the pool, as the gateway and the router see it."""

    model_id: str
    state: MemberState
    reason: str | None = None
    """Why it failed, in words fit for a client; `None` while it has not."""
    since_unix_s: float = 0.0
    application: str | None = None
    """Serve application that answers for it; `None` where none does."""
    num_replicas: int | None = None
    """Replicas that run, as last seen; `None`: not looked at."""
    cold_tools: frozenset[str] = frozenset()
    """Tools whose pair with it has not answered a warm-up request yet."""
    updating: bool = False
    """Whether an application with newer settings is to take over."""
    retry_unix_s: float | None = None
    """When what failed of it is tried again; `None`: nothing failed, or it is being tried now."""
    waits_for: StartPhase | None = None
    """While it is starting."""


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """What the pool has to do at this moment."""

    ongoing: Mapping[str, int]
    """Requests at the replicas of each model, by model id: being answered, or waiting there."""
    away: frozenset[str]
    """Tools whose MCP server does not answer, or may offer nothing."""


@dataclass(frozen=True, slots=True)
class PatternMember:
    """One declared pattern, and what it needs of the pool."""

    name: str
    pairs: frozenset[Pair] = frozenset()
    """All of them have to answer."""
    models: frozenset[str] = frozenset()
    """Verifiers; all of them have to answer."""
    choices: tuple[frozenset[Pair], ...] = ()
    """Of each, one has to answer: where the pattern leaves the choice to the router."""
    routable: bool = True
    """Whether the router may choose it."""
    missing: str | None = None
    """What it names that the pool does not have, in words; `None`: nothing."""

    @property
    def pair(self) -> Pair:
        """What stands for it among the pairs."""
        return Pair.of_pattern(self.name)

    def is_ready(self, ready: frozenset[Pair], models: frozenset[str]) -> bool:
        """Whether all that it needs answers.

        Args:
            ready: Pairs that answer.
            models: Models that answer.
        """
        plain = frozenset(Pair(model_id, NO_TOOL) for model_id in models)
        return (
            self.missing is None
            and self.pairs <= ready | plain
            and self.models <= models
            and all(choice & ready for choice in self.choices)
        )


@dataclass(frozen=True, slots=True)
class PoolState:
    """The pool at one version. Versions only rise."""

    pool_version: int
    models: tuple[ModelMember, ...]
    tools: tuple[str, ...]
    pairs: tuple[Pair, ...]
    """Every configured pair, ready or not, in configuration order."""
    config: AtlasConfig | None = None
    """The deployment with the pool as it is wanted now; `None`: not known."""
    revision: int | None = None
    """Of the desired pool; `None` before the store has told."""
    patterns: tuple[PatternMember, ...] = ()
    """Every declared pattern, ready or not."""

    def candidates(self) -> tuple[Pair, ...]:
        """What the router may choose among, ready or not: pairs and routable patterns."""
        return (*self.pairs, *(p.pair for p in self.patterns if p.routable))

    def ready_candidates(self) -> tuple[Pair, ...]:
        """What the router may choose among now."""
        ready = set(self.ready_patterns())
        routable = [p.pair for p in self.patterns if p.routable and p.name in ready]
        return (*self.ready_pairs(), *routable)

    def ready_patterns(self, asleep: frozenset[str] = frozenset()) -> tuple[str, ...]:
        """Names of the patterns that can answer now.

        Args:
            asleep: Models that count as not ready.
        """
        models = frozenset(
            m.model_id
            for m in self.models
            if m.state is MemberState.READY and m.model_id not in asleep
        )
        pairs = frozenset(p for p in self.ready_pairs() if p.model_id in models)
        return tuple(p.name for p in self.patterns if p.is_ready(pairs, models))

    def ready_pairs(self) -> tuple[Pair, ...]:
        """Pairs that answer now."""
        ready = {
            member.model_id: member.cold_tools
            for member in self.models
            if member.state is MemberState.READY
        }
        return tuple(
            pair
            for pair in self.pairs
            if pair.model_id in ready and pair.tool_id not in ready[pair.model_id]
        )

    def missing(self) -> tuple[str, ...]:
        """What is configured and does not answer now: model ids, and pairs of models that do."""
        names = []
        for member in self.models:
            if member.state in (MemberState.STARTING, MemberState.FAILED):
                names.append(member.model_id)
            elif member.state is MemberState.READY:
                names += [f"{member.model_id}@{tool}" for tool in sorted(member.cold_tools)]
        return tuple(names)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the caller allows for one request, and what the request needs."""

    alpha: float
    """Cost-quality dial in [0, 1]; 0 = quality only."""
    deadline_s: float
    """Seconds from arrival to the last byte."""
    max_cost_usd: float | None = None
    max_steps: int = 1
    models: frozenset[str] | None = None
    """Allowed models; `None` allows all."""
    tools: frozenset[str] | None = None
    """Allowed tools; `None` allows all."""
    candidates: frozenset[Pair] | None = None
    """Allowed candidates; `None` allows all."""
    needs: Needs = NO_NEEDS
    """What every candidate has to take; told to the router with each question."""
    without: frozenset[str] = frozenset()
    """Models and patterns (`pattern:<name>`) that are left alone now, because a breaker is open;
    told to the router with each question."""


class AccessLists(NamedTuple):
    """What somebody may use: allow-lists and deny-lists of names; a denied name is never used."""

    models: frozenset[str] | None = None
    """Model ids, and `pattern:<name>` for patterns; `None` allows all."""
    tools: frozenset[str] | None = None
    """Tool ids; `None` allows all."""
    not_models: frozenset[str] = frozenset()
    not_tools: frozenset[str] = frozenset()

    def allowed_models(self, known: frozenset[str]) -> frozenset[str] | None:
        """Those of some models that may be used; `None`: all."""
        return _allowed(known, self.models, self.not_models)

    def allowed_tools(self, known: frozenset[str]) -> frozenset[str] | None:
        """Those of some tools that may be used; `None`: all."""
        return _allowed(known, self.tools, self.not_tools)


ALL_ACCESS = AccessLists()


def _allowed(
    known: frozenset[str], allowed: frozenset[str] | None, denied: frozenset[str]
) -> frozenset[str] | None:
    if allowed is None and not denied:
        return None
    return (known if allowed is None else allowed) - denied


@dataclass(frozen=True, slots=True)
class Candidate:
    """One pair and what the router thinks of it for one query."""

    pair: Pair
    utility: float
    """(1 - alpha) * quality - alpha * cost."""
    quality: float
    """Expected score in [0, 1]."""
    cost: float
    """Normalised price in [0, 1] over the pool."""
    low: float = 0.0
    """With `high`: the 95% interval of the quality; [0, 1] where nothing was measured."""
    high: float = 1.0
    cost_usd: float = 0.0
    """What such a request is expected to cost, in US dollars."""


@dataclass(frozen=True, slots=True)
class Drift:
    """How far users' verdicts on a candidate are from what its profile lets expect."""

    pair: Pair
    verdicts: float
    """That count: earlier ones and those of one key count for less."""
    expected: float
    """Mean score in the profile, in [0, 1]."""
    observed: float
    """The same, moved by how much the verdicts missed what was expected of each question."""
    deviations: float
    """Standard deviations between the two; below 0: it is worse. 0 until there are enough."""

    @property
    def has_left(self) -> bool:
        """Whether chance is no explanation."""
        return abs(self.deviations) >= MAX_DEVIATIONS


@dataclass(frozen=True, slots=True)
class Likeness:
    """What the profile holds that is like a query; only for explanations."""

    cluster: int
    """Index of the nearest cluster."""
    examples: tuple[str, ...]
    """Profiled questions nearest to its centre."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What one finished step of a request showed, without the gold."""

    pair: Pair | None
    """Who ran; `None` is the planner."""
    answer_key: str | None
    """Normalised answer: equal for answers that say the same. `None` where there is no answer."""
    mean_logprob: float | None
    tool_errors: int
    """Tool calls that failed."""
    cost_usd: float
    signals: tuple[float, ...] = ()
    """What else it showed, as `Signals.numbers` gives it; empty: not kept."""


@dataclass(frozen=True, slots=True)
class ShadowDecision:
    """What a policy on trial would have done first; logged, and not acted on."""

    policy_version: int
    action: Action
    pair: Pair
    """Its first candidate."""
    path: DecidedBy
    confidence: float
    propensity: float


@dataclass(frozen=True, slots=True)
class Hop:
    """What one rule found in a request, on the way to the decision."""

    rule: str
    """Its name; `learned` and `default` are themselves."""
    kind: Literal["keyword", "semantic", "llm", "learned", "default"]
    decided: bool
    """Whether it decided; otherwise the request went on."""
    label: str | None = None
    """What it found, sure or not; `None`: nothing."""
    score: float | None = None
    """What the confidence was made from; see `router.rules.judgement`."""
    confidence: float | None = None
    """In [0, 1]; `None`: it found nothing."""
    floor: float = 0.0
    """Confidence below which it does not decide."""
    seconds: float = 0.0
    cost_usd: float = 0.0
    note: str | None = None
    """Why it did not decide, where that is not the floor; else what it decided on."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The router's choice: the candidates from best to worst, and how it was made."""

    candidates: tuple[Candidate, ...]
    """Never empty where the action is to route."""
    path: DecidedBy
    confidence: float
    """How sure the rule is that the first candidate is right, in [0, 1]."""
    propensity: float
    """Probability with which the first candidate was chosen, in (0, 1]."""
    policy_version: int
    pool_version: int
    seconds: float = 0.0
    """Time the decision took, embedding excluded."""
    distance_quantile: float | None = None
    """Share of the profiled queries that are nearer to the others than this one is, in [0, 1];
    `None` without a profile."""
    likeness: Likeness | None = None
    """Only where an explanation was asked for."""
    action: Action = Action.ROUTE
    """Anything else only on path 2."""
    shadow: ShadowDecision | None = None
    """Only with a request's first decision, while a policy is on trial in the shadow."""
    can_think: bool = False
    """Path 2: whether there was a planner that answered, and the limits admitted it."""
    hops: tuple[Hop, ...] = ()
    """What the rules found, in their order; empty where there are none."""
    cluster: int | None = None
    """Of the policy's snapshot, nearest to the query; `None`: without a profile, or outside it."""
    answer_step: int | None = None
    """With `ANSWER`: the step whose answer is the best; `None`: it is not said."""
    chances: tuple[float | None, ...] = ()
    """Of each finished step: the calibrated chance that its answer is right, in [0, 1]; `None`: it
    gave none. Empty without a verifier."""
    look: Look | None = None
    """`None`: the router was not asked."""

    @property
    def pair(self) -> Pair:
        """The chosen pair; where the action is to think, the one that would be next."""
        return self.candidates[0].pair


@dataclass(slots=True)
class Usage:
    """What a piece of work consumed; addable."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0

    def add(self, other: Usage) -> None:
        """Add `other` to this."""
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.cost_usd += other.cost_usd


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool inside a step."""

    tool_id: str
    """Of the tool that ran; of the pair's tool where none did."""
    arguments: dict[str, Any]
    ok: bool
    text: str
    """The result the model saw, or the error."""
    seconds: float
    data: dict[str, Any] = field(default_factory=dict)
    """Structured result, for example the sources of a retrieval."""
    function: str | None = None
    """Which of the tool's functions; `None`: no call of one of them, or of one that is not
    there."""


@dataclass(frozen=True, slots=True)
class Step:
    """One run of a pair inside a request."""

    pair: Pair
    path: DecidedBy
    propensity: float
    usage: Usage
    seconds: float
    tool_calls: tuple[ToolCall, ...] = ()
    error: str | None = None
    """Why the step gave no answer; `None` when it did."""
    mean_logprob: float | None = None
    """Mean token log-probability of the answer, where the engine gave it."""
    answer: str | None = None
    action: Action = Action.ROUTE
    """`THINK` where the planner ran: its text is no answer."""
    policy_version: int = 0
    """Of the policy that decided on the step; the same through all steps of a request."""
    signals: Signals | None = None
    """What it showed beside its text."""


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What it takes to decide a request of path 2 anew, beside its decisions and steps."""

    max_steps: int
    """Allowed to the request."""
    max_cost_usd: float | None
    """Allowed to the request; `None` where there was no limit."""
    seconds_left: tuple[float, ...]
    """At each decision."""
    answer_keys: tuple[int | None, ...]
    """Of each step: equal for answers that say the same, `None` for none."""
    answer_embeddings: tuple[bytes | None, ...]
    """(dim,) float32 little-endian of each step's answer; `None` where there was none, or nobody
    asked what comes after it."""


class SpanRecord(NamedTuple):
    """What is told of a span: by a report, an event and the store.

    A tuple, because every request makes several, and a frozen dataclass takes twice as long.
    """

    span_id: int
    """Unique in its request; 0 is the request itself."""
    parent_id: int | None
    """`None`: it is the request itself."""
    kind: SpanKind
    name: str
    """Of the model, tool, pair or node."""
    began_s: float
    """Seconds after the request began."""
    seconds: float | None
    """`None`: it is under way."""
    error: str | None
    """Why it failed; `None`: it did not. Of a tool or a check only the class of the error, because
    its words may repeat what the tool was given."""
    prompt_tokens: int
    """Of it and everything below, as the other counts."""
    completion_tokens: int
    cost_usd: float
    attributes: dict[str, Fact]
    arguments: str | None = None
    """What a tool was given, as JSON; `None`: nothing, or `store.keep_content` is off."""
    text: str | None = None
    """What a model said or a tool gave; `None`: nothing, or `store.keep_content` is off."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything about one finished request that the client, the log and the store may see."""

    request_id: str
    decision: Decision
    steps: tuple[Step, ...]
    usage: Usage
    seconds: float
    query: str
    embedding: bytes | None
    """(dim,) float32 little-endian query embedding; `None` when the request was pinned."""
    owner: str = LOCAL_OWNER
    error: str | None = None
    """Why the request as a whole failed; `None` when it was answered."""
    decisions: tuple[Decision, ...] = ()
    """Path 2: every decision in its order, the first one included; empty on the other paths."""
    answer_step: int | None = None
    """Index of the step whose answer was returned; `None` where none was."""
    is_partial: bool = False
    """Whether a cap cut the answer short; `stop` says which."""
    sources: tuple[dict[str, Any], ...] = ()
    """What the answer of a pattern rests on: `id`, `title` and `text` of each."""
    circumstances: Circumstances | None = None
    """Of a request of path 2; `None` on the other paths."""
    stop: StopReason = StopReason.ANSWERED
    """Why nothing more was done."""
    spans: tuple[SpanRecord, ...] = ()
    """What happened, each span after the one it is part of."""
    num_dropped: int = 0
    """Spans that were not kept."""
    lease_id: str | None = None
    """What the request was paid from; `None`: its key has no limits."""
    trace: TraceContext | None = None
    """The W3C trace that it belongs to; `None`: nothing is traced."""

    @property
    def final_step(self) -> Step | None:
        """The step that gave the answer, or else the last one tried."""
        if not self.steps:
            return None
        return self.steps[-1 if self.answer_step is None else self.answer_step]

    @property
    def pair(self) -> Pair:
        """The pair that gave the answer, or else the last one tried."""
        return self.final_step.pair if self.final_step else self.decision.pair


@dataclass(frozen=True, slots=True)
class Fixed:
    """How a request is decided that is to have the same result again.

    The policy decides as it was fitted, without what was learned since, without chance and without
    the clock; parts that run side by side are all waited for.
    """

    deadline_s: float
    """What every decision is told is left: all that the caller allows."""
    policy_version: int | None = None
    """`None`: the policy that serves, trials aside."""


Route = tuple[str, ...]
"""Names of the spans from a request's candidate down to a node of a pattern."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What was chosen for an earlier request, to be chosen again."""

    request_id: str
    """Of the earlier request."""
    steps: tuple[tuple[Action, Pair], ...]
    """In their order: candidates that were run, and thoughts. Never empty."""
    is_policy: bool
    """Whether the learned policy chose them: then all are run, else the next where one fails."""
    routes: Mapping[Route, tuple[tuple[Pair, ...], ...]]
    """Of each node of a pattern that left the choice to the router: the pairs that it ran, each
    time that it chose."""
    answer_step: int | None = None
    """Number of the step whose answer the policy returned; `None`: it is not known."""


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A validated chat request on its way to the orchestrator."""

    request_id: str
    model: str
    """`atlas`, a model id, or a pair."""
    messages: tuple[dict[str, Any], ...]
    """OpenAI messages, validated and free of unknown fields."""
    sampling: dict[str, Any]
    """OpenAI sampling parameters that the caller set, validated (temperature, top_p, max_tokens,
    stop, seed, n …)."""
    limits: Limits
    owner: str = LOCAL_OWNER
    """Id of the caller's API key."""
    tools: tuple[dict[str, Any], ...] = ()
    """The caller's own tools; passed through to the chosen model."""
    tool_choice: Any = None
    explain: bool = False
    events: bool = False
    """Whether the stream tells of each span as it begins and ends."""
    session: str = ""
    """Of the conversation that it is a part of: unique among all keys; empty: of none."""
    note: str | None = None
    """What the planner said of the question; stands before it in the last user message."""
    begin_effect: Callable[[], Awaitable[None]] | None = field(
        default=None, repr=False, compare=False
    )
    """Puts on record that something begins that must not happen twice, or raises `EffectRefused`;
    awaited before it begins. `None`: the request has no idempotency key, and may not do so."""
    fixed: Fixed | None = None
    """`None`: it is decided as well as can be now."""
    replay: Replay | None = None
    """`None`: it is decided anew."""
    purse: Purse | None = field(default=None, repr=False, compare=False)
    """What the key may still spend; the request is paid from there. `None`: nothing limits it."""
    trace: TraceContext | None = field(default=None, repr=False, compare=False)
    """The W3C trace that it belongs to; `None`: nothing is traced."""

    @property
    def query(self) -> str:
        """The text routed on: that of the last user message."""
        return text_of_content(last_question(self.messages))

    @property
    def needs(self) -> Needs:
        """What the call needs of whoever answers."""
        return needs_of(self.messages, self.sampling, self.tools, self.tool_choice)
