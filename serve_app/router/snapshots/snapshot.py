"""The versioned, immutable router artifact: what fitting writes and every router replica reads.

On disk it is a folder: `tensors.safetensors` and `snapshot.json`, which holds the schema version,
the names and numbers, and the sha256 of the tensors and of itself. A folder appears under its name
only when it is complete. Reading checks everything before anything is used; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from serve_app.errors import SnapshotError
from serve_app.schemas import Pair

SCHEMA_VERSION = 1
KIND = "atlas-router-snapshot"
TENSORS_FILE = "tensors.safetensors"
DOCUMENT_FILE = "snapshot.json"
POLICY_PREFIX = "policy."
"""Tensors under this prefix are weights of the learned policy; their shapes are its own affair."""
VERIFIER_PREFIX = "verifier."
"""Tensors under this prefix are the verifier's; see `router.policy.verifier`."""
LOOK_PREFIX = "look."
"""Tensors under this prefix are the first look's; see `router.rules.first_look`."""
GATE_THRESHOLD = "gate.threshold"
"""Among the policy's tensors: (1,) confidence from which path 1 keeps a request."""
LEARNED_UNTIL = "learned_until_unix_s"
CARD_COSTS = "card_costs_usd"
THINKS = "thinks"
VOTERS = "voters"
RULE = "rule"
VERIFIER = "verifier"
LOOK = "look"
"""Keys of the metadata that the properties of `RouterSnapshot` read."""
VOI_RULE = "voi"
"""Value of `RULE`: the value of information says whether another candidate runs."""
_PROFILE = "profile"
"""In the document: its examples are questions of the profile."""
_MAX_EXAMPLE_CHARS = 200

Array = NDArray[np.float32]

_SHAPES: dict[str, tuple[str | int, ...]] = {
    "centroids": ("clusters", "dim"),
    "score_alpha": ("clusters", "pairs"),
    "score_beta": ("clusters", "pairs"),
    "tokens": ("clusters", "pairs"),
    "seconds": ("clusters", "pairs"),
    "costs_usd": ("clusters", "pairs"),
    "pair_alpha": ("pairs",),
    "pair_beta": ("pairs",),
    "pair_costs_usd": ("pairs",),
    "landmarks": ("landmarks", "dim"),
    "head_in": ("landmarks", "rank"),
    "head_out": ("rank", "pairs"),
    "prior_weights": ("descriptor",),
    "distance_quantiles": ("quantiles",),
    "gate_head": ("landmarks",),
    "gate_weights": (5,),
}
_POSITIVE = ("score_alpha", "score_beta", "pair_alpha", "pair_beta")
_NOT_NEGATIVE = ("tokens", "seconds", "costs_usd", "pair_costs_usd", "distance_quantiles")


class Scale(NamedTuple):
    """One clustering among several of different fineness."""

    num_clusters: int
    nearest: int
    """Clusters a query is shared among, at least 1."""
    weight: float
    """Share of this scale in the clusters' quality; those of all scales sum to 1."""


