"""The match by sorted integers against the ASOF join: the same rows, or left to it."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plait.stores import asof_gather, asof_search

T0 = datetime(2024, 1, 1, tzinfo=UTC)
MICROS = pa.timestamp("us", tz="UTC")
KEYS = st.one_of(st.none(), st.sampled_from([-128, -1, 0, 1, 2, 127]))
FAR_KEYS = st.sampled_from([None, -(2**63), -1, 0, 2**40, 2**63 - 1])
HOURS = st.one_of(st.none(), st.integers(-3, 12))
TYPES = [pa.int8(), pa.int16(), pa.int32(), pa.int64()]


def table(rows: list[tuple[Any, Any]], type_: pa.DataType) -> pa.Table:
    moments = [None if hour is None else T0 + timedelta(hours=hour) for _, hour in rows]
    return pa.table(
        {
            "user_id": pa.array([key for key, _ in rows], type_),
            "event_timestamp": pa.array(moments, MICROS),
        }
    )


def answers(store: Any, entities: pa.Table, monkeypatch: pytest.MonkeyPatch) -> tuple[pa.Table, pa.Table, list[bool]]:
    """The result with and without the search, and for each view whether the search knew."""
    knew: list[bool] = []

    def spied(*arguments: Any) -> pa.Array | None:
        found = asof_search.search(*arguments)
        knew.append(found is not None)
        return found

    job = store.get_historical_features(entities, ["v:a"])
    with monkeypatch.context() as patch:
        patch.setattr(asof_gather, "search", spied)
        searched = job.to_arrow()
    with monkeypatch.context() as patch:
        patch.setattr(asof_search, "SEARCHED_ROWS", 0)
        joined = job.to_arrow()
    return searched, joined, knew


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data(), ttl=st.sampled_from([None, timedelta(hours=1), timedelta(hours=4)]), far=st.booleans())
def test_it_finds_the_rows_that_the_join_finds(
    data: st.DataObject, ttl: timedelta | None, far: bool, fresh_repo: Any, view: Any
) -> None:
    keys, types = (FAR_KEYS, [pa.int64()]) if far else (KEYS, TYPES)
    parts = data.draw(st.lists(st.lists(st.tuples(keys, HOURS), max_size=12), min_size=1, max_size=2))
    entities = data.draw(st.lists(st.tuples(keys, HOURS), min_size=1, max_size=10))
    repo = fresh_repo()
    own = data.draw(st.sampled_from(types))
    for number, rows in enumerate(parts):
        values = pa.array([100 * number + i for i in range(len(rows))], pa.int64())
        repo.write(f"v/{number}.parquet", table(rows, own).append_column("a", values))
    repo.apply([view("v", str(repo.path / "data/v"), features={"a": "Int64"}, ttl=ttl)])
    frame = table(entities, data.draw(st.sampled_from(types)))
    with pytest.MonkeyPatch.context() as patch:
        searched, joined, _ = answers(repo.store(), frame, patch)
    assert searched.equals(joined)


@pytest.mark.parametrize(
    ("rows", "key_type", "knows"),
    [
        ([(1, 0), (1, 5), (2, 3)], pa.int32(), True),
        ([(1, 0), (1, 0)], pa.int64(), False),  # a tie: the join decides
        ([(-(2**62), 0), (2**62, 5)], pa.int64(), False),  # the pairs do not fit
        ([(1, 0)], pa.float64(), False),
        ([], pa.int64(), False),
        ([(None, 0), (1, None)], pa.int64(), False),  # nothing that anyone could see
    ],
    ids=["integers", "tie", "far apart", "floats", "empty", "nulls"],
)
def test_it_knows_where_it_cannot_tell(
    rows: list[tuple[Any, Any]], key_type: pa.DataType, knows: bool, repo: Any, view: Any, monkeypatch: Any
) -> None:
    values = pa.array(np.arange(len(rows)), pa.int64())
    path = repo.write("v.parquet", table(rows, key_type).append_column("a", values))
    repo.apply([view("v", path, features={"a": "Int64"})])
    frame = table([(1, 5), (1, 4), (2, 2), (2, 3), (3, 9), (None, 9), (1, None)], pa.int64())
    searched, joined, knew = answers(repo.store(), frame, monkeypatch)
    assert searched.equals(joined)
    assert knew == [knows]
    if knows:
        assert searched["a"].to_pylist() == [1, 0, None, 2, None, None, None]


def test_a_failure_in_one_view_ends_the_work_on_the_others(repo: Any, view: Any, monkeypatch: Any) -> None:
    rows = table([(1, 0), (2, 3)], pa.int64())
    views = [
        view(
            name,
            repo.write(f"{name}.parquet", rows.append_column(f"{name}_a", pa.array([1, 2]))),
            features={f"{name}_a": "Int64"},
        )
        for name in ("v", "w")
    ]
    repo.apply(views)
    interrupted: list[int] = []
    begun = threading.Event()
    find = asof_gather._matched_rows

    def fail_for_v(db: Any, bound: Any, plan: Any) -> Any:
        if plan.name == "v":
            begun.wait(timeout=10)  # in vain where there is one core: the other work is then never begun
            raise MemoryError("no room")
        begun.set()
        try:
            # Would run for minutes.
            db.execute("SELECT max(a.range + b.range) FROM range(1000000) a, range(1000000) b").fetchall()
        except Exception as error:
            interrupted.append(1)
            raise error
        return find(db, bound, plan)

    monkeypatch.setattr(asof_gather, "_matched_rows", fail_for_v)
    with pytest.raises(MemoryError):
        repo.store().get_historical_features(rows, ["v:v_a", "w:w_a"]).to_arrow()
    assert interrupted == [1] * begun.is_set()
