"""Initial weights in which a few heads already copy what a question asks for.

Two circuits to start from; training on a CPU keeps or changes them as gradients say, where a small
transformer would find them late or never:

- Induction. A head of layer 0 notes the token before; a head of layer 1 finds where the current
  token came before in the context and adds what followed it there.
- Binding. A head of layer 0 notes the last *name token* so far, so that all words after a name
  carry it; heads of layers 1 and 2 find the words that carry the same name as the current one and
  add them. With the question last, the answer carries the name that was asked for and so finds the
  sentence about it, however alike the other sentences are.

Reference: C. Olsson et al., "In-context learning and induction heads" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

_Part = tuple[slice, slice]
_EMBEDDING_STD = 0.5
_CONSTANT = 3.0
"""Size of the component all embeddings share, in standard deviations; positional heads read it."""
_CONSTANT_DIM = 0
_NAME_DIM = 1
"""Holds the component, as large as the constant, that only name tokens share."""
_SPACE_DIM = 2
"""Holds all that tells a token from the same one without a space before it."""
_FIRST_CONTENT_DIM = 3
_SPACE = "\u0120"
"""How byte-level BPE writes a leading space."""
_FINAL_NORM = 0.15
"""Keeps the first logits small although embeddings are large."""
_POSITION_SHARPNESS = 40.0
_INDUCTION_SHARPNESS = 3.0
_BINDING_SHARPNESS = 2.0
_NAME_STRENGTH = 0.75
"""Large enough that names are still told apart when later writes share the normalisation."""
_INDUCTION_STRENGTH = 0.5
_BINDING_STRENGTH = 1.0
_FAR_SHARPNESS = 24.0
_FAR_PAIR = 6
"""Rotary pair by which the binding head prefers the sources to the question's own words."""
_PREVIOUS_TOKEN_PAIRS = range(4)
"""Rotary pairs of highest frequency, which tell neighbours apart."""
_RECENCY_SHARPNESS: Mapping[int, float] = {7: 80.0, 9: 80.0}
"""By rotary pair: how fast the score of a name falls with its distance, over some 150 tokens."""
_NAME_SHARPNESS = 110.0
"""How far any name scores above other tokens; more than distance can take away."""
_NAME_PAIR = 15
_FIRST_MATCH_PAIR = 7
"""Rotary pairs from here on turn slowly enough to compare content across the context."""


@torch.no_grad()
def add_induction_heads(
    model: LlamaForCausalLM, vocabulary: Mapping[str, int], name_tokens: Sequence[str] = ()
) -> None:
    """Overwrite the embeddings and a head or two in each of the first three layers.

    Args:
        model: Freshly initialised, with tied embeddings and at least 3 layers of 4 heads.
        vocabulary: Ids of all tokens.
        name_tokens: Tokens that tell names apart; without any, only induction is set up.
    """
    hidden_size: int = model.config.hidden_size
    head_size: int = model.model.layers[0].self_attn.head_dim
    embedding = model.model.embed_tokens.weight
    previous = slice(hidden_size - head_size, hidden_size)
    name = slice(previous.start - head_size, previous.start) if name_tokens else previous
    content = slice(_FIRST_CONTENT_DIM, name.start)
    embedding.normal_(0.0, 1.0)
    embedding[:, content.stop :] = 0.0
    embedding[:, _SPACE_DIM] = 0.0
    spaced = [token for token in vocabulary if token.startswith(_SPACE)]
    for token in spaced:
        bare = vocabulary.get(token.removeprefix(_SPACE))
        if bare is not None:
            # A word copied to the start of an answer loses its space: same content, same match.
            embedding[vocabulary[token]] = embedding[bare]
    # Of one length, since a name's score depends on it.
    embedding *= _EMBEDDING_STD * math.sqrt(content.stop) / embedding.norm(dim=1, keepdim=True)
    embedding[[vocabulary[t] for t in spaced], _SPACE_DIM] = _CONSTANT * _EMBEDDING_STD
    embedding[:, _CONSTANT_DIM] = _CONSTANT * _EMBEDDING_STD
    model.model.norm.weight.fill_(_FINAL_NORM)
    first, second, third = (layer.self_attn for layer in model.model.layers[:3])

    _attend_to_previous(first, model.model.rotary_emb.inv_freq)
    read = _projection(content, head_size, hidden_size)
    _note(first, 0, read, previous, _EMBEDDING_STD)
    _match(second, 0, read, _identity(previous, hidden_size), _INDUCTION_SHARPNESS)
    _copy(second, 0, _projection(content, head_size, hidden_size), _INDUCTION_STRENGTH)
    if not name_tokens:
        return
    embedding[:, _NAME_DIM] = 0.0
    names = [vocabulary[token] for token in name_tokens if token in vocabulary]
    embedding[names, _NAME_DIM] = _CONSTANT * _EMBEDDING_STD
    _attend_to_last_name(first, model.model.rotary_emb.inv_freq)
    _note(first, 1, _projection(content, head_size, hidden_size), name, _NAME_STRENGTH)
    carried = _identity(name, hidden_size)
    far = math.sqrt(_FAR_SHARPNESS) / _CONSTANT
    for attention in (second, third):
        _match(attention, 1, carried, carried, _BINDING_SHARPNESS)
        _score_by_distance(attention, 1, _FAR_PAIR, far, math.pi, _CONSTANT_DIM)
        _copy(attention, 1, _projection(content, head_size, hidden_size), _BINDING_STRENGTH)
    _freeze(model, content)


