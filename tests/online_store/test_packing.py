"""The packed row against plain Python values."""

import math
import struct
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from feast.value_type import ValueType
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import StoreError
from plait.stores.packing import NO_CREATED, RowSchema, pack, unpack
from plait.stores.values import array_to_protos, conform, protos_to_array, retype, storage_of

INT64 = st.integers(-(2**63), 2**63 - 1)
FLOAT32 = st.floats(width=32)
MOMENTS = st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))
VALUES = {
    ValueType.INT32: st.integers(-(2**31), 2**31 - 1),
    ValueType.INT64: INT64,
    ValueType.BOOL: st.booleans(),
    ValueType.FLOAT: FLOAT32,
    ValueType.DOUBLE: st.floats(),
    ValueType.UNIX_TIMESTAMP: MOMENTS,
    ValueType.STRING: st.text(st.characters(codec="utf-8"), max_size=8),
    ValueType.BYTES: st.binary(max_size=8),
    ValueType.JSON: st.sampled_from(['{"a": 1}', "[]"]),
    ValueType.INT32_LIST: st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4),
    ValueType.INT64_LIST: st.lists(INT64, max_size=4),
    ValueType.FLOAT_LIST: st.lists(FLOAT32, max_size=4),
    ValueType.DOUBLE_LIST: st.lists(st.floats(), max_size=4),
    ValueType.BOOL_LIST: st.lists(st.booleans(), max_size=4),
    ValueType.UNIX_TIMESTAMP_LIST: st.lists(MOMENTS, max_size=4),
    ValueType.STRING_LIST: st.lists(st.text(st.characters(codec="utf-8"), max_size=4), max_size=4),
    ValueType.BYTES_LIST: st.lists(st.binary(max_size=4), max_size=4),
}


@st.composite
def tables(draw):
    """(name -> type, name -> values) with up to 70 features, so that validity takes more than one word."""
    types = draw(st.lists(st.sampled_from(list(VALUES)), min_size=1, max_size=6))
    types += [ValueType.INT64] * draw(st.sampled_from([0, 0, 0, 64]))
    n_rows = draw(st.integers(1, 5))
    features = {f"f{i}": kind for i, kind in enumerate(types)}
    values = {
        name: draw(st.lists(st.none() | VALUES[kind], min_size=n_rows, max_size=n_rows))
        for name, kind in features.items()
    }
    return features, values


def packed(features, values, *, event_us=None):
    schema = RowSchema.of(features)
    n_rows = len(next(iter(values.values())))
    columns = [conform(stored(values[f.name], f.value_type), f.value_type, name=f.name) for f in schema.features]
    event_us = np.arange(n_rows) if event_us is None else np.asarray(event_us)
    return schema, pack(schema, columns, event_us, np.full(n_rows, NO_CREATED))


def stored(values, value_type):
    return pa.array(values, storage_of(value_type).arrow)


def same(left, right):
    """Equal values; NaN equals itself."""
    if isinstance(left, float) and isinstance(right, float):
        return left == right or (math.isnan(left) and math.isnan(right))
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right and type(left) is type(right)


@given(tables(), st.data())
@settings(max_examples=150, deadline=None)
def test_what_was_packed_is_unpacked_in_any_order_with_any_rows_missing(table, data):
    features, values = table
    schema, rows = packed(features, values)
    asked = data.draw(st.lists(st.none() | st.integers(0, len(rows) - 1), max_size=6))
    got = unpack(
        [None if i is None else rows[i] for i in asked], schema.features, {schema.fingerprint: schema}, oldest_us=None
    )
    assert got.found.tolist() == [i is not None for i in asked]
    for feature, array in zip(schema.features, got.arrays, strict=True):
        array.validate(full=True)
        assert array.type == feature.storage.arrow
        expected = [None if i is None else values[feature.name][i] for i in asked]
        assert all(map(same, array.to_pylist(), expected)), feature


