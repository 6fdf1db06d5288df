"""From the event log to unit-level sufficient statistics, out of core.

The queries over the events run where report_events says; they are written in the SQL that DuckDB and Spark share.
Units that did nothing have no row: they are counted, and joined to the moments of those that did something by Chan,
Golub and LeVeque's formula, so that memory follows the number of active units. Times are microseconds since 1970.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from experiments.metrics import IMPRESSION, Column, Metric
from experiments.report_events import DAY_US, Events, create_by_slices, micros, quote
from experiments.report_plan import Plan
from experiments.stats.moments import VectorMoments


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitCounts:
    """Who is analysed, and who is not and why."""

    n_exposures: int
    units: dict[str, int]  # analysed, per arm
    by_version: dict[int | None, int]
    n_forced_units: int
    n_crossed_units: int  # seen in more than one arm
    n_bad_ids: int  # exposures whose unit is not an integer though the unit kind is user
    n_unknown_arm: int  # exposures of an arm the plan does not hold
    n_counterfactual: int
    first: datetime | None
    last: datetime | None


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitColumn:
    """A unit-level column by name: a declared column after exposure, or before it (`days` back) as a covariate."""

    name: str
    column: Column
    before_days: float | None = None


class UnitTables:
    """The temporary tables of one report: units, their daily and total columns."""

    def __init__(
        self, events: Events, plan: Plan, *, since: datetime | None, until: datetime, triggered: bool = False
    ) -> None:
        self.plan, self.since, self.until, self.triggered = plan, since, until, triggered
        self._until = micros(until)
        self.columns: list[UnitColumn] = []
        self.events, self.db = events, events.db
        self.counts = self._build_units()

    # -- units -----------------------------------------------------------------------------------------------------

    def _build_units(self) -> UnitCounts:
        plan, db = self.plan, self.db
        index = " ".join(f"WHEN {quote(arm)} THEN {1 << i}" for i, arm in enumerate(plan.arms))
        key = "TRY_CAST(unit AS BIGINT)" if plan.unit_kind == "user" else "unit"
        window = f"timestamp < make_timestamptz({self._until})"
        if self.since:
            window += f" AND timestamp >= make_timestamptz({micros(self.since)})"
        # What came before the first exposure that could have been another one cannot be an effect.
        entry = " FILTER (WHERE coalesce(counterfactual, false))" if self.triggered else ""
        self.events.keep(
            "seen",
            f"""
            SELECT {key} AS key,
                   bit_or(CAST(CASE WHEN coalesce(forced, false) THEN 0 ELSE CASE arm {index} ELSE 0 END END AS BIGINT))
                       AS arms,
                   bool_or(coalesce(forced, false)) AS forced,
                   bool_or(coalesce(counterfactual, false)) AS counterfactual,
                   epoch_us(min(timestamp){entry}) AS first,
                   min(config_version) AS version,
                   CAST(count(*) AS INTEGER) AS n,
                   CAST(count(*) FILTER (WHERE arm NOT IN ({", ".join(map(quote, plan.arms))})) AS INTEGER) AS n_unknown
            FROM exposures
            WHERE experiment = {quote(plan.experiment)} AND unit_kind = {quote(plan.unit_kind)} AND {window}
            GROUP BY 1""",
        )
        picked = "key IS NOT NULL AND NOT forced AND bit_count(arms) = 1"
        picked += " AND counterfactual" if self.triggered else ""
        totals = db.execute(f"""
            SELECT coalesce(sum(n), 0)::BIGINT, count(*) FILTER (key IS NOT NULL AND forced),
                   count(*) FILTER (key IS NOT NULL AND NOT forced AND bit_count(arms) > 1),
                   coalesce(sum(n) FILTER (key IS NULL), 0)::BIGINT, coalesce(sum(n_unknown), 0)::BIGINT,
                   min(first) FILTER ({picked}), max(first) FILTER ({picked}),
                   count(*) FILTER (counterfactual)
            FROM seen""").fetchone()
        assert totals is not None
        arm = " ".join(f"WHEN {1 << i} THEN {i}" for i in range(len(plan.arms)))
        self.events.keep(
            "units",
            f"SELECT key, CAST(CASE arms {arm} END AS TINYINT) AS arm, first, version FROM seen WHERE {picked}",
        )
        self.events.drop("seen")
        rows = db.execute("SELECT arm, count(*) FROM units GROUP BY 1").fetchall()
        found = {plan.arms[i]: n for i, n in rows}
        versions = dict(db.execute("SELECT version, count(*) FROM units GROUP BY 1").fetchall())
        self._first = totals[5] if totals[5] is not None else self._until
        self.day0 = self._first // DAY_US
        return UnitCounts(
            n_exposures=totals[0],
            units={name: found.get(name, 0) for name in plan.arms},
            by_version=versions,
            n_forced_units=totals[1],
            n_crossed_units=totals[2],
            n_bad_ids=totals[3],
            n_unknown_arm=totals[4],
            n_counterfactual=totals[7],
            first=_moment(totals[5]),
            last=_moment(totals[6]),
        )

    @property
    def n_units(self) -> int:
        return sum(self.counts.units.values())

    def arm_counts(self, until_first: int | None = None) -> list[int]:
        """Units per arm, in the plan's order; only those first exposed by `until_first`."""
        where = "" if until_first is None else f"WHERE first <= {until_first}"
        rows = dict(self.db.execute(f"SELECT arm, count(*) FROM units {where} GROUP BY 1").fetchall())
        return [rows.get(i, 0) for i in range(len(self.plan.arms))]

    # -- columns ---------------------------------------------------------------------------------------------------

    def want(self, column: Column, *, before_days: float | None = None) -> str:
        """Name of the unit-level column; equal requests share one."""
        for known in self.columns:
            if known.column == column and known.before_days == before_days:
                return known.name
        name = f"c{len(self.columns)}"
        self.columns.append(UnitColumn(name=name, column=column, before_days=before_days))
        return name

    def build_columns(self, rankings: Sequence[tuple[str, str, Metric]] = ()) -> None:
        """Aggregate the wanted columns per unit and day, then per unit. rankings: (sum, count column, metric)."""
        parts = []
        for source in ("feedback", IMPRESSION):
            columns = [column for column in self.columns if column.column.source == source]
            if columns:
                parts.append(self._aggregate(source, columns))
        parts += [self._aggregate_ranking(*ranking) for ranking in rankings]
        names = [column.name for column in self.columns] + [
            name for total, count, _ in rankings for name in (total, count)
        ]
        self.db.execute(f"CREATE TEMP VIEW daily AS {' UNION ALL BY NAME '.join(parts)}" if parts else EMPTY_DAILY)
        sums = "".join(f", coalesce(sum({name}), 0)::DOUBLE AS {name}" for name in names)
        query = f"SELECT key, arm, first{sums} FROM daily WHERE in_slice(key) GROUP BY ALL"
        create_by_slices(self.db, "active", query, self.n_unit_days)

    @property
    def n_unit_days(self) -> int:
        """Rows of `daily`."""
        return self._count("daily")

    def _count(self, table: str) -> int:
        row = self.db.execute(f"SELECT count(*) FROM {table}").fetchone()
        assert row is not None
        return int(row[0])

    def add_covariate(self, name: str, values: pa.Table) -> None:
        """Join a covariate computed elsewhere: `values` holds key and value, one row a unit; missing ones are 0."""
        self.db.register("covariate_values", values)
        self.db.execute(f"""
            CREATE OR REPLACE TEMP TABLE active AS
            SELECT u.key, u.arm, u.first, a.* EXCLUDE (key, arm, first), coalesce(v.value, 0)::DOUBLE AS {name}
            FROM units u LEFT JOIN active a USING (key) LEFT JOIN covariate_values v USING (key)""")
        present = [row[0] for row in self.db.execute("DESCRIBE active").fetchall()][3:]
        fixed = ", ".join(f"coalesce({column}, 0) AS {column}" for column in present)
        self.db.execute(f"CREATE OR REPLACE TEMP TABLE active AS SELECT key, arm, first, {fixed} FROM active")
        self.db.unregister("covariate_values")

    def _events(self, source: str) -> str:
        """A query of (key, ts, …) of one event table, limited to the units' ids and the time that matters."""
        table = "impressions" if source == IMPRESSION else "feedback"
        extra = "scene, position, score, model, model_version" if source == IMPRESSION else "type, value"
        back = max((c.before_days or 0 for c in self.columns), default=0) * DAY_US
        window = (
            f"timestamp >= make_timestamptz({int(self._first - back)}) AND timestamp < make_timestamptz({self._until})"
        )
        base = f"epoch_us(timestamp) AS ts, request_id, item_id, {extra} FROM {table}"
        if self.plan.unit_kind == "user":
            return f"SELECT user_id AS key, {base} WHERE user_id IS NOT NULL AND {window}"
        if self.plan.unit_kind == "request":
            return f"SELECT request_id AS key, {base} WHERE request_id IS NOT NULL AND {window}"
        # What carries no id of this kind belongs to the unit whose request it names, as shown or as exposed.
        own = f"{self.plan.unit_kind}_id" if self.plan.unit_kind in ("session", "device") else "CAST(NULL AS STRING)"
        return f"""SELECT coalesce(e.own, r.unit) AS key, e.*
                   FROM (SELECT {own} AS own, {base} WHERE {window}) e
                   LEFT JOIN (SELECT request_id, min(unit) AS unit FROM (
                                  SELECT request_id, unit FROM exposures WHERE unit_kind = {quote(self.plan.unit_kind)}
                                  UNION ALL SELECT request_id, {own} AS unit FROM impressions)
                              WHERE unit IS NOT NULL GROUP BY request_id) r
                     ON e.request_id = r.request_id
                   WHERE coalesce(e.own, r.unit) IS NOT NULL"""

    def _aggregate(self, source: str, columns: Sequence[UnitColumn]) -> str:
        conditions = [self._condition(column) for column in columns]
        values = ", ".join(
            f"{_aggregate_sql(column.column)} FILTER (WHERE {condition}) AS {column.name}"
            for column, condition in zip(columns, conditions, strict=True)
        )
        name = f"daily_{source}"
        self.events.keep(
            name,
            f"""
            SELECT u.key, u.arm, u.first,
                   CAST(CASE WHEN ts < u.first THEN -1 ELSE day_of(ts) - {self.day0} END AS INTEGER) AS day, {values}
            FROM ({self._events(source)}) e JOIN units u ON e.key = u.key
            WHERE in_slice(e.key) AND in_slice(u.key) AND ({" OR ".join(f"({test})" for test in conditions)})
            GROUP BY 1, 2, 3, 4""",
            n_rows=max(self.n_units, self._count("feedback" if source == "feedback" else "impressions")),
        )
        return f"SELECT * FROM {name}"

    def _condition(self, wanted: UnitColumn) -> str:
        column = wanted.column
        tests = [condition.sql() for condition in column.where]
        if column.source == "feedback" and column.event is not None:
            tests.append(f"type = {quote(column.event)}")
        if column.aggregate == "sum":
            tests.append("isfinite(value)")
        if wanted.before_days is not None:
            tests += ["ts < u.first", f"ts >= u.first - {int(wanted.before_days * DAY_US)}"]
        else:
            tests.append(f"ts >= u.first + {_span(column.start)}")
            if column.end is not None:
                tests.append(f"ts < u.first + {_span(column.end)}")
        return " AND ".join(tests)

    def _aggregate_ranking(self, total: str, count: str, metric: Metric) -> str:
        """Per unit and day: the measure summed over requests, and the number of requests.

        Items are ranked by position, ties by item; the ideal order is that of the gains. NDCG has gain / log2(rank + 1)
        (Järvelin and Kekäläinen, TOIS 20(4), 2002); a request without any gain counts as 0 in every measure.
        """
        assert metric.ranking is not None
        ranking, k = metric.ranking, metric.ranking.k
        gain = " ".join(f"WHEN {quote(event)} THEN {value!r}" for event, value in ranking.gains)
        types = ", ".join(quote(event) for event, _ in ranking.gains)
        late = "" if metric.window is None else f"AND ts < u.first + {_span(metric.window)}"
        measures = {
            "ndcg": f"""CASE WHEN sum(gain / log2(ideal + 1)) FILTER (WHERE ideal <= {k}) > 0
                        THEN coalesce(sum(gain / log2(rank + 1)) FILTER (WHERE rank <= {k}), 0)
                             / sum(gain / log2(ideal + 1)) FILTER (WHERE ideal <= {k}) ELSE 0 END""",
            "mrr": f"coalesce(1 / CAST(min(rank) FILTER (WHERE gain > 0 AND rank <= {k}) AS DOUBLE), 0)",
            "precision": f"count(*) FILTER (WHERE gain > 0 AND rank <= {k}) / {k}",
            "recall": f"""coalesce(count(*) FILTER (WHERE gain > 0 AND rank <= {k})
                                   / nullif(count(*) FILTER (WHERE gain > 0), 0), 0)""",
            "hit_rate": f"CAST(count(*) FILTER (WHERE gain > 0 AND rank <= {k}) > 0 AS INTEGER)",
        }
        name = f"daily_{total}"
        self.events.keep(
            name,
            f"""
            WITH shown AS (
                SELECT u.key, u.arm, u.first, request_id, item_id, min(position) AS position, min(ts) AS ts
                FROM ({self._events(IMPRESSION)}) e JOIN units u ON e.key = u.key
                WHERE in_slice(e.key) AND in_slice(u.key) AND ts >= u.first {late} GROUP BY ALL),
            judged AS (
                SELECT request_id, item_id, max(CASE type {gain} END) AS gain FROM feedback
                WHERE type IN ({types}) AND timestamp < make_timestamptz({self._until}) GROUP BY ALL),
            ranked AS (
                SELECT s.*, CAST(coalesce(gain, 0) AS DOUBLE) AS gain,
                       row_number() OVER (PARTITION BY key, request_id ORDER BY position, item_id) AS rank,
                       row_number() OVER (PARTITION BY key, request_id ORDER BY coalesce(gain, 0) DESC) AS ideal
                FROM shown s LEFT JOIN judged USING (request_id, item_id)),
            requests AS (
                SELECT key, arm, first, request_id, min(ts) AS ts, {measures[ranking.measure]} AS measure
                FROM ranked GROUP BY 1, 2, 3, 4)
            SELECT key, arm, first, CAST(day_of(ts) - {self.day0} AS INTEGER) AS day,
                   sum(measure) AS {total}, count(*) AS {count}
            FROM requests GROUP BY 1, 2, 3, 4""",
            n_rows=max(self.n_units, self._count("impressions")),
        )
        return f"SELECT * FROM {name}"

    # -- statistics ------------------------------------------------------------------------------------------------

    def moments(
        self,
        expressions: Sequence[str],
        *,
        until_first: int | None = None,
        by: str | None = None,
        source: str = "active",
    ) -> dict[Any, list[VectorMoments]]:
        """Per label of `by` (None: one, with key None) and per arm: mean and covariance of the expressions over units.

        by: the name of a table (key, label); units without a row in it are left out.
        """
        k = len(expressions)
        columns = ", ".join(f"({expression})::DOUBLE AS x{i}" for i, expression in enumerate(expressions))
        means = ", ".join(f"avg(x{i})" for i in range(k))
        pairs = [(i, j) for i in range(k) for j in range(i, k)]
        covariances = ", ".join(f"covar_samp(x{i}, x{j})" for i, j in pairs)
        label, join = ("s.label", f"JOIN {by} s USING (key)") if by else ("NULL", "")
        where = "" if until_first is None else f"WHERE first <= {until_first}"
        counted = self.db.execute(f"SELECT {label}, arm, count(*) FROM units {join} {where} GROUP BY 1, 2").fetchall()
        zeros = {(row[0], row[1]): row[2] for row in counted}
        rows = self.db.execute(f"""
            SELECT label, arm, count(*), {means}, {covariances}
            FROM (SELECT {label} AS label, arm, {columns} FROM {source} {join} {where}) GROUP BY 1, 2""").fetchall()
        active = {(row[0], row[1]): row[2:] for row in rows}
        answer: dict[Any, list[VectorMoments]] = {}
        for name in sorted({label for label, _ in zeros}, key=str) or [None]:
            answer[name] = []
            for arm in range(len(self.plan.arms)):
                row = active.get((name, arm))
                answer[name].append(_with_zeros(zeros.get((name, arm), 0), row, k, pairs))
        return answer

    def quantile(self, expression: str, q: float, *, arm: int | None = None, until_first: int | None = None) -> float:
        """The q-quantile of a unit's value over all units (of one arm), those without a row being 0; nan for none."""
        tests = ([f"arm = {arm}"] if arm is not None else []) + (
            [f"first <= {until_first}"] if until_first is not None else []
        )
        where = f"WHERE {' AND '.join(tests)}" if tests else ""
        row = self.db.execute(f"SELECT count(*) FROM units {where}").fetchone()
        assert row is not None
        n = row[0]
        if n == 0:
            return math.nan
        view = f"(SELECT ({expression})::DOUBLE AS x FROM active {where})"
        row = self.db.execute(f"SELECT count(*) FILTER (x < 0), count(*) FILTER (x > 0) FROM {view}").fetchone()
        assert row is not None
        n_below, n_above = row
        n_zero = n - n_below - n_above
        position = q * (n - 1)

        def value_at(rank: int) -> float:
            if rank < n_below:
                sign, index, count = "<", rank, n_below
            elif rank < n_below + n_zero:
                return 0.0
            else:
                sign, index, count = ">", rank - n_below - n_zero, n_above
            level = index / (count - 1) if count > 1 else 0.0
            found = self.db.execute(f"SELECT quantile_cont(x, {level!r}) FROM {view} WHERE x {sign} 0").fetchone()
            assert found is not None
            return float(found[0])

        low = math.floor(position)
        lower = value_at(low)
        upper = value_at(low + 1) if position > low else lower
        return lower + (upper - lower) * (position - low)

    def complaints(self) -> list[str]:
        """Values of the summed events that are not finite, and so were left out."""
        types = sorted({c.column.event for c in self.columns if c.column.aggregate == "sum" and c.column.event})
        if not types:
            return []
        rows = self.db.execute(f"""
            SELECT type, count(*) FROM feedback
            WHERE type IN ({", ".join(map(quote, types))}) AND NOT isfinite(value)
              AND timestamp < make_timestamptz({self._until})
            GROUP BY 1 ORDER BY 1""").fetchall()
        return [f"{n:,} {kind} values are not finite and are left out" for kind, n in rows]

    def event_values(self, name: str, column: Column) -> None:
        """A table (key, arm, value) of single finite events within the column's window."""
        condition = self._condition(UnitColumn(name="", column=replace(column, aggregate="sum")))
        self.events.keep(
            name,
            f"""SELECT u.key, u.arm, value FROM ({self._events(column.source)}) e JOIN units u ON e.key = u.key
                WHERE {condition}""",
        )

    def buckets(self, numerator: str, denominator: str, *, until_first: int | None = None, n: int = 2048) -> pa.Table:
        """Sums over `n` random groups of units: arm, bucket, numerator, denominator (units where it is "1")."""
        where = "" if until_first is None else f"WHERE first <= {until_first}"
        below = "n_units" if denominator == "1" else "coalesce(d, 0)"
        return self.db.execute(f"""
            WITH u AS (SELECT arm, hash(key) % {n} AS bucket, count(*) AS n_units FROM units {where} GROUP BY 1, 2),
            a AS (SELECT arm, hash(key) % {n} AS bucket, sum({numerator}) AS x, sum({denominator}) AS d
                  FROM active {where} GROUP BY 1, 2)
            SELECT arm, coalesce(x, 0)::DOUBLE AS numerator, ({below})::DOUBLE AS denominator
            FROM u LEFT JOIN a USING (arm, bucket) ORDER BY arm, bucket""").to_arrow_table()


