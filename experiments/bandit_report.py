"""The report on a bandit: what each arm would earn alone, what the bandit earned, and what learning cost.

Shares moved while it ran, so a bandit is no fixed split: a planned ratio cannot be checked, and plain means of the arms
mix times and contexts. Every decision is weighed by 1 / its logged propensity instead. What stands for the sample-ratio
check: if the log is whole, the weights of each arm average one.
Sources: Horvitz and Thompson, JASA 47, 1952 (IPS); Swaminathan and Joachims, NeurIPS 2015 (SNIPS); errors by the delta
method with units as clusters, as Deng, Knoblich and Lu, KDD 2018.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from statistics import NormalDist
from typing import Any

import duckdb
import numpy as np

from experiments.decisions import DecisionCounts, decision_tables
from experiments.report_events import quote
from experiments.report_model import plain
from experiments.spec import Experiment
from experiments.stats.moments import FloatArray
from plait.clock import Clock
from plait.errors import SpecError
from plait.settings import Home

ALPHA, CHECKED_BELOW = 0.05, 0.001
MIN_DECISIONS = 30
"""An arm with fewer decisions is shown, but neither called the best nor checked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """An estimate with its two-sided 95 % interval; not a number where units are too few."""

    value: float
    se: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmReport:
    """One arm. snips, ips: mean reward if every decision had been this arm. difference: snips minus the control's."""

    arm: str
    decisions: int
    share: float
    snips: Value
    ips: Value
    difference: Value | None
    effective_decisions: float
    weight: Value  # mean of the arm's weights, 1 if the log is whole
    check_p: float | None  # of that; None where there are too few decisions to say


@dataclass(frozen=True, kw_only=True, slots=True)
class Day:
    """One day (UTC): decisions per arm, in the report's order, and the mean reward."""

    day: str
    decisions: tuple[int, ...]
    reward: float


