"""What units get: layers, domains, launches, holdouts, groups, prerequisites, testers, ramps, and bad units."""

from __future__ import annotations

import copy
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.hashing import bucket
from experiments.snapshot import Snapshot
from plait.errors import UnknownNameError

AT = datetime(2026, 3, 1, tzinfo=UTC)
USERS = [f"u{i}" for i in range(3000)]


def experiment(layer: str = "rank", **changes: Any) -> dict[str, Any]:
    """Control sets nothing, treatment sets the layer's parameter to 1; all buckets, half and half."""
    raw = {
        "layer": layer,
        "state": "running",
        "buckets": "all",
        "arms": {"control": {"weight": 50}, "treatment": {"weight": 50, "values": {f"{layer}.x": 1}}},
    }
    return raw | changes


def document(experiments: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Layers rank and recall by user, page by request; parameters x (0) and y (0) in each."""
    layers = {"rank": "user", "recall": "user", "page": "request"}
    raw: dict[str, Any] = {
        "parameters": {f"{layer}.{name}": {"type": "int", "default": 0} for layer in layers for name in "xy"},
        "layers": {layer: {"unit": unit, "parameters": [f"{layer}.*"]} for layer, unit in layers.items()},
        "experiments": experiments,
    }
    return raw | changes


def arms(snapshot: Snapshot, name: str, users: list[str] = USERS, at: datetime = AT) -> dict[str, str]:
    """Users in the experiment, and their arms."""
    found = {user: {ref.experiment: ref.arm for ref in snapshot.assign({"user": user}, at=at).arms} for user in users}
    return {user: got[name] for user, got in found.items() if name in got}


def test_a_unit_gets_its_arms_values_and_defaults_for_the_rest():
    snapshot = Snapshot.of(document({"e": experiment()}), version=7)
    user = next(user for user, arm in arms(snapshot, "e").items() if arm == "treatment")
    assignment = snapshot.assign({"user": user})
    assert dict(assignment.values) == {
        f"{layer}.{n}": int((layer, n) == ("rank", "x")) for layer in ("rank", "recall", "page") for n in "xy"
    }
    assert assignment.version == 7
    ref = assignment.arms[0]
    assert (ref.layer, ref.experiment, ref.arm, ref.forced, ref.unit_kind, ref.unit) == (
        "rank",
        "e",
        "treatment",
        False,
        "user",
        user,
    )


def test_arms_get_their_weights():
    raw = experiment(arms={"a": {"weight": 70, "values": {"rank.x": 1}}, "b": {"weight": 30}, "c": {"weight": 0}})
    counts = Counter(arms(Snapshot.of(document({"e": raw})), "e").values())
    assert 0.66 < counts["a"] / len(USERS) < 0.74
    assert counts["c"] == 0


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.sampled_from(["0-9999", "100-5099", ["5000-9999", "0-999"]]))
@settings(max_examples=25, deadline=None)
def test_raising_traffic_moves_nobody_who_is_already_in(one, other, buckets):
    low, high = sorted((one, other))
    before, after = (
        arms(Snapshot.of(document({"e": experiment(buckets=buckets, traffic=t / 100)})), "e", USERS[:400])
        for t in (low, high)
    )
    assert before.items() <= after.items()


def test_traffic_is_a_share_of_the_experiments_own_buckets():
    snapshot = Snapshot.of(document({"e": experiment(buckets="0-4999", traffic=20)}))
    assert set(arms(snapshot, "e")) == {user for user in USERS if bucket("rank", user) < 1000}


def test_changing_one_experiment_moves_nobody_in_another():
    experiments = {
        "first": experiment(buckets="0-3999"),
        "second": experiment(buckets="4000-7999"),
        "third": experiment("recall"),
    }
    before = Snapshot.of(document(experiments))
    changed = copy.deepcopy(experiments)
    changed["first"] |= {
        "traffic": 30,
        "where": {"attribute": "country", "equals": "SE"},
        "salt": "new",
        "buckets": "0-1999",
    }
    changed["first"]["arms"] = {"a": {"weight": 10, "values": {"rank.y": 3}}, "b": {"weight": 90}}
    changed["added"] = experiment(buckets="2000-3999")
    after = Snapshot.of(document(changed))
    for name in ("second", "third"):
        assert arms(before, name) == arms(after, name)


def test_one_layer_has_at_most_one_experiment_for_a_unit_and_layers_overlap():
    snapshot = Snapshot.of(
        document({"a": experiment(buckets="0-4999"), "b": experiment(buckets="5000-9999"), "c": experiment("recall")})
    )
    for user in USERS[:300]:
        layers = [ref.layer for ref in snapshot.assign({"user": user}).arms]
        assert sorted(layers) == ["rank", "recall"]


def test_a_launch_moves_defaults_and_an_experiment_overrides_it():
    raw = document(
        {
            "launch": experiment("ship", arms={"on": {"weight": 100, "values": {"rank.x": 5, "rank.y": 5}}}),
            "e": experiment(),
        }
    )
    raw["layers"]["ship"] = {"unit": "user", "launch": True, "parameters": ["rank.*"]}
    snapshot = Snapshot.of(raw)
    in_arm = arms(snapshot, "e")
    for user in USERS[:200]:
        values = snapshot.assign({"user": user}).values
        assert values["rank.x"] == (1 if in_arm[user] == "treatment" else 5)
        assert values["rank.y"] == 5


def test_nested_domains_divide_a_share_of_their_layer_anew():
    raw = document(
        {
            "outer": experiment(buckets="0-4999"),
            "in": experiment("inner", arms={"t": {"weight": 100, "values": {"rank.x": 2}}}),
        },
        domains={"half": {"layer": "rank", "buckets": "5000-9999"}},
    )
    raw["layers"]["inner"] = {"unit": "user", "domain": "half", "parameters": ["rank.x"]}
    snapshot = Snapshot.of(raw)
    for user in USERS[:300]:
        names = {ref.experiment for ref in snapshot.assign({"user": user}).arms}
        assert names == ({"outer"} if bucket("rank", user) < 5000 else {"in"})


def test_a_non_overlapping_domain_has_one_experiment_over_every_parameter():
    """One layer on top owns all; beside the domain of overlapping layers, one experiment owns whole users."""
    raw = document(
        {
            "alone": experiment(
                "top", buckets="0-999", arms={"on": {"weight": 100, "values": {"rank.x": 1, "recall.x": 1}}}
            ),
            "r": experiment("rank"),
            "c": experiment("recall"),
        },
        domains={"overlapping": {"layer": "top", "buckets": "1000-9999"}},
    )
    raw["layers"]["top"] = {"unit": "user", "parameters": ["rank.*", "recall.*"]}
    for layer in ("rank", "recall"):
        raw["layers"][layer]["domain"] = "overlapping"
    snapshot = Snapshot.of(raw)
    kinds = Counter(tuple(sorted(ref.experiment for ref in snapshot.assign({"user": user}).arms)) for user in USERS)
    assert set(kinds) == {("alone",), ("c", "r")}
    assert 0.07 < kinds[("alone",)] / len(USERS) < 0.13


def test_a_global_holdout_keeps_units_from_everything_and_marks_both_sides():
    raw = document(
        {"e": experiment(), "f": experiment("recall")}, holdouts={"hold": {"unit": "user", "buckets": "0-999"}}
    )
    snapshot = Snapshot.of(raw)
    sides = arms(snapshot, "hold")
    held = [user for user, side in sides.items() if side == "holdout"]
    assert 0.07 < len(held) / len(USERS) < 0.13
    assert len(sides) == len(USERS)
    for user in held:
        assert [ref.experiment for ref in snapshot.assign({"user": user}).arms] == ["hold"]
        assert set(snapshot.assign({"user": user}).values.values()) == {0}
    assert arms(Snapshot.of(document({"e": experiment()})), "e").items() >= arms(snapshot, "e").items()


def test_a_layer_holdout_gets_the_plain_default_even_where_a_launch_moved_it():
    raw = document(
        {
            "launch": experiment("ship", arms={"on": {"weight": 100, "values": {"rank.x": 5}}}),
            "e": experiment(buckets="1000-9999"),
        },
        holdouts={"hold": {"layer": "rank", "buckets": "0-999"}},
    )
    raw["layers"]["ship"] = {"unit": "user", "launch": True, "parameters": ["rank.*"]}
    snapshot = Snapshot.of(raw)
    for user, side in arms(snapshot, "hold").items():
        assert (side == "holdout") == (bucket("rank", user) < 1000)
        if side == "holdout":
            assert snapshot.assign({"user": user}).values["rank.x"] == 0


def test_experiments_of_one_exclusion_group_share_no_unit():
    raw = document(
        {
            "a": experiment("rank", group="g", group_buckets="0-4999"),
            "b": experiment("recall", group="g", group_buckets="5000-9999"),
        },
        groups={"g": {"unit": "user"}},
    )
    in_a, in_b = (arms(Snapshot.of(raw), name) for name in "ab")
    assert not in_a.keys() & in_b.keys()
    assert in_a.keys() | in_b.keys() == set(USERS)


def test_a_prerequisite_admits_only_units_in_the_named_arm():
    raw = document(
        {
            "base": experiment("recall"),
            "on-top": experiment("rank", requires=[{"experiment": "base", "arms": ["treatment"]}]),
        }
    )
    snapshot = Snapshot.of(raw)
    base = arms(snapshot, "base")
    assert arms(snapshot, "on-top").keys() == {user for user, arm in base.items() if arm == "treatment"}


def test_prerequisites_may_go_back_and_forth_between_two_layers():
    raw = document(
        {
            "a": experiment("rank", buckets="0-4999"),
            "b": experiment("recall", buckets="0-4999", requires=[{"experiment": "a"}]),
            "c": experiment("recall", buckets="5000-9999"),
            "d": experiment("rank", buckets="5000-9999", requires=[{"experiment": "c", "arms": ["control"]}]),
        }
    )
    snapshot = Snapshot.of(raw)
    in_a, in_b, in_c, in_d = (arms(snapshot, name) for name in "abcd")
    assert in_b.keys() == {user for user in USERS if user in in_a and bucket("recall", user) < 5000}
    assert in_d.keys() == {user for user in USERS if in_c.get(user) == "control" and bucket("rank", user) >= 5000}


def test_a_chain_of_prerequisites_is_decided_from_its_end_whatever_the_order_of_layers():
    raw = document(
        {
            "third": experiment("rank", requires=[{"experiment": "second", "arms": ["treatment"]}]),
            "second": experiment("recall", requires=[{"experiment": "first", "arms": ["treatment"]}]),
            "first": experiment("last"),
        }
    )
    raw["parameters"]["last.x"] = {"type": "int", "default": 0}
    raw["layers"]["last"] = {"unit": "user", "parameters": ["last.x"]}
    snapshot = Snapshot.of(raw)
    first, second, third = (arms(snapshot, name) for name in ("first", "second", "third"))
    assert second.keys() == {user for user, arm in first.items() if arm == "treatment"}
    assert third.keys() == {user for user, arm in second.items() if arm == "treatment"}


def test_an_experiment_overrides_a_launch_that_waited_for_its_prerequisite():
    ship = experiment("ship", arms={"on": {"weight": 100, "values": {"rank.x": 5}}}, requires=[{"experiment": "base"}])
    raw = document({"launch": ship, "e": experiment(), "base": experiment("recall")})
    raw["layers"]["ship"] = {"unit": "user", "launch": True, "parameters": ["rank.x"]}
    snapshot = Snapshot.of(raw)
    for user, arm in arms(snapshot, "e").items():
        assert snapshot.assign({"user": user}).values["rank.x"] == (1 if arm == "treatment" else 5)


def test_testers_get_their_arm_whatever_bucket_condition_or_traffic_says_and_are_marked():
    raw = experiment(state="draft", traffic=0, where={"attribute": "country", "equals": "SE"})
    raw["arms"]["treatment"]["testers"] = ["anna"]
    snapshot = Snapshot.of(document({"e": raw}))
    (ref,) = snapshot.assign({"user": "anna"}).arms
    assert (ref.arm, ref.forced) == ("treatment", True)
    assert snapshot.assign({"user": "bert"}).arms == ()


def test_a_call_can_force_an_arm_and_is_told_when_it_does_not_exist():
    snapshot = Snapshot.of(document({"e": experiment()}))
    forced = snapshot.assign({"user": "u1"}, force={"e": "treatment", "f": "x"})
    assert [(ref.arm, ref.forced) for ref in forced.arms] == [("treatment", True)]
    assert [error.code for error in forced.errors] == ["force_unknown"]


def test_a_stopped_experiment_forces_nobody():
    raw = experiment(state="stopped")
    raw["arms"]["treatment"]["testers"] = ["anna"]
    assert Snapshot.of(document({"e": raw})).assign({"user": "anna"}, force={"e": "treatment"}).arms == ()


def test_a_ramp_follows_its_schedule_and_only_adds():
    steps = [{"at": "2026-03-02", "traffic": 10}, {"at": "2026-03-03T12:00:00Z", "traffic": 50}]
    snapshot = Snapshot.of(document({"e": experiment(ramp=steps, end="2026-03-10")}))
    days = [AT + timedelta(days=day) for day in (0, 1, 2.5, 8.999, 9)]
    shares = [arms(snapshot, "e", at=day) for day in days]
    assert [round(len(share) / len(USERS), 1) for share in shares] == [0, 0.1, 0.5, 0.5, 0]
    assert shares[1].items() <= shares[2].items() == shares[3].items()


def test_a_clock_that_jumps_back_gives_what_that_moment_gave_before():
    steps = [{"at": "2026-03-02", "traffic": 10}, {"at": "2026-03-03", "traffic": 50}]
    snapshot = Snapshot.of(document({"e": experiment(ramp=steps)}))
    early, late = AT + timedelta(days=1), AT + timedelta(days=5)
    first = arms(snapshot, "e", at=early)
    assert len(arms(snapshot, "e", at=late)) > len(first)
    assert arms(snapshot, "e", at=early) == first


def test_a_moment_without_a_zone_is_utc():
    snapshot = Snapshot.of(document({"e": experiment(start="2026-03-01T00:00:00Z")}))
    assert snapshot.assign({"user": "u1"}, at=datetime(2026, 3, 1)).arms
    assert not snapshot.assign({"user": "u1"}, at=datetime(2026, 2, 28, 23, 59)).arms


def test_the_switch_turns_everything_off_testers_and_launches_included():
    raw = experiment()
    raw["arms"]["treatment"]["testers"] = ["anna"]
    snapshot = Snapshot.of(document({"e": raw}, enabled=False, holdouts={"h": {"unit": "user", "buckets": "all"}}))
    assignment = snapshot.assign({"user": "anna"}, force={"e": "treatment"})
    assert assignment.arms == ()
    assert set(assignment.values.values()) == {0}


def test_units_of_several_kinds_decide_their_own_layers():
    snapshot = Snapshot.of(document({"e": experiment(), "p": experiment("page")}))
    both = snapshot.assign({"user": "u1", "request": "r1"})
    assert {(ref.layer, ref.unit_kind, ref.unit) for ref in both.arms} == {
        ("rank", "user", "u1"),
        ("page", "request", "r1"),
    }
    assert {ref.layer for ref in snapshot.assign({"request": "r1"}).arms} == {"page"}


@pytest.mark.parametrize(
    ("unit", "code"),
    [
        (None, "unit_null"),
        ("", "unit_empty"),
        ("x" * 10_000, "unit_too_long"),
        (42, "unit_not_string"),
        (b"42", "unit_not_string"),
        ([], "unit_not_string"),
    ],
)
def test_a_bad_unit_gets_the_defaults_and_a_reason(unit, code):
    assignment = Snapshot.of(document({"e": experiment()})).assign({"user": unit})
    assert (assignment.arms, assignment["rank.x"]) == ((), 0)
    assert [error.code for error in assignment.errors] == [code]


def test_a_kind_that_is_not_given_is_no_error():
    assert Snapshot.of(document({"p": experiment("page")})).assign({"user": "u1"}).errors == ()


class Hostile:
    """An attribute whose every comparison fails."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no")

    def __hash__(self) -> int:
        raise RuntimeError("no")


