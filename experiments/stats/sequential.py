"""Looking every day, honestly: confidence sequences (any number of looks) and group-sequential boundaries (K looks)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize, special, stats

from experiments.stats.effects import Effect
from experiments.stats.moments import FloatArray

Spending = Literal["obrien_fleming", "pocock"]


def mixture_rho_squared(*, tuning_units: float, alpha: float) -> float:
    """The rho^2 that makes the confidence sequence tightest when `tuning_units` units are in.

    rho^2 = (-W_-1(-alpha^2 / e) - 1) / t.
    Source: Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit theory and asymptotic
    confidence sequences", Annals of Statistics 52(6), 2024 (arXiv 2103.06476), appendix B.
    """
    return float((-special.lambertw(-(alpha**2) * math.exp(-1), k=-1).real - 1) / tuning_units)


def sequence_multiplier(n_units: float, *, rho_squared: float, alpha: float) -> float:
    """How many standard errors the confidence sequence reaches to each side after `n_units`; a fixed test has 1.96.

    sqrt((1 + 1 / (n rho^2)) log((n rho^2 + 1) / alpha^2)): the two-sided normal mixture of Howard, Ramdas, McAuliffe
    and Sekhon, "Time-uniform, nonparametric, nonasymptotic confidence sequences", Annals of Statistics 49(2), 2021,
    eq. 14, with the estimated variance put in as in Waudby-Smith et al. (2024), theorem 2.2.
    """
    scale = n_units * rho_squared
    return math.sqrt((1 + 1 / scale) * math.log((scale + 1) / alpha**2))


def always_valid(effect: Effect, *, n_units: int, alpha: float = 0.05, tuning_units: float = 10_000) -> Effect:
    """The fixed-horizon `effect` widened so that it holds at all looks at once: P(ever wrong) <= alpha.

    n_units: units in both arms now. tuning_units must be chosen before the data is seen. The p-value is always valid:
    it may be compared with alpha at every look.
    """
    if not effect.defined or n_units < 2:
        return Effect(
            estimate=effect.estimate, se=effect.se, low=math.nan, high=math.nan, p_value=math.nan, alpha=alpha
        )
    rho_squared = mixture_rho_squared(tuning_units=tuning_units, alpha=alpha)
    half = effect.se * sequence_multiplier(n_units, rho_squared=rho_squared, alpha=alpha)
    scale = n_units * rho_squared
    if effect.se > 0:
        z = effect.estimate / effect.se
        log_p = 0.5 * math.log(scale + 1) - z * z * scale / (2 * (scale + 1))
        p_value = math.exp(min(log_p, 0.0))
    else:
        p_value = effect.p_value
    return Effect(
        estimate=effect.estimate,
        se=effect.se,
        low=effect.estimate - half,
        high=effect.estimate + half,
        p_value=p_value,
        alpha=alpha,
    )


def spent(fraction: float, *, alpha: float, spending: Spending) -> float:
    """One-sided error spent when `fraction` (0 .. 1) of the planned information is in.

    O'Brien-Fleming type: 2 - 2 Phi(z_(alpha/2) / sqrt(t)); Pocock type: alpha log(1 + (e - 1) t).
    Source: Lan and DeMets, "Discrete sequential boundaries for clinical trials", Biometrika 70(3), 1983.
    """
    t = min(max(fraction, 0.0), 1.0)
    if t == 0:
        return 0.0
    if spending == "obrien_fleming":
        return 2 * float(stats.norm.sf(stats.norm.isf(alpha / 2) / math.sqrt(t)))
    return alpha * math.log1p((math.e - 1) * t)


@dataclass(frozen=True, kw_only=True, slots=True)
class Boundaries:
    """Critical |z| at each look, and the two-sided error spent up to it."""

    fractions: tuple[float, ...]
    z: tuple[float, ...]
    spent: tuple[float, ...]


def group_sequential_boundaries(
    fractions: Sequence[float], *, alpha: float = 0.05, spending: Spending = "obrien_fleming"
) -> Boundaries:
    """Symmetric two-sided boundaries at these information fractions (increasing, in (0, 1]).

    Each side spends alpha / 2 by the Lan-DeMets function. The exit probabilities are integrated by the recursion of
    Armitage, McPherson and Rowe (JRSS A 132, 1969); see Jennison and Turnbull, Group Sequential Methods, chapter 19.
    With five equal looks: 4.877, 3.357, 2.680, 2.290, 2.031 (O'Brien-Fleming type).
    """
    steps = _checked(fractions)
    goals = [2 * spent(t, alpha=alpha / 2, spending=spending) for t in steps]
    bounds: list[float] = []
    state = _Continuation.start()
    for k, (t, goal) in enumerate(zip(steps, goals, strict=True)):
        already = goals[k - 1] if k else 0.0
        want = goal - already
        if want <= 1e-14:
            bounds.append(math.inf)
            state = state.advance(t, math.inf)
            continue

        def excess(bound: float, t: float = t, want: float = want, state: _Continuation = state) -> float:
            return state.exit_probability(t, bound) - want

        bound = float(optimize.brentq(excess, 1e-6, 20.0, xtol=1e-10))
        bounds.append(bound)
        state = state.advance(t, bound)
    return Boundaries(fractions=tuple(steps), z=tuple(bounds), spent=tuple(goals))


def crossing_probability(fractions: Sequence[float], z: Sequence[float], *, drift: float = 0.0) -> list[float]:
    """Probability of having crossed |z| by each look when the final z-value has mean `drift`; 0 gives the error.

    Used for power, and to solve for the classical constants (Pocock 2.413, O'Brien-Fleming 2.040 at five looks).
    """
    state, total, answer = _Continuation.start(drift), 0.0, []
    for t, bound in zip(_checked(fractions), z, strict=True):
        total += state.exit_probability(t, bound)
        answer.append(total)
        state = state.advance(t, bound)
    return answer


def constant_boundary(n_looks: int, *, alpha: float = 0.05, shape: Spending = "pocock") -> tuple[float, ...]:
    """Classical boundaries at equal looks: Pocock's flat one, or O'Brien and Fleming's c sqrt(K / k).

    Sources: Pocock, Biometrika 64(2), 1977; O'Brien and Fleming, Biometrics 35(3), 1979.
    """
    fractions = [(k + 1) / n_looks for k in range(n_looks)]

    def bounds(c: float) -> list[float]:
        return [c if shape == "pocock" else c / math.sqrt(t) for t in fractions]

    c = float(optimize.brentq(lambda c: crossing_probability(fractions, bounds(c))[-1] - alpha, 1.0, 6.0, xtol=1e-10))
    return tuple(bounds(c))


def _checked(fractions: Sequence[float]) -> list[float]:
    steps = [float(t) for t in fractions]
    if not steps or any(b <= a for a, b in zip([0.0, *steps], steps, strict=False)) or steps[-1] > 1 + 1e-12:
        raise ValueError(f"information fractions must increase within (0, 1]; got {steps}")
    return steps


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(160)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Continuation:
    """Density of the score S(t) = Z sqrt(t) ~ N(drift t, t) on the paths that have not stopped yet."""

    t: float
    points: FloatArray
    mass: FloatArray  # density times quadrature weight
    drift: float

    @classmethod
    def start(cls, drift: float = 0.0) -> _Continuation:
        return cls(t=0.0, points=np.zeros(1), mass=np.ones(1), drift=drift)

    def exit_probability(self, t: float, bound: float) -> float:
        """Probability of first leaving at t, |S| >= bound sqrt(t)."""
        if math.isinf(bound):
            return 0.0
        step, edge = math.sqrt(t - self.t), bound * math.sqrt(t)
        centre = self.points + self.drift * (t - self.t)
        out = stats.norm.sf((edge - centre) / step) + stats.norm.cdf((-edge - centre) / step)
        return float(out @ self.mass)

    def advance(self, t: float, bound: float) -> _Continuation:
        step = math.sqrt(t - self.t)
        # An infinite bound (nothing spent yet) is integrated far enough out for the tail not to matter.
        edge = min(bound, 9.0 + abs(self.drift)) * math.sqrt(t)
        points = edge * _NODES
        centre = self.points + self.drift * (t - self.t)
        density = stats.norm.pdf((points[:, None] - centre[None, :]) / step) @ self.mass / step
        return _Continuation(t=t, points=points, mass=density * edge * _WEIGHTS, drift=self.drift)
