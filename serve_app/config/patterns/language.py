"""The language of patterns: what a request does with several calls, written down as nodes.

It has no expressions, no loops and no jumps: a chain is the list under `do`, a choice is typed
predicates, and what repeats has a maximum. So every pattern ends, and its worst case is known
before it runs (`bound`). What spans nodes is checked in `check`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

import re2
from jsonschema import SchemaError
from jsonschema.validators import validator_for
from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from serve_app.config.base import BaseConfig
from serve_app.config.patterns.template import Reference, Template
from serve_app.config.tools import MAX_DESCRIPTION_CHARS, Examples

ROUTE = "route"
"""The `pair` that leaves the choice to the router."""
NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,47}$"
MAX_NODES = 64
"""Nodes of one pattern, those inside other nodes included."""

NodeId = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
MaxBytes = Annotated[int, Field(ge=16, le=32_768)]


def _checked_template(text: Any) -> Any:
    if isinstance(text, str):
        Template.parse(text)
    return text


TemplateText = Annotated[str, Field(max_length=32_768), BeforeValidator(_checked_template)]
"""Text with references; in a file, a name that ends in `.md` stands for that file's text."""


def _checked_reference(text: Any) -> Any:
    if isinstance(text, str):
        Reference.parse(text)
    return text


ReferenceText = Annotated[str, BeforeValidator(_checked_reference)]


def _checked_expression(text: Any) -> Any:
    if isinstance(text, str):
        options = re2.Options()
        options.log_errors = False
        try:
            re2.compile(text, options)
        except re2.error as error:
            raise ValueError(f"{text!r} is no RE2 expression: {error}") from None
    return text


Expression = Annotated[str, Field(max_length=500), BeforeValidator(_checked_expression)]
"""RE2 expression that the whole of a text must match."""


def _checked_schema(schema: Any) -> Any:
    if isinstance(schema, dict):
        try:
            validator_for(schema).check_schema(schema)
        except SchemaError as error:
            raise ValueError(f"it is no JSON schema: {error.message}") from None
        for reference in _references_of(schema):
            if not reference.startswith("#"):
                raise ValueError(f"a schema refers to itself alone ('#...'), got {reference!r}")
    return schema


