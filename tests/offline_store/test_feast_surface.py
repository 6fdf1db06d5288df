"""What else Feast asks of an offline store goes on working: materialize, push, saved datasets, logs, monitoring."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plait.errors import StoreError
from plait.stores.asof_job import CreatedCutoffWarning

MICROS = pa.timestamp("us", tz="UTC")
T0 = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.fixture(autouse=True)
def feast_warns_of_itself() -> Iterator[None]:
    """Feast calls deprecated functions of its own dependencies on these paths, and its features experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def moments(*hours: float) -> pa.Array:
    return pa.array([T0 + timedelta(hours=hour) for hour in hours], MICROS)


def table() -> pa.Table:
    """User 1: 10, then 21 corrected to 20 at the same event time; user 2: 30; user 3: 40, a day later."""
    return pa.table(
        {
            "user_id": [1, 1, 1, 2, 3],
            "event_timestamp": moments(0, 5, 5, 3, 30),
            "created": moments(0, 6, 5, 3, 30),
            "a": [10, 20, 21, 30, 40],
        }
    )


@pytest.fixture(params=["one file", "a folder of parts"])
def stats(request: pytest.FixtureRequest, repo: Any, view: Any) -> Any:
    """A view "stats" that can be pushed to, on a file or on a folder, named relative to the repo."""
    from feast import PushSource

    rows = table()
    if request.param == "one file":
        repo.write("stats.parquet", rows, row_group_size=2)
        repo.source_path = "data/stats.parquet"
    else:
        repo.write("stats/part-0.parquet", rows.slice(0, 3))
        repo.write("stats/part-1.parquet", rows.slice(3))
        repo.source_path = "data/stats"
    stats = view("stats", repo.source_path, features={"a": "Int64"}, created="created")
    repo.apply([stats, PushSource(name="stats_push", batch_source=stats.batch_source)])
    pushed = view("pushed", repo.source_path, features={"a": "Int64"}, created="created")
    pushed.stream_source = PushSource(name="stats_push", batch_source=stats.batch_source)
    repo.apply([pushed])
    return repo


@pytest.mark.parametrize("latest", [False, True])
def test_materialize_writes_the_newest_row_of_each_key_in_the_range(stats: Any, latest: bool) -> None:
    store = stats.store()
    store.config.materialization_config.pull_latest_features = latest
    store.materialize(T0, T0 + timedelta(hours=24), feature_views=["stats"])
    online = store.get_online_features(["stats:a"], [{"user_id": user} for user in (1, 2, 3)]).to_dict()
    # The correction (created later) wins; user 3 is after the range.
    assert online["a"][1:] == [30, None]
    assert online["a"][0] in ((20,) if latest else (20, 21))


def test_pull_latest_equals_the_stock_store(stats: Any) -> None:
    store, stock = stats.store(), stats.store("duckdb")
    view = store.get_feature_view("stats")
    view.batch_source.file_options.uri = str(stats.path / stats.source_path)
    path = stats.path / stats.source_path
    if path.is_dir():
        view.batch_source.file_options.uri = str(path / "*.parquet")  # what the stock store can read
    results = []
    for one in (store, stock):
        source = store.get_feature_view("stats").batch_source if one is store else view.batch_source
        job = one._get_provider().offline_store.pull_latest_from_table_or_query(
            config=one.config,
            data_source=source,
            join_key_columns=["user_id"],
            feature_name_columns=["a"],
            timestamp_field="event_timestamp",
            created_timestamp_column="created",
            start_date=T0,
            end_date=T0 + timedelta(hours=30),
        )
        results.append(job.to_arrow().sort_by("user_id"))
    assert results[0].equals(results[1])
    assert results[0]["a"].to_pylist() == [20, 30, 40]


def pull_latest(store: Any, end: datetime) -> dict[int, int]:
    """View v's newest `a` of each user, in the order of users."""
    job = store._get_provider().offline_store.pull_latest_from_table_or_query(
        config=store.config,
        data_source=store.get_feature_view("v").batch_source,
        join_key_columns=["user_id"],
        feature_name_columns=["a"],
        timestamp_field="event_timestamp",
        created_timestamp_column="created",
        start_date=T0 - timedelta(hours=1),
        end_date=end,
    )
    return {row["user_id"]: row["a"] for row in job.to_arrow().sort_by("user_id").to_pylist()}


