"""Splits, filters and weights against loops over rows."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plait.offline.engine import Engine
from plait.offline.filters import filter_steps, with_session
from plait.offline.hashing import draw
from plait.offline.spec import FilterSpec, SplitSpec, WeightSpec
from plait.offline.splits import with_split
from plait.offline.weights import with_weights

START = datetime(2024, 5, 1, tzinfo=UTC)
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("request_id", pa.string()),
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("timestamp", pa.timestamp("us", tz="UTC")),
        ("scene", pa.string()),
        ("position", pa.int32()),
        ("propensity", pa.float64()),
        ("click", pa.int8()),
    ]
)
QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}

events = st.lists(
    st.fixed_dictionaries(
        {
            "user_id": st.integers(1, 4),
            "item_id": st.integers(1, 5),
            "hour": st.integers(0, 60),
            "position": st.none() | st.integers(1, 5),
            "propensity": st.none() | st.sampled_from([0.0, 0.01, 0.25, 1.0]),
            "click": st.integers(0, 1),
            "scene": st.sampled_from(["home", "mail"]),
        }
    ),
    min_size=1,
    max_size=40,
)


def table_of(rows: list[dict]) -> pa.Table:
    made = [
        {
            **{key: value for key, value in row.items() if key != "hour"},
            "row": i,
            "request_id": f"u{row['user_id']}h{row['hour']}",
            "timestamp": START + timedelta(hours=row["hour"]),
        }
        for i, row in enumerate(rows)
    ]
    return pa.Table.from_pylist(made, schema=SCHEMA)


def naive_split(rows: list[dict], spec: SplitSpec, seed: int) -> dict[int, str]:
    by_user = defaultdict(list)
    for row in rows:
        by_user[row["user_id"]].append(row)
    out = {}
    if spec.kind == "time":
        stamps = sorted(row["timestamp"] for row in rows)
        cuts = [round(len(rows) * share) for share in (spec.train, spec.train + spec.valid)]
        limits = [stamps[cut] if cut < len(rows) else None for cut in cuts]
        for row in rows:
            past = [limit is not None and row["timestamp"] >= limit for limit in limits]
            out[row["row"]] = "test" if past[1] else "valid" if past[0] else "train"
    elif spec.kind == "user_time":
        for mine in by_user.values():
            for row in mine:
                before = sum(other["timestamp"] < row["timestamp"] for other in mine)
                n = float(len(mine))
                past = [before >= n * share for share in (spec.train, spec.train + spec.valid)]
                out[row["row"]] = "test" if past[1] else "valid" if past[0] else "train"
    elif spec.kind == "leave_one_out":
        for mine in by_user.values():
            requests = sorted({(row["timestamp"], row["request_id"]) for row in mine}, reverse=True)
            for row in mine:
                back = requests.index((row["timestamp"], row["request_id"]))
                last = {0: "test", 1: "valid"} if len(requests) > 2 else {}
                out[row["row"]] = last.get(back, "train")
    else:
        import numpy as np

        for row in rows:
            share = int(draw([np.array([row["user_id"]])], seed=seed)[0]) / 2**32
            out[row["row"]] = "train" if share < spec.train else "valid" if share < spec.train + spec.valid else "test"
    return out


@settings(max_examples=60, **QUIET)
@given(
    rows=events,
    kind=st.sampled_from(["time", "user_time", "leave_one_out", "user"]),
    shares=st.sampled_from([(0.8, 0.1), (0.5, 0.25), (0.6, 0.0), (1.0, 0.0)]),
    seed=st.integers(0, 3),
)
def test_splits_agree_with_a_loop(engine: Engine, rows, kind, shares, seed) -> None:
    spec = SplitSpec(kind=kind, train=shares[0], valid=shares[1])
    table = table_of(rows)
    out = engine.to_arrow(with_split(engine, engine.from_arrow(table), spec, seed=seed)).to_pylist()
    got = {row["row"]: row["split"] for row in out}
    assert got == naive_split(table.to_pylist(), spec, seed)
    of_request = defaultdict(set)
    for row in out:
        of_request[row["request_id"]].add(row["split"])
    assert all(len(splits) == 1 for splits in of_request.values())
    if kind == "time" and {"train", "test"} <= set(got.values()):
        latest = max(row["timestamp"] for row in out if row["split"] == "train")
        assert latest < min(row["timestamp"] for row in out if row["split"] == "test")


def naive_filter(rows: list[dict], spec: FilterSpec) -> list[int]:
    if spec.scenes:
        rows = [row for row in rows if row["scene"] in spec.scenes]
    if spec.max_per_day is not None:
        days = defaultdict(int)
        for row in rows:
            days[row["user_id"], row["timestamp"].date()] += 1
        bots = {user for (user, _), n in days.items() if n > spec.max_per_day}
        rows = [row for row in rows if row["user_id"] not in bots]
    if spec.max_click_rate is not None:
        eager = set()
        for user in {row["user_id"] for row in rows}:
            clicks = [row["click"] for row in rows if row["user_id"] == user]
            if len(clicks) >= spec.bot_min_impressions and sum(clicks) > len(clicks) * spec.max_click_rate:
                eager.add(user)
        rows = [row for row in rows if row["user_id"] not in eager]
    if spec.min_session is not None or spec.max_session is not None:
        sessions = naive_sessions(rows, spec.session_gap)
        sizes = defaultdict(int)
        for row in rows:
            sizes[row["user_id"], sessions[row["row"]]] += 1
        low, high = spec.min_session or 1, spec.max_session or 10**9
        rows = [row for row in rows if low <= sizes[row["user_id"], sessions[row["row"]]] <= high]
    for key, least in (("user_id", spec.min_user), ("item_id", spec.min_item)):
        if least is not None:
            counts = defaultdict(int)
            for row in rows:
                counts[row[key]] += 1
            rows = [row for row in rows if counts[row[key]] >= least]
    return sorted(row["row"] for row in rows)


def naive_sessions(rows: list[dict], gap: timedelta) -> dict[int, int]:
    out = {}
    for user in {row["user_id"] for row in rows}:
        session, before = 0, None
        for row in sorted((row for row in rows if row["user_id"] == user), key=lambda row: row["timestamp"]):
            if before is not None and row["timestamp"] > before + gap:
                session += 1
            out[row["row"]], before = session, row["timestamp"]
    return out


filter_specs = st.builds(
    FilterSpec,
    scenes=st.sampled_from([(), ("home",)]),
    max_per_day=st.none() | st.integers(1, 8),
    max_click_rate=st.none() | st.sampled_from([0.5, 0.9]),
    bot_min_impressions=st.integers(1, 4),
    session_gap=st.integers(1, 6).map(lambda h: timedelta(hours=h)),
    min_session=st.none() | st.integers(1, 3),
    max_session=st.none() | st.integers(1, 5),
    min_user=st.none() | st.integers(1, 5),
    min_item=st.none() | st.integers(1, 5),
)


@settings(max_examples=60, **QUIET)
@given(rows=events, spec=filter_specs)
def test_filters_agree_with_a_loop(engine: Engine, rows, spec) -> None:
    table = table_of(rows)
    start = engine.from_arrow(table)
    out = [start, *(after for _, after in filter_steps(start, spec, "click"))][-1]
    assert sorted(engine.to_arrow(out).column("row").to_pylist()) == naive_filter(table.to_pylist(), spec)
    assert set(out.columns) == set(SCHEMA.names)


def test_impressions_of_one_instant_share_a_session(engine: Engine) -> None:
    hours = [0, 0, 5, 5, 5, 6]
    rows = [
        {"user_id": 1, "item_id": 1, "hour": h, "position": 1, "propensity": None, "click": 0, "scene": "home"}
        for h in hours
    ]
    out = engine.to_arrow(with_session(engine.from_arrow(table_of(rows)), timedelta(hours=2)).order_by("row"))
    assert out.column("session").to_pylist() == [0, 0, 1, 1, 1, 1]


@settings(max_examples=40, **QUIET)
@given(
    rows=events,
    kind=st.sampled_from(["none", "propensity", "position"]),
    clip=st.sampled_from([1.0, 3.0, 50.0]),
    eta=st.sampled_from([0.0, 1.0, 1.7]),
    normalise=st.booleans(),
)
def test_weights_agree_with_a_loop(engine: Engine, rows, kind, clip, eta, normalise) -> None:
    spec = WeightSpec(kind=kind, clip=clip, eta=eta, normalise=normalise)
    table = table_of(rows)
    split = engine.from_arrow(table.append_column("split", pa.array(["train", "test"] * len(rows))[: len(rows)]))
    expected = {}
    for row in table.to_pylist():
        weight = 1.0
        if kind == "propensity" and row["propensity"]:
            weight = min(1 / row["propensity"], clip)
        if kind == "position" and row["click"] and row["position"]:
            weight = min(row["position"] ** eta, clip)
        expected[row["row"]] = weight
    train = [expected[row] for row in range(0, len(rows), 2)]
    mean = sum(train) / len(train) if normalise and kind != "none" else 1.0
    out = engine.to_arrow(with_weights(engine, split, spec, "click"))
    assert out.schema.field("weight").type == pa.float32()
    for row in out.to_pylist():
        assert row["weight"] == pytest.approx(expected[row["row"]] / mean, rel=1e-5)
