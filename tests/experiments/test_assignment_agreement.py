"""Three ways to assign — compiled, explained from the declaration, vectorised — agree on random configurations."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.problems import ConfigError
from experiments.snapshot import Snapshot

START = datetime(2026, 3, 1, tzinfo=UTC)
KINDS = ["user", "device"]
PARAMETERS = ["p.a", "p.b", "q.a", "q.b", "r.a"]


@st.composite
def shares(draw, n: int) -> list[str]:
    """n disjoint bucket ranges, each at least half of its share of the layer."""
    width = 10_000 // n
    return [f"{i * width}-{i * width + draw(st.integers(width // 2, width - 1))}" for i in range(n)]


leaves = st.one_of(
    st.builds(
        lambda v: {"attribute": "country", "in": v},
        st.lists(st.sampled_from(["SE", "NO", "FI"]), min_size=1, unique=True),
    ),
    st.builds(lambda v: {"attribute": "age", "at_least": v}, st.integers(0, 60)),
    st.builds(lambda v: {"attribute": "vip", "equals": v}, st.booleans()),
)
conditions = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda v: {"all": v}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda v: {"any": v}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda v: {"not": v}, inner),
    ),
    max_leaves=4,
)


@st.composite
def experiment(draw, layer: str, buckets: str, owned: list[str]) -> dict[str, Any]:
    split = draw(st.integers(0, 10_000))
    values = st.dictionaries(st.sampled_from(owned), st.integers(1, 9), max_size=len(owned))
    raw: dict[str, Any] = {
        "layer": layer,
        "state": draw(st.sampled_from(["running", "running", "running", "draft", "stopped"])),
        "buckets": buckets,
        "arms": {
            "a": {"weight": split / 100, "values": draw(values)},
            "b": {"weight": (10_000 - split) / 100, "values": {**draw(values), owned[0]: draw(st.integers(1, 9))}},
        },
    }
    if draw(st.booleans()):
        raw["where"] = draw(conditions)
    schedule = draw(st.sampled_from(["none", "traffic", "ramp", "window"]))
    if schedule == "traffic":
        raw["traffic"] = draw(st.integers(0, 100))
    elif schedule == "ramp":
        raw["ramp"] = [
            {"at": (START + timedelta(days=day)).isoformat(), "traffic": percent}
            for day, percent in ((1, draw(st.integers(0, 50))), (2, draw(st.integers(50, 100))))
        ]
    elif schedule == "window":
        raw |= {"start": (START + timedelta(days=1)).isoformat(), "end": (START + timedelta(days=2)).isoformat()}
    if draw(st.integers(0, 3)) == 0:
        raw["arms"]["b"]["testers"] = [f"tester-{layer}-{buckets}"]
    return raw


@st.composite
def configurations(draw) -> dict[str, Any]:
    """Two layers, a launch layer, a nested domain with a layer of another unit, holdouts, groups, prerequisites."""
    p, q, launch, inner = (draw(shares(n)) for n in (4, 3, 1, 2))
    experiments = {
        "p1": draw(experiment("p", p[0], ["p.a", "p.b"])),
        "p2": draw(experiment("p", p[1], ["p.a", "p.b"])),
        "q1": draw(experiment("q", q[0], ["q.a", "q.b"])),
        "q2": draw(experiment("q", q[1], ["q.a", "q.b"])),
        "l1": draw(experiment("launch", launch[0], ["p.a", "q.a"])),
        "n1": draw(experiment("inner", inner[0], ["p.b"])),
        "n2": draw(experiment("inner", inner[1], ["p.b"])),
    }
    if draw(st.booleans()):
        first, second = draw(shares(2))
        experiments["p1"] |= {"group": "g", "group_buckets": first}
        experiments["q1"] |= {"group": "g", "group_buckets": second}
    chain = draw(st.sampled_from(["none", "p2 on q2", "q2 on n1"]))
    if chain == "p2 on q2":
        experiments["p2"]["requires"] = [
            {"experiment": "q2", **draw(st.sampled_from([{}, {"arms": ["a"]}, {"arms": ["b"]}]))}
        ]
    elif chain == "q2 on n1":
        experiments["q2"]["requires"] = [{"experiment": "n1"}]
    for name in ("p2", "q2") if chain == "p2 on q2" else ("q2", "n1"):
        experiments[name]["state"] = "running"
        experiments[name].pop("where", None)
    holdouts: dict[str, Any] = {}
    if draw(st.booleans()):
        holdouts["of-q"] = {"layer": "q", "buckets": q[2]}
    if draw(st.booleans()):
        holdouts["everywhere"] = {"unit": "user", "buckets": "0-1999"}
    if draw(st.booleans()):
        holdouts["devices"] = {"unit": "device", "buckets": "3000-5999", "layers": ["p", "inner"]}
    return {
        "enabled": draw(st.sampled_from([True] * 9 + [False])),
        "parameters": {name: {"type": "int", "default": 0} for name in PARAMETERS},
        "layers": {
            "p": {"unit": "user", "parameters": ["p.*"]},
            "q": {"unit": draw(st.sampled_from(KINDS)), "parameters": ["q.*"]},
            "launch": {"unit": "user", "launch": True, "parameters": ["p.a", "q.a"]},
            "inner": {"unit": draw(st.sampled_from(KINDS)), "domain": "nested", "parameters": ["p.b"]},
        },
        "domains": {"nested": {"layer": "p", "buckets": [p[2], p[3]]}},
        "groups": {"g": {"unit": "user"}},
        "holdouts": holdouts,
        "experiments": experiments,
    }


def compile_or_drop(document: dict[str, Any]) -> Snapshot:
    """The snapshot; prerequisites that happen to be dead are dropped, anything else wrong is the test's fault."""
    try:
        return Snapshot.of(document)
    except ConfigError as error:
        assert all("dead prerequisite" in str(problem) for problem in error.problems), error
        for raw in document["experiments"].values():
            raw.pop("requires", None)
        return Snapshot.of(document)


