"""Measures agree with scikit-learn, and with loops where it has none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from trainers.metrics import (
    auc_interval,
    auc_score,
    calibration_error,
    calibration_ratio,
    grouped_auc_score,
    log_loss,
    ndcg_score,
)

ROWS = st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.5, 0.50001, 0.9, 1.0]), st.integers(0, 4)))


@given(ROWS.filter(lambda rows: {label for label, *_ in rows} == {0, 1}))
def test_auc_is_scikit_learns_with_ties(rows):
    labels, scores, _ = zip(*rows, strict=True)
    assert auc_score(labels, scores) == pytest.approx(sk.roc_auc_score(labels, scores))


@given(ROWS.filter(lambda rows: {label for label, *_ in rows} == {0, 1}))
def test_weighted_auc_is_scikit_learns(rows):
    labels, scores, weights = (np.array(column, float) for column in zip(*rows, strict=True))
    weights += 0.5
    assert auc_score(labels, scores, weights) == pytest.approx(sk.roc_auc_score(labels, scores, sample_weight=weights))


def test_auc_of_one_class_does_not_exist():
    assert np.isnan(auc_score([1, 1], [0.1, 0.2]))


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(1e-6, 1 - 1e-6)), min_size=1))
def test_log_loss_is_scikit_learns(rows):
    labels, probabilities = zip(*rows, strict=True)
    assert log_loss(labels, probabilities) == pytest.approx(sk.log_loss(labels, probabilities, labels=[0, 1]))


def test_certainty_that_is_wrong_costs_much_but_not_everything():
    assert log_loss([1], [0.0]) == pytest.approx(-np.log(1e-7))


@given(ROWS.filter(lambda rows: any(label for label, *_ in rows)), st.integers(1, 6))
def test_ndcg_is_scikit_learns_mean_over_groups(rows, k):
    """scikit-learn shares the gain of ties too; it scores a lone document by itself."""
    labels, scores, groups = (np.array(column) for column in zip(*rows, strict=True))
    found = []
    for group in np.unique(groups):
        y, s = labels[groups == group], scores[groups == group]
        if y.any():
            found.append(sk.ndcg_score([y], [s], k=k) if len(y) > 1 else 1.0)
    assert ndcg_score(labels, scores, groups, k=k) == pytest.approx(np.mean(found))


def test_ndcg_takes_groups_in_any_order():
    labels, scores, groups = [1, 0, 0, 1], [0.2, 0.9, 0.1, 0.8], ["b", "b", "a", "a"]
    shuffled = [2, 0, 3, 1]
    again = ndcg_score(*(np.array(column)[shuffled] for column in (labels, scores, groups)))
    assert ndcg_score(labels, scores, groups) == pytest.approx(again)


def test_ndcg_needs_a_positive_cut():
    with pytest.raises(ValueError, match="k is 0"):
        ndcg_score([1], [1.0], [0], k=0)


@given(ROWS.filter(bool))
def test_grouped_auc_is_a_weighted_mean_of_each_groups(rows):
    labels, scores, groups = (np.array(column) for column in zip(*rows, strict=True))
    judged = [g for g in np.unique(groups) if 0 < labels[groups == g].sum() < (groups == g).sum()]
    got = grouped_auc_score(labels, scores, groups)
    if not judged:
        assert np.isnan(got)
        return
    each = [sk.roc_auc_score(labels[groups == g], scores[groups == g]) for g in judged]
    assert got == pytest.approx(np.average(each, weights=[(groups == g).sum() for g in judged]))


def test_calibration_of_the_truth_is_near_zero_and_of_a_shift_is_the_shift():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.2, 0.7, 200_000)
    y = rng.random(len(p)) < p
    assert calibration_error(y, p) < 0.006
    assert calibration_error(y, p + 0.1) == pytest.approx(0.1, abs=0.006)
    assert calibration_ratio(y, p) == pytest.approx(1.0, abs=0.01)
    assert calibration_ratio(y, 2 * p) == pytest.approx(2.0, abs=0.02)


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1)), min_size=1, max_size=30), st.integers(1, 5))
def test_calibration_error_is_a_loop_over_equal_bins(rows, bins):
    ordered = sorted(range(len(rows)), key=lambda i: rows[i][1])
    error = 0.0
    for part in np.array_split(ordered, bins):
        if len(part):
            error += len(part) * abs(np.mean([rows[i][0] for i in part]) - np.mean([rows[i][1] for i in part]))
    labels, probabilities = zip(*rows, strict=True)
    assert calibration_error(labels, probabilities, bins=bins) == pytest.approx(error / len(rows))


def test_the_auc_interval_holds_the_truth_about_as_often_as_it_says():
    """Users differ, so rows are not independent; whole users are drawn."""
    truth_rng = np.random.default_rng(1)
    shift = truth_rng.normal(0, 1, 4000)
    big_y = truth_rng.random(4000) < 1 / (1 + np.exp(-shift))
    truth = auc_score(big_y, shift)
    held = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        users = np.repeat(np.arange(60), 10)
        score = np.repeat(rng.normal(0, 1, 60), 10)
        y = np.repeat(rng.random(60), 10) < 1 / (1 + np.exp(-score))  # a user's rows all agree
        interval = auc_interval(y, score, users, replicates=100, seed=seed)
        held += interval.low <= truth <= interval.high
    assert held >= 48  # 80 % where 95 % is promised: the percentile bootstrap of 60 users is a little narrow


def test_the_interval_of_one_class_does_not_exist():
    interval = auc_interval([1, 1], [0.1, 0.2], [1, 2])
    assert np.isnan([interval.value, interval.low, interval.high]).all()
