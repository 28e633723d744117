"""Nano-math's problem types: the numbers of a problem and the calculator expression that solves it.

Each maker takes a seeded `random.Random` and returns a `Problem`: the slots of its phrasings as
text, and the expression, which uses the numbers as they are written.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.nano.math_numbers import decimal, money, number, percent, price, rate, whole
from benchmarks.nano.math_words import conversion


@dataclass(frozen=True)
class Problem:
    """A problem before it is put into words."""

    slots: dict[str, str]
    expression: str


Maker = Callable[[random.Random], Problem]


@dataclass(frozen=True)
class Kind:
    """A problem type."""

    name: str
    make: Maker
    phrasings: str = ""
    """Section of `math_phrasings.txt`; empty = the section named like the type."""
    weight: float = 1.0
    """How often it is drawn in training, relative to the others."""

    @property
    def section(self) -> str:
        """The section of its phrasings."""
        return self.phrasings or self.name


def _two(symbol: str, decimal_share: float = 0.25, max_digits: int = 5) -> Maker:
    def make(rng: random.Random) -> Problem:
        a, b = number(rng, max_digits, decimal_share), number(rng, max_digits, decimal_share)
        if symbol == "-" and float(a) < float(b) and rng.random() < 0.8:
            a, b = b, a
        expression = f"round({a}/{b},4)" if symbol == "/" else f"{a}{symbol}{b}"
        return Problem({"a": a, "b": b}, expression)

    return make


def _easy(symbol: str) -> Maker:
    def make(rng: random.Random) -> Problem:
        if symbol in "+-":
            a, b = rng.randint(1, 99), rng.randint(1, 99)
            if symbol == "-":
                a, b = max(a, b), min(a, b)
        else:
            a, b = rng.randint(2, 12), rng.randint(2, 12)
        if symbol == "/":
            return Problem({"a": str(a * b), "b": str(b)}, f"round({a * b}/{b},4)")
        return Problem({"a": str(a), "b": str(b)}, f"{a}{symbol}{b}")

    return make


def _add3(rng: random.Random) -> Problem:
    a, b, c = (number(rng, 4) for _ in range(3))
    return Problem({"a": a, "b": b, "c": c}, f"{a}+{b}+{c}")


def _expression(rng: random.Random) -> Problem:
    """Two or three operations in symbols; the call repeats them in Python's own."""

    def term() -> str:
        return number(rng, 3, 0.15)

    def symbol() -> str:
        return rng.choice("+-*/")

    shape = rng.randrange(5)
    if shape == 0:
        text = f"{term()} {symbol()} {term()} {symbol()} {term()}"
    elif shape == 1:
        text = f"({term()} {symbol()} {term()}) {rng.choice('*/-+')} {term()}"
    elif shape == 2:
        text = f"{term()} {symbol()} ({term()} {rng.choice('+-')} {term()})"
    elif shape == 3:
        text = f"({term()} {rng.choice('+-')} {term()}) {symbol()} ({term()} + {term()})"
    else:
        text = f"{rng.randint(2, 30)}^{rng.randint(2, 4)} {symbol()} {term()}"
    expression = text.replace(" ", "").replace("^", "**")
    if rng.random() < 0.3:
        text = text.replace(" * ", rng.choice((" \u00d7 ", " x "))).replace(" / ", " \u00f7 ")
    if rng.random() < 0.3:
        text = text.replace(" ", "")
    return Problem({"x": text}, f"round({expression},4)")


def _power(rng: random.Random) -> Problem:
    a = str(rng.randint(2, 30)) if rng.random() < 0.7 else decimal(rng, 1)
    b = str(rng.randint(2, 9))
    return Problem({"a": a, "b": b}, f"{a}**{b}")


def _square_root(rng: random.Random) -> Problem:
    a = str(rng.randint(2, 99) ** 2) if rng.random() < 0.3 else number(rng, 5, 0.2)
    return Problem({"a": a}, f"round(sqrt({a}),4)")


def _remainder(rng: random.Random) -> Problem:
    a, b = whole(rng, 4, 30) + 20, rng.randint(3, 40)
    return Problem({"a": str(a), "b": str(b)}, f"{a}%{b}")


