"""One declaration, two offline stores: the source class follows feature_store.yaml, and both stores find the same."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, RequestSource
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.types import Array, Bool, Bytes, Float32, Float64, Int64, String, UnixTimestamp
from feast.value_type import ValueType

from plait.aggregates import table_source
from plait.errors import SettingsError

SPARK = """
  type: spark
  spark_conf:
    spark.master: "local[1]"
    spark.ui.enabled: "false"
    spark.driver.host: 127.0.0.1
    spark.sql.session.timeZone: UTC
    spark.sql.shuffle.partitions: "2"
    spark.sql.codegen.wholeStage: "false"
    spark.sql.codegen.factoryMode: NO_CODEGEN
    spark.driver.extraJavaOptions: "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
"""
ONLINE = """\
online_store:
  type: plait.stores.sqlite.PackedSQLiteOnlineStore
  path: online.db
batch_engine:
  type: plait.stores.engine.ColumnarComputeEngine
"""
PLAIT = "\n  type: plait.stores.offline.AsofDuckDBOfflineStore\n"
REPO = """
from feast import Entity, FeatureView, Field
from feast.types import Float64, Int64
from feast.value_type import ValueType
from plait.aggregates import table_source

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
spend = FeatureView(
    name="spend", entities=[user], source=table_source("spend_table", "tables/spend"),
    schema=[Field(name="total", dtype=Float64), Field(name="visits", dtype=Int64)],
)
"""
ASK = """
import sys
import pandas as pd
from feast import FeatureStore

store = FeatureStore(".")
found = store.get_historical_features(pd.read_parquet("asked.parquet"), features=["spend:total", "spend:visits"])
found.to_df().to_parquet(sys.argv[1])
"""
SERVED = """
import sys
import pandas as pd
from feast import FeatureStore

