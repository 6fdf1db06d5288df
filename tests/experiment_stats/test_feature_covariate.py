"""CUPED by a feature of the feature store, as of each unit's first exposure."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.metrics import parse_metrics
from experiments.report import build_report
from experiments.stats.cuped import cuped_means
from experiments.stats.effects import difference
from experiments.stats.moments import PairMoments
from plait.errors import SpecError, UnknownNameError

N = 200
YAML = """\
project: tiny
provider: local
registry: {registry_type: sql, path: "sqlite:///.plait/registry.db"}
offline_store: {type: plait.stores.offline.AsofDuckDBOfflineStore}
online_store: {type: sqlite, path: .plait/online.db}
entity_key_serialization_version: 3
"""


@pytest.fixture
def habits(log):
    """A view of one number per user, known before exposure for three in four, and another row from after it."""
    from feast import Entity, FeatureService, FeatureView, Field, FileSource
    from feast.types import Float64, String
    from feast.value_type import ValueType

    from plait.service import open_store

    rng = np.random.default_rng(1)
    value = rng.gamma(2, 2, N)
    known = np.arange(N) % 4 != 0
    start = log.until - timedelta(days=30)
    users = np.concatenate([np.arange(N)[known], np.arange(N)])
    times = [start - timedelta(days=2)] * int(known.sum()) + [start + timedelta(days=2)] * N
    stamps = pa.array(times, pa.timestamp("us", tz="UTC"))
    table = pa.table(
        {
            "user_id": pa.array(users, pa.int64()),
            "event_timestamp": stamps,
            "created": stamps,
            "habit": np.concatenate([value[known], np.full(N, 1e6)]),
            "mood": ["calm"] * len(users),
        }
    )
    path = log.home.features / "habits"
    path.mkdir(parents=True)
    pq.write_table(table, path / "part-0.parquet")
    (log.home.project / "feature_store.yaml").write_text(YAML)
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    view = FeatureView(
        name="habits",
        entities=[user],
        schema=[Field(name="habit", dtype=Float64), Field(name="mood", dtype=String)],
        source=FileSource(
            name="habits_table", path=str(path), timestamp_field="event_timestamp", created_timestamp_column="created"
        ),
        ttl=timedelta(days=365),
    )
    open_store(log.home).apply([user, view, FeatureService(name="habitual", features=[view])])
    log.exposures(np.arange(N), np.where(np.arange(N) % 2, "control", "new"))
    clicks = rng.poisson(value)
    log.feedback(np.repeat(np.arange(N), clicks))
    return np.where(known, value, value[known].mean()), clicks


def declared(feature="habit", service="habitual"):
    return parse_metrics(
        {
            "analysis": {"bootstrap": 0},
            "metrics": [
                {"name": "clicks", "type": "count", "event": "click",
                 "cuped": {"feature_service": service, "feature": feature}},
                {"name": "click_share", "type": "ratio", "numerator": {"event": "click"},
                 "denominator": {"event": "any"}, "cuped": {"feature_service": service, "feature": feature}},
            ],
        }
    )  # fmt: skip


@pytest.mark.slow
def test_the_covariate_is_the_feature_as_of_the_first_exposure(log, habits):
    """Rows written after exposure are not read; users without a value get the mean of the others."""
    value, clicks = habits
    result, ratio = build_report(log.home, "test", metrics=declared(), until=log.until).metrics
    assert [value.adjusted or value.value for value in ratio.arms] == pytest.approx([1.0, 1.0])
    arms = [np.arange(N) % 2 == 1, np.arange(N) % 2 == 0]
    expected = cuped_means([PairMoments.of(clicks[arm], value[arm]) for arm in arms])
    theirs = difference(*expected.estimates)
    ours = result.comparisons[0].adjusted_absolute
    assert result.variance_removed == pytest.approx(expected.variance_removed)
    assert result.variance_removed > 0.3
    np.testing.assert_allclose([ours.estimate, ours.se, ours.p_value], [theirs.estimate, theirs.se, theirs.p_value])
    assert result.pre_period["new"] > 0.001

    with pytest.raises(UnknownNameError, match="did you mean 'habit'"):
        build_report(log.home, "test", metrics=declared("habitt"), until=log.until)
    with pytest.raises(UnknownNameError, match="did you mean 'habitual'"):
        build_report(log.home, "test", metrics=declared(service="habitul"), until=log.until)
    with pytest.raises(SpecError, match="cannot be a covariate"):
        build_report(log.home, "test", metrics=declared("mood"), until=log.until)
