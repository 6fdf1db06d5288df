"""Layers as a whole: deep nesting, partial holdouts, every kind of unit, independence of arms, and what moves whom."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from itertools import combinations
from random import Random
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from experiments.hashing import bucket
from experiments.snapshot import Snapshot
from tests.experiments.test_assignment import USERS, arms, document, experiment
from tests.experiments.test_assignment_agreement import configuration

KINDS = ("user", "session", "device", "request")


def names(snapshot: Snapshot, **units: str) -> dict[str, str]:
    return {ref.experiment: ref.arm for ref in snapshot.assign(units).arms}


def by_every_kind(**changes: Any) -> dict[str, Any]:
    """A layer by each kind of unit, an experiment over all of it."""
    raw = {
        "parameters": {f"{kind}.x": {"type": "int", "default": 0} for kind in KINDS},
        "layers": {kind: {"unit": kind, "parameters": [f"{kind}.x"]} for kind in KINDS},
        "experiments": {f"by-{kind}": experiment(kind) for kind in KINDS},
    }
    return raw | changes


def test_a_domain_inside_a_domain_divides_its_share_of_the_share():
    """outer → (bucket of rank ≥ 4000) middle → (bucket of middle ≥ 6000) deep; each experiment where its layer is."""
    raw = document(
        {
            "top": experiment(buckets="0-3999"),
            "mid": experiment("middle", buckets="0-5999", arms={"t": {"weight": 100, "values": {"rank.x": 2}}}),
            "low": experiment("deep", arms={"t": {"weight": 100, "values": {"rank.x": 3}}}),
        },
        domains={"one": {"layer": "rank", "buckets": "4000-9999"}, "two": {"layer": "middle", "buckets": "6000-9999"}},
    )
    raw["layers"]["middle"] = {"unit": "user", "domain": "one", "parameters": ["rank.x"]}
    raw["layers"]["deep"] = {"unit": "user", "domain": "two", "parameters": ["rank.x"]}
    snapshot = Snapshot.of(raw)
    counts = Counter()
    for user in USERS:
        inner = "mid" if bucket("middle", user) < 6000 else "low"
        expected = "top" if bucket("rank", user) < 4000 else inner
        assert set(names(snapshot, user=user)) == {expected}
        counts[expected] += 1
    for name, share in (("top", 0.4), ("mid", 0.36), ("low", 0.24)):
        assert counts[name] / len(USERS) == pytest.approx(share, abs=0.03)


def test_a_global_holdout_of_named_layers_leaves_the_others_running():
    raw = by_every_kind(holdouts={"hold": {"unit": "user", "buckets": "0-4999", "layers": ["user", "session"]}})
    snapshot, plain = Snapshot.of(raw), Snapshot.of(by_every_kind())
    for i in range(200):
        units = {kind: f"{kind}{i}" for kind in KINDS}
        got, free = names(snapshot, **units), names(plain, **units)
        if got.pop("hold") == "holdout":
            assert got == {name: free[name] for name in ("by-device", "by-request")}
        else:
            assert got == free


def test_a_layer_looks_at_its_own_unit_alone():
    snapshot = Snapshot.of(by_every_kind())
    rng = Random(3)
    seen: dict[tuple[str, str], set[str]] = defaultdict(set)
    for _ in range(2000):
        units = {kind: f"{rng.randint(0, 40)}" for kind in KINDS}
        for name, arm in names(snapshot, **units).items():
            seen[name, units[name.removeprefix("by-")]].add(arm)
    assert len(seen) == 4 * 41
    assert all(len(found) == 1 for found in seen.values())
    sides = {kind: [min(seen[f"by-{kind}", str(i)]) for i in range(41)] for kind in KINDS}
    assert len({tuple(side) for side in sides.values()}) == 4, "the same id falls differently in each layer"


def test_a_group_by_user_excludes_across_layers_of_other_units():
    raw = by_every_kind(groups={"g": {"unit": "user"}})
    raw["experiments"]["by-session"] |= {"group": "g", "group_buckets": "0-4999"}
    raw["experiments"]["by-device"] |= {"group": "g", "group_buckets": "5000-9999"}
    snapshot = Snapshot.of(raw)
    found = defaultdict(set)
    for i in range(1500):
        units = {"user": str(i % 50), "session": f"s{i}", "device": f"d{i % 300}", "request": f"r{i}"}
        found[i % 50] |= names(snapshot, **units).keys() & {"by-session", "by-device"}
    assert {frozenset(kinds) for kinds in found.values()} == {frozenset({"by-session"}), frozenset({"by-device"})}


def test_the_arms_of_ten_layers_are_pairwise_independent_over_sequential_ids():
    """Through assignment as served: layers and experiments of similar names, 45 pairs, 100,000 sequential ids.

    Under independence the smallest of 45 p values is below 1e-4 in 0.4 % of seeds; the hash is fixed, so the test
    either always passes or always fails.
    """
    layers = [f"layer{i}" for i in range(10)]
    raw = {
        "parameters": {f"{layer}.x": {"type": "int", "default": -1} for layer in layers},
        "layers": {layer: {"unit": "user", "parameters": [f"{layer}.x"]} for layer in layers},
        "experiments": {
            f"exp{i}": experiment(
                layer,
                traffic=80,
                arms={arm: {"weight": 50, "values": {f"{layer}.x": k}} for k, arm in enumerate("ab")},
            )
            for i, layer in enumerate(layers)
        },
    }
    batch = Snapshot.of(raw).assign_many({"user": [str(i) for i in range(100_000)]})
    values = [np.asarray(batch.values(f"{layer}.x"), int) + 1 for layer in layers]  # 0: in none, else the arm
    p_values = []
    for one, other in combinations(values, 2):
        p_values.append(chi2_contingency(np.bincount(3 * one + other, minlength=9).reshape(3, 3)).pvalue)
    assert len(p_values) == 45
    assert min(p_values) > 1e-4 and sum(p < 0.01 for p in p_values) <= 3
    for value in values:
        assert np.bincount(value) / 100_000 == pytest.approx([0.2, 0.4, 0.4], abs=0.01)


# -- what moves a unit, and what does not: the table of docs/experiments.md -------------------------------------------

BASE = experiment(buckets=["2000-3999", "6000-6999"], traffic=60)


def before_and_after(**changes: Any) -> tuple[dict[str, str], dict[str, str]]:
    return tuple(arms(Snapshot.of(document({"e": raw})), "e") for raw in (BASE, BASE | changes))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "changes",
    [{"traffic": 61}, {"traffic": 100}, {"traffic": 100, "buckets": ["2000-3999", "6000-6999", "0-1999"]}],
)
def test_more_traffic_and_appended_buckets_add_and_move_nobody(changes):
    before, after = before_and_after(**changes)
    assert before.items() <= after.items() and len(before) < len(after)


@pytest.mark.parametrize(
    "changes",
    [
        {"traffic": 30},
        {"state": "stopped"},
        {"where": {"attribute": "country", "equals": "SE"}},
        {"end": "2026-02-01"},
    ],
)
def test_less_makes_units_leave_and_changes_nobody_s_arm(changes):
    before, after = before_and_after(**changes)
    assert after.items() <= before.items() and len(after) < len(before)


def test_a_holdout_and_the_switch_make_units_leave_and_change_nobody_s_arm():
    before = arms(Snapshot.of(document({"e": BASE})), "e")
    for changes in ({"holdouts": {"h": {"unit": "user", "buckets": "0-999"}}}, {"enabled": False}):
        after = arms(Snapshot.of(document({"e": BASE}, **changes)), "e")
        assert after.items() <= before.items() and len(after) < len(before)


def test_a_new_salt_of_an_experiment_moves_its_arms_and_of_a_layer_moves_everybody():
    before, after = before_and_after(salt="another")
    assert before.keys() == after.keys() and before != after
    raw = document({"e": BASE})
    raw["layers"]["rank"]["salt"] = "another"
    assert arms(Snapshot.of(raw), "e").keys() != before.keys()


def test_other_weights_move_some_and_only_between_arms():
    before, after = before_and_after(
        arms={"control": {"weight": 40}, "treatment": {"weight": 60, "values": {"rank.x": 1}}}
    )
    assert before.keys() == after.keys()
    moved = {user: (before[user], after[user]) for user in before if before[user] != after[user]}
    assert set(moved.values()) == {("control", "treatment")}


@pytest.mark.parametrize("seed", range(30))
def test_a_change_of_one_experiment_moves_nobody_in_another_of_any_configuration(seed):
    """Random configurations with domains, launches, holdouts, groups; but for those that require the changed one."""
    rng = Random(seed)
    raw = configuration(rng)
    changed = copy.deepcopy(raw)
    name = rng.choice(sorted(raw["experiments"]))
    one = changed["experiments"][name]
    one |= {"salt": "another", "where": {"attribute": "country", "equals": "FI"}}
    if "ramp" not in one:
        one["traffic"] = rng.randint(0, 100)
    one["arms"]["a"]["weight"], one["arms"]["b"]["weight"] = 12, 88
    tied = {name}
    for _ in raw["experiments"]:  # who requires one that is tied
        for other, spec in raw["experiments"].items():
            if any(required["experiment"] in tied for required in spec.get("requires", [])):
                tied.add(other)
    first, second = Snapshot.of(raw), Snapshot.of(changed)
    for i in range(300):
        units = {"user": f"u{i}", "device": f"d{i % 90}"}
        attributes = {"country": rng.choice(["SE", "NO", "FI"]), "age": rng.randint(0, 80), "vip": rng.random() < 0.5}
        before, after = (
            {ref.experiment: ref.arm for ref in snapshot.assign(units, attributes).arms if ref.experiment not in tied}
            for snapshot in (first, second)
        )
        assert before == after
