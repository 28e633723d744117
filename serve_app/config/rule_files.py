"""Rules in a configuration file: utterances and calibrations are files beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serve_app.errors import ConfigError


def read_rules(entries: Any) -> Any:
    """Rules as in a file, with the utterances and calibrations of the files that they name.

    A calibration that is not there yet counts as none.

    Raises:
        ConfigError: If a file cannot be read.
    """
    if not isinstance(entries, list):
        return entries
    return [_with_files(entry) for entry in entries]


def _with_files(rule: Any) -> Any:
    if not isinstance(rule, dict) or rule.get("type") != "semantic":
        return rule
    rule = dict(rule)
    if isinstance(rule.get("routes"), list):
        rule["routes"] = [_with_utterances(route) for route in rule["routes"]]
    if isinstance(rule.get("fitted"), str):
        path = Path(rule["fitted"])
        if not path.exists():
            del rule["fitted"]
        else:
            try:
                rule["fitted"] = json.loads(_read(path))
            except json.JSONDecodeError as error:
                raise ConfigError(f"the calibration {str(path)!r} is not JSON: {error}") from None
    return rule


def _with_utterances(route: Any) -> Any:
    if not isinstance(route, dict) or not isinstance(route.get("utterances"), str):
        return route
    lines = _read(Path(route["utterances"])).splitlines()
    return {**route, "utterances": [line.strip() for line in lines if line.strip()]}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise ConfigError(f"rules: cannot read {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"rules: {str(path)!r} is not UTF-8") from None
