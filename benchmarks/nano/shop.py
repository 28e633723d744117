"""The shop database that ships with the nano pool: customers, products and their orders.

A seed makes it; `configs/nano/shop.sqlite` is the file that the pool's tool `database` reads.
"""

from __future__ import annotations

import random
import sqlite3
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from benchmarks.nano.math_words import NAMES
from serve_app.tools.builtin.sql import table

PATH = Path(__file__).parents[2] / "configs" / "nano" / "shop.sqlite"

# fmt: off
CITIES = ("Athens", "Berlin", "Dublin", "Lisbon", "Madrid", "Oslo", "Prague", "Vienna")
KINDS = ("garden", "kitchen", "music", "office", "sports", "toys")
PRODUCTS = (
    "rake", "hose", "shovel", "bench", "fence", "seeds", "kettle", "teapot", "pan", "oven",
    "toaster", "spoon", "piano", "guitar", "drum", "flute", "violin", "trumpet", "desk", "lamp",
    "stapler", "printer", "folder", "pencil", "racket", "helmet", "ski", "canoe", "glove", "net",
    "puzzle", "robot", "kite", "doll", "train", "dice",
)
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)
# fmt: on
YEARS = range(2012, 2026)
_NUM_ORDERS = 320
_SEED = 18
_TABLES = """
create table customers(id integer primary key, name text, city text, age integer, joined integer);
create table products(id integer primary key, name text, kind text, price integer, stock integer);
create table orders(
    id integer primary key, customer integer references customers(id),
    product integer references products(id), amount integer, month text
);
"""


def write_database(path: Path = PATH, seed: int = _SEED) -> None:
    """Write the database; the same seed gives the same rows."""
    path.unlink(missing_ok=True)
    rng = random.Random(seed)
    database = sqlite3.connect(path)
    try:
        database.executescript(_TABLES)
        customers = [
            (number, name, rng.choice(CITIES), rng.randint(18, 84), rng.choice(YEARS))
            for number, name in enumerate(NAMES, start=1)
        ]
        prices = rng.sample(range(3, 400), len(PRODUCTS))
        stocks = rng.sample(range(1, 250), len(PRODUCTS))
        each = len(PRODUCTS) // len(KINDS)
        products = [
            (index + 1, name, KINDS[index // each], prices[index], stocks[index])
            for index, name in enumerate(PRODUCTS)
        ]
        orders = [
            (
                number,
                rng.randint(1, len(customers)),
                rng.randint(1, len(products)),
                rng.randint(1, 40),
                rng.choice(MONTHS),
            )
            for number in range(1, _NUM_ORDERS + 1)
        ]
        for name, rows in (("customers", customers), ("products", products), ("orders", orders)):
            marks = ", ".join("?" * len(rows[0]))
            database.executemany(f"insert into {name} values ({marks})", rows)
        database.commit()
    finally:
        database.close()
    path.chmod(0o644)


@cache
def _shop() -> sqlite3.Connection:
    """The shipped database, in memory; threads take turns, as SQLite is built for here."""
    memory = sqlite3.connect(":memory:", check_same_thread=False)
    file = sqlite3.connect(f"file:{PATH}?mode=ro", uri=True)
    try:
        file.backup(memory)
    finally:
        file.close()
    memory.execute("pragma query_only = on")
    return memory


@lru_cache(maxsize=1 << 16)
def rows_of(query: str) -> tuple[tuple[Any, ...], ...]:
    """The rows of a right query on the shipped database."""
    return tuple(_shop().execute(query).fetchall())


def result_text(query: str) -> str:
    """What the tool `database` answers to a query; an error comes back as text."""
    try:
        cursor = _shop().execute(query)
        rows = [list(row) for row in cursor.fetchall()]
    except (sqlite3.Error, sqlite3.Warning) as error:
        return f"Error: {error}"
    columns = [column[0] for column in cursor.description or ()]
    return table({"columns": columns, "rows": rows, "complete": True})