@dataclass(frozen=True, kw_only=True, slots=True)
class BanditReport:
    """The whole report. regret: per decision, what the best single arm earns more than the bandit did."""

    experiment: str
    layer: str
    method: str
    reward: str
    control: str
    state: str
    policy: int | None
    since: datetime | None
    until: datetime
    created: datetime
    counts: DecisionCounts
    n_units: int
    earned: Value | None
    arms: tuple[ArmReport, ...]
    best: str | None
    regret: Value | None
    check_p: float | None
    days: tuple[Day, ...]
    headline: str
    warnings: tuple[str, ...]

    @property
    def blocked(self) -> bool:
        """Whether the log's propensities do not fit its arms, so that no estimate is to be believed."""
        return self.check_p is not None and self.check_p < CHECKED_BELOW

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: times as ISO 8601, what is not a number as null."""
        return {"kind": "bandit", **plain(self), "blocked": self.blocked}


def build_bandit_report(
    home: Home,
    experiment: Experiment,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    policy: int | None = None,
    memory: str = "1000MB",
    threads: int = 2,
) -> BanditReport:
    """The report over the decisions in the home's event tables, unweighted by age.

    since, until: aware; decisions from `since` on (default: all), known before `until` (default: now).
    policy: the version that serves now. Raises SpecError for a window that runs backwards.
    """
    bandit = experiment.bandit
    assert bandit is not None, "find_bandit returns bandits"
    clock = Clock.of(home)
    until = until or clock.now()
    if since is not None and since >= until:
        raise SpecError(f"since ({since.isoformat()}) lies before until ({until.isoformat()})")
    whole = replace(experiment, bandit=replace(bandit, half_life=None, by_request=True))
    names = _ordered(experiment)
    with decision_tables(home.events, whole, until, since=since, memory=memory, threads=threads) as (db, counts):
        sums = _Sums.of(db, names)
        days = tuple(_days(db, names))
    arms, earned, regret, best, check = _estimates(sums, names)
    report = BanditReport(
        experiment=experiment.name,
        layer=experiment.layer,
        method=bandit.method,
        reward=bandit.reward,
        control=names[0],
        state=experiment.state,
        policy=policy,
        since=since,
        until=until,
        created=clock.now(),
        counts=counts,
        n_units=sums.n_units,
        earned=earned,
        arms=tuple(arms),
        best=best,
        regret=regret,
        check_p=check,
        days=days,
        headline="",
        warnings=tuple(_warnings(experiment, counts, sums.n_units)),
    )
    return replace(report, headline=_headline(report))


def _ordered(experiment: Experiment) -> list[str]:
    names = [arm.name for arm in experiment.arms]
    control = experiment.control or names[0]
    return [control, *(name for name in names if name != control)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sums:
    """Means over units of n (decisions), r (rewards) and per arm w (weights), t (weighted rewards), and how the
    estimates made of them vary together. K arms."""

    n_units: int
    mean: Mapping[str, float]
    per_arm: Sequence[tuple[int, float, float]]  # decisions, sum of weights, sum of their squares
    cov: FloatArray  # (3 K + 1, 3 K + 1): of the influence of one unit on [earned, snips…, ips…, weight…]

    @classmethod
    def of(cls, db: duckdb.DuckDBPyConnection, names: Sequence[str]) -> _Sums:
        k = len(names)
        weighted = ", ".join(
            f"coalesce(sum(1 / propensity) FILTER (arm = {quote(name)}), 0) AS w{i}, "
            f"coalesce(sum(reward / propensity) FILTER (arm = {quote(name)}), 0) AS t{i}"
            for i, name in enumerate(names)
        )
        db.execute(f"""
            CREATE TEMP TABLE per_unit AS
            SELECT unit, count(*)::DOUBLE AS n, sum(reward) AS r, {weighted} FROM decisions GROUP BY 1""")
        columns = ["n", "r", *(f"{c}{i}" for c in "wt" for i in range(k))]
        row = db.execute(f"SELECT count(*), {', '.join(f'avg({c})' for c in columns)} FROM per_unit").fetchone()
        assert row is not None
        mean = {name: math.nan if value is None else value for name, value in zip(columns, row[1:], strict=True)}
        found = {
            arm: (n, w, squares)
            for arm, n, w, squares in db.execute(
                "SELECT arm, count(*), sum(1 / propensity), sum(1 / propensity**2) FROM decisions GROUP BY 1"
            ).fetchall()
        }
        per_arm = [found.get(name, (0, 0.0, 0.0)) for name in names]
        ratios = [("r", "n"), *((f"t{i}", f"w{i}") for i in range(k)), *((f"t{i}", "n") for i in range(k))]
        ratios += [(f"w{i}", "n") for i in range(k)]
        if row[0] < 2:
            return cls(n_units=row[0], mean=mean, per_arm=per_arm, cov=np.full((len(ratios),) * 2, math.nan))
        parts = []
        for j, (top, below) in enumerate(ratios):  # of a ratio of means: (top - ratio below) / mean of below
            scale = mean[below]
            parts.append(f"({top} - {mean[top] / scale!r} * {below}) / {scale!r} AS x{j}" if scale else f"0 AS x{j}")
        influence = ", ".join(parts)
        pairs = [(a, b) for a in range(len(ratios)) for b in range(a, len(ratios))]
        picked = ", ".join(f"covar_samp(x{a}, x{b})" for a, b in pairs)
        values = db.execute(f"SELECT {picked} FROM (SELECT {influence} FROM per_unit)").fetchone()
        assert values is not None
        cov = np.zeros((len(ratios), len(ratios)))
        for (a, b), value in zip(pairs, values, strict=True):
            cov[a, b] = cov[b, a] = value
        return cls(n_units=row[0], mean=mean, per_arm=per_arm, cov=cov)

    def ratio(self, top: str, below: str) -> float:
        return self.mean[top] / self.mean[below] if self.mean[below] else math.nan

    def variance(self, a: int, b: int | None = None) -> float:
        """Of estimate a, or of estimate a minus estimate b."""
        one = self.cov[a, a] if b is None else self.cov[a, a] + self.cov[b, b] - 2 * self.cov[a, b]
        return max(float(one), 0.0) / self.n_units if self.n_units else math.nan


def _estimates(
    sums: _Sums, names: Sequence[str]
) -> tuple[list[ArmReport], Value | None, Value | None, str | None, float | None]:
    """The arms, what was earned, the regret against the best arm, that arm, and the check's p-value."""
    k, total = len(names), sum(n for n, _, _ in sums.per_arm)
    arms: list[ArmReport] = []
    for i, name in enumerate(names):
        n, weights, squares = sums.per_arm[i]
        snips = sums.ratio(f"t{i}", f"w{i}") if n else math.nan
        weight = _value(sums.ratio(f"w{i}", "n"), sums.variance(1 + 2 * k + i))
        check = None
        if n >= MIN_DECISIONS and weight.se > 0:
            check = 2 * NormalDist().cdf(-abs(weight.value - 1) / weight.se)
        difference = None
        if i and n and sums.per_arm[0][0]:
            difference = _value(snips - sums.ratio("t0", "w0"), sums.variance(1 + i, 1))
        arms.append(
            ArmReport(
                arm=name,
                decisions=n,
                share=n / total if total else math.nan,
                snips=_value(snips, sums.variance(1 + i) if n else math.nan),
                ips=_value(sums.ratio(f"t{i}", "n"), sums.variance(1 + k + i)),
                difference=difference,
                effective_decisions=weights**2 / squares if squares else 0.0,
                weight=weight,
                check_p=check,
            )
        )
    checks = [arm.check_p for arm in arms if arm.check_p is not None]
    check_p = min(1.0, len(checks) * min(checks)) if checks else None
    if not total:
        return arms, None, None, None, check_p
    earned = sums.ratio("r", "n")
    tried = [i for i, arm in enumerate(arms) if arm.decisions >= MIN_DECISIONS]
    if not tried:
        return arms, _value(earned, sums.variance(0)), None, None, check_p
    top = max(tried, key=lambda i: arms[i].snips.value)
    regret = _value(arms[top].snips.value - earned, sums.variance(1 + top, 0))
    return arms, _value(earned, sums.variance(0)), regret, arms[top].arm, check_p


