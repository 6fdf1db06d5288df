"""Sufficient statistics of one arm and the point estimates they give.

A metric of any kind ends as an `Estimate`: a value, the variance of that value, and the degrees of freedom behind the
variance. Differences, lifts, intervals and tests are then the same few functions for all metrics (effects.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """One value per unit in one arm: how many units, their mean and sample variance (n - 1)."""

    n: int
    mean: float
    var: float

    @classmethod
    def of(cls, values: npt.ArrayLike) -> Moments:
        """Moments of `values`, shape (n_units,).

        >>> Moments.of([1.0, 2.0, 3.0])
        Moments(n=3, mean=2.0, var=1.0)
        """
        array = np.asarray(values, dtype=np.float64)
        var = float(array.var(ddof=1)) if array.size > 1 else math.nan
        return cls(n=array.size, mean=float(array.mean()) if array.size else math.nan, var=var)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairMoments:
    """Two values per unit in one arm: a numerator and denominator, or an outcome and its covariate."""

    n: int
    mean_y: float
    mean_x: float
    var_y: float
    var_x: float
    cov: float

    @classmethod
    def of(cls, y: npt.ArrayLike, x: npt.ArrayLike) -> PairMoments:
        """Moments of the pairs (y, x), each of shape (n_units,)."""
        ys, xs = np.asarray(y, dtype=np.float64), np.asarray(x, dtype=np.float64)
        if ys.size < 2:
            mean_y, mean_x = (float(a.mean()) if a.size else math.nan for a in (ys, xs))
            return cls(n=ys.size, mean_y=mean_y, mean_x=mean_x, var_y=math.nan, var_x=math.nan, cov=math.nan)
        covariance = np.cov(ys, xs)
        return cls(
            n=ys.size,
            mean_y=float(ys.mean()),
            mean_x=float(xs.mean()),
            var_y=float(covariance[0, 0]),
            var_x=float(covariance[1, 1]),
            cov=float(covariance[0, 1]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorMoments:
    """k values per unit in one arm: mean of shape (k,), sample covariance of shape (k, k)."""

    n: int
    mean: FloatArray
    cov: FloatArray

    @classmethod
    def of(cls, values: FloatArray) -> VectorMoments:
        """Moments of `values`, shape (n_units, k)."""
        k = values.shape[1]
        if len(values) < 2:
            mean = values.mean(axis=0) if len(values) else np.full(k, math.nan)
            return cls(n=len(values), mean=mean, cov=np.full((k, k), math.nan))
        return cls(n=len(values), mean=values.mean(axis=0), cov=np.atleast_2d(np.cov(values, rowvar=False)))

    def one(self, i: int) -> Moments:
        return Moments(n=self.n, mean=float(self.mean[i]), var=float(self.cov[i, i]))

    def pair(self, y: int, x: int) -> PairMoments:
        return PairMoments(
            n=self.n,
            mean_y=float(self.mean[y]),
            mean_x=float(self.mean[x]),
            var_y=float(self.cov[y, y]),
            var_x=float(self.cov[x, x]),
            cov=float(self.cov[y, x]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What one arm says about a metric: value, variance of the value (its standard error squared), units behind it."""

    value: float
    variance: float
    n: int

    @property
    def se(self) -> float:
        return math.sqrt(self.variance) if self.variance >= 0 else math.nan

    @property
    def usable(self) -> bool:
        return self.n >= 2 and math.isfinite(self.value) and math.isfinite(self.variance)


def mean_estimate(moments: Moments) -> Estimate:
    """The mean and var / n.

    >>> mean_estimate(Moments(n=100, mean=2.0, var=4.0)).se
    0.2
    """
    return Estimate(value=moments.mean, variance=moments.var / moments.n if moments.n else math.nan, n=moments.n)


def ratio_estimate(moments: PairMoments) -> Estimate:
    """Sum of y over sum of x (clicks per impression), its variance by the delta method, units being the clusters.

    variance = (var_y - 2 r cov + r^2 var_x) / (n mean_x^2), r = mean_y / mean_x. NaN when the denominator is zero.
    Source: Deng, Knoblich and Lu, "Applying the Delta Method in Metric Analytics", KDD 2018, eq. 3.
    """
    if moments.n == 0 or moments.mean_x == 0:
        return Estimate(value=math.nan, variance=math.nan, n=moments.n)
    r = moments.mean_y / moments.mean_x
    spread = moments.var_y - 2 * r * moments.cov + r * r * moments.var_x
    return Estimate(value=r, variance=max(spread, 0.0) / (moments.n * moments.mean_x**2), n=moments.n)
