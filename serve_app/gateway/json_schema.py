"""JSON Schema of models, for people: what stands below a field describes it.

Pydantic can take these descriptions itself, but then it reads every model's source when the class
is made, so in each process of a graph: that was half of the time the configuration took to import.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import ModelSchema


class DescribedSchema(GenerateJsonSchema):
    """A schema in which a field's docstring is its description, unless the field has one."""

    def model_schema(self, schema: ModelSchema) -> JsonSchemaValue:
        """The schema of a model."""
        told = super().model_schema(schema)
        properties = told.get("properties", {})
        for name, docstring in _docstrings(schema["cls"]):
            field = schema["cls"].model_fields[name]
            if field.description is None and (described := properties.get(field.alias or name)):
                described["description"] = docstring
        return told


def _docstrings(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """The names of fields that have a docstring in the class that declares them last."""
    for name in model.model_fields:
        declares = next(base for base in model.__mro__ if name in base.__annotations__)
        docstring = _classes(declares.__module__).get(declares.__name__, {}).get(name)
        if docstring is not None:
            yield name, docstring


@cache
def _classes(module: str) -> dict[str, dict[str, str]]:
    """The docstrings of fields, by class; none where a module has no source."""
    try:
        source = inspect.getsource(sys.modules[module])
    except OSError:
        return {}
    classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    return {node.name: dict(_below_fields(node)) for node in classes}


def _below_fields(of: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, text in pairwise(of.body):
        match field, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(docstring))),
            ):
                yield name, inspect.cleandoc(docstring)
