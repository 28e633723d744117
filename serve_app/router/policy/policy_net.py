"""PolicyNet: the network of path 2, as it serves.

In come the arrays of `router.policy.features`, out goes a logit per action. Each pair is a token of
a set. Nothing depends on which pairs there are, how many, or in which order, so a pair added after
training has a logit like any other. `rl.ppo.torch_policy_net` is the same network while it learns;
a test holds one against the other. This one needs NumPy alone: a decision on 20 candidates takes a
fraction of what the many small calls of a deep-learning library take, and a router loads none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import SnapshotError
from serve_app.router.policy.features import DESCRIPTOR_DIM, NUM_CONTEXT, NUM_FEATURES

Float = NDArray[np.float32]
Tensors = Mapping[str, NDArray[np.floating]]

ILLEGAL_LOGIT = -1e9
"""Of an action that may not be taken; its probability is exactly 0."""
NUM_SLOTS = 2
HEADS_KEY = "num_heads"
WORTH_WEIGHT_KEY = "worth_weight"
LOGIT_REACH = 20.0
"""What is learned stays within this of 0: no legal action's probability underflows to 0 in
float32."""
NORM_EPSILON = 1e-5
_EARLIER_FEATURES, _EARLIER_CONTEXT = DESCRIPTOR_DIM + 18, 17
"""Of networks from before there was a verifier."""


class PolicyNet:
    """Scores a set of candidates, and `think` and `answer` beside them.

    A shared encoder makes each candidate a token, with the query, the last answer and the context
    added to every one. In each round of attention a few learned slots look at all tokens and each
    other (the inducing points of the Set Transformer, Lee et al., 2019), and every token then takes
    in what they saw: linear in the number of candidates, which is what makes it fast. The first two
    slots are `think` and `answer`. A pointer head (Vinyals et al., 2015) turns tokens and slots
    into their actions' logits.

    The logits are a residual: what the rule `voi` says an action is worth is added to them, and
    they are 0 before anything is learned. So an untrained network decides as that rule.
    """

    def __init__(self, tensors: Tensors) -> None:
        """Lay the weights out for inference.

        Args:
            tensors: As `TorchPolicyNet.to_tensors` gives them. Those of a network from before there
                was a residual, which had fewer features, decide as they did.

        Raises:
            SnapshotError: If a tensor is missing, unknown, of a wrong shape, or not finite.
        """
        weights = checked(tensors)
        of = {name: np.asarray(array, np.float32) for name, array in weights.tensors.items()}
        self._query, self._answer, self._context = (
            of[f"{name}.weight"].T for name in ("query", "answer", "context")
        )
        self._request_bias = of["query.bias"]
        # Slots and what every token takes of the request are one product.
        self._spread = np.concatenate([of["to_slots.weight"], of["to_tokens.weight"]]).T
        self._spread_bias = np.concatenate([of["to_slots.bias"], of["to_tokens.bias"]])
        self._candidate = of["candidate.weight"].T
        self._rounds = [
            _Round({n.removeprefix(f"layers.{i}."): a for n, a in of.items()}, weights.num_heads)
            for i in range(weights.num_layers)
        ]
        self._pair_logit, self._pair_bias = (
            of["candidate_logit.weight"][0],
            of["candidate_logit.bias"],
        )
        self._slot_logits, self._slot_bias = of["slot_logits.weight"].T, of["slot_logits.bias"]
        self._worth_weight = of[WORTH_WEIGHT_KEY]
        self._width = weights.width

    def logits(self, observation: Mapping[str, Float]) -> Float:
        """(B, P + 2) a logit per action, `ILLEGAL_LOGIT` where the mask is 0.

        Args:
            observation: As `features.encode` makes it: `query` and `answer` (B, dim), `context`
                (B, NUM_CONTEXT), `candidates` (B, P, NUM_FEATURES), `worth` and `mask` (B, P + 2).
                A candidate whose row is zero is not there.

        Raises:
            ValueError: If the shapes do not fit the weights.
        """
        candidates = observation["candidates"]
        size = len(candidates)
        request = observation["query"] @ self._query + self._request_bias
        request += observation["answer"] @ self._answer
        request += observation["context"] @ self._context
        np.maximum(request, 0.0, out=request)
        spread = request @ self._spread + self._spread_bias
        slots = spread[:, : NUM_SLOTS * self._width].reshape(size, NUM_SLOTS, self._width)
        tokens = _times(candidates, self._candidate)
        tokens += spread[:, None, NUM_SLOTS * self._width :]
        np.maximum(tokens, 0.0, out=tokens)
        absent = ~candidates.any(axis=2)
        hidden = np.where(absent, np.float32(ILLEGAL_LOGIT), np.float32(0.0))[:, None, :]
        for attention in self._rounds:
            tokens, slots = attention(tokens, slots, hidden)
        learned = np.concatenate(
            [
                tokens @ self._pair_logit + self._pair_bias,
                slots.reshape(size, -1) @ self._slot_logits + self._slot_bias,
            ],
            axis=1,
        )
        learned = np.float32(LOGIT_REACH) * np.tanh(learned / np.float32(LOGIT_REACH))
        learned += self._worth_weight * observation["worth"]
        logits: Float = np.where(observation["mask"] == 0, np.float32(ILLEGAL_LOGIT), learned)
        return logits


class _Round:
    """The slots look at all tokens; every token takes in what they saw.

    A head's keys and values are linear in the tokens, so the slots' side of the product carries
    their weights: there are two slots and many tokens. The weights of asking and of the keys, and
    those of the values and of taking them in, are multiplied beforehand.
    """

    def __init__(self, of: Mapping[str, Float], num_heads: int) -> None:
        keys, values = of["keys"], of["values"]
        part, width = keys.shape[1:]
        asked = of["asked.weight"].reshape(num_heads, part, width)
        ask = asked.transpose(0, 2, 1) @ keys / np.float32(np.sqrt(part))  # (heads, width, width)
        wide = ask.transpose(1, 0, 2).reshape(width, num_heads * width)
        self._ask = of["norm.weight"][:, None] * wide
        self._ask_bias = of["norm.bias"] @ wide
        seen = of["seen.weight"].T.reshape(num_heads, part, width)
        self._take = (values @ seen).reshape(num_heads * width, width)
        self._take_bias = of["seen.bias"]
        self._widen, self._widen_bias = of["widen.weight"].T, of["widen.bias"]
        self._narrow, self._narrow_bias = of["narrow.weight"].T, of["narrow.bias"]
        self._told, self._told_bias = of["told.weight"].T, of["told.bias"]
        self._token = of["token.weight"].T

    def __call__(self, tokens: Float, slots: Float, hidden: Float) -> tuple[Float, Float]:
        """Take (B, P, width) tokens, (B, 2, width) slots, and (B, 1, P) what to add to scores."""
        size, _, width = tokens.shape
        apart = slots - slots.sum(axis=2, keepdims=True) / np.float32(width)
        varied = np.square(apart).sum(axis=2, keepdims=True) / np.float32(width)
        apart /= np.sqrt(varied + np.float32(NORM_EPSILON))
        asked = (apart @ self._ask + self._ask_bias).reshape(size, -1, width)
        scores = asked @ tokens.transpose(0, 2, 1)
        scores += hidden
        scores -= scores.max(axis=2, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=2, keepdims=True)
        read = (scores @ tokens).reshape(size, NUM_SLOTS, -1)
        flat: Float = (slots + (read @ self._take + self._take_bias)).reshape(size, -1)
        mixed = flat @ self._widen + self._widen_bias
        np.maximum(mixed, 0.0, out=mixed)
        flat += mixed @ self._narrow + self._narrow_bias
        told = flat @ self._told + self._told_bias
        added = _times(tokens, self._token)
        added += told[:, None, :]
        np.maximum(added, 0.0, out=added)
        added += tokens
        return added, flat.reshape(size, NUM_SLOTS, width)


def _times(tokens: Float, weight: Float) -> Float:
    """(B, P, width) tokens by one matrix, as one product and not one for each request."""
    size, num_tokens, width = tokens.shape
    product: Float = tokens.reshape(size * num_tokens, width) @ weight
    return product.reshape(size, num_tokens, -1)


@dataclass(frozen=True)
class Weights:
    """The tensors of a policy, and the sizes that they show."""

    dim: int
    width: int
    num_heads: int
    num_layers: int
    tensors: Mapping[str, NDArray[np.floating]]
    """By name, without the number of heads."""


def checked(tensors: Tensors) -> Weights:
    """The weights, with a zero for each feature that an earlier network did not have.

    Raises:
        SnapshotError: If a tensor is missing, unknown, of a wrong shape, or not finite.
    """
    whole = _completed(tensors)
    try:
        dim, width = whole["query.weight"].shape[::-1]
        (num_heads,) = (int(number) for number in whole[HEADS_KEY])
        if min(dim, width, num_heads) < 1 or width % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide the width {width}")
    except (KeyError, ValueError, OverflowError) as error:
        raise SnapshotError(f"these are no weights of a policy: {error}") from error
    num_layers = len({name.split(".")[1] for name in whole if name.startswith("layers.")})
    wanted = _shapes(dim, width, num_heads, max(num_layers, 1))
    del whole[HEADS_KEY]
    if whole.keys() != wanted.keys():
        different = sorted(whole.keys() ^ wanted.keys())
        raise SnapshotError(f"the policy lacks or has too many of the tensors {different}")
    for name, shape in wanted.items():
        if whole[name].shape != shape:
            raise SnapshotError(
                f"the policy's {name} has shape {whole[name].shape}, expected {shape}"
            )
        if not np.isfinite(whole[name]).all():
            raise SnapshotError(f"the policy's {name} holds a value that is not finite")
    return Weights(dim, width, num_heads, num_layers, whole)


def _completed(tensors: Tensors) -> dict[str, NDArray[np.floating]]:
    whole = dict(tensors)
    whole.setdefault(WORTH_WEIGHT_KEY, np.zeros(1, np.float32))
    for name, before, now in (
        ("candidate.weight", _EARLIER_FEATURES, NUM_FEATURES),
        ("context.weight", _EARLIER_CONTEXT, NUM_CONTEXT),
    ):
        if name in whole and whole[name].ndim == 2 and whole[name].shape[1] == before:
            whole[name] = np.pad(whole[name], ((0, 0), (0, now - before)))
    return whole


def _shapes(dim: int, width: int, num_heads: int, num_layers: int) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a network of these sizes."""
    slots, part = NUM_SLOTS * width, width // num_heads
    shapes: dict[str, tuple[int, ...]] = {WORTH_WEIGHT_KEY: (1,)}

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    linear("query", dim, width)
    linear("answer", dim, width, bias=False)
    linear("context", NUM_CONTEXT, width, bias=False)
    linear("to_tokens", width, width)
    linear("to_slots", width, slots)
    linear("candidate", NUM_FEATURES, width, bias=False)
    linear("candidate_logit", width, 1)
    linear("slot_logits", slots, 2)
    linear("critic", slots, width)
    linear("value", width, 1)
    for layer in (f"layers.{number}" for number in range(num_layers)):
        shapes[f"{layer}.norm.weight"] = shapes[f"{layer}.norm.bias"] = (width,)
        shapes[f"{layer}.keys"] = (num_heads, part, width)
        shapes[f"{layer}.values"] = (num_heads, width, part)
        linear(f"{layer}.asked", width, width, bias=False)
        linear(f"{layer}.seen", width, width)
        linear(f"{layer}.widen", slots, 2 * width)
        linear(f"{layer}.narrow", 2 * width, slots)
        linear(f"{layer}.told", slots, width)
        linear(f"{layer}.token", width, width, bias=False)
    return shapes
