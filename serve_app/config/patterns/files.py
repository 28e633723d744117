"""Patterns in files: one YAML file per pattern, prompts as files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from serve_app.config.patterns.language import PatternConfig
from serve_app.errors import ConfigError

_TEXTS = ("prompt", "system", "say")


def read_pattern(path: Path) -> PatternConfig:
    """Read one pattern; a prompt that ends in `.md` is read from beside the file.

    Raises:
        ConfigError: If a file is missing or wrong; the message names the file and the node.
    """
    try:
        parsed = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read pattern {str(path)!r}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"pattern {str(path)!r} is not YAML: {error}") from error
    try:
        return PatternConfig.model_validate(_with_prompts(parsed, path.parent))
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"pattern {str(path)!r}:\n" + "\n".join(lines)) from error


def read_patterns(entries: Any) -> list[Any]:
    """The patterns that a configuration names: files, or folders whose YAML files are all read.

    Raises:
        ConfigError: If one cannot be read.
    """
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise ConfigError("patterns: a list of files or folders is needed")
    found: list[Any] = []
    for entry in entries:
        if not isinstance(entry, str):
            found.append(entry)
            continue
        path = Path(entry)
        files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not files:
            raise ConfigError(f"patterns: there is no YAML file in {entry!r}")
        found += [read_pattern(file) for file in files]
    return found


def _with_prompts(node: Any, base: Path) -> Any:
    if isinstance(node, dict):
        return {
            key: _text(value, base)
            if key in _TEXTS and isinstance(value, str)
            else _with_prompts(value, base)
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [_with_prompts(value, base) for value in node]
    return node


def _text(text: str, base: Path) -> str:
    if not text.endswith(".md") or any(blank in text for blank in " \n"):
        return text
    try:
        return (base / text).read_text().rstrip("\n")
    except OSError as error:
        raise ConfigError(f"cannot read prompt {text!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt {text!r} is not UTF-8") from error
