"""Types that only later rows show: nothing valid is refused, and a real conflict is named."""

from __future__ import annotations

import gzip
import json
import sqlite3
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plait.data.readers import ImportSpec, import_table
from plait.errors import DataError
from plait.settings import Home

SINCE = "2024-01-01T00:00:00Z"
N = 12


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """Its readers take few rows at a time."""
    monkeypatch.setattr("plait.data.readers.BATCH_ROWS", 4)
    monkeypatch.setattr("plait.data.textfiles._BLOCK_BYTES", 150)
    return Home(project=tmp_path, root=tmp_path / ".plait").create()


def database(folder: Path, declared: str, values: list[object]) -> str:
    with sqlite3.connect(folder / "shop.db") as db:
        db.execute(f"CREATE TABLE people (user_id INTEGER, event_timestamp TEXT, x {declared})")
        db.executemany("INSERT INTO people VALUES (?, ?, ?)", [(i, SINCE, value) for i, value in enumerate(values)])
    db.close()
    return f"sqlite:///{folder / 'shop.db'}"


def lines(folder: Path, rows: list[dict]) -> str:
    rows = [{"user_id": i, "event_timestamp": SINCE, **row} for i, row in enumerate(rows)]
    (folder / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "people.jsonl")


def column(home: Home, spec: ImportSpec, name: str = "x") -> pa.ChunkedArray:
    done = import_table(home, spec)
    assert [path.name for path in done.path.parent.iterdir()] == [done.path.name]
    table = pq.read_table(done.path).sort_by("user_id")
    assert table["user_id"].to_pylist() == list(range(done.rows))
    return table[name]


@pytest.mark.parametrize("words", [{"table": "people"}, {"query": "SELECT * FROM people"}], ids=["table", "query"])
@pytest.mark.parametrize(
    ("declared", "values"),
    [
        ("TEXT", [None] * 6 + ["gold"] * 6),
        ("TEXT", [None] * 4 + ["gold"] * 4 + [None] * 4),
        ("REAL", [None] * 6 + [2.5] * 6),
        ("NUMERIC", [3] * 6 + [2.5] * 6),
        ("NUMERIC", [2.5] * 6 + [3] * 6),
        ("NUMERIC(8, 2)", [3] * 6 + [1234.25] * 6),
        ("INTEGER", [None] * 5 + [2**60 + 1] * 7),
    ],
)
def test_a_column_of_a_database_may_show_its_type_late(
    home: Home, tmp_path: Path, words: dict, declared: str, values: list
) -> None:
    spec = ImportSpec(kind="users", source=database(tmp_path, declared, values), **words)
    assert column(home, spec).to_pylist() == values


@pytest.mark.filterwarnings("ignore:Dialect sqlite.*Decimal")
def test_a_table_that_declares_its_types_gets_them_though_all_is_null(home: Home, tmp_path: Path) -> None:
    for declared, wanted in {
        "TEXT": pa.string(),
        "REAL": pa.float64(),
        "BIGINT": pa.int64(),
        "BOOLEAN": pa.bool_(),
        "NUMERIC(8, 2)": pa.decimal128(8, 2),
        "DATETIME": pa.timestamp("us"),
    }.items():
        source = database(tmp_path, declared, [None] * N)
        assert column(home, ImportSpec(kind="users", source=source, table="people")).type == wanted
        (tmp_path / "shop.db").unlink()


def test_a_field_of_json_lines_may_come_late_and_grow(home: Home, tmp_path: Path) -> None:
    rows = [{}, {}, {}, {"x": None}, {}, {}, {"x": 3}, {}, {"x": 2.5, "y": {"a": 1}}, {}, {"y": {"b": "two"}}, {"x": 4}]
    source = lines(tmp_path, rows)
    spec = ImportSpec(kind="users", source=source)
    assert column(home, spec).to_pylist() == [row.get("x") for row in rows]
    wanted = {8: {"a": 1, "b": None}, 10: {"a": None, "b": "two"}}
    assert column(home, spec, "y").to_pylist() == [wanted.get(i) for i in range(N)]


