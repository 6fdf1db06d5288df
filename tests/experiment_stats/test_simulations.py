"""What the statistics promise, held in thousands of simulated experiments."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from experiments.stats.cuped import cuped_means, cuped_ratios
from experiments.stats.effects import difference, mean_difference, relative_lift
from experiments.stats.moments import Moments, PairMoments, VectorMoments, ratio_estimate
from experiments.stats.power import units_per_arm
from experiments.stats.sequential import (
    group_sequential_boundaries,
    mixture_rho_squared,
    sequence_multiplier,
)

N_SIMULATIONS = 2_000
N_LOOKS = 20
N_PER_ARM = 4_000

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def aa_looks():
    """Running mean and variance of both arms at 20 looks: arrays (n_simulations, n_looks) of an exponential metric."""
    rng = np.random.default_rng(11)
    step = N_PER_ARM // N_LOOKS
    means, variances = np.empty((2, N_SIMULATIONS, N_LOOKS)), np.empty((2, N_SIMULATIONS, N_LOOKS))
    counts = step * np.arange(1, N_LOOKS + 1)
    for arm in range(2):
        for start in range(0, N_SIMULATIONS, 250):
            values = rng.exponential(1.0, (250, N_LOOKS, step))
            total, squares = values.sum(axis=2).cumsum(axis=1), (values**2).sum(axis=2).cumsum(axis=1)
            means[arm, start : start + 250] = total / counts
            variances[arm, start : start + 250] = (squares - total**2 / counts) / (counts - 1)
    return counts, means, variances


def test_a_fixed_look_is_significant_in_five_percent_of_aa_tests(aa_looks):
    _, means, variances = aa_looks
    p = [
        mean_difference(
            Moments(n=N_PER_ARM, mean=means[0, i, -1], var=variances[0, i, -1]),
            Moments(n=N_PER_ARM, mean=means[1, i, -1], var=variances[1, i, -1]),
        ).p_value
        for i in range(N_SIMULATIONS)
    ]
    share = np.mean(np.array(p) < 0.05)
    assert 0.035 <= share <= 0.065
    assert stats.kstest(p, "uniform").pvalue > 0.001


def test_twenty_looks_at_a_confidence_sequence_err_in_at_most_five_percent(aa_looks):
    counts, means, variances = aa_looks
    gap = means[1] - means[0]
    se = np.sqrt(variances.sum(axis=0) / counts)
    peeking = (np.abs(gap) > 1.96 * se).any(axis=1).mean()
    for tuning_units in (2_000, 10_000):
        rho_squared = mixture_rho_squared(tuning_units=tuning_units, alpha=0.05)
        reach = np.array([sequence_multiplier(2 * n, rho_squared=rho_squared, alpha=0.05) for n in counts])
        assert (np.abs(gap) > reach * se).any(axis=1).mean() <= 0.05
    assert peeking > 0.15  # the fault that the sequence cures


def test_five_looks_at_group_sequential_boundaries_err_in_five_percent(aa_looks):
    counts, means, variances = aa_looks
    looks = [3, 7, 11, 15, 19]
    z = ((means[1] - means[0]) / np.sqrt(variances.sum(axis=0) / counts))[:, looks]
    for spending in ("obrien_fleming", "pocock"):
        bounds = group_sequential_boundaries(counts[looks] / N_PER_ARM, spending=spending)
        assert 0.035 <= (np.abs(z) > np.array(bounds.z)).any(axis=1).mean() <= 0.065


def test_intervals_of_a_mean_cover_the_truth():
    rng = np.random.default_rng(12)
    absolute = relative = 0
    for _ in range(N_SIMULATIONS):
        control, treatment = (Moments.of(rng.exponential(scale, 800)) for scale in (1.0, 1.1))
        effect = mean_difference(control, treatment)
        lift = relative_lift(*(m_estimate(m) for m in (control, treatment)))
        absolute += effect.low <= 0.1 <= effect.high
        relative += lift.low <= 0.1 <= lift.high
    assert 0.93 <= absolute / N_SIMULATIONS <= 0.97
    assert 0.93 <= relative / N_SIMULATIONS <= 0.97


def m_estimate(moments: Moments):
    from experiments.stats.moments import mean_estimate

    return mean_estimate(moments)


def test_intervals_of_a_ratio_cover_the_truth_where_rows_taken_for_independent_do_not():
    """Users differ in click rate and in impressions; the truth is +0.02 on a rate of 2 / 7."""
    rng = np.random.default_rng(13)
    covered = naive = 0
    for _ in range(N_SIMULATIONS):
        estimates, rows = [], []
        for bonus in (0.0, 0.02):
            shown = rng.poisson(8, 500) + 1
            clicks = rng.binomial(shown, np.minimum(rng.beta(2, 5, 500) + bonus, 1.0))
            estimates.append(ratio_estimate(PairMoments.of(clicks, shown)))
            rate = clicks.sum() / shown.sum()
            rows.append((rate, rate * (1 - rate) / shown.sum()))
        effect = difference(*estimates)
        truth = TRUE_BONUS
        covered += effect.low <= truth <= effect.high
        half = 1.96 * math.sqrt(rows[0][1] + rows[1][1])
        naive += abs(rows[1][0] - rows[0][0] - truth) <= half
    assert 0.93 <= covered / N_SIMULATIONS <= 0.97
    assert naive / N_SIMULATIONS < 0.85


# The bonus is cut where a user's rate would pass 1: E[min(X + 0.02, 1)] - E[X] for X ~ Beta(2, 5).
TRUE_BONUS = 0.02 - float(stats.beta(2, 5).expect(lambda x: x - 0.98, lb=0.98, ub=1.0))


def test_intervals_after_cuped_cover_the_truth_and_are_narrower():
    rng = np.random.default_rng(14)
    covered, width, plain = 0, 0.0, 0.0
    for _ in range(N_SIMULATIONS):
        pairs = []
        for bonus in (0.0, 0.2):
            before = rng.gamma(2, 1, 500)
            pairs.append(PairMoments.of(before * rng.gamma(4, 0.25, 500) + bonus, before))
        effect = difference(*cuped_means(pairs).estimates)
        covered += effect.low <= 0.2 <= effect.high
        width += effect.se
        plain += math.sqrt(sum(p.var_y / p.n for p in pairs))
    assert 0.93 <= covered / N_SIMULATIONS <= 0.97
    assert width < 0.85 * plain


def test_intervals_of_a_ratio_after_cuped_cover_the_truth():
    rng = np.random.default_rng(15)
    covered = 0
    for _ in range(N_SIMULATIONS):
        arms = []
        for bonus in (0.0, 0.02):
            rate = rng.beta(2, 8, 400)
            table = np.empty((400, 4))
            for i, extra in ((1, bonus), (3, 0.0)):
                table[:, i] = rng.poisson(10, 400) + 1
                table[:, i - 1] = rng.binomial(table[:, i].astype(int), np.minimum(rate + extra, 1.0))
            arms.append(VectorMoments.of(table))
        effect = difference(*cuped_ratios(arms).estimates)
        covered += effect.low <= 0.02 <= effect.high
    assert 0.93 <= covered / N_SIMULATIONS <= 0.97


@pytest.mark.parametrize("power", [0.5, 0.8, 0.9])
def test_power_is_as_predicted(power):
    rng = np.random.default_rng(16)
    effect = 0.12
    n = math.ceil(units_per_arm(1.0, effect, power=power))
    found = 0
    for _ in range(N_SIMULATIONS):
        # An exponential shifted by the effect: standard deviation 1 in both arms.
        control, treatment = rng.exponential(1.0, n), rng.exponential(1.0, n) + effect
        found += mean_difference(Moments.of(control), Moments.of(treatment)).p_value < 0.05
    assert found / N_SIMULATIONS == pytest.approx(power, abs=0.03)
