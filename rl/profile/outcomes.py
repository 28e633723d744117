"""Logged or profiled outcomes as the fit reads them: flat arrays in, sparse matrices out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]

from serve_app.errors import ConfigError
from serve_app.schemas import Pair


class NotMeasured(ConfigError):
    """Too little was measured to judge a policy by."""


@dataclass(frozen=True)
class Outcomes:
    """What pairs did on queries; one entry of the flat arrays per outcome.

    A pair may be missing on a query, and may be there more than once.
    """

    encoder: str
    """Name of the encoder that made the embeddings."""
    embeddings: NDArray[np.float32]
    """(num_queries, dim) unit vectors."""
    pairs: tuple[Pair, ...]
    query_index: NDArray[np.int64]
    """(num_outcomes,) row of `embeddings`."""
    pair_index: NDArray[np.int64]
    """(num_outcomes,) index into `pairs`."""
    score: NDArray[np.float32]
    """(num_outcomes,) in [0, 1]."""
    tokens: NDArray[np.float32]
    """(num_outcomes,) prompt and completion; NaN where unknown."""
    seconds: NDArray[np.float32]
    """(num_outcomes,) NaN where unknown."""
    costs_usd: NDArray[np.float32]
    """(num_outcomes,) NaN where unknown."""
    queries: tuple[str, ...] = field(default=())
    """(num_queries,) texts, for the snapshot's examples, which every caller may see; empty: not to
    be shown. May be left out."""

    def __post_init__(self) -> None:
        """Refuse outcomes that do not fit together.

        Raises:
            ConfigError: If a length, an index or a score is wrong.
        """
        size = len(self.score)
        columns = (self.query_index, self.pair_index, self.tokens, self.seconds, self.costs_usd)
        if not size or any(len(column) != size for column in columns):
            raise ConfigError("outcomes are empty or their columns differ in length")
        if self.queries and len(self.queries) != len(self.embeddings):
            raise ConfigError("there are not as many queries as embeddings")
        for name, index, limit in (
            ("query_index", self.query_index, len(self.embeddings)),
            ("pair_index", self.pair_index, len(self.pairs)),
        ):
            if index.min() < 0 or index.max() >= limit:
                raise ConfigError(f"{name} is not within 0 and {limit - 1}")
        if not ((self.score >= 0) & (self.score <= 1)).all():
            raise ConfigError("a score is not in [0, 1]")
        if not np.isfinite(self.embeddings).all():
            raise ConfigError("an embedding is not finite")

    @classmethod
    def from_table(
        cls,
        table: pa.Table,
        embeddings: NDArray[np.float32],
        pairs: tuple[Pair, ...],
        encoder: str,
        queries: tuple[str, ...] = (),
    ) -> Outcomes:
        """Read an Arrow table of one outcome per row.

        Its columns are `query_index`, `pair_index`, `score`, `tokens`, `seconds` and `cost_usd`;
        the last three may be null or absent.
        """

        def column(name: str) -> NDArray[np.float32]:
            if name not in table.column_names:
                return np.full(len(table), np.nan, np.float32)
            values = table[name].cast(pa.float32()).to_numpy(zero_copy_only=False)
            numbers: NDArray[np.float32] = values.astype(np.float32)
            return numbers

        return cls(
            encoder=encoder,
            embeddings=embeddings,
            pairs=pairs,
            query_index=table["query_index"].to_numpy().astype(np.int64),
            pair_index=table["pair_index"].to_numpy().astype(np.int64),
            score=column("score"),
            tokens=column("tokens"),
            seconds=column("seconds"),
            costs_usd=column("cost_usd"),
            queries=queries,
        )

    def matrices(self, values: NDArray[np.float32]) -> tuple[Any, Any]:
        """Sums and counts of a column per query and pair, unknown values left out.

        Returns:
            Two (num_queries, num_pairs) sparse matrices.
        """
        known = np.isfinite(values)
        place = (self.query_index[known], self.pair_index[known])
        shape = (len(self.embeddings), len(self.pairs))
        sums = sparse.csr_matrix((values[known].astype(np.float32), place), shape=shape)
        ones = np.ones(int(known.sum()), np.float32)
        return sums, sparse.csr_matrix((ones, place), shape=shape)
