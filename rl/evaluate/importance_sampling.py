"""Estimators of a policy's value from what another one did: logged trajectories in, intervals out.

With `rho_t` the product of the ratios `target / logged` of a trajectory's actions up to step t:

- importance weights (IPS), per decision (Precup et al., 2000): `mean sum_t rho_t r_t`;
- self-normalised (SNIPS; Swaminathan and Joachims, 2015): `sum_t mean(rho_t r_t) / mean(rho_t)`;
- direct method (DM): `mean v_0`, by fitted Q evaluation with linear values (Le et al., 2019);
- doubly robust (DR; Jiang and Li, 2016): `mean v_0 + sum_t rho_t (r_t + v_{t+1} - q_t)`, with the
  values of a trajectory fitted on the others.

A single decision is a trajectory of one step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rl.evaluate.policies import BootstrapInterval, resampled_means
from serve_app.errors import ConfigError

MIN_EFFECTIVE_SIZE = 30.0
"""Below it an estimate rests on a few heavy trajectories, and is refused."""
MIN_COVERAGE = 0.9
"""Share of what the policy does that the log could have done; surely below it, an estimate would
be of another policy, and is refused."""

_NUM_FOLDS = 5
_NUM_GROUPS = 60
"""Parts of the log that are resampled as wholes where the values are fitted anew each time."""
_MAX_REFITS = 400
_REFITS_AT_ONCE = 50
_SURELY = 3.0
"""Standard errors."""

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Trajectories:
    """Logged trajectories, padded; past the end `ratio` is 1 and all else 0."""

    ratio: _Array
    """(num_trajectories, max_steps) probability of the action under the policy that is judged, over
    that under the one that acted."""
    reward: _Array
    """(num_trajectories, max_steps)"""
    taken: _Array
    """(num_trajectories, max_steps, num_features) of the state and the action that was taken; the
    values are linear in them."""
    expected: _Array
    """(num_trajectories, max_steps, num_features) of the state, averaged over what the judged
    policy does there."""
    penalty: _Array
    """(num_features,) of the squared weights, above 0."""

    def __post_init__(self) -> None:
        """Refuse arrays that do not fit together.

        Raises:
            ConfigError: If a shape is wrong, or a ratio is below 0.
        """
        shape = (*self.ratio.shape, len(self.penalty))
        if self.reward.shape != shape[:2] or {self.taken.shape, self.expected.shape} != {shape}:
            raise ConfigError("the arrays of the logged trajectories differ in shape")
        if not len(self.ratio) or (self.ratio < 0).any() or (self.penalty <= 0).any():
            raise ConfigError("there is no trajectory, a ratio below 0, or a penalty not above 0")


@dataclass(frozen=True)
class OffPolicyEstimate:
    """The mean score of a policy on logged queries, or why it cannot be told."""

    score: BootstrapInterval | None
    """Self-normalised; `None` where it was refused, as are the others."""
    effective_size: float
    """`(sum w)^2 / sum w^2`: how many requests of the policy itself would say as much."""
    num_decisions: int
    """Requests that were explored. The others say nothing of any pair but their own, and are left
    out; the estimate is of the queries of these."""
    reason: str | None = None
    """Why it was refused; `None` where it was not."""
    coverage: float = 0.0
    """Mean weight: 1 but for chance where the log could have done all that the policy does."""
    importance: BootstrapInterval | None = None
    """By importance weights alone: no bias, much noise."""
    direct: BootstrapInterval | None = None
    """By the fitted values alone: little noise, and as right as they are. The interval knows of
    the data's chance, not of what linear values cannot say."""
    doubly_robust: BootstrapInterval | None = None
    """By the fitted values, corrected by importance weights: right where either is."""


def estimate_value(
    trajectories: Trajectories, *, num_resamples: int = 2000, seed: int = 0
) -> OffPolicyEstimate:
    """Estimate the mean total reward of the judged policy, by all four, with 95% intervals.

    Args:
        trajectories: What was logged.
        num_resamples: Of the bootstrap over trajectories.
        seed: Of the bootstrap and the folds.
    """
    rho = trajectories.ratio.cumprod(axis=1)
    size, num_steps = rho.shape
    total = float(rho[:, -1].sum())
    effective_size = total**2 / float((rho[:, -1] ** 2).sum()) if total else 0.0
    values = _Values(trajectories, seed)
    corrected = values.corrected(rho)
    gains = rho * trajectories.reward
    columns = np.concatenate([gains.sum(axis=1)[:, None], corrected[:, None], gains, rho], axis=1)
    draws = resampled_means(columns, num_resamples, seed)
    coverage = total / size + _SURELY * float(rho[:, -1].std()) / np.sqrt(size)
    reason = None
    if effective_size < MIN_EFFECTIVE_SIZE:
        reason = (
            f"the {size} explored decisions are worth {effective_size:.1f} of this policy's, "
            f"{MIN_EFFECTIVE_SIZE:g} are needed: explore more or longer"
        )
    elif coverage < MIN_COVERAGE:
        reason = (
            f"the log could have done only {total / size:.0%} of what this policy does, "
            f"{MIN_COVERAGE:.0%} are needed: explore every pair"
        )
    if reason is not None:
        return OffPolicyEstimate(None, effective_size, size, reason, total / size)

    def normalised(means: _Array) -> _Array:
        shares = means[:, 2 : 2 + num_steps] / means[:, 2 + num_steps :]
        value: _Array = shares.sum(axis=1)
        return value

    whole = columns.mean(axis=0, keepdims=True)
    return OffPolicyEstimate(
        score=_interval(normalised(whole), normalised(draws[draws[:, -1] > 0])),
        effective_size=effective_size,
        num_decisions=size,
        coverage=total / size,
        importance=_interval(whole[:, 0], draws[:, 0]),
        direct=_interval(
            values.mean(np.ones((1, values.num_groups))), values.refits(num_resamples)
        ),
        doubly_robust=_interval(whole[:, 1], draws[:, 1]),
    )


