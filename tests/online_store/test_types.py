"""Maps, structs, sets and the like by columns: they come back whole, as Feast's protos do, or are refused."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal as D

import pyarrow as pa
import pytest
from feast.type_map import feast_value_type_to_python_type, python_values_to_proto_values
from feast.types import (
    Array,
    Bytes,
    Decimal,
    Int64,
    Json,
    Map,
    ScalarMap,
    Set,
    String,
    Struct,
    UnixTimestamp,
    Uuid,
)

from plait.errors import StoreError
from tests.online_store.conftest import entity_key

T0 = datetime(2024, 1, 1, tzinfo=UTC)
NOW = T0 + timedelta(days=1)
MOMENT = datetime(2023, 5, 6, 7, 8, 9, tzinfo=UTC)


ONE, TWO = (f"5f0c0f0a-0000-4000-8000-00000000000{i}" for i in (1, 2))
POINT = Struct({"n": Int64, "s": String})
POINTS = pa.struct([("n", pa.int64()), ("s", pa.string())])
PRICES = pa.decimal128(5, 2)
# Feast's type, the column that is written, and what is read where that is another: sets come in a fixed order, JSON and
# decimals as Feast's own Arrow types of them, which are texts. Not here, since Feast's protos cannot say it: an empty
# list inside a nested one (Feast makes it a null), an empty list inside a map (Feast refuses it).
RICH = {
    "texts_of": (Map, pa.array([{"a": "x", "b": None}, None, {}], pa.map_(pa.string(), pa.string())), None),
    "numbers_of": (Map, pa.array([{"a": 1.5}, None, {}], pa.map_(pa.string(), pa.float64())), None),
    "raws_of": (Map, pa.array([{"a": b"x\xff"}, None, {}], pa.map_(pa.string(), pa.binary())), None),
    "lists_of": (Map, pa.array([{"a": [1, 2]}, None, {}], pa.map_(pa.string(), pa.list_(pa.int64()))), None),
    "json_of": (
        Map,
        pa.array(['{"a": {"b": 1}, "c": {}}', None, "{}"]),
        pa.array(
            [[("a", [("b", 1)]), ("c", [])], None, []],
            pa.map_(pa.string(), pa.map_(pa.string(), pa.int64())),
        ),
    ),
    "mixed": (
        Map,
        pa.array(['{"a": 1, "b": "x"}', None, '{"a": 2}']),
        pa.array([{"a": 1, "b": "x"}, None, {"a": 2, "b": None}]),
    ),
    "maps": (Array(Map), pa.array([[{"a": 1}, {}], None, []], pa.list_(pa.map_(pa.string(), pa.int64()))), None),
    "by_number": (ScalarMap, pa.array([[(1, "x"), (2, "y")], None, []], pa.map_(pa.int64(), pa.string())), None),
    "point": (POINT, pa.array([{"n": 1, "s": "x"}, None, {"n": None, "s": ""}], POINTS), None),
    "points": (Array(POINT), pa.array([[{"n": 1, "s": "x"}], None, []], pa.list_(POINTS)), None),
    "document": (Json, pa.array(['{"a": [1]}', None, "{}"]), pa.array(['{"a": [1]}', None, "{}"], pa.large_string())),
    "documents": (
        Array(Json),
        pa.array([['{"a": 1}', "[]", "1"], None, []]),
        pa.array([['{"a": 1}', "[]", "1"], None, []], pa.list_(pa.large_string())),
    ),
    "numbers": (Set(Int64), pa.array([[2, 1, 2], None, []]), pa.array([[1, 2], None, []])),
    "words": (Set(String), pa.array([["b", "", "b"], None, []]), pa.array([["", "b"], None, []])),
    "raws": (Set(Bytes), pa.array([[b"\xff", b""], None, []]), pa.array([[b"", b"\xff"], None, []])),
    "moments": (Set(UnixTimestamp), pa.array([[MOMENT], None, []], pa.list_(pa.timestamp("us", "UTC"))), None),
    "uuid": (Uuid, pa.array([ONE, None, TWO]), None),
    "uuids": (Array(Uuid), pa.array([[TWO, ONE], None, []]), None),
    "uuid_set": (Set(Uuid), pa.array([[ONE, TWO, ONE], None, []]), pa.array([[ONE, TWO], None, []])),
    "nested": (Array(Array(Int64)), pa.array([[[1, 2], [3], None], None, []]), None),
    "nested_texts": (Array(Array(String)), pa.array([[["é"], [""]], None, []]), None),
    "nested_raws": (Array(Array(Bytes)), pa.array([[[b"a", b"\xff"]], None, []]), None),
    "deep": (Array(Array(Array(Int64))), pa.array([[[[1], [2, 3]]], None, []]), None),
    "sets": (Set(Array(Int64)), pa.array([[[1, 2], [3]], None, []]), None),
    "price": (Decimal, pa.array(PRICE := [D("1.50"), None, D(0)], PRICES), pa.array(["1.50", None, "0.00"])),
    "prices": (Array(Decimal), pa.array([PRICE[:1], None, []], pa.list_(PRICES)), pa.array([["1.50"], None, []])),
    "large": (Bytes, pa.array([b"\0\xff", None, b""], pa.large_binary()), pa.array([b"\0\xff", None, b""])),
    "seconds": (
        UnixTimestamp,
        pa.array([60, None, 0]),
        pa.array([60_000_000, None, 0]).cast(pa.timestamp("us", "UTC")),
    ),
    "seconds_of": (
        Array(UnixTimestamp),
        pa.array([[60], None, []]),
        pa.array([[60_000_000], None, []]).cast(pa.list_(pa.timestamp("us", "UTC"))),
    ),
}


@pytest.mark.parametrize("name", RICH)
def test_columns_of_rich_types_come_back_whole_and_as_feast_s_protos_do(backend, stores, name):
    dtype, written, read = RICH[name]
    value_type = dtype.to_value_type()
    by_columns, by_protos = (stores.view({"x": dtype}, name=way) for way in ("columns", "protos"))
    backend.store.write_columns(backend.config, by_columns, stores.rows({"user_id": [0, 1, 2], "x": written}))
    protos = python_values_to_proto_values(written.to_pylist(maps_as_pydicts="strict"), value_type)
    keys = [entity_key(user_id=user) for user in (2, 0, 7, 1)]
    rows = [(entity_key(user_id=user), {"x": proto}, T0, None) for user, proto in enumerate(protos)]
    backend.store.online_write_batch(backend.config, by_protos, rows, progress=None)
    expected = (written if read is None else read).take(pa.array([2, 0, None, 1]))
    served = []
    for view in (by_columns, by_protos):
        got = backend.store.read_columns(backend.config, view, {"user_id": [2, 0, 7, 1]}, now=NOW).columns["x"]
        got.validate(full=True)
        assert got.equals(expected), got
        answers = backend.store.online_read(backend.config, view, keys)
        served.append([row and feast_value_type_to_python_type(row["x"], value_type) for _, row in answers])
    assert served[0] == served[1]
    assert served[1][1] == feast_value_type_to_python_type(protos[0], value_type)


@pytest.mark.parametrize(
    ("dtype", "column"),
    [
        # Feast takes a text for the list of its letters, and a number for a struct around it.
        (Set(String), pa.array(["abc"])),
        (Array(Array(String)), pa.array(["abc"])),
        (Array(Uuid), pa.array([ONE])),
        (Array(Json), pa.array(["12"])),
        (POINT, pa.array([5])),
        (Map, pa.array([5])),
        (Map, pa.array(["no json"])),
        (Map, pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64()))),
        (Map, pa.array([[(1, 1)]], pa.map_(pa.int64(), pa.int64()))),
        (Set(Int64), pa.array([[1, None]])),
        (Array(Uuid), pa.array([[ONE, None]])),  # Feast writes an empty text, or the text "None"
        (Set(Decimal), pa.array([["1.5", None]])),
        (Set(Int64), pa.array([[1.5]])),
        (Array(Array(Int64)), pa.array([[1]])),
        (Decimal, pa.array([1.5])),
        (Uuid, pa.array([b"0123456789abcdef"])),
        (UnixTimestamp, pa.array([2**62])),
    ],
    ids=str,
)
def test_a_column_that_cannot_be_of_its_rich_type_is_refused_by_name(backend, stores, dtype, column):
    view = stores.view({"x": dtype})
    with pytest.raises(StoreError, match=f"feature 'x' is declared {dtype.to_value_type().name} and came as "):
        backend.store.write_columns(backend.config, view, stores.rows({"user_id": [1], "x": column}))


def test_maps_that_share_no_type_at_all_are_an_error_that_names_the_feature(backend, stores):
    view = stores.view({"x": Map})
    rows = stores.rows({"user_id": [1, 2], "x": ['{"a": 1}', '{"a": "one"}']})
    backend.store.write_columns(backend.config, view, rows)
    with pytest.raises(StoreError, match="feature 'x': its MAP values share no Arrow type"):
        backend.store.read_columns(backend.config, view, {"user_id": [1, 2]}, now=NOW)
    ((_, one),) = backend.store.online_read(backend.config, view, [entity_key(user_id=2)])
    assert feast_value_type_to_python_type(one["x"]) == {"a": "one"}
