"""Which functions are offered where there are many: with the real encoder, and without any."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from serve_app.budget import Deadline
from serve_app.config import EmbedderConfig
from serve_app.embedder import TextEncoder
from serve_app.errors import EngineError
from serve_app.orchestrator.pairs import selection
from serve_app.orchestrator.pairs.reading import as_read
from serve_app.orchestrator.pairs.selection import (
    Embed,
    FunctionSelector,
    Vectors,
    WordIndex,
    descriptor,
)
from serve_app.tools.base import NO_PARAMETERS, Function
from tests.function_set import FUNCTIONS, LABELLED

QUERY = "Show the log output of the container web"


class Encoder:
    """Counts what it is asked for.

    Attributes:
        texts: All that it was given.
        fails: Whether it is away.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.fails = False

    async def __call__(self, texts: list[str], deadline: Deadline) -> Vectors:
        self.texts += texts
        if self.fails:
            raise EngineError("it is away")
        return np.eye(len(FUNCTIONS) + 1, dtype=np.float32)[[len(text) % 64 for text in texts]]


async def names(selector: FunctionSelector, top_k: int = 8, query: str = QUERY) -> list[str]:
    deadline = Deadline.after(60)
    chosen = await selector.select("all", FUNCTIONS, top_k, query, deadline)
    return [function.name for function in chosen]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine embeds in time too."""
    monkeypatch.setattr(selection, "_WAIT_S", 60.0)


async def test_the_right_function_is_among_four_of_64(tmp_path: Path) -> None:
    encoder = TextEncoder(EmbedderConfig(), tmp_path)

    async def embed(texts: list[str], deadline: Deadline) -> Vectors:
        return encoder.encode(texts)

    selector = FunctionSelector(embed)
    found = [function.name in await names(selector, 4, query) for function, query in LABELLED]
    assert len(found) >= 60
    assert np.mean(found) >= 0.95


async def test_no_more_than_may_be_are_offered_as_they_are() -> None:
    encoder = Encoder()
    selector = FunctionSelector(encoder)
    few = FUNCTIONS[:8]
    assert await selector.select("few", few, 8, QUERY, Deadline.after(60)) == few
    assert encoder.texts == []


async def test_without_an_encoder_the_words_decide() -> None:
    chosen = await names(FunctionSelector(None))
    assert len(chosen) == len(set(chosen)) == 8
    assert chosen[0] == "docker__container_logs"


async def test_a_query_without_a_known_word_gets_functions_all_the_same() -> None:
    assert len(await names(FunctionSelector(None), query="xyzzy")) == 8


async def _hangs(texts: list[str], deadline: Deadline) -> Vectors:
    await asyncio.Event().wait()
    raise AssertionError


async def _is_away(texts: list[str], deadline: Deadline) -> Vectors:
    raise EngineError("it is away")


@pytest.mark.parametrize("embed", [_hangs, _is_away])
async def test_where_the_encoder_fails_or_hangs_the_words_decide(
    embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_WAIT_S", 0.05)
    assert await names(FunctionSelector(embed)) == await names(FunctionSelector(None))


async def test_without_time_the_words_decide() -> None:
    selector = FunctionSelector(_hangs)
    chosen = await selector.select("all", FUNCTIONS, 8, QUERY, Deadline.after(-1))
    assert [function.name for function in chosen] == await names(FunctionSelector(None))


async def test_functions_are_embedded_once() -> None:
    encoder = Encoder()
    selector = FunctionSelector(encoder)
    await asyncio.gather(*(names(selector) for _ in range(5)))
    await names(selector)
    assert sorted(set(encoder.texts)) == sorted({QUERY, *map(descriptor, FUNCTIONS)})
    assert len(encoder.texts) == 6 + len(FUNCTIONS)


async def test_an_embedding_of_the_query_that_is_there_is_used() -> None:
    encoder = Encoder()
    there = np.eye(len(FUNCTIONS) + 1, dtype=np.float32)[len(descriptor(FUNCTIONS[5])) % 64]
    selector = FunctionSelector(encoder)
    chosen = await selector.select("all", FUNCTIONS, 4, "xyzzy", Deadline.after(60), there)
    assert QUERY not in encoder.texts
    assert "xyzzy" not in encoder.texts
    assert len(descriptor(chosen[0])) == len(descriptor(FUNCTIONS[5]))


async def test_changed_functions_are_embedded_anew() -> None:
    encoder = Encoder()
    selector = FunctionSelector(encoder)
    await names(selector)
    changed = (*FUNCTIONS[1:], Function("other", "Does something else.", NO_PARAMETERS))
    await selector.select("all", changed, 8, QUERY, Deadline.after(60))
    assert "other: Does something else." in encoder.texts


async def test_an_encoder_that_comes_back_is_used_again() -> None:
    encoder = Encoder()
    selector = FunctionSelector(encoder)
    encoder.fails = True
    await selector.select("all", FUNCTIONS, 8, QUERY, Deadline.after(60), np.ones(65, np.float32))
    tried = len(encoder.texts)
    encoder.fails = False
    await selector.select("all", FUNCTIONS, 8, QUERY, Deadline.after(60), np.ones(65, np.float32))
    assert len(encoder.texts) == tried + len(FUNCTIONS)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("files__read_file", "files read file"),
        ("createTicket", "create Ticket"),
        ("v2.list-pets", "v2 list pets"),
    ],
)
def test_a_name_is_read_as_its_words(name: str, read: str) -> None:
    assert descriptor(Function(name, "Does it.", NO_PARAMETERS)) == f"{read}: Does it."


def test_a_rare_word_weighs_more_than_a_common_one() -> None:
    index = WordIndex(["common red", "common blue", "common green", "common common common rare"])
    assert index.scores("a common blue thing").argmax() == 1
    assert not index.scores("nothing of it").any()


async def test_phrases_say_how_a_function_is_asked_for(tmp_path: Path) -> None:
    encoder = TextEncoder(EmbedderConfig(), tmp_path)

    async def embed(texts: list[str], deadline: Deadline) -> Vectors:
        return encoder.encode(texts)

    deadline, query = Deadline.after(60), "Sort it out for Lena, as you did for Karl"
    selector = FunctionSelector(embed)
    without = await selector.select("all", FUNCTIONS, 4, query, deadline)
    assert "github__fork_repository" not in {function.name for function in without}
    asked = ("Do for Ada what you did for Bob", "Put it right for Eva too, please")
    phrases = {"github__fork_repository": asked, "of_no_function": ("x",)}
    chosen = await selector.select("all", FUNCTIONS, 4, query, deadline, phrases=phrases)
    assert chosen[0].name == "github__fork_repository"


async def test_without_an_encoder_the_words_of_phrases_count() -> None:
    phrases = {"time__convert_time": ("xyzzy",)}
    chosen = await FunctionSelector(None).select(
        "all", FUNCTIONS, 4, "please xyzzy now", Deadline.after(60), phrases=phrases
    )
    assert "time__convert_time" in {function.name for function in chosen}


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("Rename 'a b' beach.jpg, please", "Rename 'a b' the image file, please"),
        ("Open (notes/todo.txt).", "Open (the text file)."),
        ("Is ~/api clean?", "Is the folder clean?"),
        ("Read https://example.com/a?b=c.", "Read the URL."),
        ("See docs.example.com/install now", "See the URL now"),
        ("feature/login and v1.2, 24/7, e.g. 3.5", "feature/login and v1.2, 24/7, e.g. 3.5"),
        ("... / !?", "... the folder !?"),
        ("", ""),
    ],
)
def test_of_a_path_or_an_address_the_kind_is_read(said: str, read: str) -> None:
    assert as_read(said) == read


def test_a_long_text_is_read_in_little_time() -> None:
    began_s = time.thread_time()
    for piece in ("a" * 2000, "./" * 1000, "a." * 1000, "-" * 2000, "*.*/" * 500):
        as_read(piece + "!")
    assert time.thread_time() - began_s < 1.0