def _value(value: float, variance: float) -> Value:
    se = math.sqrt(variance) if variance >= 0 else math.nan
    half = NormalDist().inv_cdf(1 - ALPHA / 2) * se
    return Value(value=value, se=se, low=value - half, high=value + half)


def _days(db: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[Day]:
    counted = ", ".join(f"count(*) FILTER (arm = {quote(name)})" for name in names)
    rows = db.execute(f"""
        SELECT strftime(make_timestamp(ts), '%Y-%m-%d') AS day, avg(reward), {counted}
        FROM decisions GROUP BY 1 ORDER BY 1""").fetchall()
    return [Day(day=day, reward=reward, decisions=tuple(counts)) for day, reward, *counts in rows]


def _warnings(experiment: Experiment, counts: DecisionCounts, n_units: int) -> list[str]:
    warnings = []
    if counts.fixed_split:
        warnings.append(
            f"{counts.fixed_split:,} exposures of a time when {experiment.name} was a fixed split are left out; "
            "a bandit is best given a name of its own"
        )
    if counts.forced:
        warnings.append(f"{counts.forced:,} exposures of testers are left out")
    if counts.unusable:
        warnings.append(
            f"{counts.unusable:,} exposures name an arm that is not configured, or a propensity that is not within "
            "(0, 1], and are left out"
        )
    if counts.decisions and n_units < 50:
        warnings.append(f"only {n_units} units: intervals from so few are too narrow")
    return warnings


def _headline(report: BanditReport) -> str:
    if not report.counts.decisions or report.earned is None:
        return f"No decision of {report.experiment} is in the log yet (they count once they are old enough: `wait`)."
    if report.blocked:
        return (
            "Do not believe these numbers: the arms were not served as often as their logged propensities say "
            f"(p {report.check_p:.2g}). Look for exposures that are lost in one arm."
        )
    if report.best is None or report.regret is None:
        return f"Too early: no arm has {MIN_DECISIONS} decisions yet."
    earned = f"The bandit earned {report.earned.value:.5g} a decision"
    if not math.isfinite(report.regret.low):
        return f"{earned}; more than one unit is needed to say how sure that is."
    if report.regret.high < 0:
        return f"{earned}, more than any single arm would have ({report.best}: {-report.regret.value:.5g} less)."
    if report.regret.low > 0:
        return f"{earned}; {report.best} alone would have earned {report.regret.value:.5g} more, the cost of learning."
    return f"{earned}, as much as the best single arm ({report.best}) within the error."
