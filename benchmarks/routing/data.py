"""Outcome tables and their query embeddings: parquet files in, dense arrays out.

A table is one `outcomes_*.parquet` file: one row per query, model and tool. Embeddings are kept on
disk under a name that is a hash of the encoder and of every text, so a changed table or another
encoder never meets a stale file.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from numpy.typing import NDArray
from rich.progress import Progress

from serve_app.config import EmbedderConfig
from serve_app.embedder import TextEncoder, find_model
from serve_app.schemas import Pair

_BLOCK = 256
"""Texts encoded between two steps of the progress bar."""


@dataclass(frozen=True)
class Table:
    """The outcomes of every pair on the queries of one table.

    Invariants:
        - A missing outcome is NaN in `scores`, `tokens` and `costs_usd` alike.
        - Queries are in the order of their ids, pairs in the order of their names.
    """

    name: str
    queries: tuple[str, ...]
    tasks: NDArray[np.str_]
    """(num_queries,) the task of each query."""
    is_test: NDArray[np.bool_]
    """(num_queries,)"""
    pairs: tuple[Pair, ...]
    scores: NDArray[np.float32]
    """(num_queries, num_pairs) in [0, 1]."""
    tokens: NDArray[np.float32]
    """(num_queries, num_pairs) prompt and completion."""
    costs_usd: NDArray[np.float64]
    """(num_queries, num_pairs)"""

    @property
    def train(self) -> NDArray[np.intp]:
        """Indices of the training queries."""
        return np.flatnonzero(~self.is_test)

    @property
    def test(self) -> NDArray[np.intp]:
        """Indices of the test queries."""
        return np.flatnonzero(self.is_test)

    @property
    def coverage(self) -> float:
        """Share of (query, pair) outcomes that are known."""
        return float(np.isfinite(self.scores).mean())


def find_tables(folder: Path) -> dict[str, Path]:
    """Name to file of every `outcomes_*.parquet` under a folder.

    Raises:
        ValueError: If there is none, or two of one name.
    """
    tables: dict[str, Path] = {}
    for path in sorted(folder.rglob("outcomes_*.parquet")):
        name = path.stem.removeprefix("outcomes_")
        if name in tables:
            raise ValueError(f"table {name!r} is twice under {str(folder)!r}")
        tables[name] = path
    if not tables:
        raise ValueError(f"no outcomes_*.parquet under {str(folder)!r}")
    return tables


def load_table(name: str, path: Path, heldout: Path | None = None) -> Table:
    """Read one table; with `heldout`, all of `path` is training and all of `heldout` is test."""
    rows = pq.read_table(path)
    if heldout is not None:
        rows = pa.concat_tables(
            [_with_split(rows, "train"), _with_split(pq.read_table(heldout), "test")],
            promote_options="permissive",
        )
    names, pair_index = np.unique(_pair_names(rows), return_inverse=True)
    _, first, query_index = np.unique(
        rows["query_id"].to_numpy(zero_copy_only=False).astype(str),
        return_index=True,
        return_inverse=True,
    )
    shape = (len(first), len(names))

    def dense(column: pa.ChunkedArray) -> NDArray[np.float64]:
        matrix = np.full(shape, np.nan)
        matrix[query_index, pair_index] = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return matrix

    def per_query(column: str) -> NDArray[np.str_]:
        values: NDArray[np.str_] = rows[column].to_numpy(zero_copy_only=False)[first].astype(str)
        return values

    scores = dense(rows["score"])
    costs = np.where(np.isnan(scores), np.nan, dense(rows["cost_usd"]))
    tokens = dense(pc.add(rows["prompt_tokens"], rows["completion_tokens"]))
    return Table(
        name=name,
        queries=tuple(rows["query"].take(pa.array(first)).to_pylist()),
        tasks=per_query("task"),
        is_test=per_query("split") == "test",
        pairs=tuple(Pair.parse(str(pair)) for pair in names),
        scores=scores.astype(np.float32),
        tokens=np.where(np.isnan(scores), np.nan, tokens).astype(np.float32),
        costs_usd=costs,
    )


def embeddings(
    table: Table, encoder_name: str, cache_dir: Path, progress: Progress
) -> NDArray[np.float32]:
    """(num_queries, dim) unit vectors of a table's queries, from the cache where it has them."""
    config = EmbedderConfig(model=encoder_name)
    cache_dir.mkdir(parents=True, exist_ok=True)
    path = cache_dir / embedding_file(table.queries, config)
    if path.is_file():
        cached: NDArray[np.float32] = np.load(path, allow_pickle=False)
        return cached
    encoder = TextEncoder(config, cache_dir)
    task = progress.add_task(f"{table.name}: embedding", total=len(table.queries))
    # Texts of like length together: less padding.
    order = sorted(range(len(table.queries)), key=lambda i: len(table.queries[i]))
    vectors = np.empty((len(order), encoder.dim), np.float32)
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK]
        for small in range(0, len(block), config.max_batch_size):
            part = block[small : small + config.max_batch_size]
            vectors[part] = encoder.encode([table.queries[i] for i in part])
        progress.advance(task, len(block))
    progress.remove_task(task)
    with tempfile.NamedTemporaryFile(dir=cache_dir, delete=False) as file:
        np.save(file, vectors)
    os.replace(file.name, path)
    return vectors


def embedding_file(queries: Sequence[str], config: EmbedderConfig) -> str:
    """Name of the cache file of these texts under these weights: a hash of both."""
    digest = hashlib.sha256(str(config.max_tokens).encode())
    for path in sorted(find_model(config.model).glob("*.safetensors")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    for text in queries:
        digest.update(hashlib.sha256(text.encode()).digest())
    return f"{digest.hexdigest()[:32]}.npy"


def _pair_names(rows: pa.Table) -> NDArray[np.str_]:
    """`model@tool` of every row.

    Where each query comes with a tool of its own (its service), the tool is part of the question
    and not of the choice, so all are called `given`.
    """
    models = rows["model"].cast(pa.string())
    tools = rows["tool"].cast(pa.string())
    per_query = rows.group_by("query_id").aggregate([("tool", "count_distinct")])
    if pc.max(per_query["tool_count_distinct"]).as_py() == 1 and len(tools.unique()) > 1:
        tools = pa.chunked_array([pa.array(["given"] * len(rows))])
    joined = pc.binary_join_element_wise(models, tools, "@")
    names: NDArray[np.str_] = joined.to_numpy(zero_copy_only=False).astype(str)
    return names


def _with_split(rows: pa.Table, split: str) -> pa.Table:
    index = rows.schema.get_field_index("split")
    return rows.set_column(index, "split", pa.array([split] * len(rows)))
