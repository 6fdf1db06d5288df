"""The engine on the offline stores it may meet, its settings, and what becomes of a run that is cut off."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import Aggregation, Entity, FeatureStore, FeatureView, Field, FileSource
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL
from feast.infra.common.materialization_job import MaterializationTask
from feast.types import Float64, Int64
from feast.value_type import ValueType

from plait.errors import StoreError
from plait.stores.asof_job import DuckDBJob
from plait.stores.engine import ColumnarComputeEngine

T0 = datetime(2024, 1, 1, tzinfo=UTC)
DAY, HOUR = timedelta(days=1), timedelta(hours=1)
MOMENT = pa.timestamp("us", tz="UTC")
USER = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
OFFLINE = {"stock": "duckdb", "plait": "plait.stores.offline.AsofDuckDBOfflineStore"}


def write(path, rows, names=("user_id", "event_timestamp", "created", "n")):
    """Rows of (user, event, created, n)."""
    types = (pa.int64(), MOMENT, MOMENT, pa.int64())
    columns = [pa.array(column, type_) for column, type_ in zip(zip(*rows, strict=True), types, strict=True)]
    pq.write_table(pa.table(dict(zip(names, columns, strict=True))), path)


def make_view(path, *, entities=(USER,), fields=None, **source):
    options = {"timestamp_field": "event_timestamp", "created_timestamp_column": "created", **source}
    fields = fields or {"n": Int64}
    schema = [Field(name="user_id", dtype=Int64)] if entities else []
    return FeatureView(
        name="stats",
        entities=list(entities),
        ttl=None,
        schema=[*schema, *(Field(name=name, dtype=dtype) for name, dtype in fields.items())],
        source=FileSource(path=str(path), **options),
    )


@pytest.fixture(params=OFFLINE)
def config(request, backend, tmp_path, stores):
    online = backend.config.online_store.model_dump(exclude_unset=True)
    return stores.config(tmp_path, online, offline_store={"type": OFFLINE[request.param]})


def test_each_offline_store_gives_the_latest_rows_and_plait_s_streams_them(config, backend, tmp_path, monkeypatch):
    streamed = []
    to_arrow_reader = DuckDBJob.to_arrow_reader

    def spied(self, *arguments):
        streamed.append(self)
        return to_arrow_reader(self, *arguments)

    monkeypatch.setattr(DuckDBJob, "to_arrow_reader", spied)
    path = tmp_path / "source.parquet"
    write(path, [(1, T0, T0, 1), (1, T0 + DAY, T0, 2), (2, T0, T0 + DAY, 4), (2, T0, T0, 3), (3, T0 + 9 * DAY, T0, 5)])
    store = FeatureStore(config=config)
    store.apply([USER, make_view(path)])
    store.materialize(T0 - DAY, T0 + 2 * DAY)
    got = store.get_online_features(features=["stats:n"], entity_rows=[{"user_id": user} for user in (1, 2, 3)])
    assert got.to_dict()["n"] == [2, 4, None]
    assert bool(streamed) == (config.offline_store.type != "duckdb")


def test_columns_of_the_source_may_have_other_names(config, backend, tmp_path):
    path = tmp_path / "source.parquet"
    write(path, [(7, T0, T0, 1), (7, T0 + DAY, T0, 2)], names=("uid", "ts", "made", "number"))
    names = {"uid": "user_id", "number": "n"}
    view = make_view(path, timestamp_field="ts", created_timestamp_column="made", field_mapping=names)
    store = FeatureStore(config=config)
    store.apply([USER, view])
    store.materialize(T0 - DAY, T0 + 2 * DAY)
    assert store.get_online_features(features=["stats:n"], entity_rows=[{"user_id": 7}]).to_dict()["n"] == [2]


def test_a_view_without_entities_has_one_row(config, tmp_path):
    path = tmp_path / "source.parquet"
    write(path, [(0, T0, T0, 1), (0, T0 + DAY, T0, 2)])
    store = FeatureStore(config=config)
    store.apply([make_view(path, entities=())])
    store.materialize(T0 - DAY, T0 + 2 * DAY)
    got = store.get_online_features(features=["stats:n"], entity_rows=[{DUMMY_ENTITY_ID: DUMMY_ENTITY_VAL}])
    assert got.to_dict()["n"] == [2]


def test_a_view_that_computes_is_refused_with_what_to_do(backend, tmp_path):
    path = tmp_path / "source.parquet"
    write(path, [(1, T0, T0, 1)])
    view = make_view(path)
    view.aggregations = [Aggregation(column="n", function="sum", time_window=DAY)]
    store = FeatureStore(config=backend.config)
    engine = ColumnarComputeEngine(repo_config=backend.config, offline_store=None, online_store=backend.store)
    task = MaterializationTask(backend.config.project, view, T0 - DAY, T0 + DAY)
    (job,) = engine.materialize(store.registry, task)
    assert "view stats has a transformation or aggregations" in str(job.error())
    assert "plait features build" in str(job.error())


def test_the_yaml_sets_the_overlap_and_the_size_of_a_batch(backend, tmp_path, stores, monkeypatch):
    engine = {"type": "plait.stores.engine.ColumnarComputeEngine", "overlap": "PT6H", "batch_rows": 2}
    online = backend.config.online_store.model_dump(exclude_unset=True)
    config = stores.config(tmp_path, online, batch_engine=engine)
    path = tmp_path / "source.parquet"
    rows = [(user, T0, T0, user) for user in range(5)]
    write(path, rows)
    store = FeatureStore(config=config)
    store.apply([USER, make_view(path)])
    puts = []
    put = type(backend.store).put
    monkeypatch.setattr(type(backend.store), "put", lambda self, *args: (puts.append(len(args[2])), put(self, *args)))
    store.materialize(T0 - DAY, T0 + DAY)
    assert puts == [2, 2, 1]
    write(path, [*rows, (8, T0 + DAY - 5 * HOUR, T0 + 2 * DAY, 8), (9, T0 + DAY - 7 * HOUR, T0 + 2 * DAY, 9)])
    store.materialize_incremental(T0 + 2 * DAY)
    got = store.get_online_features(features=["stats:n"], entity_rows=[{"user_id": 8}, {"user_id": 9}]).to_dict()
    assert got["n"] == [8, None]
    with pytest.raises(Exception, match="overlp"):
        FeatureStore(
            config=stores.config(tmp_path, online, batch_engine={**engine, "overlp": "PT6H"})
        ).materialize_incremental(T0 + 3 * DAY)


KILLED = """
    import json, os, signal, sys, warnings
    warnings.simplefilter("ignore")
    from datetime import datetime
    from feast import FeatureStore
    from feast.repo_config import RepoConfig

    config = RepoConfig(**json.loads(sys.stdin.read()))
    store = FeatureStore(config=config)
    online = store._get_provider().online_store
    put, n_puts = online.put, 0

    def dies(*args):
        global n_puts
        n_puts += 1
        if n_puts == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        put(*args)

    online.put = dies
    store.materialize(*(datetime.fromisoformat(text) for text in sys.argv[1:]))
