"""What is pushed: by Plait's provider as by Feast's own, frame by frame, into the same store."""

from datetime import UTC, date, datetime, timedelta

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, PushSource, RequestSource
from feast.infra.passthrough_provider import PassthroughProvider
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Array, Bool, Bytes, Float32, Float64, Int32, Int64, Map, String, UnixTimestamp
from feast.value_type import ValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plait.errors import StoreError
from plait.stores.provider import ColumnarProvider

T0 = datetime(2024, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
KEY = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
FIELDS = {
    "n": Int64,
    "small": Int32,
    "x": Float64,
    "f": Float32,
    "flag": Bool,
    "s": String,
    "raw": Bytes,
    "at": UnixTimestamp,
    "tags": Array(String),
    "vector": Array(Float32),
    "counts": Array(Int64),
    "extra": Map,
}


def push_view(fields, *, entities=(KEY,), **source):
    options = {"timestamp_field": "event_timestamp", "created_timestamp_column": "created", **source}
    keys = [Field(name="user_id", dtype=Int64)] if entities else []
    return FeatureView(
        name="stats",
        entities=list(entities),
        ttl=None,
        schema=[*keys, *(Field(name=name, dtype=dtype) for name, dtype in fields.items())],
        source=PushSource(name="pushed", batch_source=FileSource(path="unused.parquet", **options)),
    )


@pytest.fixture
def pushed(backend, tmp_path):
    """Applies a view, pushes frames to it with Feast's `push`, and reads it: a function of view and frames."""
    store = FeatureStore(config=backend.config)

    def push(view, *frames, users=(1,)):
        store.apply([KEY, view])
        for frame in frames:
            store.push("pushed", frame)
        applied = store.get_feature_view("stats")
        (key,) = applied.entity_columns
        return backend.store.read_columns(backend.config, applied, {key.name: list(users)}, now=T0 + DAY)

    return push


def frame_of(n_rows=1, **columns):
    """A frame to push: a key, the given features and two timestamps."""
    moments = pd.to_datetime([T0] * n_rows)
    own = {"user_id": range(1, n_rows + 1), "event_timestamp": moments, "created": moments}
    return pd.DataFrame({**own, **columns})


# What Feast's own provider takes for what it is: it makes nulls of empty bytes and of empty lists of numbers.
_SECOND = st.datetimes(datetime(1970, 1, 2), datetime(2100, 1, 1)).map(
    lambda moment: pd.Timestamp(moment, tz="UTC").floor("s")
)
_ROW = st.fixed_dictionaries(
    {
        "n": st.integers(-(2**53), 2**53) | st.none(),
        "small": st.integers(-(2**31), 2**31 - 1) | st.none(),
        "x": st.floats(allow_nan=False, allow_infinity=True) | st.none(),
        "f": st.floats(allow_nan=False, width=32) | st.none(),
        "flag": st.booleans(),
        "s": st.text(max_size=5) | st.none(),
        "raw": st.binary(min_size=1, max_size=5),
        "at": _SECOND,
        "tags": st.lists(st.text(max_size=3), max_size=3),
        "vector": st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=3),
        "counts": st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=3),
        "extra": st.fixed_dictionaries({"a": st.text(max_size=3), "b": st.text(max_size=3)}),
    }
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(_ROW, min_size=1, max_size=6), nullable=st.booleans())
def test_a_frame_is_stored_as_feast_s_own_provider_stores_it(backend, rows, nullable):
    """nullable: pandas' own nullable types, whose integers stay integers beside a null."""
    view = push_view(FIELDS)
    frame = frame_of(len(rows), **{name: [row[name] for row in rows] for name in FIELDS})
    if nullable:
        frame = frame.astype({"n": "Int64", "small": "Int32", "x": "Float64", "s": "string"})
    users = list(range(1, len(rows) + 1))
    stored = []
    for name, provider in (("stock", PassthroughProvider), ("plait", ColumnarProvider)):
        config = backend.config.model_copy(update={"project": f"{backend.config.project}_{name}"})
        backend.store.teardown(config, [view], [])
        provider(config).ingest_df(view, frame)
        stored.append(backend.store.read_columns(config, view, {"user_id": users}, now=T0 + DAY))
    assert all(part.found.all() for part in stored)
    stock, plait = (part.table.to_pylist() for part in stored)
    assert plait == stock
    assert stored[0].event_us.tolist() == stored[1].event_us.tolist()


