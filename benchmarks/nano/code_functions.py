"""The fixed function tasks of nano-code, with independent references and random arguments.

A description is a verb phrase ("returns the largest number in a list") or, after `@`, a noun
phrase. The last two of every task are held out: they never occur in training.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, chain, groupby, pairwise
from typing import Any

from benchmarks.nano import code_catalog
from benchmarks.nano import code_inputs as inputs
from benchmarks.nano.code_catalog import NUM_HELD_OUT


@dataclass(frozen=True)
class FunctionTask:
    """One function to write; its code and its descriptions are in the catalogue."""

    kind: str
    reference: Callable[..., Any]
    """Another way to compute the same result; unit tests come from it."""
    draw: Callable[[random.Random], tuple[Any, ...]]
    """Random arguments."""

    @property
    def parameters(self) -> str:
        """Signature of `solution`, for example `xs, k`."""
        return code_catalog.text("functions", self.kind, "parameters")

    @property
    def body(self) -> str:
        """Statements of the answer, not indented."""
        return code_catalog.code("functions", self.kind)

    @property
    def trained(self) -> tuple[str, ...]:
        """Descriptions used in training."""
        return code_catalog.wordings("functions", self.kind, "descriptions")[:-NUM_HELD_OUT]

    @property
    def held_out(self) -> tuple[str, ...]:
        """Descriptions never used in training."""
        return code_catalog.wordings("functions", self.kind, "descriptions")[-NUM_HELD_OUT:]


def _xs(rng: random.Random) -> tuple[Any, ...]:
    return (inputs.numbers(rng, 3, 8, negative=True),)


def _repeats(rng: random.Random) -> tuple[Any, ...]:
    return (inputs.small_numbers(rng, 4, 8, top=6),)


def _distinct(rng: random.Random) -> tuple[Any, ...]:
    return (rng.sample(range(-20, 60), rng.randint(3, 8)),)


def _xs_k(rng: random.Random) -> tuple[Any, ...]:
    xs = inputs.small_numbers(rng, 4, 8, top=9)
    return (xs, rng.choice((*xs, 4)))


def _xs_count(rng: random.Random) -> tuple[Any, ...]:
    xs = inputs.numbers(rng, 4, 8)
    return (xs, rng.randint(1, len(xs) - 1))


def _two_lists(rng: random.Random) -> tuple[Any, ...]:
    size = rng.randint(3, 6)
    return (inputs.small_numbers(rng, size, size, 9), inputs.small_numbers(rng, size, size, 9))


def _two_sets(rng: random.Random) -> tuple[Any, ...]:
    return (rng.sample(range(1, 10), 4), rng.sample(range(1, 10), 5))


def _nested(rng: random.Random) -> tuple[Any, ...]:
    return ([inputs.numbers(rng, 1, 3) for _ in range(rng.randint(2, 4))],)


def _text(rng: random.Random) -> tuple[Any, ...]:
    return (inputs.phrase(rng),)


def _word(rng: random.Random) -> tuple[Any, ...]:
    return (inputs.word(rng),)


def _words(rng: random.Random) -> tuple[Any, ...]:
    return (inputs.words(rng),)


def _mixed_text(rng: random.Random) -> tuple[Any, ...]:
    text = inputs.phrase(rng, 1, 3)
    marks = [rng.choice((c, c.upper(), str(rng.randint(0, 9)))) for c in text]
    return ("".join(marks),)


def _s_c(rng: random.Random) -> tuple[Any, ...]:
    text = inputs.phrase(rng, 1, 3)
    return (text, rng.choice(text.replace(" ", "")))


def _palindromes(rng: random.Random) -> tuple[Any, ...]:
    half = inputs.word(rng)
    return (rng.choice((half, half + half[::-1], half + half[-2::-1])),)


def _anagrams(rng: random.Random) -> tuple[Any, ...]:
    first = inputs.word(rng)
    letters = list(first)
    rng.shuffle(letters)
    return (first, rng.choice(("".join(letters), inputs.word(rng))))


def _int(low: int, high: int) -> Callable[[random.Random], tuple[Any, ...]]:
    return lambda rng: (rng.randint(low, high),)


def _ints(low: int, high: int) -> Callable[[random.Random], tuple[Any, ...]]:
    return lambda rng: (rng.randint(low, high), rng.randint(low, high))


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _fibonacci(n: int) -> int:
    return n if n < 2 else _fibonacci(n - 1) + _fibonacci(n - 2)


def _collatz(n: int) -> int:
    return 0 if n == 1 else 1 + _collatz(3 * n + 1 if n % 2 else n // 2)


def _factors(n: int) -> list[int]:
    for d in range(2, n + 1):
        if n % d == 0:
            return [d, *_factors(n // d)]
    return []


T = FunctionTask

LIST_TASKS: tuple[FunctionTask, ...] = (
    T("sum_list", math.fsum, _xs),
    T("max_list", lambda xs: sorted(xs)[-1], _xs),
    T("min_list", lambda xs: sorted(xs)[0], _xs),
    T("mean_list", statistics.fmean, _xs),
    T("product_list", math.prod, _xs),
    T("median_list", statistics.median, _xs),
    T("mode_list", lambda xs: Counter(xs).most_common(1)[0][0], _repeats),
    T("range_list", lambda xs: sorted(xs)[-1] - sorted(xs)[0], _xs),
    T("second_largest", lambda xs: max(x for x in xs if x != max(xs)), _distinct),
    T("reverse_list", lambda xs: list(reversed(xs)), _xs),
    T("sort_ascending", lambda xs: [sorted(xs, reverse=True)[-1 - i] for i in range(len(xs))], _xs),
    T("sort_descending", lambda xs: sorted(xs)[::-1], _xs),
    T("unique_list", lambda xs: [x for i, x in enumerate(xs) if x not in xs[:i]], _repeats),
    T("count_unique", lambda xs: len(Counter(xs)), _repeats),
    T(
        "is_sorted",
        lambda xs: all(a <= b for a, b in pairwise(xs)),
        lambda rng: (rng.choice((sorted, list))(inputs.numbers(rng, 3, 5)),),
    ),
    T("has_duplicates", lambda xs: max(Counter(xs).values()) > 1, _repeats),
    T(
        "all_equal",
        lambda xs: all(x == xs[0] for x in xs),
        lambda rng: ([rng.randint(1, 3)] * rng.randint(2, 5) + rng.choice(([], [4])),),
    ),
    T("running_total", lambda xs: list(accumulate(xs)), _xs),
    T("differences", lambda xs: [xs[i + 1] - xs[i] for i in range(len(xs) - 1)], _xs),
    T("flatten", lambda xs: list(chain(*xs)), _nested),
    T("count_value", lambda xs, k: sum(x == k for x in xs), _xs_k),
    T("remove_value", lambda xs, k: list(filter(k.__ne__, xs)), _xs_k),
    T("top_k", lambda xs, k: sorted(xs)[::-1][:k], _xs_count),
    T("bottom_k", lambda xs, k: sorted(xs, reverse=True)[: -k - 1 : -1], _xs_count),
    T("rotate_left", lambda xs, k: [xs[(i + k) % len(xs)] for i in range(len(xs))], _xs_count),
    T("every_second", lambda xs: [x for i, x in enumerate(xs) if i % 2 == 0], _xs),
    T("index_of_max", lambda xs: max(range(len(xs)), key=lambda i: xs[i]), _distinct),
    T(
        "move_zeros",
        lambda xs: sorted(xs, key=lambda x: x == 0),
        lambda rng: ([rng.choice((0, rng.randint(1, 20))) for _ in range(6)],),
    ),
    T(
        "pair_sum",
        lambda xs, k: any(a + b == k for i, a in enumerate(xs) for b in xs[i + 1 :]),
        lambda rng: (inputs.small_numbers(rng, 4, 6, 12), rng.randint(5, 20)),
    ),
    T("dot_product", lambda xs, ys: sum(xs[i] * ys[i] for i in range(len(xs))), _two_lists),
    T("add_lists", lambda xs, ys: [xs[i] + ys[i] for i in range(len(xs))], _two_lists),
    T("intersection", lambda xs, ys: sorted(set(xs) & set(ys), key=xs.index), _two_sets),
    T("difference", lambda xs, ys: sorted(set(xs) - set(ys), key=xs.index), _two_sets),
)
"""Tasks over lists of numbers."""

NUMBER_TASKS: tuple[FunctionTask, ...] = (
    T("factorial", math.factorial, _int(0, 15)),
    T("fibonacci", _fibonacci, _int(0, 18)),
    T("is_prime", lambda n: sum(n % d == 0 for d in range(1, n + 1)) == 2, _int(1, 120)),
    T("primes_below", lambda n: [x for x in range(n) if _is_prime(x)], _int(3, 60)),
    T("prime_factors", _factors, _int(2, 400)),
    T(
        "divisors",
        lambda n: sorted(
            {f for d in range(1, math.isqrt(n) + 1) if n % d == 0 for f in (d, n // d)}
        ),
        _int(1, 100),
    ),
    T("gcd", math.gcd, _ints(1, 120)),
    T("lcm", math.lcm, _ints(1, 60)),
    T("is_even", lambda n: not n & 1, _int(-50, 50)),
    T("digit_sum", lambda n: sum(n // 10**i % 10 for i in range(12)), _int(0, 99999)),
    T("count_digits", lambda n: next(i for i in range(1, 12) if n < 10**i), _int(0, 9999999)),
    T("reverse_number", lambda n: int("".join(reversed(str(n)))), _int(1, 99999)),
    T("to_binary", lambda n: f"{n:b}", _int(0, 300)),
    T(
        "from_binary",
        lambda s: sum(2**i for i, c in enumerate(reversed(s)) if c == "1"),
        lambda rng: (f"{rng.randint(1, 300):b}",),
    ),
    T("sum_to_n", lambda n: sum(range(n + 1)), _int(0, 200)),
    T("collatz_steps", _collatz, _int(1, 60)),
    T("power", pow, lambda rng: (rng.randint(1, 12), rng.randint(0, 6))),
    T(
        "is_perfect_square",
        lambda n: any(i * i == n for i in range(n + 1)),
        lambda rng: (rng.choice((rng.randint(1, 15) ** 2, rng.randint(1, 200))),),
    ),
    T(
        "is_power_of_two",
        lambda n: n in [2**i for i in range(12)],
        lambda rng: (rng.choice((2 ** rng.randint(0, 9), rng.randint(1, 200))),),
    ),
    T(
        "leap_year",
        lambda year: year % 400 == 0 or (year % 4 == 0 and year % 100 != 0),
        lambda rng: (rng.choice((rng.randint(1800, 2100), 1900, 2000, 2100, 2024)),),
    ),
    T("celsius_to_fahrenheit", lambda c: 1.8 * c + 32.0, _int(-40, 120)),
    T("fizzbuzz", lambda n: ("Fizz" * (n % 3 == 0) + "Buzz" * (n % 5 == 0)) or str(n), _int(1, 60)),
    T(
        "clamp",
        lambda x, low, high: sorted((low, x, high))[1],
        lambda rng: (rng.randint(-30, 60), rng.randint(-5, 5), rng.randint(10, 30)),
    ),
    T(
        "multiples",
        lambda n, k: list(range(n, n * k + 1, n)),
        lambda rng: (rng.randint(2, 15), rng.randint(1, 8)),
    ),
)
"""Tasks over single numbers."""

STRING_TASKS: tuple[FunctionTask, ...] = (
    T("reverse_string", lambda s: "".join(reversed(s)), _text),
    T("is_palindrome", lambda s: all(s[i] == s[-1 - i] for i in range(len(s))), _palindromes),
    T("count_vowels", lambda s: sum(s.count(v) for v in "aeiou"), _text),
    T(
        "count_consonants",
        lambda s: len([c for c in s if c != " "]) - sum(s.count(v) for v in "aeiou"),
        _text,
    ),
    T("remove_vowels", lambda s: s.translate(str.maketrans("", "", "aeiou")), _text),
    T("count_words", lambda s: s.count(" ") + 1, _text),
    T("uppercase", lambda s: "".join(c.upper() for c in s), _text),
    T(
        "swap_case",
        lambda s: "".join(c.lower() if c.isupper() else c.upper() for c in s),
        _mixed_text,
    ),
    T("capitalize_words", lambda s: s.title(), _text),
    T(
        "longest_word",
        lambda s: next(w for w in s.split() if len(w) == max(map(len, s.split()))),
        _text,
    ),
    T("acronym", lambda s: "".join(c for c in s.title() if c.isupper()), _text),
    T("word_lengths", lambda s: list(map(len, s.split(" "))), _text),
    T("reverse_words", lambda s: " ".join(reversed(s.split())), _text),
    T("count_char", lambda s, c: sum(x == c for x in s), _s_c),
    T("remove_char", lambda s, c: "".join(x for x in s if x != c), _s_c),
    T("remove_spaces", lambda s: "".join(s.split()), _text),
    T("snake_case", lambda s: "_".join(s.split()), _text),
    T("char_frequency", lambda s: dict(Counter(s)), _word),
    T("is_anagram", lambda a, b: Counter(a) == Counter(b), _anagrams),
    T("sort_letters", lambda s: "".join(c * s.count(c) for c in sorted(set(s))), _word),
    T("unique_letters", lambda s: len(Counter(s)), _word),
    T("double_letters", lambda s: "".join(c + c for c in s), _word),
    T("digits_in_string", lambda s: sum(c in "0123456789" for c in s), _mixed_text),
    T(
        "run_length",
        lambda s: "".join(f"{c}{len(list(g))}" for c, g in groupby(s)),
        lambda rng: ("".join(rng.choice("abc") * rng.randint(1, 4) for _ in range(4)),),
    ),
    T(
        "caesar",
        lambda s, k: "".join(
            "abcdefghijklmnopqrstuvwxyz"[("abcdefghijklmnopqrstuvwxyz".index(c) + k) % 26]
            for c in s
        ),
        lambda rng: (inputs.word(rng), rng.randint(1, 25)),
    ),
    T("second_chars", lambda s: "".join(s[i] for i in range(0, len(s), 2)), _word),
    T("join_words", lambda words: "".join(f"-{w}" for w in words)[1:], _words),
    T(
        "group_by_length",
        lambda words: {size: [w for w in words if len(w) == size] for size in map(len, words)},
        _words,
    ),
)
"""Tasks over strings and lists of words."""

FUNCTION_TASKS: tuple[FunctionTask, ...] = LIST_TASKS + NUMBER_TASKS + STRING_TASKS
