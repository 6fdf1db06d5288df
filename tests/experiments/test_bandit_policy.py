"""Bandit policies: what a configuration may say, exact shares, and the three ways to assign agreeing on them."""

from __future__ import annotations

import json
import math
from collections import Counter
from datetime import UTC, datetime
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.assignment import Assignment
from experiments.policy import ContextEncoder, best_of_normals, compile_policy, posterior_shares, with_floor
from experiments.snapshot import Snapshot
from experiments.source import read_text
from experiments.spec import ContextField
from experiments.validate import check
from plait.errors import SpecError

AT = datetime(2026, 3, 1, tzinfo=UTC)
CONTEXT = {"age": {"scale": 20, "center": 40}, "country": {"categories": ["SE", "NO"]}}


def document(bandit: dict[str, Any], weights: tuple[float, ...] = (50, 30, 20), **more: Any) -> dict[str, Any]:
    arms = {name: {"weight": w, "values": {"p.x": i}} for i, (name, w) in enumerate(zip("abc", weights, strict=False))}
    experiment = {"layer": "p", "state": "running", "buckets": "all", "arms": arms, "bandit": bandit, **more}
    return {
        "parameters": {"p.x": {"type": "int", "default": -1}},
        "layers": {"p": {"unit": "user", "parameters": ["p.*"]}},
        "experiments": {"e": experiment},
    }


def thompson(best: dict[str, float], **more: Any) -> dict[str, Any]:
    return {"method": "thompson", "reward": "click", "arms": {a: {"best": p} for a, p in best.items()}, **more}


def linear(seed: int, spread: float = 0.02) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    arms = {
        arm: {"theta": rng.normal(0.3, 0.1, 4).tolist(), "covariance": (np.eye(4) * spread * (i + 1)).tolist()}
        for i, arm in enumerate("abc")
    }
    return {"method": "linear", "reward": "click", "fields": encoder().signature(), "arms": arms}


def encoder() -> ContextEncoder:
    return ContextEncoder(
        (ContextField(name="age", center=40, scale=20), ContextField(name="country", categories=("SE", "NO")))
    )


def ref(assignment: Assignment) -> Any:
    (arm,) = assignment.arms
    return arm


# -- configuration -----------------------------------------------------------------------------------------------------

YAML = """\
parameters:
  p.x: {type: int, default: 0}
layers:
  p: {unit: user, parameters: [p.*]}
experiments:
  e:
    layer: p
    state: running
    buckets: all
    arms:
      a: {weight: 97, values: {p.x: 1}}
      b: {weight: 3, values: {p.x: 2}}
    bandit:
      method: thompson
      floor: 2
"""


def problems(text: str) -> list[str]:
    return [str(problem) for problem in check(read_text(text, file="e.yaml"))[1]]


def test_a_bandit_is_valid_and_shown():
    assert problems(YAML) == []
    spec = Snapshot.of(read_text(YAML).document).spec
    assert spec.experiments["e"].bandit.floor == 200


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("method: thompson", "method: thomson", 14, "did you mean 'thompson'"),
        ("method: thompson", "method: linear", 13, "needs `context`"),
        ("floor: 2", "floor: 5", 12, "3 % is below the bandit's floor of 5 %"),
        ("floor: 2", "floor: 0", 15, "0"),
        ("floor: 2", "half_life: 7", 15, "a text"),
        ("floor: 2", "half_life: 7y", 15, "must match"),
        ("floor: 2", "half_life: 0d", 15, "no usable span"),
        ("floor: 2", "half_life: 99999999999999d", 15, "no usable span"),
        ("floor: 2", "flor: 2", 15, "did you mean 'floor'"),
        ("floor: 2", "context: {age: {scale: 1}}", 15, "thompson reads no context"),
        ("method: thompson", "method: linear\n      context: {age: {}}", 15, "non-empty"),
        ("method: thompson", "method: linear\n      context: {age: {center: 1}}", 15, "either `scale`"),
        ("method: thompson", "method: linear\n      context: {age: {scale: 0}}", 15, "0"),
        ("method: thompson", "method: linear\n      context: {c: {categories: [x], center: 2}}", 15, "only a number"),
        ("    bandit:", "    sticky: true\n    bandit:", 13, "choose one"),
        ("[p.*]}", "[p.*], launch: true}", 13, "launch layer"),
    ],
)
def test_a_wrong_bandit_is_told_with_its_line(old, new, line, said):
    found = problems(YAML.replace(old, new))
    assert len(found) == 1, found
    assert f"e.yaml:{line}:" in found[0]
    assert said in found[0]


def test_metrics_of_a_bandit_are_warned_about():
    _, found = check(read_text(YAML + "    primary: click_rate\n", file="e.yaml"))
    assert [(problem.warning, "not judged" in problem.message) for problem in found] == [(True, True)]