def test_moments_keep_their_microseconds_as_when_they_are_materialized(pushed):
    moment = T0 + timedelta(microseconds=123_456)
    got = pushed(push_view({"at": UnixTimestamp}), frame_of(at=[moment]))
    assert got.columns["at"].to_pylist() == [moment]


@pytest.mark.parametrize(
    "moments",
    [
        pd.to_datetime(["2024-01-01T03:00:00+03:00"]),
        pd.to_datetime(["2024-01-01"]),
        ["2024-01-01T00:00:00Z"],
        ["2024-01-01 03:00:00+03:00"],
        [datetime(2024, 1, 1)],
        [date(2024, 1, 1)],
        np.array(["2024-01-01"], dtype="M8[s]"),
        [int(T0.timestamp()) * 10**9],  # nanoseconds, as pandas and so Feast have it
    ],
    ids=["zone", "no zone", "ISO", "text with zone", "object", "date", "seconds", "integer"],
)
def test_event_timestamps_come_in_any_form_that_pandas_reads(pushed, moments):
    got = pushed(push_view({"n": Int64}), frame_of(n=[1]).assign(event_timestamp=moments, created=moments))
    assert got.event_us.tolist() == [int(T0.timestamp()) * 10**6]


def test_maps_keep_the_keys_they_came_with(backend):
    """Feast's own provider gives each the keys of all, by way of an Arrow struct."""
    values = [{"a": 1}, {"b": "x", "c": [1.5]}, {}, None]
    store = FeatureStore(config=backend.config)
    store.apply([KEY, push_view({"extra": Map})])
    store.push("pushed", frame_of(4, extra=values))
    got = store.get_online_features(["stats:extra"], [{"user_id": user} for user in (1, 2, 3, 4)]).to_dict()
    assert got["extra"] == values


def test_a_later_created_wins_at_equal_event_timestamps(pushed):
    late = frame_of(n=[2]).assign(created=pd.to_datetime([T0 + DAY]))
    got = pushed(push_view({"n": Int64}), late, frame_of(n=[1]))
    assert got.columns["n"].to_pylist() == [2]


def test_a_view_whose_source_has_no_created_takes_the_last_push(pushed):
    view = push_view({"n": Int64}, created_timestamp_column="")
    first, second = (frame_of(n=[n]).drop(columns="created") for n in (1, 2))
    assert pushed(view, first, second).columns["n"].to_pylist() == [2]


def test_a_feature_may_be_called_what_other_tables_call_their_times(pushed):
    view = push_view({"created": Int64, "n": Int64}, timestamp_field="at", created_timestamp_column="")
    frame = frame_of(n=[5]).rename(columns={"event_timestamp": "at"}).assign(created=[3])
    got = pushed(view, frame)
    assert (got.columns["created"].to_pylist(), got.columns["n"].to_pylist()) == ([3], [5])


@pytest.mark.parametrize("by", ["source", "view"])
def test_columns_come_under_the_source_s_names_or_the_view_s(pushed, by):
    names = {"uid": "user_id", "number": "n", "ts": "moment"}
    view = push_view({"n": Int64}, timestamp_field="ts", created_timestamp_column="made", field_mapping=names)
    frame = frame_of(n=[5]).rename(columns={"event_timestamp": "moment", "created": "made"})
    if by == "source":  # but for features, of which Feast's push asks the view's names
        frame = frame.rename(columns={"user_id": "uid", "moment": "ts"})
    got = pushed(view, frame)
    assert (got.columns["n"].to_pylist(), got.found.tolist()) == ([5], [True])


