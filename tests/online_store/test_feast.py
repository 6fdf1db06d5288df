"""Feast's own commands on top of the stores and the engine: apply, materialize, push, get_online_features."""

import json
import logging
import sqlite3
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, PushSource
from feast.infra.common.materialization_job import MaterializationTask
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus
from feast.types import Array, Bool, Bytes, Float32, Float64, Int32, Int64, Json, Map, String, UnixTimestamp
from feast.value_type import ValueType

from plait.errors import StoreError
from plait.stores.engine import ColumnarComputeEngine, merge_intervals
from plait.stores.sqlite import PackedSQLiteOnlineStore

T0 = datetime(2024, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
MOMENT = pa.timestamp("us", tz="UTC")
FIELDS = {"n": Int64, "x": Float64, "s": String, "tags": Array(String), "flag": Bool, "f": Float32, "at": UnixTimestamp}
FIELDS |= {"map": Map, "json": Json, "raw": Bytes, "small": Int32, "vector": Array(Float32)}


def history(rows):
    """A source table; each row is (user_id, event timestamp, created, n)."""
    users, events, created, numbers = zip(*rows, strict=True)
    return pa.table(
        {
            "user_id": pa.array(users, pa.int64()),
            "event_timestamp": pa.array(events, MOMENT),
            "created": pa.array(created, MOMENT),
            "n": pa.array(numbers, pa.int64()),
            "x": pa.array([None if n is None else n / 3 for n in numbers]),
            "s": [None if n is None else f"user {n}" for n in numbers],
            "tags": pa.array([["a"] * (n % 3) if n is not None else None for n in numbers], pa.list_(pa.string())),
            "flag": [n is not None and n % 2 == 0 for n in numbers],
            "f": pa.array([0.5] * len(numbers), pa.float32()),
            "at": pa.array(events, MOMENT),
            # As JSON: of an Arrow map stock Feast gets arrays of pairs, which it takes for no map.
            "map": pa.array([None if n is None else f'{{"a": {n}, "b": {{}}}}' for n in numbers], pa.string()),
            "json": pa.array([None if n is None else f'{{"a": [{n}]}}' for n in numbers], pa.string()),
            "raw": pa.array([None if n is None else "é".encode() * (n % 3) for n in numbers], pa.binary()),
            "small": pa.array(numbers, pa.int32()),
            "vector": pa.array([None if n is None else [n / 3] * (n % 3) for n in numbers], pa.list_(pa.float32())),
        }
    )


class Project:
    """A Feast project over one parquet source."""

    def __init__(self, folder: Path, config, *, ttl=None) -> None:
        self.source = folder / "source.parquet"
        self.store = FeatureStore(config=config)
        self.ttl = ttl

    def write(self, rows) -> None:
        pq.write_table(history(rows), self.source)

    def apply(self, fields=FIELDS) -> FeatureView:
        user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
        batch = FileSource(path=str(self.source), timestamp_field="event_timestamp", created_timestamp_column="created")
        view = FeatureView(
            name="stats",
            entities=[user],
            ttl=self.ttl,
            schema=[Field(name="user_id", dtype=Int64), *(Field(name=n, dtype=t) for n, t in fields.items())],
            source=PushSource(name="pushed", batch_source=batch),
        )
        self.store.apply([user, view, FeatureService(name="service", features=[view])])
        return view

    def read(self, *users, features=("n",)):
        rows = [{"user_id": user} for user in users]
        refs = [f"stats:{name}" for name in features]
        got = self.store.get_online_features(features=refs, entity_rows=rows).to_dict()
        return got[features[0]] if len(features) == 1 else {name: got[name] for name in features}


@pytest.fixture
def project(backend, tmp_path):
    return Project(tmp_path, backend.config)


def test_apply_materialize_and_read_give_the_latest_row_of_each_entity(project):
    later, future = T0 + DAY, T0 + 5 * DAY
    project.write([(1, T0, T0, 1), (1, later, T0, 2), (2, T0, T0, 3), (2, T0, later, 4), (3, future, T0, 5)])
    project.apply()
    project.store.materialize(T0 - DAY, T0 + 2 * DAY)
    assert project.read(1, 2, 3, 4) == [2, 4, None, None]


def test_values_of_all_types_are_those_that_stock_feast_serves(project, stores, tmp_path):
    rows = [(user, T0 + timedelta(seconds=user), T0, user if user % 4 else None) for user in range(12)]
    project.write(rows)
    project.apply()
    project.store.materialize(T0 - DAY, T0 + DAY)
    stock_folder = tmp_path / "stock"
    stock_folder.mkdir()
    online = {"type": "sqlite", "path": str(stock_folder / "stock.db")}
    stock = Project(stock_folder, stores.config(stock_folder, online, batch_engine={"type": "local"}))
    stock.write(rows)
    stock.apply()
    stock.store.materialize(T0 - DAY, T0 + DAY)
    names = tuple(FIELDS)
    assert project.read(*range(14), features=names) == stock.read(*range(14), features=names)


def test_a_service_reads_all_its_views_and_tells_what_it_lacks(project):
    project.write([(1, T0, T0, 1)])
    project.apply()
    project.store.materialize(T0 - DAY, T0 + DAY)
    service = project.store.get_feature_service("service")
    response = project.store.get_online_features(features=service, entity_rows=[{"user_id": 1}, {"user_id": 2}])
    got = response.to_dict()
    assert (got["n"], got["s"], got["tags"]) == ([1, None], ["user 1", None], [["a"], None])
    statuses = {status for vector in response.proto.results[1:] for status in [vector.statuses[1]]}
    assert statuses == {FieldStatus.NOT_FOUND}  # in Redis as in SQLite


def test_push_writes_at_once_and_never_over_a_newer_row(project):
    project.write([(1, T0, T0, 1)])
    project.apply()
    project.store.materialize(T0 - DAY, T0 + DAY)
    for at, number in ((T0 + DAY, 7), (T0, 8)):
        frame = history([(1, at, at, number)]).to_pandas()
        project.store.push("pushed", frame)
    assert project.read(1) == [7]


@pytest.fixture
def feature_server(project, find_port):
    """Feast's own feature server over the project's store: its address."""
    uvicorn = pytest.importorskip("uvicorn")
    from feast.feature_server import get_app

    project.write([(1, T0, T0, 1)])
    project.apply()
    project.store.materialize(T0 - DAY, T0 + DAY)
    port = find_port()
    config = uvicorn.Config(get_app(project.store), host="127.0.0.1", port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_feature_server_reads_and_pushes(feature_server):
    frame = history([(2, T0, T0, 5)]).to_pandas()
    frame[["event_timestamp", "created"]] = frame[["event_timestamp", "created"]].astype(str)
    frame["at"] = int(T0.timestamp())  # in JSON, Feast takes moments as seconds
    columns = {name: list(column.values()) for name, column in json.loads(frame.to_json()).items()}
    pushed = requests.post(
        f"{feature_server}/push", json={"push_source_name": "pushed", "df": columns, "to": "online"}, timeout=30
    )
    assert pushed.status_code == 200, pushed.text
    asked = {"features": ["stats:n"], "entities": {"user_id": [1, 2, 3]}}
    answer = requests.post(f"{feature_server}/get-online-features", json=asked, timeout=30).json()
    vectors = dict(zip(answer["metadata"]["feature_names"], answer["results"], strict=True))
    assert vectors["n"]["values"] == [1, 5, None]


def test_incremental_runs_pick_up_rows_that_arrive_late_within_the_overlap(project):
    project.write([(1, T0, T0, 1)])
    project.apply()
    project.store.materialize(T0 - DAY, T0 + DAY)
    # Half a day before the last run's end, and known only after it; then one beyond the overlap of a day.
    late, lost = T0 + DAY / 2, T0 - DAY / 2
    project.write([(1, T0, T0, 1), (2, late, T0 + 2 * DAY, 2), (3, lost, T0 + 2 * DAY, 3)])
    project.store.materialize_incremental(T0 + 2 * DAY)
    assert project.read(1, 2, 3) == [1, 2, None]
    project.store.materialize(T0 - DAY, T0 + 2 * DAY)
    assert project.read(3) == [3]


def test_the_registry_s_intervals_stay_few_however_often_a_view_is_materialized(project, monkeypatch):
    monkeypatch.setattr("plait.stores.engine.RUNS_ON_RECORD", 3)
    project.write([(1, T0, T0, 1)])
    project.apply()
    for day in range(8):
        project.store.materialize_incremental(T0 + (day + 1) * DAY) if day else project.store.materialize(T0, T0 + DAY)
        project.store.materialize(T0, T0 + DAY)  # again and again the same
    intervals = project.store.get_feature_view("stats").materialization_intervals
    assert len(intervals) <= 5  # Feast appends the last one after the engine merged
    assert merge_intervals(intervals) == [(T0, T0 + 8 * DAY)]
    # When the last runs were is not forgotten.
    assert sorted(end for _, end in intervals)[-3:] == [T0 + day * DAY for day in (6, 7, 8)]


def test_a_view_that_gained_a_feature_serves_old_rows_until_it_is_materialized_again(project):
    project.write([(1, T0, T0, 1), (2, T0, T0, 2)])
    project.apply({"n": Int64})
    project.store.materialize(T0 - DAY, T0 + DAY)
    project.apply({"n": Float64, "s": String})
    assert project.read(1, 2, features=("n", "s")) == {"n": [1.0, 2.0], "s": [None, None]}
    project.store.materialize(T0 - DAY, T0 + DAY)
    assert project.read(1, 2, features=("n", "s")) == {"n": [1.0, 2.0], "s": ["user 1", "user 2"]}


def test_an_expired_row_is_not_served(backend, tmp_path):
    project = Project(tmp_path, backend.config, ttl=DAY)
    fresh = datetime.now(UTC) - DAY / 2
    project.write([(1, T0, T0, 1), (2, fresh, fresh, 2)])
    project.apply()
    project.store.materialize(T0 - DAY, datetime.now(UTC))
    assert project.read(1, 2) == [None, 2]


def test_a_home_that_replays_history_expires_rows_by_its_own_clock(tmp_path, stores):
    online = {"type": "plait.stores.sqlite.PackedSQLiteOnlineStore", "path": ".plait/online.db"}
    config = stores.config(tmp_path, online)
    project = Project(tmp_path, config, ttl=DAY)
    project.write([(1, T0, T0, 1)])
    project.apply()
    project.store.materialize(T0 - DAY, T0 + DAY)
    assert project.read(1) == [None]
    clock = tmp_path / ".plait" / "clock.json"
    for now, expected in ((T0 + DAY / 2, [1]), (T0 + 2 * DAY, [None])):
        offset = now - datetime.now(UTC)
        clock.unlink(missing_ok=True)
        clock.write_text(json.dumps({"offset_us": offset // timedelta(microseconds=1)}))
        assert project.read(1) == expected


def test_deleting_a_view_drops_its_rows(project):
    project.write([(1, T0, T0, 1)])
    view = project.apply()
    project.store.materialize(T0 - DAY, T0 + DAY)
    service = project.store.get_feature_service("service")
    project.store.apply([], objects_to_delete=[view, service], partial=False)
    project.apply()
    assert project.read(1) == [None]
    project.store.teardown()


# The engine ---------------------------------------------------------------------------------------------------------


class Interrupted(PackedSQLiteOnlineStore):
    """Fails at the given write, as a machine that goes down; counts the writes it lets through."""

    def __init__(self, fail_at):
        super().__init__()
        self.fail_at, self.n_puts = fail_at, 0

    def put(self, *args):
        self.n_puts += 1
        if self.n_puts == self.fail_at:
            raise StoreError("the power went")
        super().put(*args)


def test_an_interrupted_materialization_goes_on_where_it_stopped(tmp_path, stores):
    config = stores.config(tmp_path, {"type": "plait.stores.sqlite.PackedSQLiteOnlineStore", "path": "online.db"})
    project = Project(tmp_path, config)
    project.write([(user, T0, T0, user) for user in range(50)])
    view = project.apply()
    provider = project.store._get_provider()
    task = MaterializationTask(config.project, view, T0 - DAY, T0 + DAY)

    def run(fail_at):
        store = Interrupted(fail_at)
        engine = ColumnarComputeEngine(
            repo_config=config, offline_store=provider.offline_store, online_store=store, batch_rows=10
        )
        (job,) = engine.materialize(project.store.registry, task)
        return store.n_puts, job.error()

    n_puts, error = run(3)
    assert (n_puts, str(error)) == (3, "view stats: the power went")
    assert project.read(*range(50)) == [*range(20), *[None] * 30]
    assert run(None) == (3, None)  # of five batches the two that were stored are not written again
    assert project.read(*range(50)) == list(range(50))
    assert run(None) == (5, None)  # complete: the next run is a new one


def test_progress_is_told_in_rows(tmp_path, stores, backend):
    project = Project(tmp_path, backend.config)
    project.write([(user, T0, T0, user) for user in range(7)])
    view = project.apply()
    told = []

    class Bar:
        def __init__(self, total):
            told.append(total)

        def update(self, n_rows):
            told.append(n_rows)

        def close(self):
            told.append("closed")

    engine = ColumnarComputeEngine(
        repo_config=backend.config,
        offline_store=project.store._get_provider().offline_store,
        online_store=backend.store,
        batch_rows=5,
    )
    task = MaterializationTask(backend.config.project, view, T0 - DAY, T0 + DAY, tqdm_builder=Bar)
    (job,) = engine.materialize(project.store.registry, task)
    assert job.error() is None
    assert told == [7, 5, 2, "closed"]


def test_any_other_online_store_of_feast_is_filled_too(tmp_path, stores):
    config = stores.config(tmp_path, {"type": "sqlite", "path": str(tmp_path / "stock.db")})
    project = Project(tmp_path, config)
    project.write([(1, T0, T0, 1), (1, T0 + DAY, T0, 2)])
    project.apply()
    project.store.materialize(T0 - DAY, T0 + 2 * DAY)
    assert project.read(1) == [2]


class FrameStore:
    """An offline store whose tables come through pandas, as Spark's do: naive nanoseconds, integers as floats."""

    def __init__(self, table):
        self.table = table

    def pull_latest_from_table_or_query(self, **request):
        frame = self.table.to_pandas()
        frame["event_timestamp"] = frame["event_timestamp"].dt.tz_localize(None).astype("datetime64[ns]")
        self.frame = frame

        class Job:
            def to_arrow(self):
                return pa.Table.from_pandas(frame, preserve_index=False)

        return Job()


def test_an_offline_store_that_goes_through_pandas_gives_the_same_rows(project, backend, caplog):
    rows = [(1, T0, T0, 1), (2, T0, T0, None), (None, T0, T0, 3)]
    project.write(rows)
    view = project.apply()
    engine = ColumnarComputeEngine(
        repo_config=backend.config, offline_store=FrameStore(history(rows)), online_store=backend.store
    )
    task = MaterializationTask(backend.config.project, view, T0 - DAY, T0 + DAY)
    with caplog.at_level(logging.WARNING):
        (job,) = engine.materialize(project.store.registry, task)
    assert job.error() is None
    assert "left out 1 rows whose join key is null" in caplog.text
    got = backend.store.read_columns(backend.config, view, {"user_id": [1, 2]}, now=T0 + DAY)
    assert got.columns["n"].to_pylist() == [1, None]
    assert got.columns["tags"].to_pylist() == [["a"], None]
    assert pd.Timestamp(got.event_us[0], unit="us", tz="UTC") == T0


def test_a_source_that_disagrees_with_its_view_fails_with_the_feature_s_name_and_writes_nothing(project):
    project.write([(1, T0, T0, 1)])
    project.apply({"s": Int64})
    with pytest.raises(StoreError, match="feature 's' is declared INT64 and came as string"):
        project.store.materialize(T0 - DAY, T0 + DAY)
    assert project.read(1, features=("s",)) == [None]


def test_a_corrupt_source_fails_with_the_view_s_name(project):
    project.write([(1, T0, T0, 1)])
    project.apply()
    project.source.write_bytes(project.source.read_bytes()[:-40] + b"?" * 40)
    with pytest.raises(StoreError, match="view stats: "):
        project.store.materialize(T0 - DAY, T0 + DAY)


def test_the_sqlite_file_is_plain_enough_for_a_person_to_look_into(tmp_path, stores):
    config = stores.config(tmp_path, {"type": "plait.stores.sqlite.PackedSQLiteOnlineStore", "path": "online.db"})
    project = Project(tmp_path, config)
    project.write([(1, T0, T0, 1)])
    project.apply()
    project.store.materialize(T0 - DAY, T0 + DAY)
    with sqlite3.connect(tmp_path / "online.db") as db:
        ((user, event_us),) = db.execute(f'SELECT key, event_us FROM "{config.project}.stats"')
    db.close()
    assert (user, event_us) == (1, T0.timestamp() * 1e6)