@pytest.mark.parametrize("units", [None, [], "u1", {"user": Hostile()}, {1: 2}])
@pytest.mark.parametrize("at", [AT, "yesterday", 5])
def test_assignment_never_raises(units, at):
    snapshot = Snapshot.of(document({"e": experiment(where={"attribute": "a", "in": ["x"]})}))
    assignment = snapshot.assign(units, {"a": Hostile()}, at)
    assert assignment["rank.x"] == 0


def test_an_attribute_that_cannot_be_compared_matches_nothing_and_harms_no_other_layer():
    raw = {"e": experiment(where={"attribute": "a", "in": ["x"]}), "f": experiment("recall")}
    assignment = Snapshot.of(document(raw)).assign({"user": "u1"}, {"a": Hostile()})
    assert [ref.experiment for ref in assignment.arms] == ["f"]


def test_what_nobody_foresaw_leaves_the_defaults_and_a_reason():
    assignment = Snapshot.of(document({"e": experiment()})).assign(None)
    assert (assignment["rank.x"], assignment.arms) == (0, ())
    assert [error.code for error in assignment.errors] == ["internal"]


def test_an_unknown_parameter_is_a_lookup_error_with_a_suggestion():
    assignment = Snapshot.of(document({})).assign({"user": "u1"})
    with pytest.raises(UnknownNameError, match=r"did you mean 'rank.x'"):
        assignment["rank.xx"]
    assert assignment.get("rank.xx", 3) == 3


