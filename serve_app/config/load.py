"""From a YAML file to checked settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from serve_app.config.atlas import AtlasConfig
from serve_app.config.patterns.check import check_patterns
from serve_app.config.patterns.files import read_patterns
from serve_app.config.rule_check import check_rules
from serve_app.config.rule_files import read_rules
from serve_app.errors import ConfigError


def _resolve_paths(node: Any, base: Path) -> Any:
    """Make every `./…` and `../…` string of a parsed file absolute, relative to `base`."""
    if isinstance(node, dict):
        return {key: _resolve_paths(value, base) for key, value in node.items()}
    if isinstance(node, list):
        return [_resolve_paths(value, base) for value in node]
    if isinstance(node, str) and node.startswith(("./", "../")):
        return str((base / node).resolve())
    return node


def load_config(path: str | Path, *, fitted: bool = True) -> AtlasConfig:
    """Read and check a configuration file.

    Args:
        path: Of the file.
        fitted: Whether its semantic rules have to be calibrated.

    Raises:
        ConfigError: If the file is missing, is not YAML, or a setting, pattern or rule is wrong;
            the message names the setting, the pattern and its node, or the rule.
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
    if "rules" in resolved:
        resolved["rules"] = read_rules(resolved["rules"])
    try:
        config = AtlasConfig.model_validate(resolved)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"configuration {str(path)!r}:\n" + "\n".join(lines)) from error
    check_patterns(config)
    check_rules(config, fitted=fitted)
    return config
