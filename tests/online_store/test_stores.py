"""What every online store of Plait does, on SQLite and on a real Redis alike."""

import itertools
import os
import threading
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest
from feast import Entity, FeatureStore
from feast.infra.online_stores.helpers import get_online_store_from_config
from feast.protos.feast.types.Value_pb2 import Value
from feast.type_map import feast_value_type_to_python_type, python_values_to_proto_values
from feast.types import (
    Array,
    Bool,
    Bytes,
    Float32,
    Float64,
    Int32,
    Int64,
    Json,
    Map,
    Set,
    String,
    UnixTimestamp,
    Uuid,
)
from feast.value_type import ValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plait.errors import StoreError, UnknownNameError
from tests.online_store.conftest import entity_key

T0 = datetime(2024, 1, 1, tzinfo=UTC)
NOW = T0 + timedelta(days=1)
MOMENT = datetime(2023, 5, 6, 7, 8, 9, tzinfo=UTC)
EVERY_TYPE = {
    "int32": (Int32, [-(2**31), None, 0]),
    "int64": (Int64, [2**63 - 1, None, 0]),
    "float32": (Float32, [0.25, None, 0.0]),
    "float64": (Float64, [1 / 3, None, 0.0]),
    "flag": (Bool, [True, None, False]),
    "text": (String, ["é", None, ""]),
    "raw": (Bytes, [b"\x00\xff", None, b""]),
    "moment": (UnixTimestamp, [MOMENT, None, datetime(1970, 1, 1, tzinfo=UTC)]),
    "int32s": (Array(Int32), [[1, -2], None, []]),
    "int64s": (Array(Int64), [[1, -2], None, []]),
    "float32s": (Array(Float32), [[0.5], None, []]),
    "float64s": (Array(Float64), [[0.5], None, []]),
    "flags": (Array(Bool), [[True, False, True], None, []]),
    "texts": (Array(String), [["a", ""], None, []]),
    "raws": (Array(Bytes), [[b"a", b""], None, []]),
    "moments": (Array(UnixTimestamp), [[MOMENT], None, []]),
    "document": (Json, [{"a": [1]}, None, {}]),
    "map": (Map, [{"a": 1.5}, None, {}]),
    "set": (Set(Int64), [{1, 2}, None, set()]),
    "uuid": (Uuid, ["5f0c0f0a-0000-4000-8000-000000000001", None, "5f0c0f0a-0000-4000-8000-000000000002"]),
}


def values_of(table, name="x"):
    return table.columns[name].to_pylist()


def test_every_feast_type_comes_back_as_it_was_written_null_and_empty_apart(backend, stores):
    view = stores.view({name: dtype for name, (dtype, _) in EVERY_TYPE.items()})
    protos = {}
    for name, (dtype, values) in EVERY_TYPE.items():
        written = [str(v) if name == "uuid" and v else v for v in values]
        if name == "document":
            protos[name] = [Value() if v is None else Value(json_val=str(v).replace("'", '"')) for v in written]
        else:
            protos[name] = python_values_to_proto_values(written, dtype.to_value_type())
    rows = [
        (entity_key(user_id=user), {name: column[user] for name, column in protos.items()}, T0, T0) for user in range(3)
    ]
    backend.store.online_write_batch(backend.config, view, rows, progress=None)
    read = backend.other_process().online_read(backend.config, view, [key for key, *_ in rows])
    for user, (moment, got) in enumerate(read):
        assert moment == T0
        for name, (dtype, values) in EVERY_TYPE.items():
            # Feast has no empty-against-null distinction to lose here: an unset proto is a null.
            assert got[name] == protos[name][user] or (values[user] is None and got[name] == Value()), name
            value = feast_value_type_to_python_type(got[name], dtype.to_value_type())
            expected = values[user]
            assert (str(value) if name == "uuid" and value else value) == expected, name


def test_columns_are_typed_and_aligned_with_the_keys_asked(backend, stores):
    view = stores.view({"n": Int64, "s": String, "l": Array(Float32)})
    rows = stores.rows({"user_id": [1, 2, 3], "n": [10, None, 30], "s": ["a", "", None], "l": [[1.5], [], None]})
    assert backend.store.write_columns(backend.config, view, rows) == 3
    asked = pa.table({"user_id": [3, 99, 1, 1, 2, None]})
    got = backend.store.read_columns(backend.config, view, asked, ["s", "n", "l"], now=NOW)
    assert got.table.schema == pa.schema([("s", pa.string()), ("n", pa.int64()), ("l", pa.list_(pa.float32()))])
    assert values_of(got, "n") == [30, None, 10, 10, None, None]
    assert values_of(got, "s") == [None, None, "a", "a", "", None]
    assert values_of(got, "l") == [None, None, [1.5], [1.5], [], None]
    assert got.found.tolist() == [True, False, True, True, True, False]
    assert got.event_us.tolist()[1] == 0


