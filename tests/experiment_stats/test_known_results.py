"""Whole reports on data whose result is known, and on what the configuration store and the feature store say."""

from __future__ import annotations

import json
import math
import re
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from statsmodels.stats.proportion import proportions_ztest

from experiments.metrics import duration, load_metrics, parse_metrics
from experiments.report import build_report
from experiments.report_commands import render, report
from experiments.report_plan import chosen_metrics
from experiments.report_source import find_plan
from experiments.store import ConfigStore
from plait.errors import SpecError, UnknownNameError

DAY_7, DAY_1 = {"from": "7d", "to": "8d"}, {"from": "1d", "to": "2d"}
COOKIE_CATS = {
    "analysis": {"decision": "fixed", "bootstrap": 500},
    "metrics": [
        {"name": "retention_7", "type": "retention", "event": "session", "role": "primary", "cuped": False} | DAY_7,
        {"name": "retention_1", "type": "retention", "event": "session", "cuped": False} | DAY_1,
        {"name": "rounds", "type": "mean", "event": "rounds", "cuped": False},
        {"name": "rounds_capped", "type": "mean", "event": "rounds", "cuped": False, "winsorize": 0.999},
    ],
}


def test_cookie_cats_ends_as_it_is_known_to_end(log, shared_data):
    """Moving the gate from level 30 to 40 costs day-7 retention: 19.02 % to 18.20 %, p 0.0016; the split is odd."""
    frame = pd.read_csv(shared_data("cookie_cats") / "cookie_cats.csv")
    log.exposures(frame["userid"].to_numpy(), frame["version"].to_numpy(), experiment="gate")
    for day in (1, 7):
        log.feedback(frame.loc[frame[f"retention_{day}"], "userid"].to_numpy(), 24.0 * day + 3, type="session")
    log.feedback(frame["userid"].to_numpy(), 2.0, type="rounds", value=frame["sum_game_rounds"].to_numpy())
    result = build_report(log.home, "gate", metrics=parse_metrics(COOKIE_CATS), control="gate_30", until=log.until)
    assert result.counts.units == {"gate_30": 44_700, "gate_40": 45_489}
    assert result.sample_ratio.statistic == pytest.approx(6.9, abs=0.01)
    assert result.sample_ratio.p_value == pytest.approx(0.0086, abs=5e-5)
    assert any("sample ratio is unusual" in warning for warning in result.warnings)

    by_name = {r.metric.name: r for r in result.metrics}
    week = by_name["retention_7"]
    assert [round(value.value, 4) for value in week.arms] == [0.1902, 0.1820]
    assert [round(value.value, 4) for value in by_name["retention_1"].arms] == [0.4482, 0.4423]
    hits = frame.groupby("version")["retention_7"].sum()
    p = proportions_ztest(hits.to_numpy(), [44_700, 45_489])[1]
    assert p == pytest.approx(0.0016, abs=5e-5)
    assert week.comparisons[0].absolute.p_value == pytest.approx(p, abs=5e-6)  # pooled against unpooled variance
    assert week.comparisons[0].bootstrap.high < 0
    assert (result.conclusion.verdict, result.conclusion.blocked) == ("do not ship", False)
    assert "retention_7 got worse" in result.conclusion.headline

    rounds, capped = by_name["rounds"], by_name["rounds_capped"]
    means = frame.groupby("version")["sum_game_rounds"].mean()
    assert [value.value for value in rounds.arms] == pytest.approx([means["gate_30"], means["gate_40"]])
    assert capped.comparisons[0].absolute.se < rounds.comparisons[0].absolute.se  # the player of 49,854 rounds
    assert "retention_7" in render(result, "html")


def test_the_recipe_of_the_docs_analyses_a_table_with_a_row_per_player(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "statistics.md").read_text()
    page = page[page.index("## An experiment that another system ran") :]
    code, declared = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in ("python", "yaml"))
    rng = np.random.default_rng(5)
    frame = pd.DataFrame({"userid": rng.permutation(9000)[:2000], "version": rng.choice(["gate_30", "gate_40"], 2000)})
    frame["sum_gamerounds"] = rng.poisson(30, 2000)
    frame["retention_1"], frame["retention_7"] = rng.random(2000) < 0.4, rng.random(2000) < 0.2
    frame.to_csv(tmp_path / "cookie_cats.csv", index=False)
    (tmp_path / "feature_store.yaml").write_text("project: test\n")
    (tmp_path / "gate.yaml").write_text(declared)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/statistics.md", "exec"), {})
    ran = CliRunner().invoke(report, ["gate", "--metrics", "gate.yaml", "--control", "gate_30", "--format", "json"])
    assert ran.exit_code == 0, ran.output
    found = {each["metric"]["name"]: each for each in json.loads(ran.output)["metrics"]}
    for name in ("retention_1", "retention_7"):
        shares = frame.groupby("version")[name].mean()
        assert [arm["value"] for arm in found[name]["arms"]] == pytest.approx(list(shares))
    cap = frame["sum_gamerounds"].quantile(0.999)
    means = frame.assign(x=frame["sum_gamerounds"].clip(upper=cap)).groupby("version")["x"].mean()
    assert [arm["value"] for arm in found["rounds"]["arms"]] == pytest.approx(list(means))