def _percent(template: str, subject: Callable[[random.Random], str]) -> Maker:
    def make(rng: random.Random) -> Problem:
        x, p = subject(rng), percent(rng)
        return Problem({"x": x, "p": p}, template.format(x=x, p=p))

    return make


def _what_percent(rng: random.Random) -> Problem:
    b = whole(rng, 4, 10)
    a = rng.randint(1, b)
    return Problem({"a": str(a), "b": str(b)}, f"round({a}/{b}*100,2)")


def _percent_change(rng: random.Random) -> Problem:
    a, b = whole(rng, 4, 5), whole(rng, 4, 5)
    return Problem({"a": str(a), "b": str(b)}, f"round(({b}-{a})/{a}*100,2)")


def _product(most_a: int, most_b: int) -> Maker:
    def make(rng: random.Random) -> Problem:
        a, b = rng.randint(2, most_a), rng.randint(2, most_b)
        return Problem({"a": str(a), "b": str(b)}, f"{a}*{b}")

    return make


def _boxes_plus(rng: random.Random) -> Problem:
    a, b, c = rng.randint(2, 60), rng.randint(2, 99), rng.randint(2, 99)
    return Problem({"a": str(a), "b": str(b), "c": str(c)}, f"{a}*{b}+{c}")


def _share(rng: random.Random) -> Problem:
    b, each = rng.randint(2, 30), rng.randint(2, 120)
    return Problem({"a": str(b * each), "b": str(b)}, f"{b * each}/{b}")


