"""Every form an entity frame can take gives the same answer; every wrong form gets one clear line."""

from __future__ import annotations

import os
import re
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plait.errors import StoreError
from plait.stores import asof_gather
from plait.stores.asof_job import CreatedCutoffWarning

MICROS = pa.timestamp("us", tz="UTC")
DAY = [datetime(2024, 1, day, tzinfo=UTC) for day in range(1, 11)]


@pytest.fixture
def stats(repo: Any, view: Any) -> Any:
    """A store with one view: user 1 is 10, 20, 30 from days 1, 3, 5; user 2 is 7 from day 2."""
    table = pa.table(
        {
            "user_id": [1, 1, 1, 2],
            "event_timestamp": pa.array([DAY[0], DAY[2], DAY[4], DAY[1]], MICROS),
            "created": pa.array([DAY[0], DAY[2], DAY[4], DAY[1]], MICROS),
            "a": [10, 20, 30, 7],
        }
    )
    repo.apply([view("stats", repo.write("stats.parquet", table), features={"a": "Int64"}, created="created")])
    return repo


ENTITIES = pa.table(
    {"user_id": [2, 1, 3, 1], "event_timestamp": pa.array([DAY[5], DAY[3], DAY[5], DAY[4]], MICROS), "y": [1, 0, 1, 0]}
)
EXPECTED = [7, 20, None, 30]


def values(repo: Any, frame: Any, **options: Any) -> list[Any]:
    return repo.store(**options).get_historical_features(frame, ["stats:a"]).to_arrow()["a"].to_pylist()


