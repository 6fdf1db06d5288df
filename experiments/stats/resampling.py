"""Bootstrap by unit, and quantiles with intervals that know the unit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from experiments.stats.effects import Effect
from experiments.stats.moments import Estimate, FloatArray, PairMoments, ratio_estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Sums:
    """Numerators and denominators of one arm's units, or of disjoint random groups of its units; shape (n_groups,).

    For a mean the denominator is the number of units in the group. Groups formed by a hash of the unit keep the
    bootstrap exact in the limit at any scale (Chamandy et al., "Estimating uncertainty for massive data streams",
    Google, 2012).
    """

    numerator: FloatArray
    denominator: FloatArray

    def __post_init__(self) -> None:
        if self.numerator.shape != self.denominator.shape:
            raise ValueError(f"{self.numerator.shape} numerators for {self.denominator.shape} denominators")


def bootstrap_difference(
    control: Sums,
    treatment: Sums,
    *,
    n_resamples: int = 1_000,
    alpha: float = 0.05,
    relative: bool = False,
    seed: int = 0,
) -> Effect:
    """Percentile bootstrap of the difference (or relative lift) of two ratios of sums, resampling units.

    Equal to scipy.stats.bootstrap(method="percentile") up to the random draws. The p-value is twice the smaller tail
    beyond zero, at least 2 / n_resamples. Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    rng = np.random.default_rng(seed)
    draws_control = _resample(control, n_resamples, rng)
    draws_treatment = _resample(treatment, n_resamples, rng)
    base = abs(_ratio(control)) if relative else 1.0
    point = (_ratio(treatment) - _ratio(control)) / base if base else math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = draws_treatment - draws_control
        if relative:
            draws = draws / np.abs(draws_control)
    draws = draws[np.isfinite(draws)]
    if draws.size < 2 or not math.isfinite(point):
        nan = math.nan
        return Effect(estimate=point, se=nan, low=nan, high=nan, p_value=nan, alpha=alpha)
    low, high = np.quantile(draws, [alpha / 2, 1 - alpha / 2])
    tail = min(float((draws <= 0).mean()), float((draws >= 0).mean()))
    return Effect(
        estimate=point,
        se=float(draws.std(ddof=1)),
        low=float(low),
        high=float(high),
        p_value=min(1.0, max(2 * tail, 2 / n_resamples)),
        alpha=alpha,
    )


def _resample(sums: Sums, n_resamples: int, rng: np.random.Generator) -> FloatArray:
    n = len(sums.numerator)
    if n == 0:
        return np.full(n_resamples, math.nan)
    answer = np.empty(n_resamples)
    # A block of resamples at a time: at most some 4 M indices in memory.
    block = max(1, min(n_resamples, 4_000_000 // n))
    for start in range(0, n_resamples, block):
        stop = min(start + block, n_resamples)
        index = rng.integers(0, n, size=(stop - start, n), dtype=np.int32)
        below = sums.denominator[index].sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            answer[start:stop] = sums.numerator[index].sum(axis=1) / below
    return answer


def _ratio(sums: Sums) -> float:
    below = float(sums.denominator.sum())
    return float(sums.numerator.sum()) / below if below else math.nan


_Z = float(stats.norm.isf(0.025))


def quantile_levels(counts: PairMoments, q: float) -> tuple[float, float]:
    """The two levels whose quantiles bound the q-quantile at 95 %: q -/+ 1.96 standard errors of the share below it.

    counts: per unit, (values at or below the estimated quantile, values), so that values of one unit may be
    dependent. Source: Deng, Knoblich and Lu, KDD 2018, section 4 (outer confidence interval, clustered).
    """
    se = ratio_estimate(counts).se
    if not math.isfinite(se):
        return 0.0, 1.0
    return max(q - _Z * se, 0.0), min(q + _Z * se, 1.0)


def quantile_estimate(value: float, low: float, high: float, n: int) -> Estimate:
    """An estimate whose standard error is the width of the outer interval over 2 x 1.96."""
    return Estimate(value=value, variance=((high - low) / (2 * _Z)) ** 2, n=n)


def quantile_of(values: npt.ArrayLike, q: float, *, units: npt.ArrayLike | None = None) -> Estimate:
    """The q-quantile of `values`, shape (n,); `units`, of the same shape, names the unit of each (default: its own)."""
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        return Estimate(value=math.nan, variance=math.nan, n=0)
    value = float(np.quantile(data, q))
    _, index = np.unique(np.arange(data.size) if units is None else np.asarray(units), return_inverse=True)
    below = np.bincount(index, weights=data <= value)
    counts = PairMoments.of(below, np.bincount(index).astype(np.float64))
    low, high = np.quantile(data, quantile_levels(counts, q))
    return quantile_estimate(value, float(low), float(high), len(below))