rows = [{"user_id": user} for user in range(14)]
found = FeatureStore(".").get_online_features(features=["spend:total", "spend:visits"], entity_rows=rows)
pd.DataFrame(found.to_dict()).to_parquet(sys.argv[1])
"""
T0 = datetime(2024, 1, 1, tzinfo=UTC)
DAY, HOUR = timedelta(days=1), timedelta(hours=1)
MOMENT = pa.timestamp("us", tz="UTC")
TYPES = {
    "user_id": pa.int64(),
    "event_timestamp": MOMENT,
    "created": MOMENT,
    "total": pa.float64(),
    "visits": pa.int64(),
}
COLUMNS = [name for name in TYPES if name != "created"]
assert_same = partial(pd.testing.assert_frame_equal, check_dtype=False)


def make_repo(folder: Path, store: str) -> Path:
    (folder / "feature_repo").mkdir(parents=True)
    (folder / "feature_repo" / "spend.py").write_text(REPO)
    (folder / ".feastignore").write_text("[!f]*\nf[!e]*\n")
    (folder / "feature_store.yaml").write_text(
        "project: two_stores\nprovider: local\nregistry: registry.db\nentity_key_serialization_version: 3\n"
        f"{ONLINE}offline_store:{store}"
    )
    return folder


def in_order(found: pd.DataFrame) -> pd.DataFrame:
    """Historical features in an order of rows and columns that no store gives by itself, times as UTC."""
    times = pd.to_datetime(found["event_timestamp"], utc=True).astype("datetime64[us, UTC]")
    found = found.assign(event_timestamp=times)
    return found.sort_values(["user_id", "event_timestamp", "total"], ignore_index=True)[sorted(found)]


@pytest.mark.parametrize(
    "store", ["\n  type: file\n", " dask\n", "\n  type: plait.stores.offline.AsofDuckDBOfflineStore\n"]
)
def test_a_file_source_for_stores_that_read_files(tmp_path, monkeypatch, store):
    monkeypatch.chdir(make_repo(tmp_path, store))
    source = table_source("t", ".plait/features/t")
    assert (type(source).__name__, source.path) == ("FileSource", ".plait/features/t")
    assert (source.timestamp_field, source.created_timestamp_column) == ("event_timestamp", "created")


@pytest.mark.filterwarnings("ignore::RuntimeWarning:feast")
@pytest.mark.parametrize("store", [SPARK, " spark\n"])
def test_a_spark_source_for_feasts_spark_store(tmp_path, monkeypatch, store):
    pytest.importorskip("pyspark")
    monkeypatch.chdir(make_repo(tmp_path, store))
    source = table_source("t", ".plait/features/t")
    assert (type(source).__name__, source.path) == ("SparkSource", str(tmp_path / ".plait/features/t"))
    assert (source.timestamp_field, source.created_timestamp_column) == ("event_timestamp", "created")
    assert table_source("t", "s3://bucket/t").path == "s3://bucket/t"


def test_a_configuration_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "feature_store.yaml").write_text("offline_store: [\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=r"feature_store\.yaml cannot be read"):
        table_source("t", "t")


@pytest.mark.slow
@pytest.mark.spark
@pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs Java 17, and there is no java here")
def test_both_stores_give_the_same_features_in_history_and_online(tmp_path):
    """Random histories, asked at random moments, before the first row and exactly at rows included; and materialized
    by `feast materialize` to a moment in the middle, by Plait's engine into Plait's store."""
    rng = np.random.default_rng(12)
    n, start = 300, 1_700_000_000_000_000
    at = start + rng.permutation(100_000)[:n] * 1_000_000
    rows = pa.table({
        "user_id": rng.integers(0, 12, n), "event_timestamp": pa.array(at).cast(pa.timestamp("us", tz="UTC")),
        "created": pa.array(at).cast(pa.timestamp("us", tz="UTC")), "total": rng.normal(size=n),
        "visits": pa.array(rng.integers(0, 9, n), mask=rng.random(n) < 0.2),
    })  # fmt: skip
    asked_at = np.concatenate([at[:40], start + rng.integers(-10_000, 110_000, 60) * 1_000_000])
    asked = pd.DataFrame({
        "user_id": rng.integers(0, 14, 100), "event_timestamp": pd.to_datetime(asked_at, unit="us", utc=True),
    })  # fmt: skip
    found, served = [], []
    until = pd.Timestamp(start + 50_000 * 1_000_000, unit="us")
    materialize = ["materialize", (until - pd.Timedelta(days=30)).isoformat(), until.isoformat()]
    for name, store in (("duckdb", PLAIT), ("spark", SPARK)):
        repo = make_repo(tmp_path / name, store)
        (repo / "tables" / "spend").mkdir(parents=True)
        pq.write_table(rows, repo / "tables" / "spend" / "part-0.parquet")
        asked.to_parquet(repo / "asked.parquet")
        feast = Path(sys.executable).parent / "feast"
        commands = [
            [str(feast), "apply"],
            [sys.executable, "-c", ASK, "found.parquet"],
            [str(feast), *materialize],
            [sys.executable, "-c", SERVED, "served.parquet"],
        ]
        for command in commands:
            ran = subprocess.run(command, cwd=repo, capture_output=True, text=True, timeout=300)
            assert ran.returncode == 0, ran.stderr[-3000:]
        found.append(in_order(pd.read_parquet(repo / "found.parquet")))
        served.append(pd.read_parquet(repo / "served.parquet"))
    pd.testing.assert_frame_equal(*(frame[sorted(frame)] for frame in served))
    newest = rows.to_pandas()[lambda frame: frame["event_timestamp"] <= until.tz_localize("UTC")]
    newest = newest.sort_values("event_timestamp").groupby("user_id").last().reindex(range(14))
    assert served[0]["total"].tolist()[:12] == newest["total"].tolist()[:12]
    assert served[0]["total"].isna().tolist()[12:] == [True, True]
    ours, theirs = found
    assert_same(ours, theirs)
    assert 0 < ours["total"].isna().sum() < 60


@pytest.fixture
def feast_spark(spark, monkeypatch):
    """A session of the shared Spark for Feast's store, which changes the settings of the one that is active."""
    with warnings.catch_warnings():  # the store's import sets a filter that outweighs the tests'
        importlib.import_module("feast.infra.offline_stores.contrib.spark_offline_store.spark")
    session = spark.newSession()
    session.conf.set("spark.sql.session.timeZone", "UTC")
    monkeypatch.setattr("pyspark.sql.SparkSession.getActiveSession", lambda: session)


