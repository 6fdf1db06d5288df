"""Measures of click models. Every function takes plain arrays: labels 0/1 and probabilities, shape (n,).

A name ending in `_score` grows with quality, one in `_loss` or `_error` falls.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate with its interval."""

    value: float
    low: float
    high: float


def auc_score(labels: npt.ArrayLike, scores: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Probability that a positive scores above a negative, ties counting half; NaN if either is absent.

    Source: Hanley and McNeil, Radiology 143, 1982 (the Mann-Whitney statistic).
    >>> auc_score([0, 1, 1, 0], [0.1, 0.4, 0.35, 0.4])
    0.625
    """
    return float(_weighted_auc(_ranks(scores), np.asarray(labels, np.float64), _weights(labels, weights)))


def log_loss(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Mean negative log likelihood in nats; probabilities are kept 1e-7 away from 0 and 1.

    >>> round(log_loss([1, 0], [0.5, 0.5]), 4)
    0.6931
    """
    y = np.asarray(labels, np.float64)
    p = np.clip(np.asarray(probabilities, np.float64), 1e-7, 1 - 1e-7)
    return float(-np.mean(y * np.log(p) + (1 - y) * np.log1p(-p)))


def calibration_error(labels: npt.ArrayLike, probabilities: npt.ArrayLike, *, bins: int = 15) -> float:
    """Expected calibration error: mean |observed - predicted| over `bins` bins of equal count.

    Rows are cut into bins by rank of their probability (ties by row order).
    Source: Naeini, Cooper and Hauskrecht, AAAI 2015; bins of equal count as in Nixon et al., CVPR workshops 2019.
    """
    y, p = np.asarray(labels, np.float64), np.asarray(probabilities, np.float64)
    order = np.argsort(p, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return float(sum(len(part) * abs(y[part].mean() - p[part].mean()) for part in parts) / len(y))


def calibration_ratio(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Sum of predicted over sum of observed clicks: 1 is right, above 1 is too sure; NaN without clicks."""
    clicks = float(np.sum(labels))
    return float(np.sum(probabilities)) / clicks if clicks else float("nan")


def ndcg_score(labels: npt.ArrayLike, scores: npt.ArrayLike, groups: npt.ArrayLike, *, k: int = 10) -> float:
    """Mean over groups of DCG at `k` over the ideal DCG at `k`; groups without a positive are left out.

    groups: (n,) a value per row; rows of one group are ranked against each other. Gain is the label, discount
    1 / log2(rank + 1). Rows with equal scores share the mean of their gains, so that row order is never rewarded.
    NaN if no group has a positive. Raises ValueError if k < 1.
    Source: Järvelin and Kekäläinen, ACM TOIS 20(4), 2002; ties as in McSherry and Najork, ECIR 2008.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    gains, values = np.asarray(labels, np.float64), np.asarray(scores, np.float64)
    if not len(gains):
        return float("nan")
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    dcg = _dcg(gains, values, group, k)
    ideal = _dcg(gains, gains, group, k)
    judged = ideal > 0
    return float(np.mean(dcg[judged] / ideal[judged])) if judged.any() else float("nan")


def grouped_auc_score(labels: npt.ArrayLike, scores: npt.ArrayLike, groups: npt.ArrayLike) -> float:
    """Mean AUC within groups, weighted by their rows; groups with one class only are left out.

    Source: Zhou et al., Deep Interest Network, KDD 2018 (there called weighted AUC or GAUC).
    """
    y, values = np.asarray(labels, np.float64), np.asarray(scores, np.float64)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    order = np.lexsort((values, group))
    total = weight = 0.0
    for rows in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        if len(rows) and 0 < y[rows].sum() < len(rows):
            total += len(rows) * auc_score(y[rows], values[rows])
            weight += len(rows)
    return total / weight if weight else float("nan")


def auc_interval(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    units: npt.ArrayLike,
    *,
    level: float = 0.95,
    replicates: int = 200,
    seed: int = 17,
) -> Interval:
    """AUC with a percentile bootstrap interval that draws whole `units` (users), whose rows are not independent.

    Replicates without both classes are left out. Source: Efron and Tibshirani 1993, chapter 13; clusters as in Field
    and Welsh, JRSS B 69(3), 2007.
    """
    y = np.asarray(labels, np.float64)
    ranks = _ranks(scores)
    names, unit = np.unique(np.asarray(units), return_inverse=True)
    rng = np.random.default_rng(seed)
    draws = (rng.multinomial(len(names), np.full(len(names), 1 / len(names)))[unit] for _ in range(replicates))
    values = np.array([_weighted_auc(ranks, y, draw.astype(np.float64)) for draw in draws])
    values = values[~np.isnan(values)]
    value = float(_weighted_auc(ranks, y, np.ones(len(y))))
    if not len(values):
        return Interval(value=value, low=float("nan"), high=float("nan"))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value=value, low=float(low), high=float(high))


def evaluate(labels: npt.ArrayLike, probabilities: npt.ArrayLike, groups: npt.ArrayLike) -> dict[str, float]:
    """All measures of one split, by name."""
    return {
        "auc": auc_score(labels, probabilities),
        "log_loss": log_loss(labels, probabilities),
        "ece": calibration_error(labels, probabilities),
        "calibration": calibration_ratio(labels, probabilities),
        "ndcg@10": ndcg_score(labels, probabilities, groups, k=10),
        "grouped_auc": grouped_auc_score(labels, probabilities, groups),
    }


def _ranks(scores: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """The index of each score among the distinct scores, ascending."""
    return np.unique(np.asarray(scores, np.float64), return_inverse=True)[1].reshape(-1)


def _weights(labels: npt.ArrayLike, weights: npt.ArrayLike | None) -> Array:
    return np.ones(len(np.asarray(labels))) if weights is None else np.asarray(weights, np.float64)


def _weighted_auc(ranks: npt.NDArray[np.int64], labels: Array, weights: Array) -> float:
    size = int(ranks.max(initial=-1)) + 1
    positive = np.bincount(ranks, weights * labels, minlength=size)
    negative = np.bincount(ranks, weights * (1 - labels), minlength=size)
    pairs = positive.sum() * negative.sum()
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / pairs) if pairs > 0 else float("nan")


def _dcg(gains: Array, scores: Array, group: npt.NDArray[np.int64], k: int) -> Array:
    """(n_groups,) DCG at k; each block of equal scores gives every one of its ranks the block's mean gain."""
    order = np.lexsort((-scores, group))
    gain, score, grouped = gains[order], scores[order], group[order]
    starts = np.searchsorted(grouped, np.arange(group.max() + 1))
    rank = np.arange(len(order)) - starts[grouped]
    discount = np.where(rank < k, 1 / np.log2(rank + 2), 0.0)
    new_block = np.ones(len(order), bool)
    new_block[1:] = (grouped[1:] != grouped[:-1]) | (score[1:] != score[:-1])
    block = np.cumsum(new_block) - 1
    mean_gain = np.bincount(block, gain) / np.bincount(block)
    return np.asarray(np.bincount(grouped, mean_gain[block] * discount), np.float64)
