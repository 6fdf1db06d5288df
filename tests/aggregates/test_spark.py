"""Spark gives the same feature tables as DuckDB, and its Structured Streaming the same online values."""

from __future__ import annotations

import warnings
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow.dataset as pads
import pytest

from plait.aggregates.build import build_view
from plait.aggregates.follow import follow_spark
from plait.aggregates.manifest import table_folder
from plait.aggregates.stream import stream_updater
from plait.clock import Clock
from plait.settings import Home
from tests.aggregates.conftest import add_part
from tests.aggregates.test_build import moment, some_events
from tests.aggregates.test_stream import FakeOnlineStore, online_values, table_values
from tests.aggregates.witness import DAY, START, everything, known, lists

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
