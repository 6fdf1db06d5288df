"""The Bayesian view: which arm is probably best, and what choosing it costs if it is not. Exact by quadrature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from experiments.stats.moments import Estimate, FloatArray

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Belief:
    """Per arm, in the order given: P(best), and the expected loss of choosing it (in units of the metric)."""

    probability_best: tuple[float, ...]
    expected_loss: tuple[float, ...]


def normal_posterior(estimate: Estimate, *, prior_mean: float = 0.0, prior_sd: float = math.inf) -> Any:
    """Posterior (scipy distribution) of an arm's value: normal likelihood, normal prior; flat where prior_sd is inf."""
    if estimate.variance <= 0:
        return stats.norm(estimate.value, 1e-12 + 1e-12 * abs(estimate.value))
    precision = 1 / estimate.variance + (0.0 if math.isinf(prior_sd) else 1 / prior_sd**2)
    pull = 0.0 if math.isinf(prior_sd) else prior_mean / prior_sd**2
    return stats.norm((estimate.value / estimate.variance + pull) / precision, 1 / math.sqrt(precision))


def beta_posterior(events: float, n: float, *, prior: tuple[float, float] = (1.0, 1.0)) -> Any:
    """Posterior (scipy distribution) of a share: Beta prior, binomial likelihood."""
    return stats.beta(prior[0] + events, prior[1] + n - events)


def compare_posteriors(posteriors: Sequence[Any], *, goal: Literal["increase", "decrease"] = "increase") -> Belief:
    """P(best) and expected loss of each of independent posteriors.

    P(i best) = integral of f_i prod_(j != i) F_j; loss_i = E[max theta] - E[theta_i], with E[max] from the
    distribution function of the maximum. For two Beta posteriors this is the sum of Evan Miller, "Formulas for
    Bayesian A/B Testing" (2015), eq. 6, which the tests compare. For goal "decrease" best means lowest.
    """
    sign = 1.0 if goal == "increase" else -1.0
    grid, weights, lowest, highest = _grid(posteriors)

    def below(posterior: Any) -> FloatArray:  # P(sign * theta < sign * x)
        return np.asarray(posterior.cdf(grid) if sign > 0 else posterior.sf(grid))

    beneath = [below(posterior) for posterior in posteriors]
    best = []
    for i, posterior in enumerate(posteriors):
        others = np.prod([beneath[j] for j in range(len(posteriors)) if j != i], axis=0)
        best.append(float(np.sum(weights * posterior.pdf(grid) * others)))
    total = sum(best)
    product = np.prod(beneath, axis=0)
    # E[max] = L + the integral of 1 - F from L, on the reflected axis when lower is better.
    top = (lowest if sign > 0 else -highest) + float(np.sum(weights * (1 - product)))
    # Rounding far out in the tails may leave -1e-18: a loss is never negative.
    losses = [max(top - sign * float(posterior.mean()), 0.0) for posterior in posteriors]
    return Belief(probability_best=tuple(p / total for p in best), expected_loss=tuple(losses))


def _grid(posteriors: Sequence[Any]) -> tuple[FloatArray, FloatArray, float, float]:
    """Points, weights and ends of Gauss-Legendre panels cut at the quantiles of every posterior."""
    levels = np.concatenate([stats.norm.cdf(np.linspace(-8, 0, 9)), stats.norm.cdf(np.linspace(1, 5, 5))])
    edges = np.concatenate(
        [np.concatenate([p.ppf(levels), p.isf(stats.norm.sf(np.linspace(6, 8, 3)))]) for p in posteriors]
    )
    edges = np.unique(edges[np.isfinite(edges)])
    half = np.diff(edges) / 2
    centre = (edges[1:] + edges[:-1]) / 2
    points = centre[:, None] + half[:, None] * _NODES[None, :]
    return points.ravel(), (half[:, None] * _WEIGHTS[None, :]).ravel(), float(edges[0]), float(edges[-1])
