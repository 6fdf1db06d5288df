"""Every statistic against scipy, statsmodels, or a published value."""

from __future__ import annotations

import doctest
import importlib
import math
import pkgutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

import experiments.stats
from experiments.stats.bayes import beta_posterior, compare_posteriors, normal_posterior
from experiments.stats.checks import aa_check, adjust, interaction, multinomial_p_value, sample_ratio
from experiments.stats.cuped import cuped_means, cuped_ratios
from experiments.stats.effects import (
    difference,
    mean_difference,
    non_inferiority,
    rare_proportion_difference,
    relative_lift,
)
from experiments.stats.moments import Estimate, Moments, PairMoments, VectorMoments, mean_estimate, ratio_estimate
from experiments.stats.power import (
    group_sequential_inflation,
    minimum_detectable_effect,
    power_of,
    units_per_arm,
    units_per_arm_sequential,
)
from experiments.stats.resampling import Sums, bootstrap_difference, quantile_of
from experiments.stats.sequential import (
    always_valid,
    constant_boundary,
    crossing_probability,
    group_sequential_boundaries,
    mixture_rho_squared,
    sequence_multiplier,
    spent,
)

MODULES = [f"experiments.stats.{module.name}" for module in pkgutil.iter_modules(experiments.stats.__path__)]
MODULES += ["experiments.metrics", "experiments.interleaving", "experiments.bandits"]
MODULES += ["experiments.report_commands", "experiments.report_conclusion"]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


samples = st.lists(st.floats(-1e3, 1e3).map(lambda v: round(v, 3)), min_size=3, max_size=40).filter(
    lambda v: np.ptp(v) > 0.01
)