def _interval(value: _Array, draws: _Array) -> BootstrapInterval:
    low, high = np.percentile(draws, [2.5, 97.5])
    return BootstrapInterval(float(value[0]), float(low), float(high))


class _Values:
    """Linear values of each step, fitted backwards from the sums that the log comes down to.

    `q_t(s, a) = taken . w_t` is the ridge regression of `r_t + v_{t+1}`, and
    `v_t(s) = expected . w_t`. Any part of the log is fitted from the sums of its groups.
    """

    def __init__(self, trajectories: Trajectories, seed: int) -> None:
        self._of = trajectories
        size, num_steps, num_features = trajectories.taken.shape
        self.num_groups = min(size, _NUM_GROUPS)
        self._rng = np.random.default_rng(seed)
        self._group = self._rng.permutation(size) % self.num_groups
        square = (self.num_groups, num_steps, num_features, num_features)
        self._gram, self._onward = np.zeros(square), np.zeros(square)
        self._right = np.zeros(square[:3])
        self._first = np.zeros((self.num_groups, num_features))
        self._size = np.bincount(self._group, minlength=self.num_groups).astype(np.float64)
        for group in range(self.num_groups):
            part = self._group == group
            taken, expected = trajectories.taken[part], trajectories.expected[part]
            self._first[group] = expected[:, 0].sum(axis=0)
            for step in range(num_steps):
                of_step = taken[:, step]
                self._gram[group, step] = of_step.T @ of_step
                self._right[group, step] = of_step.T @ trajectories.reward[part, step]
                if step + 1 < num_steps:
                    self._onward[group, step] = of_step.T @ expected[:, step + 1]

    def corrected(self, rho: _Array) -> _Array:
        """(num_trajectories,) the doubly robust terms, cross-fitted by groups."""
        trajectories = self._of
        corrected = np.empty(len(rho))
        folds = np.arange(self.num_groups) % _NUM_FOLDS
        for fold in range(min(_NUM_FOLDS, self.num_groups)):
            (weights,) = self._weights((folds != fold).astype(np.float64)[None])
            part = folds[self._group] == fold
            taken = np.einsum("ntf,tf->nt", trajectories.taken[part], weights)
            value = np.einsum("ntf,tf->nt", trajectories.expected[part], weights)
            onward = np.concatenate([value[:, 1:], np.zeros((len(value), 1))], axis=1)
            surprise = trajectories.reward[part] + onward - taken
            corrected[part] = value[:, 0] + (rho[part] * surprise).sum(axis=1)
        return corrected

    def refits(self, num_resamples: int) -> _Array:
        """(num_refits,) means of the first values, each of a resample of the groups."""
        number = min(num_resamples, _MAX_REFITS)
        shares = np.full(self.num_groups, 1 / self.num_groups)
        counts = self._rng.multinomial(self.num_groups, shares, number).astype(np.float64)
        parts = range(0, number, _REFITS_AT_ONCE)
        return np.concatenate([self.mean(counts[part : part + _REFITS_AT_ONCE]) for part in parts])

    def mean(self, counts: _Array) -> _Array:
        """(num_resamples,) mean first value, fitted on and averaged over the groups counted.

        Args:
            counts: (num_resamples, num_groups) how often each group counts.
        """
        first = self._weights(counts)[:, 0]
        means: _Array = (counts @ self._first * first).sum(axis=1) / (counts @ self._size)
        return means

    def _weights(self, counts: _Array) -> _Array:
        """(num_resamples, num_steps, num_features) fitted on the groups as often as counted."""
        gram, right, onward = (
            np.tensordot(counts, sums, axes=1) for sums in (self._gram, self._right, self._onward)
        )
        gram += np.diag(self._of.penalty)
        weights = np.zeros(right.shape)
        later = np.zeros((len(counts), right.shape[2], 1))
        for step in reversed(range(right.shape[1])):
            target = right[:, step, :, None] + onward[:, step] @ later
            later = np.linalg.solve(gram[:, step], target)
            weights[:, step] = later[:, :, 0]
        return weights