def test_an_unknown_entity_has_no_row_and_an_unknown_feature_is_named(backend, stores):
    view = stores.view()
    backend.store.write_columns(backend.config, view, stores.rows({"user_id": [1], "x": [1.0]}))
    assert backend.store.online_read(backend.config, view, [entity_key(user_id=2)]) == [(None, None)]
    with pytest.raises(UnknownNameError, match="no feature 'y'"):
        backend.store.read_columns(backend.config, view, {"user_id": [1]}, ["y"])


def test_no_keys_and_no_rows_are_no_work(backend, stores):
    view = stores.view()
    backend.store.update(backend.config, [], [view], [], [], partial=False)
    backend.store.online_write_batch(backend.config, view, [], progress=None)
    assert backend.store.write_columns(backend.config, view, stores.rows({"user_id": [], "x": []})) == 0
    assert backend.store.online_read(backend.config, view, []) == []
    assert len(backend.store.read_columns(backend.config, view, {"user_id": []}).table) == 0


MOMENTS_US = st.integers(-3, 3).map(lambda us: T0 + timedelta(microseconds=us))
WRITES = st.lists(
    st.tuples(st.integers(0, 3), MOMENTS_US, st.none() | MOMENTS_US, st.none() | st.integers(0, 99), st.booleans()),
    max_size=25,
)


@given(writes=WRITES, batch=st.integers(1, 4))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_store_agrees_with_a_dict_that_keeps_the_newest(backend, stores, writes, batch):
    """Older never overwrites newer; of equal event times the newer created wins; of equal both, the later write."""
    view = stores.view({"x": Int64})
    backend.store.drop(backend.config, [f"{backend.config.project}.stats"])
    model = {}
    for start in range(0, len(writes), batch):
        part = writes[start : start + batch]
        for user, event, created, value, _ in part:
            order = (event, created or datetime.min.replace(tzinfo=UTC))
            if user not in model or order >= model[user][0]:
                model[user] = (order, value)
        users, events, createds, values, by_feast = (list(column) for column in zip(*part, strict=True))
        if any(by_feast):
            rows = [
                (entity_key(user_id=u), {"x": Value() if v is None else Value(int64_val=v)}, e, c)
                for u, e, c, v in zip(users, events, createds, values, strict=True)
            ]
            backend.store.online_write_batch(backend.config, view, rows, progress=None)
        else:
            values = pa.array(values, pa.int64())
            table = stores.rows({"user_id": users, "x": values}, at=events, created=createds)
            backend.store.write_columns(backend.config, view, table)
    backend.store.ensure(backend.config, [])
    if writes:
        got = backend.store.read_columns(backend.config, view, {"user_id": list(range(4))}, now=NOW)
        assert values_of(got) == [model[user][1] if user in model else None for user in range(4)]
        assert got.found.tolist() == [user in model for user in range(4)]


def test_timestamps_are_ordered_to_the_microsecond_over_their_whole_range(backend, stores):
    """Redis compares halves of int64, so moments around the halves' borders and before 1970 are the ones to try."""
    view = stores.view({"x": Int64})
    moments = [
        datetime(1900, 1, 1, tzinfo=UTC),
        datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
        datetime(1970, 1, 1, tzinfo=UTC),
        *(datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us) for us in (2**31, 2**32 - 1, 2**32, 2**51)),
        datetime(2200, 1, 1, tzinfo=UTC),
    ]
    for earlier, later in itertools.pairwise(moments):
        user = [moments.index(earlier)]
        for event, value in ((later, 1), (earlier, 2)):
            table = stores.rows({"user_id": user, "x": [value]}, at=event)
            backend.store.write_columns(backend.config, view, table)
        got = backend.store.read_columns(backend.config, view, {"user_id": user}, now=NOW)
        assert values_of(got) == [1], (earlier, later)


