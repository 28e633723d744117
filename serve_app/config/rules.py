"""Rules in front of the learned ones: an ordered list that ends in a default.

Keyword rules come first, because nothing has to be embedded for them; then semantic rules; then
models that decide. The first rule that is sure enough decides: it names candidates, or narrows what
the learned rules choose among. What has to fit a pool and an encoder is checked in `rule_check`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from serve_app.config.base import BaseConfig
from serve_app.config.keywords import keyword_expression
from serve_app.config.patterns.language import Expression

LEARNED = "learned"
"""The label of what no rule decides, where the learned rules choose."""
DEFAULT = "default"
"""The `use` that sends a request to the default, and the label of what arrives there."""
ROUTE = "route"
"""The `use` that leaves the choice to the learned rules."""

RuleName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,47}$")]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]
Utterance = Annotated[str, Field(min_length=1, max_length=2000)]
Names = Annotated[tuple[str, ...], Field(min_length=1, max_length=256)]


def _as_tuple(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Candidates = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=256)], ...],
    BeforeValidator(_as_tuple),
    Field(min_length=1, max_length=16),
]
"""One candidate, or several of which each takes over where the one before it fails."""


class AmongConfig(BaseConfig):
    """What the learned rules may choose among; everything that is named narrows it."""

    candidates: Names | None = None
    """`model_id@tool_id` or `pattern:<name>`."""
    models: Names | None = None
    """Model ids, and `pattern:<name>` for patterns."""
    tools: Names | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.candidates is None and self.models is None and self.tools is None:
            raise ValueError("name candidates, models or tools")
        return self


class TargetConfig(BaseConfig):
    """Where a request goes: exactly one of `use` and `among`."""

    use: Candidates | None = None
    """`model_id@tool_id` or `pattern:<name>`, or a list of them; `route`: the learned rules choose;
    `default`: the default."""
    among: AmongConfig | None = None
    """The learned rules choose among these."""

    @model_validator(mode="after")
    def _is_one_target(self) -> Self:
        if (self.use is None) == (self.among is None):
            raise ValueError("name a target: either 'use' or 'among'")
        if self.use is not None and len(self.use) > 1 and {ROUTE, DEFAULT} & set(self.use):
            raise ValueError(f"use: {ROUTE!r} and {DEFAULT!r} stand alone")
        return self


class RegexConfig(BaseConfig):
    """An RE2 expression that may match anywhere in the text."""

    re: Expression


MAX_KEYWORDS = 10_000
"""Of one list."""
MAX_KEYWORD_CHARS = 200_000
"""Of all keywords of one list."""
MAX_UTTERANCES = 5_000
"""Of one route."""


# Not in the JSON schema: who tries these bounds out sends a body that is over its own.
def _not_too_many(words: tuple[str | RegexConfig, ...]) -> tuple[str | RegexConfig, ...]:
    if len(words) > MAX_KEYWORDS:
        raise ValueError(f"at most {MAX_KEYWORDS} keywords, got {len(words)}")
    chars = sum(len(word if isinstance(word, str) else word.re) for word in words)
    if chars > MAX_KEYWORD_CHARS:
        raise ValueError(f"at most {MAX_KEYWORD_CHARS} characters of keywords, got {chars}")
    return words


Keyword = Annotated[
    Annotated[str, Field(min_length=1, max_length=200), Tag("word")]
    | Annotated[RegexConfig, Tag("expression")],
    Discriminator(lambda value: "word" if isinstance(value, str) else "expression"),
]
Keywords = Annotated[
    tuple[Keyword, ...],
    AfterValidator(_not_too_many),
]
"""Words or phrases, found as whole words, and RE2 expressions (`{re: "order #[0-9]+"}`)."""

Scope = Literal["last", "system", "code"]


class KeywordRuleConfig(TargetConfig):
    """Decides by words in the text; what is named of `any`, `all` and `none` must hold."""

    type: Literal["keyword"]
    name: RuleName
    """Also the label of what it decides."""
    any: Keywords = ()
    """At least one is there."""
    all: Annotated[Keywords, Field(max_length=64)] = ()
    """Every one is there."""
    none: Keywords = ()
    """Not one is there."""
    scope: tuple[Scope, ...] = Field(default=("last",), min_length=1, max_length=3)
    """Where: `last`, the last user message; `system`, the system messages; `code`, blocks of code
    in the last user message."""
    case_sensitive: bool = False

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not (self.any or self.all or self.none):
            raise ValueError("name keywords under 'any', 'all' or 'none'")
        for word in (*self.any, *self.all, *self.none):
            if isinstance(word, str) and not word.strip():
                raise ValueError("a keyword has to have more than blanks")
        for words in (self.any, self.none, *((word,) for word in self.all)):
            if words:
                self.expression(words)
        return self

    def expression(self, words: Sequence[str | RegexConfig]) -> Any:
        """The RE2 expression that finds one of some keywords.

        Raises:
            ValueError: If together they are too large.
        """
        literals = [word for word in words if isinstance(word, str)]
        expressions = [word.re for word in words if isinstance(word, RegexConfig)]
        return keyword_expression(literals, expressions, case_sensitive=self.case_sensitive)


class RouteConfig(TargetConfig):
    """What a semantic rule may decide for."""

    name: RuleName
    """Also the label of what it decides."""
    utterances: tuple[Utterance, ...] = Field(min_length=1)
    """Texts that belong here. In a file: also the name of a text file with one on each line."""

    @field_validator("utterances")
    @classmethod
    def _say_something(cls, utterances: tuple[str, ...]) -> tuple[str, ...]:
        if len(utterances) > MAX_UTTERANCES:
            raise ValueError(f"at most {MAX_UTTERANCES} utterances, got {len(utterances)}")
        if not all(text.strip() for text in utterances):
            raise ValueError("an utterance has to have more than blanks")
        return utterances


class FittedRouteConfig(BaseConfig):
    """How sure a likeness makes: the weights of a logistic regression."""

    bias: Number
    similarity: Number
    """Of the cosine similarity to the likest utterance of the route."""
    margin: Number
    """Of what that is above the likest utterance of any other route."""
    neighbours: Number
    """Of the route's share of the likest utterances of all."""