def _remaining(rng: random.Random) -> Problem:
    a = whole(rng, 4, 30)
    b = rng.randint(1, a // 2)
    c = rng.randint(1, a - b - 1)
    return Problem({"a": str(a), "b": str(b), "c": str(c)}, f"{a}-{b}-{c}")


def _cost(rng: random.Random) -> Problem:
    n, p = str(rng.randint(2, 60)), price(rng)
    return Problem({"n": n, "p": p}, f"{n}*{p}")


def _change(rng: random.Random) -> Problem:
    n, p = rng.randint(2, 20), price(rng, 30)
    paid = str(int(n * float(p)) + rng.choice((1, 5, 10, 20, rng.randint(1, 99))))
    return Problem({"n": str(n), "p": p, "a": paid}, f"{paid}-{n}*{p}")


def _two_costs(rng: random.Random) -> Problem:
    n, m, p, q = rng.randint(2, 30), rng.randint(2, 30), price(rng, 30), price(rng, 30)
    return Problem({"n": str(n), "m": str(m), "p": p, "q": q}, f"{n}*{p}+{m}*{q}")


def _times_as_many(rng: random.Random) -> Problem:
    a, b = rng.randint(2, 150), rng.randint(2, 9)
    return Problem({"a": str(a), "b": str(b)}, f"{a}+{a}*{b}")


def _more_than(rng: random.Random) -> Problem:
    a, b = rng.randint(2, 150), rng.randint(2, 90)
    return Problem({"a": str(a), "b": str(b)}, f"{a}+{a}+{b}")


def _linear(template: str, sign: int) -> Maker:
    def make(rng: random.Random) -> Problem:
        a, b = rng.randint(2, 30), rng.randint(1, 99)
        c = a * rng.randint(2, 40) + sign * b if rng.random() < 0.6 else whole(rng, 3)
        slots = {"a": str(a), "b": str(b), "c": str(c)}
        return Problem(slots, f"round({template.format(**slots)},4)")

    return make


def _linear_both(rng: random.Random) -> Problem:
    a, c = rng.sample(range(2, 30), 2)
    b, d = rng.randint(1, 99), rng.randint(1, 99)
    slots = {"a": str(a), "b": str(b), "c": str(c), "d": str(d)}
    return Problem(slots, f"round(({d}-{b})/({a}-{c}),4)")


def _hours(rng: random.Random) -> str:
    if rng.random() < 0.6:
        return str(rng.randint(2, 14))
    return f"{rng.randint(1, 9)}.{rng.choice((5, 25, 75))}"


def _speed(rng: random.Random) -> Problem:
    d, t = number(rng, 4, 0.1), _hours(rng)
    return Problem({"d": d, "t": t}, f"round({d}/{t},2)")


def _distance(rng: random.Random) -> Problem:
    s, t = number(rng, 3, 0.2), _hours(rng)
    return Problem({"s": s, "t": t}, f"{s}*{t}")


def _travel_time(rng: random.Random) -> Problem:
    d, s = number(rng, 4, 0.1), str(rng.randint(4, 250))
    return Problem({"d": d, "s": s}, f"round({d}/{s},2)")


def _mean(rng: random.Random) -> Problem:
    size = rng.choice((1, 2, 2, 3))
    values = [number(rng, size, 0.12) for _ in range(rng.randint(2, 6))]
    comma = ", ".join(values)
    text = comma if rng.random() < 0.5 else f"{', '.join(values[:-1])} and {values[-1]}"
    return Problem({"list": text}, f"round(mean({','.join(values)}),2)")


def _sides(template: str, *names: str, places: int = 0) -> Maker:
    """Lengths in a formula."""

    def make(rng: random.Random) -> Problem:
        slots = {name: number(rng, 2, 0.3) for name in names}
        expression = template.format(**slots)
        return Problem(slots, f"round({expression},{places})" if places else expression)

    return make


def _interest(template: str) -> Maker:
    def make(rng: random.Random) -> Problem:
        slots = {"x": money(rng), "p": rate(rng), "t": str(rng.randint(2, 20))}
        return Problem(slots, f"round({template.format(**slots)},2)")

    return make


def _ph(rng: random.Random) -> Problem:
    digits = rng.choice(("1", "2", "3", "5", str(rng.randint(11, 99)), str(rng.randint(1, 9))))
    if rng.random() < 0.25:
        mantissa = digits if len(digits) == 1 else f"{digits[0]}.{digits[1]}"
        m = f"{mantissa}e-{rng.randint(1, 9)}"
    else:
        m = "0." + "0" * rng.randint(0, 5) + digits
    return Problem({"m": m}, f"round(-log10({m}),2)")


def _ph_inverse(rng: random.Random) -> Problem:
    h = f"{rng.randint(1, 12)}.{rng.randint(1, 99):02d}".rstrip("0").rstrip(".")
    return Problem({"h": h}, f"10**-{h}")


def _convert(rng: random.Random) -> Problem:
    source, target, operation = conversion(rng)
    x = number(rng, 4, 0.35)
    return Problem({"x": x, "from": source, "to": target}, f"round({x}{operation},4)")


def _degrees(rng: random.Random) -> str:
    value = number(rng, 3, 0.2)
    return f"-{value}" if rng.random() < 0.15 else value


def _to_fahrenheit(rng: random.Random) -> Problem:
    x = _degrees(rng)
    return Problem({"x": x}, f"round({x}*9/5+32,2)")


def _to_celsius(rng: random.Random) -> Problem:
    x = _degrees(rng)
    return Problem({"x": x}, f"round(({x}-32)*5/9,2)")


def _ratio(rng: random.Random) -> Problem:
    a, b = rng.randint(1, 12), rng.randint(1, 12)
    x = (a + b) * rng.randint(2, 60)
    return Problem({"a": str(a), "b": str(b), "x": str(x)}, f"{x}*{a}/({a}+{b})")


def _scale(rng: random.Random) -> Problem:
    a, b = rng.sample(range(2, 40), 2)
    p = price(rng, 40) if rng.random() < 0.4 else str(whole(rng, 3, 2))
    return Problem({"a": str(a), "b": str(b), "p": p}, f"round({p}/{a}*{b},2)")


def _density(rng: random.Random) -> Problem:
    m, v = number(rng, 4, 0.2), number(rng, 3, 0.2)
    return Problem({"m": m, "v": v}, f"round({m}/{v},4)")


def _log10(rng: random.Random) -> Problem:
    x = str(10 ** rng.randint(1, 6)) if rng.random() < 0.2 else number(rng, 5, 0.3)
    return Problem({"x": x}, f"round(log10({x}),4)")


def _probability(rng: random.Random) -> Problem:
    a, b = rng.randint(1, 40), rng.randint(1, 40)
    return Problem({"a": str(a), "b": str(b)}, f"round({a}/({a}+{b}),4)")


def _sequence(rng: random.Random) -> Problem:
    a, d, n = rng.randint(1, 99), rng.randint(2, 30), rng.randint(4, 80)
    return Problem({"a": str(a), "d": str(d), "n": str(n)}, f"{a}+({n}-1)*{d}")


def _sum_to(rng: random.Random) -> Problem:
    n = str(rng.randint(6, 2000))
    return Problem({"n": n}, f"{n}*({n}+1)/2")


def _profit(rng: random.Random) -> Problem:
    n, p = rng.randint(2, 99), price(rng, 30)
    q = str(int(float(p)) + rng.randint(2, 30)) + rng.choice(("", "", ".5", ".75"))
    return Problem({"n": str(n), "p": p, "q": q}, f"{n}*({q}-{p})")


EASY_KINDS: tuple[Kind, ...] = (
    Kind("easy_add", _easy("+"), "add"),
    Kind("easy_sub", _easy("-"), "sub"),
    Kind("easy_mul", _easy("*"), "mul"),
    Kind("easy_div", _easy("/"), "div"),
)
"""Sums that the model should also get right without a calculator."""

HARD_KINDS: tuple[Kind, ...] = (
    Kind("add", _two("+")),
    Kind("sub", _two("-")),
    Kind("mul", _two("*", max_digits=4)),
    Kind("div", _two("/", max_digits=4)),
    Kind("add3", _add3),
    Kind("expression", _expression, weight=3.0),
    Kind("power", _power),
    Kind("square_root", _square_root),
    Kind("remainder", _remainder),
    Kind("percent_of", _percent("round({p}/100*{x},2)", lambda rng: str(whole(rng, 4, 10)))),
    Kind("what_percent", _what_percent),
    Kind("percent_change", _percent_change, weight=1.2),
    Kind("increase", _percent("round({x}*(1+{p}/100),2)", money), weight=1.3),
    Kind("discount", _percent("round({x}*(1-{p}/100),2)", money), weight=1.3),
    Kind("reverse_percent", _percent("round({x}/{p}*100,2)", lambda rng: str(whole(rng, 3, 2)))),
    Kind("boxes", _product(60, 99)),
    Kind("boxes_plus", _boxes_plus, weight=1.2),
    Kind("share", _share, weight=1.2),
    Kind("remaining", _remaining),
    Kind("cost", _cost),
    Kind("change", _change, weight=1.2),
    Kind("two_costs", _two_costs, weight=1.2),
    Kind("times_as_many", _times_as_many),
    Kind("more_than", _more_than),
    Kind("linear_plus", _linear("({c}-{b})/{a}", 1)),
    Kind("linear_minus", _linear("({c}+{b})/{a}", -1)),
    Kind("linear_divide", _linear("({c}-{b})*{a}", 1)),
    Kind("linear_both", _linear_both),
    Kind("speed", _speed),
    Kind("distance", _distance),
    Kind("travel_time", _travel_time),
    Kind("mean", _mean, weight=1.5),
    Kind("rectangle_area", _sides("{l}*{w}", "l", "w")),
    Kind("rectangle_perimeter", _sides("2*({l}+{w})", "l", "w")),
    Kind("triangle_area", _sides("{l}*{h}/2", "l", "h")),
    Kind("circle_area", _sides("pi*{r}**2", "r", places=2)),
    Kind("circumference", _sides("2*pi*{r}", "r", places=2)),
    Kind("box_volume", _sides("{l}*{w}*{h}", "l", "w", "h")),
    Kind("hypotenuse", _sides("sqrt({a}**2+{b}**2)", "a", "b", places=2)),
    Kind("simple_interest", _interest("{x}*{p}/100*{t}"), weight=1.2),
    Kind("compound_interest", _interest("{x}*(1+{p}/100)**{t}"), weight=1.2),
    Kind("ph", _ph),
    Kind("ph_inverse", _ph_inverse),
    Kind("convert", _convert, weight=3.0),
    Kind("celsius_to_fahrenheit", _to_fahrenheit),
    Kind("fahrenheit_to_celsius", _to_celsius),
    Kind("ratio", _ratio),
    Kind("scale", _scale, weight=1.3),
    Kind("density", _density),
    Kind("product_law", _sides("{a}*{b}", "a", "b")),
    Kind("kinetic_energy", _sides("{m}*{v}**2/2", "m", "v")),
    Kind("log10", _log10),
    Kind("probability", _probability),
    Kind("sequence", _sequence),
    Kind("sum_to", _sum_to),
    Kind("profit", _profit),
)
"""Sums that need the calculator."""

KINDS = EASY_KINDS + HARD_KINDS
