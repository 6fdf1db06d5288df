"""Where features come from: files, folders of parts, drifting schemas, Delta; and what is said when they are broken."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from plait.errors import StoreError
from plait.stores import asof_search
from plait.stores.asof_engine import EngineLimits, connect
from plait.stores.offline import engine_limits

MICROS = pa.timestamp("us", tz="UTC")
T0 = datetime(2024, 1, 1, tzinfo=UTC)


def rows(*values: tuple[int, int, int], **extra: list[Any]) -> pa.Table:
    """A feature table of (user, hour, a)."""
    users, hours, a = zip(*values, strict=True)
    moments = pa.array([T0 + timedelta(hours=hour) for hour in hours], MICROS)
    return pa.table({"user_id": users, "event_timestamp": moments, "a": a, **extra})


NOW = pa.table({"user_id": [1, 2], "event_timestamp": pa.array([T0 + timedelta(hours=9)] * 2, MICROS)})


def ask(repo: Any, *features: str, **options: Any) -> dict[str, list[Any]]:
    result = repo.store(**options).get_historical_features(NOW, list(features or ["v:a"])).to_arrow()
    return result.select(result.column_names[2:]).to_pydict()


def test_a_relative_folder_of_parts_is_found_from_any_working_directory(
    repo: Any, view: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    repo.write("v/part-0.parquet", rows((1, 0, 1), (2, 0, 2)))
    repo.write("v/part-1.parquet", rows((1, 5, 3)))
    repo.write("v/day=2/part-0.parquet", rows((2, 5, 4)))
    for hidden in (".part-2.parquet.tmp-1", "_temporary/part-9.parquet", ".part-3.parquet", "_SUCCESS.parquet"):
        path = repo.path / "data/v" / hidden
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half a file")
    repo.apply([view("v", "data/v", features={"a": "Int64"})])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert ask(repo) == {"a": [3, 4]}


def test_parts_with_more_or_other_columns_form_one_table(repo: Any, view: Any) -> None:
    repo.write("v/0.parquet", rows((1, 0, 1), (2, 0, 2)))
    wider = rows((1, 5, 3), b=[0.5]).select(["b", "a", "event_timestamp", "user_id"])
    repo.write("v/1.parquet", wider.set_column(1, "a", wider["a"].cast(pa.int32())))
    repo.apply([view("v", "data/v", features={"a": "Int64", "b": "Float64"})])
    assert ask(repo, "v:a", "v:b") == {"a": [3, 2], "b": [0.5, None]}


@pytest.mark.parametrize("unit", ["us", "ns", "ms"])
@pytest.mark.parametrize("zone", ["UTC", None, "America/New_York"])
def test_timestamps_of_any_unit_and_zone_are_read_as_the_same_moments(
    repo: Any, view: Any, unit: str, zone: str | None
) -> None:
    table = rows((1, 0, 1), (1, 9, 2), (2, 10, 3))
    moments = table["event_timestamp"].cast(pa.timestamp(unit, tz=zone)) if zone else None
    naive = table["event_timestamp"].cast(pa.timestamp(unit))
    path = repo.write("v.parquet", table.set_column(1, "event_timestamp", naive if moments is None else moments))
    repo.apply([view("v", path, features={"a": "Int64"}, ttl=timedelta(hours=2))])
    assert ask(repo) == {"a": [2, None]}


def test_a_ttl_is_inclusive_to_the_microsecond(repo: Any, view: Any) -> None:
    ttl = timedelta(hours=100, microseconds=1)  # mixed units: the stock store refuses these
    age = [ttl, ttl + timedelta(microseconds=1)]
    moments = pa.array([T0 + timedelta(hours=9) - a for a in age], MICROS)
    path = repo.write("v.parquet", pa.table({"user_id": [1, 2], "event_timestamp": moments, "a": [1, 2]}))
    repo.apply([view("v", path, features={"a": "Int64"}, ttl=ttl)])
    assert ask(repo) == {"a": [1, None]}


def test_names_that_need_quoting_are_quoted(repo: Any, view: Any) -> None:
    names = ["user id", "event_timestamp", 'odd "name"; --']
    repo.write("v'1.parquet", rows((1, 0, 1), (2, 0, 2)).rename_columns(names))
    repo.apply([view("v", "data/v'1.parquet", keys={"user id": "Int64"}, features={'odd "name"; --': "Int64"})])
    entities = NOW.rename_columns(["user id", "event_timestamp"])
    result = repo.store().get_historical_features(entities, ['v:odd "name"; --']).to_arrow()
    assert result['odd "name"; --'].to_pylist() == [1, 2]


def test_a_delta_table_is_read_and_saved(repo: Any, view: Any) -> None:
    deltalake = pytest.importorskip("deltalake", reason="the extra 'lakes' is not installed")
    from feast.data_format import DeltaFormat
    from feast.infra.offline_stores.file_source import SavedDatasetFileStorage

    deltalake.write_deltalake(repo.path / "delta", rows((1, 0, 1), (2, 0, 2)))
    deltalake.write_deltalake(repo.path / "delta", rows((1, 5, 3)), mode="append")
    repo.apply([view("v", "delta", features={"a": "Int64"}, file_format=DeltaFormat())])
    assert ask(repo) == {"a": [3, 2]}
    job = repo.store().get_historical_features(NOW, ["v:a"])
    job.persist(SavedDatasetFileStorage("saved", file_format=DeltaFormat()))
    assert deltalake.DeltaTable(repo.path / "saved").to_pyarrow_table()["a"].to_pylist() == [3, 2]


def test_a_missing_path_says_what_to_do(repo: Any, view: Any) -> None:
    path = repo.write("v.parquet", rows((1, 0, 1)))
    repo.apply([view("v", path, features={"a": "Int64"})])
    Path(path).unlink()
    with pytest.raises(StoreError, match=r"source 'v_source': nothing at .*v\.parquet; write the table first"):
        ask(repo)
    Path(path).mkdir()
    with pytest.raises(StoreError, match=r"no \*\.parquet file in the folder .*v\.parquet"):
        ask(repo)


@pytest.mark.parametrize("damage", ["cut short", "not parquet", "empty", "a page overwritten"])
def test_a_corrupt_part_is_named_and_nothing_half_is_given(repo: Any, view: Any, damage: str) -> None:
    repo.write("v/0.parquet", rows((1, 0, 1), (2, 0, 2)))
    table = rows(*((user, hour, hour) for user in (1, 2) for hour in range(500)))
    bad = Path(repo.write("v/1.parquet", table, compression="zstd"))
    repo.apply([view("v", "data/v", features={"a": "Int64"})])
    whole = bad.read_bytes()
    bad.write_bytes(
        {
            "cut short": whole[: len(whole) // 2],
            "not parquet": b"user_id,a\n1,2\n",
            "empty": b"",
            "a page overwritten": b"PAR1" + b"\xff" * 1500 + whole[1504:],
        }[damage]
    )
    with pytest.raises(StoreError) as caught:
        repo.store().get_historical_features(NOW, ["v:a"]).to_parquet("out")
    assert "1.parquet" in str(caught.value)
    assert not (repo.path / "out").exists()


def test_a_part_that_is_rewritten_while_it_is_read_is_an_error_not_a_mix(
    repo: Any, view: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plait.stores import asof_gather

    repo.write("v/0.parquet", rows((1, 0, 1), (2, 0, 2)))
    repo.apply([view("v", "data/v", features={"a": "Int64"})])
    find_rows = asof_gather._matched_rows

    def find_rows_then_rewrite(*arguments: Any) -> pa.Array:
        found = find_rows(*arguments)
        repo.write("v/0.parquet", rows((2, 0, 3), (1, 0, 4)))
        return found

    monkeypatch.setattr(asof_gather, "_matched_rows", find_rows_then_rewrite)
    with pytest.raises(StoreError, match=r"0\.parquet was rewritten while it was read; run again"):
        ask(repo)
    monkeypatch.undo()
    assert ask(repo) == {"a": [4, 3]}


@pytest.mark.parametrize("n_rows", [1, 200])
@pytest.mark.parametrize("n_parts", [1, 3])
def test_a_small_frame_on_a_large_source_and_the_reverse_agree_with_the_stream(
    repo: Any, view: Any, n_rows: int, n_parts: int
) -> None:
    rng = np.random.default_rng(n_rows)
    for part in range(n_parts):
        drawn = rng.integers(0, [4, 8, 1000], (n_rows, 3))
        repo.write(f"v/{part}.parquet", rows(*map(tuple, drawn.tolist()), s=[f"s{x}" for _, _, x in drawn]))
    repo.apply([view("v", "data/v", features={"a": "Int64", "s": "String"}, ttl=timedelta(hours=3))])
    moments = pa.array([T0 + timedelta(hours=int(hour)) for hour in rng.integers(0, 12, 50)], MICROS)
    frame = pa.table({"user_id": rng.integers(0, 5, 50), "event_timestamp": moments})
    frame = frame.append_column("name", pa.array(["x"] * 50).dictionary_encode())
    frame = frame.append_column("long", pa.array(["y"] * 50, pa.large_string()))
    job = repo.store().get_historical_features(frame, ["v:a", "v:s"])
    whole = job.to_arrow()
    assert whole.equals(job.to_arrow_reader().read_all())
    assert 0 < whole["s"].null_count < 50


@pytest.mark.parametrize(("column", "what"), [("a", "a feature"), ("user_id", "a join key")])
def test_a_column_that_is_gone_is_named_with_the_nearest(repo: Any, view: Any, column: str, what: str) -> None:
    path = repo.write("v.parquet", rows((1, 0, 1)))
    repo.apply([view("v", path, features={"a": "Int64"})])
    repo.write("v.parquet", rows((1, 0, 1)).rename_columns({column: f"{column}a"}))
    with pytest.raises(StoreError, match=rf"no column '{column}' for {what} of view 'v'; did you mean '{column}a'\?"):
        ask(repo)


def test_the_limits_of_the_settings_reach_the_connection(tmp_path: Path) -> None:
    limits = EngineLimits(memory_limit="300MB", threads=1, temp_directory=tmp_path / "spill")
    with connect(limits) as db:
        named = "current_setting('memory_limit'), current_setting('threads'), current_setting('temp_directory')"
        memory, threads, folder = db.execute(f"SELECT {named}").fetchone() or ()
        assert (memory, threads) == ("286.1 MiB", 1)
        assert Path(folder).parent == tmp_path / "spill"
    assert list((tmp_path / "spill").iterdir()) == []


def test_what_a_killed_process_spilled_is_removed_and_what_a_living_one_spills_is_not(tmp_path: Path) -> None:
    left = tmp_path / "plait-spill-dead"
    left.mkdir()
    (left / "duckdb_temp_storage-0.tmp").write_bytes(b"x" * 100)
    other = tmp_path / "something else"
    other.mkdir()
    limits = EngineLimits(temp_directory=tmp_path)
    with connect(limits), connect(limits):
        assert not left.exists()
        assert len(list(tmp_path.glob("plait-spill-*"))) == 2
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.parametrize("bad", [{"memory_limit": "lots"}, {"temp_directory": "/proc/nowhere"}])
def test_settings_that_make_no_sense_are_refused_in_words(repo: Any, view: Any, bad: dict[str, Any]) -> None:
    repo.apply([view("v", repo.write("v.parquet", rows((1, 0, 1))), features={"a": "Int64"})])
    with pytest.raises(StoreError, match=rf"{next(iter(bad))}"):
        ask(repo, **bad)


@pytest.mark.parametrize("bad", [{"threads": 0}, {"created_cutoff": "perhaps"}, {"memory": "1GB"}])
def test_a_wrong_setting_does_not_open_a_store(repo: Any, bad: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=re.escape(next(iter(bad)))):
        repo.store(**bad)


@pytest.mark.parametrize("whole", [True, False])
def test_too_little_memory_is_an_error_that_names_the_setting(
    repo: Any, view: Any, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asof_search, "SEARCHED_ROWS", 0)
    rng = np.random.default_rng(0)
    n = 300_000
    table = pa.table(
        {
            "user_id": rng.integers(0, 1000, n),
            "event_timestamp": pa.array(rng.integers(0, 10**12, n)).cast(MICROS),
            "a": rng.integers(0, 9, n),
        }
    )
    repo.apply([view("v", repo.write("v.parquet", table), features={"a": "Int64"})])
    entities = table.select(["user_id", "event_timestamp"])
    with pytest.raises(StoreError, match=r"out of memory under memory_limit=5MB.*Raise offline_store\.memory_limit"):
        job = repo.store(memory_limit="5MB").get_historical_features(entities, ["v:a"])
        job.to_arrow() if whole else job.to_arrow_reader().read_all()


def test_the_settings_of_the_yaml_are_the_limits_of_a_query(repo: Any) -> None:
    config = repo.store(memory_limit="300MB", threads=1, temp_directory="spill").config
    spill = repo.path / "spill"
    assert engine_limits(config) == EngineLimits(memory_limit="300MB", threads=1, temp_directory=spill)
    assert engine_limits(repo.store().config) == EngineLimits()


def test_an_arrow_table_on_the_left_is_not_joined_by_a_nested_loop() -> None:
    """DuckDB takes a registered table for tiny; without our setting this join is quadratic."""
    with connect(EngineLimits()) as db:
        db.register("e", NOW)
        plan = db.execute(
            "EXPLAIN SELECT * FROM e ASOF LEFT JOIN e AS f ON e.user_id = f.user_id "
            "AND e.event_timestamp >= f.event_timestamp"
        ).fetchall()[0][1]
        assert "ASOF_JOIN" in plan
