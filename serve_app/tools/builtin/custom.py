"""A tool that is a class of your own: found by its import path, and checked before it is used."""

from __future__ import annotations

import importlib
import logging
import re
from typing import Any

import jsonschema

from serve_app.config.tools import TOOL_ID_PATTERN, CustomToolConfig
from serve_app.errors import ConfigError
from serve_app.tools.base import Function, Tool

logger = logging.getLogger(__name__)


def load_custom(config: CustomToolConfig) -> Tool:
    """Import the class and make the tool.

    Args:
        config: Names the class.

    Raises:
        ConfigError: If there is no such class, it cannot be made with these settings, or what it
            offers is no set of functions. The message has nothing of the class's own error: that
            stands in the log.
    """
    what = f"tool {config.tool_id!r}: {config.import_path!r}"
    module, _, name = config.import_path.partition(":")
    try:
        made: Any = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a module of somebody else raises
        logger.exception("%s cannot be imported", what)
        raise ConfigError(f"{what} cannot be imported: {type(error).__name__}") from None
    if not (isinstance(made, type) and issubclass(made, Tool)):
        raise ConfigError(f"{what} is no subclass of serve_app.tools.base.Tool")
    try:
        tool = made(config, **config.settings)
        functions = tool.functions()
    except Exception as error:
        logger.exception("%s cannot be made", what)
        raise ConfigError(
            f"{what} cannot be made with settings {sorted(config.settings)}: {type(error).__name__}"
        ) from None
    if not functions:
        raise ConfigError(f"{what} offers no function")
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise ConfigError(f"{what} offers two functions of one name: {sorted(names)}")
    for function in functions:
        _check(function, what)
    return tool


def _check(function: Function, what: str) -> None:
    if not re.fullmatch(TOOL_ID_PATTERN, function.name):
        raise ConfigError(f"{what}: {function.name!r} is no name of a function: {TOOL_ID_PATTERN}")
    try:
        jsonschema.Draft202012Validator.check_schema(function.parameters)
    except jsonschema.SchemaError as error:
        raise ConfigError(
            f"{what}: the parameters of {function.name!r} are no JSON schema: {error.message}"
        ) from None
    is_closed = function.parameters.get("additionalProperties") is False
    if function.parameters.get("type") != "object" or not is_closed:
        raise ConfigError(
            f"{what}: the parameters of {function.name!r} are a JSON schema of an object with "
            "additionalProperties false"
        )