"""


@pytest.mark.parametrize("view_changes", [False, True], ids=["the same view", "a view that gained a feature"])
def test_a_run_that_was_killed_goes_on_where_it_stopped(backend, tmp_path, stores, monkeypatch, view_changes):
    engine = {"type": "plait.stores.engine.ColumnarComputeEngine", "batch_rows": 10}
    online = backend.config.online_store.model_dump(exclude_unset=True)
    config = stores.config(tmp_path, online, batch_engine=engine)
    path = tmp_path / "source.parquet"
    write(path, [(user, T0, T0, user) for user in range(50)])
    store = FeatureStore(config=config)
    store.apply([USER, make_view(path)])
    begin, end = T0 - DAY, T0 + DAY
    command = [sys.executable, "-c", textwrap.dedent(KILLED), begin.isoformat(), end.isoformat()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    given = json.dumps(
        {
            "project": config.project,
            "provider": "local",
            "registry": {"registry_type": "sql", "path": f"sqlite:///{tmp_path}/registry.db"},
            "offline_store": {"type": OFFLINE["plait"]},
            "online_store": online,
            "batch_engine": engine,
            "entity_key_serialization_version": 3,
        }
    )
    done = subprocess.run(command, env=environment, input=given, text=True, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]

    def read():
        rows = [{"user_id": user} for user in range(50)]
        return store.get_online_features(features=["stats:n"], entity_rows=rows).to_dict()["n"]

    assert read() == [*range(20), *[None] * 30]
    if view_changes:
        table = pq.read_table(path)
        pq.write_table(table.append_column("x", table["n"].cast(pa.float64())), path)
        store.apply([make_view(path, fields={"n": Int64, "x": Float64})])
    puts = []
    put = type(backend.store).put
    monkeypatch.setattr(type(backend.store), "put", lambda self, *args: (puts.append(1), put(self, *args)))
    store.materialize(begin, end)
    assert read() == list(range(50))
    assert len(puts) == (5 if view_changes else 3)


@pytest.mark.redis
def test_what_is_noted_of_a_run_does_not_outlive_the_rows_of_redis(tmp_path, stores, redis_server):
    import redis

    online = {
        "type": "plait.stores.redis.PackedRedisOnlineStore",
        "url": redis_server.url,
        "key_ttl_seconds": 100,
    }
    config = stores.config(tmp_path, online)
    store = FeatureStore(config=config)
    path = tmp_path / "source.parquet"
    write(path, [(user, T0, T0, user) for user in range(5)])
    store.apply([USER, make_view(path)])
    online_store = store._get_provider().online_store

    def fails_after_the_first(*arguments, **options):
        put(*arguments, **options)
        online_store.put = fails

    def fails(*arguments, **options):
        raise StoreError("the power went")

    put, online_store.put = online_store.put, fails_after_the_first
    engine = ColumnarComputeEngine(
        repo_config=config, offline_store=store._get_provider().offline_store, online_store=online_store, batch_rows=2
    )
    task = MaterializationTask(config.project, store.get_feature_view("stats"), T0 - DAY, T0 + DAY)
    (job,) = engine.materialize(store.registry, task)
    assert str(job.error()) == "view stats: the power went"
    with redis.Redis.from_url(redis_server.url) as client:
        (noted,) = client.keys(f"plait-meta:batches:{config.project}.stats")
        assert 0 < client.ttl(noted) <= 100
