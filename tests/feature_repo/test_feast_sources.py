"""One declaration, two offline stores: the source class follows feature_store.yaml, and both stores find the same."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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


def make_repo(folder: Path, store: str) -> Path:
    (folder / "feature_repo").mkdir(parents=True)
    (folder / "feature_repo" / "spend.py").write_text(REPO)
    (folder / ".feastignore").write_text("[!f]*\nf[!e]*\n")
    (folder / "feature_store.yaml").write_text(
        "project: two_stores\nprovider: local\nregistry: registry.db\nentity_key_serialization_version: 3\n"
        f"{ONLINE}offline_store:{store}"
    )
    return folder


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
        frame = pd.read_parquet(repo / "found.parquet")
        frame["event_timestamp"] = pd.to_datetime(frame["event_timestamp"], utc=True).astype("datetime64[us, UTC]")
        found.append(frame.sort_values(["user_id", "event_timestamp", "total"], ignore_index=True)[sorted(frame)])
        served.append(pd.read_parquet(repo / "served.parquet"))
    pd.testing.assert_frame_equal(*(frame[sorted(frame)] for frame in served))
    newest = rows.to_pandas()[lambda frame: frame["event_timestamp"] <= until.tz_localize("UTC")]
    newest = newest.sort_values("event_timestamp").groupby("user_id").last().reindex(range(14))
    assert served[0]["total"].tolist()[:12] == newest["total"].tolist()[:12]
    assert served[0]["total"].isna().tolist()[12:] == [True, True]
    ours, theirs = found
    pd.testing.assert_frame_equal(ours, theirs, check_dtype=False)
    assert 0 < ours["total"].isna().sum() < 60
