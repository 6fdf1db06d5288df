"""Too simple to be wrong: aggregates by looping over Python rows, and events to loop over.

Times are integers, microseconds; an event is a dict of the feedback table's columns with integer times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from hypothesis import Phase
from hypothesis import strategies as st

from plait.aggregates import AggregateSpec, Count, DistinctCount, LastN, LastTime, Max, Mean, Min, Rate, Sum, feedback
from plait.data.tables import ITEMS
from plait.eventlog import FEEDBACK

# Compiling and running an expression takes most of a second: shrinking a failure would take an hour.
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
HOUR = 3_600_000_000
DAY = 24 * HOUR
START = 1_700_000_000_000_000 // DAY * DAY
CONDITIONS: Mapping[str | None, Callable[[Mapping[str, Any]], bool]] = {
    None: lambda event: True,
    "value >= 4": lambda event: event["value"] is not None and event["value"] >= 4,
    "item_id in (1, 2) and not value < 2": lambda event: (
        event["item_id"] in (1, 2) and event["value"] is not None and not event["value"] < 2
    ),
}
# (item, event timestamp, created, genres): one is corrected, and then told of the past; of one nothing is known before
# some events, and a day later the same again; one gets its genre late.
ItemRow = tuple[int, int, int, list[str]]
ITEM_ROWS: tuple[ItemRow, ...] = (
    (1, START - DAY, START - DAY, ["Comedy"]),
    (1, START - DAY, START + 2 * DAY + HOUR, ["Comedy", "Action"]),
    (1, START - 2 * DAY, START + 3 * DAY, ["Western"]),
    (2, START + DAY, START + DAY + HOUR, ["Comedy", "Drama"]),
    (2, START + 2 * DAY, START + 2 * DAY, ["Comedy", "Drama"]),
    (3, START - DAY, START - DAY, []),
    (3, START + 4 * DAY, START + DAY, ["Drama"]),
)

EVERYTHING = (
    Count("n"),
    Count("n_good", where="value >= 4"),
    Sum("total", of="value"),
    Mean("mean", of="value"),
    Mean("mean_picked", of="value", where="item_id in (1, 2) and not value < 2"),
    Min("least", of="value"),
    Max("most", of="value"),
    Rate("rate", where="value >= 4"),
    Rate("smooth", where="value >= 4", prior=0.25, strength=4),
    DistinctCount("items", of="item_id"),
    DistinctCount("good_items", of="item_id", where="value >= 4"),
    LastTime("last_at"),
    LastTime("last_good_at", where="value >= 4"),
)
WINDOWS = ("1d", "2d", "all")


def everything(cadence: str, *, keys: tuple[str, ...] = ("user_id",), **settings: Any) -> AggregateSpec:
    """A spec with every windowed kind of feature."""
    attributes = {"genre": "items.genres"} if "genre" in keys else {}
    given = {"windows": WINDOWS, "features": EVERYTHING, "events": feedback("rating", **attributes)} | settings
    return AggregateSpec(name="stats", keys=keys, cadence=cadence, **given)


def lists(cadence: str) -> AggregateSpec:
    return AggregateSpec(
        name="history",
        keys=("user_id",),
        cadence=cadence,
        events=feedback("rating"),
        windows=(),
        features=(LastN("last_items", of="item_id", n=3), LastN("last_values", of="value", n=2)),
    )


def random_moments() -> st.SearchStrategy[int]:
    """Times that fall on, just before and just after the edges of tiles and windows."""
    return st.builds(lambda h, us: START + h * 6 * HOUR + us, st.integers(0, 20), st.sampled_from([-1, 0, 1, 1234567]))


@st.composite
def random_events(draw: st.DrawFn, *, max_size: int = 40, late: bool = True) -> list[dict[str, Any]]:
    """Ratings (and likes, to be ignored) of three users and movies; some known late, some told twice, in any order."""
    events = []
    for i in range(draw(st.integers(1, max_size))):
        at = draw(random_moments())
        delay = draw(st.sampled_from([0, 0, 0, 0, 1, 5 * HOUR, DAY, DAY + 1, 3 * DAY])) if late else 0
        event = {
            "event_id": f"e{i}",
            "type": draw(st.sampled_from(["rating"] * 5 + ["like"])),
            "user_id": draw(st.integers(1, 3)),
            "item_id": draw(st.sampled_from([1, 2, 3])),
            "timestamp": at,
            "value": draw(st.sampled_from([None, -1.25, 1.0, 2.5, 4.0, 5.0, float("nan")])),
            "created": at + delay if draw(st.integers(0, 9)) else None,
        }
        events.append(event)
        if draw(st.integers(0, 9)) == 0:
            events.append({**event, "created": (event["created"] or at) + HOUR})
        elif late and draw(st.integers(0, 9)) == 0:  # told otherwise, and before or after
            told = (event["created"] or at) + draw(st.sampled_from([-HOUR, 0, DAY]))
            events.append({**event, "created": told, "user_id": draw(st.integers(1, 3))})
    return draw(st.permutations(events))


def to_table(events: Sequence[Mapping[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist([{name: event.get(name) for name in FEEDBACK.names} for event in events], FEEDBACK)


def items_table(item_rows: Sequence[ItemRow] = ITEM_ROWS) -> pa.Table:
    rows = [
        {"item_id": item, "event_timestamp": at, "created": created, "title": f"m{item}", "genres": genres}
        for item, at, created, genres in item_rows
    ]
    return pa.Table.from_pylist([{name: row.get(name) for name in ITEMS.names} for row in rows], ITEMS)


def genres_of(item: int, at: int) -> tuple[list[str], int]:
    """An item's genres as known at a moment (as first known, before that), and since when they are known."""
    in_force: list[tuple[int, list[str]]] = []
    newest = None
    for since, happened, genres in sorted((max(row[1], row[2]), row[1], row[3]) for row in ITEM_ROWS if row[0] == item):
        if newest is None or happened >= newest:
            newest = happened
            in_force.append((since, genres))
    chosen = in_force[0]
    for version in in_force:
        if version[0] <= at:
            chosen = version
    return chosen[1], chosen[0]