def test_pandas_arrow_parquet_and_sql_agree(stats: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pq.write_table(ENTITIES, stats.path / "entities.parquet")
    parts = stats.path / "entities"
    parts.mkdir()
    pq.write_table(ENTITIES.slice(0, 1), parts / "part-0.parquet")
    pq.write_table(ENTITIES.slice(1), parts / "part-1.parquet")
    monkeypatch.chdir(tmp_path.parent)  # the working directory must not matter
    frames = [
        ENTITIES,
        ENTITIES.to_pandas(),
        ENTITIES.to_batches()[0],
        stats.path / "entities.parquet",
        Path("entities.parquet"),
        "entities.parquet",
        "entities",
        "SELECT * FROM read_parquet('entities.parquet')",
        "with e as (from 'entities.parquet') select * from e;",
    ]
    for frame in frames:
        result = stats.store().get_historical_features(frame, ["stats:a"]).to_arrow()
        assert result["a"].to_pylist() == EXPECTED, frame
        assert result.select(ENTITIES.column_names).equals(ENTITIES), frame


def test_sql_may_name_the_projects_sources(stats: Any) -> None:
    query = "SELECT user_id, TIMESTAMPTZ '2024-01-04' AS event_timestamp FROM stats_source ORDER BY a"
    assert values(stats, query) == [7, 20, 20, 20]


@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Kolkata"])
def test_naive_times_are_utc_and_other_zones_are_converted(
    stats: Any, zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    monkeypatch.setitem(os.environ, "TZ", zone)
    time.tzset()
    try:
        frame = ENTITIES.to_pandas()
        naive = frame.assign(event_timestamp=frame.event_timestamp.dt.tz_localize(None))
        text = frame.assign(event_timestamp=frame.event_timestamp.dt.strftime("%Y-%m-%d %H:%M:%S"))
        elsewhere = frame.assign(event_timestamp=frame.event_timestamp.dt.tz_convert(zone))
        arrow = ENTITIES.set_column(1, "event_timestamp", ENTITIES["event_timestamp"].cast(pa.timestamp("ns")))
        rows = "(2, TIMESTAMP '2024-01-06'), (1, TIMESTAMP '2024-01-04')"
        sql = f"SELECT * FROM (VALUES {rows}) v(user_id, event_timestamp)"
        for given in (naive, text, elsewhere, arrow):
            assert values(stats, given) == EXPECTED
        assert values(stats, sql) == EXPECTED[:2]
        result = stats.store().get_historical_features(naive, ["stats:a"]).to_arrow()
        assert result["event_timestamp"].equals(ENTITIES["event_timestamp"])
    finally:
        monkeypatch.undo()
        time.tzset()


def test_the_only_time_column_may_have_another_name(stats: Any) -> None:
    assert values(stats, ENTITIES.rename_columns(["user_id", "shown_at", "y"])) == EXPECTED


def test_an_empty_frame_gives_an_empty_result_with_all_columns(stats: Any) -> None:
    result = stats.store().get_historical_features(ENTITIES.slice(0, 0), ["stats:a"]).to_arrow()
    assert result.num_rows == 0
    assert result.column_names == ["user_id", "event_timestamp", "y", "a"]


def test_null_keys_and_null_times_get_nulls_and_keep_their_row(stats: Any) -> None:
    table = pa.table(
        {"user_id": [None, 1, 1], "event_timestamp": pa.array([DAY[5], None, DAY[5]], MICROS), "y": [1, 2, 3]}
    )
    result = stats.store().get_historical_features(table, ["stats:a"]).to_arrow()
    assert result.column("a").to_pylist() == [None, None, 30]
    assert result.select(table.column_names).equals(table)


def test_a_date_range_needs_no_frame(stats: Any) -> None:
    job = stats.store().get_historical_features(features=["stats:a"], start_date=DAY[1], end_date=DAY[4])
    assert job.to_arrow().to_pylist() == [
        {"event_timestamp": DAY[1], "user_id": 2, "a": 7},
        {"event_timestamp": DAY[2], "user_id": 1, "a": 20},
        {"event_timestamp": DAY[4], "user_id": 1, "a": 30},
    ]
    assert job.metadata.min_event_timestamp == DAY[1]
    assert job.metadata.keys == ["user_id"]


def test_a_date_range_under_the_cutoff_has_the_moments_at_which_values_became_known(repo: Any, view: Any) -> None:
    """Not those at which they happened; and none of a row that nobody ever knew, or that is nobody's."""
    history = {
        "user_id": [1, 1, 1, None],
        "event_timestamp": pa.array([DAY[0], DAY[1], DAY[2], DAY[3]], MICROS),
        "created": pa.array([DAY[4], DAY[1], None, DAY[3]], MICROS),
        "a": [10, 20, 30, 40],
    }
    path = repo.write("late.parquet", pa.table(history))
    repo.apply([view("late", path, features={"a": "Int64"}, created="created")])
    store = repo.store(created_cutoff=True)
    job = store.get_historical_features(features=["late:a"], start_date=DAY[0], end_date=DAY[5])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CreatedCutoffWarning)
        rows = job.to_arrow().to_pylist()
    # On day 5 the value of day 1 becomes known, and is older than what was known already.
    assert rows == [
        {"event_timestamp": DAY[1], "user_id": 1, "a": 20},
        {"event_timestamp": DAY[4], "user_id": 1, "a": 20},
    ]


def test_a_path_that_begins_like_sql_is_a_path(stats: Any) -> None:
    for name in ("table.parquet", "values.parquet", "from/x.parquet", "select/"):
        path = stats.path / (f"{name}part.parquet" if name.endswith("/") else name)
        path.parent.mkdir(exist_ok=True)
        pq.write_table(ENTITIES, path)
        assert values(stats, name) == EXPECTED


def test_an_entity_file_that_is_rewritten_while_it_is_read_is_an_error_not_a_mix(
    stats: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stats.path / "entities.parquet"
    pq.write_table(ENTITIES, path)
    find_rows = asof_gather._matched_rows

    def find_rows_then_rewrite(*arguments: Any) -> pa.Array:
        found = find_rows(*arguments)
        pq.write_table(ENTITIES.slice(1), path)
        return found

    monkeypatch.setattr(asof_gather, "_matched_rows", find_rows_then_rewrite)
    with pytest.raises(StoreError, match=r"entities\.parquet was rewritten while it was read; run again"):
        values(stats, path)


def test_a_date_range_over_two_views_has_each_moment_once(repo: Any, view: Any) -> None:
    first = {"user_id": [1, 1], "event_timestamp": pa.array([DAY[1], DAY[3]], MICROS), "a": [1, 2]}
    second = {"user_id": [1, 1], "event_timestamp": pa.array([DAY[1], DAY[2]], MICROS), "b": [8, 9]}
    third = {"item_id": [5], "event_timestamp": pa.array([DAY[2]], MICROS), "c": [4]}
    repo.apply(
        [
            view("first", repo.write("first.parquet", pa.table(first)), features={"a": "Int64"}),
            view("second", repo.write("second.parquet", pa.table(second)), features={"b": "Int64"}),
            view(
                "third",
                repo.write("third.parquet", pa.table(third)),
                keys={"item_id": "Int64"},
                features={"c": "Int64"},
            ),
        ]
    )
    job = repo.store().get_historical_features(
        features=["first:a", "second:b", "third:c"], start_date=DAY[2].replace(tzinfo=None), end_date=DAY[9]
    )
    rows = [tuple(row.values()) for row in job.to_arrow().to_pylist()]
    # History before the range is seen (1 at day 3), rows before it are not listed.
    assert rows == [(DAY[2], 1, None, 1, 9, None), (DAY[2], None, 5, None, None, 4), (DAY[3], 1, None, 2, 9, None)]


def test_the_range_defaults_to_the_longest_ttl_before_now(repo: Any, view: Any) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    moments = [now - timedelta(days=age) for age in (9, 3, 1)]
    table = pa.table({"user_id": [1, 1, 1], "event_timestamp": pa.array(moments, MICROS), "a": [1, 2, 3]})
    path = repo.write("v.parquet", table)
    repo.apply([view("v", path, features={"a": "Int64"}, ttl=timedelta(days=5))])
    assert repo.store().get_historical_features(features=["v:a"]).to_arrow()["a"].to_pylist() == [2, 3]


WRONG = {
    "a list": ([1, 2], "is a list; give a pandas DataFrame, a pyarrow Table, SQL, the path"),
    "neither SQL nor a path": ("user_id = 3", "neither SQL .* nor a parquet file or folder"),
    "a missing file": ("nowhere.parquet", "the entity frame: nothing at .*nowhere.parquet"),
    "wrong SQL": ("SELECT user_id FROM nothing_here", "entity query does not run: .*tables it may name: stats_source"),
    "a missing key": (ENTITIES.drop_columns("user_id"), "no column 'user_id', a join key of view 'stats'"),
    "a key of another kind": (
        ENTITIES.set_column(0, "user_id", pa.array(["1", "2", "3", "4"])),
        "join key 'user_id' is VARCHAR in the entity frame but BIGINT",
    ),
    "a column named like a feature": (
        ENTITIES.rename_columns(["user_id", "event_timestamp", "a"]),
        "two columns named",
    ),
    "times that are no times": (
        ENTITIES.to_pandas().assign(event_timestamp="soon"),
        "'event_timestamp' does not hold times",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_frame_gets_one_clear_line(stats: Any, case: str) -> None:
    frame, message = WRONG[case]
    with pytest.raises(StoreError) as caught:
        stats.store().get_historical_features(frame, ["stats:a"]).to_arrow()
    assert re.search(message, str(caught.value)), str(caught.value)


def test_without_a_time_column_feast_says_so(stats: Any) -> None:
    from feast.errors import EntityTimestampInferenceException

    with pytest.raises(EntityTimestampInferenceException):
        stats.store().get_historical_features(pd.DataFrame({"user_id": [1]}), ["stats:a"]).to_arrow()
