"""Every format gives the same events; broken sources say what is wrong and leave the table as it was."""

from __future__ import annotations

import csv
import decimal
import json
import sqlite3
import sys
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plait.data import readers
from plait.data.readers import ImportSpec, detect_format, import_table, open_source
from plait.errors import DataError, PlaitError, SettingsError, SpecError, UnknownNameError
from plait.eventlog import IMPRESSIONS as EVENT_IMPRESSIONS
from plait.settings import Home

START = datetime(2024, 3, 1, 12, tzinfo=UTC)
N = 25
ROWS = [
    {
        "who": i % 5,
        "what": i % 7,
        "at": int((START + timedelta(minutes=i)).timestamp()),
        "kind": "click" if i % 2 else "rating",
        "stars": float(i % 5) + 0.5,
    }
    for i in range(N)
]
COLUMNS = {"user_id": "who", "item_id": "what", "timestamp": "at", "type": "kind", "value": "stars"}


def write_parquet(folder: Path) -> str:
    (folder / "events").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS[:10]), folder / "events" / "a.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[10:]), folder / "events" / "b.parquet")
    return str(folder / "events")


def write_csv(folder: Path) -> str:
    with (folder / "events.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0].keys())
        writer.writeheader()
        writer.writerows(ROWS)
    return str(folder / "events.csv")


def write_jsonl(folder: Path) -> str:
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(folder / "events.jsonl")


def write_delta(folder: Path) -> str:
    deltalake = pytest.importorskip("deltalake")
    path = str(folder / "delta")
    deltalake.write_deltalake(path, pa.Table.from_pylist([{**row, "who": 99} for row in ROWS]))
    deltalake.write_deltalake(path, pa.Table.from_pylist(ROWS), mode="overwrite")  # the old files stay on disk
    return path


def write_iceberg(folder: Path) -> str:
    catalog_module = pytest.importorskip("pyiceberg.catalog.sql")
    catalog = catalog_module.SqlCatalog("c", uri=f"sqlite:///{folder}/catalog.db", warehouse=f"file://{folder}/wh")
    catalog.create_namespace("db")
    rows = pa.Table.from_pylist(ROWS)
    table = catalog.create_table("db.events", schema=rows.schema)
    table.append(rows.slice(0, 12))
    table.append(rows.slice(12))
    return str(Path(table.location().removeprefix("file://")))


def write_sql(folder: Path) -> str:
    with sqlite3.connect(folder / "shop.db") as db:
        db.execute("CREATE TABLE events (who INTEGER, what INTEGER, at INTEGER, kind TEXT, stars REAL)")
        db.executemany("INSERT INTO events VALUES (:who, :what, :at, :kind, :stars)", ROWS)
    db.close()
    return f"sqlite:///{folder / 'shop.db'}"


WRITERS = {
    "parquet": write_parquet,
    "csv": write_csv,
    "jsonl": write_jsonl,
    "delta": write_delta,
    "iceberg": write_iceberg,
    "sql": write_sql,
}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(project=tmp_path, root=tmp_path / ".plait").create()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_becomes_the_same_feedback(home: Home, tmp_path: Path, name: str) -> None:
    source = WRITERS[name](tmp_path)
    assert detect_format(source) == name
    spec = ImportSpec(kind="feedback", source=source, columns=COLUMNS, table="events" if name == "sql" else None)
    done = import_table(home, spec)
    rows = sorted(pq.read_table(done.path).to_pylist(), key=lambda row: row["timestamp"])
    assert done.rows == len(rows) == N
    for i, row in enumerate(rows):
        assert row["timestamp"] == row["created"] == START + timedelta(minutes=i)
        assert (row["user_id"], row["item_id"], row["type"]) == (i % 5, i % 7, ROWS[i]["kind"])
        assert row["value"] == ROWS[i]["stars"]
        assert row["request_id"] is None
    assert len({row["event_id"] for row in rows}) == N


def test_importing_a_source_again_replaces_it(home: Home, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path)
    spec = ImportSpec(kind="feedback", source=source, columns=COLUMNS)
    first = import_table(home, spec)
    Path(source).write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    again = import_table(home, spec)
    assert (again.path, again.rows) == (first.path, 3)
    assert list((home.events / "feedback").iterdir()) == [first.path]


def test_progress_rises_to_the_rows_that_were_written(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BATCH_ROWS", 7)
    spec = ImportSpec(kind="feedback", source=write_parquet(tmp_path), columns=COLUMNS)
    seen: list[int] = []
    done = import_table(home, spec, progress=seen.append)
    assert seen == sorted(set(seen))
    assert seen[-1] == done.rows
    assert len(seen) >= N // 7


def test_impressions_get_a_request_each_and_constants(home: Home, tmp_path: Path) -> None:
    columns = {"user_id": "who", "item_id": "what", "timestamp": "at"}
    spec = ImportSpec(
        kind="impressions", source=write_csv(tmp_path), columns=columns, constants={"scene": "shop", "position": 1}
    )
    table = pq.read_table(import_table(home, spec).path)
    assert len(set(table.column("request_id").to_pylist())) == N
    assert set(table.column("scene").to_pylist()) == {"shop"}
    assert table.schema.field("position").type == pa.int32()


def test_users_keep_their_further_attributes(home: Home, tmp_path: Path) -> None:
    (tmp_path / "u.csv").write_text("id,since,tier,age\n7,2024-01-01T00:00:00Z,gold,31\n8,2024-01-02T01:00:00Z,,\n")
    spec = ImportSpec(
        kind="users", source=str(tmp_path / "u.csv"), columns={"user_id": "id", "event_timestamp": "since"}
    )
    rows = pq.read_table(import_table(home, spec).path).to_pylist()
    assert [(row["user_id"], row["tier"], row["age"]) for row in rows] == [(7, "gold", 31), (8, "", None)]
    assert rows[1]["event_timestamp"] == datetime(2024, 1, 2, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("1709294400", "s"),
        ("1709294400000", "ms"),
        ("1709294400.0", "s"),
        ("2024-03-01T12:00:00Z", "s"),
        ("2024-03-01 12:00:00", "s"),
        ("2024-03-01T13:00:00+01:00", "s"),
    ],
)
def test_times_may_be_numbers_or_text(home: Home, tmp_path: Path, text: str, unit: str) -> None:
    (tmp_path / "e.csv").write_text(f"user_id,item_id,timestamp\n1,2,{text}\n")
    spec = ImportSpec(kind="impressions", source=str(tmp_path / "e.csv"), unit=unit)
    assert pq.read_table(import_table(home, spec).path).column("timestamp").to_pylist() == [START]


BROKEN = {
    "ragged.csv": ("user_id,item_id,timestamp\n1,2,3\n4,5\n", "Expected 3 columns, got 2"),
    "text.csv": (
        "user_id,item_id,timestamp\n1,2,yesterday\n",
        r"text\.csv, row 1: impressions.timestamp is 'yesterday' \(string\) and cannot become timestamp",
    ),
    "ids.csv": (
        "user_id,item_id,timestamp\nx1,2,5\n",
        r"ids\.csv, row 1: impressions.user_id is 'x1' \(string\) and cannot become int64",
    ),
    "null.csv": ("user_id,item_id,timestamp\n,2,5\n", r"null\.csv, row 1: no 'user_id', which impressions must have"),
    "lacking.csv": ("user_id,timestamp\n1,5\n", "gives no 'item_id'"),
    "empty.csv": ("user_id,item_id,timestamp\n", "holds no row"),
    "half.jsonl": (
        '{"user_id": 1, "item_id": 2, "timestamp": 5}\n{"user_id": 1, "it',
        r"half\.jsonl, line 2 is not JSON .*it'",
    ),
    "torn.parquet": ("PAR1 and no more", "cannot be read as parquet"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_source_is_named_and_changes_nothing(home: Home, tmp_path: Path, name: str) -> None:
    text, message = BROKEN[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        import_table(home, ImportSpec(kind="impressions", source=str(tmp_path / name)))
    assert not list((home.events).rglob("*.parquet*"))


ARMS = [{"layer": "rank", "experiment": "deep", "arm": "b", "propensity": 0.25}]
IMPRESSIONS = [
    {
        "request_id": f"q{i // 2}",
        "timestamp": START + timedelta(seconds=i),
        "user_id": i % 5,
        "item_id": i % 7,
        "session_id": None if i < 9 else f"s{i // 4}",  # a column that begins with nulls
        "device_id": f"d{i % 3}",
        "team": "ab"[i % 2],
        "propensity": 0.5,
        "arms": None if i % 3 else ARMS,
    }
    for i in range(N)
]
_ARM = pa.struct([(name, pa.string()) for name in ("layer", "experiment", "arm")] + [("propensity", pa.float64())])
_ARROW = pa.Table.from_pylist(
    IMPRESSIONS,
    schema=pa.schema(
        [("request_id", pa.string()), ("timestamp", pa.timestamp("us", tz="UTC"))]
        + [(name, pa.int64()) for name in ("user_id", "item_id")]
        + [(name, pa.string()) for name in ("session_id", "device_id", "team")]
        + [("propensity", pa.float64()), ("arms", pa.list_(_ARM))]
    ),
)
FLAT = [  # for formats without lists: JSON text
    {**row, "timestamp": row["timestamp"].isoformat(), "arms": row["arms"] and json.dumps(row["arms"])}
    for row in IMPRESSIONS
]


def full_csv(folder: Path) -> str:
    with (folder / "i.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FLAT[0].keys())
        writer.writeheader()
        writer.writerows(FLAT)
    return str(folder / "i.csv")


def full_jsonl(folder: Path) -> str:
    lines = [{**row, "timestamp": row["timestamp"].isoformat()} for row in IMPRESSIONS]
    (folder / "i.jsonl").write_text(
        "".join(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n" for row in lines)
    )
    return str(folder / "i.jsonl")


def full_parquet(folder: Path) -> str:
    pq.write_table(_ARROW, folder / "i.parquet")
    return str(folder / "i.parquet")


def full_delta(folder: Path) -> str:
    pytest.importorskip("deltalake").write_deltalake(str(folder / "delta"), _ARROW)
    return str(folder / "delta")


def full_iceberg(folder: Path) -> str:
    module = pytest.importorskip("pyiceberg.catalog.sql")
    catalog = module.SqlCatalog("c", uri=f"sqlite:///{folder}/c.db", warehouse=f"file://{folder}/wh")
    catalog.create_namespace("db")
    table = catalog.create_table("db.impressions", schema=_ARROW.schema)
    table.append(_ARROW)
    return str(Path(table.location().removeprefix("file://")))


def full_sql(folder: Path) -> str:
    with sqlite3.connect(folder / "i.db") as db:
        db.execute(f"CREATE TABLE events ({', '.join(FLAT[0])})")
        db.executemany(f"INSERT INTO events VALUES ({', '.join(':' + name for name in FLAT[0])})", FLAT)
    db.close()
    return f"sqlite:///{folder / 'i.db'}"


FULL = (full_parquet, full_csv, full_jsonl, full_delta, full_iceberg, full_sql)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("write", FULL, ids=lambda write: write.__name__)
def test_sessions_devices_teams_and_arms_with_propensities_come_from_every_format(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write
) -> None:
    monkeypatch.setattr("plait.data.textfiles._BLOCK_BYTES", 300)  # a row or two, types open in the first ones
    source = write(tmp_path)
    table = "events" if write is full_sql else None
    done = import_table(home, ImportSpec(kind="impressions", source=source, table=table))
    got = pq.read_table(done.path)
    assert got.schema.equals(EVENT_IMPRESSIONS)
    rows = sorted(got.select(list(IMPRESSIONS[0])).to_pylist(), key=lambda row: row["timestamp"])
    # pyiceberg reads a null list as an empty one.
    assert [{**row, "arms": row["arms"] or None} for row in rows] == IMPRESSIONS


def test_arms_that_are_no_arms_are_named_with_their_row(home: Home, tmp_path: Path) -> None:
    for arms, message in (
        ('[{"arm": "a", "propensty": 1}]', "an entry has propensty; entries have arm, "),
        ('["a"]', "an entry is 'a'"),
        ("a", "row 2: impressions.arms is 'a'"),
    ):
        with (tmp_path / "e.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["user_id", "item_id", "timestamp", "arms"], [1, 2, 5, "[]"], [1, 2, 5, arms]])
        with pytest.raises(DataError, match=message):
            import_table(home, ImportSpec(kind="impressions", source=str(tmp_path / "e.csv")))


def test_the_file_and_the_row_of_a_bad_value_deep_inside_are_named(home: Home, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    head = "user_id,item_id,timestamp\n"
    (folder / "a.csv").write_text(head + "1,2,2024-03-01T12:00:00Z\n" * 100)
    (folder / "b.csv").write_text(head + "1,2,2024-03-01T12:00:00Z\n" * 41 + "1,2,2024-13-01\n" + "1,2,5\n")
    with pytest.raises(DataError, match=r"b\.csv, row 42: impressions.timestamp is '2024-13-01'"):
        import_table(home, ImportSpec(kind="impressions", source=str(folder)))


def test_times_of_every_form_may_stand_in_one_column(home: Home, tmp_path: Path) -> None:
    times = ["1709294400", "1709294400.5", "2024-03-01T12:00:00Z", "2024-03-01 12:00:00", "2024-03-01T13:00:00+01:00"]
    times += ["2024-03-01T12:00:00.250-00:00", "2024-03-01"]
    (tmp_path / "e.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"1,2,{time}\n" for time in times))
    done = import_table(home, ImportSpec(kind="impressions", source=str(tmp_path / "e.csv")))
    gaps = [0.0, 0.5, 0.0, 0.0, 0.0, 0.25, -43_200.0]
    assert pq.read_table(done.path)["timestamp"].to_pylist() == [START + timedelta(seconds=gap) for gap in gaps]


@pytest.mark.parametrize("time", ["1709294400000", "1709294400000.0"])
def test_a_wrong_unit_is_noticed(home: Home, tmp_path: Path, time: str) -> None:
    (tmp_path / "e.csv").write_text(f"user_id,item_id,timestamp\n1,2,{time}\n")
    with pytest.raises(DataError, match=r"after the year 2200: give the numbers' unit \(--unit ms"):
        import_table(home, ImportSpec(kind="impressions", source=str(tmp_path / "e.csv")))


def test_a_field_that_changes_its_kind_between_lines_is_named(home: Home, tmp_path: Path) -> None:
    row = '{"user_id": 1, "item_id": 2, "timestamp": 5}\n'
    (tmp_path / "e.jsonl").write_text(row + row.replace("1", '"one"'))
    with pytest.raises(DataError, match=r"e\.jsonl, line 2: 'user_id' is a str, and a number in line 1"):
        import_table(home, ImportSpec(kind="impressions", source=str(tmp_path / "e.jsonl")))
    (tmp_path / "e.jsonl").write_text(row + "\n[1]\n")
    with pytest.raises(DataError, match="line 3 is not a JSON object"):
        import_table(home, ImportSpec(kind="impressions", source=str(tmp_path / "e.jsonl")))


def test_ids_are_made_only_for_rows_that_have_none(home: Home, tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user_id,item_id,timestamp,type,event_id\n1,2,5,click,e1\n1,2,6,click,\n")
    done = import_table(home, ImportSpec(kind="feedback", source=str(tmp_path / "e.csv")))
    first, second = pq.read_table(done.path)["event_id"].to_pylist()
    assert first == "e1"
    assert second.endswith("-1")


@pytest.mark.postgres
@pytest.mark.parametrize("by_query", [False, True])
def test_postgresql_with_types_of_its_own(
    home: Home, postgres, by_query: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times with and without a zone on a server that is not in UTC, decimals, UUIDs, enumerations, JSON, nulls."""
    import psycopg

    monkeypatch.setattr("plait.data.readers.BATCH_ROWS", 4)  # several fetches
    url = postgres.new_database()
    ids = [uuid.UUID(int=i) for i in range(10)]
    with psycopg.connect(url) as db:
        db.execute("CREATE TYPE act AS ENUM ('click', 'rating')")
        db.execute(
            "CREATE TABLE deeds (event_id uuid, who bigint, what integer, at timestamptz, told timestamp, kind act, "
            "stars numeric(4, 2), arms jsonb)"
        )
        for i, event_id in enumerate(ids):
            at = START + timedelta(minutes=i)
            stars = None if i == 3 else decimal.Decimal(i) / 4
            arms = None if i % 2 else json.dumps([{"layer": "l", "experiment": "e", "arm": f"a{i}", "propensity": 0.5}])
            row = (event_id, i % 5, i % 7, at, at.replace(tzinfo=None), "click", stars, arms)
            db.execute("INSERT INTO deeds VALUES (%s, %s, %s, %s, %s, %s, %s, %s)", row)
    columns = {"user_id": "who", "item_id": "what", "timestamp": "at", "type": "kind", "value": "stars"}
    what = {"query": "SELECT * FROM deeds WHERE what < 100"} if by_query else {"table": "deeds"}
    done = import_table(home, ImportSpec(kind="feedback", source=url, columns=columns, **what))
    rows = sorted(pq.read_table(done.path).to_pylist(), key=lambda row: row["timestamp"])
    assert [row["event_id"] for row in rows] == [str(event_id) for event_id in ids]
    assert [row["timestamp"] for row in rows] == [START + timedelta(minutes=i) for i in range(10)]
    assert [row["value"] for row in rows] == [None if i == 3 else i / 4 for i in range(10)]
    assert {row["type"] for row in rows} == {"click"}
    shown = {"request_id": "event_id", "user_id": "who", "item_id": "what", "timestamp": "told"}
    done = import_table(home, ImportSpec(kind="impressions", source=url, columns=shown, **what))
    rows = sorted(pq.read_table(done.path).to_pylist(), key=lambda row: row["timestamp"])
    assert [row["timestamp"] for row in rows] == [START + timedelta(minutes=i) for i in range(10)]
    assert [len(row["arms"] or []) for row in rows] == [1 - i % 2 for i in range(10)]


def test_a_uuid_of_parquet_is_read_as_text(home: Home, tmp_path: Path) -> None:
    ids = [uuid.UUID(int=i) for i in range(3)]
    rows = pa.Table.from_pylist(ROWS[:3]).append_column("event_id", pa.array(ids, pa.uuid()))
    pq.write_table(rows, tmp_path / "e.parquet")
    done = import_table(home, ImportSpec(kind="feedback", source=str(tmp_path / "e.parquet"), columns=COLUMNS))
    assert sorted(pq.read_table(done.path)["event_id"].to_pylist()) == [str(id_) for id_ in ids]


@pytest.mark.postgres
def test_a_postgresql_that_is_gone_is_named_without_its_password(home: Home, find_port) -> None:
    pytest.importorskip("psycopg")
    source = f"postgresql+psycopg://plait:secret@127.0.0.1:{find_port()}/shop"
    with pytest.raises(DataError, match="cannot be read") as told:
        import_table(home, ImportSpec(kind="feedback", source=source, table="events", columns=COLUMNS))
    assert "secret" not in str(told.value)
    assert not list((home.events / "feedback").iterdir())


def test_a_driver_that_is_not_installed_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(SettingsError, match=r"needs the package 'psycopg2'.*`pip install psycopg2-binary`"):
        list(open_source("postgresql+psycopg2://host/db", table="events"))
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(SettingsError, match=r"needs the package 'psycopg'.*`pip install plait\[postgres\]`"):
        list(open_source("postgresql+psycopg://host/db", table="events"))
    with pytest.raises(SettingsError, match=r"nodb.*a source is a path.*s3://.*iceberg://.*SQLAlchemy URL"):
        list(open_source("nodb://host/db", table="events"))


@pytest.mark.parametrize(("write", "module"), [(write_delta, "deltalake"), (write_iceberg, "pyiceberg.table")])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_lake_library_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write, module: str
) -> None:
    source = write(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SettingsError, match=r"needs .*`pip install plait\[lakes\]`"):
        list(open_source(source))


def test_names_that_are_nearly_right_are_suggested(home: Home, tmp_path: Path) -> None:
    source = write_sql(tmp_path)
    with pytest.raises(UnknownNameError, match="did you mean 'events'"):
        list(open_source(source, table="event"))
    with pytest.raises(UnknownNameError, match="did you mean 'item_id'"):
        ImportSpec(kind="feedback", source=source, columns={"itemid": "what"})
    with pytest.raises(UnknownNameError, match="did you mean 'feedback'"):
        ImportSpec(kind="feedbck", source=source)
    with pytest.raises(UnknownNameError, match="did you mean 'what'"):
        import_table(
            home, ImportSpec(kind="feedback", source=source, table="events", columns={**COLUMNS, "item_id": "wat"})
        )


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere.parquet", {}),
        ("sqlite:///:memory:", {}),
        ("sqlite:///:memory:", {"query": "SELECT * FROM nothing"}),
        ("nodb://somewhere/x", {"query": "SELECT 1"}),
    ],
)
def test_a_source_that_cannot_be_opened_is_a_plait_error(source: str, words: dict) -> None:
    with pytest.raises(PlaitError):
        list(open_source(source, **words))


def test_a_password_does_not_reach_the_message(tmp_path: Path) -> None:
    with pytest.raises(PlaitError) as caught:
        list(open_source(f"sqlite://user:secret@/{tmp_path}/no/such.db", query="SELECT 1"))
    assert "secret" not in str(caught.value)


def test_a_query_and_a_table_together_are_refused() -> None:
    with pytest.raises(SpecError, match="either a query or the name of a table"):
        list(open_source("sqlite:///:memory:", query="SELECT 1", table="t"))
