"""Is the right function among the four that a model is offered, of all that real servers have?

The six servers of `servers` are started, and what they list goes through our client. `queries.txt`
has four queries for each function, written before any was tried; `phrases.txt` twelve phrases for
each, which stand for `phrases` of a tool's entry. The selection's three numbers were chosen on the
first query of each function and on the phrases, each left out in turn; the other queries count.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from benchmarks.stats import Target
from benchmarks.tools.servers import PYTHON, all_servers
from serve_app.budget import Deadline
from serve_app.config import EmbedderConfig
from serve_app.embedder import TextEncoder, find_model
from serve_app.orchestrator.pairs import selection
from serve_app.orchestrator.pairs.selection import FunctionSelector, Vectors
from serve_app.tools.base import Function
from serve_app.tools.mcp.session import McpSession

OFFERED = 4
NUM_PHRASES = (0, 1, 3, 6, 12)
"""Of each function; the last is what the targets hold for."""
TUNED_EVERY = 4
"""Of so many queries in a row the first was used to choose the selection's numbers."""
MIN_RIGHT = 0.95
MAX_TOKENS_SHARE = 0.10
_SAME = {"filesystem__read_text_file": "filesystem__read_file"}
"""The server calls the second a deprecated name of the first."""
_PATIENCE_S = 120.0

console = Console(width=120)


@dataclass(frozen=True, slots=True)
class Selected:
    """How well functions were selected with so many phrases of each."""

    phrases: int
    queries: int
    right: float
    """Share of the queries whose function was among those offered."""
    tuned_right: float
    """The same of the queries that were used to choose the selection's numbers."""
    tokens: float
    """Mean share of the tokens that offering all takes."""
    missed: list[tuple[str, str]]
    """Function and query."""


def _lines(name: str) -> list[list[str]]:
    text = Path(__file__).with_name(name).read_text()
    return [line.split(" | ") for line in text.splitlines()]


async def functions_of_servers(folder: Path) -> dict[str, tuple[Function, ...]]:
    """What each server offers, through our own client."""
    found: dict[str, tuple[Function, ...]] = {}
    async with AsyncExitStack() as stack:
        for config in all_servers(folder):
            session = McpSession(config)
            stack.push_async_callback(session.close)
            session.start()
            async with asyncio.timeout(_PATIENCE_S):
                while not (state := session.state()).is_up:
                    await asyncio.sleep(0.1)
            session.allow({name: sha256 for name, (sha256, _) in state.definitions.items()})
            found[config.tool_id] = session.functions()
    return found


async def selected(
    functions: Sequence[Function], encoder: TextEncoder, counter: Tokenizer, num_phrases: int
) -> Selected:
    """Select for every query."""
    phrases = {name: said[:num_phrases] for name, *said in _lines("phrases.txt")}

    async def embed(texts: list[str], deadline: Deadline) -> Vectors:
        return await asyncio.to_thread(encoder.encode, texts)

    def tokens(offered: Sequence[Function]) -> int:
        written = json.dumps([function.schema() for function in offered])
        return len(counter.encode(written, add_special_tokens=False).ids)

    selector, everything = FunctionSelector(embed), tuple(functions)
    shares, right, missed = [], [], []
    for name, query in _lines("queries.txt"):
        offered = await selector.select(
            "all", everything, OFFERED, query, Deadline.after(_PATIENCE_S), phrases=phrases
        )
        names = {function.name for function in offered}
        right.append(not names.isdisjoint({name, _SAME.get(name, name)}))
        shares.append(tokens(offered))
        if not right[-1]:
            missed.append((name, query))
    is_tuned = np.arange(len(right)) % TUNED_EVERY == 0
    hits = np.array(right)
    return Selected(
        phrases=num_phrases,
        queries=int((~is_tuned).sum()),
        right=float(hits[~is_tuned].mean()),
        tuned_right=float(hits[is_tuned].mean()),
        tokens=float(np.mean(shares)) / tokens(everything),
        missed=missed,
    )


def run() -> tuple[dict[str, Any], list[Target]]:
    """Start the servers, select, count."""
    selection._WAIT_S = _PATIENCE_S  # a busy machine embeds in time too
    with tempfile.TemporaryDirectory() as folder:
        offered = asyncio.run(functions_of_servers(Path(folder)))
        functions = [function for of_one in offered.values() for function in of_one]
        model = EmbedderConfig()
        encoder = TextEncoder(model, Path(folder))
        counter = Tokenizer.from_file(str(find_model(model.model) / "tokenizer.json"))
        counter.no_truncation()
        found = [
            asyncio.run(selected(functions, encoder, counter, number)) for number in NUM_PHRASES
        ]
    table = Table("phrases", "right of 4", "on tuned queries", "tokens of all")
    for one in found:
        shown = (one.right, one.tuned_right, one.tokens)
        table.add_row(str(one.phrases), *(f"{share:.1%}" for share in shown))
    console.print(table)
    best = found[-1]
    record = {
        "servers": {name: len(of_one) for name, of_one in offered.items()},
        "versions": {name: version(f"mcp-server-{name}") for name in PYTHON},
        "functions": len(functions),
        "selected": [asdict(one) for one in found],
    }
    return record, [
        Target(f"right function among {OFFERED}", best.right, ">=", MIN_RIGHT),
        Target("share of the tokens of all functions", best.tokens, "<=", MAX_TOKENS_SHARE),
    ]
