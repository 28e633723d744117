"""Value questions of nano-code: results over lists, strings and sequences, found by running code.

Each kind has a short program (the tool call the model learns) and phrasings with slots such as
`{xs}`, both in the catalogue, and an independent reference. The last two phrasings are held out.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from benchmarks.nano import code_catalog
from benchmarks.nano import code_inputs as inputs
from benchmarks.nano.code_catalog import NUM_HELD_OUT
from benchmarks.nano.code_wording import shown

Arguments = dict[str, Any]


@dataclass(frozen=True)
class ValueKind:
    """One kind of value question."""

    kind: str
    draw: Callable[[random.Random], Arguments]
    """Slots and their values; lists and strings are first bound to a variable of that name."""
    reference: Callable[..., Any]
    """Another way to compute the value; called with the slot values by name."""

    @property
    def trained(self) -> tuple[str, ...]:
        """Phrasings used in training."""
        return code_catalog.wordings("values", self.kind, "phrasings")[:-NUM_HELD_OUT]

    @property
    def held_out(self) -> tuple[str, ...]:
        """Phrasings never used in training."""
        return code_catalog.wordings("values", self.kind, "phrasings")[-NUM_HELD_OUT:]

    def program(self, arguments: Arguments) -> str:
        """The short program that prints the answer."""
        code = code_catalog.code("values", self.kind)
        bindings: list[str] = []
        for name, value in arguments.items():
            if isinstance(value, list) or name in {"s", "t"}:
                bindings.append(f"{name} = {value!r}")
            else:
                code = code.replace("{" + name + "}", str(value))
        return "\n".join([*bindings, code])

    def question(self, rng: random.Random, phrasing: str, arguments: Arguments) -> str:
        """The phrasing with its slots filled as a user would type them."""
        text = phrasing
        for name, value in arguments.items():
            slot = "{" + name + "}"
            if f"({slot}" in text or f"{slot}[" in text or f"= {slot}" in text:
                typed = repr(value)
            elif name == "c":
                typed = f"'{value}'"
            elif name == "bits":
                typed = value
            else:
                typed = shown(rng, value)
            text = text.replace(slot, str(typed))
            if isinstance(value, int):
                text = text.replace("{" + name + "th}", inputs.ordinal(value))
        return text


def printed(value: Any) -> str:
    """What `print(value)` shows, with floats rounded to two places."""
    return str(round(value, 2)) if isinstance(value, float) else str(value)


def _xs(rng: random.Random) -> Arguments:
    return {"xs": inputs.numbers(rng, 4, 8)}


def _signed(rng: random.Random) -> Arguments:
    return {"xs": inputs.numbers(rng, 4, 8, negative=True)}


def _repeats(rng: random.Random) -> Arguments:
    return {"xs": inputs.small_numbers(rng, 5, 8, top=7)}


def _xs_k(rng: random.Random) -> Arguments:
    xs = inputs.numbers(rng, 5, 8)
    return {"xs": xs, "k": rng.choice((rng.randint(2, 50), rng.choice(xs)))}


def _top(rng: random.Random) -> Arguments:
    return {"xs": inputs.numbers(rng, 5, 8), "k": rng.randint(2, 4)}


def _two_lists(rng: random.Random) -> Arguments:
    size = rng.randint(3, 4)
    return {
        "xs": inputs.small_numbers(rng, size, size, 20),
        "ys": inputs.small_numbers(rng, size, size, 20),
    }


def _word(rng: random.Random) -> Arguments:
    drawn = inputs.word(rng)
    return {"s": drawn if len(drawn) > 4 else drawn + inputs.word(rng)}


def _phrase(rng: random.Random) -> Arguments:
    return {"s": inputs.phrase(rng, 2, 4)}


def _letter(rng: random.Random) -> Arguments:
    text = inputs.phrase(rng, 1, 3)
    return {"s": text, "c": rng.choice(text.replace(" ", ""))}


def _words(rng: random.Random) -> Arguments:
    return {"ws": inputs.words(rng, 3, 5)}


def _shift(rng: random.Random) -> Arguments:
    return {**_word(rng), "k": rng.randint(1, 25)}


def _n(low: int, high: int) -> Callable[[random.Random], Arguments]:
    return lambda rng: {"n": rng.randint(low, high)}


def _a_b(low: int, high: int) -> Callable[[random.Random], Arguments]:
    return lambda rng: {"a": rng.randint(low, high), "b": rng.randint(low, high)}


def _range(rng: random.Random) -> Arguments:
    a = rng.randint(1, 60)
    return {"a": a, "b": a + rng.randint(8, 90)}


def _primes(count: int) -> list[int]:
    found: list[int] = []
    candidate = 2
    while len(found) < count:
        if all(candidate % p for p in found):
            found.append(candidate)
        candidate += 1
    return found


def _fibonacci(n: int) -> int:
    terms = [1, 1]
    while len(terms) < n:
        terms.append(terms[-1] + terms[-2])
    return terms[n - 1]


def _collatz(n: int) -> int:
    return 0 if n == 1 else 1 + _collatz(n * 3 + 1 if n & 1 else n >> 1)


def _prime_factors(n: int) -> list[int]:
    for d in range(2, n + 1):
        if n % d == 0:
            return [d, *_prime_factors(n // d)]
    return []


V = ValueKind

LIST_KINDS: tuple[ValueKind, ...] = (
    V("list_sum", _signed, lambda xs: int(math.fsum(xs))),
    V("sum_of_squares", _xs, lambda xs: sum(x**2 for x in xs)),
    V(
        "list_product",
        lambda rng: {"xs": inputs.small_numbers(rng, 4, 6, 15)},
        lambda xs: math.prod(xs),
    ),
    V("sum_even", _xs, lambda xs: sum(x for x in xs if not x & 1)),
    V("sum_odd", _xs, lambda xs: sum(x for x in xs if x & 1)),
    V("count_greater", _xs_k, lambda xs, k: len([x for x in xs if x - k > 0])),
    V(
        "sort_ascending",
        _signed,
        lambda xs: [sorted(xs, reverse=True)[-1 - i] for i in range(len(xs))],
    ),
    V("sort_descending", _signed, lambda xs: sorted(xs)[::-1]),
    V("reverse_list", _xs, lambda xs: list(reversed(xs))),
    V("median", _signed, lambda xs: statistics.median(xs)),
    V(
        "second_largest",
        lambda rng: {"xs": rng.sample(range(1, 200), rng.randint(5, 8))},
        lambda xs: max(x for x in xs if x != max(xs)),
    ),
    V("list_range", _signed, lambda xs: sorted(xs)[-1] - sorted(xs)[0]),
    V("unique", _repeats, lambda xs: [x for i, x in enumerate(xs) if x not in xs[:i]]),
    V("count_distinct", _repeats, lambda xs: len(Counter(xs))),
    V("running_totals", _xs, lambda xs: list(accumulate(xs))),
    V("differences", _xs, lambda xs: [xs[i + 1] - xs[i] for i in range(len(xs) - 1)]),
    V("top_k", _top, lambda xs, k: sorted(xs)[::-1][:k]),
    V("dot_product", _two_lists, lambda xs, ys: sum(xs[i] * ys[i] for i in range(len(xs)))),
    V("list_mean", _xs, lambda xs: float(statistics.fmean(xs))),
)
"""Kinds over lists of numbers."""

STRING_KINDS: tuple[ValueKind, ...] = (
    V("reverse_string", _word, lambda s: "".join(reversed(s))),
    V("count_vowels", _phrase, lambda s: sum(s.count(v) for v in "aeiou")),
    V("count_consonants", _phrase, lambda s: sum(c not in " aeiou" for c in s)),
    V("count_letter", _letter, lambda s, c: sum(x == c for x in s)),
    V("string_length", _phrase, lambda s: sum(1 for _ in s)),
    V("remove_vowels", _phrase, lambda s: s.translate(str.maketrans("", "", "aeiou"))),
    V("sort_letters", _word, lambda s: "".join(c * s.count(c) for c in sorted(set(s)))),
    V("unique_letters", _phrase, lambda s: len(Counter("".join(s.split())))),
    V("uppercase_reversed", _word, lambda s: "".join(c.upper() for c in reversed(s))),
    V("every_second_letter", _word, lambda s: "".join(s[i] for i in range(0, len(s), 2))),
    V("join_reversed_words", _phrase, lambda s: " ".join(reversed(s.split()))),
    V("acronym", _phrase, lambda s: "".join(c for c in s.title() if c.isupper())),
    V(
        "caesar",
        _shift,
        lambda s, k: "".join("abcdefghijklmnopqrstuvwxyz"[(ord(c) - ord("a") + k) % 26] for c in s),
    ),
    V("longest_word", _words, lambda ws: next(w for w in ws if len(w) == max(map(len, ws)))),
    V("sort_words", _words, lambda ws: [sorted(ws, reverse=True)[-1 - i] for i in range(len(ws))]),
    V("total_letters", _words, lambda ws: len("".join(ws))),
)
"""Kinds over strings and lists of words."""

SEQUENCE_KINDS: tuple[ValueKind, ...] = (
    V("nth_fibonacci", _n(5, 50), _fibonacci),
    V("nth_prime", _n(4, 60), lambda n: _primes(n)[n - 1]),
    V("gcd", _a_b(12, 900), lambda a, b: math.gcd(a, b)),
    V("lcm", _a_b(6, 99), lambda a, b: math.lcm(a, b)),
    V("factorial", _n(5, 18), lambda n: math.factorial(n)),
    V("digit_sum", _n(1000, 99999999), lambda n: sum(n // 10**i % 10 for i in range(9))),
    V("to_binary", _n(20, 5000), lambda n: f"{n:b}"),
    V("to_hex", _n(200, 65000), lambda n: f"{n:x}"),
    V(
        "from_binary",
        lambda rng: {"bits": f"{rng.randint(40, 4000):b}"},
        lambda bits: sum(2**i for i, c in enumerate(reversed(bits)) if c == "1"),
    ),
    V(
        "divisors",
        _n(12, 200),
        lambda n: sorted(
            {f for d in range(1, math.isqrt(n) + 1) if n % d == 0 for f in (d, n // d)}
        ),
    ),
    V("count_divisors", _n(30, 900), lambda n: len([d for d in range(1, n + 1) if n % d < 1])),
    V("prime_factors", _n(30, 2000), _prime_factors),
    V("count_primes", _n(20, 500), lambda n: len([p for p in _primes(100) if p < n])),
    V("sum_range_squares", _range, lambda a, b: sum(x**2 for x in range(a, b + 1))),
    V("collatz", _n(5, 999), _collatz),
    V("reverse_digits", _n(1000, 9999999), lambda n: int("".join(reversed(str(n))))),
    V(
        "modular_power",
        lambda rng: {"a": rng.randint(2, 30), "b": rng.randint(5, 60), "m": rng.randint(7, 200)},
        lambda a, b, m: a**b % m,
    ),
)
"""Kinds over integers and sequences."""

VALUE_KINDS: tuple[ValueKind, ...] = LIST_KINDS + STRING_KINDS + SEQUENCE_KINDS
