"""Beyond the one number: day-by-day series, novelty, segments, interactions with other layers, A/A splits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from scipy import stats

from experiments.metrics import Analysis
from experiments.report_analysis import Handle, decide_effect, estimate_of, expressions_of
from experiments.report_events import DAY_US, micros, quote, slices
from experiments.report_model import LayerInteraction, SegmentResult, SeriesPoint, Trend
from experiments.report_query import UnitTables
from experiments.stats.checks import AACheck, aa_check, adjust, interaction
from experiments.stats.cuped import cuped_means, cuped_ratios
from experiments.stats.effects import difference, relative_lift
from experiments.stats.moments import (
    Estimate,
    FloatArray,
    Moments,
    PairMoments,
    VectorMoments,
    mean_estimate,
    ratio_estimate,
)
from experiments.stats.sequential import always_valid

MAX_SEGMENTS = 12  # values of an attribute; the rest is "other"
MIN_CELL = 30  # units in a cell of an interaction
MAX_DAY_ERROR = 0.35  # standard error of a day's log ratio, above which the day says nothing of a trend
_COLUMNS = 5  # sums of y, y^2, d, d^2, y d


def daily_units(tables: UnitTables) -> list[tuple[str, tuple[int, ...]]]:
    """New units per day and arm, from the first exposure's day to the last."""
    rows = tables.db.execute(
        f"SELECT (first // {DAY_US} - {tables.day0})::INTEGER, arm, count(*) FROM units GROUP BY 1, 2"
    ).fetchall()
    found = {(day, arm): n for day, arm, n in rows}
    last = max((day for day, _ in found), default=-1)
    return [
        (_date(tables, day), tuple(found.get((day, arm), 0) for arm in range(len(tables.plan.arms))))
        for day in range(last + 1)
    ]


def series(tables: UnitTables, handle: Handle, analysis: Analysis, sums: DailySums) -> list[SeriesPoint]:
    """The effect by calendar day: of everything so far (fixed and always-valid interval), and of each day alone."""
    by_day = sums.by_day
    new = daily_units(tables)
    n_days = max([len(new), *(day + 1 for day in by_day)], default=0)
    last_day = (micros(tables.until) - 1) // DAY_US - tables.day0
    n_arms = len(tables.plan.arms)
    total = np.zeros((n_arms, _COLUMNS))
    entered = np.zeros(n_arms, dtype=np.int64)
    points = []
    for day in range(min(n_days, last_day + 1)):
        running, alone = by_day.get(day, (np.zeros((n_arms, _COLUMNS)), np.zeros((n_arms, _COLUMNS))))
        total = total + running
        if day < len(new):
            entered = entered + np.array(new[day][1])
        sofar = [_estimate(handle, int(entered[arm]), total[arm]) for arm in range(n_arms)]
        today = [_estimate(handle, int(entered[arm]), alone[arm]) for arm in range(n_arms)]
        for arm in range(1, n_arms):
            cumulative = relative_lift(sofar[0], sofar[arm], alpha=analysis.alpha)
            points.append(
                SeriesPoint(
                    day=_date(tables, day),
                    arm=tables.plan.arms[arm],
                    n_units=int(entered[0] + entered[arm]),
                    cumulative=cumulative,
                    sequential=always_valid(
                        cumulative,
                        n_units=int(entered[0] + entered[arm]),
                        alpha=analysis.alpha,
                        tuning_units=analysis.tuning_units,
                    ),
                    daily=relative_lift(today[0], today[arm], alpha=analysis.alpha),
                )
            )
    return points