attribute_sets = st.fixed_dictionaries(
    {},
    optional={
        "country": st.sampled_from(["SE", "NO", "DK", None, 3]),
        "age": st.sampled_from([3, 18, 40, 59.5, "old", True, None]),
        "vip": st.sampled_from([True, False, 1, 0, None]),
    },
)
MOMENTS = [START + timedelta(days=day) for day in (0, 1, 1.5, 2, 9)]


@given(
    configurations(),
    st.lists(attribute_sets, min_size=25, max_size=25),
    st.sampled_from(MOMENTS),
    st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_compiled_explained_and_vectorised_assignment_agree(document, attributes, at, seed):
    snapshot = compile_or_drop(document)
    testers = [t for e in document["experiments"].values() for t in e["arms"]["b"].get("testers", [])]
    users: list[Any] = ([*testers, None, "", "x" * 10_000, 7] + [f"u{seed + i}" for i in range(25)])[:25]
    devices: list[Any] = [f"d{(seed + i) // 2}" for i in range(25)]
    columns = {name: [row.get(name) for row in attributes] for name in ("country", "age", "vip")}
    batch = snapshot.assign_many({"user": users, "device": devices}, columns, at)
    for row in range(25):
        units = {"user": users[row], "device": devices[row]}
        single = snapshot.assign(units, attributes[row], at)
        explained = snapshot.explain(units, attributes[row], at)
        assert dict(single.values) == dict(explained.values)
        assert {name: batch.values(name)[row] for name in PARAMETERS} == dict(single.values)
        chosen = {
            (ref.layer, ref.experiment, ref.arm, ref.forced)
            for ref in single.arms
            if ref.experiment in document["experiments"]
        }
        assert chosen == {(e.layer, e.experiment, e.arm, e.forced) for e in explained.layers if e.arm}
        for ref in single.arms:
            assert batch.arm_of(ref.experiment)[row].as_py() == ref.arm
            assert bool(batch.forced(ref.experiment)[row]) == ref.forced
        in_batch = [
            name for name in (*document["experiments"], *document["holdouts"]) if batch.arm_of(name)[row].as_py()
        ]
        assert sorted(in_batch) == sorted(ref.experiment for ref in single.arms)
        assert {e.code for e in single.errors} == {e.code for e in batch.errors.get(row, ())}


def test_a_batch_reads_arrow_columns_and_gives_an_arrow_table():
    snapshot = Snapshot.of(
        {
            "parameters": {"p.a": {"type": "int", "default": 0}},
            "layers": {"p": {"unit": "user", "parameters": ["p.a"]}},
            "experiments": {
                "e": {
                    "layer": "p",
                    "state": "running",
                    "buckets": "all",
                    "where": {"attribute": "country", "equals": "SE"},
                    "arms": {"a": {"weight": 50}, "b": {"weight": 50, "values": {"p.a": 1}}},
                }
            },
        }
    )
    table = pa.table({"user": ["1", "2", "3", "4"], "country": ["SE", "NO", "SE", None]})
    batch = snapshot.assign_many({"user": table["user"]}, table)
    assert batch.table()["row"].to_pylist() == [0, 2]
    assert batch.table().column_names == ["row", "layer", "experiment", "arm", "forced"]
    expected = [snapshot.assign({"user": str(i + 1)}, {"country": "SE"}).arms[0].arm for i in (0, 2)]
    assert batch.table()["arm"].to_pylist() == expected


def test_columns_of_different_lengths_are_refused():
    snapshot = Snapshot.empty()
    with pytest.raises(Exception, match="different lengths"):
        snapshot.assign_many({"user": ["1", "2"]}, {"country": ["SE"]})


def test_an_empty_batch_is_an_empty_answer():
    batch = Snapshot.empty().assign_many({"user": []})
    assert (batch.n_rows, batch.table().num_rows, dict(batch.errors)) == (0, 0, {})
