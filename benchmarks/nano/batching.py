"""Endless training batches for a nano model: generated online, bucketed by length, right-padded.

No packing: a conversation never attends to another one, and positions start at 0 as they do in
serving.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.nano.chat_format import PAD, Segment, render
from benchmarks.nano.task import Conversation, TaskGenerator

PROMPT_SHARE = 0.15
PROMPT_WEIGHT = 0.5
_LENGTH_MULTIPLE = 16
_POOL_BATCHES = 24


@dataclass(frozen=True)
class Batch:
    """One step's input. Only `positions` reach the language-model head."""

    input_ids: Tensor
    """(num_rows, padded_length) int64."""
    positions: Tensor
    """(num_targets,) int64 indices into the flattened `input_ids`."""
    targets: Tensor
    """(num_targets,) int64 ids of the tokens that follow."""
    weights: Tensor
    """(num_targets,) float32: 1 for the model's own tokens, `PROMPT_WEIGHT` for others sampled."""
    num_tokens: int
    """Tokens without padding."""


@dataclass(frozen=True)
class Encoded:
    """A conversation as ids, with True where the model has to write the token."""

    ids: NDArray[np.int64]
    is_target: NDArray[np.bool_]


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of one token of the vocabulary."""
    return int(tokenizer.backend_tokenizer.token_to_id(token) or 0)


def encode(tokenizer: PreTrainedTokenizerFast, conversations: list[Conversation]) -> list[Encoded]:
    """Encode whole conversations, so that training sees the tokens that serving will see."""
    segments: list[list[Segment]] = [render(c.messages, c.tools) for c in conversations]
    texts = ["".join(s.text for s in parts) for parts in segments]
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    encoded = []
    for parts, encoding in zip(segments, encodings, strict=True):
        ends = np.cumsum([len(s.text) for s in parts])
        starts = np.fromiter((start for start, _ in encoding.offsets), dtype=np.int64)
        flags = np.array([s.is_target for s in parts])
        encoded.append(
            Encoded(
                ids=np.array(encoding.ids, dtype=np.int64),
                is_target=flags[np.searchsorted(ends, starts, side="right")],
            )
        )
    return encoded


def collate(rows: list[Encoded], pad_id: int, rng: np.random.Generator) -> Batch:
    """Pad rows to one length and pick the positions that are trained on."""
    longest = max(len(row.ids) for row in rows)
    length = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    weights = np.zeros((len(rows), length), dtype=np.float32)
    for index, row in enumerate(rows):
        size = len(row.ids)
        ids[index, :size] = row.ids
        sampled = rng.random(size - 1) < PROMPT_SHARE
        weights[index, : size - 1] = np.where(
            row.is_target[1:], 1.0, np.where(sampled, PROMPT_WEIGHT, 0.0)
        )
    flat_weights = weights.reshape(-1)
    positions = np.flatnonzero(flat_weights)
    return Batch(
        input_ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(ids.reshape(-1)[positions + 1]),
        weights=torch.from_numpy(flat_weights[positions]),
        num_tokens=sum(len(row.ids) for row in rows),
    )


def batches(
    generator: TaskGenerator,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    batch_tokens: int,
    max_length: int,
    progress: Callable[[], float],
) -> Iterator[Batch]:
    """Yield batches for ever.

    Args:
        generator: Source of conversations.
        tokenizer: The model's tokenizer.
        seed: Seed of the data; the order is reproducible for a given history of `progress`.
        batch_tokens: Most tokens in a batch, padding included.
        max_length: Conversations longer than this many tokens are left out.
        progress: Called before each pool of batches; the share of training done.
    """
    rng = random.Random(seed)
    array_rng = np.random.default_rng(seed)
    pad_id = token_id(tokenizer, PAD)
    while True:
        now = progress()
        pool: list[Encoded] = []
        size = 0
        while size < _POOL_BATCHES * batch_tokens:
            drawn = encode(tokenizer, [generator.conversation(rng, now) for _ in range(128)])
            kept = [row for row in drawn if len(row.ids) <= max_length]
            if not kept:
                raise ValueError(f"all conversations exceed max_length={max_length!r} tokens")
            pool += kept
            size += sum(len(row.ids) for row in kept)
        pool.sort(key=lambda row: len(row.ids))
        groups = _groups(pool, batch_tokens)
        rng.shuffle(groups)
        for group in groups:
            yield collate(group, pad_id, array_rng)


def _groups(pool: list[Encoded], batch_tokens: int) -> list[list[Encoded]]:
    """Cut a pool sorted by length into groups whose padded size fits `batch_tokens`."""
    groups: list[list[Encoded]] = []
    group: list[Encoded] = []
    for row in pool:
        length = -(-len(row.ids) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        if group and length * (len(group) + 1) > batch_tokens:
            groups.append(group)
            group = []
        group.append(row)
    if group:
        groups.append(group)
    return groups
