"""Calibrates semantic rules on labelled texts, and says how right rules are on others.

A label is what decides a text: the name of a keyword rule, of a route, or of a model's label. What
nothing should decide has the label `learned`, or `default` where the default takes it.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl.fit.estimators import logistic
from serve_app.config.rules import (
    DEFAULT,
    LEARNED,
    ROUTE,
    FittedConfig,
    FittedRouteConfig,
    KeywordRuleConfig,
    RuleConfig,
    SemanticRuleConfig,
    default_of,
    targets_of,
    utterances_hash,
)
from serve_app.errors import ConfigError
from serve_app.router.rules.judgement import Judgement
from serve_app.router.rules.keyword import KeywordRule, Texts
from serve_app.router.rules.semantic import SemanticRule

Encode = Callable[[Sequence[str]], NDArray[np.float32]]

MIN_EXAMPLES = 20
"""Labelled texts below which nothing is calibrated."""
_SCALE = 5.0
"""Of the features in the regression: its ridge is made for larger ones."""


@dataclass(frozen=True)
class LabelledText:
    """A text, and what should decide it."""

    text: str
    label: str
    messages: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Found:
    """What one rule, or a whole list of rules, found in a text."""

    label: str | None
    """`None`: it found nothing, or was not sure enough."""
    confidence: float = 0.0
    seconds: float = 0.0


@dataclass
class Tally:
    """How right one rule is."""

    name: str
    kind: str
    num_texts: int = 0
    """That it saw."""
    num_decided: int = 0
    num_right: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def coverage(self) -> float:
        """Share of the texts that it decided."""
        return self.num_decided / self.num_texts if self.num_texts else 0.0

    @property
    def accuracy(self) -> float | None:
        """Share of what it decided that is right; `None`: it decided nothing."""
        return self.num_right / self.num_decided if self.num_decided else None

    def add(self, found: Found, is_right: bool) -> None:
        """Count a text that it saw."""
        self.num_texts += 1
        self.seconds.append(found.seconds)
        if found.label is not None:
            self.num_decided += 1
            self.num_right += is_right


@dataclass
class RulesReport:
    """How right rules are on labelled texts."""

    in_order: list[Tally]
    """Each rule on what the rules before it let pass."""
    alone: list[Tally]
    """Each rule on every text."""
    accuracy: float
    """Of all together: what nothing decides counts as `learned` or `default`."""
    confusion: Counter[tuple[str, str]]
    """Wanted and found label to the number of texts."""
    wrong: list[tuple[LabelledText, str]]


def read_labelled(path: Path) -> list[LabelledText]:
    """Labelled texts from JSONL: `text` or `messages`, and `label`.

    Raises:
        ConfigError: If the file cannot be read, or a line is none.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            messages = row.get("messages") or [{"role": "user", "content": row["text"]}]
            text = next(of["content"] for of in reversed(messages) if of["role"] == "user")
            known = isinstance(text, str) and isinstance(row["label"], str)
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
            known = False
        if not known:
            raise ConfigError(
                f'{str(path)!r}, line {number}: a line is {{"text": …, "label": …}}, or has '
                "'messages' in place of the text"
            )
        found.append(LabelledText(text, row["label"], tuple(messages)))
    return found


def fit_rule(
    rule: SemanticRuleConfig, texts: Sequence[LabelledText], encoder: str, encode: Encode
) -> FittedConfig:
    """Calibrate a rule: a logistic regression per route. Utterances themselves are left out.

    Args:
        rule: The rule.
        texts: Labelled texts; any label that is no route of the rule counts against all of them.
        encoder: Name of the encoder.
        encode: The encoder.

    Raises:
        ConfigError: If there are too few texts, or a route has none.
    """
    known = {text for route in rule.routes for text in route.utterances}
    used = [of for of in texts if " ".join(of.text.split()) not in known]
    if len(used) < MIN_EXAMPLES:
        raise ConfigError(
            f"rule {rule.name!r}: {len(used)} labelled texts that are no utterances are too few; "
            f"at least {MIN_EXAMPLES} are needed"
        )
    labels = np.array([of.label for of in used])
    features = semantic_rule(rule, encode).features(encode([of.text for of in used]))
    routes = {}
    for number, route in enumerate(rule.routes):
        is_right = labels == route.name
        if not is_right.any():
            raise ConfigError(f"rule {rule.name!r}: no labelled text is of route {route.name!r}")
        weights = logistic(features[:, number] * _SCALE, is_right) * _SCALE
        bias, similarity, margin, neighbours = (round(float(weight), 4) for weight in weights)
        routes[route.name] = FittedRouteConfig(
            bias=bias, similarity=similarity, margin=margin, neighbours=neighbours
        )
    return FittedConfig(
        encoder=encoder, utterances=utterances_hash(rule), examples=len(used), routes=routes
    )


