"""Exact arithmetic in bounded work.

`evaluate` never executes its input: it walks the parsed expression over a fixed list of operations
and refuses any whose result would be too large before computing it.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from serve_app.errors import ToolRetry

Number = int | Fraction | float

MAX_CHARS = 500
MAX_DEPTH = 40
MAX_NODES = 400
MAX_DIGITS = 1000
MAX_FACTORIAL = 450
SIGNIFICANT_DIGITS = 10

UNICODE = str.maketrans(
    {"\N{MULTIPLICATION SIGN}": "*", "·": "*", "⋅": "*", "∙": "*"}
    | {"÷": "/", "\N{DIVISION SLASH}": "/", "\N{FRACTION SLASH}": "/"}
    | dict.fromkeys("\N{MINUS SIGN}\N{EN DASH}\N{EM DASH}", "-")
    | dict.fromkeys("\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}", " ")
    | {"π": "pi", "τ": "tau", "²": "**2", "³": "**3"}
)
_GROUPED = re.compile(r"(?<![\w.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_DECIMAL = r"(\d+(?:\.\d*)?|\.\d+)"
_PERCENT = re.compile(rf"{_DECIMAL}(?:\s*%(?=\s*(?:$|[*/),]))|%(?=\s+[-+]))")
"""A percentage, not a remainder: nothing to divide by follows, and a sign only after a space."""
_PERCENT_OF = re.compile(rf"{_DECIMAL}\s*%\s*of\b", re.IGNORECASE)
_PERCENT_ADDED = re.compile(rf"(?<![%\s(*/+-])\s*[-+]\s*{_DECIMAL}\s*%(?=\s*(?:$|[-+),]))")
"""`100 + 10%`: ten hundredths to some, ten hundredths of the hundred to others."""
_FACTORIAL = re.compile(r"(?<![\w.])(\d+)\s*!(?!=)")
_IMPLIED_PRODUCT = re.compile(r"((?<![\w.])\d+(?:\.\d+)?|\))\s*(?=\()")
_ROOT = re.compile(r"√\s*(\(|\d+(?:\.\d+)?)")


def normalise(expression: str) -> str:
    """Rewrite common ways of writing an expression into Python's.

    Args:
        expression: As a person or a model wrote it.

    Returns:
        The same expression with `**` for powers, no thousands separators, and percentages as
        fractions.

    Raises:
        ToolRetry: If it is empty or too long.
    """
    text = expression.translate(UNICODE).strip().removesuffix("=").strip()
    if not text:
        raise ToolRetry("the expression is empty")
    if len(text) > MAX_CHARS:
        raise ToolRetry(
            f"the expression has {len(text)} characters; at most {MAX_CHARS} are allowed"
        )
    if _PERCENT_ADDED.search(text):
        raise ToolRetry(f"{text[:80]!r} is ambiguous; write 100 * 1.10 or 100 + 0.10")
    text = text.replace("^", "**").replace("$", "")
    text = re.sub(r"\bmod\b", "%", text)
    text = _FACTORIAL.sub(r"factorial(\1)", text)
    text = _ROOT.sub(lambda m: "sqrt(" if m[1] == "(" else f"sqrt({m[1]})", text)
    text = _PERCENT_OF.sub(r"(\1/100)*", text)
    # Inside a call a comma separates arguments: `max(1,200)` must stay as it is.
    text = _outside_calls(text)
    text = _PERCENT.sub(r"(\1/100)", text)
    return _IMPLIED_PRODUCT.sub(r"\1*", text)


def _outside_calls(text: str) -> str:
    """Drop the commas of grouped digits wherever they cannot separate arguments."""
    in_call: list[bool] = []
    commas = set()
    for position, character in enumerate(text):
        if character == "(":
            before = text[:position].rstrip()
            in_call.append(bool(before) and (before[-1].isalpha() or before[-1].isdigit()))
        elif character == ")" and in_call:
            in_call.pop()
        elif character == "," and any(in_call):
            commas.add(position)
    return _GROUPED.sub(
        lambda m: m[0] if commas & set(range(*m.span())) else m[0].replace(",", ""), text
    )


def _too_large() -> ToolRetry:
    return ToolRetry("the result is too large")


def _bits(value: Number) -> float:
    """Size of a number in bits; what multiplying and raising to a power add up."""
    if isinstance(value, float):
        return 64
    if isinstance(value, Fraction):
        return max(value.numerator.bit_length(), value.denominator.bit_length())
    return value.bit_length()


def _checked(value: Any, max_digits: int) -> Number:
    """A value the calculator may go on with: real, finite and not too long."""
    if isinstance(value, complex):
        raise ToolRetry("the result is not a real number")
    if isinstance(value, float):
        if math.isnan(value):
            raise ToolRetry("the result is not a number")
        if math.isinf(value):
            raise _too_large()
        return value
    if _bits(value) > max_digits * 3.33:
        raise _too_large()
    if isinstance(value, Fraction) and value.denominator == 1:
        return int(value)
    return value if isinstance(value, Fraction) else int(value)


def _divide(left: Number, right: Number) -> Number:
    if isinstance(left, float) or isinstance(right, float):
        return left / right
    return Fraction(left) / Fraction(right)


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(exponent, Fraction):
        # An exact root where there is one: 8 ** (1/3) is 2.
        root = _exact_root(base, exponent)
        return float(base) ** float(exponent) if root is None else root
    if isinstance(exponent, int) and not isinstance(base, float):
        if abs(exponent) * max(_bits(base), 1) > MAX_DIGITS * 3.33 * 4 and abs(base) != 1 and base:
            raise _too_large()
        return Fraction(base) ** exponent
    return base**exponent


def _exact_root(base: Number, exponent: Fraction) -> Number | None:
    if not isinstance(base, int) or base < 0 or exponent.denominator > 64 or abs(exponent) > 64:
        return None
    guess = round(base ** (1 / exponent.denominator))
    if guess**exponent.denominator != base:
        return None
    return _power(guess, exponent.numerator)


def _sqrt(value: Number) -> Number:
    if value < 0:
        raise ToolRetry("the square root of a negative number is not real")
    if isinstance(value, float):
        return math.sqrt(value)
    exact = Fraction(value)
    parts = math.isqrt(exact.numerator), math.isqrt(exact.denominator)
    if parts[0] ** 2 == exact.numerator and parts[1] ** 2 == exact.denominator:
        return Fraction(*parts)
    return math.sqrt(exact)


def _whole(value: Number, name: str) -> int:
    if value != int(value):
        raise ToolRetry(f"{name} needs whole numbers, got {render(value)}")
    return int(value)


def _factorial(value: Number) -> int:
    number = _whole(value, "factorial")
    if not 0 <= number <= MAX_FACTORIAL:
        raise ToolRetry(f"factorial is defined here from 0 to {MAX_FACTORIAL}, got {number}")
    return math.factorial(number)


def _choose(name: str, count: Callable[[int, int], int]) -> Callable[..., int]:
    def function(n: Number, k: Number) -> int:
        total, taken = _whole(n, name), _whole(k, name)
        if not (0 <= taken <= 10_000 and 0 <= total <= 10_000):
            raise ToolRetry(f"{name} is defined here for whole numbers from 0 to 10000")
        return count(total, taken)

    return function


def _whole_numbers(name: str, function: Callable[..., int]) -> Callable[..., int]:
    return lambda *values: function(*(_whole(value, name) for value in values))


def _log(value: Number, base: Number | None = None) -> Number:
    if base is None:
        return math.log(value)
    # Exact where it can be: log(8, 2) is 3, not 2.9999999999999996.
    result = math.log(value) / math.log(base)
    nearest = round(result)
    return nearest if abs(nearest) < 1000 and _power(base, nearest) == value else result


def _log_base(base: int) -> Callable[[Number], Number]:
    return lambda value: _log(value, base)


def _round(value: Number, digits: Number = 0) -> Number:
    places = _whole(digits, "round")
    if abs(places) > 100:
        raise ToolRetry(f"round takes at most 100 places, got {places}")
    # Half away from zero, as people round; Python's own goes to the even neighbour.
    exact = Fraction(value) * Fraction(10) ** places
    whole = math.floor(abs(exact) + Fraction(1, 2))
    return Fraction(whole if exact >= 0 else -whole) / Fraction(10) ** places


def _mean(*values: Number) -> Number:
    return _divide(sum(values), len(values))


def _median(*values: Number) -> Number:
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return _mean(ordered[middle - 1], ordered[middle])


def _stdev(*values: Number) -> Number:
    if len(values) < 2:
        raise ToolRetry("stdev needs at least two numbers")
    mean = _mean(*values)
    return _sqrt(_divide(sum((value - mean) ** 2 for value in values), len(values) - 1))


def _clean(function: Callable[[float], float]) -> Callable[[Number], float]:
    """Without the last digit's noise: the sine of pi is 0."""
    return lambda value: round(function(float(value)), 15)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sqrt": _sqrt,
    "cbrt": lambda value: _power(value, Fraction(1, 3)) if value >= 0 else math.cbrt(value),
    "log": _log,
    "ln": math.log,
    "log10": _log_base(10),
    "log2": _log_base(2),
    "exp": math.exp,
    "abs": abs,
    "round": _round,
    "min": min,
    "max": max,
    "sum": lambda *values: sum(values),
    "mean": _mean,
    "average": _mean,
    "median": _median,
    "stdev": _stdev,
    "sin": _clean(math.sin),
    "cos": _clean(math.cos),
    "tan": _clean(math.tan),
    "asin": math.asin,
    "acos": math.acos,
    "atan": math.atan,
    "atan2": math.atan2,
    "sinh": math.sinh,
    "cosh": math.cosh,
    "tanh": math.tanh,
    "degrees": math.degrees,
    "radians": math.radians,
    "hypot": math.hypot,
    "floor": math.floor,
    "ceil": math.ceil,
    "factorial": _factorial,
    "gcd": _whole_numbers("gcd", math.gcd),
    "lcm": _whole_numbers("lcm", math.lcm),
    "comb": _choose("comb", math.comb),
    "perm": _choose("perm", math.perm),
    "pow": _power,
}
"""Everything that can be called; names outside this list are refused."""