def random_rows(rng: np.random.Generator, delays: np.ndarray) -> list[dict]:
    """Rows of 12 users within six days, one created so many hours late for each of `delays`. Many are at one time with
    another of their user, some of nobody."""
    rows = []
    for delay in delays.tolist():
        at = T0 + int(rng.integers(24)) * 6 * HOUR
        user = int(rng.integers(12)) if rng.random() < 0.97 else None
        visits = int(rng.integers(9)) if rng.random() < 0.8 else None
        rows.append(dict(zip(TYPES, (user, at, at + delay * HOUR, rng.normal(), visits), strict=True)))
    return rows


def write_rows(file: Path, rows: list[dict], mapping: dict[str, str]) -> None:
    """Rows as a table whose columns have the names that `mapping` maps from."""
    own = {name: column for column, name in mapping.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=pa.schema(TYPES))
    pq.write_table(table.rename_columns([own.get(name, name) for name in TYPES]), file)


def newest(rows: list[dict], user: int, until: datetime) -> dict:
    """The row of `user` with the latest event time up to `until`, of several the one created last; or one of nulls."""
    known = [row for row in rows if row["user_id"] == user and row["event_timestamp"] <= until]
    best = max(known, key=itemgetter("event_timestamp", "created"), default=dict.fromkeys(TYPES))
    return {**best, "user_id": user}


def served(store: FeatureStore) -> pd.DataFrame:
    rows = [{"user_id": user} for user in range(14)]
    found = store.get_online_features(features=["spend:total", "spend:visits"], entity_rows=rows)
    frame = found.to_df(include_event_timestamps=True)
    times = frame["total__ts"].replace(0, None)  # Feast's time of a row that there is not
    return frame.assign(event_timestamp=pd.to_datetime(times, unit="s", utc=True))[COLUMNS]


@pytest.mark.spark
@pytest.mark.filterwarnings("ignore::RuntimeWarning:feast")
@pytest.mark.usefixtures("feast_spark")
@pytest.mark.parametrize(
    "mapping",
    [
        {"uid": "user_id", "ts": "event_timestamp", "made": "created", "amount": "total"},
        {"uid": "user_id", "ts": "event_timestamp", "made": "created", "created": "total"},
        {"event_timestamp": "created", "created": "event_timestamp"},
    ],
    ids=["names of its own", "a name that another column takes", "two names exchanged"],
)
def test_both_stores_read_a_table_whose_columns_have_other_names(mapping, tmp_path, monkeypatch):
    """What is served after each run, and what is found in history, is what a naive loop finds in the rows. Plait's
    engine applies the mapping to what its DuckDB store gives, and not once more to what Feast's Spark store gives."""
    rng = np.random.default_rng(5)
    # No two delays are equal: Spark would be free to take either row of two that were created at one time, too.
    first, later = random_rows(rng, rng.permutation(200)), random_rows(rng, 200 + rng.permutation(100))
    rows = first + later
    until, end = T0 + 3 * DAY, T0 + 5 * DAY
    # The second run begins a day before the end of the first.
    read = [row for row in first if row["event_timestamp"] <= until]
    read_later = [row for row in rows if until - DAY <= row["event_timestamp"] <= end]
    asked = [(int(rng.integers(14)), T0 + int(rng.integers(-10, 160)) * HOUR) for _ in range(80)]
    history = [{**newest(rows, user, at), "event_timestamp": at} for user, at in asked]

    def naive(materialized):
        return pd.DataFrame([newest(materialized, user, end) for user in range(14)])[COLUMNS]

    fields = [Field(name="total", dtype=Float64), Field(name="visits", dtype=Int64)]
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    for name, offline_store in (("duckdb", PLAIT), ("spark", SPARK)):
        repo = make_repo(tmp_path / name, offline_store)
        monkeypatch.chdir(repo)
        write_rows(repo / "tables" / "spend" / "part-0.parquet", first, mapping)
        source = table_source("spend_table", "tables/spend", field_mapping=mapping)
        store = FeatureStore(repo_path=str(repo))
        store.apply([user, FeatureView(name="spend", entities=[user], schema=fields, source=source)])
        store.materialize(T0 - DAY, until)
        assert_same(served(store), naive(read))
        part = repo / "tables" / "spend" / "part-1.parquet"
        write_rows(part, later, mapping)
        store.materialize_incremental(end)
        assert_same(served(store), naive(read + read_later))
        entities = pd.DataFrame(asked, columns=["user_id", "event_timestamp"])
        found = store.get_historical_features(entities, features=["spend:total", "spend:visits"]).to_df()
        assert_same(in_order(found), in_order(pd.DataFrame(history))[sorted(COLUMNS)])
        part.unlink()  # what was read of it stays: the rest was created earlier
        store.materialize(T0 - DAY, end)
        assert_same(served(store), naive(first + read_later))