def test_hillstroms_three_arms_are_compared_with_one_control(log, shared_data):
    frame = pd.read_csv(shared_data("hillstrom") / "hillstrom.csv")
    ids = np.arange(len(frame))
    log.exposures(ids, frame["segment"].to_numpy(), 24.0 * 40)
    log.feedback(ids[frame["visit"] == 1], 24.0 * 41, type="visit")
    log.feedback(ids, 24.0 * 20, type="spend", value=frame["history"].to_numpy())
    log.feedback(ids[frame["spend"] > 0], 24.0 * 42, type="spend", value=frame["spend"][frame["spend"] > 0].to_numpy())
    declared = [
        {"name": "visited", "type": "proportion", "event": "visit", "role": "primary"},
        {"name": "spend", "type": "mean", "event": "spend"},
    ]
    result = build_report(
        log.home, "test", metrics=parse_metrics({"metrics": declared}), control="No E-Mail",
        until=log.until + timedelta(days=30),
    )  # fmt: skip
    shares = {value.arm: round(value.value, 4) for value in result.metrics[0].arms}
    assert shares == {"No E-Mail": 0.1062, "Mens E-Mail": 0.1828, "Womens E-Mail": 0.1514}
    spend = {value.arm: round(value.value, 3) for value in result.metrics[1].arms}
    assert spend == {"No E-Mail": 0.653, "Mens E-Mail": 1.423, "Womens E-Mail": 1.077}
    assert (result.conclusion.verdict, result.conclusion.arm) == ("ship", "Mens E-Mail")
    assert result.metrics[0].comparison("Mens E-Mail").probability_best > 0.99
    assert result.metrics[1].variance_removed > 0


DOCUMENT = {
    "parameters": {"rank.model": {"type": "string", "default": "deepfm"}},
    "layers": {"rank": {"unit": "user", "parameters": ["rank.*"]}},
    "experiments": {
        "ranker": {
            "layer": "rank",
            "state": "running",
            "buckets": "all",
            "arms": {
                "old": {"weight": 80, "values": {"rank.model": "deepfm"}},
                "new": {"weight": 20, "values": {"rank.model": "lightgbm"}},
            },
            "control": "old",
        }
    },
}


def test_the_plan_comes_from_the_configuration_versions_of_the_log(log):
    store = ConfigStore.at(log.home)
    store.apply(DOCUMENT, author="test")
    changed = {**DOCUMENT, "experiments": {"ranker": {**DOCUMENT["experiments"]["ranker"]}}}
    changed["experiments"]["ranker"]["arms"] = {
        name: {**arm, "weight": 50} for name, arm in DOCUMENT["experiments"]["ranker"]["arms"].items()
    }
    store.apply(changed, author="test")
    store.close()
    log.exposures(np.arange(1000), ["old"] * 800 + ["new"] * 200, experiment="ranker", config_version=1)
    log.exposures(np.arange(1000, 1400), ["old", "new"] * 200, 24.0, experiment="ranker", config_version=2)
    plan = find_plan(log.home, "ranker")
    assert (plan.declared, plan.arms, plan.unit_kind, plan.state) == (True, ("old", "new"), "user", "running")
    result = build_report(log.home, "ranker", until=log.until)
    assert result.sample_ratio.expected == {"old": pytest.approx(1000.0), "new": pytest.approx(400.0)}
    assert result.sample_ratio.p_value == pytest.approx(1.0)
    with pytest.raises(UnknownNameError, match="did you mean 'ranker'"):
        find_plan(log.home, "rankr")


def test_a_configured_experiment_without_exposures_says_so(log):
    store = ConfigStore.at(log.home)
    store.apply(DOCUMENT, author="test")
    store.close()
    result = build_report(log.home, "ranker", until=log.until)
    assert "no unit of ranker has been exposed yet" in result.conclusion.headline
    for form in ("text", "json", "html"):
        assert render(result, form)