def _freeze(model: LlamaForCausalLM, content: slice) -> None:
    """Keep names noted and matched as they are: early, noisy steps would take that apart.

    Nothing else writes where the notes are until they have been read. Held parts get no gradient,
    and what weight decay takes from them is put back before every forward pass.
    """
    first, second, third = model.model.layers[:3]
    every, notes = slice(None), slice(content.stop, None)
    parts: list[tuple[Tensor, _Part]] = []
    noting = slice(0, 2 * first.self_attn.head_dim)
    for linear in (first.self_attn.q_proj, first.self_attn.k_proj, first.self_attn.v_proj):
        parts.append((linear.weight, (noting, every)))
    parts.append((first.self_attn.o_proj.weight, (every, noting)))
    for layer in (first, second):
        outputs = [layer.mlp.down_proj.weight, layer.self_attn.o_proj.weight]
        for weight in outputs:
            others = slice(noting.stop, None) if weight is first.self_attn.o_proj.weight else every
            weight[notes, others] = 0.0
            parts.append((weight, (notes, every)))
    for attention in (second.self_attn, third.self_attn):
        for linear in (attention.q_proj, attention.k_proj):
            parts.append((linear.weight, (_rows(attention, 1), notes)))
    embedding = model.model.embed_tokens.weight
    parts.append((embedding, (every, slice(0, _NAME_DIM + 1))))
    parts.append((embedding, (every, notes)))
    for weight, part in parts:
        _stop_gradient(weight, part)
    values = [(weight, part, weight[part].clone()) for weight, part in parts]

    def restore(module: nn.Module, inputs: object) -> None:
        with torch.no_grad():
            for weight, part, value in values:
                weight[part] = value

    model.model.register_forward_pre_hook(restore)


def _stop_gradient(weight: Tensor, part: _Part) -> None:
    mask = torch.ones_like(weight)
    mask[part] = 0.0
    weight.register_hook(lambda gradient: gradient * mask)  # type: ignore[no-untyped-call]


def _attend_to_previous(attention: LlamaAttention, frequencies: Tensor) -> None:
    """Head 0 scores a distance d by a sum of cos((d - 1) * frequency), highest at 1."""
    _clear(attention, 0)
    scale = math.sqrt(_POSITION_SHARPNESS) / _CONSTANT
    for pair in _PREVIOUS_TOKEN_PAIRS:
        _score_by_distance(attention, 0, pair, scale, -float(frequencies[pair]), _CONSTANT_DIM)


def _attend_to_last_name(attention: LlamaAttention, frequencies: Tensor) -> None:
    """Head 1 scores a name token at distance d by 1 minus a sum of sin(d * frequency)."""
    _clear(attention, 1)
    scale = math.sqrt(_NAME_SHARPNESS) / _CONSTANT
    _score_by_distance(attention, 1, _NAME_PAIR, scale, 0.0, _NAME_DIM)
    for pair, sharpness in _RECENCY_SHARPNESS.items():
        scale = math.sqrt(sharpness) / _CONSTANT
        _score_by_distance(attention, 1, pair, scale, math.pi / 2, _NAME_DIM)


def _score_by_distance(
    attention: LlamaAttention, head: int, pair: int, scale: float, phase: float, key_dim: int
) -> None:
    """Add cos(d * frequency + phase) to the score of keys that have `key_dim`."""
    half = attention.head_dim // 2
    row = head * attention.head_dim + pair
    attention.k_proj.weight[row, key_dim] = scale
    attention.q_proj.weight[row, _CONSTANT_DIM] = scale * math.cos(phase)
    attention.q_proj.weight[row + half, _CONSTANT_DIM] = scale * math.sin(phase)


def _match(attention: LlamaAttention, head: int, query: Tensor, key: Tensor, scale: float) -> None:
    """Score by the product of what `query` and `key` read, on slowly turning pairs only."""
    _clear(attention, head)
    half = attention.head_dim // 2
    slow = torch.arange(_FIRST_MATCH_PAIR, half)
    dims = torch.cat([slow, slow + half])
    rows = dims + head * attention.head_dim
    attention.q_proj.weight[rows] = scale * query[dims]
    attention.k_proj.weight[rows] = scale * key[dims]


def _note(
    attention: LlamaAttention, head: int, read: Tensor, target: slice, strength: float
) -> None:
    """Write what `read` finds in the attended token into dimensions of their own."""
    rows = _rows(attention, head)
    attention.v_proj.weight[rows] = read
    attention.o_proj.weight[:, rows] = 0.0
    attention.o_proj.weight[target, rows] = strength * torch.eye(attention.head_dim)


def _copy(attention: LlamaAttention, head: int, read: Tensor, strength: float) -> None:
    """Add the attended token's content to the current one, which makes it the likely next token."""
    rows = _rows(attention, head)
    attention.v_proj.weight[rows] = read
    attention.o_proj.weight[:, rows] = strength * read.T


def _clear(attention: LlamaAttention, head: int) -> None:
    rows = _rows(attention, head)
    attention.q_proj.weight[rows] = 0.0
    attention.k_proj.weight[rows] = 0.0


def _rows(attention: LlamaAttention, head: int) -> slice:
    return slice(head * attention.head_dim, (head + 1) * attention.head_dim)


def _identity(dims: slice, hidden_size: int) -> Tensor:
    """(number of dims, hidden_size) rows that read `dims` as they are."""
    return torch.eye(hidden_size)[dims]


def _projection(content: slice, head_size: int, hidden_size: int) -> Tensor:
    """(head_size, hidden_size) random orthonormal rows that read the token's own content only."""
    orthonormal, _ = torch.linalg.qr(torch.randn(content.stop - content.start, head_size))
    projection = torch.zeros(head_size, hidden_size)
    projection[:, content] = orthonormal.T
    return projection
