"""Spark gives the same feature tables and exact values as DuckDB, and its Structured Streaming the same online ones."""

from __future__ import annotations

import random
import warnings
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pytest

from plait.aggregates.build import build_view
from plait.aggregates.exact import exact_values
from plait.aggregates.follow import follow_spark
from plait.aggregates.manifest import table_folder
from plait.aggregates.stream import stream_updater
from plait.clock import Clock
from plait.settings import Home
from tests.aggregates.conftest import add_part
from tests.aggregates.test_build import moment, some_events
from tests.aggregates.test_stream import FakeOnlineStore, online_values, table_values
from tests.aggregates.witness import DAY, START, all_keys, everything, known, lists, naive

pytestmark = [
    pytest.mark.slow,
    pytest.mark.spark,
    pytest.mark.usefixtures("spark"),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning:pyspark", "ignore::ResourceWarning", "ignore::UserWarning:pyspark"
    ),
]


def rows(home: Home, spec: Any) -> list[dict[str, Any]]:
    table = pads.dataset(table_folder(home, spec.name)).to_table()
    assert table.schema.field("event_timestamp").type.tz == "UTC"
    return table.sort_by([(name, "ascending") for name in (*spec.keys, "event_timestamp")]).to_pylist()


@pytest.mark.parametrize(
    "spec",
    [everything("event"), everything("day", keys=("user_id", "genre")), lists("hour")],
    ids=lambda spec: f"{spec.name}-{'-'.join(spec.keys)}-{spec.cadence}",
)
def test_spark_and_duckdb_build_the_same_rows_whole_and_by_the_increment(make_home, spec):
    events = some_events(21)
    split = START + 5 * DAY
    late = [e for e in events if e["user_id"] == 2][::4]
    found = {}
    for engine in ("duckdb", "spark"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            home = make_home([e for e in events if known(e) <= split and e not in late], name=engine)
            build_view(home, spec, until=moment(split), engine=engine)
            add_part(home, "next", [e for e in events if known(e) > split or e in late])
            report = build_view(home, spec, until=moment(START + 12 * DAY), engine=engine)
        found[engine] = (report.mode, report.retiled_keys, rows(home, spec))
    assert found["duckdb"] == found["spark"]
    assert found["spark"][0] == "retile" and len(found["spark"][2]) > 20


def test_spark_structured_streaming_updates_online_values_like_the_table(make_home, tmp_path):
    spec, events = everything("event"), some_events(22)
    home, arriving = make_home(events[:20]), make_home(events[20:], name="arriving")
    whole = make_home(events, name="whole")
    now = START + 12 * DAY
    build_view(whole, spec, until=moment(now))
    store = FakeOnlineStore()
    with warnings.catch_warnings(), stream_updater(home, [spec], store.push) as updater:
        warnings.simplefilter("ignore")
        clock = Clock(moment(now) - datetime.now(UTC) - timedelta(hours=1))
        steps = list(follow_spark(updater, arriving.events / "feedback", clock=clock))
    assert sum(step.n_events for step in steps) > 0
    expected = table_values(whole, spec, now - 10**6)
    assert online_values(store, spec) == {key: expected[key] for _, key in store.rows} and len(store.rows) == 3


@pytest.mark.parametrize(
    "spec",
    [everything("event"), everything("event", keys=("user_id", "genre")), lists("event")],
    ids=lambda spec: f"{spec.name}-{'-'.join(spec.keys)}",
)
def test_spark_duckdb_and_the_loop_give_the_same_exact_values(make_home, spec):
    """Samples at the events themselves, just before and after them, at random, twice, and of keys without events."""
    events = [
        {**e, "value": float("nan")} if i % 9 == 0 else {**e, "type": "like"} if i % 11 == 0 else e
        for i, e in enumerate(some_events(23))
    ]
    chance = random.Random(24)
    moments = [at + step for e in events for at in (e["timestamp"], known(e)) for step in (-1, 0, 1)]
    moments += [START + chance.randrange(-DAY, 13 * DAY) for _ in range(100)]
    rest = [name for name in spec.keys if name != "user_id"]
    keys = [*all_keys(spec), (9, *("Comedy" for _ in rest)), (None, *("Drama" for _ in rest))]
    asked = [(chance.choice(keys), at) for at in moments]
    asked += asked[:2]
    chance.shuffle(asked)
    columns = {name: [key[i] for key, _ in asked] for i, name in enumerate(spec.keys)}
    at = pa.array([at for _, at in asked], pa.int64()).cast(pa.timestamp("us", tz="UTC"))
    samples = pa.table({"label": list(range(len(asked))), **columns, "event_timestamp": at})
    home = make_home(events[::2], events[1::2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        duckdb, spark = (exact_values(home, spec, samples, engine=engine) for engine in ("duckdb", "spark"))
    assert spark.schema == duckdb.schema and spark.select(samples.column_names).equals(samples)
    assert spark.to_pylist() == duckdb.to_pylist()
    n_found = 0
    for row, (key, at) in zip(spark.to_pylist(), asked, strict=True):
        before = [e for e in events if e["timestamp"] < at and known(e) <= at]
        expected = naive(spec, before, key, at)
        assert {name: row[name] for name in spec.columns} == (expected or dict.fromkeys(spec.columns)), (key, at)
        n_found += expected is not None
    assert len(asked) / 3 < n_found < len(asked)