def trends(tables: UnitTables, handle: Handle, sums: DailySums) -> list[Trend]:
    """Novelty: the relative effect by days since a unit's first exposure, and its weighted linear slope.

    Effects are log ratios, whose error does not depend on their sign; a day counts where its error is below 0.35,
    over the units that have been in long enough. Days are treated as independent, which makes the p-value a hint, not
    a verdict. At least six such days are needed, else no trend is given.
    """
    by_offset = sums.by_offset
    new = daily_units(tables)
    last_day = (micros(tables.until) - 1) // DAY_US - tables.day0
    n_arms = len(tables.plan.arms)
    entered = np.cumsum(np.array([counts for _, counts in new]).reshape(len(new), n_arms), axis=0)
    answer = []
    for arm in range(1, n_arms):
        days, logs, weights = [], [], []
        for offset in sorted(by_offset):
            eligible = min(last_day - offset, len(new) - 1)
            if eligible < 0:
                continue
            alone = by_offset[offset][1]
            control, treated = (_estimate(handle, int(entered[eligible][a]), alone[a]) for a in (0, arm))
            if not (control.usable and treated.usable and control.value > 0 and treated.value > 0):
                continue
            variance = control.variance / control.value**2 + treated.variance / treated.value**2
            if 0 < variance < MAX_DAY_ERROR**2:
                days.append(offset)
                logs.append(math.log(treated.value / control.value))
                weights.append(1 / variance)
        if len(days) < 6:
            continue
        x, y, w = np.array(days, dtype=np.float64), np.array(logs), np.array(weights)
        centre = np.average(x, weights=w)
        spread = float((w * (x - centre) ** 2).sum())
        slope = float((w * (x - centre) * y).sum() / spread)
        third = len(days) // 3
        answer.append(
            Trend(
                arm=tables.plan.arms[arm],
                slope_per_day=slope,
                p_value=2 * float(stats.norm.sf(abs(slope) * math.sqrt(spread))),
                first=math.expm1(float(np.average(y[:third], weights=w[:third]))),
                last=math.expm1(float(np.average(y[-third:], weights=w[-third:]))),
            )
        )
    return answer


@dataclass(frozen=True, kw_only=True, slots=True)
class DailySums:
    """One metric's sums by calendar day and by days since a unit's first exposure.

    Each entry holds two arrays of shape (n_arms, 5), columns y, y^2, d, d^2, y d (d: the denominator, 0 for a mean):
    the increments of the sums over units of running totals, and the sums of the day's own values.
    """

    by_day: dict[int, tuple[FloatArray, FloatArray]] = field(default_factory=dict)
    by_offset: dict[int, tuple[FloatArray, FloatArray]] = field(default_factory=dict)


def daily_sums(tables: UnitTables, handles: Sequence[Handle]) -> list[DailySums]:
    """The sums of every handle, in their order, from one pass of running totals over unit-days.

    Second moments of running totals come from the increments: the sum over units of S_t^2 is the running sum of
    S_t^2 - S_(t-1)^2 over the unit-days on which something happened.
    """
    names = sorted({c for h in handles for c in ((h.numerator, h.denominator) if h.is_ratio else (h.numerator,))})
    if not names:
        return []
    plain = ", ".join(f"sum(coalesce({name}, 0))::DOUBLE AS {name}" for name in names)
    running = ", ".join(f"sum({name}) OVER w AS {name}_to" for name in names)
    values, sums = [], []
    for i, handle in enumerate(handles):
        total, before = f"{handle.numerator}_to", f"{handle.numerator}_to - {handle.numerator}"
        values += [f"{_value(handle, total)} AS y{i}", f"{_value(handle, before)} AS p{i}"]
        y, p = f"y{i}", f"p{i}"
        d = f"{handle.denominator}_to" if handle.is_ratio else "0"
        e = f"({handle.denominator}_to - {handle.denominator})" if handle.is_ratio else "0"
        values += [f"{d} AS d{i}", f"{e} AS e{i}"]
        d, e = f"d{i}", f"e{i}"
        sums += [
            f"{y} - {p}",
            f"{y} * {y} - {p} * {p}",
            f"{d} - {e}",
            f"{d} * {d} - {e} * {e}",
            f"{y} * {d} - {p} * {e}",
        ]
        sums += [f"{y} - {p}", f"({y} - {p}) ** 2", f"{d} - {e}", f"({d} - {e}) ** 2", f"({y} - {p}) * ({d} - {e})"]
    query = f"""
        WITH unit_days AS (
            SELECT key, arm, first, day, {plain} FROM daily WHERE day >= 0 AND in_slice(key) GROUP BY 1, 2, 3, 4),
        totals AS (SELECT *, {running} FROM unit_days
                   WINDOW w AS (PARTITION BY key ORDER BY day ROWS UNBOUNDED PRECEDING)),
        valued AS (SELECT arm, day, day - (first // {DAY_US} - {tables.day0}) AS since, {", ".join(values)} FROM totals)
        SELECT day, since, arm, {", ".join(f"sum({one})::DOUBLE" for one in sums)}
        FROM valued GROUP BY GROUPING SETS ((day, arm), (since, arm))"""
    rows = [row for _ in slices(tables.db, tables.n_unit_days) for row in tables.db.execute(query).fetchall()]
    n_arms = len(tables.plan.arms)
    answer = [DailySums() for _ in handles]
    for day, since, arm, *numbers in rows:
        for i, one in enumerate(answer):
            target, key = (one.by_day, day) if day is not None else (one.by_offset, since)
            running_sums, alone = target.setdefault(
                int(key), (np.zeros((n_arms, _COLUMNS)), np.zeros((n_arms, _COLUMNS)))
            )
            start = i * 2 * _COLUMNS
            running_sums[arm] += numbers[start : start + _COLUMNS]
            alone[arm] += numbers[start + _COLUMNS : start + 2 * _COLUMNS]
    return answer


