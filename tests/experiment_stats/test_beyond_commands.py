"""Interleaving, off-policy evaluation and uplift from the log and from files, and what they say to bad input."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from click.testing import CliRunner

from experiments.beyond_commands import interleaving, offpolicy, uplift
from experiments.interleaving_log import interleaved_arms
from experiments.offpolicy import importance_weights, policy_value
from experiments.offpolicy_log import ExploredLog, read_explored, target_chances, value_ranker
from experiments.slates import plackett_luce
from plait.errors import DataError, UnknownNameError


def run(command, *arguments):
    ran = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    assert ran.exit_code == 0, ran.output
    return ran.output


# -- interleaving ------------------------------------------------------------------------------------------------------


def interleaved_log(log, seed, *, edge=0.2):
    """300 lists of 4 items in two arms; items of team b are clicked more often by `edge`."""
    rng = np.random.default_rng(seed)
    rows, clicks = [], []
    for i in range(300):
        arm = ("mix", "other")[i % 2]
        for item in range(4):
            team = "ab"[rng.integers(2)]
            rows.append((i % 50, f"q{i}", item, item + 1, team, arm))
            if rng.random() < 0.3 + edge * (team == "b"):
                clicks += [(i % 50, f"q{i}", item)] * int(rng.integers(1, 3))  # reported once or twice
    user, request, item, position, team, arm = zip(*rows, strict=True)
    struct = [[{"layer": "rank", "experiment": "exp", "arm": a, "propensity": None}] for a in arm]
    log.impressions(user, items=item, positions=position, request_ids=request, team=team, arms=struct)
    log.impressions([1, 2], request_ids=["plain1", "plain2"])  # not interleaved
    user, request, item = zip(*clicks, strict=True)
    log.feedback(user, items=item, request_ids=request)
    return rows, set(clicks)


@pytest.mark.parametrize("seed", range(3))
def test_interleaved_lists_are_counted_as_a_loop_counts_them(log, seed):
    rows, clicks = interleaved_log(log, seed)
    found = {arm.arm: arm for arm in interleaved_arms(log.home, "exp", event="click")}
    assert set(found) == {"mix", "other"}
    for name, arm in found.items():
        mine = [row for row in rows if row[5] == name]
        credit = dict.fromkeys({row[0] for row in mine}, 0)
        for user, request, item, _, team, _ in mine:
            if (user, request, item) in clicks:
                credit[user] += 1 if team == "b" else -1
        assert arm.n_lists == len({row[1] for row in mine}) and arm.n_users == len(credit)
        for team in "ab":
            assert arm.shown[team] == sum(row[4] == team for row in mine)
            assert arm.hits[team] == sum(row[4] == team and row[:3] in clicks for row in mine)
        assert arm.preference.effect.estimate == pytest.approx(np.mean(list(credit.values())))
        assert arm.preference.wins_b == sum(value > 0 for value in credit.values())


def test_the_interleaving_command_names_the_better_ranker(log, monkeypatch):
    interleaved_log(log, 0, edge=0.4)
    monkeypatch.chdir(log.home.project)
    text = run(interleaving, "exp")
    assert "users prefer b, the second ranker" in text and "rank.interleave_with" in text
    plain = json.loads(run(interleaving, "exp", "--format", "json"))
    assert {arm["conclusion"] for arm in plain} == {"users prefer b, the second ranker"}
    with pytest.raises(DataError, match="no list of experiment 'nobody' was interleaved"):
        run(interleaving, "nobody")


# -- off-policy evaluation ---------------------------------------------------------------------------------------------


def explored(rng, n, logged_scores, click, *, temperature):
    """n slates of the same 4 items, drawn as rank.exploration draws; clicks by item, at any position."""
    k = len(logged_scores)
    order = np.argsort(-(logged_scores / temperature + rng.gumbel(size=(n, k))), axis=1)
    propensity = np.array([plackett_luce(logged_scores[row] / temperature) for row in order])
    items = order.ravel()
    return ExploredLog(
        request=np.repeat(np.arange(n), k), user_id=np.repeat(rng.integers(0, n // 3, n), k), item_id=items,
        position=np.tile(np.arange(1, k + 1), n), propensity=propensity.ravel(),
        reward=(rng.random(n * k) < click[items]).astype(float), features=pa.table({"item_id": items}),
    )  # fmt: skip


CLICK = np.array([0.1, 0.5, 0.3, 0.2])
OLD = np.array([0.4, 0.1, 0.2, 0.3])
NEW = np.array([0.1, 0.45, 0.5, 0.2])


@pytest.mark.parametrize(("top", "temperature"), [(1, 0.0), (1, 0.2), (2, 0.2), (3, 0.2), (2, 0.0)])
def test_a_ranker_is_valued_at_what_it_would_have_earned(top, temperature):
    """Against the truth: the sum over all orders of their chance and their clicks."""
    log = explored(np.random.default_rng(4), 6000, OLD, CLICK, temperature=0.3)
    result = value_ranker(log, NEW[log.item_id], top=top, temperature=temperature)
    if temperature:
        chances = {
            order: np.prod(plackett_luce(NEW[list(order)] / temperature)) for order in itertools.permutations(range(4))
        }
    else:
        chances = {tuple(np.argsort(-NEW).tolist()): 1.0}
    truth = sum(chance * CLICK[list(order[:top])].mean() for order, chance in chances.items())
    assert not result.notes and len(result.values) == (3 if top == 1 else 2)
    for value in result.values:
        assert abs(value.value - truth) < 3.3 * value.se, (value.method, value.value, truth)
        assert value.se < 0.05
    assert result.n_rows == 6000 * top


@pytest.mark.parametrize("temperature", [0.0, 0.4])
def test_chances_are_those_of_a_loop(temperature):
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 6, 40)
    request = np.repeat(np.arange(40), sizes)
    scores = rng.integers(0, 3, len(request)) / 2  # with ties
    items = np.concatenate([rng.permutation(10)[:n] for n in sizes])
    got = target_chances(scores, request, items, temperature)
    for i, (mine, item, score) in enumerate(zip(request, items, scores, strict=True)):
        left = [(scores[j], items[j]) for j in range(i, len(request)) if request[j] == mine]
        if temperature:
            expected = np.exp(score / temperature) / sum(np.exp(s / temperature) for s, _ in left)
        else:
            expected = float(max(left, key=lambda pair: (pair[0], -pair[1]))[1] == item)
        assert got[i] == pytest.approx(expected)


def test_a_log_without_exploration_or_without_a_feature_is_refused(log):
    artifact = SimpleNamespace(encoders=SimpleNamespace(inputs=[
        SimpleNamespace(name="item_id", dtype=pa.int64()), SimpleNamespace(name="age", dtype=pa.int64()),
    ]))  # fmt: skip
    common = {"items": [1, 2], "positions": [1, 2], "request_ids": ["r", "r"]}
    log.impressions([5, 5], **common, propensity=[1.0, 1.0], features=['{"age": 3}'] * 2)
    with pytest.raises(DataError, match=r"no logged request was explored.*rank\.exploration"):
        read_explored(log.home, artifact, event="click")
    log.impressions([6, 6], **common | {"request_ids": ["s", "s"]}, propensity=[0.7, 1.0], features=['{"age": 3}'] * 2)
    log.feedback([6], items=[2], request_ids=["s"])
    found = read_explored(log.home, artifact, event="click")
    assert (found.user_id.tolist(), found.reward.tolist(), found.propensity.tolist()) == ([6, 6], [0, 1], [0.7, 1])
    assert found.features.to_pydict() == {"user_id": [6, 6], "item_id": [1, 2], "age": [3, 3]}
    artifact.encoders.inputs.append(SimpleNamespace(name="mood", dtype=pa.string()))
    with pytest.raises(DataError, match="does not hold mood"):
        read_explored(log.home, artifact, event="click")


def actions(tmp_path, n=4000, **changes):
    rng = np.random.default_rng(6)
    logged, new = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.3, 0.6])
    action = rng.choice(3, n, p=logged)
    frame = pd.DataFrame({
        "reward": (rng.random(n) < np.array([0.1, 0.2, 0.4])[action]).astype(int),
        "propensity": logged[action], "target": new[action],
    }).assign(**changes)  # fmt: skip
    path = tmp_path / "log.csv"
    frame.to_csv(path, index=False)
    return path, frame


def test_a_file_of_actions_is_valued_by_the_estimators(tmp_path):
    path, frame = actions(tmp_path)
    found = json.loads(run(offpolicy, "--log", path, "--format", "json"))
    weights = importance_weights(frame["target"], frame["propensity"])
    for value in found["values"]:
        expected = policy_value(frame["reward"], weights, method=value["method"])
        assert (value["value"], value["se"]) == (pytest.approx(expected.value), pytest.approx(expected.se))
        assert abs(value["value"] - 0.31) < 3 * value["se"]
    text = run(offpolicy, "--log", path)
    assert "=> better than what was logged" in text and "effective rows" in text


@pytest.mark.parametrize(
    ("arguments", "changes", "says"),
    [
        (["--target", "chance"], {}, "has no column 'chance'"),
        ([], {"propensity": 0.0}, r"not within \(0, 1\]"),
        ([], {"target": 1.5}, r"not within \[0, 1\]"),
        ([], {"reward": "maybe"}, "must be a number"),
        ([], {"reward": np.nan}, "must be a number|rows have no 'reward'"),
    ],
)
def test_actions_that_cannot_be_valued_are_refused(tmp_path, arguments, changes, says):
    path, _ = actions(tmp_path, **changes)
    with pytest.raises(DataError, match=says):
        run(offpolicy, "--log", path, *arguments)


def test_a_policy_that_the_log_never_followed_is_not_believed(tmp_path):
    path, frame = actions(tmp_path)
    path, _ = actions(tmp_path, target=np.where(frame["propensity"] == 0.1, 1e-9, 0.0))
    text = run(offpolicy, "--log", path)
    assert "=> cannot tell from this log" in text and "cannot speak for this policy" in text


def test_the_command_asks_for_one_source(tmp_path):
    assert CliRunner().invoke(offpolicy, []).exit_code == 2
    with pytest.raises(DataError, match="no file"):
        run(offpolicy, "--log", tmp_path / "absent.csv")


def test_open_bandit_by_the_command(tmp_path, shared_data):
    """Thompson sampling's value from the uniform log, by its own shares of items per position."""
    folder = shared_data("open_bandit")
    path = tmp_path / "actions.parquet"
    with duckdb.connect() as db:
        db.execute(f"""
            COPY (WITH share AS (
                    SELECT position, item_id, count(*) / sum(count(*)) OVER (PARTITION BY position) AS target
                    FROM '{folder}/bts_men.parquet' GROUP BY 1, 2)
                  SELECT click AS reward, propensity_score AS propensity, coalesce(target, 0) AS target
                  FROM '{folder}/random_men.parquet' LEFT JOIN share USING (position, item_id)) TO '{path}'""")
        (own,) = db.execute(f"SELECT avg(click) FROM '{folder}/bts_men.parquet'").fetchone()
    for value in json.loads(run(offpolicy, "--log", path, "--format", "json"))["values"]:
        assert value["low"] < own < value["high"]