@dataclass(frozen=True)
class RouterSnapshot:
    """Everything path 1 needs to decide. All arrays are finite float32.

    Expected quality of pair p for an embedding x (see `router.rules.beliefs`):
    `(1 - head_weight) * sum_k a_k(x) mean[k, p] + head_weight * (pair_mean[p] + head(x)[p])
    + card_weight * (likeness(x)[p] - mean over the pairs)`.
    """

    version: int
    """Policy version; only rises."""
    encoder: str
    """The encoder's name; embeddings of another one mean nothing here."""
    pairs: tuple[Pair, ...]
    centroids: Array
    """(clusters, dim) means of unit vectors, not normalised; those of all scales, one after
    another."""
    scales: tuple[Scale, ...]
    """How the centroids are grouped, in their order."""
    temperature: float
    """Difference in squared distance that makes a cluster e times lighter; above 0."""
    score_alpha: Array
    """(clusters, pairs) first parameter of the Beta posterior of the score."""
    score_beta: Array
    """(clusters, pairs) second one."""
    tokens: Array
    """(clusters, pairs) mean tokens of a request, prompt and completion; 0 where unknown."""
    seconds: Array
    """(clusters, pairs) mean seconds of a request; 0 where unknown."""
    costs_usd: Array
    """(clusters, pairs) mean US dollars of a request."""
    pair_alpha: Array
    """(pairs,) Beta posterior of the score over all queries."""
    pair_beta: Array
    """(pairs,)"""
    pair_costs_usd: Array
    """(pairs,) mean US dollars of a request over all queries; what alpha weighs."""
    landmarks: Array
    """(landmarks, dim) unit vectors the head compares a query with; may be empty."""
    head_in: Array
    """(landmarks, rank)"""
    head_out: Array
    """(rank, pairs)"""
    head_gamma: float
    """Width of the head's kernel exp(-gamma * squared distance)."""
    head_weight: float
    """Share of the head in the quality, in [0, 1]; 0 is clusters alone."""
    card_weight: float
    """Score points that one point of cosine similarity to a pair's card is worth; 0 where the cards
    say nothing that the outcomes do not."""
    outside_card_weight: float
    """The same outside the profiled distribution, where the cards rank the pairs; 0: the pairs'
    means over all queries do."""
    caution: float
    """Standard deviations by which a pair must be better than the one that is best overall to take
    its place; see `router.rules.gate`."""
    prior_weights: Array
    """(descriptor,) what a pair's descriptor says of its mean score; may be empty."""
    prior_bias: float
    """Mean score of a pair with a descriptor of zeros."""
    distance_quantiles: Array
    """(quantiles,) ascending: relative distance of held-out training queries (see
    `ClusterBeliefs.distance`) at evenly spaced quantiles from 0 to 1."""
    trusted_quantile: float
    """Quantile in [0, 1] past which a query counts as outside the profiled distribution."""
    gate_head: Array
    """(landmarks,) with the head's kernel: logit by which decisions on like queries were right more
    often than on all."""
    gate_weights: Array
    """(5,) logistic calibration of the confidence; see `router.rules.gate`."""
    examples: tuple[tuple[str, ...], ...]
    """(clusters,) questions of the profile nearest to each centroid, which every caller may see:
    never what a caller asked. May be empty tuples."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """How it was made: seed, counts, chosen settings, cross-validated figures."""
    policy: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Weights of the learned policy by name; empty without one."""
    verifier: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Arrays of the verifier by name; empty without one."""
    look: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Arrays of the first look by name; empty without one."""

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            SnapshotError: If a shape, a value or a range is wrong.
        """
        if self.version < 1 or not self.encoder or not self.pairs:
            raise SnapshotError("a snapshot needs a version of at least 1, an encoder and pairs")
        if len(set(self.pairs)) != len(self.pairs):
            raise SnapshotError("a snapshot holds a pair twice")
        self._check_arrays()
        if self.voters.shape != (len(self.pairs),):
            raise SnapshotError(f"{len(self.pairs)} pairs have {self.voters.shape} voters")
        num_clusters = len(self.centroids)
        if not num_clusters or not len(self.distance_quantiles):
            raise SnapshotError("a snapshot needs a centroid and distance quantiles")
        if len(self.examples) != num_clusters:
            raise SnapshotError(
                f"a snapshot has examples of {len(self.examples)} clusters, but {num_clusters}"
            )
        if (
            sum(scale.num_clusters for scale in self.scales) != num_clusters
            or any(not 1 <= scale.nearest <= scale.num_clusters for scale in self.scales)
            or any(not 0 <= scale.weight <= 1 for scale in self.scales)
            or abs(sum(scale.weight for scale in self.scales) - 1) > 1e-3
        ):
            raise SnapshotError(f"scales {self.scales!r} do not fit {num_clusters} centroids")
        for name, low, high in (
            ("temperature", 1e-9, 1e9),
            ("head_gamma", 0.0, 1e9),
            ("head_weight", 0.0, 1.0),
            ("card_weight", 0.0, 1e3),
            ("outside_card_weight", 0.0, 1e3),
            ("caution", 0.0, 1e3),
            ("prior_bias", -1e9, 1e9),
            ("trusted_quantile", 0.0, 1.0),
        ):
            if not low <= getattr(self, name) <= high:  # a NaN is not either
                raise SnapshotError(f"{name} {getattr(self, name)!r} is not in [{low:g}, {high:g}]")

    @property
    def dim(self) -> int:
        """Length of a query embedding."""
        return int(self.centroids.shape[1])

    @property
    def learned_until_unix_s(self) -> float:
        """Verdicts up to this time were fitted, later ones are learned online; 0: none was."""
        return float(self.metadata.get(LEARNED_UNTIL, 0.0))

    @property
    def card_costs_usd(self) -> Mapping[str, float]:
        """US dollars of a typical call when it was fitted, by pair; empty: it does not say."""
        costs_usd: Mapping[str, float] = self.metadata.get(CARD_COSTS, {})
        return costs_usd

    @property
    def looks_first(self) -> bool:
        """Whether a first look may decide: path 1 alone serves, so no later step needs more."""
        return bool(self.look) and not self.policy and not self.decides_by_value

    @property
    def thinks(self) -> bool:
        """Whether its policy was trained with a planner.

        Any other never thinks: it never learned when that is worth it.
        """
        return bool(self.metadata.get(THINKS, 0))

    @property
    def decides_by_value(self) -> bool:
        """Whether the rule `voi` serves it, where it has no policy."""
        return self.metadata.get(RULE) == VOI_RULE

    @property
    def voters(self) -> NDArray[np.intp]:
        """(pairs,) equal for pairs that never differed in the profile, and so have one vote."""
        voters = self.metadata.get(VOTERS)
        return np.arange(len(self.pairs)) if voters is None else np.asarray(voters, np.intp)

    def _check_arrays(self) -> None:
        sizes: dict[str | int, int] = {"pairs": len(self.pairs)}
        for name, shape in _SHAPES.items():
            array = getattr(self, name)
            if array.dtype != np.float32:
                raise SnapshotError(f"{name} is {array.dtype}, not float32")
            wanted = [sizes.get(axis, axis) for axis in shape]
            if array.ndim != len(shape) or any(
                isinstance(size, int) and size != found
                for size, found in zip(wanted, array.shape, strict=True)
            ):
                raise SnapshotError(f"{name} has shape {array.shape}, expected {wanted}")
            sizes.update(zip(shape, array.shape, strict=True))
            if not np.isfinite(array).all():
                raise SnapshotError(f"{name} holds a value that is not finite")
        for name in _POSITIVE:
            if (getattr(self, name) <= 0).any():
                raise SnapshotError(f"{name} holds a value that is not above 0")
        for name in _NOT_NEGATIVE:
            if (getattr(self, name) < 0).any():
                raise SnapshotError(f"{name} holds a value below 0")
        if (np.diff(self.distance_quantiles) < 0).any():
            raise SnapshotError("distance_quantiles do not ascend")


def save_snapshot(snapshot: RouterSnapshot, folder: Path) -> None:
    """Write a snapshot; the folder appears complete or not at all.

    Raises:
        SnapshotError: If the folder is there already: snapshots never change.
    """
    if folder.exists():
        raise SnapshotError(
            f"snapshot {folder.name!r} is there already, and snapshots never change"
        )
    tensors = {name: np.ascontiguousarray(getattr(snapshot, name)) for name in _SHAPES}
    for prefix, arrays in (
        (POLICY_PREFIX, snapshot.policy),
        (VERIFIER_PREFIX, snapshot.verifier),
        (LOOK_PREFIX, snapshot.look),
    ):
        tensors |= {prefix + name: np.ascontiguousarray(of) for name, of in arrays.items()}
    packed = save_tensors(tensors)
    document: dict[str, Any] = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "tensors_sha256": hashlib.sha256(packed).hexdigest(),
        "pairs": [list(pair) for pair in snapshot.pairs],
        "scales": snapshot.scales,
        "examples": snapshot.examples,
        "examples_from": _PROFILE,
        "metadata": dict(snapshot.metadata),
    }
    document |= {name: getattr(snapshot, name) for name in _plain_fields()}
    document["sha256"] = _digest(document)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(fresh / TENSORS_FILE, packed)
        _write(fresh / DOCUMENT_FILE, json.dumps(document, indent=1).encode())
        os.rename(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def load_snapshot(folder: Path) -> RouterSnapshot:
    """Read and check a snapshot.

    Raises:
        SnapshotError: If it is missing, truncated, damaged, of another schema, or not a snapshot.
    """
    name = folder.name
    try:
        document = json.loads((folder / DOCUMENT_FILE).read_bytes())
        packed = (folder / TENSORS_FILE).read_bytes()
    except OSError as error:
        raise SnapshotError(f"snapshot {name!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"snapshot {name!r}: {DOCUMENT_FILE} is not JSON") from error
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise SnapshotError(f"snapshot {name!r} is not a router snapshot")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise SnapshotError(
            f"snapshot {name!r} has schema {document.get('schema_version')!r}, this version reads "
            f"{SCHEMA_VERSION}; fit it again"
        )
    if document.pop("sha256", None) != _digest(document):
        raise SnapshotError(
            f"snapshot {name!r} is damaged: {DOCUMENT_FILE} does not match its hash"
        )
    if hashlib.sha256(packed).hexdigest() != document.get("tensors_sha256"):
        raise SnapshotError(f"snapshot {name!r} is damaged: {TENSORS_FILE} does not match its hash")
    try:
        tensors = load_tensors(packed)
        policy, verifier, look = (
            {
                key.removeprefix(prefix): value
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
            for prefix in (POLICY_PREFIX, VERIFIER_PREFIX, LOOK_PREFIX)
        )
        fields_read: dict[str, Any] = {key: tensors[key] for key in _SHAPES}
        fields_read |= {key: document[key] for key in _plain_fields()}
        return RouterSnapshot(
            pairs=tuple(Pair(model_id, tool_id) for model_id, tool_id in document["pairs"]),
            scales=tuple(Scale(*scale) for scale in document["scales"]),
            examples=_read_examples(document),
            metadata=document["metadata"],
            policy=policy,
            verifier=verifier,
            look=look,
            **fields_read,
        )
    except (AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        if isinstance(error, SnapshotError):
            raise
        raise SnapshotError(f"snapshot {name!r} lacks or mangles a field: {error}") from error


def cut_example(text: str) -> str:
    """A question as it is shown: its first 200 characters."""
    return text if len(text) <= _MAX_EXAMPLE_CHARS else text[: _MAX_EXAMPLE_CHARS - 1] + "…"


def _read_examples(document: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """The examples of a snapshot that are surely questions of the profile.

    A document that does not say where its examples are from may hold what callers asked, unless it
    was fitted on no verdict.
    """
    of_profile = document.get("examples_from") == _PROFILE
    if not of_profile and document["metadata"].get("num_verdicts") != 0:
        return ((),) * len(document["examples"])
    return tuple(tuple(map(cut_example, texts)) for texts in document["examples"])


def _plain_fields() -> list[str]:
    """Names of the fields that are one number or word."""
    special = {"pairs", "scales", "examples", "metadata", "policy", "verifier", "look", *_SHAPES}
    return [entry.name for entry in fields(RouterSnapshot) if entry.name not in special]


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Write and force to disk, so that a complete name never stands for lost bytes."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