def test_a_bandit_of_one_arm_chooses_nothing():
    text = YAML.replace("      b: {weight: 3, values: {p.x: 2}}\n", "").replace("weight: 97", "weight: 100")
    assert any("two or more arms" in problem for problem in problems(text))


# -- shares ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.floats(0, 1))
def test_floored_shares_add_up_and_keep_the_order(shares, part):
    floor = part / len(shares)
    out = with_floor(shares, floor)
    assert sum(out) == pytest.approx(1)
    assert min(out) >= floor - 1e-12
    if sum(shares) > 0:
        ordered = [out[i] for i in np.argsort(shares, kind="stable")]
        assert all(b >= a - 1e-9 for a, b in pairwise(ordered))
        if min(shares) / sum(shares) >= floor:  # nobody below: nothing is touched
            assert out == pytest.approx([share / sum(shares) for share in shares])


def test_a_floor_that_does_not_fit_is_refused():
    with pytest.raises(SpecError, match="impossible"):
        with_floor([1, 1], 0.6)


@pytest.mark.parametrize("seed", range(12))
def test_the_best_of_normals_agrees_with_sampling(seed):
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 7))
    means, sds = rng.normal(0, 1, k), rng.uniform(0.05, 1.5, k)
    wins = np.bincount((means + sds * rng.standard_normal((200_000, k))).argmax(axis=1), minlength=k) / 200_000
    assert best_of_normals(means, sds) == pytest.approx(wins, abs=0.006)
    assert best_of_normals(means, sds).sum() == pytest.approx(1)


def test_arms_without_spread_are_settled():
    assert best_of_normals(np.array([0.1, 0.3, 0.2]), np.zeros(3)) == pytest.approx([0, 1, 0])
    assert best_of_normals(np.array([0.1, 0.3]), np.zeros(2)) == pytest.approx([0, 1])


def test_weights_are_the_prior_chance_of_being_the_best():
    """Bayes by enumeration: theta from exchangeable Betas given that arm i is best, i by the weights."""
    rng = np.random.default_rng(0)
    weights, data = np.array([0.7, 0.2, 0.1]), ((3, 10), (6, 10), (2, 10))
    theta = rng.beta(1, 1, (400_000, 3))
    likelihood = np.prod([theta[:, i] ** s * (1 - theta[:, i]) ** (n - s) for i, (s, n) in enumerate(data)], axis=0)
    best = theta.argmax(axis=1)
    equal = np.array([likelihood[best == i].sum() for i in range(3)])
    prior = np.array([(best == i).sum() for i in range(3)])
    expected = weights * np.array([likelihood[best == i].mean() for i in range(3)])
    assert posterior_shares(list(equal / prior * prior.mean()), list(weights), 0.0) == pytest.approx(
        expected / expected.sum(), abs=1e-9
    )
    assert posterior_shares([1 / 3] * 3, list(weights), 0.05) == pytest.approx(weights)  # nothing seen yet


# -- contexts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "values"),
    [
        ({"age": 30, "country": "SE"}, (30.0, "SE")),
        ({"age": 30.5, "country": "DK", "more": 1}, (30.5, "DK")),
        ({"age": 30, "country": 7}, (30.0, "7")),
        ({"age": 30, "country": True}, (30.0, "true")),
        ({"age": 30, "country": "x" * 500}, (30.0, "x" * 100)),
        ({"age": 30}, None),
        ({"age": True, "country": "SE"}, None),
        ({"age": "30", "country": "SE"}, None),
        ({"age": None, "country": "SE"}, None),
        ({"age": math.nan, "country": "SE"}, None),
        ({"age": math.inf, "country": "SE"}, None),
        ({"age": 10**400, "country": "SE"}, None),
        ({"age": 30, "country": ["SE"]}, None),
        ({"age": 30, "country": 1.5}, None),
    ],
)
def test_a_context_is_read_or_refused_whole(attributes, values):
    assert encoder().read(attributes) == values


def test_a_context_becomes_a_vector():
    assert encoder().vector((60.0, "NO")).tolist() == [1, 1, 0, 1]
    assert encoder().vector((1e9, "DK")).tolist() == [1, 10, 0, 0]
    assert json.loads(encoder().to_json((60.0, 'N"O'))) == {"age": 60.0, "country": 'N"O'}