def moment(rng: np.random.Generator) -> datetime:
    """To the microsecond, within some 35 years before or after T0."""
    return T0 + timedelta(microseconds=int(rng.integers(-(2**50), 2**50)))


def some(rng: np.random.Generator, make: Callable[[], object]) -> list:
    """A list of up to three elements, some of them null."""
    return [make() if rng.random() < 0.8 else None for _ in range(rng.integers(4))]


# What Feast 0.67's Spark store makes of a training set, besides another order of rows:
# - It goes through pandas. Integers beside a null come back as floats, exact up to 2**53 only; NaN comes back as null;
#   times have no zone. Lists of moments are refused (ArrowInvalid) if one of them is empty.
# - Of two rows of a key at one time and created at one time it gives both, so the entity's row comes twice.
# - It tells entity rows apart by their keys written one after the other: of (1, 12) and (11, 2) one gets the other's
#   value. A text that begins with a letter keeps them apart.
# So integers here are small, no list of moments is empty, no two rows are created at one time, shops begin with "s".
# It takes no Arrow table of entities either; Plait's does.
USERS = {
    "visits": (Int64, pa.int64(), lambda rng: int(rng.integers(-9, 9))),
    "total": (Float64, pa.float64(), lambda rng: float(rng.choice([rng.normal(), np.inf, np.nan], p=[0.8, 0.1, 0.1]))),
    "share": (Float32, pa.float32(), lambda rng: float(np.float32(rng.random()))),
    "member": (Bool, pa.bool_(), lambda rng: bool(rng.random() < 0.5)),
    "name": (String, pa.string(), lambda rng: str(rng.choice(["", "é", "it's", "a\nb", "null"]))),
    "seen": (UnixTimestamp, MOMENT, moment),
    "digest": (Bytes, pa.binary(), lambda rng: rng.bytes(int(rng.integers(3)))),
}
PAIRS = {
    "tags": (Array(String), pa.list_(pa.string()), lambda rng: some(rng, lambda: str(rng.choice(["", "é", "b"])))),
    "recent": (Array(Int64), pa.list_(pa.int64()), lambda rng: some(rng, lambda: int(rng.integers(9)))),
    "vector": (Array(Float32), pa.list_(pa.float32()), lambda rng: np.float32(rng.random(3)).tolist()),
    "flags": (Array(Bool), pa.list_(pa.bool_()), lambda rng: some(rng, lambda: bool(rng.random() < 0.5))),
    "opened": (Array(UnixTimestamp), pa.list_(MOMENT), lambda rng: [moment(rng), *some(rng, lambda: moment(rng))]),
    "rank": (Int64, pa.int64(), lambda rng: int(rng.integers(100))),
}


def random_table(rng: np.random.Generator, keys: pa.Table, features: dict) -> pa.Table:
    """A row per key, within six days, many at one time, no two created at one time; a fifth of values is null."""
    at = [T0 + int(hour) * HOUR for hour in rng.integers(0, 24, len(keys)) * 6]
    late = rng.permutation(len(keys)).tolist()
    table = keys.append_column("event_timestamp", pa.array(at, MOMENT))
    created = [time + minutes * timedelta(minutes=7) for time, minutes in zip(at, late, strict=True)]
    table = table.append_column("created", pa.array(created, MOMENT))
    for name, (_, kind, make) in features.items():
        values = [make(rng) if rng.random() < 0.8 else None for _ in at]
        table = table.append_column(name, pa.array(values, kind))
    return table


def score(inputs: pd.DataFrame) -> pd.DataFrame:
    """On demand, of both views and the request: a number, and a list made of another."""
    recent = [
        [] if values is None else [int(value) for value in values if pd.notna(value)] for values in inputs["recent"]
    ]
    number = (inputs["visits"] + inputs["rank"]) * inputs["boost"]
    return pd.DataFrame({"score": number, "known": [[len(values), *values] for values in recent]})