def test_the_key_may_be_the_frame_s_index_and_other_columns_are_ignored(pushed):
    frame = frame_of(n=[5], note=[object()]).set_index("user_id")
    assert pushed(push_view({"n": Int64}), frame).columns["n"].to_pylist() == [5]


def test_a_view_without_entities_is_pushed_to(pushed):
    got = pushed(push_view({"n": Int64}, entities=()), frame_of(n=[5]).drop(columns="user_id"), users=("",))
    assert got.columns["n"].to_pylist() == [5]


@pytest.mark.filterwarnings("ignore:Could not infer format")
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda frame: frame.drop(columns="event_timestamp"), "lack event_timestamp; they have .*user_id, created, n"),
        (lambda frame: frame.drop(columns="created"), "lack created"),
        (lambda frame: frame.drop(columns="user_id"), "lack user_id"),
        (lambda frame: frame.assign(event_timestamp="tomorrow"), "tomorrow.*nothing was stored"),
        (lambda frame: frame.assign(event_timestamp=pd.NaT), "no event timestamp"),
        (lambda frame: frame.assign(user_id=[1, None]), "null join key"),
        (lambda frame: frame.assign(n=[1.0, 2.5]), "'n' is declared INT64 and came as double"),
        (lambda frame: frame.assign(n=[1, "many"]), "nothing was stored"),
        (lambda frame: frame.assign(n=[2**70, 1]), "nothing was stored"),
        (lambda frame: pd.concat([frame, frame[["n"]]], axis=1), "two columns of the rows are one in the view"),
    ],
)
def test_a_frame_that_does_not_fit_is_refused_whole_and_says_why(pushed, backend, change, complaint):
    view = push_view({"n": Int64})
    frame = change(frame_of(2, n=[1, 2]))
    pushed(view)
    with pytest.raises(StoreError, match=complaint):
        ColumnarProvider(backend.config).ingest_df(view, frame)
    assert pushed(view, users=(1, 2)).found.tolist() == [False, False]


def test_other_online_stores_and_on_demand_views_are_feast_s_business(backend, stores, tmp_path):
    online = {"type": "sqlite", "path": str(tmp_path / "stock.db")}
    store = FeatureStore(config=stores.config(tmp_path, online))
    store.apply([KEY, push_view({"n": Int64})])
    store.push("pushed", frame_of(n=[5]))
    assert store.get_online_features(["stats:n"], [{"user_id": 1}]).to_dict()["n"] == [5]
    assert isinstance(store._get_provider(), ColumnarProvider)

    store = FeatureStore(config=backend.config)

    @on_demand_feature_view(
        entities=[KEY],
        sources=[RequestSource(name="asked", schema=[Field(name="n", dtype=Int64)])],
        schema=[Field(name="twice", dtype=Int64)],
        mode="pandas",
        write_to_online_store=True,
    )
    def doubled(frame: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"twice": frame["n"] * 2})

    store.apply([KEY, doubled])
    store.write_to_online_store("doubled", frame_of(n=[5]))
    got = store.get_online_features(["doubled:twice"], [{"user_id": 1, "n": 5}]).to_dict()
    assert got["twice"] == [10]


def test_an_arrow_batch_is_what_the_store_is_given(backend):
    """No row of protos is made on the way."""
    taken = []
    provider = ColumnarProvider(backend.config)
    provider.online_store.write_columns = lambda config, view, rows, **_: taken.append(rows)
    provider.ingest_df(push_view({"n": Int64}), frame_of(2, n=[1, 2]))
    (rows,) = taken
    assert isinstance(rows, pa.RecordBatch)
    assert rows.schema.names == ["user_id", "n", "event_timestamp", "created"]