@given(tables())
@settings(max_examples=60, deadline=None)
def test_protos_and_columns_pack_to_the_same_bytes(table):
    """Feast's row-by-row writes and the columnar ones must not differ; Feast's moments are whole seconds."""
    features, values = table
    for name, kind in features.items():
        if kind is ValueType.UNIX_TIMESTAMP:
            values[name] = [v and v.replace(microsecond=0) for v in values[name]]
        if kind is ValueType.UNIX_TIMESTAMP_LIST:
            values[name] = [v if v is None else [m.replace(microsecond=0) for m in v] for v in values[name]]
    schema, rows = packed(features, values)
    columns = []
    for feature in schema.features:
        protos = array_to_protos(stored(values[feature.name], feature.value_type), feature.value_type)
        columns.append(protos_to_array(protos, feature.value_type, name=feature.name))
    n_rows = len(rows)
    assert pack(schema, columns, np.arange(n_rows), np.full(n_rows, NO_CREATED)) == rows


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=8), st.integers(-6, 6))
def test_a_row_older_than_the_oldest_allowed_has_expired_and_one_exactly_that_old_has_not(events, oldest_us):
    schema, rows = packed({"x": ValueType.INT64}, {"x": list(range(len(events)))}, event_us=events)
    got = unpack(rows, schema.features, {schema.fingerprint: schema}, oldest_us=oldest_us)
    assert got.expired.tolist() == [event < oldest_us for event in events]
    assert got.arrays[0].to_pylist() == [None if e < oldest_us else i for i, e in enumerate(events)]
    assert got.event_us.tolist() == events


def test_rows_of_several_schemas_are_read_together_each_by_its_own():
    old, old_rows = packed({"a": ValueType.INT64, "gone": ValueType.STRING}, {"a": [1, 2], "gone": ["x", "y"]})
    new, new_rows = packed({"a": ValueType.INT64, "b": ValueType.DOUBLE}, {"a": [3, None], "b": [0.5, None]})
    schemas = {schema.fingerprint: schema for schema in (old, new)}
    mixed = [new_rows[0], old_rows[1], None, new_rows[1], old_rows[0]]
    got = unpack(mixed, new.features, schemas, oldest_us=None)
    assert got.arrays[0].to_pylist() == [3, 2, None, None, 1]
    assert got.arrays[1].to_pylist() == [0.5, None, None, None, None]
    assert got.found.tolist() == [True, True, False, True, True]


NUMBERS = [ValueType.INT32, ValueType.INT64, ValueType.FLOAT, ValueType.DOUBLE, ValueType.BOOL]


@given(st.sampled_from(NUMBERS), st.sampled_from(NUMBERS), st.data())
@settings(max_examples=200, deadline=None)
def test_a_number_read_as_another_type_is_the_same_number_or_null(before, after, data):
    value = data.draw(VALUES[before])
    (got,) = retype(pa.array([value], storage_of(before).arrow), before, after).to_pylist()
    if after is ValueType.DOUBLE:
        assert same(got, float(value))
    elif after is ValueType.FLOAT:
        with np.errstate(over="ignore"):
            narrow = float(np.float32(value))
        overflows = math.isinf(narrow) and not (isinstance(value, float) and math.isinf(value))
        assert same(got, None if overflows else narrow)
    else:
        whole = not isinstance(value, float) or value.is_integer()
        limit = {ValueType.INT32: 2**31, ValueType.INT64: 2**63}.get(after)
        fits = whole and (-limit <= value < limit if limit else value in (0, 1))
        assert got == (value if fits else None)


