"""Every format gives the same events; broken sources say what is wrong and leave the table as it was."""

from __future__ import annotations

import csv
import json
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plait.data.readers import ImportSpec, detect_format, import_table, open_source
from plait.errors import DataError, PlaitError, SpecError, UnknownNameError
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
    "text.csv": ("user_id,item_id,timestamp\n1,2,yesterday\n", "impressions.timestamp came as string"),
    "ids.csv": ("user_id,item_id,timestamp\nx1,2,5\n", "impressions.user_id came as string"),
    "null.csv": ("user_id,item_id,timestamp\n,2,5\n", "have no 'user_id'"),
    "lacking.csv": ("user_id,timestamp\n1,5\n", "gives no 'item_id'"),
    "empty.csv": ("user_id,item_id,timestamp\n", "holds no row"),
    "half.jsonl": ('{"user_id": 1, "item_id": 2, "timestamp": 5}\n{"user_id": 1, "it', "cannot be read as jsonl"),
    "torn.parquet": ("PAR1 and no more", "cannot be read as parquet"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_source_is_named_and_changes_nothing(home: Home, tmp_path: Path, name: str) -> None:
    text, message = BROKEN[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        import_table(home, ImportSpec(kind="impressions", source=str(tmp_path / name)))
    assert not list((home.events).rglob("*.parquet*"))


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
