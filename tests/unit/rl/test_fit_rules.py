"""`atlas rules fit` and `atlas rules test`, with an encoder that knows a few words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from pydantic import TypeAdapter
from typer.testing import CliRunner

from rl.cli import rules as commands
from rl.cli.app import app
from rl.fit.rules import LabelledText, evaluate_rules, fit_rule, read_labelled
from serve_app.config import load_config
from serve_app.config.rules import Rules, SemanticRuleConfig
from serve_app.errors import ConfigError

WORDS = ("cat", "dog", "sum", "tax", "sea", "sun", "the", "a")


def encode(texts: Sequence[str]) -> NDArray[np.float32]:
    """(num_texts, 8) which words a text has, as a unit vector."""
    counts = [[text.split().count(word) + 0.01 for word in WORDS] for text in texts]
    found: NDArray[np.float32] = np.array(counts, np.float32)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found


RULE: dict[str, Any] = {
    "type": "semantic",
    "name": "topic",
    "routes": [
        {"name": "pets", "utterances": ["cat", "dog", "the cat"], "use": "small"},
        {"name": "money", "utterances": ["sum", "tax", "a tax"], "use": "default"},
    ],
}
KEYWORD: dict[str, Any] = {"type": "keyword", "name": "sea", "any": ["sea"], "use": "small"}
DEFAULT: dict[str, Any] = {"type": "default", "use": "small"}


def said(text: str, label: str) -> LabelledText:
    return LabelledText(text, label, ({"role": "user", "content": text},))


TEXTS = [
    *(said(f"{'the ' * n}{word} {word}", "pets") for n in range(1, 8) for word in ("cat", "dog")),
    *(said(f"{'a ' * n}{word} {word}", "money") for n in range(1, 8) for word in ("sum", "tax")),
    *(said(f"{'sun ' * n}sea", "learned") for n in range(1, 8)),
]


def test_a_fitted_rule_is_sure_of_its_routes_and_of_nothing_else() -> None:
    rule = SemanticRuleConfig.model_validate(RULE)
    fitted = fit_rule(rule, TEXTS, "words", encode)
    rules = TypeAdapter(Rules).validate_python([RULE | {"fitted": fitted.model_dump()}, DEFAULT])
    result = evaluate_rules(rules, TEXTS, encode)

    assert fitted.examples == len(TEXTS)
    assert result.accuracy == 1.0
    assert result.confusion["learned", "learned"] == 7


def test_utterances_among_the_texts_are_left_out() -> None:
    rule = SemanticRuleConfig.model_validate(RULE)
    texts = [*TEXTS, said("the cat", "pets"), said("tax", "money")]

    assert fit_rule(rule, texts, "words", encode).examples == len(TEXTS)


def test_too_few_texts_and_a_route_without_any_are_refused() -> None:
    rule = SemanticRuleConfig.model_validate(RULE)
    with pytest.raises(ConfigError, match="too few"):
        fit_rule(rule, TEXTS[:5], "words", encode)
    with pytest.raises(ConfigError, match="no labelled text is of route 'money'"):
        fit_rule(rule, [of for of in TEXTS if of.label != "money"], "words", encode)


def test_each_rule_is_counted_in_its_place_and_alone() -> None:
    rule = SemanticRuleConfig.model_validate(RULE)
    fitted = fit_rule(rule, TEXTS, "words", encode).model_dump()
    rules = TypeAdapter(Rules).validate_python([KEYWORD, RULE | {"fitted": fitted}, DEFAULT])
    texts = [said("the sea", "sea"), said("cat sea", "pets"), said("a dog dog", "pets")]
    result = evaluate_rules(rules, texts, encode)
    (keyword, topic), (_, topic_alone) = result.in_order, result.alone

    assert (keyword.num_texts, keyword.num_decided, keyword.accuracy) == (3, 2, 0.5)
    assert (topic.num_texts, topic.num_decided) == (1, 1)
    assert topic_alone.num_texts == 3
    assert result.accuracy == pytest.approx(2 / 3)
    assert [of.text for of, _ in result.wrong] == ["cat sea"]


def test_the_label_default_means_any_route_that_goes_there() -> None:
    rule = SemanticRuleConfig.model_validate(RULE)
    fitted = fit_rule(rule, TEXTS, "words", encode).model_dump()
    rules = TypeAdapter(Rules).validate_python([RULE | {"fitted": fitted}, DEFAULT])

    assert evaluate_rules(rules, [said("tax tax a", "default")], encode).accuracy == 1.0


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"text": "x"}', '{"text": 1, "label": "x"}', '{"label": "x", "messages": []}'],
)
def test_a_line_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "x", "label": "y"}\n\n' + line)
    with pytest.raises(ConfigError, match="line 3"):
        read_labelled(path)


def test_fit_writes_what_a_configuration_then_loads_and_test_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "_encoder", lambda config: encode)
    model = {
        "type": "remote",
        "model_id": "small",
        "base_url": "http://127.0.0.1:1/v1",
        "remote_model": "x",
    }
    config, texts = tmp_path / "config.yaml", tmp_path / "texts.jsonl"
    rules = [RULE | {"fitted": "./topic.json"}, DEFAULT]
    config.write_text(yaml.safe_dump({"models": [model], "rules": rules}))
    texts.write_text("".join(json.dumps({"text": t.text, "label": t.label}) + "\n" for t in TEXTS))
    runner = CliRunner()

    refused = runner.invoke(app, ["rules", "test", str(texts), "--config", str(config)])
    assert refused.exit_code == 1
    assert "not fitted" in refused.output
    fitting = runner.invoke(app, ["rules", "fit", str(texts), "--config", str(config)])
    assert fitting.exit_code == 0, fitting.output
    assert load_config(config).rules
    tested = runner.invoke(app, ["rules", "test", str(texts), "--config", str(config)])
    assert "100.0%" in tested.output
    assert "of 35 right" in tested.output