def deduplicated(events: Iterable[Mapping[str, Any]], keys: Sequence[str] = ()) -> list[Mapping[str, Any]]:
    """Each event once: the copy known first, of these the one that happened first, of these that of the least key."""

    def place(event: Mapping[str, Any]) -> tuple[Any, ...]:
        return known(event), event["timestamp"], *(event[key] for key in keys if key in event)

    first: dict[str, Mapping[str, Any]] = {}
    for event in events:
        if event["type"] != "rating":
            continue
        kept = first.get(event["event_id"])
        if kept is None or place(event) < place(kept):
            first[event["event_id"]] = event
    return [
        {**event, "value": None if event["value"] != event["value"] else event["value"]} for event in first.values()
    ]


def known(event: Mapping[str, Any]) -> int:
    return event["timestamp"] if event["created"] is None else event["created"]


def naive(spec: AggregateSpec, events: Iterable[Mapping[str, Any]], key: tuple[Any, ...], at: int) -> dict | None:
    """The features of `key` as a sample at `at` should see them; None if no event counted by then."""
    period = {"event": 1, "hour": HOUR, "day": DAY}[spec.cadence]
    seen = []
    for event in deduplicated(events, spec.keys):
        genres, since = (
            genres_of(event["item_id"], event["timestamp"]) if "genre" in spec.keys else ([None], known(event))
        )
        for genre in genres:
            row = {**event, "genre": genre}
            tile_end = row["timestamp"] // period * period + period
            known_tile = -(-max(known(row), since) // period) * period
            enter = max(tile_end, known_tile)
            if tuple(row[name] for name in spec.keys) == key and enter <= at:
                seen.append({**row, "_full": tile_end, "_enter": enter})
    if not seen:
        return None
    values: dict[str, Any] = {}
    for feature in spec.features:
        if isinstance(feature, LastN):
            order = sorted(
                (row for row in seen if all(row[f.of] is not None for f in spec.features if isinstance(f, LastN))),
                key=lambda row: (row["_enter"], row["timestamp"], row["event_id"]),
            )
            if not order:
                return None
            values[feature.name] = [row[feature.of] for row in order][-feature.n :]
            continue
        for window in spec.windows if feature.windowed else ("all",):
            length = {"1d": DAY, "2d": 2 * DAY, "all": None}[window]
            inside = [row for row in seen if length is None or at < row["_full"] + length]
            name = f"{feature.name}_{window}" if feature.windowed else feature.name
            values[name] = naive_value(feature, inside)
    return values


def naive_value(feature: Any, rows: list[dict]) -> Any:
    chosen = [row for row in rows if CONDITIONS[feature.where](row)]
    if isinstance(feature, Count):
        return len(chosen)
    if isinstance(feature, Rate):
        if feature.prior is None:
            return len(chosen) / len(rows) if rows else None
        return (len(chosen) + feature.prior * feature.strength) / (len(rows) + feature.strength)
    if isinstance(feature, LastTime):
        return max((row["timestamp"] for row in chosen), default=None) // 1_000_000 if chosen else None
    if isinstance(feature, DistinctCount):
        return len({row[feature.of] for row in chosen if row[feature.of] is not None})
    numbers = [row[feature.of] for row in chosen if row[feature.of] is not None]
    if isinstance(feature, Sum):
        return float(sum(numbers))
    if not numbers:
        return None
    return {Mean: lambda: sum(numbers) / len(numbers), Min: lambda: min(numbers), Max: lambda: max(numbers)}[
        type(feature)
    ]()


def look_up(rows: Iterable[Mapping[str, Any]], spec: AggregateSpec, key: tuple[Any, ...], at: int) -> dict | None:
    """What a point-in-time join with the feature table (event_timestamp and created both by then) gives."""
    best = None
    for row in rows:
        if tuple(row[name] for name in spec.keys) != key or max(row["event_timestamp"], row["created"]) > at:
            continue
        if best is None or row["event_timestamp"] > best["event_timestamp"]:
            best = row
    return None if best is None else {name: best[name] for name in spec.columns}


def all_keys(spec: AggregateSpec) -> list[tuple[Any, ...]]:
    keys: list[tuple[Any, ...]] = [(user,) for user in (1, 2, 3)]
    if spec.keys == ("item_id",):
        return keys
    return [(*key, genre) for key in keys for genre in ("Comedy", "Drama")] if "genre" in spec.keys else keys


def probes(rows: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> list[int]:
    """Moments worth asking about: at, before and after each row and each event, and window lengths after events."""
    marks = {row["event_timestamp"] for row in rows}
    for event in events:
        marks |= {event["timestamp"] + length for length in (0, 1, DAY, DAY + 1, 2 * DAY + 1)} | {known(event)}
    return sorted({mark + step for mark in marks for step in (-1, 0, 1)})