def test_an_experiment_chooses_its_metrics_and_their_roles():
    from dataclasses import replace

    from experiments.report_plan import plan_from_log

    plan = plan_from_log("x", layer="rank", unit_kind="user", arms=("a", "b"))
    chosen = chosen_metrics(
        load_metrics(), replace(plan, primary="clicked", metrics=("click_rate",), guardrails=("ndcg_at_10",))
    )
    roles = {metric.name: metric.role for metric in chosen.metrics}
    assert roles == {"clicked": "primary", "click_rate": "secondary", "ndcg_at_10": "guardrail"}
    assert chosen.get("ndcg_at_10").margin == 0.05
    with pytest.raises(UnknownNameError, match="did you mean 'clicked'"):
        chosen_metrics(load_metrics(), replace(plan, primary="clickd"))


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ({"type": "count"}, "at least name and type"),
        ({"name": "m", "type": "meen"}, "did you mean 'mean'"),
        ({"name": "m", "type": "count", "evnt": "click"}, "did you mean 'event'"),
        ({"name": "9m", "type": "count"}, "a name is a letter"),
        ({"name": "m", "type": "count", "window": "7 moons"}, "write a span such as"),
        ({"name": "m", "type": "ratio", "numerator": {"event": "click"}}, "denominator is None"),
        ({"name": "m", "type": "quantile", "quantile": 90}, "between 0 and 1"),
        ({"name": "m", "type": "retention", "from": "7d", "to": "1d"}, "lies after"),
        ({"name": "m", "type": "count", "winsorize": 0.0}, "give an upper quantile"),
        ({"name": "m", "type": "mean", "event": "impression"}, "no value to sum"),
        ({"name": "m", "type": "count", "where": {"valu": 1}}, "did you mean 'value'"),
        ({"name": "m", "type": "count", "where": {"value": {"above": 1}}}, "no operator 'above'"),
        ({"name": "m", "type": "count", "where": {"value": {"in": []}}}, "at least one value"),
        ({"name": "m", "type": "count", "where": {"value": None}}, "give a number or a string"),
        ({"name": "m", "type": "count", "cuped": {"feature": "age"}}, "both feature_service and feature"),
        ({"name": "m", "type": "ranking", "measure": "ndgc"}, "did you mean 'ndcg'"),
        ({"name": "m", "type": "ranking", "gains": {}}, "gains maps"),
        ({"name": "m", "type": "count", "role": "guardrail", "margin": -1}, "between 0 and 10"),
    ],
)
def test_a_metric_that_cannot_be_is_refused_with_what_to_write(metric, says):
    with pytest.raises(SpecError, match=says):
        parse_metrics({"metrics": [metric]})


@pytest.mark.parametrize(
    ("analysis", "says"),
    [
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"decision": "bayes"}, "no decision 'bayes'"),
        ({"decision": "group_sequential"}, "needs planned_units"),
        ({"alfa": 0.1}, "did you mean 'alpha'"),
        ({"segments": "age"}, "a list of user attributes"),
    ],
)
def test_an_analysis_that_cannot_be_is_refused(analysis, says):
    with pytest.raises(SpecError, match=says):
        parse_metrics({"metrics": [{"name": "m", "type": "count"}], "analysis": analysis})


def test_metrics_files_that_are_missing_broken_or_empty_are_refused(tmp_path):
    with pytest.raises(SpecError, match="no metrics file"):
        load_metrics(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("metrics: [")
    with pytest.raises(SpecError, match="is not YAML"):
        load_metrics(tmp_path / "bad.yaml")
    for wrong in (None, [], {"metrics": []}, {"metrics": "clicks"}):
        with pytest.raises(SpecError):
            parse_metrics(wrong)
    with pytest.raises(SpecError, match="declared twice"):
        parse_metrics({"metrics": [{"name": "m", "type": "count"}] * 2})


def test_a_filter_is_quoted_and_matches_only_what_it_says(log):
    log.exposures(np.arange(40), ["control", "new"] * 20)
    log.feedback(np.arange(40), type="buy 'now'", value=np.arange(40.0))
    declared = [{"name": "m", "type": "count", "event": "buy 'now'", "where": {"value": {"gte": 10, "lt": 30}}}]
    result = build_report(log.home, "test", metrics=parse_metrics({"metrics": declared}), until=log.until)
    assert sum(value.value * value.n for value in result.metrics[0].arms) == pytest.approx(20)


def test_spans_are_read_exactly():
    assert duration("90m", "x") == timedelta(hours=1.5)
    assert duration("2w", "x") == timedelta(days=14)
    assert math.isclose(duration("0.5 d", "x").total_seconds(), 43_200)