# -- uplift ------------------------------------------------------------------------------------------------------------


MAIL = ["--treatment", "arm", "--treated", "mail", "--control", "none"]


def units(tmp_path, n=16_000):
    """The treatment works on the young alone."""
    rng = np.random.default_rng(8)
    age, arm = rng.integers(18, 70, n), rng.choice(["mail", "none", "call"], n)
    lift = 0.25 * ((age < 35) & (arm == "mail"))
    frame = pd.DataFrame({"age": age, "region": rng.choice(["north", "south"], n), "arm": arm})
    frame["bought"] = (rng.random(n) < 0.2 + lift).astype(int)
    frame["spent"] = frame["bought"] * 10
    path = tmp_path / "units.csv"
    frame.to_csv(path, index=False)
    return path


def test_uplift_finds_whom_the_treatment_moves(tmp_path):
    path, out = units(tmp_path), tmp_path / "uplift.csv"
    arguments = [path, *MAIL, "--outcome", "bought", "--leave-out", "spent"]
    text = run(uplift, *arguments, "--out", out)
    assert "=> the treatment moves some more than others" in text
    found = json.loads(run(uplift, *arguments, "--format", "json"))
    best, worst = found["groups"][0], found["groups"][-1]
    assert best["low"] > 0.1 and worst["low"] < 0 < worst["high"]
    assert len(pd.read_csv(out)) == found["n_judged"]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (["--treatment", "armm", "--outcome", "bought"], UnknownNameError, "arm"),
        (["--treatment", "arm", "--outcome", "bought"], DataError, "--treated"),
        ([*MAIL, "--outcome", "region"], DataError, "no finite"),
        ([*MAIL, "--outcome", "bought", "--features", "agee"], UnknownNameError, "age"),
    ],
)  # fmt: skip
def test_uplift_refuses_what_it_cannot_learn_from(tmp_path, arguments, error, says):
    with pytest.raises(error, match=says):
        run(uplift, units(tmp_path, 200), *arguments)


def test_hillstrom_by_the_command(shared_data):
    found = json.loads(
        run(uplift, shared_data("hillstrom") / "hillstrom.csv", "--treatment", "segment", "--treated", "Womens E-Mail",
            "--control", "No E-Mail", "--outcome", "visit", "--leave-out", "conversion,spend,history_segment",
            "--format", "json")
    )  # fmt: skip
    assert found["trend_p_value"] < 0.001 and found["qini_score"] > 0