# -- drawing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["request", "unit"])
@pytest.mark.parametrize("kind", ["none", "thompson", "linear"])
def test_arms_come_as_often_as_their_logged_propensities_say(by, kind):
    bandit = {"method": "thompson", "floor": 5, "by": by}
    if kind == "linear":
        bandit |= {"method": "linear", "context": CONTEXT}
    snapshot = Snapshot.of(document(bandit))
    if kind != "none":
        learned = linear(1) if kind == "linear" else thompson({"a": 0.1, "b": 0.9, "c": 0.0})
        snapshot = snapshot.with_policies({"e": (1, learned)})
    n, seen, said = 20_000, Counter(), {}
    for i in range(n):
        arm = ref(snapshot.assign({"user": f"u{i}", "request": f"r{i}"}, {"age": 33, "country": "SE"}, AT))
        seen[arm.arm] += 1
        said[arm.arm] = arm.propensity
    assert sum(said.values()) == pytest.approx(1)
    for name, share in said.items():
        assert share >= 0.05
        assert seen[name] / n == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / n))


def test_by_request_draws_anew_and_by_unit_does_not():
    for by, expected in (("request", True), ("unit", False)):
        snapshot = Snapshot.of(document({"method": "thompson", "by": by}))
        arms = {ref(snapshot.assign({"user": "u", "request": f"r{i}"}, {}, AT)).arm for i in range(50)}
        assert (len(arms) > 1) == expected
    lonely = Snapshot.of(document({"method": "thompson"})).assign({"user": "u"}, {}, AT)
    assert ref(lonely).propensity in (0.5, 0.3, 0.2)  # no request id: by the unit


def test_a_missing_context_falls_back_to_the_weights_and_says_so():
    snapshot = Snapshot.of(document({"method": "linear", "floor": 5, "context": CONTEXT})).with_policies(
        {"e": (3, linear(2))}
    )
    for attributes in ({}, {"age": math.nan, "country": "SE"}):
        arm = ref(snapshot.assign({"user": "u", "request": "r"}, attributes, AT))
        assert (arm.chosen_by, arm.context) == ("no_context", None)
        assert arm.propensity == {"a": 0.5, "b": 0.3, "c": 0.2}[arm.arm]
    arm = ref(snapshot.assign({"user": "u", "request": "r"}, {"age": 3, "country": "SE"}, AT))
    assert (arm.chosen_by, json.loads(arm.context)) == ("policy", {"age": 3.0, "country": "SE"})


def test_before_anything_is_learned_the_weights_serve_and_the_context_is_logged():
    snapshot = Snapshot.of(document({"method": "linucb", "context": CONTEXT}))
    arm = ref(snapshot.assign({"user": "u", "request": "r"}, {"age": 3, "country": "SE"}, AT))
    assert (arm.chosen_by, arm.context) == ("weights", '{"age":3.0,"country":"SE"}')


def test_a_policy_that_breaks_does_not_break_the_request():
    class Broken:
        version = 1

        def choose(self, u: float, attributes: Any) -> Any:
            raise ZeroDivisionError("oh")

    snapshot = Snapshot.of(document({"method": "thompson"}))
    snapshot.policies = {"e": Broken()}
    assignment = snapshot.assign({"user": "u", "request": "r"}, {}, AT)
    assert [error.code for error in assignment.errors] == ["bandit_failed"]
    assert ref(assignment).chosen_by == "weights"
    batch = snapshot.assign_many({"user": ["u"], "request": ["r"]}, None, AT)
    assert [error.code for error in batch.errors[0]] == ["bandit_failed"]


def test_testers_and_forced_arms_carry_no_propensity():
    raw = document({"method": "thompson"})
    raw["experiments"]["e"]["arms"]["c"]["testers"] = ["t"]
    arm = ref(Snapshot.of(raw).assign({"user": "t", "request": "r"}, {}, AT))
    assert (arm.arm, arm.forced, arm.propensity, arm.chosen_by) == ("c", True, None, "hash")


def test_linucb_takes_the_best_bound_but_for_the_floors():
    raw = document({"method": "linucb", "floor": 4, "context": CONTEXT, "width": 1}, weights=(40, 30, 30))
    policy = compile_policy(Snapshot.of(raw).spec.experiments["e"], 1, linear(3))
    learned, x = linear(3)["arms"], encoder().vector((50.0, "NO"))
    bounds = [np.dot(a["theta"], x) + math.sqrt(x @ np.array(a["covariance"]) @ x) for a in (learned[n] for n in "abc")]
    expected = [0.04] * 3
    expected[int(np.argmax(bounds))] = 0.92
    assert policy.shares({"age": 50, "country": "NO"}) == pytest.approx(expected)