def test_of_rows_that_tie_in_all_times_the_one_written_last_is_pulled_as_in_history(repo: Any, view: Any) -> None:
    moment = pa.array([T0, T0], MICROS)
    for part, values in enumerate([(1, 2), (3, 4)]):
        columns = {"user_id": [1, 2], "event_timestamp": moment, "created": moment, "a": list(values)}
        repo.write(f"v/part-{part}.parquet", pa.table(columns))
    repo.apply([view("v", str(repo.path / "data/v"), features={"a": "Int64"}, created="created")])
    store = repo.store()
    pulled = list(pull_latest(store, T0 + timedelta(hours=1)).values())
    frame = pa.table({"user_id": [1, 2], "event_timestamp": moment})
    assert pulled == store.get_historical_features(frame, ["v:a"]).to_arrow()["a"].to_pylist() == [3, 4]


@pytest.mark.parametrize("cutoff", [True, False])
def test_a_replayed_home_pulls_only_what_is_known_by_its_now(repo: Any, view: Any, cutoff: bool) -> None:
    """What history hides must not be served either."""
    rows = {
        "user_id": [1, 1, 2],
        "event_timestamp": pa.array([T0, T0 + timedelta(hours=1), T0], MICROS),
        "created": pa.array([T0, T0 + timedelta(hours=9), None], MICROS),
        "a": [1, 2, 3],
    }
    repo.apply([view("v", repo.write("v.parquet", pa.table(rows)), features={"a": "Int64"}, created="created")])
    (repo.path / "feature_store.yaml").write_text("")
    (repo.path / ".plait").mkdir()
    store = repo.store(created_cutoff=cutoff)
    frame = pa.table({"user_id": [1, 2], "event_timestamp": pa.array([T0 + timedelta(hours=5)] * 2, MICROS)})

    def pulled(now: datetime) -> dict[int, int]:
        offset = now - datetime.now(UTC)
        (repo.path / ".plait" / "clock.json").write_text(json.dumps({"offset_us": offset // timedelta(microseconds=1)}))
        return pull_latest(store, T0 + timedelta(hours=5))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CreatedCutoffWarning)
        history = store.get_historical_features(frame, ["v:a"]).to_arrow()["a"].to_pylist()
    assert pulled(T0 + timedelta(hours=5)) == {
        user: value for user, value in zip((1, 2), history, strict=True) if value is not None
    }
    assert pulled(T0 + timedelta(hours=9)) == ({1: 2} if cutoff else {1: 2, 2: 3})


def test_pull_all_takes_both_ends_of_the_range_and_all_when_there_is_none(stats: Any) -> None:
    store = stats.store()
    pull = store._get_provider().offline_store.pull_all_from_table_or_query
    common = {
        "config": store.config,
        "data_source": store.get_feature_view("stats").batch_source,
        "join_key_columns": ["user_id"],
        "feature_name_columns": ["a"],
        "timestamp_field": "event_timestamp",
    }
    some = pull(**common, start_date=T0 + timedelta(hours=3), end_date=T0 + timedelta(hours=5)).to_arrow()
    assert sorted(some["a"].to_pylist()) == [20, 21, 30]
    assert some.column_names == ["user_id", "a", "event_timestamp"]
    everything = pull(**common)
    assert len(everything.to_df()) == 5
    assert [batch.num_rows for batch in everything.to_arrow_reader(2)] == [2, 2, 1]


def test_a_push_appends_to_the_source_and_history_sees_it(stats: Any) -> None:
    from feast.data_source import PushMode

    store = stats.store()
    frame = pd.DataFrame(
        {
            "a": [99, 98],
            "user_id": [2, 9],
            "created": [T0 + timedelta(hours=7)] * 2,
            "event_timestamp": [T0 + timedelta(hours=7)] * 2,
        }
    )
    store.push("stats_push", frame, to=PushMode.OFFLINE)
    store.push("stats_push", frame.assign(a=[97, 96]), to=PushMode.OFFLINE)
    entities = pa.table({"user_id": [2, 9, 1, 2], "event_timestamp": moments(8, 8, 8, 6)})
    result = store.get_historical_features(entities, ["stats:a"]).to_arrow()
    # Pushed twice with the same times: the last push wins.
    assert result["a"].to_pylist() == [97, 96, 20, 30]
    left = [path.name for path in (stats.path / "data").rglob("*") if path.name.startswith(".")]
    assert left == []


def test_a_push_of_other_columns_is_refused_and_changes_nothing(stats: Any) -> None:
    store = stats.store()
    before = sorted((path, path.read_bytes()) for path in (stats.path / "data").rglob("*.parquet"))
    view = store.get_feature_view("stats")
    with pytest.raises(StoreError, match=r"view 'stats': the rows have the columns \['user_id'\]"):
        store._get_provider().offline_store.offline_write_batch(
            store.config, view, pa.table({"user_id": [1]}), lambda n: None
        )
    assert sorted((path, path.read_bytes()) for path in (stats.path / "data").rglob("*.parquet")) == before


@pytest.mark.parametrize("target", ["saved.parquet", "saved/set"])
def test_a_saved_dataset_is_written_and_read_back(stats: Any, target: str) -> None:
    from feast.errors import SavedDatasetLocationAlreadyExists
    from feast.infra.offline_stores.file_source import SavedDatasetFileStorage

    store = stats.store()
    entities = pa.table({"user_id": [2, 1, 5], "event_timestamp": moments(8, 8, 8)})
    job = store.get_historical_features(entities, ["stats:a"])
    dataset = store.create_saved_dataset(job, "saved", SavedDatasetFileStorage(target))
    assert (dataset.min_event_timestamp, dataset.max_event_timestamp) == (T0 + timedelta(hours=8),) * 2
    again = store.get_saved_dataset("saved").to_df()
    assert again[["user_id", "a"]].to_dict("list")["user_id"] == [2, 1, 5]
    assert again["a"].tolist()[:2] == [30, 20]
    with pytest.raises(SavedDatasetLocationAlreadyExists):
        job.persist(SavedDatasetFileStorage(target))
    job.persist(SavedDatasetFileStorage(target), allow_overwrite=True)
    assert (stats.path / target).exists()


@pytest.mark.parametrize("partition_by", [None, ["__log_date"]])
def test_logged_features_are_parts_that_feast_reads_back(stats: Any, partition_by: list[str] | None) -> None:
    from feast import FeatureService
    from feast.feature_logging import LoggingConfig
    from feast.infra.offline_stores.file_source import FileLoggingDestination

    store = stats.store()
    destination = FileLoggingDestination(path="logs", partition_by=partition_by)
    service = FeatureService(
        name="service",
        features=[store.get_feature_view("stats")[["a"]]],
        logging_config=LoggingConfig(destination=destination),
    )
    store.apply([service])
    logs = pa.table(
        {
            "user_id": [1, 2],
            "stats__a": [10, 20],
            "stats__a__timestamp": moments(0, 1),
            "stats__a__status": pa.array([2, 2], pa.int32()),
            "__log_timestamp": moments(1, 2),
            "__log_date": pa.array([T0.date()] * 2),
            "__request_id": ["r1", "r2"],
        }
    )
    store.write_logged_features(logs, service)
    staged = stats.path / "staged.parquet"
    pq.write_table(logs, staged)
    store.write_logged_features(staged, service)
    job = store._get_provider().retrieve_feature_service_logs(
        feature_service=service,
        start_date=T0,
        end_date=T0 + timedelta(hours=1.5),
        config=store.config,
        registry=store.registry,
    )
    read = job.to_arrow()
    assert read["__request_id"].to_pylist() == ["r1", "r1"]
    assert read["stats__a"].to_pylist() == [10, 10]


def test_monitoring_computes_and_keeps_metrics(stats: Any) -> None:
    store = stats.store()
    offline = store._get_provider().offline_store
    source = store.get_feature_view("stats").batch_source
    metrics = offline.compute_monitoring_metrics(
        store.config, source, [("a", "numeric")], "event_timestamp", T0, T0 + timedelta(hours=24)
    )
    assert metrics[0]["row_count"] == 4
    assert metrics[0]["max_val"] == 30
    newest = offline.get_monitoring_max_timestamp(store.config, source, "event_timestamp")
    assert newest == T0 + timedelta(hours=30)
    offline.ensure_monitoring_tables(store.config)
    assert list(Path(stats.path).rglob("*monitoring*"))
