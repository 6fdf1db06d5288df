"""CUPED: remove from an outcome what was known of the unit before it was exposed.

Source: Deng, Xu, Kohavi and Walker, "Improving the Sensitivity of Online Controlled Experiments by Utilizing
Pre-Experiment Data", WSDM 2013 (means: section 3.2; ratios: appendix B). The covariate is measured before exposure,
so it cannot be affected by the arm; theta is the pooled within-arm slope, the same for all arms, so that the
differences stay unbiased.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.stats.moments import Estimate, PairMoments, VectorMoments


@dataclass(frozen=True, kw_only=True, slots=True)
class Adjusted:
    """One estimate per arm after adjustment, in the order given, and the share of variance that went away."""

    estimates: tuple[Estimate, ...]
    theta: float
    variance_removed: float  # 0 .. 1, pooled over arms


def cuped_means(arms: Sequence[PairMoments]) -> Adjusted:
    """Means of y adjusted by the covariate x of the same units. A covariate that does not vary changes nothing."""
    within_var, within_cov, total_y = (
        _pooled([(arm.n, getattr(arm, name)) for arm in arms]) for name in ("var_x", "cov", "var_y")
    )
    theta = within_cov / within_var if within_var > 0 else 0.0
    pooled_x = _weighted([(arm.n, arm.mean_x) for arm in arms])
    estimates = []
    for arm in arms:
        if arm.n == 0:
            estimates.append(Estimate(value=math.nan, variance=math.nan, n=0))
            continue
        variance = max(arm.var_y - 2 * theta * arm.cov + theta**2 * arm.var_x, 0.0)
        estimates.append(
            Estimate(value=arm.mean_y - theta * (arm.mean_x - pooled_x), variance=variance / arm.n, n=arm.n)
        )
    removed = within_cov**2 / (within_var * total_y) if within_var > 0 and total_y > 0 else 0.0
    return Adjusted(estimates=tuple(estimates), theta=theta, variance_removed=min(max(removed, 0.0), 1.0))


def cuped_ratios(arms: Sequence[VectorMoments]) -> Adjusted:
    """Ratios of sums adjusted by the same ratio before exposure.

    Each arm holds, per unit, (numerator, denominator, numerator before, denominator before). Both ratios are
    linearised at the pooled means, u = (y - r d) / mean_d, and the adjustment is that of means on u.
    """
    live = [arm for arm in arms if arm.n > 0]
    pooled = np.array([_weighted([(arm.n, float(arm.mean[i])) for arm in live]) for i in range(4)])
    if not live or pooled[1] == 0 or pooled[3] == 0:
        return Adjusted(estimates=tuple(_plain_ratio(arm) for arm in arms), theta=0.0, variance_removed=0.0)
    r_before = pooled[2] / pooled[3]
    pairs = []
    for arm in arms:
        if arm.n == 0 or arm.mean[1] == 0:
            pairs.append(PairMoments(n=0, mean_y=math.nan, mean_x=math.nan, var_y=0.0, var_x=0.0, cov=0.0))
            continue
        r = arm.mean[0] / arm.mean[1]
        weights_y = np.array([1 / arm.mean[1], -r / arm.mean[1], 0.0, 0.0])
        weights_x = np.array([0.0, 0.0, 1 / pooled[3], -r_before / pooled[3]])
        pairs.append(
            PairMoments(
                n=arm.n,
                mean_y=float(r),
                mean_x=float(weights_x @ arm.mean),
                var_y=float(weights_y @ arm.cov @ weights_y),
                var_x=float(weights_x @ arm.cov @ weights_x),
                cov=float(weights_y @ arm.cov @ weights_x),
            )
        )
    return cuped_means(pairs)


def _plain_ratio(arm: VectorMoments) -> Estimate:
    from experiments.stats.moments import ratio_estimate

    return ratio_estimate(arm.pair(0, 1))


def _pooled(parts: Sequence[tuple[int, float]]) -> float:
    """Pooled within-arm second moment: sum of (n - 1) m over sum of (n - 1)."""
    weight = sum(n - 1 for n, _ in parts if n > 1)
    return sum((n - 1) * value for n, value in parts if n > 1) / weight if weight else 0.0


def _weighted(parts: Sequence[tuple[int, float]]) -> float:
    weight = sum(n for n, _ in parts if n > 0)
    return sum(n * value for n, value in parts if n > 0) / weight if weight else math.nan