def test_a_row_outlives_its_ttl_after_the_last_moment_and_not_at_it(backend, stores):
    view = stores.view(ttl=timedelta(hours=1))
    backend.store.write_columns(backend.config, view, stores.rows({"user_id": [1], "x": [1.0]}))
    keys, deadline = {"user_id": [1]}, T0 + timedelta(hours=1)
    at = backend.store.read_columns(backend.config, view, keys, now=deadline)
    after = backend.store.read_columns(backend.config, view, keys, now=deadline + timedelta(microseconds=1))
    assert (values_of(at), at.found.tolist(), at.expired.tolist()) == ([1.0], [True], [False])
    assert (values_of(after), after.found.tolist(), after.expired.tolist()) == ([None], [True], [True])
    # Feast's own read takes the wall's clock, long past the deadline.
    assert backend.store.online_read(backend.config, view, [entity_key(user_id=1)]) == [(None, None)]


@pytest.mark.parametrize(
    ("keys", "rows"),
    [
        ({"name": String}, [("a",), ("",), ("é:1",), ("a:1",)]),
        ({"user_id": Int64, "genre": String}, [(1, "Drama"), (1, "dram"), (11, "Drama"), (-1, "")]),
        ({"left": String, "right": String}, [("ab", "c"), ("a", "bc"), ("", "abc")]),
        ({"a": Int32, "b": Int64, "c": Bytes}, [(1, 2, b"x"), (2, 1, b"x"), (2, 1, b"")]),
    ],
)
def test_keys_of_any_kind_and_number_find_their_own_row(backend, stores, keys, rows):
    view = stores.view(keys=keys)
    columns = {name: [row[i] for row in rows] for i, name in enumerate(keys)}
    table = stores.rows({**columns, "x": [float(i) for i in range(len(rows))]})
    backend.store.write_columns(backend.config, view, table)
    backwards = {name: column[::-1] for name, column in columns.items()}
    got = backend.store.read_columns(backend.config, view, backwards, now=NOW)
    assert values_of(got) == [float(i) for i in reversed(range(len(rows)))]


def test_feast_s_multi_entity_keys_find_what_columns_wrote_in_any_order_of_keys(backend, stores):
    view = stores.view(keys={"user_id": Int64, "genre": String})
    table = stores.rows({"user_id": [7], "genre": ["Drama"], "x": [0.5]})
    backend.store.write_columns(backend.config, view, table)
    for key in (entity_key(user_id=7, genre="Drama"), entity_key(genre="Drama", user_id=7)):
        ((moment, values),) = backend.store.online_read(backend.config, view, [key])
        assert (moment, values["x"].double_val) == (T0, 0.5)


def test_rows_written_before_a_view_changed_are_served_by_what_they_hold(backend, stores):
    before = stores.view({"kept": Int64, "lost": String, "widened": Int32, "narrowed": Float64})
    after = stores.view({"kept": Int64, "gained": Array(Int64), "widened": Int64, "narrowed": Int64})
    values = {"kept": [1, 2], "lost": ["a", "b"], "widened": [3, 4], "narrowed": [5.0, 5.5]}
    backend.store.write_columns(backend.config, before, stores.rows({"user_id": [1, 2], **values}))
    fresh = {"user_id": [3], "kept": [9], "gained": [[1]], "widened": [2**40], "narrowed": [6]}
    store = backend.other_process()
    store.update(backend.config, [], [after], [], [], partial=False)
    store.write_columns(backend.config, after, stores.rows(fresh))
    got = backend.store.read_columns(backend.config, after, {"user_id": [1, 3, 2]}, now=NOW)
    assert got.table.to_pydict() == {
        "gained": [None, [1], None],
        "kept": [1, 9, 2],
        "narrowed": [5, 6, None],  # 5.5 is no integer, and half a value is none
        "widened": [3, 2**40, 4],
    }
    # And a process that still knows the old view reads the new rows.
    old = backend.store.read_columns(backend.config, before, {"user_id": [3]}, now=NOW)
    assert old.table.to_pydict() == {"kept": [9], "lost": [None], "narrowed": [6.0], "widened": [None]}


