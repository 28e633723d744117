"""The JSON Schema of models: docstrings below fields describe them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel, Field

from serve_app.gateway.json_schema import DescribedSchema


class Part(BaseModel):
    """A part."""

    size: int
    """Metres."""


class Base(BaseModel):
    """What both have."""

    name: str
    """Of the thing.

    In two paragraphs.
    """
    kind: str
    """What the base says."""
    plain: int = 0


class Thing(Base):
    """A thing."""

    kind: str
    part: Part
    """The only one."""
    schema_: str = Field(alias="schema")
    """By its alias."""
    own: int = Field(description="The field's own.")
    """Not this."""


def properties(model: type[BaseModel]) -> dict[str, Any]:
    told: dict[str, Any] = model.model_json_schema(schema_generator=DescribedSchema)["properties"]
    return told


def test_a_docstring_below_a_field_describes_it() -> None:
    assert properties(Part)["size"] == {
        "title": "Size",
        "type": "integer",
        "description": "Metres.",
    }
    assert "description" not in properties(Base)["plain"]
    assert properties(Base)["name"]["description"] == "Of the thing.\n\nIn two paragraphs."


def test_a_reference_and_an_alias_are_described_and_an_own_description_stays() -> None:
    told = properties(Thing)
    assert told["part"] == {"$ref": "#/$defs/Part", "description": "The only one."}
    assert told["schema"]["description"] == "By its alias."
    assert told["own"]["description"] == "The field's own."


def test_an_inherited_field_keeps_its_docstring_and_one_declared_anew_does_not() -> None:
    told = properties(Thing)
    assert told["name"]["description"] == properties(Base)["name"]["description"]
    assert "description" not in told["kind"]


def test_a_model_whose_source_is_not_there_has_no_descriptions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = ModuleType("compiled_alone")
    module.__file__ = str(tmp_path / "compiled_alone.py")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module)["BaseModel"] = BaseModel
    exec('class Made(BaseModel):\n    size: int\n    """Metres."""\n', vars(module))
    assert properties(vars(module)["Made"]) == {"size": {"title": "Size", "type": "integer"}}
