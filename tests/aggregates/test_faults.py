"""Faults of events, disks and processes: each build ends in a clear error or a complete table, never half."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.aggregates import AggregateSpec, Count, DistinctCount, Max, Sum, feedback
from plait.aggregates.build import BuildReport, build_view
from plait.aggregates.manifest import read_manifest, stamps, state_folder, table_folder
from plait.aggregates.parts import StateWriter, TableWriter
from plait.errors import DataError, StoreError
from plait.settings import Home
from tests.aggregates.conftest import add_part
from tests.aggregates.witness import DAY, NO_SHRINKING, START, WINDOWS, lists, look_up, naive, random_events, to_table

SPEC = AggregateSpec(
    name="small",
    keys=("user_id",),
    events=feedback("rating"),
    windows=WINDOWS,
    cadence="event",
    features=(
        Count("n"),
        Sum("total", of="value"),
        Max("most", of="value"),
        DistinctCount("items", of="item_id"),
    ),
)
END = START + 8 * DAY


def event(i: int, at: int, **values: Any) -> dict[str, Any]:
    given = {"event_id": f"e{i}", "type": "rating", "user_id": 1 + i % 3, "item_id": 1 + i % 2, "value": float(i % 5)}
    return {**given, "timestamp": at, "created": at, **values}


EVENTS = [event(i, START + i * DAY // 5 + i) for i in range(30)]


def build(home: Home, until: int = END, spec: AggregateSpec = SPEC) -> BuildReport:
    return build_view(home, spec, until=datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=until))


def rows(home: Home, spec: AggregateSpec = SPEC) -> list[dict[str, Any]]:
    table = pads.dataset(table_folder(home, spec.name)).to_table()
    for name in ("event_timestamp", "created"):
        table = table.set_column(table.column_names.index(name), name, table[name].cast("int64"))
    return table.sort_by([(name, "ascending") for name in (*spec.keys, "event_timestamp")]).to_pylist()


def only_whole_files(home: Home, spec: AggregateSpec = SPEC) -> bool:
    """The table and its state hold what the manifest names and nothing beside it."""
    manifest = read_manifest(home, spec.name)
    assert manifest is not None
    table, state = table_folder(home, spec.name), state_folder(home, spec.name)
    return (
        {path.name for path in table.iterdir()} == set(manifest.parts)
        and stamps(table) == manifest.parts
        and {path.name for path in state.iterdir()} == {"lock", "manifest.json", manifest.state}
        and [path.name for path in home.features.glob(".*.tmp-*")] == []
    )


def rewrite(home: Home, name: str, table: pa.Table) -> None:
    pq.write_table(table, home.events / "feedback" / f"{name}.parquet")


# --- disks ---

LATE = [event(100 + i, START + DAY + i) for i in range(5)]


@pytest.mark.parametrize("writer", [TableWriter, StateWriter], ids=["table", "state"])
@pytest.mark.parametrize(
    ("mode", "before", "more"),
    [("full", END, [event(0, START)]), ("increment", END - DAY, []), ("retile", END - DAY, LATE)],
)
def test_a_full_disk_leaves_the_old_table_and_the_next_build_completes(
    make_home, monkeypatch, writer, mode, before, more
):
    home, once = make_home(EVENTS), make_home(EVENTS, name="once")
    build(home, before)
    old, manifest = rows(home), read_manifest(home, SPEC.name)
    if more:
        for each in (home, once):
            add_part(each, "part0" if mode == "full" else "more", more)
    write, (soft, hard) = writer._write, resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_a_small_disk(*args: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # the kernel refuses what goes beyond
        try:
            write(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as full:
        full.setattr(writer, "_write", on_a_small_disk)
        full.setattr(TableWriter, "close", closing_on_a_small_disk(hard) if writer is TableWriter else close)
        with pytest.raises(StoreError, match=r"cannot write .*small.*: File too large .*make room"):
            build(home)
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == (soft, hard)
    assert rows(home) == old and read_manifest(home, SPEC.name) == manifest and only_whole_files(home)
    assert build(home).mode == mode
    build(once)
    assert rows(home) == rows(once) != old and only_whole_files(home)


close = TableWriter.close


def closing_on_a_small_disk(hard: int) -> Any:
    """Parquet keeps small row groups back until the file is closed: that is where a disk is full."""

    def closing(writer: TableWriter) -> None:
        soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            close(writer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return closing


def test_a_disk_without_room_for_intermediate_results_is_said(make_home):
    home = make_home(EVENTS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        with pytest.raises(StoreError, match=r"File too large.*make room"):
            build(home)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not table_folder(home, SPEC.name).exists()


# --- kill -9 ---

KILLED = """
import os, signal, sys
from datetime import datetime
from pathlib import Path
from plait.aggregates import build, AggregateSpec
from plait.settings import Home

