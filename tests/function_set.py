"""Functions as servers of many kinds offer them, each with a query that it alone can answer.

A line of `function_set.txt` has the name, the description and the query.
"""

from __future__ import annotations

from pathlib import Path

from serve_app.tools.base import NO_PARAMETERS, Function

LABELLED: list[tuple[Function, str]] = [
    (Function(name, description, NO_PARAMETERS), query)
    for name, description, query in (
        line.split(" | ") for line in Path(__file__).with_suffix(".txt").read_text().splitlines()
    )
]
FUNCTIONS = tuple(function for function, _ in LABELLED)
