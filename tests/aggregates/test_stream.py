"""Online values from a stream of events equal the feature table's, value for value."""

from __future__ import annotations

import random
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from plait.aggregates import AggregateSpec, Count, DistinctCount, feedback, impressions
from plait.aggregates.build import build_view
from plait.aggregates.eventfolder import EventFolder
from plait.aggregates.follow import follow
from plait.aggregates.manifest import table_folder
from plait.aggregates.stream import stream_updater
from plait.clock import Clock
from plait.data.tables import SCHEMAS
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


BY_USER = {"keys": ("user_id",), "cadence": "event", "windows": ("2d", "all")}
GENRES_OF_USER = AggregateSpec(
    name="genres",
    events=feedback("rating", genre="items.genres"),
    features=(Count("n"), DistinctCount("genres", of="genre")),
    **BY_USER,
)
SHOWN_TO_USER = AggregateSpec(
    name="shown", events=impressions(), features=(Count("n"), DistinctCount("items", of="item_id")), **BY_USER
)


def some_impressions(seed: int) -> list[dict[str, Any]]:
    """Ten requests of five items each, some told twice."""
    rng = random.Random(seed)
    rows = []
    for i in range(10):
        at, user = START + rng.randint(0, 12) * 6 * HOUR, i % 3 + 1
        shown = {"timestamp": at, "user_id": user, "created": at}
        rows += [{**shown, "request_id": f"r{i}", "item_id": item} for item in range(1, 6)]
    return rows + rows[5:9]


@pytest.mark.parametrize("history", [0, 1, 2], ids=["all live", "half in the tables", "all in the tables"])
@pytest.mark.parametrize("spec", [GENRES_OF_USER, SHOWN_TO_USER], ids=["list attribute", "two-column id"])
def test_an_event_of_several_rows_or_ids_counts_as_in_the_table(make_home, spec, history):
    table = spec.events.table
    if table == "feedback":
        events, to_rows = some_events(11), to_table
    else:
        events = sorted(some_impressions(12), key=lambda row: row["timestamp"])
        to_rows = partial(pa.Table.from_pylist, schema=SCHEMAS[table])
    homes = [make_home(name=name) for name in ("live", "whole")]
    known_before = len(events) * history // 2
    for home, part in zip(homes, (events[:known_before], events), strict=True):
        (home.events / table).mkdir(exist_ok=True)
        pq.write_table(to_rows(part), home.events / table / "a.parquet")
    build_view(homes[1], spec, until=moment(START + 20 * DAY))
    store = FakeOnlineStore()
    with stream_updater(homes[0], [spec], store.push) as updater:
        for i in range(0, len(events), 7):
            updater.absorb(table, to_rows(events[i : i + 7]))
        updater.advance(moment(START + 19 * DAY))
    expected = table_values(homes[1], spec, START + 19 * DAY)
    assert online_values(store, spec) == expected and len(expected) == 3


def test_of_copies_for_different_users_one_counts_and_a_doubt_is_logged(make_home, caplog):
    spec, (event,) = everything("event"), [e for e in some_events(3) if e["type"] == "rating"][:1]
    event = {**event, "created": event["timestamp"], "user_id": 1}
    later = {**event, "created": event["created"] + HOUR, "user_id": 2}
    other = {**event, "event_id": "other", "user_id": 2}
    for live, history in ([event, later, other], []), ([other], [event, later]), ([later, other], [event]):
        home, whole = make_home(history, name=f"h{len(history)}"), make_home([*live, *history], name=f"w{len(history)}")
        build_view(whole, spec, until=moment(START + 20 * DAY))
        store = FakeOnlineStore()
        with stream_updater(home, [spec], store.push) as updater:
            for row in live:
                updater.absorb("feedback", to_table([row]))
            updater.advance(moment(START + 19 * DAY))
        expected = table_values(whole, spec, START + 19 * DAY)
        if history != [event]:  # nobody has met user 1 there: what the tables hold of others is not looked at
            assert online_values(store, spec) == {key: expected[key] for _, key in store.rows}
    assert not caplog.records
    with stream_updater(make_home(name="swapped"), [spec], FakeOnlineStore().push) as updater:
        updater.absorb("feedback", to_table([later]))
        updater.absorb("feedback", to_table([event]))
    assert "counts for (2,) and was known before for (1,)" in caplog.text


def test_lists_take_events_without_an_id_as_the_table_does(make_home):
    spec = lists("day")
    events = [{**e, "event_id": None if i % 3 else e["event_id"]} for i, e in enumerate(some_events(13))]
    home = make_home(events)
    build_view(home, spec, until=moment(START + 20 * DAY))
    store = FakeOnlineStore()
    with stream_updater(make_home(name="live"), [spec], store.push) as updater:
        updater.absorb("feedback", to_table(events))
        updater.advance(moment(START + 19 * DAY))
    assert online_values(store, spec) == table_values(home, spec, START + 19 * DAY)


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


def test_a_parquet_file_that_stays_unreadable_is_named_and_the_others_are_taken(make_home, tmp_path, monkeypatch):
    monkeypatch.setattr("plait.aggregates.eventfolder.PATIENCE_S", 0.3)
    folder = tmp_path / "arriving"
    folder.mkdir()
    pq.write_table(to_table(some_events(8)), folder / "a.parquet")
    (folder / "torn.parquet").write_bytes(b"PAR1")
    store, home = FakeOnlineStore(), make_home()
    clock = Clock(moment(START + 5 * DAY) - datetime.now(UTC))
    with stream_updater(home, [everything("event")], store.push) as updater:
        steps = follow(updater, home, folder, clock=clock, poll_s=0.05)
        assert next(steps).pushed == {"stats": 3}
        with pytest.raises(DataError, match=r"torn\.parquet is not a readable parquet file"):
            list(steps)


def test_a_file_that_is_still_being_written_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("plait.aggregates.eventfolder.PATIENCE_S", 0.2)
    pq.write_table(to_table(some_events(9)), tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    source, arriving = EventFolder(tmp_path), tmp_path / "slow.parquet"
    for end in range(0, len(data), len(data) // 5):  # longer in all than anyone waits for one that does not grow
        arriving.write_bytes(data[:end])
        assert list(source.poll()) == [] and source.waiting
        time.sleep(0.1)
    arriving.write_bytes(data)
    ((_, rows),) = source.poll()
    assert rows.num_rows == len(some_events(9)) and not source.waiting


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        EventFolder(tmp_path / "nowhere")