CONSTANTS: dict[str, float] = {"pi": math.pi, "e": math.e, "tau": math.tau}

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divide,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}


class _Evaluator:
    """Walks one expression; every intermediate value is checked before it is used."""

    def __init__(self, max_digits: int) -> None:
        self._max_digits = max_digits

    def value(self, node: ast.AST, depth: int = 0) -> Number:
        if depth > MAX_DEPTH:
            raise ToolRetry("the expression is nested too deeply")
        return _checked(self._raw(node, depth + 1), self._max_digits)

    def _raw(self, node: ast.AST, depth: int) -> Any:
        if isinstance(node, ast.Constant):
            # bool is an int to Python, but not a number to a person.
            if type(node.value) is int:
                return node.value
            if type(node.value) is float:
                return _exact_decimal(node.value)
            raise ToolRetry(f"{str(node.value)[:40]!r} is not a number")
        if isinstance(node, ast.Name):
            if node.id.lower() in CONSTANTS:
                return CONSTANTS[node.id.lower()]
            raise ToolRetry(f"unknown name {node.id!r}; known constants: {', '.join(CONSTANTS)}")
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            operand = self.value(node.operand, depth)
            return -operand if isinstance(node.op, ast.USub) else operand
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            left, right = self.value(node.left, depth), self.value(node.right, depth)
            return _BINARY[type(node.op)](left, right)
        if isinstance(node, ast.Call):
            return self._call(node, depth)
        raise ToolRetry("only numbers, + - * / // % ** and the listed functions are allowed")

    def _call(self, node: ast.Call, depth: int) -> Any:
        name = node.func.id.lower() if isinstance(node.func, ast.Name) else ""
        if name not in FUNCTIONS:
            raise ToolRetry(f"unknown function {name or 'call'!r}; known: {', '.join(FUNCTIONS)}")
        if node.keywords or any(isinstance(argument, ast.Starred) for argument in node.args):
            raise ToolRetry(f"{name} takes plain arguments only")
        values: list[Number] = []
        for argument in node.args:
            # `mean([1, 2, 3])` and `mean(1, 2, 3)` are the same.
            items = argument.elts if isinstance(argument, ast.List | ast.Tuple) else [argument]
            values += [self.value(item, depth) for item in items]
        try:
            return FUNCTIONS[name](*values)
        except TypeError:
            raise ToolRetry(f"{name} does not take {len(values)} arguments like these") from None


