"""Rules against a deployment: what they name is there, and calibrations are of its encoder."""

from __future__ import annotations

from serve_app.config.atlas import AtlasConfig
from serve_app.config.rules import (
    DEFAULT,
    ROUTE,
    LlmRuleConfig,
    SemanticRuleConfig,
    fit_fault,
    targets_of,
)
from serve_app.errors import ConfigError
from serve_app.schemas import NO_TOOL, Pair


def check_rules(config: AtlasConfig, *, fitted: bool = True) -> None:
    """Refuse rules that name what is not there, or whose calibration is of something else.

    Args:
        config: The deployment.
        fitted: Whether calibrations are checked too.

    Raises:
        ConfigError: If there is such a rule; the message names it.
    """
    models = {model.model_id for model in config.models if model.role == "chat"}
    patterns = {str(Pair.of_pattern(pattern.name)) for pattern in config.patterns}
    pairs = {*map(str, config.all_pairs()), *(f"{name}@{NO_TOOL}" for name in models)}
    known = {
        "candidates": pairs | models | patterns,
        "models": models | patterns,
        "tools": {NO_TOOL, *(tool.tool_id for tool in config.tools)},
    }

    def check(where: str, kind: str, names: tuple[str, ...] | None) -> None:
        for name in names or ():
            if name not in known[kind]:
                what = {"candidates": "no candidate", "models": "no model", "tools": "no tool"}
                raise ConfigError(f"{where}: {name!r} is {what[kind]} of the pool")

    for rule in config.rules:
        for label, target in targets_of(rule):
            where = f"{rule.type} rule, {label!r}"
            if target.use is not None and not {ROUTE, DEFAULT} & set(target.use):
                check(f"{where}: use", "candidates", target.use)
            if target.among is not None:
                check(f"{where}: among.candidates", "candidates", target.among.candidates)
                check(f"{where}: among.models", "models", target.among.models)
                check(f"{where}: among.tools", "tools", target.among.tools)
        if isinstance(rule, LlmRuleConfig) and rule.model not in models:
            raise ConfigError(f"llm rule {rule.name!r}: {rule.model!r} is no model of the pool")
        if fitted and isinstance(rule, SemanticRuleConfig):
            fault = fit_fault(rule, config.embedder.model)
            if fault is not None:
                raise ConfigError(fault)
