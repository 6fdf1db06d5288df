"""Results whole, as a stream and in parquet parts are the same rows; names, aliases and on-demand features included."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plait.errors import StoreError
from plait.stores.asof_job import DuckDBJob

MICROS = pa.timestamp("us", tz="UTC")
T0 = datetime(2024, 1, 1, tzinfo=UTC)


def times(hours: Any) -> pa.Array:
    return pa.array([T0 + timedelta(hours=int(hour)) for hour in hours], MICROS)


def spend_per_visit(inputs: pd.DataFrame) -> pd.DataFrame:
    """Row by row; a batch in which every value is null comes back as a column of objects, as pandas likes to."""
    ratio = (inputs["spend"] / inputs["visits"].where(inputs["visits"] > 0)) * inputs["boost"]
    return pd.DataFrame({"spend_per_visit": ratio.astype(object) if ratio.isna().all() else ratio})


@pytest.fixture
def shop(repo: Any, view: Any) -> Any:
    """Views of users and of user x shop (a string key), and an on-demand view over a request field."""
    from feast import Field, RequestSource
    from feast.on_demand_feature_view import OnDemandFeatureView
    from feast.types import Float64

    rng = np.random.default_rng(1)
    n = 400
    users = pa.table(
        {
            "user_id": rng.integers(0, 20, n),
            "event_timestamp": times(rng.permutation(n)),
            "created": times(rng.permutation(n)),
            "spend": rng.random(n),
            "visits": pa.array(rng.integers(0, 3, n), mask=rng.random(n) < 0.2),
            "delta_y": rng.random(n),
        }
    )
    pairs = pa.table(
        {
            "uid": rng.integers(0, 20, n),
            "shop": [f"shop {i}" for i in rng.integers(0, 3, n)],
            "ts": times(rng.permutation(n)),
            "raw_rank": rng.integers(0, 100, n),
        }
    )
    users_view = view(
        "users",
        repo.write("users.parquet", users),
        features={"spend": "Float64", "visits": "Int64", "delta_y": "Float64"},
    )
    pairs_view = view(
        "pairs",
        repo.write("pairs.parquet", pairs),
        keys={"user_id": "Int64", "shop": "String"},
        features={"rank": "Int64"},
        timestamp="event_timestamp",
        field_mapping={"uid": "user_id", "ts": "event_timestamp", "raw_rank": "rank"},
    )
    boost = RequestSource(name="request", schema=[Field(name="boost", dtype=Float64)])
    on_demand = OnDemandFeatureView(
        name="ratios",
        sources=[users_view, boost],
        schema=[Field(name="spend_per_visit", dtype=Float64)],
        udf=spend_per_visit,
        udf_string=(
            "def spend_per_visit(inputs):\n"
            "    ratio = (inputs['spend'] / inputs['visits'].where(inputs['visits'] > 0)) * inputs['boost']\n"
            "    return pd.DataFrame({'spend_per_visit': ratio.astype(object) if ratio.isna().all() else ratio})\n"
        ),
        mode="pandas",
    )
    repo.apply([users_view, pairs_view, on_demand])
    repo.entities = pa.table(
        {
            "user_id": rng.integers(0, 25, 1_000),
            "shop": [f"shop {i}" for i in rng.integers(0, 4, 1_000)],
            "event_timestamp": times(rng.integers(0, n, 1_000)),
            "boost": rng.random(1_000),
        }
    )
    repo.features = ["users:spend", "users:visits", "users:delta_y", "pairs:rank", "ratios:spend_per_visit"]
    return repo


@pytest.mark.parametrize("full_names", [False, True])
def test_a_stream_and_parquet_parts_hold_what_the_whole_result_holds(shop: Any, full_names: bool) -> None:
    job = shop.store().get_historical_features(shop.entities, shop.features, full_feature_names=full_names)
    whole = job.to_arrow()
    assert ("users__delta_y" if full_names else "delta_y") in whole.column_names
    assert 0 < whole[-1].null_count < len(whole)
    with job.to_arrow_reader(batch_rows=64) as reader:
        batches = list(reader)
    assert max(batch.num_rows for batch in batches) <= 64
    assert pa.Table.from_batches(batches).equals(whole)
    parts = job.to_parquet("result/parts", rows_per_part=300, batch_rows=77)
    assert [part.relative_to(shop.path).as_posix() for part in parts] == [
        f"result/parts/part-0000{i}.parquet" for i in range(4)
    ]
    assert [pq.ParquetFile(part).metadata.num_rows for part in parts] == [300, 300, 300, 100]
    assert pq.read_table(parts[0].parent).equals(whole)


def test_parts_are_not_written_over_and_not_left_half_done(shop: Any) -> None:
    from feast.errors import RequestDataNotFoundInEntityDfException

    job = shop.store().get_historical_features(shop.entities, ["users:spend"])
    job.to_parquet("out")
    with pytest.raises(StoreError, match="exists; pass overwrite=True"):
        job.to_parquet("out")
    job.to_parquet("out", overwrite=True)
    broken = shop.store().get_historical_features(shop.entities.drop_columns("boost"), shop.features)
    with pytest.raises(RequestDataNotFoundInEntityDfException, match="boost"):
        broken.to_parquet("other")
    assert sorted(path.name for path in shop.path.iterdir() if "out" in path.name or "other" in path.name) == ["out"]


def test_an_empty_result_is_one_empty_part(shop: Any) -> None:
    job = shop.store().get_historical_features(shop.entities.slice(0, 0), ["users:spend"])
    (part,) = job.to_parquet("empty")
    assert pq.read_table(part).schema == job.to_arrow().schema


def test_a_reader_that_is_dropped_early_frees_its_spill_folder(shop: Any) -> None:
    store = shop.store(temp_directory="spill")
    job = store.get_historical_features(shop.entities, shop.features)
    reader = job.to_arrow_reader(batch_rows=10)
    reader.read_next_batch()
    assert len(list((shop.path / "spill").iterdir())) == 1
    reader.close()
    del reader
    assert list((shop.path / "spill").iterdir()) == []


def test_projections_and_aliases_of_a_feature_service(shop: Any) -> None:
    from feast import FeatureService

    # Feast cannot compare a projection that has an alias with one of the same view that has none.
    users = shop.store().get_feature_view("users")[["spend"]]
    friend = users.with_name("friend").with_join_key_map({"user_id": "friend_id"})
    shop.store().apply([FeatureService(name="service", features=[users.with_name("me"), friend])])
    friends = np.random.default_rng(3).permutation(shop.entities["user_id"].to_numpy())
    entities = shop.entities.append_column("friend_id", pa.array(friends))
    service = shop.store().get_feature_service("service")
    result = shop.store().get_historical_features(entities, service, full_feature_names=True).to_arrow()
    as_users = shop.entities.set_column(0, "user_id", pa.array(friends))
    alone = shop.store().get_historical_features(as_users, ["users:spend"]).to_arrow()
    assert result.column_names[-2:] == ["me__spend", "friend__spend"]
    assert result["friend__spend"].equals(alone["spend"])
    assert not result["friend__spend"].equals(result["me__spend"])


def test_renaming_one_key_of_several_leaves_the_others_joined(shop: Any) -> None:
    from feast import FeatureService

    pairs = shop.store().get_feature_view("pairs").with_join_key_map({"user_id": "friend_id"})
    shop.store().apply([FeatureService(name="renamed", features=[pairs])])
    entities = shop.entities.append_column("friend_id", shop.entities["user_id"])
    service = shop.store().get_feature_service("renamed")
    renamed = shop.store().get_historical_features(entities, service).to_arrow()
    plain = shop.store().get_historical_features(shop.entities, ["pairs:rank"]).to_arrow()
    assert renamed["rank"].equals(plain["rank"])
    assert 0 < plain["rank"].null_count < len(plain)


def test_many_threads_share_one_store(shop: Any) -> None:
    store = shop.store()
    slices = [shop.entities.slice(i * 100, 100) for i in range(10)]
    whole = store.get_historical_features(shop.entities, shop.features).to_arrow()
    start = threading.Barrier(5)

    def ask(piece: pa.Table) -> pa.Table:
        if start.n_waiting < 5 and not start.broken:
            start.wait(timeout=30)
        return store.get_historical_features(piece, shop.features).to_arrow()

    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(ask, slices))
    assert pa.concat_tables(answers).equals(whole)


def test_one_job_answers_many_threads(shop: Any) -> None:
    job = shop.store().get_historical_features(shop.entities, shop.features)
    whole = job.to_arrow()
    with ThreadPoolExecutor(5) as pool:
        wholes = [pool.submit(job.to_arrow) for _ in range(3)]
        streams = [pool.submit(lambda: job.to_arrow_reader(100).read_all()) for _ in range(3)]
        assert all(answer.result().equals(whole) for answer in wholes + streams)


def test_two_open_streams_of_one_store_do_not_meet(shop: Any) -> None:
    """Each has a connection of its own, and neither leaves anything in DuckDB's own shared one."""
    store = shop.store()
    frames = [shop.entities.slice(0, 400), shop.entities.slice(300, 500)]
    jobs = [store.get_historical_features(frame, shop.features) for frame in frames]
    readers = [job.to_arrow_reader(50) for job in jobs]
    taken: list[list[pa.RecordBatch]] = [[], []]
    for turn in range(10):
        for reader, batches in zip(readers, taken, strict=True):
            batches += [batch] if (batch := next(reader, None)) is not None else []
        if turn == 3:
            assert duckdb.sql("SHOW ALL TABLES").fetchall() == []
    for job, reader, batches in zip(jobs, readers, taken, strict=True):
        rest = list(reader)
        assert pa.Table.from_batches(batches + rest).equals(job.to_arrow().combine_chunks())


