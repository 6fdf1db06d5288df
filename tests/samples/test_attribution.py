"""Attribution against a loop over rows: last and any touch, windows, clock skew, duplicates, any order."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plait.errors import SpecError, UnknownNameError
from plait.offline.attribution import attribute, fates, first_of_each, label_impressions, positives_by_user
from plait.offline.engine import Engine
from plait.offline.spec import AttributionSpec, LabelSpec, SampleSpec, parse_label

MICROS = pa.timestamp("us", tz="UTC")
START = datetime(2024, 5, 1, tzinfo=UTC)
SHOWN = pa.schema(
    [("request_id", pa.string()), ("item_id", pa.int64()), ("user_id", pa.int64()), ("timestamp", MICROS)]
)
TOLD = pa.schema(
    [
        ("event_id", pa.string()),
        ("type", pa.string()),
        ("request_id", pa.string()),
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("timestamp", MICROS),
        ("value", pa.float64()),
    ]
)

minutes = st.integers(0, 40)
impressions = st.lists(
    st.fixed_dictionaries(
        {"request": st.integers(0, 6), "item_id": st.integers(1, 3), "user_id": st.integers(1, 2), "minute": minutes}
    ),
    max_size=14,
    unique_by=lambda row: (row["request"], row["item_id"]),
)
feedback = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(["click", "rating", "dwell"]),
            "request": st.none() | st.integers(0, 8),
            "item_id": st.integers(1, 4),
            "user_id": st.integers(1, 3),
            "minute": minutes,
            "value": st.none() | st.integers(0, 5),
        }
    ),
    max_size=18,
)
specs = st.builds(
    AttributionSpec,
    join=st.sampled_from(["auto", "request", "user_item"]),
    touch=st.sampled_from(["last", "any"]),
    window=st.integers(1, 30).map(lambda m: timedelta(minutes=m)),
    skew=st.integers(0, 5).map(lambda m: timedelta(minutes=m)),
)


def shown_table(rows: list[dict]) -> pa.Table:
    made = [
        {
            "request_id": f"r{row['request']}",
            "item_id": row["item_id"],
            "user_id": row["user_id"],
            "timestamp": START + timedelta(minutes=row["minute"]),
        }
        for row in rows
    ]
    return pa.Table.from_pylist(made, schema=SHOWN)


def told_table(rows: list[dict]) -> pa.Table:
    made = [
        {
            "event_id": f"e{i}",
            "type": row["type"],
            "request_id": None if row["request"] is None else f"r{row['request']}",
            "user_id": row["user_id"],
            "item_id": row["item_id"],
            "timestamp": START + timedelta(minutes=row["minute"]),
            "value": row["value"],
        }
        for i, row in enumerate(rows)
    ]
    return pa.Table.from_pylist(made, schema=TOLD)


def naive_pairs(shown: list[dict], told: list[dict], spec: AttributionSpec) -> list[tuple]:
    """(request, item, event) of every credit, by looking at every impression for every feedback."""
    pairs = []
    for event in told:
        same_item = [row for row in shown if row["item_id"] == event["item_id"]]
        named = [row for row in same_item if event["request_id"] and row["request_id"] == event["request_id"]]
        users = [row for row in same_item if row["user_id"] == event["user_id"]]
        if spec.join == "request":
            candidates = named
        elif spec.join == "user_item":
            candidates = users
        else:
            candidates = named or users
        inside = [
            row
            for row in candidates
            if row["timestamp"] - spec.skew <= event["timestamp"] <= row["timestamp"] + spec.window
        ]
        if spec.touch == "last" and inside:
            inside = [max(inside, key=lambda row: (row["timestamp"], row["request_id"]))]
        pairs += [(row["request_id"], row["item_id"], event["event_id"]) for row in inside]
    return sorted(pairs)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shown=impressions, told=feedback, spec=specs, shuffle=st.randoms(use_true_random=False))
def test_attribution_agrees_with_a_loop_over_every_pair(engine: Engine, shown, told, spec, shuffle) -> None:
    shown_rows, told_rows = shown_table(shown), told_table(told)
    expected = naive_pairs(shown_rows.to_pylist(), told_rows.to_pylist(), spec)
    order = list(range(told_rows.num_rows))
    shuffle.shuffle(order)  # feedback may arrive in any order
    told_rows = told_rows.take(pa.array(order, pa.int64()))
    pairs = attribute(engine.from_arrow(shown_rows), engine.from_arrow(told_rows), spec, spec.window)
    got = [(row["request_id"], row["item_id"], row["event_id"]) for row in engine.to_arrow(pairs).to_pylist()]
    assert sorted(got) == expected


LABELS = (
    LabelSpec(name="click", types=("click",)),
    LabelSpec(name="like", types=("rating",), min_value=4),
    LabelSpec(name="long", types=("dwell",), min_value=6, total=True),
    LabelSpec(name="soon", types=("click", "rating"), window=timedelta(minutes=2)),
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shown=impressions, told=feedback, attribution=specs)
def test_labels_agree_with_a_loop_over_the_pairs(engine: Engine, shown, told, attribution) -> None:
    spec = SampleSpec(labels=LABELS, attribution=attribution)
    shown_rows, told_rows = shown_table(shown), told_table(told)
    expected = {}
    for row in shown_rows.to_pylist():
        key = (row["request_id"], row["item_id"])
        expected[key] = []
        for label in LABELS:
            of_type = [event for event in told_rows.to_pylist() if event["type"] in label.types]
            within = AttributionSpec(
                join=attribution.join, touch=attribution.touch, skew=attribution.skew, window=spec.window(label)
            )
            pairs = naive_pairs(shown_rows.to_pylist(), of_type, within)
            events = {event for *credited, event in pairs if tuple(credited) == key}
            values = [event["value"] for event in of_type if event["event_id"] in events]
            if label.min_value is None:
                bears = bool(values)
            elif label.total:
                known = [value for value in values if value is not None]
                bears = bool(known) and sum(known) >= label.min_value
            else:
                bears = any(value is not None and value >= label.min_value for value in values)
            expected[key].append(int(bears))
    table = engine.to_arrow(label_impressions(engine.from_arrow(shown_rows), engine.from_arrow(told_rows), spec))
    got = {(row["request_id"], row["item_id"]): [row[label.name] for label in LABELS] for row in table.to_pylist()}
    assert got == expected
    assert table.num_rows == shown_rows.num_rows


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shown=impressions, told=feedback, attribution=specs)
def test_where_feedback_went_agrees_with_a_loop(engine: Engine, shown, told, attribution) -> None:
    spec = SampleSpec(labels=LABELS[2:], attribution=attribution)  # windows of two lengths
    shown_rows, told_rows = shown_table(shown), told_table(told)
    expected = {}
    anywhere = AttributionSpec(join=attribution.join, touch="any", window=timedelta(days=9), skew=timedelta(days=9))
    seen = {(row["request_id"], row["item_id"]): row["timestamp"] for row in shown_rows.to_pylist()}
    for event in told_rows.to_pylist():
        windows = [spec.window(label) for label in spec.labels if event["type"] in label.types]
        if not windows:
            continue
        of_event = [seen[request, item] for request, item, _ in naive_pairs(shown_rows.to_pylist(), [event], anywhere)]
        behind = [event["timestamp"] - moment for moment in of_event]
        if any(-attribution.skew <= gap <= window for gap in behind for window in windows):
            fate = "credited"
        elif any(gap > window for gap in behind for window in windows):
            fate = "late"
        else:
            fate = "early" if behind else "none"
        expected[event["event_id"]] = fate
    out = engine.to_arrow(fates(engine.from_arrow(shown_rows), engine.from_arrow(told_rows), spec)).to_pylist()
    got = {}
    for row in out:
        named = [name for name in ("credited", "late", "early") if row[name]]
        assert len(named) < 2
        got[row["event_id"]] = (named or ["none"])[0]
    assert got == expected


def test_feedback_that_names_a_known_impression_is_not_given_to_another(engine: Engine) -> None:
    shown = shown_table(
        [
            {"request": 1, "item_id": 1, "user_id": 1, "minute": 0},
            {"request": 2, "item_id": 1, "user_id": 1, "minute": 30},
        ]
    )
    told = told_table([{"type": "click", "request": 1, "item_id": 1, "user_id": 1, "minute": 35, "value": None}])
    spec = AttributionSpec(join="auto", window=timedelta(minutes=10))
    pairs = attribute(engine.from_arrow(shown), engine.from_arrow(told), spec, spec.window)
    assert engine.to_arrow(pairs).num_rows == 0


def test_of_duplicate_rows_the_first_created_stays(engine: Engine) -> None:
    table = pa.table({"k": [1, 1, 2, 1], "created": [5, 3, 9, None], "v": ["b", "a", "c", "never"]})
    kept = engine.to_arrow(first_of_each(engine.from_arrow(table), ("k",), ("created", "v")))
    assert sorted(kept.column("v").to_pylist()) == ["a", "c"]


def test_a_click_outside_every_window_is_still_the_users_own(engine: Engine) -> None:
    shown = shown_table([{"request": 1, "item_id": 1, "user_id": 1, "minute": 0}])
    told = told_table([{"type": "click", "request": None, "item_id": 3, "user_id": 1, "minute": 40, "value": None}])
    spec = SampleSpec()
    labelled = label_impressions(engine.from_arrow(shown), engine.from_arrow(told), spec)
    own = positives_by_user(engine.from_arrow(told), labelled, spec.labels[0])
    assert engine.to_arrow(own).to_pylist() == [{"user_id": 1, "item_id": 3}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("click", LabelSpec(name="click", types=("click",))),
        ("like=rating>=4", LabelSpec(name="like", types=("rating",), min_value=4.0)),
        ("any=click|purchase", LabelSpec(name="any", types=("click", "purchase"))),
        ("long = sum(dwell) >= 30", LabelSpec(name="long", types=("dwell",), min_value=30.0, total=True)),
    ],
)
def test_labels_can_be_written_in_one_line(text: str, expected: LabelSpec) -> None:
    assert parse_label(text) == expected


@pytest.mark.parametrize("text", ["", "a=b>4", "a=sum(b", "weight=click", "long=sum(dwell)"])
def test_a_label_that_cannot_be_says_why(text: str) -> None:
    with pytest.raises(SpecError, match="label"):
        parse_label(text)


def test_an_unknown_join_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'user_item'"):
        AttributionSpec(join="useritem")
