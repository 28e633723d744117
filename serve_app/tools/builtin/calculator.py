"""The calculator: exact arithmetic, and simple algebra by sympy inside the sandbox."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from serve_app.config.tools import CalculatorConfig
from serve_app.errors import ToolRetry, ToolTimeout
from serve_app.tools.base import Tool, ToolResult
from serve_app.tools.builtin.arithmetic import MAX_CHARS, UNICODE, evaluate
from serve_app.tools.sandbox.client import SandboxLimits, run_python

__all__ = ["Calculator", "evaluate", "is_algebra"]

_ALGEBRA_NAMES = ("solve", "diff", "integrate", "simplify", "expand", "factor", "limit")
_ALGEBRA = re.compile(rf"=|\b(?:{'|'.join(_ALGEBRA_NAMES)})\b|\b[a-df-zA-DF-Z]\b")
ALGEBRA_PACKAGES = ("sympy",)
ALGEBRA_LIMITS = SandboxLimits(memory_mb=512, cpu_seconds=10, max_output_bytes=16384)

_ALGEBRA_PROGRAM = """
import re
import sympy
from sympy.parsing.sympy_parser import (
    convert_xor, implicit_multiplication_application, parse_expr, standard_transformations)

RULES = (*standard_transformations, convert_xor, implicit_multiplication_application)

def read(text):
    return parse_expr(text.strip(), transformations=RULES, evaluate=True)

def difference(text):
    left, equals, right = text.partition("=")
    return read(left) - read(right.lstrip("=")) if equals else read(left)

def show(value):
    if not isinstance(value, sympy.Basic):
        return str(value)
    if value.has(sympy.zoo, sympy.nan):
        raise ValueError("undefined")
    if value.is_Float:
        return f"{float(value):.10g}"
    if value.is_number and value.is_real and not value.is_Integer:
        decimal = f"{float(value):.10g}"
        return f"{value} = {decimal}" if value.is_Rational else f"{value} (about {decimal})"
    return str(value)

def solve(text):
    head, _, variable = text.rpartition(" for ")
    equations, name = (head, variable) if head else (text, "")
    parts = [part for part in re.split(r"[,;]|\\band\\b", equations) if part.strip()]
    if not name and len(parts) > 1 and "=" not in parts[-1] and parts[-1].strip().isidentifier():
        name = parts.pop()
    exprs = [difference(part) for part in parts]
    symbols = sorted(set().union(*(e.free_symbols for e in exprs)), key=str)
    if name:
        symbols = [sympy.Symbol(n.strip()) for n in re.split(r"[,\\s]+", name) if n.strip()]
    if not any(side.free_symbols for part in parts for side in map(read, part.split("="))):
        return str(all(sympy.simplify(e) == 0 for e in exprs)).lower()
    found = sympy.solve(exprs, symbols, dict=True)
    return "; ".join(
        ", ".join(f"{k} = {show(v)}" for k, v in sorted(one.items(), key=lambda item: str(item[0])))
        for one in found) or "no solution"

text = TEXT.strip().replace("==", "=")
match = re.fullmatch(r"solve\\s*\\((.*)\\)|solve\\b(.*)", text, re.S)
if match:
    print(solve(match[1] or match[2]))
elif "=" in text:
    print(solve(text))
else:
    print(show(read(text)))
"""


def is_algebra(expression: str) -> bool:
    """Whether an expression has an equation, a symbol or a verb that only sympy knows.

    Args:
        expression: As a model wrote it.

    Returns:
        True where `evaluate` cannot help.
    """
    text = expression.strip().removesuffix("=")
    return _ALGEBRA.search(text) is not None


class Calculator(Tool):
    """Arithmetic in this process; algebra in the sandbox."""

    config: CalculatorConfig

    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "expression": {
                "type": "string",
                "description": "For example 12 * (3 + 4), sqrt(2), 15% of 80 or solve 2*x + 3 = 7.",
                "minLength": 1,
                "maxLength": MAX_CHARS,
            }
        },
        "required": ["expression"],
        "additionalProperties": False,
    }

    def run(self, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        """Evaluate `expression`.

        Args:
            arguments: `expression`.
            deadline_s: Seconds left.

        Returns:
            The value as text and as `data["value"]`.

        Raises:
            ToolRetry: If the expression cannot be evaluated.
            ToolFailed: If algebra is needed and the sandbox is not there.
            ToolTimeout: If algebra took too long.
        """
        expression = str(arguments["expression"])
        if self.config.algebra and is_algebra(expression):
            value = self._algebra(expression, deadline_s)
        else:
            value = evaluate(expression, self.config.max_digits)
        return ToolResult(self.clip(value), {"value": value})

    def _algebra(self, expression: str, deadline_s: float) -> str:
        text = expression.translate(UNICODE)
        if len(text) > MAX_CHARS:
            raise ToolRetry(
                f"the expression has {len(text)} characters; at most {MAX_CHARS} are allowed"
            )
        program = f"TEXT = {text!r}\n{_ALGEBRA_PROGRAM}"
        result = run_python(program, ALGEBRA_LIMITS, deadline_s, ALGEBRA_PACKAGES)
        if result.timed_out:
            raise ToolTimeout("the algebra took too long")
        if not result.ok or not result.stdout.strip():
            raise ToolRetry(f"{expression[:80]!r} cannot be solved or simplified")
        return result.stdout.strip()