def test_a_failure_in_mid_stream_leaves_no_part_and_the_old_ones(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = shop.store(temp_directory="spill")
    job = store.get_historical_features(shop.entities, shop.features)
    out = shop.path / "out"
    first = [path.read_bytes() for path in job.to_parquet(out, rows_per_part=300)]
    seen: list[int] = []
    streamed = DuckDBJob._streamed

    def fails_later(self: DuckDBJob, table: pa.Table) -> pa.Table:
        seen.append(len(table))
        if len(seen) == 4:
            raise StoreError("the transformation broke")
        return streamed(self, table)

    monkeypatch.setattr(DuckDBJob, "_streamed", fails_later)
    with pytest.raises(StoreError, match="the transformation broke"):
        job.to_parquet(out, rows_per_part=100, batch_rows=64, overwrite=True)
    assert [path.read_bytes() for path in sorted(out.iterdir())] == first
    seen.clear()
    with pytest.raises(StoreError, match="the transformation broke"):
        job.to_parquet(shop.path / "new", batch_rows=64)
    assert len(seen) == 4
    assert not (shop.path / "new").exists()
    assert not [path for path in shop.path.iterdir() if ".tmp-" in path.name]
    assert list((shop.path / "spill").iterdir()) == []


def test_a_join_on_two_keys_one_of_them_text_agrees_with_the_loop(shop: Any) -> None:
    rows = pq.read_table(shop.path / "data" / "pairs.parquet").to_pylist()
    found = shop.store().get_historical_features(shop.entities, ["pairs:rank"]).to_arrow()
    for asked, rank in zip(shop.entities.to_pylist(), found["rank"].to_pylist(), strict=True):
        mine = [
            row
            for row in rows
            if (row["uid"], row["shop"]) == (asked["user_id"], asked["shop"]) and row["ts"] <= asked["event_timestamp"]
        ]
        assert rank == (max(mine, key=lambda row: row["ts"])["raw_rank"] if mine else None)
    assert 100 < found["rank"].null_count < 900


def test_a_view_without_entities_joins_on_time_alone(repo: Any) -> None:
    from feast import FeatureView, Field, FileSource
    from feast.types import Float64

    path = repo.write("rates.parquet", pa.table({"event_timestamp": times([1, 5]), "rate": [0.1, 0.5]}))
    source = FileSource(name="rates_source", path=path, timestamp_field="event_timestamp")
    repo.apply([FeatureView(name="rates", entities=[], schema=[Field(name="rate", dtype=Float64)], source=source)])
    frame = pa.table({"id": [1, 2, 3], "event_timestamp": times([0, 4, 9])})
    assert repo.store().get_historical_features(frame, ["rates:rate"]).to_arrow()["rate"].to_pylist() == [
        None,
        0.1,
        0.5,
    ]


def test_the_query_can_be_read(shop: Any) -> None:
    sql = shop.store().get_historical_features(shop.entities, shop.features).to_sql()
    assert sql.count("ASOF LEFT JOIN") == 2
    assert "users.parquet" in sql


def test_a_join_larger_than_its_memory_completes_by_spilling(repo: Any, view: Any) -> None:
    rng = np.random.default_rng(0)
    n = 400_000
    columns = {f"f{i}": rng.random(n) for i in range(8)}
    moments = pa.array(rng.integers(0, 10**12, n)).cast(MICROS)
    table = pa.table({"user_id": rng.integers(0, 40_000, n), "event_timestamp": moments, **columns})
    repo.apply([view("v", repo.write("v.parquet", table), features=dict.fromkeys(columns, "Float64"))])
    features = [f"v:{name}" for name in columns]
    entities = table.select(["user_id", "event_timestamp"]).take(pa.array(rng.permutation(n)))
    bounded = repo.store(memory_limit="60MB", threads=1, temp_directory="spill")
    job = bounded.get_historical_features(entities, features)
    with job.to_arrow_reader() as reader:
        first = reader.read_next_batch()
        spilled = sum(file.stat().st_size for file in (repo.path / "spill").rglob("*") if file.is_file())
        streamed = pa.Table.from_batches([first, *reader])
    assert spilled > 5_000_000
    assert streamed.equals(repo.store().get_historical_features(entities, features).to_arrow())
