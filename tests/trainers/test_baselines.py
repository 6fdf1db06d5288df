"""The baselines are smoothed click rates of the training split and of nothing else."""

from __future__ import annotations

import pyarrow as pa
import pytest

from trainers.baselines import RateBaseline, fit_baselines


def test_a_rate_is_pulled_towards_the_overall_rate_by_ten_rows():
    train = pa.table({"item_id": [1, 1, 1, 2], "user_id": [7, 7, 8, 8], "click": pa.array([1, 1, 0, 0], pa.int8())})
    baseline = RateBaseline.fit(train, "item_id", "click")
    rows = pa.table({"item_id": [1, 2, 3]})
    assert baseline.predict(rows).tolist() == pytest.approx([(2 + 5) / 13, (0 + 5) / 11, 0.5])
    assert baseline.knows(rows.column("item_id").to_numpy()).tolist() == [True, True, False]


def test_both_baselines_are_fitted(make_clicks):
    found = fit_baselines(make_clicks(500, 1), "click")
    assert {name: baseline.key for name, baseline in found.items()} == {"popularity": "item_id", "user mean": "user_id"}