def test_list_values_cannot_be_changed_in_place():
    raw = document({})
    raw["parameters"]["rank.channels"] = {"type": "list", "default": ["a", "b"]}
    assert Snapshot.of(raw).assign({"user": "u"})["rank.channels"] == ("a", "b")


def test_values_are_read_only():
    assignment = Snapshot.of(document({})).assign({"user": "u"})
    with pytest.raises(TypeError):
        assignment.values["rank.x"] = 3


def test_explain_gives_bucket_arm_parameters_and_reason_for_every_layer():
    raw = document(
        {
            "e": experiment(buckets="0-9998", where={"attribute": "country", "in": ["SE"]}),
            "f": experiment("recall", traffic=0),
        }
    )
    explained = {layer.layer: layer for layer in Snapshot.of(raw).explain("u1", {"country": "DK"}, AT).layers}
    assert explained["rank"].bucket == bucket("rank", "u1")
    assert "is for others: not (country in ['SE'])" in explained["rank"].why
    assert "traffic is 0 %" in explained["recall"].why
    assert explained["page"].why == "no experiment owns this bucket"
    match = Snapshot.of(raw).explain("u1", {"country": "SE"}, AT).layers
    assert {layer.layer: layer.experiment for layer in match} == {"rank": "e", "recall": None, "page": None}


def test_models_named_by_defaults_and_arms_are_told_for_loading():
    raw = document(
        {"e": experiment(arms={"a": {"weight": 50}, "b": {"weight": 50, "values": {"rank.model": "trees:3"}}})}
    )
    raw["parameters"]["rank.model"] = {"type": "model", "default": "deepfm"}
    assert Snapshot.of(raw).model_references() == {"deepfm", "trees:3"}
