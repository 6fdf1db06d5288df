"""Power and the minimum detectable effect, before an experiment (from a baseline) and during it (from its errors).

All are for a two-sided normal test of a difference. For a lift relative to control multiply by the control's value.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy import optimize, stats
from statsmodels.stats.power import NormalIndPower

from experiments.stats.sequential import (
    Spending,
    crossing_probability,
    group_sequential_boundaries,
    mixture_rho_squared,
    sequence_multiplier,
)


def power_of(effect: float, se: float, *, alpha: float = 0.05) -> float:
    """Probability that a true `effect` is found significant when the estimate has standard error `se`.

    >>> round(power_of(2.8, 1.0), 3)
    0.8
    """
    if se == 0:
        return 1.0 if effect else alpha
    z = float(stats.norm.isf(alpha / 2))
    shift = abs(effect) / se
    return float(stats.norm.sf(z - shift) + stats.norm.cdf(-z - shift))


def minimum_detectable_effect(se: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The least true effect that is found with probability `power` at this standard error."""
    if se == 0:
        return 0.0
    unit = optimize.brentq(lambda effect: power_of(effect, 1.0, alpha=alpha) - power, 1e-9, 40.0, xtol=1e-12)
    return float(unit) * se


def units_per_arm(std: float, effect: float, *, alpha: float = 0.05, power: float = 0.8, ratio: float = 1.0) -> float:
    """Units needed in control to find `effect` (same unit as `std`); the treatment has `ratio` times as many.

    statsmodels' NormalIndPower. `std` is that of one unit (of the linearised unit for a ratio; times
    sqrt(1 - variance removed) under CUPED).
    """
    if effect == 0 or std <= 0:
        return math.inf if effect == 0 else 2.0
    return float(
        NormalIndPower().solve_power(
            effect_size=abs(effect) / std, nobs1=None, alpha=alpha, power=power, ratio=ratio, alternative="two-sided"
        )
    )


def units_per_arm_sequential(
    std: float, effect: float, *, alpha: float = 0.05, power: float = 0.8, tuning_units: float = 10_000
) -> float:
    """Units needed per arm (two equal arms) for the confidence sequence to exclude zero at that look.

    An upper bound: looks before that one can only add to the power.
    """
    if effect == 0 or std <= 0:
        return math.inf if effect == 0 else 2.0
    rho_squared = mixture_rho_squared(tuning_units=tuning_units, alpha=alpha)

    def power_at(n: float) -> float:
        z = sequence_multiplier(2 * n, rho_squared=rho_squared, alpha=alpha)
        return float(stats.norm.sf(z - abs(effect) / (std * math.sqrt(2 / n))))

    return _least(lambda n: power_at(n) - power)


def group_sequential_inflation(
    n_looks: int, *, alpha: float = 0.05, power: float = 0.8, spending: Spending = "obrien_fleming"
) -> float:
    """How many times more units K equal looks need at most than one fixed look, for the same power.

    O'Brien-Fleming looks cost 1-3 %, Pocock looks some 20 %.
    """
    fractions = [(k + 1) / n_looks for k in range(n_looks)]
    bounds = group_sequential_boundaries(fractions, alpha=alpha, spending=spending)
    fixed = minimum_detectable_effect(1.0, alpha=alpha, power=power)
    drift = optimize.brentq(
        lambda drift: crossing_probability(fractions, bounds.z, drift=drift)[-1] - power, 1e-6, 12.0, xtol=1e-9
    )
    return (float(drift) / fixed) ** 2


def _least(gap: Callable[[float], float]) -> float:
    high = 4.0
    while gap(high) < 0:
        high *= 2
        if high > 1e18:
            return math.inf
    return float(optimize.brentq(gap, 2.0, high, rtol=1e-9)) if gap(2.0) < 0 else 2.0
