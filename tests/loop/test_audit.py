"""What the audit takes for the values that were materialized when a request was served."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pyarrow as pa
import pytest

from plait import audit
from plait.service import FeatureSpec, ServiceSpec, ViewSpec

T0 = datetime(2024, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
MICROS = pa.timestamp("us", tz="UTC")


def spec_of(*views):
    return ServiceSpec(
        name="s",
        features=tuple(FeatureSpec(name=f"{view}_day", view=view, dtype=pa.int64(), side="request") for view in views),
        views=tuple(
            ViewSpec(name=view, join_keys=("user_id",), features=(f"{view}_day",), ttl=None, side="request")
            for view in views
        ),
        transforms=(),
        derived_keys={},
        request_fields={},
    )


def as_materialized(monkeypatch, runs, requests):
    """The day as of which each view's feature was looked up for requests on these days, and which are forgotten."""

    def point_in_time(store, spec, samples):
        days = [(moment - T0) // DAY for moment in samples["event_timestamp"].to_pylist()]
        return pa.table({feature.name: pa.array(days, pa.int64()) for feature in spec.features})

    def view(name):
        return SimpleNamespace(materialization_intervals=[(T0, T0 + day * DAY) for day in runs[name]])

    monkeypatch.setattr(audit, "point_in_time", point_in_time)
    times = pa.array([T0 + day * DAY for day in requests], MICROS)
    n = len(requests)
    rows = pa.table({"sample_id": list(range(n)), "user_id": [1] * n, "item_id": [1] * n, "event_timestamp": times})
    found, forgotten = audit._as_materialized(SimpleNamespace(get_feature_view=view), spec_of(*runs), rows)
    return (None if found is None else found.to_pydict()), forgotten


def test_each_view_is_looked_up_as_of_its_own_last_run(monkeypatch):
    runs = {"users": [1, 3, 5], "items": [2], "never": []}
    found, forgotten = as_materialized(monkeypatch, runs, [0, 1, 2, 4, 9])
    assert found["users_day"] == [0, 1, 1, 3, 5]  # before the first run: as of the request
    assert found["items_day"] == [0, 1, 2, 2, 2]
    assert not any(forgotten)


def test_nothing_is_said_where_the_registry_knows_of_no_run(monkeypatch):
    assert as_materialized(monkeypatch, {"users": []}, [1, 2]) == (None, [False, False])


def test_requests_before_the_record_are_told_apart(monkeypatch):
    monkeypatch.setattr(audit, "RUNS_ON_RECORD", 3)
    _, forgotten = as_materialized(monkeypatch, {"users": [4, 5, 6], "items": [2]}, [3, 4, 7])
    assert forgotten == [True, False, False]
    columns = pa.chunked_array([[1, 2, 3]]), pa.chunked_array([[1, 9, 3]]), pa.chunked_array([[1, 8, 3]])
    assert audit._audit_feature("f", *columns, [False] * 3, False).reasons == {"value": 1}
    assert audit._audit_feature("f", *columns, [False, True, True], False).reasons == {"not on record": 1}
    assert audit._audit_feature("f", *columns, [False, True, True], True).reasons == {"transform version": 1}


@pytest.mark.parametrize(("served", "reason"), [(8, "not materialized"), (7, "value"), (None, "missing online")])
def test_a_difference_has_one_reason(served, reason):
    columns = (pa.chunked_array([pa.array([value], pa.int64())]) for value in (served, 9, 8))
    assert audit._audit_feature("f", *columns, [False], False).reasons == {reason: 1}
