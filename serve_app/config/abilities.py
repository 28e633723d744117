"""What each candidate can take: models by their settings, patterns by their models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve_app.capabilities import UNKNOWN, Capabilities
from serve_app.config.patterns.check import members_of_patterns
from serve_app.config.tools import OcrConfig
from serve_app.schemas import NO_TOOL, Pair

if TYPE_CHECKING:
    from serve_app.config import AtlasConfig


def abilities_of(config: AtlasConfig) -> dict[Pair, Capabilities]:
    """What every pair and pattern can take, and every model by itself.

    With a tool that reads pictures, any model can take them, and nothing else. A pattern can take
    pictures where each model that it names can, and any of the pool where it
    leaves the choice to the router. It has functions and a form of its own, and cuts what its
    models see.
    """
    models = {model.model_id: model.able() for model in config.models}
    reading = {tool.tool_id for tool in config.tools if isinstance(tool, OcrConfig)}
    abilities = {
        Pair(model.model_id, tool_id): models[model.model_id]._replace(
            vision=True, text_alone=False
        )
        if tool_id in reading
        else models[model.model_id]
        for model in config.models
        for tool_id in (NO_TOOL, *model.tools)
    }
    sees = any(of.vision for of in models.values())
    for pattern in members_of_patterns(config):
        vision = (
            pattern.missing is None
            and all(models.get(pair.model_id, UNKNOWN).vision for pair in pattern.pairs)
            and (sees or not pattern.choices)
        )
        abilities[pattern.pair] = Capabilities(vision, json_schema=False, tools=False)
    return abilities
