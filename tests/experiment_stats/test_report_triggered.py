"""Triggered analysis: only those whom the experiment could touch, and only from when it could."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from experiments.metrics import parse_metrics
from experiments.report import build_report

CLICKS = parse_metrics(
    {
        "metrics": [{"name": "clicks", "type": "count", "event": "click", "role": "primary", "cuped": False}],
        "analysis": {"bootstrap": 0},
    }
)


def test_outcomes_count_from_the_first_marked_exposure_on(log: Any) -> None:
    """Against a loop over users with plain and marked exposures in any order, and clicks all along."""
    rng = np.random.default_rng(5)
    arm = {user: ("a", "b")[user % 2] for user in range(60)}
    trigger: dict[int, float] = {}
    for marked in (False, True, True, False):
        users = rng.choice(60, 30, replace=False).tolist()
        hours = rng.uniform(0, 100, 30)
        log.exposures(users, [arm[u] for u in users], hours, counterfactual=marked)
        for user, hour in zip(users, hours, strict=True):
            if marked:
                trigger[user] = min(hour, trigger.get(user, 1e9))
    clicked, at = rng.integers(0, 60, 900), rng.uniform(0, 150, 900)
    log.feedback(clicked, at)
    result = build_report(log.home, "test", metrics=CLICKS, until=log.until, triggered=True, despite_mismatch=True)
    assert 30 < len(trigger) < 60
    for value in result.metrics[0].arms:
        counts = [
            sum(who == user and hour >= since for who, hour in zip(clicked, at, strict=True))
            for user, since in trigger.items()
            if arm[user] == value.arm
        ]
        assert (value.n, value.value) == (len(counts), pytest.approx(np.mean(counts)))


def test_where_nothing_is_marked_the_report_says_so(log: Any) -> None:
    log.exposures(range(100), ["a", "b"] * 50)
    result = build_report(log.home, "test", metrics=CLICKS, until=log.until, triggered=True)
    assert result.conclusion.blocked and "can be analysed" in result.conclusion.headline
    assert "100 exposures, of which 0 units are marked counterfactual" in result.conclusion.reasons[0]


def test_dilution_disappears(log: Any) -> None:
    """30,000 simulated users, of whom a tenth meet the place where the arms differ and there click 0.2 more.

    Over all users the effect is a tenth of that and drowns in the others' clicks; among the triggered it is whole.
    """
    rng = np.random.default_rng(11)
    n, effect = 30_000, 0.2
    users, treated, met = np.arange(n), rng.random(n) < 0.5, rng.random(n) < 0.1
    arms = np.where(treated, "b", "a")
    log.exposures(users[~met], arms[~met])
    log.exposures(users[met], arms[met], counterfactual=True)
    clicks = rng.poisson(1.0 + effect * (treated & met))
    log.feedback(np.repeat(users, clicks))

    def absolute(*, triggered: bool) -> Any:
        result = build_report(log.home, "test", metrics=CLICKS, until=log.until, triggered=triggered)
        return result.metrics[0].comparisons[0].absolute, sum(result.counts.units.values())

    (diluted, n_all), (whole, n_met) = absolute(triggered=False), absolute(triggered=True)
    assert (n_all, n_met) == (n, met.sum())
    assert whole.low < effect < whole.high and whole.p_value < 0.001
    assert diluted.low < 0.1 * effect < diluted.high and diluted.high < effect / 2
    z = {name: found.estimate / found.se for name, found in (("all", diluted), ("met", whole))}
    assert z["met"] > 2 * z["all"], "power: the square root of the untriggered share, 3.2 in expectation"
