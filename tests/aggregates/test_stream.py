"""Online values from a stream of events equal the feature table's, value for value."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pytest

from plait.aggregates.build import build_view
from plait.aggregates.eventfolder import EventFolder
from plait.aggregates.follow import follow
from plait.aggregates.manifest import table_folder
from plait.aggregates.stream import stream_updater
from plait.clock import Clock
from plait.errors import DataError, StoreError
from plait.eventlog.segments import EventLog
from tests.aggregates.conftest import add_part
from tests.aggregates.witness import DAY, HOUR, START, everything, known, lists, look_up, to_table


def moment(us: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)


class FakeOnlineStore:
    """Keeps the newest row per key, as Plait's stores do."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, tuple[Any, ...]], dict[str, Any]] = {}
        self.broken = False

    def push(self, view: str, table: pa.Table) -> None:
        if self.broken:
            raise ConnectionError("the store is down")
        for row in table.to_pylist():
            keys = tuple(value for name, value in row.items() if name in ("user_id", "genre"))
            kept = self.rows.get((view, keys))
            newness = (row["event_timestamp"], row["created"])
            if kept is None or newness >= (kept["event_timestamp"], kept["created"]):
                self.rows[view, keys] = row


def some_events(seed: int, n: int = 80) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    events = []
    for i in range(n):
        at = START + rng.randint(0, 40) * 6 * HOUR + rng.choice([-1, 0, 1, 1234567])
        event = {
            "event_id": f"{seed}-{i}",
            "type": rng.choice(["rating", "rating", "rating", "like"]),
            "user_id": rng.randint(1, 3),
            "item_id": rng.randint(1, 3),
            "timestamp": at,
            "value": rng.choice([None, -1.25, 1.0, 2.5, 4.0, 5.0]),
            "created": at + rng.choice([0, 0, 0, 1, 5 * HOUR, DAY + 1, 3 * DAY]),
        }
        events += [event] * (2 if rng.random() < 0.1 else 1)
    return sorted(events, key=known)


def table_values(home: Any, spec: Any, at: int) -> dict[tuple[Any, ...], dict[str, Any]]:
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    rows = [
        {**row, **{name: (row[name] - epoch) // timedelta(microseconds=1) for name in ("event_timestamp", "created")}}
        for row in pads.dataset(table_folder(home, spec.name)).to_table().to_pylist()
    ]
    keys = {tuple(row[name] for name in spec.keys) for row in rows}
    return {key: found for key in keys if (found := look_up(rows, spec, key, at)) is not None}


def online_values(store: FakeOnlineStore, spec: Any) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {
        keys: {name: row[name] for name in spec.columns}
        for (view, keys), row in store.rows.items()
        if view == spec.name
    }


SPECS = [everything("event"), everything("day"), everything("hour", keys=("user_id", "genre")), lists("event")]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.name}-{'-'.join(spec.keys)}-{spec.cadence}")
def test_stream_and_batch_agree_at_every_moment(make_home, spec):
    """Events come in scrambled batches; after each, and when windows end, the store holds what the table says."""
    events = some_events(1)
    history, live = events[:30], events[30:]
    home = make_home(history)
    whole = make_home(events, name="whole")
    build_view(whole, spec, until=moment(START + 20 * DAY))
    store = FakeOnlineStore()
    touched: set[tuple[Any, ...]] = set()
    rng = random.Random(2)
    with stream_updater(home, [spec], store.push) as updater:
        for i in range(0, len(live), 10):
            batch = live[i : i + 10]
            now = max(known(event) for event in batch) + 1
            updater.absorb("feedback", to_table(rng.sample(batch, len(batch))))
            for at in (now, now + 3 * HOUR):
                if i + 10 < len(live) and at >= known(live[i + 10]):
                    continue
                updater.advance(moment(at))
                touched |= {keys for _, keys in store.rows}
                expected = table_values(whole, spec, at)
                assert online_values(store, spec) == {key: expected[key] for key in touched}
        updater.advance(moment(START + 19 * DAY))
    expected = table_values(whole, spec, START + 19 * DAY)
    assert online_values(store, spec) == {key: expected[key] for key in touched} and len(touched) >= 3


def test_events_told_again_or_found_in_the_history_count_once(make_home):
    spec, events = everything("event"), some_events(3)
    home = make_home(events)
    store = FakeOnlineStore()
    with stream_updater(home, [spec], store.push) as updater:
        assert updater.absorb("feedback", to_table(events[:20])) == 0
        updater.advance(moment(START + 20 * DAY))
    build_view(home, spec, until=moment(START + 20 * DAY))
    expected = table_values(home, spec, START + 20 * DAY)
    assert online_values(store, spec) == {key: expected[key] for _, key in store.rows}


def test_rows_that_a_broken_store_refused_are_sent_again(make_home):
    spec = everything("event")
    store = FakeOnlineStore()
    with stream_updater(make_home(), [spec], store.push) as updater:
        updater.absorb("feedback", to_table(some_events(4)))
        store.broken = True
        with pytest.raises(StoreError, match="stats: the online store took no rows"):
            updater.advance(moment(START + 5 * DAY))
        store.broken = False
        assert updater.advance(moment(START + 5 * DAY)) == {"stats": 3}
        assert updater.advance(moment(START + 5 * DAY)) == {"stats": 0}


def test_a_folder_of_segments_and_one_of_parquet_give_the_same_values(make_home, tmp_path):
    spec, events = everything("event"), [e for e in some_events(5) if e["type"] == "rating"]
    clock = Clock(moment(START + 5 * DAY) - datetime.now(UTC))
    stores = []
    (tmp_path / "parquet").mkdir()
    home = make_home()
    add_part(home, "none", [])
    for i in range(0, len(events), 25):
        add_part(home, f"{i}", events[i : i + 25])
        (home.events / "feedback" / f"{i}.parquet").rename(tmp_path / "parquet" / f"{i}.parquet")
    log = EventLog(tmp_path / "segments", "test")
    try:
        log.append("feedback", events[:40])
        log.append("feedback", events[40:])
        for folder in ("segments", "parquet"):
            store = FakeOnlineStore()
            with stream_updater(home, [spec], store.push) as updater:
                (step,) = follow(updater, home, tmp_path / folder, clock=clock)
            assert step.n_events > 0 and step.pushed["stats"] == 3
            stores.append(online_values(store, spec))
    finally:
        log.close()
    assert stores[0] == stores[1]


def test_a_segment_is_read_on_where_the_last_poll_stopped(tmp_path):
    folder = tmp_path / "log"
    log = EventLog(folder, "test")
    try:
        events = some_events(6)
        log.append("feedback", events[:5])
        source = EventFolder(folder)
        assert sum(rows.num_rows for _, rows in source.poll()) == 5
        log.append("feedback", events[5:7])
        assert sum(rows.num_rows for _, rows in source.poll()) == 2
        assert list(source.poll()) == []
    finally:
        log.close()


def test_a_parquet_file_that_stays_unreadable_is_named(tmp_path):
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    source = EventFolder(tmp_path)
    for _ in range(4):
        assert list(source.poll()) == []
    with pytest.raises(DataError, match="torn"):
        list(source.poll())


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        EventFolder(tmp_path / "nowhere")
