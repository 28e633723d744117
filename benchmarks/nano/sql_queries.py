"""Questions about the shop database as SQL and as words: what is asked, of which rows.

Conditions stand in the query in the order in which the question has them, so that the model can
write the one while it reads the other. Held out are wordings, and some combinations of a target
with conditions (`Ask.is_new`).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.nano import shop
from benchmarks.nano.math_phrasings import expand, fill, load_phrasings
from benchmarks.nano.math_words import NAMES
from benchmarks.nano.task import Split

PHRASINGS_PATH = Path(__file__).with_name("tool_phrasings.txt")
MAX_ROWS = 8
"""Most rows of a result; the answer has them all."""
_NEW_SHARE = 8
"""One in so many combinations is held out."""


@dataclass(frozen=True)
class Filter:
    """A condition on rows; its wordings are the section of that name."""

    section: str
    condition: str
    """SQL with a slot `{value}`."""
    draw: Callable[[random.Random], str]
    join: str = ""
    """The table that has the column, where it is not the one asked."""

    @property
    def column(self) -> str:
        """The column it is on."""
        return self.condition.partition(" ")[0]


@dataclass(frozen=True)
class Ask:
    """A query, and what fills the wordings of its kind."""

    kind: str
    query: str
    slots: dict[str, str]
    shape: str = ""
    """Target and columns of the conditions; empty where all combinations are trained."""

    @property
    def is_new(self) -> bool:
        """Whether training shows no query of this shape."""
        return bool(self.shape) and zlib.crc32(self.shape.encode()) % _NEW_SHARE == 0


def _number(low: int, high: int) -> Callable[[random.Random], str]:
    return lambda rng: str(rng.randint(low, high))


def _one_of(values: Sequence[str]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(values)


_CITY, _KIND, _MONTH = _one_of(shop.CITIES), _one_of(shop.KINDS), _one_of(shop.MONTHS)
_YEAR = _number(shop.YEARS[0] + 1, shop.YEARS[-1] - 1)
FILTERS: dict[str, tuple[Filter, ...]] = {
    "customers": (
        Filter("customers.city", "city = '{value}'", _CITY),
        Filter("customers.age >", "age > {value}", _number(20, 75)),
        Filter("customers.age <", "age < {value}", _number(25, 80)),
        Filter("customers.joined =", "joined = {value}", _YEAR),
        Filter("customers.joined >", "joined > {value}", _YEAR),
        Filter("customers.joined <", "joined < {value}", _YEAR),
    ),
    "products": (
        Filter("products.kind", "kind = '{value}'", _KIND),
        Filter("products.price >", "price > {value}", _number(5, 380)),
        Filter("products.price <", "price < {value}", _number(20, 390)),
        Filter("products.stock >", "stock > {value}", _number(2, 230)),
        Filter("products.stock <", "stock < {value}", _number(10, 240)),
    ),
    "orders": (
        Filter("orders.month", "month = '{value}'", _MONTH),
        Filter("orders.amount >", "amount > {value}", _number(2, 35)),
        Filter("orders.amount <", "amount < {value}", _number(5, 38)),
        Filter("customers.name", "name = '{value}'", _one_of(NAMES), "customers"),
        Filter("orders customers.city", "city = '{value}'", _CITY, "customers"),
        Filter("products.name", "name = '{value}'", _one_of(shop.PRODUCTS), "products"),
        Filter("orders products.kind", "kind = '{value}'", _KIND, "products"),
    ),
}
_FUNCTIONS = {
    "avg": "round(avg({column}), 2)",
    "sum": "sum({column})",
    "max": "max({column})",
    "min": "min({column})",
}
_HIGH, _LOW = ("highest", "largest", "maximum"), ("lowest", "smallest", "minimum")
_MEASURES: dict[str, tuple[str, ...]] = {
    "avg": ("average", "mean"),
    "sum": ("total",),
    "max": _HIGH,
    "min": _LOW,
}
_AGGREGATES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("customers", "age", ("avg", "max", "min")),
    ("products", "price", ("avg", "max", "min")),
    ("products", "stock", ("avg", "sum", "max", "min")),
    ("orders", "amount", ("avg", "sum", "max", "min")),
)
_BEST: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("customers", "age desc", (("oldest customer", "oldest customers"),)),
    ("customers", "age", (("youngest customer", "youngest customers"),)),
    (
        "products",
        "price desc",
        (
            ("most expensive product", "most expensive products"),
            ("dearest product", "dearest products"),
            ("product with the highest price", "products with the highest price"),
        ),
    ),
    (
        "products",
        "price",
        (
            ("cheapest product", "cheapest products"),
            ("product with the lowest price", "products with the lowest price"),
        ),
    ),
    (
        "products",
        "stock desc",
        (("product with the largest stock", "products with the largest stock"),),
    ),
    (
        "products",
        "stock",
        (("product with the smallest stock", "products with the smallest stock"),),
    ),
)
_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
_COLUMNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("customers", "city", ("city", "home city")),
    ("customers", "age", ("age",)),
    ("customers", "joined", ("year of joining", "joining year")),
    ("products", "kind", ("kind", "section")),
    ("products", "price", ("price",)),
    ("products", "stock", ("stock", "number in stock")),
)
_ROWS = {
    "customers": ("{row}", "the customer {row}", "customer {row}"),
    "products": ("the {row}", "the product {row}", "product {row}"),
}
_GROUPS: tuple[tuple[str, str, str, str], ...] = (
    ("customers", "city", "city", ""),
    ("customers", "joined", "year of joining", ""),
    ("products", "kind", "kind", ""),
    ("orders", "month", "month", ""),
    ("orders", "name", "customer", "customers"),
    ("orders", "name", "product", "products"),
    ("orders", "city", "city", "customers"),
    ("orders", "kind", "kind", "products"),
)
"""Table, column, its noun, and the table joined for it."""


@dataclass(frozen=True)
class _Rows:
    """Rows of a table, as the end of a query and as the end of a noun phrase."""

    source: str
    """` from … where …`."""
    phrase: str
    """What follows the noun, with a leading space; empty: all rows."""
    columns: str
    """Sections of the conditions, sorted."""


def _rows(
    rng: random.Random, split: Split, table: str, count: int, join: str = "", group: str = ""
) -> _Rows:
    """Rows with `count` conditions on different columns, of at most one joined table.

    Args:
        rng: Source of randomness.
        split: Whose wordings the conditions have.
        table: The table asked.
        count: How many conditions, where its columns have so many.
        join: The table that is joined anyway.
        group: The column that the rows are grouped by; no condition is on it.
    """
    chosen: list[Filter] = []
    used = {group}
    for filter_ in rng.sample(FILTERS[table], len(FILTERS[table])):
        fits = filter_.column not in used and filter_.join in {"", join or filter_.join}
        if fits and len(chosen) < count:
            chosen.append(filter_)
            used.add(filter_.column)
            join = join or filter_.join
    conditions, phrases = [], []
    for filter_ in chosen:
        slots = {"value": filter_.draw(rng)}
        conditions.append(fill(filter_.condition, slots))
        phrases.append(fill(_wording(rng, filter_.section, split), slots))
    joined = f" join {join} on {join}.id = {join[:-1]}" if join else ""
    where = f" where {' and '.join(conditions)}" if conditions else ""
    phrase = "".join(f" {text}" for text in phrases)
    columns = " ".join(sorted(filter_.section for filter_ in chosen))
    return _Rows(f" from {table}{joined}{where}", phrase, columns)


def _wording(rng: random.Random, section: str, split: Split) -> str:
    """A wording of a condition; held-out questions have seen ones too."""
    phrasings = load_phrasings(PHRASINGS_PATH)[section]
    choices = phrasings.seen
    if split == "held_out" and rng.random() < 0.5:
        choices = phrasings.held_out
    return rng.choice(choices)


def _count(rng: random.Random, split: Split) -> Ask:
    table = rng.choice(list(FILTERS))
    number = rng.choices((0, 1, 2), (1, 9, 5))[0]
    rows = _rows(rng, split, table, number)
    shape = f"count {table} {rows.columns}" if number == 2 else ""
    return Ask("count", f"select count(*){rows.source}", {"things": table + rows.phrase}, shape)


def _aggregate(rng: random.Random, split: Split) -> Ask:
    table, column, functions = rng.choice(_AGGREGATES)
    function = rng.choice(functions)
    rows = _rows(rng, split, table, rng.choices((0, 1, 2), (2, 7, 2))[0])
    measure = f"{rng.choice(_MEASURES[function])} {column}"
    target = _FUNCTIONS[function].replace("{column}", column)
    shape = f"{function} {column} {rows.columns}" if rows.columns else ""
    slots = {"measure": measure, "things": table + rows.phrase}
    return Ask("aggregate", f"select {target}{rows.source}", slots, shape)


def _list(rng: random.Random, split: Split) -> Ask:
    table = rng.choice(("customers", "products"))
    number = rng.choice((1, 2))
    rows = _rows(rng, split, table, number)
    query = f"select name{rows.source} order by name"
    shape = f"list {table} {rows.columns}" if number == 2 else ""
    return Ask("list", query, {"things": table + rows.phrase}, shape)


def _top(rng: random.Random, split: Split) -> Ask:
    table, order, phrases = rng.choice(_BEST)
    rows = _rows(rng, split, table, rng.choice((0, 1, 1)))
    count = rng.choice((1, 1, *_NUMBERS))
    one, many = rng.choice(phrases)
    query = f"select name{rows.source} order by {order} limit {count}"
    shape = f"top {order} {rows.columns}" if rows.columns else ""
    if count == 1:
        return Ask("top", query, {"best": one + rows.phrase}, shape)
    number = rng.choice((_NUMBERS[count], str(count)))
    return Ask("top_n", query, {"number": number, "best": many + rows.phrase}, shape)


def _lookup(rng: random.Random, split: Split) -> Ask:
    table, column, nouns = rng.choice(_COLUMNS)
    name = rng.choice(NAMES if table == "customers" else shop.PRODUCTS)
    slots = {"column": rng.choice(nouns), "row": fill(rng.choice(_ROWS[table]), {"row": name})}
    return Ask("lookup", f"select {column} from {table} where name = '{name}'", slots)


def _group(rng: random.Random, split: Split) -> Ask:
    table, column, noun, join = rng.choice(_GROUPS)
    rows = _rows(rng, split, table, rng.choice((0, 1)), join, column)
    query = f"select {column}, count(*){rows.source} group by {column} order by {column}"
    return Ask("group", query, {"things": table + rows.phrase, "group": noun})


def _group_most(rng: random.Random, split: Split) -> Ask:
    table, column, noun, join = rng.choice(_GROUPS)
    rows = _rows(rng, split, table, rng.choice((0, 1)), join, column)
    query = f"select {column}{rows.source} group by {column} order by count(*) desc limit 1"
    shape = f"most {column} {join} {rows.columns}" if rows.columns else ""
    return Ask("group_most", query, {"things": table + rows.phrase, "group": noun}, shape)


def _sold_most(rng: random.Random, split: Split) -> Ask:
    _, column, noun, join = rng.choice(_GROUPS[3:])
    source = _rows(rng, split, "orders", 0, join).source
    query = f"select {column}{source} group by {column} order by sum(amount) desc limit 1"
    return Ask("sold_most", query, {"group": noun})


_MAKERS: tuple[tuple[Callable[[random.Random, Split], Ask], int], ...] = (
    (_count, 6),
    (_aggregate, 6),
    (_list, 3),
    (_top, 5),
    (_lookup, 4),
    (_group, 2),
    (_group_most, 3),
    (_sold_most, 1),
)


def draw_ask(rng: random.Random, split: Split, *, new: bool | None = False) -> Ask:
    """A query with an answer that is neither empty nor up to chance.

    Args:
        rng: Source of randomness.
        split: Whose wordings its conditions have.
        new: Whether its combination is held out; `None`: either.
    """
    makers, weights = [maker for maker, _ in _MAKERS], [weight for _, weight in _MAKERS]
    while True:
        ask = rng.choices(makers, weights)[0](rng, split)
        if new in (None, ask.is_new) and _is_answerable(ask):
            return ask


def worded(rng: random.Random, ask: Ask, split: Split) -> str:
    """The question in a wording of the split."""
    phrasings = load_phrasings(PHRASINGS_PATH)[ask.kind]
    phrasing = rng.choice(phrasings.seen if split == "seen" else phrasings.held_out)
    text = fill(rng.choice(expand(phrasing)), ask.slots)
    return text[0].upper() + text[1:] if phrasing[0] == "{" and rng.random() < 0.5 else text


def _is_answerable(ask: Ask) -> bool:
    rows = shop.rows_of(ask.query)
    if not 0 < len(rows) <= MAX_ROWS or rows[0][0] in (None, 0):
        return False
    if ask.kind == "group":
        return len(rows) > 1
    query, limited, count = ask.query.partition(" limit ")
    return not limited or _is_settled(query, len(rows), int(count))


def _is_settled(query: str, found: int, wanted: int) -> bool:
    """Whether there are more than the `wanted` rows, and no tie decides which are the first."""
    head, _, order = query.partition(" order by ")
    by = order.removesuffix(" desc")
    target = head.removeprefix("select ").partition(" from ")[0]
    scored = head.replace(f"select {target} from", f"select {by} from", 1) + f" order by {order}"
    scores = shop.rows_of(scored)[: wanted + 1]
    has_rest = len(scores) > wanted
    return found == wanted and has_rest and len(set(scores)) == len(scores)
