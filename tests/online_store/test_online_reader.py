"""A request's features, read online, against the rows they were written as."""

import importlib
import threading
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, RequestSource
from feast.types import Array, Float64, Int64, String
from feast.value_type import ValueType

from feature_repo.transforms import request_context
from plait.errors import SettingsError, SpecError
from plait.online import OnlineReader
from plait.service import resolve_service
from plait.transforms import on_demand_view

T0 = datetime(2024, 1, 1, tzinfo=UTC)
NOW = T0 + timedelta(hours=1, seconds=0.75)
VIEWS = {
    # name: (join keys, features, ttl)
    "user_stats": (["user_id"], {"user_last_event_at": Int64, "user_clicks": Int64}, None),
    "movie": (["item_id"], {"primary_genre": String, "genres": Array(String)}, None),
    "movie_stats": (["item_id"], {"movie_clicks": Int64}, timedelta(days=1)),
    "affinity": (["user_id", "genre"], {"affinity": Float64}, None),
}
TYPES = {"user_id": ValueType.INT64, "item_id": ValueType.INT64, "genre": ValueType.STRING}
KEY_FIELDS = {"user_id": Int64, "item_id": Int64, "genre": String}


# A candidate-side transform: of a request field, a request-side feature and a candidate's own.
TRANSFORM = """
import pandas as pd

def mix(inputs):
    mixed = inputs["boost"] * inputs["movie_clicks"] + inputs["user_clicks"]
    return pd.DataFrame({"mixed": mixed.astype("float64")}, index=inputs.index)
"""
ROWS = {
    "user_stats": {"user_id": [1], "user_last_event_at": [int(T0.timestamp()) - 86_400], "user_clicks": [3]},
    "movie": {
        "item_id": [10, 11, 12],
        "primary_genre": ["Drama", "War", None],
        "genres": [["Drama", "War"], [], None],
    },
    "movie_stats": {"item_id": [10, 11], "movie_clicks": [100, None]},
    "affinity": {"user_id": [1, 1, 2], "genre": ["Drama", "Comedy", "War"], "affinity": [0.9, 0.1, 0.5]},
}