def test_update_keeps_what_is_kept_and_drops_only_what_is_gone(backend, stores):
    kept, gone = stores.view(name="kept"), stores.view(name="gone")
    for view in (kept, gone):
        backend.store.write_columns(backend.config, view, stores.rows({"user_id": [1], "x": [1.0]}))
    # A view that changes its kind is deleted and kept in one call.
    backend.store.update(backend.config, [gone, kept], [kept], [], [], partial=False)
    assert values_of(backend.store.read_columns(backend.config, kept, {"user_id": [1]}, now=NOW)) == [1.0]
    backend.store.update(backend.config, [], [gone], [], [], partial=False)
    assert values_of(backend.store.read_columns(backend.config, gone, {"user_id": [1]}, now=NOW)) == [None]


def test_a_view_whose_join_keys_changed_starts_empty_and_old_writers_are_refused(backend, stores):
    by_user, by_name = stores.view(), stores.view(keys={"name": String})
    backend.store.write_columns(backend.config, by_user, stores.rows({"user_id": [1], "x": [1.0]}))
    backend.store.update(backend.config, [], [by_name], [], [], partial=False)
    assert values_of(backend.store.read_columns(backend.config, by_name, {"name": ["1"]}, now=NOW)) == [None]
    with pytest.raises(StoreError, match="run `feast apply`"):
        backend.other_process().write_columns(backend.config, by_user, stores.rows({"user_id": [1], "x": [1.0]}))


def test_projects_and_views_with_alike_names_do_not_meet(backend, stores):
    rows = stores.rows({"name": ["b:1"], "x": [1.0]})
    backend.store.write_columns(backend.config, stores.view(name="a", keys={"name": String}), rows)
    other = stores.view(name="a:b", keys={"name": String})
    backend.store.update(backend.config, [], [other], [], [], partial=False)
    assert values_of(backend.store.read_columns(backend.config, other, {"name": ["1"]}, now=NOW)) == [None]
    backend.store.drop(backend.config, [f"{backend.config.project}.a:b", f"{backend.config.project}.*"])
    view = stores.view(name="a", keys={"name": String})
    assert values_of(backend.store.read_columns(backend.config, view, {"name": ["b:1"]}, now=NOW)) == [1.0]


def test_teardown_leaves_other_projects_alone(backend, stores, tmp_path, request):
    view = stores.view()
    other = stores.config(tmp_path, stores.settings(backend.kind, tmp_path, request))
    for config in (backend.config, other):
        backend.store.write_columns(config, view, stores.rows({"user_id": [1], "x": [1.0]}))
    backend.store.teardown(backend.config, [view], [])
    assert values_of(backend.store.read_columns(other, view, {"user_id": [1]}, now=NOW)) == [1.0]
    backend.store.update(backend.config, [], [view], [], [], partial=False)
    assert values_of(backend.store.read_columns(backend.config, view, {"user_id": [1]}, now=NOW)) == [None]


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ({"user_id": [1, None], "x": [1.0, 2.0]}, "1 rows have a null join key"),
        ({"user_id": [1], "y": [1.0]}, "the rows lack x"),
        ({"x": [1.0]}, "'user_id' is missing"),
        ({"user_id": ["one"], "x": [1.0]}, "join key 'user_id' holds int values"),
        ({"user_id": [1], "x": ["one"]}, "feature 'x' is declared DOUBLE"),
    ],
)
def test_rows_that_cannot_be_stored_whole_are_refused_before_any_is(backend, stores, rows, complaint):
    view = stores.view()
    backend.store.update(backend.config, [], [view], [], [], partial=False)
    with pytest.raises(StoreError, match=complaint):
        backend.store.write_columns(backend.config, view, stores.rows(rows))
    assert values_of(backend.store.read_columns(backend.config, view, {"user_id": [1]}, now=NOW)) == [None]


def test_a_row_without_event_timestamp_or_without_a_feature_is_refused(backend, stores):
    view = stores.view({"x": Float64, "y": Float64})
    with pytest.raises(StoreError, match="no event timestamp"):
        table = stores.rows({"user_id": [1], "x": [1.0], "y": [1.0]}, at=None)
        backend.store.write_columns(backend.config, view, table)
    with pytest.raises(StoreError, match="a row lacks y"):
        row = (entity_key(user_id=1), {"x": Value(double_val=1.0)}, T0, None)
        backend.store.online_write_batch(backend.config, view, [row], progress=None)
    with pytest.raises(StoreError, match="declared DOUBLE and came as string_val"):
        row = (entity_key(user_id=1), {"x": Value(string_val="1"), "y": Value()}, T0, None)
        backend.store.online_write_batch(backend.config, view, [row], progress=None)