@pytest.mark.parametrize("word_at", [0, 6, 11])
def test_words_among_times_leave_all_of_them_as_they_were_written(home: Home, tmp_path: Path, word_at: int) -> None:
    texts = ["2024-05-01"] * N
    texts[word_at] = "unknown"
    source = lines(tmp_path, [{"x": text} for text in texts])
    assert column(home, ImportSpec(kind="users", source=source)).to_pylist() == texts


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        ([""] * 11 + ["gold"], [""] * 11 + ["gold"]),
        (["gold"] + [""] * 11, ["gold"] + [""] * 11),
        ([""] * 8 + ["1"] * 2 + ["2.5"] * 2, [None] * 8 + [1.0] * 2 + [2.5] * 2),
        (["3"] * 8 + ["2.5"] * 4, [3.0] * 8 + [2.5] * 4),
        (["007"] * 8 + ["7b"] * 4, ["007"] * 8 + ["7b"] * 4),  # as in one block: what is not all numbers is text
        (["true"] * 8 + [""] * 4, [True] * 8 + [None] * 4),
        (["2024-05-01"] * 8 + ["unknown"] * 4, ["2024-05-01"] * 8 + ["unknown"] * 4),
        (['"a ""b"", c"'] * 12, ['a "b", c'] * 12),
        ([""] * 12, [None] * 12),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_a_column_of_csv_is_what_all_of_its_blocks_can_be(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, texts: list[str], wanted: list
) -> None:
    monkeypatch.setattr("plait.data.textfiles._CSV_BLOCK_BYTES", 120)
    text = "user_id,event_timestamp,x\n" + "".join(f"{i},{SINCE},{value}\n" for i, value in enumerate(texts))
    path = tmp_path / f"people{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix == ".csv.gz" else text.encode())
    assert column(home, ImportSpec(kind="users", source=str(path))).to_pylist() == wanted


def test_a_column_of_csv_that_the_event_table_does_not_take_may_hold_anything(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plait.data.textfiles._CSV_BLOCK_BYTES", 60)
    rows = "".join(f"{i},{i},5,{'' if i < 9 else 'note'}\n" for i in range(N))
    (tmp_path / "e.csv").write_text("user_id,item_id,timestamp,remark\n" + rows)
    assert import_table(home, ImportSpec(kind="impressions", source=str(tmp_path / "e.csv"))).rows == N


def test_parts_of_a_folder_may_have_columns_and_types_of_their_own(home: Home, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    base = {"user_id": pa.array([0, 1]), "event_timestamp": [SINCE] * 2}
    pq.write_table(pa.table(base), folder / "a.parquet")
    pq.write_table(pa.table({**base, "user_id": [2, 3], "x": pa.array([1, 2], pa.int32())}), folder / "b.parquet")
    tenth = pa.array([Decimal("0.1"), Decimal("20.25")])
    pq.write_table(pa.table({**base, "user_id": [4, 5], "x": tenth}), folder / "c.parquet")
    pq.write_table(pa.table({**base, "user_id": [6, 7], "x": pa.nulls(2)}), folder / "d.parquet")
    got = column(home, ImportSpec(kind="users", source=str(folder)))
    assert got.to_pylist() == [None, None, 1, 2, Decimal("0.1"), Decimal("20.25"), None, None]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1] * 8 + ["gold"] * 4, "query, row 9 and after: column 'x' is string here and int64 in earlier rows: .*gold"),
        ([1] * 5 + ["gold"] * 7, "column 'x' holds values of several kinds: .*gold"),
        ([2**60 + 1] * 8 + [2.5] * 4, "query, row 1 and after: column 'x' is int64 here and double in later rows"),
        ([2.5] * 8 + [2**60 + 1] * 4, "query, row 9 and after: column 'x' is int64 here and double in earlier rows"),
    ],
)
def test_types_that_have_none_in_common_are_named_and_nothing_is_lost(
    home: Home, tmp_path: Path, values: list, message: str
) -> None:
    spec = ImportSpec(kind="users", source=database(tmp_path, "", ["a"] * 3), query="SELECT * FROM people")
    before = import_table(home, spec)
    (tmp_path / "shop.db").unlink()
    database(tmp_path, "", values)
    with pytest.raises(DataError, match=message):
        import_table(home, spec)
    assert pq.read_table(before.path)["x"].to_pylist() == ["a"] * 3
    assert list(before.path.parent.iterdir()) == [before.path]