@settings(deadline=None)
@given(samples, samples)
def test_a_difference_of_means_is_scipys_welch_test_and_interval(a, b):
    ours = mean_difference(Moments.of(a), Moments.of(b))
    theirs = stats.ttest_ind(b, a, equal_var=False)
    interval = theirs.confidence_interval(0.95)
    np.testing.assert_allclose([ours.p_value, ours.low, ours.high], [theirs.pvalue, *interval], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(ours.df, theirs.df, rtol=1e-9)


def test_a_difference_of_means_is_statsmodels_interval_too():
    rng = np.random.default_rng(1)
    a, b = rng.exponential(1, 50), rng.exponential(1.3, 70)
    low, high = CompareMeans(DescrStatsW(b), DescrStatsW(a)).tconfint_diff(alpha=0.1, usevar="unequal")
    ours = mean_difference(Moments.of(a), Moments.of(b), alpha=0.1)
    np.testing.assert_allclose([ours.low, ours.high], [low, high], rtol=1e-9)


def test_a_ratio_has_the_error_of_its_linearisation():
    """The delta method is the standard error of the mean of (y - r x) / mean_x."""
    rng = np.random.default_rng(2)
    x = rng.poisson(6, 500) + 1.0
    y = rng.binomial(x.astype(int), 0.3).astype(float)
    ours = ratio_estimate(PairMoments.of(y, x))
    r = y.sum() / x.sum()
    residual = (y - r * x) / x.mean()
    assert ours.value == pytest.approx(r, rel=1e-12)
    assert ours.se == pytest.approx(residual.std(ddof=1) / math.sqrt(500), rel=1e-9)


def test_a_relative_lift_is_the_gradient_of_the_ratio():
    control, treatment = Estimate(value=2.0, variance=0.01, n=100), Estimate(value=2.3, variance=0.02, n=120)
    gradient = np.array([-2.3 / 4.0, 1 / 2.0])
    ours = relative_lift(control, treatment)
    assert ours.estimate == pytest.approx(0.15)
    assert ours.se == pytest.approx(math.sqrt(gradient**2 @ np.array([0.01, 0.02])), rel=1e-12)


def test_a_relative_lift_keeps_its_sign_over_a_negative_control():
    control, treatment = Estimate(value=-2.0, variance=0.01, n=100), Estimate(value=-1.0, variance=0.01, n=100)
    assert relative_lift(control, treatment).estimate == pytest.approx(0.5)


def test_a_relative_lift_over_zero_is_undefined_and_a_difference_without_spread_is_certain():
    zero, one = Estimate(value=0.0, variance=0.0, n=10), Estimate(value=1.0, variance=0.0, n=10)
    assert not relative_lift(zero, one).defined
    assert difference(zero, zero).p_value == 1.0
    assert difference(zero, one).p_value == 0.0


def test_rare_shares_have_newcombes_published_interval():
    """Newcombe (1998), table II, method 10, case 56/70 - 48/80: (0.0524, 0.3339)."""
    ours = rare_proportion_difference(48, 80, 56, 70)
    np.testing.assert_allclose([ours.estimate, ours.low, ours.high], [0.2, 0.0524, 0.3339], atol=5e-5)


def test_no_event_in_either_arm_still_has_an_interval():
    ours = rare_proportion_difference(0, 100, 0, 100)
    assert (ours.estimate, ours.p_value) == (0.0, 1.0)
    assert ours.low < 0 < ours.high < 0.05


def test_non_inferiority_is_the_shifted_one_sided_test():
    effect = mean_difference(Moments(n=200, mean=1.0, var=0.5), Moments(n=210, mean=0.98, var=0.6))
    result = non_inferiority(effect, margin=0.2, goal="increase")
    assert result.p_value == pytest.approx(stats.t.sf((effect.estimate + 0.2) / effect.se, effect.df), rel=1e-12)
    assert result.status == "pass"
    assert non_inferiority(effect, margin=0.001, goal="increase").status == "undecided"
    assert non_inferiority(effect, margin=0.2, goal="decrease").status == "pass"
    harmed = mean_difference(Moments(n=200, mean=1.0, var=0.01), Moments(n=210, mean=0.5, var=0.01))
    assert non_inferiority(harmed, margin=0.2, goal="increase").status == "fail"


def test_cuped_is_the_regression_on_the_covariate():
    """theta is the pooled within-arm slope: the coefficient of x in least squares on arm and x."""
    rng = np.random.default_rng(3)
    x = rng.normal(5, 2, 400)
    arm = np.arange(400) % 2
    y = 3 + 0.8 * x + 0.3 * arm + rng.normal(0, 1, 400)
    ours = cuped_means([PairMoments.of(y[arm == a], x[arm == a]) for a in (0, 1)])
    design = np.column_stack([np.ones(400), arm, x])
    coefficients = np.linalg.lstsq(design, y, rcond=None)[0]
    assert ours.theta == pytest.approx(coefficients[2], rel=1e-9)
    assert ours.estimates[1].value - ours.estimates[0].value == pytest.approx(coefficients[1], rel=1e-9)
    adjusted = [Moments.of((y - ours.theta * x)[arm == a]) for a in (0, 1)]
    assert ours.estimates[0].variance == pytest.approx(mean_estimate(adjusted[0]).variance, rel=1e-9)


def test_cuped_on_a_ratio_is_cuped_on_its_linearisation():
    rng = np.random.default_rng(4)
    propensity = rng.beta(2, 5, 600)
    table = np.empty((600, 4))
    for i in (1, 3):
        table[:, i] = rng.poisson(8, 600) + 1
        table[:, i - 1] = rng.binomial(table[:, i].astype(int), propensity)
    halves = [table[:300], table[300:]]
    ours = cuped_ratios([VectorMoments.of(half) for half in halves])
    r0 = table[:, 2].sum() / table[:, 3].sum()
    pairs = []
    for half in halves:
        r = half[:, 0].sum() / half[:, 1].sum()
        u = r + (half[:, 0] - r * half[:, 1]) / half[:, 1].mean()
        v = (half[:, 2] - r0 * half[:, 3]) / table[:, 3].mean()
        pairs.append(PairMoments.of(u, v))
    expected = cuped_means(pairs)
    for mine, theirs in zip(ours.estimates, expected.estimates, strict=True):
        assert mine.value == pytest.approx(theirs.value, rel=1e-9)
        assert mine.variance == pytest.approx(theirs.variance, rel=1e-9)
    assert ours.variance_removed > 0.2


def test_a_covariate_that_does_not_vary_changes_nothing():
    y = np.array([1.0, 2.0, 4.0])
    ours = cuped_means([PairMoments.of(y, np.zeros(3)), PairMoments.of(y + 1, np.zeros(3))])
    assert ours.theta == 0.0
    assert ours.estimates[0].value == pytest.approx(y.mean(), rel=1e-12)
    assert ours.estimates[0].variance == pytest.approx(y.var(ddof=1) / 3, rel=1e-12)


# -- sequential --------------------------------------------------------------------------------------------------------


def test_lan_demets_boundaries_are_the_published_ones():
    """Five equal looks, two-sided 0.05; values of the program of Reboussin, DeMets, Kim and Lan (2000), as printed."""
    looks = [0.2, 0.4, 0.6, 0.8, 1.0]
    obrien_fleming = group_sequential_boundaries(looks).z
    np.testing.assert_allclose(obrien_fleming, [4.8769, 3.3569, 2.6803, 2.2898, 2.0310], atol=2e-4)
    pocock = group_sequential_boundaries(looks, spending="pocock").z
    np.testing.assert_allclose(pocock, [2.4380, 2.4268, 2.4101, 2.3966, 2.3859], atol=2e-4)


def test_classical_constants_are_jennison_and_turnbulls():
    """Group Sequential Methods (2000), tables 2.1 and 2.3, alpha 0.05."""
    for n_looks, pocock, obrien_fleming in (
        (2, 2.178, 1.977),
        (5, 2.413, 2.040),
        (10, 2.555, 2.087),
        (20, 2.672, 2.126),
    ):
        assert constant_boundary(n_looks)[-1] == pytest.approx(pocock, abs=6e-4)
        assert constant_boundary(n_looks, shape="obrien_fleming")[-1] == pytest.approx(obrien_fleming, abs=6e-4)


def test_exit_probabilities_agree_with_the_multivariate_normal():
    """Two looks: 1 - P(both inside), by scipy's bivariate normal."""
    t = 0.4
    z = (2.3, 2.0)
    both = stats.multivariate_normal(mean=[0, 0], cov=[[1, math.sqrt(t)], [math.sqrt(t), 1]])
    inside = both.cdf([z[0], z[1]], lower_limit=[-z[0], -z[1]])
    assert crossing_probability([t, 1.0], z)[-1] == pytest.approx(1 - inside, abs=1e-6)


def test_all_error_is_spent_at_the_end_and_none_at_the_start():
    for spending in ("obrien_fleming", "pocock"):
        assert spent(1.0, alpha=0.05, spending=spending) == pytest.approx(0.05, rel=1e-9)
        assert spent(0.0, alpha=0.05, spending=spending) == 0.0
    one = group_sequential_boundaries([1.0])
    assert one.z[0] == pytest.approx(1.959964, abs=1e-6)


@pytest.mark.parametrize("fractions", [[0.5, 0.5], [0.5, 1.2], [0.0, 1.0], []])
def test_looks_that_do_not_increase_are_refused(fractions):
    with pytest.raises(ValueError, match="information fractions"):
        group_sequential_boundaries(fractions)


def test_the_confidence_sequence_stands_where_the_mixture_martingale_reaches_one_over_alpha():
    """The bound in closed form against the integral it comes from (Howard et al. 2021, section 3.2)."""
    n, rho_squared, alpha = 3000.0, 2e-4, 0.05
    reach = sequence_multiplier(n, rho_squared=rho_squared, alpha=alpha) * math.sqrt(n)  # of the sum, unit variance
    prior = stats.norm(0, math.sqrt(rho_squared))
    evidence, _ = integrate.quad(
        lambda mu: math.exp(mu * reach - mu * mu * n / 2) * prior.pdf(mu), -0.2, 0.2, points=[reach / n], epsabs=1e-12
    )
    assert evidence == pytest.approx(1 / alpha, rel=1e-6)


def test_the_tuned_sequence_is_tightest_where_it_was_tuned():
    def width(n_tuned):
        return sequence_multiplier(5000, rho_squared=mixture_rho_squared(tuning_units=n_tuned, alpha=0.05), alpha=0.05)

    assert width(5000) < min(width(4000), width(6500))


def test_the_always_valid_p_value_is_alpha_at_the_bound():
    base = mean_difference(Moments(n=5000, mean=0.0, var=1.0), Moments(n=5000, mean=0.05, var=1.0))
    wide = always_valid(base, n_units=10_000)
    on_bound = always_valid(
        mean_difference(Moments(n=5000, mean=0.0, var=1.0), Moments(n=5000, mean=wide.high - wide.estimate, var=1.0)),
        n_units=10_000,
    )
    assert on_bound.p_value == pytest.approx(0.05, rel=1e-9)
    assert on_bound.low == pytest.approx(0.0, abs=1e-12)


# -- Bayes, power, many tests ------------------------------------------------------------------------------------------


def test_probability_to_be_best_is_evan_millers_sum():
    """Formulas for Bayesian A/B testing, eq. 6, written out."""
    from scipy.special import betaln

    a, b = (1 + 95, 1 + 905), (1 + 120, 1 + 880)
    total = sum(
        math.exp(betaln(a[0] + i, b[1] + a[1]) - math.log(b[1] + i) - betaln(1 + i, b[1]) - betaln(*a))
        for i in range(b[0])
    )
    ours = compare_posteriors([beta_posterior(95, 1000), beta_posterior(120, 1000)])
    assert ours.probability_best[1] == pytest.approx(total, abs=1e-6)


def test_expected_loss_of_two_normals_is_the_closed_form():
    a, b = Estimate(value=1.0, variance=0.01, n=10), Estimate(value=1.05, variance=0.04, n=10)
    ours = compare_posteriors([normal_posterior(a), normal_posterior(b)])
    s = math.hypot(0.1, 0.2)
    d = 0.05
    loss_a = d * stats.norm.cdf(d / s) + s * stats.norm.pdf(d / s)
    assert ours.probability_best[1] == pytest.approx(stats.norm.cdf(d / s), abs=1e-9)
    np.testing.assert_allclose(ours.expected_loss, [loss_a, loss_a - d], atol=1e-9)
    lower = compare_posteriors([normal_posterior(a), normal_posterior(b)], goal="decrease")
    np.testing.assert_allclose(lower.probability_best, ours.probability_best[::-1], atol=1e-9)
    np.testing.assert_allclose(lower.expected_loss, ours.expected_loss[::-1], atol=1e-9)


def test_a_prior_pulls_the_posterior_by_precision():
    posterior = normal_posterior(Estimate(value=1.0, variance=0.04, n=10), prior_mean=0.0, prior_sd=0.2)
    assert (posterior.mean(), posterior.std()) == (pytest.approx(0.5), pytest.approx(math.sqrt(0.02)))


@pytest.mark.parametrize("ratio", [1.0, 3.0])
def test_units_and_power_are_statsmodels(ratio):
    n = units_per_arm(2.0, 0.1, ratio=ratio)
    theirs = NormalIndPower().power(0.05, n, 0.05, ratio=ratio)
    assert theirs == pytest.approx(0.8, abs=1e-6)
    se = 2.0 * math.sqrt(1 / n + 1 / (ratio * n))
    assert power_of(0.1, se) == pytest.approx(theirs, abs=1e-6)
    assert minimum_detectable_effect(se) == pytest.approx(0.1, rel=1e-6)


def test_group_sequential_designs_cost_what_jennison_and_turnbull_print():
    """Tables 2.2 and 2.4 (classical boundaries, five looks, power 0.8); spending functions come near them."""
    assert group_sequential_inflation(5, spending="pocock") == pytest.approx(1.229, abs=0.02)
    assert group_sequential_inflation(5) == pytest.approx(1.028, abs=0.01)
    assert units_per_arm_sequential(1, 0.1) > units_per_arm(1, 0.1)


def test_corrections_are_statsmodels_and_skip_what_is_not_defined():
    p = [0.001, 0.04, 0.03, float("nan"), 0.5]
    for name, theirs in (("holm", "holm"), ("bh", "fdr_bh")):
        ours = adjust(p, name)
        np.testing.assert_allclose(
            [ours[i] for i in (0, 1, 2, 4)], multipletests([0.001, 0.04, 0.03, 0.5], method=theirs)[1]
        )
        assert math.isnan(ours[3])
    assert adjust([], "holm") == []


def test_the_sample_ratio_is_scipys_chi_square_without_arms_of_no_weight():
    ours = sample_ratio({"a": 5100, "b": 4900, "off": 0}, {"a": 1, "b": 1, "off": 0})
    theirs = stats.chisquare([5100, 4900])
    assert (ours.statistic, ours.p_value, ours.df) == (theirs.statistic, theirs.pvalue, 1)
    assert not ours.mismatch
    assert sample_ratio({"a": 5300, "b": 4700}, {"a": 1, "b": 1}).mismatch
    assert sample_ratio({"a": 0, "b": 0}, {"a": 1, "b": 1}).p_value == 1.0


def test_the_sequential_sample_ratio_is_the_beta_binomial_bayes_factor():
    """Two even arms, Dirichlet(1, 1): p = (n + 1) C(n, k) / 2^n."""
    n, k = 50, 38
    exact = (n + 1) * math.comb(n, k) / 2**n
    assert multinomial_p_value([k, n - k], [0.5, 0.5]) == pytest.approx(exact, rel=1e-9)


def test_an_aa_check_sees_a_variance_that_is_too_small():
    rng = np.random.default_rng(5)
    assert aa_check(rng.uniform(size=1000)).healthy
    z = rng.normal(0, 1.7, 1000)  # the error of a ratio computed over rows
    assert not aa_check(2 * stats.norm.sf(np.abs(z))).healthy
    assert aa_check([]).n == 0


def test_an_interaction_of_two_by_two_is_the_squared_z_of_the_contrast():
    cells = [[Estimate(value=v, variance=0.01, n=50) for v in row] for row in ((1.0, 1.2), (1.1, 1.7))]
    ours = interaction(cells)
    z = (1.7 - 1.2 - 1.1 + 1.0) / math.sqrt(0.04)
    assert ours.statistic == pytest.approx(z**2, rel=1e-12)
    assert ours.p_value == pytest.approx(2 * stats.norm.sf(abs(z)), rel=1e-9)
    assert math.isnan(interaction([]).p_value)


# -- resampling --------------------------------------------------------------------------------------------------------


def test_the_bootstrap_agrees_with_scipys_percentile_bootstrap():
    rng = np.random.default_rng(6)
    a, b = rng.exponential(1, 400), rng.exponential(1.4, 300)
    ours = bootstrap_difference(
        Sums(numerator=a, denominator=np.ones(400)), Sums(numerator=b, denominator=np.ones(300)), n_resamples=8000
    )
    theirs = stats.bootstrap(
        (b, a), lambda x, y, axis: x.mean(axis) - y.mean(axis), n_resamples=8000, method="percentile", rng=rng
    )
    np.testing.assert_allclose([ours.low, ours.high], theirs.confidence_interval, atol=0.012)
    assert ours.se == pytest.approx(theirs.standard_error, rel=0.05)


def test_a_bootstrap_over_random_groups_of_units_is_as_wide_as_over_units():
    rng = np.random.default_rng(7)
    sums = []
    for scale in (1.0, 1.1):
        y, group = rng.exponential(scale, 40_000), rng.integers(0, 1000, 40_000)
        sums.append((Sums(numerator=y, denominator=np.ones(40_000)),
                     Sums(numerator=np.bincount(group, y), denominator=np.bincount(group).astype(float))))  # fmt: skip
    units = bootstrap_difference(sums[0][0], sums[1][0], n_resamples=500)
    groups = bootstrap_difference(sums[0][1], sums[1][1], n_resamples=4000)
    assert groups.se == pytest.approx(units.se, rel=0.1)


def test_a_median_has_the_error_of_the_bootstrap_also_when_units_repeat():
    rng = np.random.default_rng(8)
    n_units, each = 1500, 6
    centre = np.repeat(rng.normal(0, 1, n_units), each)
    values = centre + rng.normal(0, 0.5, n_units * each)
    units = np.repeat(np.arange(n_units), each)
    ours = quantile_of(values, 0.5, units=units)
    table = values.reshape(n_units, each)
    draws = [np.median(table[rng.integers(0, n_units, n_units)]) for _ in range(400)]
    assert ours.value == np.median(values)
    assert ours.se == pytest.approx(np.std(draws), rel=0.15)
    naive = quantile_of(values, 0.5)
    assert naive.se < 0.6 * ours.se  # rows taken for independent
