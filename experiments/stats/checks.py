"""Checks of the experiment itself: sample ratio, A/A uniformity, corrections for many tests, interaction of layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import special, stats
from statsmodels.stats.multitest import multipletests

from experiments.stats.moments import Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRatio:
    """Observed units per arm against the planned split; `mismatch` when p is below `threshold`."""

    observed: Mapping[str, int]
    expected: Mapping[str, float]
    statistic: float
    df: int
    p_value: float
    threshold: float
    sequential_p_value: float

    @property
    def mismatch(self) -> bool:
        return self.p_value < self.threshold


def sample_ratio(
    observed: Mapping[str, int], expected: Mapping[str, float], *, threshold: float = 0.001
) -> SampleRatio:
    """Chi-square test (scipy) that units fell to arms as planned.

    expected: planned weights or expected counts per arm, on any scale; arms of weight zero are left out of the test
    and of its degrees of freedom. `sequential_p_value` stays valid however often one looks (see multinomial_p_value).

    >>> round(sample_ratio({"a": 44700, "b": 45489}, {"a": 1, "b": 1}).p_value, 4)
    0.0086
    """
    arms = [arm for arm, weight in expected.items() if weight > 0]
    counts = np.array([observed.get(arm, 0) for arm in arms], dtype=np.float64)
    weights = np.array([expected[arm] for arm in arms], dtype=np.float64)
    total = counts.sum()
    shares = weights / weights.sum() if len(arms) else weights
    plan = {arm: float(total * share) for arm, share in zip(arms, shares, strict=True)}
    if len(arms) < 2 or total == 0:
        return SampleRatio(
            observed=dict(observed), expected=plan, statistic=0.0, df=max(len(arms) - 1, 0), p_value=1.0,
            threshold=threshold, sequential_p_value=1.0,
        )  # fmt: skip
    test = stats.chisquare(counts, total * shares)
    return SampleRatio(
        observed=dict(observed),
        expected=plan,
        statistic=float(test.statistic),
        df=len(arms) - 1,
        p_value=float(test.pvalue),
        threshold=threshold,
        sequential_p_value=multinomial_p_value(counts, shares),
    )


def multinomial_p_value(counts: npt.ArrayLike, shares: npt.ArrayLike, *, strength: float = 1.0) -> float:
    """Always-valid p-value that counts come from a multinomial with these shares: the inverse Bayes factor.

    The alternative is a Dirichlet(strength * k * shares) mixture.
    Source: Lindon and Malek, "Anytime-Valid Inference for Multinomial Count Data", NeurIPS 2022, eq. 6.
    """
    n, theta = np.asarray(counts, dtype=np.float64), np.asarray(shares, dtype=np.float64)
    prior = strength * len(theta) * theta
    log_bayes_factor = (
        special.gammaln(prior.sum())
        - special.gammaln(prior.sum() + n.sum())
        + (special.gammaln(prior + n) - special.gammaln(prior)).sum()
        - (n * np.log(theta)).sum()
    )
    return float(np.exp(min(-log_bayes_factor, 0.0)))


def adjust(p_values: Sequence[float], method: Literal["holm", "bh", "none"]) -> list[float]:
    """Adjusted p-values by Holm (family-wise error) or Benjamini-Hochberg (false discoveries); NaN stays NaN.

    statsmodels' multipletests on the finite ones.

    >>> adjust([0.01, 0.04, float("nan")], "holm")
    [0.02, 0.04, nan]
    """
    finite = [i for i, p in enumerate(p_values) if math.isfinite(p)]
    adjusted = list(p_values)
    if method == "none" or not finite:
        return adjusted
    name = {"holm": "holm", "bh": "fdr_bh"}[method]
    for i, p in zip(finite, multipletests([p_values[i] for i in finite], method=name)[1], strict=True):
        adjusted[i] = float(p)
    return adjusted


@dataclass(frozen=True, kw_only=True, slots=True)
class AACheck:
    """Share of A/A splits below alpha, and the test that their p-values are uniform (Kolmogorov-Smirnov)."""

    n: int
    alpha: float
    false_positive_share: float
    low: float
    high: float
    uniform_p_value: float

    @property
    def healthy(self) -> bool:
        """The 99 % interval of the share holds alpha, and uniformity is not rejected at 0.001."""
        return self.low <= self.alpha <= self.high and self.uniform_p_value > 0.001


def aa_check(p_values: npt.ArrayLike, *, alpha: float = 0.05) -> AACheck:
    """Judge the p-values of many A/A comparisons; shape (n,). The interval is Clopper-Pearson's (scipy), 99 %."""
    p = np.asarray(p_values, dtype=np.float64)
    p = p[np.isfinite(p)]
    if p.size == 0:
        return AACheck(n=0, alpha=alpha, false_positive_share=0.0, low=0.0, high=1.0, uniform_p_value=1.0)
    hits = int((p < alpha).sum())
    interval = stats.binomtest(hits, p.size, alpha).proportion_ci(0.99, method="exact")
    return AACheck(
        n=p.size,
        alpha=alpha,
        false_positive_share=hits / p.size,
        low=float(interval.low),
        high=float(interval.high),
        uniform_p_value=float(stats.kstest(p, "uniform").pvalue),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Interaction:
    """Whether the arms of one experiment act differently within the arms of another (Wald test, chi-square)."""

    statistic: float
    df: int
    p_value: float
    largest: float  # the largest deviation of an effect between two arms of the other experiment


def interaction(cells: Sequence[Sequence[Estimate]]) -> Interaction:
    """Test of additivity on cells[i][j], i an arm of this experiment, j of the other; cells are independent.

    The contrasts are (c[i][j] - c[0][j]) - (c[i][0] - c[0][0]); all zero when the effects add up. Unusable cells
    (under two units) leave their row and column out. Source: the Wald test of a linear hypothesis, e.g. Greene,
    Econometric Analysis, section 5.4.
    """
    rows = [i for i in range(len(cells)) if all(cell.usable for cell in cells[i])]
    grid = [cells[i] for i in rows]
    n_rows, n_columns = len(grid), len(grid[0]) if grid else 0
    if n_rows < 2 or n_columns < 2:
        return Interaction(statistic=0.0, df=0, p_value=math.nan, largest=0.0)
    values = np.array([[cell.value for cell in row] for row in grid])
    variances = np.diag(np.array([[cell.variance for cell in row] for row in grid]).ravel())
    contrasts = []
    for i in range(1, n_rows):
        for j in range(1, n_columns):
            contrast = np.zeros((n_rows, n_columns))
            contrast[i, j] = contrast[0, 0] = 1.0
            contrast[0, j] = contrast[i, 0] = -1.0
            contrasts.append(contrast.ravel())
    matrix = np.array(contrasts)
    gap = matrix @ values.ravel()
    spread = matrix @ variances @ matrix.T
    if not np.any(spread):
        return Interaction(statistic=0.0, df=len(gap), p_value=1.0, largest=float(np.abs(gap).max()))
    statistic = float(gap @ np.linalg.pinv(spread) @ gap)
    return Interaction(
        statistic=statistic,
        df=len(gap),
        p_value=float(stats.chi2.sf(statistic, len(gap))),
        largest=float(np.abs(gap).max()),
    )
