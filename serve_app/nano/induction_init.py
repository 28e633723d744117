"""Initial weights in which one pair of heads already copies: an induction circuit to start from.

A head of layer 0 looks at the token before and writes it into a subspace of its own; a head of
layer 1 finds where the current token came before in the context and adds what followed it there.
Small transformers find this circuit by themselves, but late; training on a CPU starts with it and
keeps or changes it as gradients say.

Reference: C. Olsson et al., "In-context learning and induction heads" (2022).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

_EMBEDDING_STD = 0.15
_CONSTANT = 3.0
"""Size of the component all embeddings share, in standard deviations; positional heads read it."""
_FINAL_NORM = 0.25
"""Keeps the first logits small although embeddings are large."""
_POSITION_SHARPNESS = 40.0
_MATCH_SHARPNESS = 3.0
_COPY_STRENGTH = 1.0
_NUM_POSITION_PAIRS = 4
"""Rotary pairs of highest frequency, which tell neighbours apart."""
_FIRST_CONTENT_PAIR = 7
"""Rotary pairs from here on turn slowly enough to compare content across the context."""


@torch.no_grad()
def add_induction_heads(model: LlamaForCausalLM) -> None:
    """Overwrite the embeddings and one head each in layers 0 and 1.

    Args:
        model: Freshly initialised, with at least 2 layers and tied embeddings.
    """
    hidden_size: int = model.config.hidden_size
    head_size: int = model.model.layers[0].self_attn.head_dim
    half = head_size // 2
    previous = hidden_size - head_size  # the last `head_size` dimensions hold the previous token
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0.0, _EMBEDDING_STD)
    embedding[:, 0] = _CONSTANT * _EMBEDDING_STD
    embedding[:, previous:] = 0.0
    model.model.norm.weight.fill_(_FINAL_NORM)
    read_key, read_value = _projection(hidden_size, head_size), _projection(hidden_size, head_size)

    first = model.model.layers[0].self_attn
    frequencies = model.model.rotary_emb.inv_freq
    pairs = torch.arange(_NUM_POSITION_PAIRS)
    scale = math.sqrt(_POSITION_SHARPNESS) / _CONSTANT
    for weight in (first.q_proj.weight, first.k_proj.weight):
        weight[:head_size] = 0.0
    # The score of a distance d is a sum of cos((d - 1) * frequency): highest for the token before.
    first.k_proj.weight[pairs, 0] = scale
    first.q_proj.weight[pairs, 0] = scale * torch.cos(frequencies[pairs])
    first.q_proj.weight[pairs + half, 0] = -scale * torch.sin(frequencies[pairs])
    first.v_proj.weight[:head_size] = read_key
    first.o_proj.weight[:, :head_size] = 0.0
    first.o_proj.weight[previous:, :head_size] = _EMBEDDING_STD * torch.eye(head_size)

    second = model.model.layers[1].self_attn
    slow = torch.arange(_FIRST_CONTENT_PAIR, half)
    rows = torch.cat([slow, slow + half])
    for weight in (second.q_proj.weight, second.k_proj.weight):
        weight[:head_size] = 0.0
    second.q_proj.weight[rows] = _MATCH_SHARPNESS * read_key[rows]
    second.k_proj.weight[rows, previous + rows] = _MATCH_SHARPNESS
    second.v_proj.weight[:head_size] = read_value
    second.o_proj.weight[:, :head_size] = _COPY_STRENGTH * read_value.T


def _projection(hidden_size: int, head_size: int) -> Tensor:
    """(head_size, hidden_size) orthonormal rows that read the token's own dimensions only."""
    num_content = hidden_size - head_size - 1
    orthonormal, _ = torch.linalg.qr(torch.randn(num_content, head_size))
    projection = torch.zeros(head_size, hidden_size)
    projection[:, 1 : 1 + num_content] = orthonormal.T
    return projection
