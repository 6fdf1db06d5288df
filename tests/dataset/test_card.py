"""The data card: its numbers against numpy and scikit-learn, and the leaks it names."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from plait.offline.card import feature_card, feature_warnings, rank_auc


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=60))
def test_auc_agrees_with_scikit_learn(rows: list[tuple[int, bool]]) -> None:
    score, hits = np.array([row[0] for row in rows], dtype=float), np.array([row[1] for row in rows])
    if hits.all() or not hits.any():
        assert rank_auc(score, hits) is None
    else:
        assert rank_auc(score, hits) == pytest.approx(roc_auc_score(hits, score))


def noise(n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.normal(size=n), rng.random(n) < 0.3


def test_an_honest_feature_passes() -> None:
    values, hits = noise()
    card = feature_card("x", "v", pa.array(values + 0.5 * hits), hits)
    assert 0.55 < card.auc < 0.75
    assert card.mean == pytest.approx((values + 0.5 * hits).mean())
    assert feature_warnings(card, "click") == []


@pytest.mark.parametrize("sign", [1, -1])
def test_a_feature_that_is_the_label_is_named(sign: int) -> None:
    values, hits = noise()
    card = feature_card("n_clicks", "user_stats", pa.array(sign * (hits * 9 + values)), hits)
    (warning,) = feature_warnings(card, "click")
    assert "feature n_clicks (user_stats) alone predicts click" in warning


def test_a_feature_that_leaks_by_being_missing_is_named() -> None:
    values, hits = noise()
    column = pa.array([None if hit else float(value) for value, hit in zip(values, hits, strict=True)])
    assert "it probably leaks" in feature_warnings(feature_card("x", "v", column, hits), "click")[0]


def test_a_category_that_is_the_label_is_named_and_an_id_is_not() -> None:
    _, hits = noise()
    told = feature_card("state", "v", pa.array(np.where(hits, "bought", "seen")), hits)
    assert told.auc > 0.99
    assert told.distinct == 2
    ids = feature_card("session", "v", pa.array([f"s{i}" for i in range(len(hits))]), hits)
    assert 0.4 < ids.auc < 0.6  # an id for every row fits the rows it has seen and tells nothing of others


def test_nulls_and_constants_are_named() -> None:
    _, hits = noise(100)
    empty = feature_card("e", "v", pa.array([None] * 100, pa.float64()), hits)
    assert "null in every row" in feature_warnings(empty, "click")[0]
    half = feature_card("h", "v", pa.array([None, None, None, 1.0] * 25), hits)
    assert "null in 75%" in feature_warnings(half, "click")[0]
    same = feature_card("s", "v", pa.array([1] * 100), hits)
    assert "same value in every row" in feature_warnings(same, "click")[0]
    lists = feature_card("l", "v", pa.array([[1, 2], []] * 50), hits)
    assert lists.mean_length == 1.0