def _references_of(schema: Any) -> Iterator[str]:
    """What the `$ref`s of a schema say."""
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for inner in schema.values():
            yield from _references_of(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from _references_of(inner)


Schema = Annotated[dict[str, Any], BeforeValidator(_checked_schema)]
"""A JSON schema that refers to nothing outside itself."""


class Condition(BaseConfig):
    """What a value must be; everything that is named must hold."""

    eq: str | float | bool | None = None
    ne: str | float | bool | None = None
    lt: float | None = None
    le: float | None = None
    gt: float | None = None
    ge: float | None = None
    one_of: tuple[str, ...] | None = Field(default=None, max_length=64)
    """The text, without blanks around it and without regard to case, is one of these."""
    empty: bool | None = None
    """Whether the text, list or object has nothing in it."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if all(getattr(self, name) is None for name in type(self).model_fields):
            raise ValueError(f"name a condition: {', '.join(type(self).model_fields)}")
        return self


Predicate = Annotated[dict[ReferenceText, Condition], Field(min_length=1, max_length=16)]
"""Conditions by reference (`found.count`, `triage.data.label`); all of them must hold."""


class NodeBase(BaseConfig):
    """What every node has."""

    id: NodeId | None = None
    """Name under which later nodes of the same list see the result; `None`: no node sees it."""
    seconds: float | None = Field(default=None, gt=0, le=600)
    """Longest time it may take; `None`: what the pattern has left."""

    kind: str

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        fields.pop("kind", None)
        return {self.kind: fields}


_WRITTEN = WithJsonSchema(
    {
        "type": "object",
        "description": "A node: an object with one key, its kind, and the node's fields.",
        "minProperties": 1,
        "maxProperties": 1,
        "propertyNames": {"enum": [
            "ask", "tool", "retrieve", "branch", "parallel", "vote", "cascade", "critique", "plan",
            "verify", "refuse",
        ]},
        "additionalProperties": {"type": "object"},
    }
)  # fmt: skip


def _by_kind(value: Any) -> Any:
    """`{"ask": {...}}` as the fields of a node, its kind among them."""
    if not isinstance(value, Mapping) or "kind" in value:
        return value
    if len(value) != 1:
        raise ValueError("a node has one key, its kind, for example 'ask'")
    ((kind, fields),) = value.items()
    if fields is not None and not isinstance(fields, Mapping):
        raise ValueError(f"{kind}: its fields are needed, got {type(fields).__name__}")
    return {**(fields or {}), "kind": kind}


class RouteOptions(BaseConfig):
    """What the router may choose among."""

    alpha: float | None = Field(default=None, ge=0, le=1)
    """Cost-quality dial; `None`: the request's."""
    models: tuple[str, ...] | None = None
    """Allowed models; `None`: all."""
    tools: tuple[str, ...] | None = None
    """Allowed tools; `None`: all."""


class AskNode(NodeBase):
    """Asks a pair, the router's choice of one, or another pattern."""

    kind: Literal["ask"] = "ask"
    pair: str = ROUTE
    """`model_id@tool_id`, `model_id`, `pattern:<name>`, or `route`."""
    route: RouteOptions = RouteOptions()
    """Read where `pair` is `route`."""
    prompt: TemplateText | None = None
    """The user message; `None`: the caller's own messages."""
    system: TemplateText | None = None
    """A system message before it; only with a prompt."""
    uses: tuple[NodeId, ...] = ()
    """Results that stand before the question, each with its sources numbered."""
    cite: NodeId | None = None
    """Result whose sources the answer may cite as `[1]`; those it does cite are its own sources."""
    output: Schema | None = None
    """JSON schema of the answer, an object with `properties`; it is asked again once where the
    answer does not fit."""
    max_tokens: int = Field(default=512, ge=1, le=8192)
    temperature: float | None = Field(default=None, ge=0, le=2)
    """`None`: the caller's."""
    stream: bool | None = None
    """Whether the caller gets its text as it comes; `None`: where it is the last thing done."""
    max_bytes: MaxBytes = 4096
    """Of its text that other nodes see."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.route != RouteOptions() and self.pair != ROUTE:
            raise ValueError(f"route: only with 'pair: {ROUTE}', got {self.pair!r}")
        if self.system is not None and self.prompt is None:
            raise ValueError("system: only with a prompt")
        if self.output is not None and not isinstance(self.output.get("properties"), dict):
            raise ValueError("output: a JSON schema of an object with 'properties' is needed")
        return self


Ask = Annotated[AskNode, BeforeValidator(_by_kind), _WRITTEN]


class ToolNode(NodeBase):
    """Calls a tool with arguments that are written down."""

    kind: Literal["tool"] = "tool"
    tool: str
    """Id of a tool of the pool."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """As its schema asks; strings are templates."""
    max_bytes: MaxBytes = 4096
    """Of its result that other nodes see."""


class RetrieveNode(NodeBase):
    """Looks sentences up."""

    kind: Literal["retrieve"] = "retrieve"
    corpus: str
    """Id of a retrieval tool of the pool."""
    query: TemplateText = "{{question}}"
    top_k: int | None = Field(default=None, ge=1, le=100)
    """Sentences kept; `None`: what the tool gives."""
    min_score: float = Field(default=-1.0, ge=-1, le=1)
    """Least cosine similarity of a sentence to the query."""
    has_names: bool = False
    """Whether a sentence must hold every proper name of the query."""
    max_bytes: MaxBytes = 4096
    """Of the sentences together."""


class Case(BaseConfig):
    """One way of a branch."""

    when: Predicate
    do: Annotated[tuple[Node, ...], Field(min_length=1)]


class BranchNode(NodeBase):
    """Takes the first way whose predicate holds."""

    kind: Literal["branch"] = "branch"
    cases: tuple[Case, ...] = Field(min_length=1, max_length=16)
    otherwise: tuple[Node, ...] = Field(default=(), alias="else")
    """Where none holds; nothing: the branch's result is empty."""


class ParallelNode(NodeBase):
    """Runs nodes side by side."""

    kind: Literal["parallel"] = "parallel"
    do: tuple[Node, ...] = Field(min_length=1, max_length=32)
    each: tuple[str, ...] | None = Field(default=None, min_length=1, max_length=32)
    """Texts for which the one node under `do` runs, as `{{item}}`; `None`: every node runs once."""
    join: Literal["concat", "first"] | Ask = "concat"
    """What becomes of the results: put together line by line, the first that succeeds, or a node
    that reads them as `{{answers}}`."""
    function: str | None = Field(default=None, pattern=r"^[\w.]+:\w+$")
    """`module:name` of a Python function that takes the list of texts and returns one text, in
    place of `join`; only in the configuration file."""
    quorum: int | None = Field(default=None, ge=1)
    """Goes on when so many have succeeded, and ends the rest; `None`: waits for all, and needs
    all."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        count = len(self.do) if self.each is None else len(self.each)
        if self.each is not None and len(self.do) != 1:
            raise ValueError("each: goes with exactly one node under 'do'")
        if self.quorum is not None and self.quorum > count:
            raise ValueError(f"quorum {self.quorum} of {count} can never be reached")
        return self


class VoteNode(NodeBase):
    """Asks several, and takes what most of them say."""

    kind: Literal["vote"] = "vote"
    of: tuple[Ask, ...] = Field(min_length=2, max_length=16)
    weights: Literal["profile", "equal"] = "profile"
    """`profile`: a voice weighs the log-odds of the quality that the router expects of its pair for
    the question (Nitzan and Paroush, 1982)."""


class Accept(BaseConfig):
    """When an answer of a cascade is good enough; everything that is named must hold."""

    min_logprob: float | None = Field(default=None, le=0)
    """Least mean log-probability of its tokens."""
    verifier: str | None = None
    """A model with the role `verifier`."""
    min_score: float = Field(default=0.5, ge=0, le=1)
    """Least score that the verifier gives."""
    agrees: bool = False
    """Whether an earlier rung has to have said the same; the first rung is never accepted by it."""
    pattern: Expression | None = None
    """RE2 expression that the whole answer must match."""
    unless: Expression | None = None
    """RE2 expression that the whole answer must not match, for example of a model that says that it
    does not know."""
    examples: str | None = None
    """Id of a debug tool: the answer's code must do what the examples in the question say. Where
    there are none, every answer is accepted."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.model_fields_set - {"min_score"}:
            raise ValueError(
                "accept: name min_logprob, verifier, agrees, pattern, unless or examples"
            )
        return self


class CascadeNode(NodeBase):
    """Asks candidates in their order, the cheapest first, until an answer is good enough."""

    kind: Literal["cascade"] = "cascade"
    of: tuple[Ask, ...] = Field(min_length=2, max_length=8)
    accept: Accept
    """Holds for every rung but the last, whose answer is always taken."""


Reviser = Annotated[
    AskNode | CascadeNode, Field(discriminator="kind"), BeforeValidator(_by_kind), _WRITTEN
]


class CritiqueNode(NodeBase):
    """Drafts, has critics look side by side, and revises at most once."""

    kind: Literal["critique"] = "critique"
    draft: Ask
    critics: tuple[Critic, ...] = Field(min_length=1, max_length=8)
    """See the draft as `{{draft}}`. A verifying one objects where the check fails; one that asks
    objects unless its answer begins with `OK`."""
    revise: Reviser
    """Sees the draft as `{{draft}}` and the objections as `{{objections}}`."""


class PlanNode(NodeBase):
    """A lead splits the task, workers do the parts, and the parts are put together.

    A part may refer to the answer of an earlier one by its id. It begins as soon as what it needs
    is there.
    """

    kind: Literal["plan"] = "plan"
    lead: Ask
    """Answers with `{"subtasks": [{"id": "a", "ask": "..."}, {"id": "b", "ask": "{{a}} ..."}]}`."""
    worker: Ask
    """Does one part, as `{{subtask}}`."""
    max_subtasks: int = Field(default=6, ge=1, le=16)
    join: Literal["leaves"] | Ask = "leaves"
    """`leaves`: the answers that no other part needs, line by line. Or a node that reads all parts
    as `{{answers}}`."""
    reserve: float = Field(default=0.15, ge=0, lt=1)
    """Share of what is left that is kept back for the last answer; read where `join` asks."""


class VerifyNode(NodeBase):
    """Checks a result."""

    kind: Literal["verify"] = "verify"
    of: NodeId
    """The result that is checked."""
    check: Literal["schema", "pattern", "length", "grounded", "citations", "examples", "verifier"]
    """`schema`: it is JSON that fits `output`. `pattern`: all of it matches an RE2 expression.
    `length`: it has so many characters. `grounded`: its numbers and names stand in the sources.
    `citations`: it cites, and only sources that there are. `examples`: its Python code does what
    the examples in the question say. `verifier`: a model scores it."""
    output: Schema | None = None
    pattern: Expression | None = None
    min_chars: int = Field(default=1, ge=0)
    max_chars: int = Field(default=100_000, ge=1)
    sources: NodeId | None = None
    """Result whose sources count; `None`: those of the checked result."""
    tool: str | None = None
    """Id of a debug tool, which tries the examples."""
    verifier: str | None = None
    """A model with the role `verifier`."""
    min_score: float = Field(default=0.5, ge=0, le=1)
    otherwise: Literal["refuse", "fail", "keep"] = Field(default="refuse", alias="else")
    """Where the check fails: end with a refusal, end with an error, or go on."""
    say: TemplateText = "I don't know."
    """The refusal."""

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        needed = {
            "schema": "output", "pattern": "pattern", "examples": "tool", "verifier": "verifier"
        }  # fmt: skip
        for check, field in needed.items():
            given = getattr(self, field) is not None
            if given != (self.check == check):
                raise ValueError(f"{field}: goes with 'check: {check}', and only with it")
        return self


Critic = Annotated[
    AskNode | VerifyNode, Field(discriminator="kind"), BeforeValidator(_by_kind), _WRITTEN
]


class RefuseNode(NodeBase):
    """Ends the pattern with a refusal."""

    kind: Literal["refuse"] = "refuse"
    when: Predicate | None = None
    """`None`: always."""
    say: TemplateText = "I don't know."


Node = Annotated[
    AskNode
    | ToolNode
    | RetrieveNode
    | BranchNode
    | ParallelNode
    | VoteNode
    | CascadeNode
    | CritiqueNode
    | PlanNode
    | VerifyNode
    | RefuseNode,
    Field(discriminator="kind"),
    BeforeValidator(_by_kind),
    _WRITTEN,
]
"""One part of a pattern; written as a mapping with one key, its kind."""


class PatternLimits(BaseConfig):
    """The most that one run may use, whatever the caller allows."""

    usd: float | None = Field(default=None, gt=0)
    seconds: float | None = Field(default=None, gt=0, le=600)
    model_calls: int | None = Field(default=None, ge=1)
    tool_calls: int | None = Field(default=None, ge=0)
    tokens: int | None = Field(default=None, ge=1)
    """Of prompts and completions."""


class PatternConfig(BaseConfig):
    """A way to answer a request with several calls."""

    name: str = Field(pattern=NAME_PATTERN)
    """Callers name it `pattern:<name>`."""
    answers: str = Field(default="", max_length=MAX_DESCRIPTION_CHARS)
    """What it is good at, in words; the router reads it."""
    examples: Examples = ()
    """Questions it should get; the router reads them."""
    routable: bool = True
    """Whether the router may choose it; otherwise only who names it gets it."""
    limits: PatternLimits = PatternLimits()
    do: tuple[Node, ...] = Field(min_length=1)
    """What is done, one after the other."""
    answer: NodeId | None = None
    """The node under `do` whose result is the answer; `None`: the last one, a `refuse` that did not
    refuse left out."""

    def as_written(self) -> dict[str, Any]:
        """As JSON, with what was written and nothing else."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


for _model in (
    Case, BranchNode, ParallelNode, VoteNode, CascadeNode, CritiqueNode, PlanNode, PatternConfig
):  # fmt: skip
    _model.model_rebuild()