def semantic_rule(rule: SemanticRuleConfig, encode: Encode) -> SemanticRule:
    """A rule with its utterances embedded."""
    return SemanticRule(rule, encode([text for route in rule.routes for text in route.utterances]))


def evaluate_rules(
    rules: Sequence[RuleConfig], texts: Sequence[LabelledText], encode: Encode
) -> RulesReport:
    """How right keyword and semantic rules are; rules that ask a model are left out.

    Args:
        rules: In their order, the default as the last one.
        texts: Labelled texts.
        encode: The encoder.
    """
    used = [rule for rule in rules if isinstance(rule, KeywordRuleConfig | SemanticRuleConfig)]
    vectors = encode([of.text for of in texts])
    found = [list(_found(rule, texts, vectors, encode)) for rule in used]
    return report(rules, texts, dict(zip((rule.name for rule in used), found, strict=True)))


def report(
    rules: Sequence[RuleConfig],
    texts: Sequence[LabelledText],
    found: dict[str, list[Found]],
) -> RulesReport:
    """Count what rules found.

    Args:
        rules: In their order, the default as the last one.
        texts: Labelled texts.
        found: Of each rule by its name, what it found in each text.
    """
    default = default_of(tuple(rules))
    rest = DEFAULT if default is not None and not default.learned else LEARNED
    means = _meanings(rules)
    kinds = {rule.name: rule.type for rule in rules if rule.type != "default"}
    in_order = {name: Tally(name, kinds[name]) for name in found}
    alone = {name: Tally(name, kinds[name]) for name in found}
    confusion: Counter[tuple[str, str]] = Counter()
    wrong = []
    for number, of in enumerate(texts):
        label: str | None = None
        for name, told in found.items():
            one = told[number]
            is_right = _says(one.label, of.label, means)
            alone[name].add(one, is_right)
            if label is None:
                in_order[name].add(one, is_right)
                label = one.label
        label = rest if label is None else label
        confusion[of.label, label] += 1
        if not _says(label, of.label, means):
            wrong.append((of, label))
    num_right = len(texts) - len(wrong)
    return RulesReport(
        list(in_order.values()),
        list(alone.values()),
        num_right / len(texts) if texts else 0.0,
        confusion,
        wrong,
    )


def _found(
    rule: KeywordRuleConfig | SemanticRuleConfig,
    texts: Sequence[LabelledText],
    vectors: NDArray[np.float32],
    encode: Encode,
) -> Iterator[Found]:
    """What one rule finds in each text."""
    if isinstance(rule, KeywordRuleConfig):
        keyword, sure = KeywordRule(rule), Judgement(rule.name, 1.0, 1.0)
        for of in texts:
            began_s = time.perf_counter()
            matches = keyword.matches(Texts(of.messages))
            seconds = time.perf_counter() - began_s
            yield Found(sure.label if matches else None, 1.0, seconds)
        return
    semantic = semantic_rule(rule, encode)
    for vector in vectors:
        began_s = time.perf_counter()
        judgement = semantic.judge(vector)
        seconds = time.perf_counter() - began_s
        if judgement is None:
            yield Found(None, 0.0, seconds)
        else:
            is_sure = judgement.confidence >= rule.floor
            yield Found(judgement.label if is_sure else None, judgement.confidence, seconds)


def _meanings(rules: Sequence[RuleConfig]) -> dict[str, str]:
    """Labels that send to the default or to the learned rules, and which of the two."""
    return {
        label: DEFAULT if target.use == (DEFAULT,) else LEARNED
        for rule in rules
        for label, target in targets_of(rule)
        if target.use in ((DEFAULT,), (ROUTE,))
    }


def _says(label: str | None, wanted: str, means: dict[str, str]) -> bool:
    """Whether a label is the wanted one, or sends where that does."""
    if label is None:
        return False
    return label == wanted or means.get(label, label) == means.get(wanted, wanted)
