"""Treatment against control: difference, relative lift, non-inferiority. Numbers in, a named result out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from scipy import stats
from statsmodels.stats.proportion import confint_proportions_2indep, test_proportions_2indep

from experiments.stats.moments import Estimate, Moments, mean_estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """Treatment minus control (or relative to it) with a two-sided 1 - alpha interval and p-value of "no effect".

    All fields are NaN when the effect is not defined (an arm without units, a relative lift over zero).
    """

    estimate: float
    se: float
    low: float
    high: float
    p_value: float
    alpha: float
    df: float = math.inf

    @property
    def defined(self) -> bool:
        return math.isfinite(self.estimate) and math.isfinite(self.low)

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero."""
        return self.defined and (self.low > 0 or self.high < 0)


def undefined_effect(alpha: float) -> Effect:
    return Effect(estimate=math.nan, se=math.nan, low=math.nan, high=math.nan, p_value=math.nan, alpha=alpha)


def welch_df(control: Estimate, treatment: Estimate) -> float:
    """Degrees of freedom of the difference (Welch-Satterthwaite; Welch, Biometrika 34, 1947)."""
    total = control.variance + treatment.variance
    below = control.variance**2 / (control.n - 1) + treatment.variance**2 / (treatment.n - 1)
    return total**2 / below if below > 0 else float(control.n + treatment.n - 2)


def difference(control: Estimate, treatment: Estimate, *, alpha: float = 0.05) -> Effect:
    """Treatment minus control with Welch's t interval and test (unequal variances).

    With two `mean_estimate`s this is scipy's ttest_ind(equal_var=False). If neither arm varies the interval is a
    point, and p is 1 where the arms are equal.
    """
    if not (control.usable and treatment.usable):
        return undefined_effect(alpha)
    estimate = treatment.value - control.value
    se = math.sqrt(control.variance + treatment.variance)
    return _interval(estimate, se, welch_df(control, treatment), alpha)


def relative_lift(control: Estimate, treatment: Estimate, *, alpha: float = 0.05) -> Effect:
    """(treatment - control) / |control|, 0.02 being +2 %, with a delta-method interval and test.

    The sign is that of the difference also where the control is negative; undefined where it is zero.
    Source: Deng, Knoblich and Lu, KDD 2018, section 3.1.
    """
    if not (control.usable and treatment.usable) or control.value == 0:
        return undefined_effect(alpha)
    base = abs(control.value)
    variance = treatment.variance / base**2 + treatment.value**2 * control.variance / base**4
    estimate = (treatment.value - control.value) / base
    return _interval(estimate, math.sqrt(variance), welch_df(control, treatment), alpha)


def mean_difference(control: Moments, treatment: Moments, *, alpha: float = 0.05) -> Effect:
    """Welch's comparison of two means.

    >>> effect = mean_difference(Moments(n=50, mean=1.0, var=1.0), Moments(n=50, mean=1.5, var=1.0))
    >>> round(effect.p_value, 4), round(effect.low, 4)
    (0.0141, 0.1031)
    """
    return difference(mean_estimate(control), mean_estimate(treatment), alpha=alpha)


def rare_proportion_difference(
    events_control: int, n_control: int, events_treatment: int, n_treatment: int, *, alpha: float = 0.05
) -> Effect:
    """Difference of two shares when events are few (below ten in an arm), where the normal interval is wrong.

    Interval: Newcombe's hybrid score (Statistics in Medicine 17, 1998, method 10); p-value: the score test. Both are
    statsmodels'. With no event in either arm the difference is 0, p is 1, and the interval still has a width.
    """
    if min(n_control, n_treatment) < 1:
        return undefined_effect(alpha)
    estimate = events_treatment / n_treatment - events_control / n_control
    low, high = confint_proportions_2indep(
        events_treatment, n_treatment, events_control, n_control, method="newcomb", compare="diff", alpha=alpha
    )
    total = events_control + events_treatment
    p_value = 1.0
    if 0 < total < n_control + n_treatment:
        test = test_proportions_2indep(
            events_treatment, n_treatment, events_control, n_control, method="score", compare="diff"
        )
        p_value = float(test.pvalue)
    se = (float(high) - float(low)) / (2 * float(stats.norm.isf(alpha / 2)))
    return Effect(estimate=estimate, se=se, low=float(low), high=float(high), p_value=p_value, alpha=alpha)


@dataclass(frozen=True, kw_only=True, slots=True)
class NonInferiority:
    """Whether harm beyond `margin` (> 0, on the scale of the effect) is excluded.

    status: "pass" if it is excluded, "fail" if harm beyond the margin is shown, else "undecided".
    p_value: of "the harm is at least the margin", one-sided.
    """

    status: Literal["pass", "fail", "undecided"]
    margin: float
    p_value: float
    worst: float  # the bound on the harmful side


def non_inferiority(effect: Effect, *, margin: float, goal: Literal["increase", "decrease"]) -> NonInferiority:
    """Test that the treatment is worse than control by less than `margin`, at one-sided level effect.alpha / 2.

    The interval decides, so a confidence sequence may be given as well. The p-value is a normal or t one, by df.
    """
    sign = 1.0 if goal == "increase" else -1.0
    if not effect.defined:
        return NonInferiority(status="undecided", margin=margin, p_value=math.nan, worst=math.nan)
    worst = effect.low if goal == "increase" else effect.high
    best = effect.high if goal == "increase" else effect.low
    benefit = sign * effect.estimate
    if effect.se > 0:
        p_value = float(stats.t.sf((benefit + margin) / effect.se, effect.df))
    else:
        p_value = 0.0 if benefit > -margin else 1.0
    status: Literal["pass", "fail", "undecided"] = "undecided"
    if sign * worst > -margin:
        status = "pass"
    elif sign * best < -margin:
        status = "fail"
    return NonInferiority(status=status, margin=margin, p_value=p_value, worst=worst)


def _interval(estimate: float, se: float, df: float, alpha: float) -> Effect:
    if se == 0:
        p_value = 1.0 if estimate == 0 else 0.0
        return Effect(estimate=estimate, se=0.0, low=estimate, high=estimate, p_value=p_value, alpha=alpha, df=df)
    half = float(stats.t.isf(alpha / 2, df)) * se
    p_value = 2 * float(stats.t.sf(abs(estimate) / se, df))
    return Effect(
        estimate=estimate, se=se, low=estimate - half, high=estimate + half, p_value=p_value, alpha=alpha, df=df
    )
