"""Three ways to assign — compiled, explained from the declaration, vectorised — agree on random configurations."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import pyarrow as pa
import pytest

from experiments.snapshot import Snapshot

START = datetime(2026, 3, 1, tzinfo=UTC)
KINDS = ["user", "device"]
PARAMETERS = ["p.a", "p.b", "q.a", "q.b", "r.a"]


def shares(rng: Random, n: int) -> list[str]:
    """n disjoint bucket ranges, each at least half of its share of the layer."""
    width = 10_000 // n
    return [f"{i * width}-{i * width + rng.randint(width // 2, width - 1)}" for i in range(n)]


def condition(rng: Random, depth: int = 2) -> dict[str, Any]:
    kind = rng.choice(["country", "age", "vip"] + ["all", "any", "not"] * (depth > 0))
    if kind in ("all", "any"):
        return {kind: [condition(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    if kind == "not":
        return {"not": condition(rng, depth - 1)}
    if kind == "country":
        return {"attribute": "country", "in": rng.sample(["SE", "NO", "FI"], rng.randint(1, 3))}
    return (
        {"attribute": "age", "at_least": rng.randint(0, 60)}
        if kind == "age"
        else {"attribute": "vip", "equals": rng.random() < 0.5}
    )


def experiment(rng: Random, layer: str, buckets: str, owned: list[str]) -> dict[str, Any]:
    split = rng.choice([0, 2_500, 5_000, rng.randint(0, 10_000)])

    def values() -> dict[str, int]:
        return {name: rng.randint(1, 9) for name in owned if rng.random() < 0.6}

    raw: dict[str, Any] = {
        "layer": layer,
        "state": rng.choice(["running"] * 5 + ["draft", "stopped"]),
        "buckets": buckets,
        "arms": {
            "a": {"weight": split / 100, "values": values()},
            "b": {"weight": (10_000 - split) / 100, "values": {**values(), owned[0]: rng.randint(1, 9)}},
        },
    }
    if rng.random() < 0.5:
        raw["where"] = condition(rng)
    schedule = rng.choice(["none", "none", "traffic", "ramp", "window"])
    if schedule == "traffic":
        raw["traffic"] = rng.randint(0, 100)
    elif schedule == "ramp":
        steps = ((1, rng.randint(0, 50)), (2, rng.randint(50, 100)))
        raw["ramp"] = [{"at": (START + timedelta(days=day)).isoformat(), "traffic": percent} for day, percent in steps]
    elif schedule == "window":
        raw |= {"start": (START + timedelta(days=1)).isoformat(), "end": (START + timedelta(days=2)).isoformat()}
    if rng.random() < 0.25:
        raw["arms"]["b"]["testers"] = [f"tester-{layer}-{buckets}"]
    return raw


def configuration(rng: Random) -> dict[str, Any]:
    """Two layers, a launch layer, a nested domain with a layer of another unit, holdouts, groups, prerequisites."""
    p, q, launch, inner = (shares(rng, n) for n in (4, 3, 1, 2))
    experiments = {
        "p1": experiment(rng, "p", p[0], ["p.a", "p.b"]),
        "p2": experiment(rng, "p", p[1], ["p.a", "p.b"]),
        "q1": experiment(rng, "q", q[0], ["q.a", "q.b"]),
        "q2": experiment(rng, "q", q[1], ["q.a", "q.b"]),
        "l1": experiment(rng, "launch", launch[0], ["p.a", "q.a"]),
        "n1": experiment(rng, "inner", inner[0], ["p.b"]),
        "n2": experiment(rng, "inner", inner[1], ["p.b"]),
    }
    if rng.random() < 0.5:
        first, second = shares(rng, 2)
        experiments["p1"] |= {"group": "g", "group_buckets": first}
        experiments["q1"] |= {"group": "g", "group_buckets": second}
    chain = rng.choice([None, ("p2", "q2"), ("q2", "n1")])
    if chain:
        experiments[chain[0]]["requires"] = [
            {"experiment": chain[1], **rng.choice([{}, {"arms": ["a"]}, {"arms": ["b"]}])}
        ]
        for name in chain:  # alive, else the prerequisite would be a fault
            experiments[name]["state"] = "running"
            for schedule in ("start", "end"):
                experiments[name].pop(schedule, None)
            for arm in experiments[name]["arms"].values():
                arm["weight"] = 50
    holdouts: dict[str, Any] = {}
    if rng.random() < 0.5:
        holdouts["of-q"] = {"layer": "q", "buckets": q[2]}
    if rng.random() < 0.5:
        holdouts["everywhere"] = {"unit": "user", "buckets": "0-1999"}
    if rng.random() < 0.5:
        holdouts["devices"] = {"unit": "device", "buckets": "3000-5999", "layers": ["p", "inner"]}
    return {
        "enabled": rng.random() < 0.95,
        "parameters": {name: {"type": "int", "default": 0} for name in PARAMETERS},
        "layers": {
            "p": {"unit": "user", "parameters": ["p.*"]},
            "q": {"unit": rng.choice(KINDS), "parameters": ["q.*"]},
            "launch": {"unit": "user", "launch": True, "parameters": ["p.a", "q.a"]},
            "inner": {"unit": rng.choice(KINDS), "domain": "nested", "parameters": ["p.b"]},
        },
        "domains": {"nested": {"layer": "p", "buckets": [p[2], p[3]]}},
        "groups": {"g": {"unit": "user"}},
        "holdouts": holdouts,
        "experiments": experiments,
    }


def attributes_of(rng: Random) -> dict[str, Any]:
    choices: dict[str, list[Any]] = {
        "country": ["SE", "NO", "DK", None, 3],
        "age": [3, 18, 40, 59.5, "old", True, None],
        "vip": [True, False, 1, 0, None],
    }
    return {name: rng.choice(values) for name, values in choices.items() if rng.random() < 0.9}


MOMENTS = [START + timedelta(days=day) for day in (0, 1, 1.5, 2, 9)]


@pytest.mark.parametrize("seed", range(40))
def test_compiled_explained_and_vectorised_assignment_agree(seed):
    rng = Random(seed)
    document = configuration(rng)
    snapshot = Snapshot.of(document)
    testers = [t for e in document["experiments"].values() for t in e["arms"]["b"].get("testers", [])]
    users: list[Any] = ([*testers, None, "", "x" * 10_000, 7] + [f"u{seed}-{i}" for i in range(60)])[:60]
    devices: list[Any] = [f"d{seed}-{i // 2}" for i in range(60)]
    attributes = [attributes_of(rng) for _ in users]
    columns = {name: [row.get(name) for row in attributes] for name in ("country", "age", "vip")}
    names = [*document["experiments"], *document["holdouts"]]
    for at in MOMENTS:
        batch = snapshot.assign_many({"user": users, "device": devices}, columns, at)
        values = {name: batch.values(name) for name in PARAMETERS}
        arms = {name: batch.arm_of(name).to_pylist() for name in names}
        forced = {name: batch.forced(name) for name in names}
        for row in range(60):
            units = {"user": users[row], "device": devices[row]}
            single = snapshot.assign(units, attributes[row], at)
            explained = snapshot.explain(units, attributes[row], at)
            assert dict(single.values) == dict(explained.values) == {name: values[name][row] for name in PARAMETERS}
            chosen = {
                (r.layer, r.experiment, r.arm, r.forced) for r in single.arms if r.experiment in document["experiments"]
            }
            assert chosen == {(e.layer, e.experiment, e.arm, e.forced) for e in explained.layers if e.arm}
            assert {r.experiment: (r.arm, r.forced) for r in single.arms} == {
                name: (arms[name][row], bool(forced[name][row])) for name in names if arms[name][row]
            }
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
