"""Initial weights with an induction circuit: heads that copy, and heads that mark what was asked.

A head of layer 0 looks at the token before and writes it into a subspace of its own; a head of
layer 1 finds where the current token came before in the context and adds what followed it there. A
second head of layer 1 notes which token it found again, and a head of layer 2 spreads these notes over
the words that follow: the value in a sentence "knows" that its entity was in the question.
Small transformers find this circuit by themselves, but late; training on a CPU starts with it and
keeps or changes it as gradients say.

Reference: C. Olsson et al., "In-context learning and induction heads" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

_EMBEDDING_STD = 0.15
_CONSTANT = 3.0
"""Size of the component all embeddings share, in standard deviations; positional heads read it."""
_FINAL_NORM = 0.25
"""Keeps the first logits small although embeddings are large."""
_POSITION_SHARPNESS = 40.0
_MATCH_SHARPNESS = 3.0
_COPY_STRENGTH = 0.5
_NOTE_STRENGTH = 0.3
_SPREAD_STRENGTH = 2.0
_NUM_POSITION_PAIRS = 4
"""Rotary pairs of highest frequency, which tell neighbours apart."""
_WINDOW_PAIRS = (3, 4, 5)
"""Rotary pairs of middle frequency, which tell nearer from farther words."""
_WINDOW_CENTRE = 5.0
"""Distance, in tokens, at which notes are read most."""
_WINDOW_SHARPNESS = 20.0
_FIRST_CONTENT_PAIR = 7
"""Rotary pairs from here on turn slowly enough to compare content across the context."""


@torch.no_grad()
def add_induction_heads(model: LlamaForCausalLM) -> None:
    """Overwrite the embeddings and a head or two in each of the first three layers.

    Args:
        model: Freshly initialised, with at least 3 layers, tied embeddings and 4 heads' width.
    """
    hidden_size: int = model.config.hidden_size
    head_size: int = model.model.layers[0].self_attn.head_dim
    previous = hidden_size - head_size  # from here on: the previous token
    notes = previous - head_size  # from here on: which tokens were found again
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0.0, _EMBEDDING_STD)
    embedding[:, 0] = _CONSTANT * _EMBEDDING_STD
    embedding[:, notes:] = 0.0
    model.model.norm.weight.fill_(_FINAL_NORM)
    read_key, read_value = _projection(notes, head_size), _projection(notes, head_size)
    first, second, third = (layer.self_attn for layer in model.model.layers[:3])
    for attention in (first, second, third):
        for linear in (attention.q_proj, attention.k_proj):
            linear.weight[: 2 * head_size if attention is second else head_size] = 0.0
    frequencies = model.model.rotary_emb.inv_freq

    _attend_at_distance(first, frequencies, range(_NUM_POSITION_PAIRS), 1.0, _POSITION_SHARPNESS)
    first.v_proj.weight[:head_size] = 0.0
    first.v_proj.weight[:head_size, :notes] = read_key
    first.o_proj.weight[:, :head_size] = 0.0
    first.o_proj.weight[previous:, :head_size] = _EMBEDDING_STD * torch.eye(head_size)

    half = head_size // 2
    slow = torch.arange(_FIRST_CONTENT_PAIR, half)
    pairs = torch.cat([slow, slow + half])
    for rows in (pairs, pairs + head_size):
        second.q_proj.weight[rows, :notes] = _MATCH_SHARPNESS * read_key[pairs]
        second.k_proj.weight[rows, previous + pairs] = _MATCH_SHARPNESS
    second.v_proj.weight[: 2 * head_size] = 0.0
    second.v_proj.weight[:head_size, :notes] = read_value
    second.v_proj.weight[head_size : 2 * head_size, previous:] = torch.eye(head_size)
    second.o_proj.weight[:, : 2 * head_size] = 0.0
    second.o_proj.weight[:notes, :head_size] = _COPY_STRENGTH * read_value.T
    second.o_proj.weight[notes:previous, head_size : 2 * head_size] = _NOTE_STRENGTH * torch.eye(
        head_size
    )

    _attend_at_distance(third, frequencies, _WINDOW_PAIRS, _WINDOW_CENTRE, _WINDOW_SHARPNESS)
    third.v_proj.weight[:head_size] = 0.0
    third.v_proj.weight[:head_size, notes:previous] = torch.eye(head_size)
    third.o_proj.weight[:, :head_size] = 0.0
    third.o_proj.weight[notes:previous, :head_size] = _SPREAD_STRENGTH * torch.eye(head_size)


def _attend_at_distance(
    attention: LlamaAttention,
    frequencies: Tensor,
    pairs: Iterable[int],
    distance: float,
    sharpness: float,
) -> None:
    """Let head 0 score a distance d as a sum of cos((d - distance) * frequency) over rotary pairs."""
    half = attention.head_dim // 2
    scale = math.sqrt(sharpness) / _CONSTANT
    for pair in pairs:
        angle = distance * float(frequencies[pair])
        attention.k_proj.weight[pair, 0] = scale
        attention.q_proj.weight[pair, 0] = scale * math.cos(angle)
        attention.q_proj.weight[pair + half, 0] = -scale * math.sin(angle)


def _projection(num_dims: int, head_size: int) -> Tensor:
    """(head_size, num_dims) orthonormal rows that read a token's own dimensions, not the constant."""
    orthonormal, _ = torch.linalg.qr(torch.randn(num_dims - 1, head_size))
    projection = torch.zeros(head_size, num_dims)
    projection[:, 1:] = orthonormal.T
    return projection