EMPTY_DAILY = "CREATE TEMP VIEW daily AS SELECT key, arm, first, 0 AS day FROM units WHERE false"


def _with_zeros(n: int, row: Any, k: int, pairs: Iterable[tuple[int, int]]) -> VectorMoments:
    """Moments over n units of which those in `row` (count, means, covariances) are not zero.

    Source: Chan, Golub and LeVeque, "Algorithms for computing the sample variance", American Statistician 37(3), 1983.
    """
    mean, cov = np.zeros(k), np.zeros((k, k))
    if n == 0:
        return VectorMoments(n=0, mean=np.full(k, math.nan), cov=np.full((k, k), math.nan))
    m = row[0] if row else 0
    if m:
        active_mean = np.array(row[1 : 1 + k], dtype=np.float64)
        for (i, j), value in zip(pairs, row[1 + k :], strict=True):
            cov[i, j] = cov[j, i] = value or 0.0
        mean = active_mean * m / n
        scatter = (m - 1) * cov + np.outer(active_mean, active_mean) * (m * (n - m) / n)
        cov = scatter / (n - 1) if n > 1 else np.full((k, k), math.nan)
    elif n == 1:
        cov = np.full((k, k), math.nan)
    return VectorMoments(n=n, mean=mean, cov=cov)


def _aggregate_sql(column: Column) -> str:
    return "count(*)" if column.aggregate == "count" else "sum(value)"


def _span(span: timedelta) -> int:
    return span // timedelta(microseconds=1)


def _moment(us: int | None) -> datetime | None:
    return None if us is None else datetime.fromtimestamp(0, tz=UTC) + timedelta(microseconds=us)