def test_several_views_are_read_in_one_call_each_with_its_own_keys(backend, stores):
    from plait.stores.keys import StoredView
    from plait.stores.online_base import ViewRead

    users = stores.view({"age": Int64}, name="users")
    items = stores.view({"year": Int64}, name="items", keys={"item_id": Int64})
    backend.store.write_columns(backend.config, users, stores.rows({"user_id": [1], "age": [30]}))
    backend.store.write_columns(backend.config, items, stores.rows({"item_id": [1, 2], "year": [1990, 1991]}))
    reads = []
    for view, keys in ((users, {"user_id": [1]}), (items, {"item_id": [2, 1, 5]})):
        stored = StoredView.of(backend.config, view)
        reads.append(ViewRead(view=stored, features=stored.features(), keys=keys))
    first, second = backend.store.read_views(backend.config, reads, now=NOW)
    assert (values_of(first, "age"), values_of(second, "year")) == ([30], [1991, 1990, None])


@pytest.mark.redis
def test_a_read_of_several_views_is_one_command_to_redis(tmp_path, stores, redis_server):
    import redis

    from plait.stores.keys import StoredView
    from plait.stores.online_base import ViewRead

    online = {"type": "plait.stores.redis.PackedRedisOnlineStore", "url": redis_server.url}
    store = FeatureStore(config=stores.config(tmp_path, online))
    users = list(range(200))
    views = [stores.view({f"x_{name}": Int64}, name=name) for name in ("one", "two", "three")]
    store.apply([Entity(name="user_id", join_keys=["user_id"], value_type=ValueType.INT64), *views])
    inside, config = store._get_provider().online_store, store.config
    for view in views:
        rows = stores.rows({"user_id": users, f"x_{view.name}": users})
        inside.write_columns(config, store.get_feature_view(view.name), rows)
    reads = []
    for view in views:
        stored = StoredView.of(config, store.get_feature_view(view.name))
        reads.append(ViewRead(view=stored, features=stored.features(), keys={"user_id": users}))
    refs = [f"{view.name}:x_{view.name}" for view in views]

    def by_feast():
        return store.get_online_features(features=refs, entity_rows=[{"user_id": user} for user in users]).to_dict()

    with redis.Redis.from_url(redis_server.url) as client:
        for read in (lambda: inside.read_views(config, reads, now=NOW), by_feast):
            read()  # schemas are learnt once
            before = client.info("commandstats")
            read()
            after = client.info("commandstats")
            calls = {
                name: stats["calls"] - before.get(name, {"calls": 0})["calls"]
                for name, stats in after.items()
                if name not in ("cmdstat_info", "cmdstat_client|setinfo")
            }
            assert {name: n for name, n in calls.items() if n} == {"cmdstat_mget": 1}
    assert by_feast()["x_two"] == users


def test_a_read_is_one_statement_a_view_and_a_large_one_a_snapshot_in_sqlite(tmp_path, stores):
    from plait.stores.keys import StoredView
    from plait.stores.online_base import ViewRead

    online = {"type": "plait.stores.sqlite.PackedSQLiteOnlineStore", "path": "online.db"}
    config = stores.config(tmp_path, online)
    store = get_online_store_from_config(config.online_store)
    users = list(range(10_000))
    views = [stores.view({"x": Int64}, name=name) for name in ("one", "two")]
    for view in views:
        store.write_columns(config, view, stores.rows({"user_id": users, "x": users}))
    said = []
    store._connection(config).db.set_trace_callback(lambda sql: said.append(sql.split()[0]))

    def statements(n_keys, *of):
        said.clear()
        reads = []
        for view in of:
            stored = StoredView.of(config, view)
            reads.append(ViewRead(view=stored, features=stored.features(), keys={"user_id": users[:n_keys]}))
        store.read_views(config, reads, now=NOW)
        return said

    assert statements(200, views[0]) == ["SELECT"]
    assert statements(200, *views) == ["BEGIN", "SELECT", "SELECT", "COMMIT"]
    assert statements(10_000, views[0]) == ["BEGIN", "SELECT", "SELECT", "COMMIT"]


