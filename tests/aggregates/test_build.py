"""Feature tables on disk: an increment equals a full build, late files re-tile, and nothing is ever half done."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from plait.aggregates import AggregateSpec, Count, Max, feedback
from plait.aggregates.build import BuildReport, build_view
from plait.aggregates.manifest import read_manifest, stamps, table_folder
from plait.errors import DataError, SpecError
from plait.settings import Home
from tests.aggregates.conftest import add_items, add_part
from tests.aggregates.witness import DAY, HOUR, START, everything, known, lists


def moment(us: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)


def build(home: Home, spec: AggregateSpec, until: int, **settings: Any) -> BuildReport:
    return build_view(home, spec, until=moment(until), **settings)


def rows(home: Home, spec: AggregateSpec) -> list[dict[str, Any]]:
    table = pads.dataset(table_folder(home, spec.name)).to_table()
    found = table.sort_by([(name, "ascending") for name in (*spec.keys, "event_timestamp")]).to_pylist()
    assert len({(*(row[key] for key in spec.keys), row["event_timestamp"]) for row in found}) == len(found)
    return found


def some_events(
    seed: int, n: int = 60, *, delays: tuple[int, ...] = (0, 0, 0, 1, 5 * HOUR, DAY + 1, 3 * DAY)
) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    events = []
    for i in range(n):
        at = START + rng.randint(0, 40) * 6 * HOUR + rng.choice([-1, 0, 1, 1234567])
        event = {
            "event_id": f"{seed}-{i}",
            "type": "rating",
            "user_id": rng.randint(1, 3),
            "item_id": rng.randint(1, 3),
            "timestamp": at,
            "value": rng.choice([None, -1.25, 1.0, 2.5, 4.0, 5.0]),
            "created": at + rng.choice(delays),
        }
        events.append(event)
        if rng.random() < 0.1:
            events.append({**event, "created": event["created"] + rng.choice([1, DAY])})
    return events


SPECS = [everything("event"), everything("day"), everything("hour", keys=("user_id", "genre")), lists("event")]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.name}-{'-'.join(spec.keys)}-{spec.cadence}")
def test_increments_as_events_become_known_equal_a_full_build(make_home, spec):
    events = some_events(1)
    ends = [START + days * DAY + 7 * HOUR for days in (3, 4, 5, 12)]
    home = make_home([e for e in events if known(e) <= ends[0]])
    modes = [build(home, spec, ends[0]).mode]
    for i, (start, end) in enumerate(pairwise(ends)):
        add_part(home, f"day{i}", [e for e in events if start < known(e) <= end])
        modes.append(build(home, spec, end).mode)
    assert modes == ["full", *["increment"] * 3]
    once = make_home(events, name="once")
    build(once, spec, ends[-1])
    assert rows(home, spec) == rows(once, spec)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.name}-{'-'.join(spec.keys)}-{spec.cadence}")
def test_files_that_arrive_late_retile_what_they_touch_and_equal_a_full_build(make_home, spec):
    events = some_events(2)
    late = [e for e in events if e["user_id"] == 2][::3]
    home = make_home([e for e in events if e not in late])
    build(home, spec, START + 6 * DAY)
    build(home, spec, START + 8 * DAY)
    add_part(home, "late", late)
    report = build(home, spec, START + 12 * DAY)
    assert report.mode == "retile" and report.retiled_keys == len({e["user_id"] for e in late}) * (
        2 if "genre" in spec.keys else 1
    )
    once = make_home(events, name="once")
    build(once, spec, START + 12 * DAY)
    assert rows(home, spec) == rows(once, spec)
    build(home, spec, START + 20 * DAY)
    build(once, spec, START + 20 * DAY)
    assert rows(home, spec) == rows(once, spec)


BY_GENRE = everything("hour", keys=("user_id", "genre"))
UNTIL = START + 6 * DAY


@pytest.mark.parametrize(
    ("catalogue", "mode"),
    [
        ([(1, UNTIL, UNTIL, ["Comedy", "Action"])], "increment"),  # as it was
        ([(1, UNTIL, UNTIL, ["Horror"])], "increment"),  # from now on
        ([(9, UNTIL, UNTIL, ["Horror"])], "increment"),  # nobody has met it yet
        ([(1, START - 3 * DAY, UNTIL, ["Horror"])], "increment"),  # of the past, and already told otherwise
        ([(1, START + 5 * DAY, START + 5 * DAY, ["Horror"])], "full"),  # events of a day were counted otherwise
        ([(1, START + 5 * DAY, START + 5 * DAY, ["Comedy", "Action"])], "increment"),  # the same, as it was
        ([(2, START, START, ["Horror"])], "full"),  # known earlier than what was known first
    ],
    ids=["as it was", "from now on", "unmet", "superseded", "earlier", "earlier, as it was", "first"],
)
def test_a_new_catalogue_costs_a_full_build_only_if_it_changes_what_was_counted(make_home, catalogue, mode):
    events = some_events(6)
    home = make_home([e for e in events if known(e) <= UNTIL])
    build(home, BY_GENRE, UNTIL)
    add_items(home, "catalogue", catalogue)
    add_part(home, "later", [e for e in events if known(e) > UNTIL])
    assert build(home, BY_GENRE, START + 9 * DAY).mode == mode
    once = make_home(events, name="once")
    add_items(once, "catalogue", catalogue)
    build(once, BY_GENRE, START + 9 * DAY)
    assert rows(home, BY_GENRE) == rows(once, BY_GENRE)


def test_events_of_an_unknown_item_count_from_when_it_is_known(make_home):
    """And are not forgotten by the increment in which that comes, though they are old and their file is."""
    events = [{**e, "created": e["timestamp"]} for e in some_events(7)]
    known_at = START + 14 * DAY
    home, once = make_home(events), make_home(events, name="once")
    for place in (home, once):
        (place.events / "items" / "items.parquet").unlink()
        add_items(place, "items", [(item, known_at, known_at, ["Drama"]) for item in (1, 2, 3)])
    spec = everything("day", keys=("user_id", "genre"), windows=("1d", "all"))
    build(home, spec, START + 12 * DAY)
    assert rows(home, spec) == []
    assert build(home, spec, START + 16 * DAY).mode == "increment"
    build(once, spec, START + 16 * DAY)
    assert rows(home, spec) == rows(once, spec)
    newest = max(rows(home, spec), key=lambda row: row["event_timestamp"])
    assert newest["n_all"] == len({e["event_id"] for e in events if e["user_id"] == newest["user_id"]})


def test_an_increment_reads_and_writes_only_what_is_new(make_home):
    spec = everything("event")
    home = make_home(some_events(3))
    build(home, spec, START + 5 * DAY)
    before = stamps(table_folder(home, spec.name))
    assert build(home, spec, START + 5 * DAY).mode == "current"
    report = build(home, spec, START + 6 * DAY)
    after = stamps(table_folder(home, spec.name))
    assert report.mode == "increment" and before.items() < after.items()
    assert report.rows == sum(row["event_timestamp"] > moment(START + 5 * DAY) for row in rows(home, spec))


def test_shards_change_nothing(make_home):
    spec = everything("event")
    one, many = make_home(some_events(4), name="one"), make_home(some_events(4), name="many")
    shards = []
    build(one, spec, START + 12 * DAY)
    build(many, spec, START + 12 * DAY, shard_rows=100, on_shard=lambda done, total: shards.append((done, total)))
    assert rows(one, spec) == rows(many, spec)
    assert len(shards) > 3 and shards[-1][0] == shards[-1][1]


def test_a_changed_declaration_or_event_file_starts_over(make_home):
    spec = everything("day")
    home = make_home(some_events(5))
    build(home, spec, START + 5 * DAY)
    changed = everything("day", features=(Count("n"), Max("most", of="value")))
    assert build(home, changed, START + 6 * DAY).mode == "full"
    add_part(home, "part0", some_events(6))
    assert build(home, changed, START + 7 * DAY).mode == "full"
    once = make_home(some_events(6), name="once")
    build(once, changed, START + 7 * DAY)
    assert rows(home, changed) == rows(once, changed)


def test_many_small_parts_are_joined_without_changing_a_row(make_home, monkeypatch):
    monkeypatch.setattr("plait.aggregates.build.MAX_PARTS", 2)
    spec, home = lists("event"), make_home(some_events(7))
    for days in (1, 2, 3, 4, 5, 12):
        build(home, spec, START + days * DAY)
    assert len(stamps(table_folder(home, spec.name))) <= 2
    once = make_home(some_events(7), name="once")
    build(once, spec, START + 12 * DAY)
    assert rows(home, spec) == rows(once, spec)


def test_a_build_that_dies_before_its_manifest_is_put_right_by_the_next(make_home, monkeypatch):
    spec, home = everything("day"), make_home(some_events(8))
    build(home, spec, START + 5 * DAY)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr("plait.aggregates.build.write_manifest", die)
        build(home, spec, START + 6 * DAY)
    build(home, spec, START + 7 * DAY)
    once = make_home(some_events(8), name="once")
    build(once, spec, START + 7 * DAY)
    assert rows(home, spec) == rows(once, spec)


def test_no_events_of_a_type_give_an_empty_table_with_every_column(make_home):
    spec = AggregateSpec(
        name="buys",
        keys=("user_id",),
        events=feedback("purchase"),
        windows=("7d",),
        cadence="day",
        features=(Count("n"),),
    )
    home = make_home(some_events(9))
    build(home, spec, START + 5 * DAY)
    assert pads.dataset(table_folder(home, "buys")).to_table().column_names == [
        "user_id",
        "event_timestamp",
        "created",
        "n_7d",
    ]
    assert build(home, spec, START + 6 * DAY).rows == 0


def test_bad_events_are_refused_and_the_old_table_stays(make_home, tmp_path: Path):
    spec, home = everything("event"), make_home(some_events(10))
    build(home, spec, START + 5 * DAY)
    before = rows(home, spec)
    (home.events / "feedback" / "torn.parquet").write_bytes(b"PAR1 half a file")
    with pytest.raises(DataError, match=r"torn\.parquet is not a readable parquet file"):
        build(home, spec, START + 6 * DAY)
    (home.events / "feedback" / "torn.parquet").unlink()
    add_part(home, "huge", [{**some_events(11)[0], "value": 1e12}])
    with pytest.raises(DataError, match="value holds 1e\\+12; sums and means keep values up to 1e\\+09"):
        build(home, spec, START + 6 * DAY)
    assert rows(home, spec) == before and read_manifest(home, spec.name).until_us == START + 5 * DAY


def test_a_column_that_events_lack_is_named_with_a_suggestion(make_home):
    home = make_home(some_events(12))
    spec = AggregateSpec(
        name="s", keys=("user_id",), events=feedback(), windows=("7d",), cadence="day", features=(Max("m", of="valeu"),)
    )
    with pytest.raises(SpecError, match="no column 'valeu'; did you mean 'value'"):
        build(home, spec, START + 5 * DAY)
    assert not list(table_folder(home, "s").glob("*.parquet"))
    assert pq.read_table(home.events / "feedback").num_rows