@pytest.mark.parametrize(
    "wrong",
    [
        thompson({"a": 0.5, "b": 0.5}),
        thompson({"a": 0.5, "b": 0.5, "d": 0}),
        thompson({"a": 0.5, "b": 0.5, "c": math.nan}),
        thompson({"a": 0, "b": 0, "c": 0}),
        thompson({"a": 1, "b": 0, "c": 0}, reward="purchase"),
        linear(1),
        {"method": "thompson"},
        {"method": "thompson", "reward": "click", "arms": ["a", "b", "c"]},
    ],
)
def test_a_policy_that_does_not_fit_is_left_out(wrong, caplog):
    snapshot = Snapshot.of(document({"method": "thompson"}))
    with pytest.raises(SpecError, match="learn again"):
        compile_policy(snapshot.spec.experiments["e"], 1, wrong)
    assert ref(snapshot.with_policies({"e": (1, wrong)}).assign({"user": "u"}, {}, AT)).chosen_by == "weights"
    assert "the weights of e serve" in caplog.text


@pytest.mark.parametrize("change", ["fields", "shape", "nan"])
def test_a_linear_policy_of_another_context_is_refused(change):
    experiment = Snapshot.of(document({"method": "linear", "context": CONTEXT})).spec.experiments["e"]
    wrong = linear(1)
    if change == "fields":
        wrong["fields"][0]["scale"] = 3.0
    elif change == "shape":
        wrong["arms"]["b"]["theta"] = [1.0, 2.0]
    else:
        wrong["arms"]["b"]["theta"][0] = math.nan
    with pytest.raises(SpecError, match="learn again"):
        compile_policy(experiment, 1, wrong)


@pytest.mark.parametrize("seed", range(12))
def test_single_explained_and_vectorised_draws_agree(seed):
    rng = Random(seed)
    method = rng.choice(["thompson", "linear", "linucb"])
    bandit: dict[str, Any] = {"method": method, "floor": rng.choice([1, 5, 10]), "by": rng.choice(["request", "unit"])}
    if method != "thompson":
        bandit["context"] = CONTEXT
    more: dict[str, Any] = {"traffic": rng.choice([100, 60])}
    if rng.random() < 0.5:
        more["where"] = {"attribute": "age", "at_least": 20}
    snapshot = Snapshot.of(document(bandit, **more))
    if rng.random() < 0.8:
        learned = thompson({"a": rng.random(), "b": rng.random(), "c": 0.1}) if method == "thompson" else linear(seed)
        snapshot = snapshot.with_policies({"e": (1, learned)})
    n = 80
    units: dict[str, list[Any]] = {
        "user": [f"u{i % 20}" for i in range(n)],
        "request": [rng.choice([f"r{i}", f"r{i}", "", None]) for i in range(n)],
    }
    attributes = [
        {"age": rng.choice([10, 30, 55.5, None, "old", True]), "country": rng.choice(["SE", "NO", "DK", 3, None])}
        for _ in range(n)
    ]
    columns = {name: [each[name] for each in attributes] for name in ("age", "country")}
    batch = snapshot.assign_many(units, columns, AT)
    arms, propensities = batch.arm_of("e").to_pylist(), batch.propensities("e")
    for i in range(n):
        here = {kind: column[i] for kind, column in units.items()}
        single = snapshot.assign(here, attributes[i], AT)
        (layer,) = snapshot.explain(here, attributes[i], AT).layers
        assert layer.arm == arms[i] == (ref(single).arm if single.arms else None)
        assert batch.values("p.x")[i] == single["p.x"]
        if single.arms:
            assert ref(single).propensity == propensities[i] == layer.shares[ref(single).arm]
        else:
            assert math.isnan(propensities[i])
            assert not layer.shares


def test_arrow_columns_serve_as_contexts():
    snapshot = Snapshot.of(document({"method": "linear", "context": CONTEXT})).with_policies({"e": (1, linear(5))})
    table = pa.table({"age": [20, 50], "country": ["SE", "NO"]})
    batch = snapshot.assign_many({"user": ["a", "b"], "request": ["r", "s"]}, table, AT)
    for i, (user, request) in enumerate((("a", "r"), ("b", "s"))):
        single = ref(snapshot.assign({"user": user, "request": request}, table.slice(i, 1).to_pylist()[0], AT))
        assert batch.propensities("e")[i] == single.propensity


def test_other_experiments_may_require_an_arm_that_a_bandit_drew():
    raw = document({"method": "thompson"})
    raw["parameters"]["q.x"] = {"type": "int", "default": 0}
    raw["layers"]["q"] = {"unit": "user", "parameters": ["q.*"]}
    raw["experiments"]["f"] = {
        "layer": "q",
        "state": "running",
        "buckets": "all",
        "requires": [{"experiment": "e", "arms": ["b"]}],
        "arms": {"on": {"weight": 100, "values": {"q.x": 1}}},
    }
    snapshot = Snapshot.of(raw)
    for i in range(60):
        assignment = snapshot.assign({"user": f"u{i}", "request": "r" * (i + 1)}, {}, AT)
        assert assignment["q.x"] == (assignment["p.x"] == 1)