def test_a_key_beyond_64_bits_is_an_error_that_names_it(backend, stores):
    view = stores.view()
    backend.store.write_columns(backend.config, view, stores.rows({"user_id": [2**63 - 1], "x": [1.0]}))
    with pytest.raises(StoreError, match="join key 'user_id' holds int values"):
        backend.store.read_columns(backend.config, view, {"user_id": [2**70]})
    got = backend.store.read_columns(backend.config, view, {"user_id": [2**63 - 1, -(2**63)]}, now=NOW)
    assert values_of(got) == [1.0, None]


TYPED = {
    "int32": (pa.int32(), [-(2**31), None, 0]),
    "int64": (pa.int64(), [2**63 - 1, None, 0]),
    "float32": (pa.float32(), [0.25, None, 0.0]),
    "float64": (pa.float64(), [1 / 3, None, 0.0]),
    "flag": (pa.bool_(), [True, None, False]),
    "text": (pa.string(), ["é", None, ""]),
    "raw": (pa.binary(), [b"\x00\xff", None, b""]),
    "moment": (pa.timestamp("us", "UTC"), [MOMENT, None, datetime(1970, 1, 1, tzinfo=UTC)]),
    "int32s": (pa.list_(pa.int32()), [[1, -2], None, []]),
    "int64s": (pa.list_(pa.int64()), [[1, -2], None, []]),
    "float32s": (pa.list_(pa.float32()), [[0.5], None, []]),
    "float64s": (pa.list_(pa.float64()), [[0.5], None, []]),
    "flags": (pa.list_(pa.bool_()), [[True, False, True], None, []]),
    "texts": (pa.list_(pa.string()), [["a", ""], None, []]),
    "raws": (pa.list_(pa.binary()), [[b"a", b""], None, []]),
    "moments": (pa.list_(pa.timestamp("us", "UTC")), [[MOMENT], None, []]),
}


def test_columns_of_every_plain_type_come_back_in_it(backend, stores):
    view = stores.view({name: EVERY_TYPE[name][0] for name in TYPED})
    columns = {name: pa.array(values, type_) for name, (type_, values) in TYPED.items()}
    backend.store.write_columns(backend.config, view, stores.rows({"user_id": [0, 1, 2], **columns}))
    got = backend.store.read_columns(backend.config, view, {"user_id": [2, 0, 7, 1]}, now=NOW)
    for name, (type_, values) in TYPED.items():
        assert got.columns[name].type == type_, name
        assert values_of(got, name) == [values[2], values[0], None, values[1]], name


def test_a_single_read_of_a_row_wider_than_the_view_takes_the_right_places(backend, stores):
    """One row is unpacked on a way of its own."""
    wide = stores.view({"a": Int64, "b": Int64, "c": Int64})
    row = {"user_id": [1], "a": [10], "b": [None], "c": [30]}
    backend.store.write_columns(backend.config, wide, stores.rows(row))
    for names, expected in ((("a", "c"), [10, 30]), (("c",), [30]), (("b", "c"), [None, 30])):
        narrow = stores.view(dict.fromkeys(names, Int64))
        got = backend.store.read_columns(backend.config, narrow, {"user_id": [1]}, now=NOW)
        assert [values_of(got, name)[0] for name in names] == expected


def test_more_keys_than_one_statement_takes_are_read(backend, stores):
    view = stores.view({"x": Int64})
    users = list(range(25_000))
    backend.store.write_columns(backend.config, view, stores.rows({"user_id": users, "x": users}))
    got = backend.store.read_columns(backend.config, view, {"user_id": [*users[::-1], -1]}, now=NOW)
    assert values_of(got) == [*users[::-1], None]


# Python 3.12 warns of fork in a process that has threads; here they are done, and SQLite is what is tested.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_threads_and_forked_children_share_one_store_object(backend, stores):
    view = stores.view({"x": Int64})
    backend.store.write_columns(backend.config, view, stores.rows({"user_id": [0], "x": [0]}))
    failures = []

    def work(user):
        try:
            for value in range(20):
                table = stores.rows({"user_id": [user], "x": [value]}, at=T0 + timedelta(seconds=value))
                backend.store.write_columns(backend.config, view, table)
                got = backend.store.read_columns(backend.config, view, {"user_id": [user, 0]}, now=NOW)
                assert values_of(got) == [value, 0]
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(user,)) for user in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []

    child = os.fork()
    if child == 0:
        work(9)
        os._exit(len(failures))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    work(0 + 10)
    assert failures == []
    assert values_of(backend.store.read_columns(backend.config, view, {"user_id": [9, 10]}, now=NOW)) == [19, 19]
