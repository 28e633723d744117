"""A verifier written by hand, so that a test knows what it says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.router.policy.verifier import FEATURES, RELATIVE
from tests.router_data import PAIRS


def make_verifier() -> dict[str, NDArray[Any]]:
    """A sure answer is right with .9, an unsure one with .2; what comes next is as believed."""
    trees = (1, 3)
    feature, left, right = (np.full(trees, of, np.int16) for of in (-1, 0, 0))
    feature[0, 0], left[0, 0], right[0, 0] = FEATURES.index("answer_mean"), 1, 2
    value = np.array([[0.0, math.log(0.2 / 0.8), math.log(0.9 / 0.1)]], np.float32)
    odds = np.linspace(-6, 6, 241, dtype=np.float32)
    relative = (len(PAIRS) + 1, len(RELATIVE))
    return {
        "feature": feature,
        "left": left,
        "right": right,
        "nan_left": np.ones(trees, np.uint8),
        "threshold": np.full(trees, -1.0, np.float32),
        "value": value,
        "base": np.zeros(1, np.float32),
        "calibration": np.stack([odds, 1 / (1 + np.exp(-odds))]),
        "centre": np.zeros(relative, np.float32),
        "width": np.ones(relative, np.float32),
        # Of a candidate believed at q, a share q of the answers turns out to be surely right.
        "outlook": np.sort(
            (np.linspace(0, 1, 11)[:, None] > np.linspace(0.05, 0.95, 10)).astype(np.float32)
        ),
    }
