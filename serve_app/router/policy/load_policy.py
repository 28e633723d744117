"""Reads a policy's weights out of a snapshot, and tries them once before they serve."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import SnapshotError
from serve_app.router.policy.features import DESCRIPTOR_DIM, States, encode
from serve_app.router.policy.policy_net import PolicyNet
from serve_app.router.snapshots.snapshot import GATE_THRESHOLD, RouterSnapshot


def load_policy(snapshot: RouterSnapshot) -> tuple[float, PolicyNet]:
    """The gate's threshold and the network, tried once.

    Raises:
        SnapshotError: If the tensors are wrong.
    """
    tensors: dict[str, NDArray[Any]] = dict(snapshot.policy)
    threshold = tensors.pop(GATE_THRESHOLD, None)
    if threshold is None or threshold.shape != (1,) or not np.isfinite(threshold).all():
        raise SnapshotError(f"the policy's {GATE_THRESHOLD!r} must be one finite number")
    net = PolicyNet(tensors)
    try:
        logits = net.logits(_blank(snapshot.dim))
    except ValueError as error:
        raise SnapshotError(
            f"the policy does not take embeddings of {snapshot.dim} numbers"
        ) from error
    if not np.isfinite(logits).all():
        raise SnapshotError("the policy's outputs are not finite")
    return float(threshold[0]), net


def _blank(dim: int) -> dict[str, NDArray[np.float32]]:
    """An observation of one request with two pairs, of which nothing is known."""
    two = np.zeros((1, 2), np.float32)
    one, present = np.zeros(1, np.float32), np.ones((1, 2), np.bool_)
    unlimited = np.full(1, np.inf, np.float32)
    no, nothing = np.zeros(1, np.bool_), np.zeros((1, dim), np.float32)
    return encode(
        States(
            embedding=nothing,
            alpha=one,
            steps_left=one + 1,
            usd_left=unlimited,
            seconds_left=unlimited,
            can_think=no,
            thought=no,
            present=present,
            descriptors=np.zeros((2, DESCRIPTOR_DIM), np.float32),
            costs_usd=two,
            seconds=two,
            log_cost_range=np.zeros((1, 2)),
            quality=two,
            spread=two,
            overall=two,
            similarity=two,
            decided=two,
            chance=two * np.nan,
            judged=no,
            rise=two,
            distance_quantile=one,
            confidence=one,
            tried=~present,
            failed=~present,
            logprob=two,
            tool_errors=two,
            agreement=two,
            last=np.full(1, -1, np.intp),
            last_answer=nothing,
            spent_usd=one,
        )
    )
