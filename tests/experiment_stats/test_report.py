"""Reports over event tables, against loops over rows, and on input that is not as it should be."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
from click.testing import CliRunner

from experiments.metrics import parse_metrics
from experiments.report import build_report
from experiments.report_commands import parse_weights, power, power_plan, render, report
from experiments.stats.cuped import cuped_means
from experiments.stats.effects import difference
from experiments.stats.moments import Moments, PairMoments, mean_estimate, ratio_estimate
from experiments.stats.resampling import quantile_of
from plait.errors import DataError, SpecError, UnknownNameError

METRICS = [
    {"name": "clicks", "type": "count", "event": "click", "window": "5d", "role": "primary"},
    {"name": "clicked", "type": "proportion", "event": "click", "window": "5d", "cuped": False},
    {"name": "spent", "type": "mean", "event": "purchase", "where": {"value": {"gt": 2}}, "cuped": False},
    {"name": "rate", "type": "ratio", "numerator": {"event": "click"}, "denominator": {"event": "impression"},
     "cuped": False},
    {"name": "back", "type": "retention", "event": "any", "from": "2d", "to": "4d", "cuped": False},
    {"name": "median_spent", "type": "quantile", "event": "purchase", "quantile": 0.8},
    {"name": "basket", "type": "quantile", "event": "purchase", "quantile": 0.5, "level": "event"},
    {"name": "ndcg", "type": "ranking", "measure": "ndcg", "k": 3, "gains": {"click": 1, "purchase": 3}},
    {"name": "mrr", "type": "ranking", "measure": "mrr", "k": 3},
]  # fmt: skip
ONE = [{"name": "clicks", "type": "count", "event": "click"}]


def metrics(declared=METRICS, **analysis):
    return parse_metrics({"metrics": declared, "analysis": {"bootstrap": 0, **analysis}})


def random_log(log, seed):
    """Some 60 users over two arms, with crossed and forced ones, events on both sides of exposure."""
    rng = np.random.default_rng(seed)
    n = 60
    users = np.arange(n)
    arm = np.where(rng.random(n) < 0.5, "control", "new")
    first = rng.uniform(0, 24 * 6, n)
    log.exposures(users, arm, first)
    again = rng.choice(n, 30)
    log.exposures(again, arm[again], first[again] + rng.uniform(0, 50, 30))
    log.exposures([0, 1], ["control", "new"], 200.0)  # one of them, or both, crosses or repeats
    log.exposures([2], [arm[2]], 1.0, forced=True)
    m = 700
    who, hours = rng.integers(0, n + 5, m), rng.uniform(-24 * 6, 24 * 9, m)
    rows = {"user": who, "hours": hours, "request": rng.integers(0, 120, m), "item": rng.integers(0, 4, m)}
    rows["position"] = rng.integers(1, 6, m)
    log.impressions(
        who, hours, items=rows["item"], positions=rows["position"], request_ids=[f"q{r}" for r in rows["request"]]
    )
    events = []
    for kind, k in (("click", 300), ("purchase", 120), ("like", 80)):
        u, h = rng.integers(0, n + 5, k), rng.uniform(-24 * 6, 24 * 9, k)
        value = rng.uniform(0, 9, k) if kind == "purchase" else np.full(k, np.nan)
        request, item = rng.integers(0, 120, k), rng.integers(0, 4, k)
        log.feedback(u, h, type=kind, value=value, items=item, request_ids=[f"q{r}" for r in request])
        events += [(kind, *row) for row in zip(u, h, value, request, item, strict=True)]
    arms = {u: {arm[u]} for u in range(n)}
    arms[0].add("control")
    arms[1].add("new")
    firsts = {u: first[u] for u in range(n) if len(arms[u]) == 1 and u != 2}
    # The second exposure of users 0 and 1 may be the earlier one only if first > 200 h, which it never is.
    return {u: (arm[u], firsts[u]) for u in firsts}, rows, events


@pytest.mark.parametrize("seed", range(4))
def test_a_report_agrees_with_loops_over_the_rows(log, seed):
    units, shown, events = random_log(log, seed)
    until = log.until - timedelta(days=19)  # 11 days after the start: some windows are not complete
    end = 11 * 24
    result = build_report(log.home, "test", metrics=metrics(), until=until, despite_mismatch=True)
    assert result.counts.units == {a: sum(arm == a for arm, _ in units.values()) for a in ("control", "new")}
    assert result.counts.n_forced_units == 1

    def per_unit(value):
        return {a: [value(u, first) for u, (arm, first) in units.items() if arm == a] for a in ("control", "new")}

    def count(u, since, till, kind="click"):
        return sum(k == kind and who == u and since <= h < min(till, end) for k, who, h, *_ in events)

    expected = {
        "clicked": per_unit(lambda u, f: float(count(u, f, f + 120) > 0)),
        "spent": per_unit(
            lambda u, f: sum(v for k, w, h, v, *_ in events if k == "purchase" and w == u and f <= h < end and v > 2)
        ),
    }
    for name, values in expected.items():
        metric = next(r for r in result.metrics if r.metric.name == name)
        theirs = difference(*(mean_estimate(Moments.of(values[a])) for a in ("control", "new")))
        ours = metric.comparisons[0].absolute
        if min(sum(values[a]) for a in values) >= 10:
            np.testing.assert_allclose(
                [ours.estimate, ours.p_value, ours.low], [theirs.estimate, theirs.p_value, theirs.low]
            )

    pairs = per_unit(lambda u, f: (count(u, f, f + 120), count(u, f - 28 * 24, f)))
    cuped = cuped_means([PairMoments.of(*np.array(pairs[a]).T) for a in ("control", "new")])
    clicks = result.metrics[0]
    assert clicks.arms[1].adjusted == pytest.approx(cuped.estimates[1].value)
    assert clicks.comparisons[0].adjusted_absolute.se == pytest.approx(difference(*cuped.estimates).se)
    assert clicks.variance_removed == pytest.approx(cuped.variance_removed)

    def impressions(u, f):
        return sum(1 for w, h in zip(shown["user"], shown["hours"], strict=True) if w == u and f <= h < end)

    rates = per_unit(lambda u, f: (count(u, f, 1e9), impressions(u, f)))
    for value in next(r for r in result.metrics if r.metric.name == "rate").arms:
        theirs = ratio_estimate(PairMoments.of(*np.array(rates[value.arm]).T))
        assert (value.value, value.se) == (pytest.approx(theirs.value), pytest.approx(theirs.se))

    def came_back(u, f):
        return float(any(w == u and f + 48 <= h < min(f + 96, end) for _, w, h, *_ in events))

    for value in next(r for r in result.metrics if r.metric.name == "back").arms:
        complete = [came_back(u, f) for u, (a, f) in units.items() if a == value.arm and f + 96 <= end]
        assert (value.n, value.value) == (len(complete), pytest.approx(np.mean(complete)))

    bought = per_unit(lambda u, f: sum(v for k, w, h, v, *_ in events if k == "purchase" and w == u and f <= h < end))
    for value in next(r for r in result.metrics if r.metric.name == "median_spent").arms:
        theirs = quantile_of(bought[value.arm], 0.8)
        assert (value.value, value.se) == (pytest.approx(theirs.value), pytest.approx(theirs.se))
    for value in next(r for r in result.metrics if r.metric.name == "basket").arms:
        rows = [(v, u) for u, (a, f) in units.items() if a == value.arm
                for k, w, h, v, *_ in events if k == "purchase" and w == u and f <= h < end]  # fmt: skip
        theirs = quantile_of([v for v, _ in rows], 0.5, units=[u for _, u in rows])
        assert (value.value, value.se) == (pytest.approx(theirs.value), pytest.approx(theirs.se))

    for name in ("ndcg", "mrr"):
        for value in next(r for r in result.metrics if r.metric.name == name).arms:
            per = []
            for u, (a, f) in units.items():
                if a == value.arm:
                    scores = naive_requests(u, f, end, shown, events, name)
                    per.append((sum(scores), len(scores)))
            theirs = ratio_estimate(PairMoments.of(*np.array(per).T))
            assert (value.value, value.se) == (pytest.approx(theirs.value), pytest.approx(theirs.se))


def naive_requests(user, first, end, shown, events, measure):
    lists: dict[int, dict[int, int]] = {}
    for u, h, request, item, position in zip(
        *(shown[c] for c in ("user", "hours", "request", "item", "position")), strict=True
    ):
        if u == user and first <= h < end:
            items = lists.setdefault(request, {})
            items[item] = min(position, items.get(item, 99))
    scores = []
    for request, items in lists.items():
        ranked = sorted(items, key=lambda item: (items[item], item))
        worth = {"click": 1.0, "purchase": 3.0} if measure == "ndcg" else {"click": 1.0}
        gains = [
            max(
                [worth.get(k, 0.0) for k, _, h, _, r, i in events if r == request and i == item and h < end],
                default=0.0,
            )
            for item in ranked
        ]
        if measure == "ndcg":
            ideal = sum(g / math.log2(r + 2) for r, g in enumerate(sorted(gains, reverse=True)[:3]))
            scores.append(sum(g / math.log2(r + 2) for r, g in enumerate(gains[:3])) / ideal if ideal else 0.0)
        else:
            scores.append(next((1 / (r + 1) for r, g in enumerate(gains[:3]) if g > 0), 0.0))
    return scores


@pytest.mark.parametrize("kind", ["count", "proportion", "ratio", "winsorized"])
def test_the_last_day_of_a_series_is_the_whole(log, kind):
    """Running totals built of daily increments end at the estimate over all data."""
    rng = np.random.default_rng(9)
    n = 300
    first = rng.uniform(0, 24 * 5, n)
    log.exposures(np.arange(n), np.where(np.arange(n) % 2, "control", "new"), first)
    who = rng.integers(0, n, 2000)
    log.feedback(who, first[who] + rng.uniform(0, 24 * 9, 2000))
    log.impressions(np.repeat(np.arange(n), 3), np.repeat(first, 3) + 0.1)
    one = {
        "count": {"name": "m", "type": "count", "event": "click"},
        "winsorized": {"name": "m", "type": "count", "event": "click", "winsorize": 0.9},
        "proportion": {"name": "m", "type": "proportion", "event": "click"},
        "ratio": {
            "name": "m",
            "type": "ratio",
            "numerator": {"event": "click"},
            "denominator": {"event": "impression"},
        },
    }[kind]
    result = build_report(log.home, "test", metrics=metrics([one | {"cuped": False}]), until=log.until).metrics[0]
    last, whole = result.series[-1].cumulative, result.comparisons[0].relative
    np.testing.assert_allclose([last.estimate, last.se], [whole.estimate, whole.se], rtol=1e-9)
    assert len(result.series) == 14


def test_a_wrong_sample_ratio_blocks_and_shows_no_effect(log):
    log.exposures(np.arange(1000), ["control"] * 600 + ["new"] * 400).feedback(np.arange(500))
    result = build_report(log.home, "test", metrics=metrics(), until=log.until)
    assert result.sample_ratio.mismatch
    assert (result.conclusion.blocked, result.conclusion.verdict, result.metrics) == (True, "do not ship", ())
    assert "MISMATCH" in render(result, "text")
    planned = build_report(log.home, "test", metrics=metrics(), until=log.until, weights={"control": 6, "new": 4})
    assert not planned.conclusion.blocked


def test_the_planned_split_follows_the_configuration_version_of_the_first_exposure(log):
    """90/10 under version 1, 50/50 under version 2: neither alone explains the counts, both together do."""
    from experiments.report_plan import Plan

    log.exposures(np.arange(1000), ["control"] * 900 + ["new"] * 100, config_version=1)
    log.exposures(np.arange(1000, 2000), ["control"] * 500 + ["new"] * 500, 24.0, config_version=2)
    weights = {1: {"control": 9, "new": 1}, 2: {"control": 1, "new": 1}, None: {"control": 1, "new": 1}}
    plan = Plan(experiment="test", layer="rank", unit_kind="user", arms=("control", "new"), weights=weights)
    result = build_report(log.home, "test", plan=plan, metrics=metrics(ONE), until=log.until)
    assert result.sample_ratio.expected == {"control": 1400.0, "new": 600.0}
    assert not result.sample_ratio.mismatch


def test_units_in_two_arms_forced_units_and_bad_ids_are_left_out_and_counted(log):
    log.exposures(np.arange(100), ["control", "new"] * 50)
    log.exposures([0, 2, 4], ["new"] * 3, 1.0).exposures([7], ["new"], 1.0, forced=True)
    log.exposures(["anna", "9.5e99"], ["control", "new"]).exposures([8], ["gone"])
    result = build_report(
        log.home, "test", metrics=metrics(ONE), until=log.until, plan=plain_plan(), despite_mismatch=True
    )
    counts = result.counts
    assert (counts.n_crossed_units, counts.n_forced_units, counts.n_bad_ids, counts.n_unknown_arm) == (3, 1, 2, 1)
    assert sum(counts.units.values()) == 96
    assert len(result.warnings) >= 4


def plain_plan():
    from experiments.report_plan import plan_from_log

    return replace(plan_from_log("test", layer="rank", unit_kind="user", arms=("control", "new")), notes=())


def test_events_before_exposure_are_no_outcome(log):
    log.exposures(np.arange(100), ["control", "new"] * 50, 100.0).feedback(np.arange(100), 99.999)
    result = build_report(log.home, "test", metrics=metrics(ONE), until=log.until)
    assert [value.value for value in result.metrics[0].arms] == [0.0, 0.0]
    assert "every value is zero" in result.metrics[0].notes[-1]


def test_all_zero_outcomes_get_an_answer_and_no_effect(log):
    log.exposures(np.arange(100), ["control", "new"] * 50)
    result = build_report(log.home, "test", metrics=metrics(), until=log.until)
    assert result.conclusion.verdict == "keep running"
    clicks = result.metrics[0]
    assert any("every value is zero" in note for note in clicks.notes)
    assert clicks.comparisons[0].absolute.p_value == 1.0
    for form in ("text", "html", "json"):
        assert render(result, form)


def test_an_arm_without_units_gets_a_clear_answer(log):
    log.exposures(np.arange(3), ["control"] * 3)
    result = build_report(log.home, "test", metrics=metrics(), until=log.until, plan=plain_plan())
    assert result.conclusion.blocked
    assert "new has no unit yet" in result.conclusion.headline
    log.exposures(np.arange(3, 100), ["control"] * 97)
    result = build_report(log.home, "test", metrics=metrics(), until=log.until, plan=plain_plan())
    assert result.sample_ratio.mismatch
    assert any("no unit at all" in reason for reason in result.conclusion.reasons)


def test_values_that_are_not_finite_are_left_out(log):
    log.exposures(np.arange(100), ["control", "new"] * 50)
    log.feedback(np.arange(100), type="purchase", value=[1.0, math.inf, 2.0, -math.inf, math.nan] * 20)
    declared = [{"name": "spent", "type": "mean", "event": "purchase"}]
    result = build_report(log.home, "test", metrics=metrics(declared), until=log.until)
    assert all(math.isfinite(value.value) for value in result.metrics[0].arms)
    assert any("60 purchase values are not finite" in warning for warning in result.warnings)


def test_one_unit_with_a_million_events_is_named_and_capped(log):
    log.exposures(np.arange(2000), ["control", "new"] * 1000)
    log.feedback(np.concatenate([np.zeros(1_000_000, dtype=int), np.arange(2000)]))
    plain = build_report(log.home, "test", metrics=metrics(ONE), until=log.until).metrics[0]
    assert any("one unit" in note for note in plain.notes)
    capped = build_report(log.home, "test", metrics=metrics([ONE[0] | {"winsorize": 0.99}]), until=log.until).metrics[0]
    assert max(value.value for value in capped.arms) < 3
    assert capped.comparisons[0].absolute.se < plain.comparisons[0].absolute.se / 100


def test_a_cap_that_would_wipe_out_the_metric_is_not_applied(log):
    log.exposures(np.arange(1000), ["control", "new"] * 500).feedback(np.arange(5))
    result = build_report(log.home, "test", metrics=metrics([ONE[0] | {"winsorize": 0.99}]), until=log.until)
    assert sum(value.value * value.n for value in result.metrics[0].arms) == pytest.approx(5)
    assert any("not winsorised" in note for note in result.metrics[0].notes)


def test_only_exposures_since_count(log):
    log.exposures(np.arange(100), ["control", "new"] * 50, 0.0)
    log.exposures(np.arange(100, 160), ["control", "new"] * 30, 48.0)
    since = log.until - timedelta(days=29)
    result = build_report(log.home, "test", metrics=metrics(ONE), since=since, until=log.until)
    assert sum(result.counts.units.values()) == 60
    with pytest.raises(SpecError, match="lies before until"):
        build_report(log.home, "test", metrics=metrics(ONE), since=log.until, until=log.until)


def test_a_triggered_report_holds_the_units_that_an_exposure_marks(log):
    log.exposures(np.arange(100), ["control", "new"] * 50)
    log.exposures(np.arange(40), ["control", "new"] * 20, 1.0, counterfactual=True)
    result = build_report(log.home, "test", metrics=metrics(ONE), until=log.until, triggered=True)
    assert sum(result.counts.units.values()) == 40


def test_requests_can_be_the_unit(log):
    ids = [f"r{i}" for i in range(200)]
    log.exposures(ids, ["control", "new"] * 100, unit_kind="request", request_ids=ids)
    log.feedback(np.zeros(60, dtype=int), request_ids=ids[:60])
    result = build_report(log.home, "test", metrics=metrics(ONE), until=log.until)
    assert [value.value for value in result.metrics[0].arms] == [0.3, 0.3]


def test_other_units_are_joined_by_their_requests_and_the_report_says_so(log):
    shops = [f"s{i % 50}" for i in range(100)]
    ids = [f"r{i}" for i in range(100)]
    log.exposures(shops, ["control", "new"] * 50, unit_kind="shop", request_ids=ids)
    log.feedback(np.zeros(100, dtype=int), request_ids=ids)
    result = build_report(log.home, "test", metrics=metrics(ONE), until=log.until)
    assert [(value.n, value.value) for value in result.metrics[0].arms] == [(25, 2.0), (25, 2.0)]
    assert any("shop id" in warning for warning in result.warnings)


def test_a_log_taken_in_slices_of_its_units_gives_the_same_report(log, monkeypatch):
    random_log(log, 3)

    def numbers():
        result = build_report(log.home, "test", metrics=metrics(), until=log.until, despite_mismatch=True)
        return [
            [(c.deciding.estimate, c.deciding.se, c.deciding.low) for c in r.comparisons]
            + [(point.n_units, point.cumulative.estimate, point.daily.estimate) for point in r.series]
            for r in result.metrics
        ]

    whole = numbers()
    monkeypatch.setattr("experiments.report_events.SLICE_ROWS", 50)  # 500 events, 700 impressions
    for ours, theirs in zip(numbers(), whole, strict=True):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9)


@pytest.mark.parametrize("damage", ["cut short", "bytes overwritten", "not parquet"])
@pytest.mark.parametrize("table", ["exposures", "feedback"])
def test_a_damaged_part_is_named(log, monkeypatch, table, damage):
    rng = np.random.default_rng(0)
    log.exposures(range(5000), rng.choice(["control", "new"], 5000), rng.uniform(0, 50, 5000))
    log.feedback(rng.integers(0, 5000, 5000), rng.uniform(0, 90, 5000))
    part = log.home.events / table / "part-1.parquet"
    whole = part.read_bytes()
    middle = b"\xff" * (len(whole) - 8000)
    part.write_bytes(
        {"cut short": whole[:-100], "bytes overwritten": whole[:4] + middle + whole[4 + len(middle) :],
         "not parquet": b"hello"}[damage]
    )  # fmt: skip
    monkeypatch.chdir(log.home.project)
    ran = CliRunner().invoke(report, ["test", "--until", "2026-03-20"])
    assert isinstance(ran.exception, DataError), ran.output
    assert "cannot be read" in str(ran.exception)
    assert str(log.home.events) in str(ran.exception)


def test_an_unknown_experiment_is_named_with_its_nearest(log):
    log.exposures(np.arange(10), ["control", "new"] * 5)
    with pytest.raises(UnknownNameError, match="did you mean 'test'"):
        build_report(log.home, "tset", metrics=metrics(ONE), until=log.until)


def effect_log(log, lift, n=4000, seed=1, guard=1.0):
    rng = np.random.default_rng(seed)
    users = np.arange(n)
    log.exposures(users, np.where(users % 2, "control", "new"), rng.uniform(0, 48, n))
    clicks = rng.poisson(np.where(users % 2, 5.0, 5.0 * (1 + lift)))
    log.feedback(np.repeat(users, clicks), 60.0)
    visits = rng.poisson(np.where(users % 2, 20.0, 20.0 * guard))
    log.impressions(np.repeat(users, visits), 60.0)
    return log


GUARDED = [
    ONE[0] | {"role": "primary"},
    {"name": "seen", "type": "count", "event": "impression", "role": "guardrail", "margin": 0.05},
]


@pytest.mark.parametrize(
    ("lift", "guard", "min_effect", "verdict", "says"),
    [
        (0.15, 1.0, 0.02, "ship", "improved and every guard-rail holds"),
        (-0.15, 1.0, 0.02, "do not ship", "clicks got worse"),
        (0.15, 0.85, 0.02, "do not ship", "seen got worse"),
        (0.0, 1.0, 0.02, "keep running", "cannot tell yet"),
        (0.0, 1.0, 0.2, "do not ship", "no effect large enough"),
        (0.15, 0.955, 0.02, "keep running", "may still be harmed"),
    ],
)
def test_the_conclusion_says_what_to_do_and_why(log, lift, guard, min_effect, verdict, says):
    effect_log(log, lift, guard=guard)
    declared = [GUARDED[0] | {"min_effect": min_effect}, GUARDED[1]]
    result = build_report(log.home, "test", metrics=metrics(declared), until=log.until)
    assert result.conclusion.verdict == verdict
    assert says in result.conclusion.headline
    assert result.conclusion.reasons


def test_each_decision_rule_widens_the_interval_as_it_must(log):
    effect_log(log, 0.02)
    width = {}
    for decision in ("fixed", "sequential", "group_sequential"):
        chosen = metrics(ONE, decision=decision, planned_units=8000, looks=4)
        effect = build_report(log.home, "test", metrics=chosen, until=log.until).metrics[0].comparisons[0].deciding
        width[decision] = effect.high - effect.low
    # Half of the planned units are in: the second of four O'Brien-Fleming looks, 2.963 standard errors.
    assert width["fixed"] < width["sequential"]
    assert width["group_sequential"] / width["fixed"] == pytest.approx(2.963 / 1.96, rel=2e-3)


def test_an_interaction_with_another_layer_is_found_and_absence_is_not(log):
    rng = np.random.default_rng(3)
    n = 6000
    users, new, other = np.arange(n), rng.random(n) < 0.5, rng.random(n) < 0.5
    log.exposures(users, np.where(new, "new", "control"))
    log.exposures(users, np.where(other, "on", "off"), experiment="clash", layer="recall")
    log.exposures(users, np.where(rng.random(n) < 0.5, "on", "off"), experiment="quiet", layer="ui")
    log.exposures(users, np.where(other, "on", "off"), experiment="bandit", layer="third", propensity=0.5)
    clicks = rng.poisson(4 + 1.0 * (new & other))
    log.feedback(np.repeat(users, clicks), 5.0)
    found = {
        i.experiment: i
        for i in build_report(log.home, "test", metrics=metrics(ONE), until=log.until).metrics[0].interactions
    }
    assert found["clash"].p_adjusted < 1e-6
    assert found["quiet"].p_adjusted > 0.01
    assert "bandit" not in found  # it moves units between its arms


def test_segments_split_by_user_attributes_and_correct_for_their_number(log):
    effect_log(log, 0.3, n=2000)
    log.users(
        range(2000), plan=["free" if u % 4 < 2 else "paid" for u in range(2000)], age=[u % 60 for u in range(2000)]
    )
    result = build_report(log.home, "test", metrics=metrics(ONE, segments=["plan", "age", "nothing"]), until=log.until)
    found = result.metrics[0].segments
    assert {s.label for s in found if s.attribute == "plan"} == {"free", "paid"}
    assert {s.label for s in found if s.attribute == "age"} == {"up to 14", "up to 29", "up to 44", "above 44"}
    assert sum(s.n_units for s in found if s.attribute == "age") == 2000
    assert all(s.p_adjusted >= s.effect.p_value for s in found)
    assert any("no segment 'nothing'" in warning for warning in result.warnings)


def test_novelty_shows_as_an_effect_that_falls_with_days_since_exposure(log):
    rng = np.random.default_rng(4)
    n = 3000
    users, new = np.arange(n), np.arange(n) % 2 == 0
    log.exposures(users, np.where(new, "new", "control"), rng.uniform(0, 24, n))
    for day in range(12):
        clicks = rng.poisson(np.where(new, 1 + 0.6 * 0.7**day, 1.0))
        log.feedback(np.repeat(users, clicks), 24.0 * day + 24 + 1)
    trend = build_report(log.home, "test", metrics=metrics(ONE), until=log.until).metrics[0].trends[0]
    assert trend.slope_per_day < 0
    assert trend.p_value < 1e-4
    assert trend.first > 0.2 > 0.1 > trend.last


def test_splitting_the_control_arm_at_random_finds_nothing(log):
    effect_log(log, 0.5, n=1000)
    check = build_report(log.home, "test", metrics=metrics(ONE), until=log.until, aa=400).aa["clicks"]
    assert check.healthy
    assert 0.02 < check.false_positive_share < 0.09


def test_a_difference_before_exposure_is_reported(log):
    n = 1000
    log.exposures(np.arange(n), np.where(np.arange(n) % 2, "control", "new"), 100.0)
    log.feedback(np.arange(0, n, 2), 50.0).feedback(np.arange(300), 60.0).feedback(np.arange(n), 120.0)
    result = build_report(log.home, "test", metrics=metrics(ONE), until=log.until)
    assert result.metrics[0].pre_period["new"] < 1e-6
    assert any("already before exposure" in warning for warning in result.warnings)


def test_the_json_report_is_plain_and_holds_no_nan(log):
    effect_log(log, 0.1, n=400)
    text = render(build_report(log.home, "test", metrics=metrics(GUARDED), until=log.until), "json")
    plain = json.loads(text)
    assert plain["conclusion"]["verdict"]
    assert plain["sample_ratio"]["mismatch"] is False
    assert "NaN" not in text


def test_names_are_escaped_in_html(log):
    log.exposures(np.arange(100), ["<script>alert(1)</script>", "control"] * 50).feedback(np.arange(100))
    page = render(build_report(log.home, "test", metrics=metrics(ONE), until=log.until), "html")
    assert "<script>" not in page


def test_the_command_writes_a_page_and_prints_the_conclusion(log, monkeypatch):
    effect_log(log, 0.2, n=400)
    monkeypatch.chdir(log.home.project)
    page = log.home.project / "out" / "page.html"
    result = CliRunner().invoke(report, ["test", "--format", "html", "--out", str(page), "--until", "2026-03-30"])
    assert result.exit_code == 0, result.output
    assert "Report:" in result.output
    assert page.read_text().startswith("<!doctype html>")
    plain = CliRunner().invoke(
        report, ["test", "--since", "2026-03-01", "--until", "2026-03-30", "--decision", "fixed"]
    )
    assert "Sample ratio" in plain.output


def test_power_takes_its_numbers_from_an_experiment_that_has_run(log, monkeypatch):
    effect_log(log, 0.0, n=2000)
    monkeypatch.chdir(log.home.project)
    result = CliRunner().invoke(power, ["--like", "test", "--metric", "clicks_per_user", "--format", "json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.output)
    assert plan["baseline"] == pytest.approx(5.0, abs=0.2)
    assert plan["std"] == pytest.approx(math.sqrt(5.0), abs=0.2)
    assert plan["rules"]["fixed"]["days"] == pytest.approx(plan["rules"]["fixed"]["units"] / 1000)
    for wrong, says in ((["--like", "test", "--metric", "x"], "no metric 'x'"), ([], "give --baseline")):
        with pytest.raises(SpecError, match=says):
            CliRunner().invoke(power, wrong, catch_exceptions=False)


def test_power_plans_agree_with_statsmodels_and_refuse_nonsense():
    from statsmodels.stats.power import NormalIndPower

    plan = power_plan(baseline=0.1, effect=0.05, daily_units=10_000)
    n = NormalIndPower().solve_power(0.005 / 0.3, alpha=0.05, power=0.8)
    assert plan["rules"]["fixed"]["units_per_arm"] == math.ceil(n)
    assert plan["rules"]["sequential"]["units"] > plan["rules"]["group_sequential_obrien_fleming"]["units"]
    assert plan["detectable"][-1]["effect"] < plan["detectable"][0]["effect"]
    for wrong in ({"baseline": 3.0}, {"baseline": 0.1, "alpha": 2.0}, {"baseline": 0.1, "arms": 1}):
        with pytest.raises(SpecError):
            power_plan(**wrong)
    assert parse_weights("a=1, b=2.5") == {"a": 1.0, "b": 2.5}
    with pytest.raises(SpecError, match="a=1,b=1"):
        parse_weights("a")