def _value(handle: Handle, total: str) -> str:
    """A unit's value of the metric, given its running total."""
    if handle.metric.is_share:
        return f"({total} > 0)::INTEGER"
    if handle.cap:
        return f"greatest(least({total}, {handle.cap[1]!r}), {handle.cap[0]!r})"
    return f"({total})"


def _estimate(handle: Handle, n: int, sums: FloatArray) -> Estimate:
    """Mean or ratio from n and the sums of y, y^2, d, d^2 and y d."""
    if n < 2:
        return Estimate(value=math.nan, variance=math.nan, n=n)
    y, yy, d, dd, yd = (float(v) for v in sums)
    var_y = max(yy - y * y / n, 0.0) / (n - 1)
    if not handle.is_ratio:
        return mean_estimate(Moments(n=n, mean=y / n, var=var_y))
    var_d = max(dd - d * d / n, 0.0) / (n - 1)
    pair = PairMoments(n=n, mean_y=y / n, mean_x=d / n, var_y=var_y, var_x=var_d, cov=(yd - y * d / n) / (n - 1))
    return ratio_estimate(pair)


def segments(tables: UnitTables, handle: Handle, analysis: Analysis, attributes: Sequence[str]) -> list[SegmentResult]:
    """Effects within the values of user attributes, judged by the deciding rule, corrected by Holm over all of them."""
    found = []
    for attribute in attributes:
        cells = tables.moments(expressions_of(handle), until_first=handle.until_first, by=f"segment_{attribute}")
        for label, moments in cells.items():
            if label is None:
                continue
            estimates = [estimate_of(handle, m) for m in moments]
            for arm in range(1, len(tables.plan.arms)):
                base = relative_lift(estimates[0], estimates[arm], alpha=analysis.alpha)
                n_units = estimates[0].n + estimates[arm].n
                sequential = always_valid(
                    base, n_units=n_units, alpha=analysis.alpha, tuning_units=analysis.tuning_units
                )
                effect = decide_effect(base, sequential, analysis, n_units=n_units, n_all=tables.n_units)
                found.append((attribute, label, tables.plan.arms[arm], n_units, effect))
    corrected = adjust([effect.p_value for *_, effect in found], "holm")
    return [
        SegmentResult(attribute=attribute, label=label, arm=arm, n_units=n, effect=effect, p_adjusted=p)
        for (attribute, label, arm, n, effect), p in zip(found, corrected, strict=True)
    ]


