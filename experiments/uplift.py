"""Uplift: whom a treatment moves, not who acts anyway. A T-learner with gradient-boosted trees, and how good it is.

Sources: Künzel, Sekhon, Bickel and Yu, "Metalearners for estimating heterogeneous treatment effects", PNAS 116(10),
2019 (T-learner); Radcliffe, "Using control groups to target on predicted lift", 2007 (Qini curve).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from experiments.stats.effects import Effect, mean_difference
from experiments.stats.moments import FloatArray, Moments
from plait.errors import DataError

_TREES = {"n_estimators": 60, "num_leaves": 8, "learning_rate": 0.05, "min_child_samples": 200, "verbose": -1}


@dataclass(frozen=True, kw_only=True)
class TLearner:
    """Two outcome models, one per arm; uplift is the difference of their predictions."""

    treated: Any
    control: Any

    def uplift(self, features: npt.ArrayLike) -> FloatArray:
        """Predicted effect of the treatment on each row, shape (n,)."""
        x = np.asarray(features, dtype=np.float64)
        return np.asarray(self.treated.predict(x)) - np.asarray(self.control.predict(x))


def fit_t_learner(
    features: npt.ArrayLike,
    treated: npt.ArrayLike,
    outcome: npt.ArrayLike,
    *,
    seed: int = 0,
    threads: int = 1,
    **trees: Any,
) -> TLearner:
    """Fit both arms' outcomes: features (n, d) of numbers, treated (n,) 0 or 1, outcome (n,) 0/1 or any number.

    trees: settings of LightGBM that differ from small, slow-learning trees, which suit weak effects.
    Raises DataError if an arm has no row or an outcome is not finite.
    """
    import lightgbm as lgb

    x, t, y = (np.asarray(v, dtype=np.float64) for v in (features, treated, outcome))
    if not len(x) == len(t) == len(y):
        raise DataError(f"{len(x)} feature rows, {len(t)} treatments and {len(y)} outcomes; give one of each a unit")
    if not np.isin(t, (0, 1)).all() or not (t == 0).any() or not (t == 1).any():
        raise DataError("treated is 1 or 0 for every unit, and both occur; uplift compares the two")
    if not np.isfinite(y).all():
        raise DataError(f"{int((~np.isfinite(y)).sum())} outcomes are not finite; leave those units out")
    settings = {**_TREES, **trees, "seed": seed, "num_threads": threads, "deterministic": True, "force_row_wise": True}
    rounds = settings.pop("n_estimators")
    binary = bool(np.isin(y, (0, 1)).all())
    models = []
    for arm in (1, 0):
        data = lgb.Dataset(x[t == arm], label=y[t == arm])
        models.append(lgb.train({**settings, "objective": "binary" if binary else "regression"}, data, rounds))
    return TLearner(treated=models[0], control=models[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class UpliftQuality:
    """How well predicted uplift orders units: observed effect per group, best predicted first."""

    groups: tuple[Effect, ...]
    qini_score: float  # area between the Qini curve and random targeting, per unit, in outcomes
    trend_p_value: float  # of "the observed effect does not fall from the best group to the worst"


def uplift_quality(
    predicted: npt.ArrayLike, treated: npt.ArrayLike, outcome: npt.ArrayLike, *, n_groups: int = 5, alpha: float = 0.05
) -> UpliftQuality:
    """Judge predictions on units that were not fitted on; all of shape (n,). Needs both arms in every group."""
    score, t, y = (np.asarray(v, dtype=np.float64) for v in (predicted, treated, outcome))
    order = np.argsort(-score, kind="stable")
    effects = []
    for part in np.array_split(order, n_groups):
        arms = [Moments.of(y[part][t[part] == arm]) for arm in (0, 1)]
        if min(moments.n for moments in arms) < 2:
            raise DataError(f"a group of {len(part)} units lacks an arm; use fewer than {n_groups} groups")
        effects.append(mean_difference(arms[0], arms[1], alpha=alpha))
    weights = np.array([1 / max(effect.se, 1e-12) ** 2 for effect in effects])
    rank = np.arange(n_groups, dtype=np.float64)
    centre = np.average(rank, weights=weights)
    slope = float((weights * (rank - centre) * np.array([effect.estimate for effect in effects])).sum())
    z = slope / float(np.sqrt((weights * (rank - centre) ** 2).sum()))
    return UpliftQuality(
        groups=tuple(effects), qini_score=_qini(t[order], y[order]), trend_p_value=float(stats.norm.cdf(z))
    )


def _qini(t: FloatArray, y: FloatArray) -> float:
    """Area over the random line: extra outcomes among the treated, control scaled to their number, per unit."""
    n_treated, n_control = np.cumsum(t), np.cumsum(1 - t)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(n_control > 0, np.cumsum(y * (1 - t)) * n_treated / n_control, 0.0)
    curve = np.cumsum(y * t) - scaled
    line = np.linspace(0, curve[-1], len(curve))
    return float((curve - line).mean() / len(curve))
