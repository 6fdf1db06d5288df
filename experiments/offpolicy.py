"""Off-policy evaluation: what a new policy would have earned, from the log of another one with known propensities.

Sources: Horvitz and Thompson, JASA 47, 1952 (IPS); Swaminathan and Joachims, "The Self-Normalized Estimator for
Counterfactual Learning", NeurIPS 2015 (SNIPS); Dudík, Langford and Li, "Doubly Robust Policy Evaluation and Learning",
ICML 2011 (DR); Ionides, "Truncated Importance Sampling", JCGS 17(2), 2008 (clipping); Kong, technical report 348,
University of Chicago, 1992 (effective sample size).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from experiments.stats.moments import FloatArray, PairMoments, ratio_estimate
from plait.errors import DataError

Method = Literal["ips", "snips", "dr", "dm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Importance weights, shape (n,), and how far they can be trusted."""

    values: FloatArray
    clip: float
    clipped_share: float  # of rows whose weight was cut
    clipped_mass: float  # of the total weight that was cut: an upper bound of the bias for rewards in [0, 1]
    effective_sample_size: float
    mean: float  # near 1 where the log supports the policy
    largest: float

    @property
    def supported(self) -> bool:
        """Whether the weights average to one within four standard errors and carry at least 30 effective rows."""
        if len(self.values) < 2:
            return False
        se = float(self.values.std(ddof=1)) / math.sqrt(len(self.values))
        return abs(self.mean - 1) <= 4 * se + self.clipped_mass + 1e-12 and self.effective_sample_size >= 30


def importance_weights(target: npt.ArrayLike, logged: npt.ArrayLike, *, clip: float = math.inf) -> Weights:
    """target / logged probabilities of the logged actions, both of shape (n,), cut at `clip`.

    Raises DataError for a logged propensity that is not within (0, 1], or a target one not within [0, 1].
    """
    p, q = np.asarray(target, dtype=np.float64), np.asarray(logged, dtype=np.float64)
    if p.shape != q.shape or p.ndim != 1:
        raise DataError(f"{p.shape} target probabilities for {q.shape} logged propensities; give one of each a row")
    if p.size and not (np.isfinite(q).all() and q.min() > 0 and q.max() <= 1 + 1e-9):
        bad = int((~((q > 0) & (q <= 1 + 1e-9))).sum())
        raise DataError(f"{bad} of {q.size} logged propensities are not within (0, 1]; evaluation divides by them")
    if p.size and not (np.isfinite(p).all() and p.min() >= 0 and p.max() <= 1 + 1e-9):
        raise DataError("target probabilities are not within [0, 1]")
    raw = p / q
    values = np.minimum(raw, clip)
    total, squares = float(values.sum()), float((values**2).sum())
    return Weights(
        values=values,
        clip=clip,
        clipped_share=float((raw > clip).mean()) if raw.size else 0.0,
        clipped_mass=float((raw - values).mean()) if raw.size else 0.0,
        effective_sample_size=total**2 / squares if squares > 0 else 0.0,
        mean=float(values.mean()) if values.size else math.nan,
        largest=float(raw.max()) if raw.size else math.nan,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyValue:
    """Estimated mean reward of the target policy with a normal 1 - alpha interval."""

    method: Method
    value: float
    se: float
    low: float
    high: float
    n: int
    effective_sample_size: float
    clipped_share: float
    supported: bool


def policy_value(
    rewards: npt.ArrayLike,
    weights: Weights,
    *,
    method: Method = "snips",
    predicted: npt.ArrayLike | None = None,
    expected: npt.ArrayLike | None = None,
    clusters: npt.ArrayLike | None = None,
    alpha: float = 0.05,
) -> PolicyValue:
    """The target policy's mean reward by one estimator; all arrays of shape (n,).

    predicted: a reward model's prediction for the logged action; expected: its mean over the target policy's actions
    ("dr" and "dm"; the model must not have been fitted on the same row: use cross-fitting). clusters: the unit of each
    row, whose rows may depend on each other (default: rows are independent).
    """
    r, w = np.asarray(rewards, dtype=np.float64), weights.values
    if r.shape != w.shape:
        raise DataError(f"{r.shape} rewards for {w.shape} weights; give one of each a row")
    if r.size < 2:
        raise DataError(f"{r.size} logged rows cannot be evaluated; at least 2 are needed")
    if not np.isfinite(r).all():
        raise DataError(f"{int((~np.isfinite(r)).sum())} of {r.size} rewards are not finite; leave those rows out")
    if method in ("dr", "dm"):
        if predicted is None or expected is None:
            raise DataError(f"{method} needs a reward model's `predicted` and `expected` values")
        q, v = np.asarray(predicted, dtype=np.float64), np.asarray(expected, dtype=np.float64)
        terms = v + w * (r - q) if method == "dr" else v
        below = np.ones_like(terms)
    elif method == "ips":
        terms, below = w * r, np.ones_like(r)
    else:
        terms, below = w * r, w
    if clusters is not None:
        _, index = np.unique(np.asarray(clusters), return_inverse=True)
        terms = np.bincount(index, weights=terms).astype(np.float64)
        below = np.bincount(index, weights=below).astype(np.float64)
    # All four are ratios of sums, so that one delta method gives their errors.
    estimate = ratio_estimate(PairMoments.of(terms, below))
    half = float(stats.norm.isf(alpha / 2)) * estimate.se if estimate.usable else math.nan
    return PolicyValue(
        method=method,
        value=estimate.value,
        se=estimate.se,
        low=estimate.value - half,
        high=estimate.value + half,
        n=r.size,
        effective_sample_size=weights.effective_sample_size,
        clipped_share=weights.clipped_share,
        supported=weights.supported,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClippingRow:
    """What one clip does: less variance, more bias."""

    clip: float
    value: PolicyValue
    clipped_mass: float


def clipping_table(
    rewards: npt.ArrayLike,
    target: npt.ArrayLike,
    logged: npt.ArrayLike,
    *,
    clips: Sequence[float] = (1, 2, 5, 10, 50, 100, math.inf),
    method: Literal["ips", "snips"] = "snips",
    clusters: npt.ArrayLike | None = None,
) -> list[ClippingRow]:
    """The estimate under several clips: believe one where it has stopped moving and its effective sample is large."""
    rows = []
    for clip in clips:
        weights = importance_weights(target, logged, clip=clip)
        value = policy_value(rewards, weights, method=method, clusters=clusters)
        rows.append(ClippingRow(clip=clip, value=value, clipped_mass=weights.clipped_mass))
    return rows


def greedy_probabilities(
    scores: npt.ArrayLike, *, epsilon: float = 0.0, temperature: float | None = None
) -> FloatArray:
    """Action probabilities of a scorer, shape (n, n_actions): its best action, softened by epsilon or a temperature."""
    s = np.asarray(scores, dtype=np.float64)
    if temperature is not None:
        z = (s - s.max(axis=1, keepdims=True)) / temperature
        soft = np.exp(z)
        return np.asarray(soft / soft.sum(axis=1, keepdims=True))
    answer = np.full(s.shape, epsilon / s.shape[1])
    answer[np.arange(len(s)), s.argmax(axis=1)] += 1 - epsilon
    return answer