SCORE = {"score": (Float64, pa.float64()), "known": (Array(Int64), pa.list_(pa.int64()))}


def declare_training() -> list:
    """Two views, one of them of two keys and of a time to live, an on-demand view on both, and a service of all."""
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    shop = Entity(name="shop", join_keys=["shop"], value_type=ValueType.STRING)

    def view(name: str, entities: list, features: dict, ttl: timedelta) -> FeatureView:
        schema = [Field(name=feature, dtype=dtype) for feature, (dtype, *_) in features.items()]
        source = table_source(f"{name}_table", f"tables/{name}")
        return FeatureView(name=name, entities=entities, schema=schema, source=source, ttl=ttl)

    users, pairs = view("users", [user], USERS, timedelta(0)), view("pairs", [user, shop], PAIRS, 2 * DAY)
    request = RequestSource(name="request", schema=[Field(name="boost", dtype=Float64)])
    scores = OnDemandFeatureView(
        name="scores",
        sources=[users, pairs, request],
        schema=[Field(name=name, dtype=dtype) for name, (dtype, _) in SCORE.items()],
        udf=score,
        udf_string="score",
        mode="pandas",
    )
    return [user, shop, users, pairs, scores, FeatureService(name="training", features=[users, pairs, scores])]


@pytest.mark.spark
@pytest.mark.filterwarnings("ignore::RuntimeWarning:feast")
@pytest.mark.usefixtures("feast_spark")
def test_both_stores_give_the_same_training_set(tmp_path, monkeypatch):
    """By a feature service, with the values known late and without them, and under the views' names or none."""
    rng = np.random.default_rng(3)
    ids = pa.array(rng.integers(0, 12, 200))
    shops = pa.array([f"s{shop}" for shop in rng.integers(0, 3, 200)])
    tables = {
        "users": random_table(rng, pa.table({"user_id": ids}), USERS),
        "pairs": random_table(rng, pa.table({"user_id": ids, "shop": shops}), PAIRS),
    }
    n = 120
    at = [T0 + int(hour) * HOUR for hour in rng.integers(-10, 180, n)]
    asked = pd.DataFrame({
        "user_id": rng.integers(0, 14, n), "shop": [f"s{shop}" for shop in rng.integers(0, 4, n)],
        "event_timestamp": pd.Series(at).astype("datetime64[us, UTC]"), "boost": rng.normal(size=n), "row": range(n),
    })  # fmt: skip
    asked = pd.concat([asked, asked[:9].assign(row=range(n, n + 9))], ignore_index=True)  # the same entities again
    own = {"user_id": pa.int64(), "shop": pa.string(), "event_timestamp": MOMENT, "boost": pa.float64()}
    fields = {"users": USERS, "pairs": PAIRS, "scores": SCORE}
    found: dict[tuple[str, bool], pa.Table] = {}
    for store_name, offline_store in (("duckdb", PLAIT), ("spark", SPARK)):
        repo = make_repo(tmp_path / store_name, offline_store)
        monkeypatch.chdir(repo)
        for name, table in tables.items():
            (repo / "tables" / name).mkdir(parents=True)
            pq.write_table(table, repo / "tables" / name / "part-0.parquet")
        store = FeatureStore(repo_path=str(repo))
        store.apply(declare_training())
        service = store.get_feature_service("training")
        for strict in (False, True):
            frame = store.get_historical_features(
                asked.copy(), service, full_feature_names=strict, filter_by_created_timestamp=strict
            ).to_df()
            kinds = {
                f"{view}__{name}" if strict else name: kind
                for view, features in fields.items()
                for name, (_, kind, *_) in features.items()
            }
            schema = pa.schema({**own, "row": pa.int64(), **kinds})
            assert sorted(frame) == sorted(schema.names)
            found[store_name, strict] = pa.Table.from_pandas(frame, schema, preserve_index=False).sort_by("row")
    for strict in (False, True):
        ours, theirs = found["duckdb", strict], found["spark", strict]
        assert ours.to_pylist() == theirs.to_pylist()
        assert ours["row"].to_pylist() == asked["row"].tolist()
        told = [len(ours) - ours[name].null_count for name in ours.column_names[len(own) + 1 : -1]]
        assert 20 < min(told) <= max(told) < len(ours) - 20
    assert found["duckdb", False].columns != found["duckdb", True].columns  # some values were known late