@pytest.fixture(scope="module", params=["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def feast_store(request, stores, tmp_path_factory):
    """A registry with stored and on-demand views of both sides, and rows online; only read from here on."""
    folder = tmp_path_factory.mktemp(request.param)
    module = f"mix_of_{request.param}"
    (folder / f"{module}.py").write_text(TRANSFORM)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        store = FeatureStore(config=stores.config(folder, stores.settings(request.param, folder, request)))
        store.apply(declarations(importlib.import_module(module).mix))
        online = store._get_provider().online_store
        for name, columns in ROWS.items():
            table = stores.rows({n: pa.array(c) for n, c in columns.items()})
            online.write_columns(store.config, store.get_feature_view(name), table)
        yield store


def declarations(mix):
    entities = {name: Entity(name=name, join_keys=[name], value_type=TYPES[name]) for name in TYPES}
    views = {}
    for name, (keys, features, ttl) in VIEWS.items():
        columns = {key: KEY_FIELDS[key] for key in keys} | features
        views[name] = FeatureView(
            name=name,
            entities=[entities[key] for key in keys],
            ttl=ttl,
            schema=[Field(name=n, dtype=t) for n, t in columns.items()],
            source=FileSource(path=f"{name}.parquet", timestamp_field="event_timestamp"),
        )
    request = RequestSource(
        name="request", schema=[Field(name="request_timestamp", dtype=Int64), Field(name="boost", dtype=Float64)]
    )
    context = on_demand_view(
        name="context",
        sources=[views["user_stats"][["user_last_event_at"]], request],
        schema=[
            Field(name="hour", dtype=Int64),
            Field(name="weekday", dtype=Int64),
            Field(name="days_since_last_event", dtype=Float64),
        ],
        function=request_context,
    )
    mixed = on_demand_view(
        name="mix",
        sources=[views["movie_stats"][["movie_clicks"]], views["user_stats"][["user_clicks"]], request],
        schema=[Field(name="mixed", dtype=Float64)],
        function=mix,
    )
    tags = {"plait.derived_keys": "genre=movie:primary_genre"}
    chosen = [views["movie_stats"], context, views["affinity"], views["user_stats"], views["movie"][["genres"]], mixed]
    services = [
        FeatureService(name="ranking", features=chosen, tags=tags),
        FeatureService(name="plain", features=[views["user_stats"]]),
        FeatureService(name="lost", features=[views["affinity"]]),
    ]
    return [*entities.values(), *views.values(), request, context, mixed, *services]


@pytest.fixture
def reader(feast_store):
    return OnlineReader(feast_store, resolve_service(feast_store, "ranking"))


def read(reader, user, items, *, now=NOW, **context):
    return reader.read({"user_id": user}, pa.table({"item_id": items}), context={"boost": 2.0, **context}, now=now)


def test_a_request_gets_every_feature_of_its_service_in_the_declared_order_and_types(reader):
    rows = read(reader, 1, [11, 10, 99, 10])
    assert rows.request.schema == reader.service.schema("request")
    assert rows.candidates.schema == reader.service.schema("candidate")
    assert rows.request.to_pylist() == [
        {
            "hour": 1,
            "weekday": 0,
            "days_since_last_event": 1 + 3600 / 86_400,
            "user_last_event_at": int(T0.timestamp()) - 86_400,
            "user_clicks": 3,
        }
    ]
    assert rows.candidates.to_pydict() == {
        "movie_clicks": [None, 100, None, 100],
        "affinity": [None, 0.9, None, 0.9],  # by (user, the movie's primary genre)
        "genres": [[], ["Drama", "War"], None, ["Drama", "War"]],
        "mixed": [None, 203.0, None, 203.0],
    }


def test_unknown_users_and_items_are_told_apart_from_those_without_values(reader):
    rows = read(reader, 2, [12, 99])
    assert rows.request_unknown
    assert rows.unknown.tolist() == [False, True]
    assert rows.request["user_clicks"].to_pylist() == [None]
    assert rows.request["hour"].to_pylist() == [1]
    assert not read(reader, 1, [10]).request_unknown


def test_ttl_is_counted_from_the_request_s_moment_and_an_expired_item_is_still_known(reader):
    at_its_end, past_it = T0 + timedelta(days=1), T0 + timedelta(days=1, microseconds=1)
    assert read(reader, 1, [10], now=at_its_end).candidates["movie_clicks"].to_pylist() == [100]
    rows = read(reader, 1, [10], now=past_it)
    assert rows.candidates["movie_clicks"].to_pylist() == [None]
    assert rows.unknown.tolist() == [False]


def test_no_candidates_are_no_rows(reader):
    rows = read(reader, 1, pa.array([], pa.int64()))
    assert rows.candidates.schema == reader.service.schema("candidate")
    assert (rows.candidates.num_rows, len(rows.unknown), rows.request.num_rows) == (0, 0, 1)


def test_a_service_without_candidate_features_still_answers_row_for_row(feast_store):
    reader = OnlineReader(feast_store, resolve_service(feast_store, "plain"))
    rows = reader.read({"user_id": 1}, pa.table({"item_id": [1, 2]}), context={}, now=NOW)
    assert rows.candidates.num_columns == 0
    assert rows.unknown.tolist() == [False, False]
    assert rows.request["user_clicks"].to_pylist() == [3]


def test_what_a_request_lacks_is_named(reader):
    with pytest.raises(SpecError, match="the request lacks user_id; keys that came: none"):
        reader.read({}, pa.table({"item_id": [1]}), context={}, now=NOW)
    with pytest.raises(SpecError, match="context field 'boost' is double"):
        read(reader, 1, [10], boost="much")


def test_a_join_key_that_nothing_provides_is_refused_when_the_reader_is_made(feast_store):
    with pytest.raises(SpecError, match="nothing provides join key genre of affinity"):
        OnlineReader(feast_store, resolve_service(feast_store, "lost"))


def test_a_stock_online_store_is_refused_with_what_to_set(tmp_path, stores):
    config = stores.config(tmp_path, {"type": "sqlite", "path": str(tmp_path / "stock.db")})
    with pytest.raises(SettingsError, match=r"set online_store\.type to"):
        OnlineReader(FeatureStore(config=config), None)


def test_many_threads_read_through_one_reader(reader):
    expected = read(reader, 1, [10, 11])
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.extend(read(reader, 1, [10, 11]) for _ in range(10))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 40
    for rows in answers:
        assert rows.candidates.equals(expected.candidates)
        assert rows.request.equals(expected.request)
        assert np.array_equal(rows.unknown, expected.unknown)