def _exact_decimal(value: float) -> Number:
    """A decimal literal as the fraction it was written as: 0.1 + 0.2 is then exactly 0.3."""
    if math.isinf(value):
        raise _too_large()
    if value != 0 and not 1e-60 < abs(value) < 1e60:
        return value
    return Fraction(repr(value))


def render(value: Number) -> str:
    """Write a number: whole ones in full, others with up to 10 significant digits.

    Args:
        value: Any real, finite number.

    Returns:
        Its decimal form.
    """
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Fraction) and value.denominator == 1:
        return str(value.numerator)
    try:
        number = float(value)
    except OverflowError:
        raise _too_large() from None
    if number.is_integer() and abs(number) < 1e15:
        return str(int(number))
    return f"{number:.{SIGNIFICANT_DIGITS}g}"


def evaluate(expression: str, max_digits: int = MAX_DIGITS) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: For example `1,200 * 1.05^3` or `sqrt(2) / 3`.
        max_digits: Longest whole number allowed, in decimal digits.

    Returns:
        The result in decimal.

    Raises:
        ToolRetry: If it is no such expression, or its value is undefined, not real or too large.
    """
    text = normalise(expression)
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ToolRetry(f"{expression[:80]!r} is not an arithmetic expression") from None
    if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
        raise ToolRetry("the expression has too many parts")
    try:
        return render(_Evaluator(max_digits).value(tree.body))
    except ZeroDivisionError:
        raise ToolRetry("division by zero") from None
    except OverflowError:
        raise _too_large() from None
    except ValueError:
        raise ToolRetry(f"{expression[:80]!r} is not defined for these numbers") from None