_, project, spec, until, where, mode = sys.argv
owner = {"close": build.TableWriter, "read_schema": build.pq}.get(where, build)
before, compact = getattr(owner, where), build._Builder._compact
compacting = []

def die(*args, **settings):
    if where == "close":
        before(*args)  # every row is written, and nothing is in its place
    elif mode == "compact" and not compacting:
        return before(*args, **settings)  # the increment goes well; it is the compaction that dies
    os.kill(os.getpid(), signal.SIGKILL)

setattr(owner, where, die)
if mode == "compact":
    build.MAX_PARTS = 1
    build._Builder._compact = lambda *args: (compacting.append(1), compact(*args))
home = Home(project=Path(project), root=Path(project) / ".plait")
build.build_view(home, AggregateSpec.from_json(spec), until=datetime.fromisoformat(until), full=mode == "full")
"""


@pytest.mark.parametrize("where", ["close", "write_manifest"])
@pytest.mark.parametrize(("mode", "more"), [("increment", []), ("retile", LATE)])
def test_a_build_killed_on_the_way_leaves_whole_rows_and_the_next_one_completes(make_home, where, mode, more):
    home, once = make_home(EVENTS), make_home(EVENTS, name="once")
    build(home, END - DAY)
    old = rows(home)
    if more:
        for each in (home, once):
            add_part(each, "more", more)
    build(once)
    kill_on_the_way(home, where, mode)
    # A reader finds the table as it was, or, killed after the rename, as it will be.
    assert rows(home) == (old if where == "close" else rows(once))
    assert build(home).mode == ("full" if (where, mode) == ("write_manifest", "retile") else mode)
    assert rows(home) == rows(once) and only_whole_files(home)


def kill_on_the_way(home: Home, where: str, mode: str) -> None:
    until = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=END)).isoformat()
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(home.project), SPEC.to_json(), until, where, mode]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL


@pytest.mark.parametrize("where", ["close", "write_manifest"])
def test_a_full_rebuild_killed_on_the_way_leaves_a_whole_table(make_home, where):
    home, once = make_home(EVENTS), make_home(EVENTS, name="once")
    build(home, END - DAY)
    old = rows(home)
    build(once)
    kill_on_the_way(home, where, "full")
    assert rows(home) == (old if where == "close" else rows(once))
    assert build(home).mode == ("increment" if where == "close" else "full")
    assert rows(home) == rows(once) and only_whole_files(home)


@pytest.mark.parametrize("where", ["read_schema", "write_manifest"])
def test_a_compaction_killed_on_the_way_loses_and_repeats_no_row(make_home, where):
    """Killed while it copies, and after the folders changed places but before the manifest knows."""
    home, once = make_home(EVENTS), make_home(EVENTS, name="once")
    build(home, END - DAY)
    build(once)
    kill_on_the_way(home, where, "compact")
    assert rows(home) == rows(once)
    assert build(home).mode == ("current" if where == "read_schema" else "full")
    assert rows(home) == rows(once) and only_whole_files(home)


# --- files ---


def test_a_part_damaged_in_its_middle_is_named_and_the_old_table_stays(make_home):
    home = make_home(EVENTS[:20])
    build(home, END - DAY)
    old = rows(home)
    add_part(home, "bad", EVENTS[20:])
    path = home.events / "feedback" / "bad.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(300) + content[304:])  # the footer at the end is whole
    with pytest.raises(DataError, match=r"bad\.parquet is damaged .*restore it"):
        build(home)
    assert rows(home) == old and only_whole_files(home)
    path.write_bytes(content)
    build(home)
    once = make_home(EVENTS, name="once")
    build(once)
    assert rows(home) == rows(once)


@pytest.mark.parametrize(
    ("column", "dtype", "message"),
    [
        ("user_id", pa.string(), r"drift\.parquet: column 'user_id' is string, expected int64"),
        ("timestamp", pa.int64(), r"drift\.parquet: column 'timestamp' is int64, expected timestamp"),
        ("value", pa.string(), r"drift\.parquet: column 'value' is string, expected double"),
        ("user_id", None, r"drift\.parquet lacks user_id"),
        ("timestamp", None, r"drift\.parquet lacks timestamp"),
        ("event_id", None, r"drift\.parquet lacks event_id"),
    ],
)
def test_a_part_whose_columns_drifted_is_named_and_the_old_table_stays(make_home, column, dtype, message):
    home = make_home(EVENTS[:20])
    build(home, END - DAY)
    old, table = rows(home), to_table(EVENTS[20:])
    i = table.column_names.index(column)
    drifted = table.remove_column(i)
    if dtype is not None:
        drifted = table.set_column(i, column, pc.cast(table[column], dtype))
    rewrite(home, "drift", drifted)
    with pytest.raises(DataError, match=message):
        build(home)
    assert rows(home) == old and only_whole_files(home)


def test_a_new_column_changes_nothing_and_a_value_column_that_a_part_lacks_is_missing_there(make_home):
    home = make_home(EVENTS[:20])
    build(home, END - DAY)
    table = to_table(EVENTS[20:])
    rewrite(home, "next", table.remove_column(table.column_names.index("value")).append_column("new", table["item_id"]))
    build(home)
    once = make_home(EVENTS[:20], [{**row, "value": None} for row in EVENTS[20:]], name="once")
    build(once)
    assert rows(home) == rows(once)


# --- times and ids ---


def test_events_from_the_future_wait_until_their_time(make_home):
    """A clock that runs ahead: told today, dated in two days. Nobody sees it before, and then as any other event."""
    ahead = [event(200 + i, END + 2 * DAY + i, created=END - DAY) for i in range(3)]
    home, without = make_home(EVENTS + ahead), make_home(EVENTS, name="without")
    for each in (home, without):
        build(each)
    assert rows(home) == rows(without)
    assert build(home, END + 3 * DAY).mode == "increment"
    once = make_home(EVENTS + ahead, name="once")
    build(once, END + 3 * DAY)
    found = rows(home)
    assert found == rows(once)
    for user in (1, 2, 3):
        for at in (END, END + 2 * DAY, END + 2 * DAY + 10, END + 3 * DAY):
            assert look_up(found, SPEC, (user,), at) == naive(SPEC, EVENTS + ahead, (user,), at)


@pytest.mark.parametrize("spec", [SPEC, lists("event")], ids=["windows", "lists"])
def test_an_event_that_turns_out_to_have_been_another_users_leaves_the_first_user(make_home, spec):
    """Copies in a later file that were known earlier: of another user, of another time, of both; and later ones."""
    home = make_home(EVENTS)
    build(home, END - 3 * DAY, spec)
    build(home, END, spec)
    at = EVENTS[4]["timestamp"]
    copies = [
        event(4, at, user_id=3, created=at - 1),  # another user's
        event(8, EVENTS[8]["timestamp"] + 2 * DAY, created=EVENTS[8]["created"] - 1),  # happened later
        event(9, END + DAY, user_id=2, created=EVENTS[9]["created"] - 1),  # another's, and still to happen
        event(10, EVENTS[10]["timestamp"], user_id=3, created=EVENTS[10]["created"] + 1),  # known later: no news
        event(11, EVENTS[11]["timestamp"], user_id=1),  # known at the same moment
    ]
    add_part(home, "copies", copies)
    assert build(home, END + 2 * DAY, spec).mode == "retile"
    once = make_home(EVENTS, name="once")
    add_part(once, "copies", copies)
    build(once, END + 2 * DAY, spec)
    found = rows(home, spec)
    assert found == rows(once, spec)
    for user in (1, 2, 3):
        for now in range(START, END + 2 * DAY + 1, DAY // 2):
            assert look_up(found, spec, (user,), now) == naive(spec, EVENTS + copies, (user,), now)


@pytest.mark.parametrize("spec", [SPEC, lists("event")], ids=["windows", "lists"])
@settings(max_examples=3, deadline=None, phases=NO_SHRINKING)
@given(
    events=random_events(max_size=25),
    data=st.data(),
)
def test_late_duplicate_and_scrambled_events_in_any_files_equal_a_full_build_and_the_loop(
    tmp_path_factory, spec, events, data
):
    """Files come in any order, whatever their events say of when they happened and became known."""
    home = Home(project=(folder := tmp_path_factory.mktemp("any")), root=folder / ".plait").create()
    once = Home(project=folder, root=folder / "once").create()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(events)), min_size=2, max_size=2)))
    parts = [events[: cuts[0]] or events[:1], events[cuts[0] : cuts[1]], events[cuts[1] :]]
    ends = sorted(START + days * DAY for days in data.draw(st.lists(st.integers(1, 8), min_size=3, max_size=3)))
    for i, (part, end) in enumerate(zip(parts, ends, strict=True)):
        add_part(home, f"part{i}", part)
        add_part(once, f"part{i}", part)
        build(home, end, spec)
    build(once, ends[-1], spec)
    found = rows(home, spec)
    assert found == rows(once, spec)
    for user in (1, 2, 3):
        for at in range(START, ends[-1] + 1, DAY // 2):
            assert look_up(found, spec, (user,), at) == naive(spec, events, (user,), at)