@pytest.mark.parametrize(
    ("before", "after", "value", "expected"),
    [
        (ValueType.INT64, ValueType.STRING, 7, None),
        (ValueType.STRING, ValueType.INT64, "7", None),
        (ValueType.STRING, ValueType.BYTES, "é", "é".encode()),
        (ValueType.BYTES, ValueType.STRING, b"\xff", None),
        (ValueType.INT64, ValueType.INT64_LIST, 7, None),
        (ValueType.INT64_LIST, ValueType.DOUBLE_LIST, [1, 2], [1.0, 2.0]),
        (ValueType.INT64_LIST, ValueType.INT32_LIST, [1, 2**40], None),
        (ValueType.INT64, ValueType.UNIX_TIMESTAMP, 60, datetime(1970, 1, 1, 0, 1, tzinfo=UTC)),
        (ValueType.UNIX_TIMESTAMP, ValueType.INT64, datetime(1970, 1, 1, 0, 1, tzinfo=UTC), 60),
    ],
)
def test_a_retyped_value_is_kept_only_where_the_new_type_can_say_it(before, after, value, expected):
    array = pa.array([value, None], storage_of(before).arrow)
    assert retype(array, before, after).to_pylist() == [expected, None]


def test_moments_keep_microseconds_and_naive_ones_are_utc():
    moment = datetime(2024, 5, 1, 12, 0, 0, 123456)
    nanoseconds = pa.array([np.datetime64(moment, "ns")])
    (got,) = conform(nanoseconds, ValueType.UNIX_TIMESTAMP, name="t").to_pylist()
    assert got == moment.replace(tzinfo=UTC)
    before_1970 = datetime(1960, 1, 1, tzinfo=UTC) - timedelta(microseconds=1)
    schema, rows = packed({"t": ValueType.UNIX_TIMESTAMP}, {"t": [before_1970]})
    assert unpack(rows, schema.features, {schema.fingerprint: schema}, oldest_us=None).arrays[0].to_pylist() == [
        before_1970
    ]


def test_a_value_that_does_not_fit_its_declared_type_is_refused_by_name():
    with pytest.raises(StoreError, match="'clicks' is declared INT64 and came as double"):
        conform(pa.array([1.5]), ValueType.INT64, name="clicks")
    with pytest.raises(StoreError, match="'tags': a list holds a null element"):
        conform(pa.array([["a", None]]), ValueType.STRING_LIST, name="tags")


def test_whole_floats_with_nulls_become_integers():
    """Spark's tables come through pandas, which has integers with nulls as floats."""
    assert conform(pa.array([1.0, None]), ValueType.INT64, name="x").to_pylist() == [1, None]


def test_a_sliced_array_packs_like_a_fresh_one():
    strings = pa.array(["skip", "a", None, "bcd"])[1:]
    lists = pa.array([[9.0], [1.0, 2.0], None, []])[1:]
    tags = pa.array([["skip"], ["a", "bc"], [], None])[1:]
    schema = RowSchema.of({"l": ValueType.DOUBLE_LIST, "s": ValueType.STRING, "t": ValueType.STRING_LIST})
    rows = pack(schema, [lists, strings, tags], np.zeros(3, np.int64), np.zeros(3, np.int64))
    got = unpack(rows, schema.features, {schema.fingerprint: schema}, oldest_us=None)
    assert [array.to_pylist() for array in got.arrays] == [
        [[1.0, 2.0], None, []],
        ["a", None, "bcd"],
        [["a", "bc"], [], None],
    ]


def test_a_row_cut_short_is_refused_rather_than_read():
    schema, (row,) = packed({"n": ValueType.INT64, "s": ValueType.STRING}, {"n": [1], "s": ["hello"]})
    schemas = {schema.fingerprint: schema}
    for length in range(8, len(row)):
        with pytest.raises(StoreError, match="materialize the view again"):
            unpack([row[:length]], schema.features, schemas, oldest_us=None)


def test_the_row_layout_is_an_interface():
    """Rows in stores outlive releases: this layout may only change together with a new fingerprint."""
    schema, (row,) = packed({"n": ValueType.INT64, "s": ValueType.STRING}, {"n": [7], "s": ["hi"]}, event_us=[5])
    assert schema.fingerprint.hex() == "94fc160f279b9918"
    assert row[8:] == struct.pack("<qqQqII", 5, NO_CREATED, 0b11, 7, 48, 2) + b"hi"