class FittedConfig(BaseConfig):
    """What `atlas rules fit` found; of these utterances and this encoder only."""

    encoder: str = Field(max_length=256)
    utterances: str = Field(pattern=r"^[0-9a-f]{64}$")
    """`utterances_hash` of the rule."""
    examples: int = Field(ge=1)
    """Labelled texts that it was fitted on."""
    routes: dict[RuleName, FittedRouteConfig]


class SemanticRuleConfig(BaseConfig):
    """Decides by likeness to example utterances."""

    type: Literal["semantic"]
    name: RuleName
    routes: tuple[RouteConfig, ...] = Field(min_length=1, max_length=256)
    floor: Share = 0.5
    """Confidence below which it leaves the request to what comes next."""
    fitted: FittedConfig | None = None
    """Its calibration. In a file: the name of the file that `atlas rules fit` writes."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        _check_labels([route.name for route in self.routes], "route")
        return self


class LabelConfig(TargetConfig):
    """What a model may decide for."""

    name: RuleName
    """The label that the model says."""
    about: str = Field(default="", max_length=500)
    """What belongs here, in words; the model reads it."""


class LlmRuleConfig(BaseConfig):
    """Has a model of the pool choose a label."""

    type: Literal["llm"]
    name: RuleName
    model: str = Field(min_length=1, max_length=64)
    labels: tuple[LabelConfig, ...] = Field(min_length=2, max_length=64)
    prompt: str = Field(
        default="Which of these labels fits the message best?", min_length=1, max_length=4000
    )
    """What the model is told; the labels and the message follow."""
    floor: Share = 0.5
    """Confidence below which it leaves the request to what comes next: the probability of the
    model's answer, or 1 of a model that gives no log-probabilities."""
    seconds: float = Field(default=5.0, gt=0, le=60)
    """Longest time it may take; beyond, the request goes to what comes next."""
    max_chars: int = Field(default=2000, ge=16, le=32_000)
    """Of the message, from its beginning, that the model reads."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        _check_labels([label.name for label in self.labels], "label")
        return self


class DefaultRuleConfig(BaseConfig):
    """Takes what is sent here, and what the learned rules are not sure of. The last of the list."""

    type: Literal["default"]
    use: Candidates
    """`model_id@tool_id` or `pattern:<name>`, or a list of them."""
    learned: bool = True
    """Whether the learned rules choose before the default does."""
    floor: Share = 0.0
    """Confidence below which a learned decision is left to the default. What is unlike everything
    profiled counts as 0; a floor of 0 leaves everything to the learned rules."""

    @field_validator("use")
    @classmethod
    def _is_candidates(cls, use: tuple[str, ...]) -> tuple[str, ...]:
        if {ROUTE, DEFAULT} & set(use):
            raise ValueError(f"a default names candidates, got {use!r}")
        return use


RuleConfig = Annotated[
    KeywordRuleConfig | SemanticRuleConfig | LlmRuleConfig | DefaultRuleConfig,
    Field(discriminator="type"),
]

_ORDER = ("keyword", "semantic", "llm", "default")


def _in_order(rules: tuple[RuleConfig, ...]) -> tuple[RuleConfig, ...]:
    """Refuse a list without a default, or one that does not say in which order it is followed."""
    if not rules:
        return rules
    kinds = [rule.type for rule in rules]
    if kinds[-1] != "default":
        raise ValueError("the last rule has to be the default: {type: default, use: …}")
    if kinds.count("default") > 1:
        raise ValueError("there can be one default, and it is the last rule")
    if kinds != sorted(kinds, key=_ORDER.index):
        raise ValueError(f"rules stand in the order in which they run: {', '.join(_ORDER)}")
    _check_labels([rule.name for rule in rules if not isinstance(rule, DefaultRuleConfig)], "rule")
    return rules


def _check_labels(names: list[str], kind: str) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{kind} {repeated[0]!r} is there more than once; names are unique")
    for name in (DEFAULT, LEARNED):
        if name in names:
            raise ValueError(f"{kind} {name!r}: the name is taken")


Rules = Annotated[tuple[RuleConfig, ...], Field(max_length=64), AfterValidator(_in_order)]
"""In the order in which they are followed; empty, or ending in a default."""


class RulesSubmission(BaseConfig):
    """All rules of a deployment, in their order."""

    rules: Rules


def default_of(rules: tuple[RuleConfig, ...]) -> DefaultRuleConfig | None:
    """The default; `None`: there are no rules."""
    return rules[-1] if rules and isinstance(rules[-1], DefaultRuleConfig) else None


def utterances_hash(rule: SemanticRuleConfig) -> str:
    """SHA-256 of a rule's utterances, by route."""
    said = [[route.name, *route.utterances] for route in rule.routes]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def fit_fault(rule: SemanticRuleConfig, encoder: str) -> str | None:
    """Why a rule's calibration cannot serve, and what mends it; `None`: it can.

    Args:
        rule: The rule.
        encoder: Name of the deployment's encoder.
    """
    fitted = rule.fitted
    if fitted is None:
        fault = "it is not fitted"
    elif fitted.encoder != encoder:
        fault = f"it was fitted for the encoder {fitted.encoder!r}, and {encoder!r} embeds"
    elif fitted.utterances != utterances_hash(rule) or set(fitted.routes) != {
        route.name for route in rule.routes
    }:
        fault = "it was fitted on other utterances"
    else:
        return None
    return f"semantic rule {rule.name!r}: {fault}; mend it: atlas rules fit FILE --config CONFIG"


def targets_of(rule: RuleConfig) -> Iterator[tuple[str, TargetConfig]]:
    """Every target of a rule, each with its label."""
    match rule:
        case KeywordRuleConfig():
            yield rule.name, rule
        case SemanticRuleConfig():
            yield from ((route.name, route) for route in rule.routes)
        case LlmRuleConfig():
            yield from ((label.name, label) for label in rule.labels)
        case DefaultRuleConfig():
            yield DEFAULT, TargetConfig(use=rule.use)