def segment_tables(tables: UnitTables, events: Path, attributes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Make segment_NAME(key, label) of each user attribute, as known at the first exposure; and what could not be made.

    Numbers with many values are cut at their quartiles, texts keep their most frequent values.
    """
    if not attributes:
        return [], []
    if tables.plan.unit_kind != "user" or not any((events / "users").glob("*.parquet")):
        return [], [f"no segments: units are of kind {tables.plan.unit_kind}, or there is no users table"]
    source = f"read_parquet({quote(str(events / 'users' / '*.parquet'))}, union_by_name = true)"
    known = {row[0]: row[1] for row in tables.db.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()}
    made, complaints = [], []
    for attribute in attributes:
        if attribute not in known or attribute in ("user_id", "event_timestamp", "created"):
            complaints.append(f"no segment {attribute!r}: the users table has {', '.join(sorted(known))}")
            continue
        tables.db.execute(f"""
            CREATE OR REPLACE TEMP TABLE attribute_now AS
            SELECT u.key, a."{attribute}" AS value FROM units u
            ASOF LEFT JOIN (SELECT user_id, epoch_us(event_timestamp) AS since, "{attribute}" FROM {source}) a
              ON u.key = a.user_id AND u.first >= a.since""")
        row = tables.db.execute("SELECT count(DISTINCT value) FROM attribute_now").fetchone()
        assert row is not None
        numeric = known[attribute] in ("BIGINT", "INTEGER", "SMALLINT", "TINYINT", "DOUBLE", "FLOAT")
        label = "coalesce(value::VARCHAR, 'unknown')"
        if numeric and row[0] > MAX_SEGMENTS:
            cuts = tables.db.execute("SELECT quantile_disc(value, [0.25, 0.5, 0.75]) FROM attribute_now").fetchone()
            assert cuts is not None
            a, b, c = cuts[0]
            label = (
                f"CASE WHEN value IS NULL THEN 'unknown' WHEN value <= {a} THEN 'up to {a}' "
                f"WHEN value <= {b} THEN 'up to {b}' WHEN value <= {c} THEN 'up to {c}' ELSE 'above {c}' END"
            )
        elif row[0] > MAX_SEGMENTS:
            top = tables.db.execute(
                "SELECT value::VARCHAR FROM attribute_now WHERE value IS NOT NULL "
                f"GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT {MAX_SEGMENTS}"
            ).fetchall()
            names = ", ".join(quote(name) for (name,) in top)
            label = (
                f"CASE WHEN value IS NULL THEN 'unknown' WHEN value::VARCHAR IN ({names}) "
                "THEN value::VARCHAR ELSE 'other' END"
            )
        tables.db.execute(
            f'CREATE OR REPLACE TEMP TABLE "segment_{attribute}" AS SELECT key, {label} AS label FROM attribute_now'
        )
        made.append(attribute)
    tables.db.execute("DROP TABLE IF EXISTS attribute_now")
    return made, complaints


def other_experiments(tables: UnitTables) -> list[tuple[str, str, str]]:
    """Make other_N(key, label) per experiment of another layer and the same unit kind: (table, experiment, layer).

    Bandits are left out: they move units between arms, so that those seen in one arm only are no random part.
    """
    plan = tables.plan
    key = "TRY_CAST(unit AS BIGINT)" if plan.unit_kind == "user" else "unit"
    others = tables.db.execute(f"""
        SELECT experiment, layer FROM exposures
        WHERE unit_kind = {quote(plan.unit_kind)} AND layer <> {quote(plan.layer)}
          AND experiment <> {quote(plan.experiment)}
        GROUP BY 1, 2 HAVING count(propensity) = 0 ORDER BY 1""").fetchall()
    made = []
    for i, (experiment, layer) in enumerate(others):
        tables.events.keep(
            f"other_{i}",
            f"""
            SELECT e.key, min(arm) AS label FROM (
                SELECT {key} AS key, arm FROM exposures
                WHERE experiment = {quote(experiment)} AND unit_kind = {quote(plan.unit_kind)} AND NOT forced) e
            WHERE e.key IN (SELECT key FROM units) GROUP BY e.key HAVING min(arm) = max(arm)""",
        )
        made.append((f"other_{i}", experiment, layer))
    return made


def interactions(tables: UnitTables, handle: Handle, others: Sequence[tuple[str, str, str]]) -> list[LayerInteraction]:
    """Test per other experiment that its arms leave this experiment's effect as it is; Holm over the experiments."""
    found = []
    for table, experiment, layer in others:
        cells = tables.moments(expressions_of(handle), until_first=handle.until_first, by=table)
        labels = [label for label in cells if label is not None]
        grid = [[estimate_of(handle, cells[label][arm]) for label in labels] for arm in range(len(tables.plan.arms))]
        if len(labels) < 2 or min((cell.n for row in grid for cell in row), default=0) < MIN_CELL:
            continue
        n_units = sum(cell.n for row in grid for cell in row)
        found.append((experiment, layer, n_units, interaction(grid)))
    corrected = adjust([result.p_value for *_, result in found], "holm")
    return [
        LayerInteraction(experiment=experiment, layer=layer, n_units=n, result=result, p_adjusted=p)
        for (experiment, layer, n, result), p in zip(found, corrected, strict=True)
    ]


def aa_splits(
    tables: UnitTables,
    handle: Handle,
    analysis: Analysis,
    *,
    n_splits: int = 500,
    max_units: int = 200_000,
    seed: int = 0,
) -> AACheck:
    """Split the control arm at random `n_splits` times and compare the halves as the report would.

    Where the share of p-values below alpha is off, the metric's variance is: its unit is not the unit of the split,
    or a few units carry it all. At most `max_units` active units are drawn.
    """
    n_control = tables.arm_counts(handle.until_first)[0]
    expressions = expressions_of(handle)
    where = "arm = 0" + ("" if handle.until_first is None else f" AND first <= {handle.until_first}")
    columns = ", ".join(f"({e})::DOUBLE AS x{i}" for i, e in enumerate(expressions))
    table = tables.db.execute(f"""
        SELECT {columns} FROM (
            SELECT * FROM active WHERE {where} ORDER BY hash(key), key LIMIT {max_units})""").to_arrow_table()
    row = tables.db.execute(f"SELECT count(*) FROM active WHERE {where}").fetchone()
    assert row is not None
    values = np.zeros((table.num_rows, len(expressions)))
    for i, column in enumerate(table.columns):
        values[:, i] = column.to_numpy()
    n_zero = n_control - row[0]
    if row[0] > len(values):
        n_zero = round(n_zero * len(values) / row[0])
    rng = np.random.default_rng(seed)
    p_values = []
    for _ in range(n_splits):
        left = rng.random(len(values)) < 0.5
        zeros = int(rng.binomial(n_zero, 0.5))
        halves = [_padded(values[left], zeros), _padded(values[~left], n_zero - zeros)]
        if handle.is_ratio and len(expressions) == 4:
            estimates: Sequence[Estimate] = cuped_ratios(halves).estimates
        elif handle.is_ratio:
            estimates = [ratio_estimate(half.pair(0, 1)) for half in halves]
        elif len(expressions) == 2:
            estimates = cuped_means([half.pair(0, 1) for half in halves]).estimates
        else:
            estimates = [mean_estimate(half.one(0)) for half in halves]
        p_values.append(difference(estimates[0], estimates[1], alpha=analysis.alpha).p_value)
    return aa_check(p_values, alpha=analysis.alpha)


def _padded(values: FloatArray, n_zero: int) -> VectorMoments:
    """Moments of the rows and of n_zero rows of zeros."""
    m, k = values.shape
    n = m + n_zero
    if n < 2 or m == 0:
        return VectorMoments(n=n, mean=np.zeros(k), cov=np.zeros((k, k)))
    sums, products = values.sum(axis=0), values.T @ values
    mean = sums / n
    return VectorMoments(n=n, mean=mean, cov=(products - n * np.outer(mean, mean)) / (n - 1))


def _date(tables: UnitTables, day: int) -> str:
    return f"{datetime.fromtimestamp(0, tz=UTC) + timedelta(days=tables.day0 + day):%Y-%m-%d}"
