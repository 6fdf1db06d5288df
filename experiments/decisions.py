"""A bandit's decisions from the event log: which arm, with which chance, in which context, and what it earned.

One row per request and unit, the first if a request was logged twice. A decision earns 1 if an event of the bandit's
reward type names its request, else 0.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import duckdb
import pyarrow as pa

from experiments.report_events import define_view, event_schema, micros, quote, readable
from experiments.spec import Experiment

_SLICE_ROWS = 2_000_000
"""Exposures grouped and joined at a time, by a hash of their request: what DuckDB does in some 500 MB."""
_FORGOTTEN = 30
"""Half-lives after which a decision, then weighing a billionth, is not read any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecisionCounts:
    """Decisions, and exposures of the experiment that are none: of testers, of a fixed split, unusable."""

    decisions: int
    newest_us: int | None  # microseconds since 1970
    forced: int
    fixed_split: int
    unusable: int  # an arm that is not configured, or a propensity that is not within (0, 1]


@contextmanager
def decision_tables(
    events: Path,
    experiment: Experiment,
    until: datetime,
    *,
    since: datetime | None = None,
    tail: Mapping[str, pa.Table] | None = None,
    memory: str = "1000MB",
    threads: int = 2,
) -> Iterator[tuple[duckdb.DuckDBPyConnection, DecisionCounts]]:
    """A connection with the view `decisions`: unit, arm, propensity, context, ts (us), reward DOUBLE, weight DECIMAL.

    weight: by half-life, against the newest decision; of a bandit by unit, all of a unit's decisions on one arm count
    together as its newest one. Sums of weights are exact, so that the order of rows does not matter.
    since, until: aware; decisions from `since` on, up to `wait` before `until`, and what was earned before `until`.
    tail: exposures and feedback that are not in the event tables yet (`unrolled`); rows that are in both count once.
    Raises DataError for event tables that cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="plait-decisions-") as scratch, duckdb.connect() as db:
        db.execute(f"SET memory_limit = '{memory}'; SET threads = {threads}; SET preserve_insertion_order = false")
        db.execute(f"SET TimeZone = 'UTC'; SET temp_directory = {quote(scratch)}")
        with readable(events):
            for table in ("exposures", "feedback"):
                define_view(db, events, table)
                db.register("arrow", (tail or {}).get(table, event_schema(table).empty_table()))
                # A table of DuckDB's own: a join may push filters into a scan that Arrow tables cannot take.
                db.execute(f"CREATE TEMP TABLE {table}_tail AS SELECT * FROM arrow")
                db.unregister("arrow")
            yield db, _build(db, experiment, since, until)


def _build(
    db: duckdb.DuckDBPyConnection, experiment: Experiment, since: datetime | None, until: datetime
) -> DecisionCounts:
    bandit = experiment.bandit
    assert bandit is not None, "only bandits decide"
    last, half_life_us = micros(until - bandit.wait), 0
    window = f"experiment = {quote(experiment.name)} AND timestamp <= make_timestamptz({last})"
    if since is not None:
        window += f" AND timestamp >= make_timestamptz({micros(since)})"
    if bandit.half_life is not None:
        half_life_us = bandit.half_life // timedelta(microseconds=1)
        window += f" AND timestamp > make_timestamptz({last - _FORGOTTEN * half_life_us})"
    exposures, feedback = (
        f"(SELECT {columns} FROM {table} UNION ALL SELECT {columns} FROM {table}_tail)"
        for table, columns in (
            ("exposures", "experiment, timestamp, request_id, unit, arm, propensity, context, forced"),
            ("feedback", "type, timestamp, request_id"),
        )
    )
    arms = ", ".join(quote(arm.name) for arm in experiment.arms)
    usable = f"arm IN ({arms}) AND propensity > 0 AND propensity <= 1 AND unit IS NOT NULL AND request_id IS NOT NULL"
    drawn = "NOT coalesce(forced, false) AND propensity IS NOT NULL"
    counted = db.execute(f"""
        SELECT count(*), count(*) FILTER (coalesce(forced, false)),
               count(*) FILTER (NOT coalesce(forced, false) AND propensity IS NULL),
               count(*) FILTER ({drawn} AND NOT coalesce({usable}, false))
        FROM {exposures} WHERE {window}""").fetchone()
    assert counted is not None
    n_exposures, n_forced, n_split, n_unusable = counted
    n_slices = max(-(-n_exposures // _SLICE_ROWS), 1)
    db.execute("""
        CREATE TEMP TABLE chosen (
            unit VARCHAR, arm VARCHAR, propensity DOUBLE, context VARCHAR, ts BIGINT, reward DOUBLE)""")
    for i in range(n_slices):
        mine = f"hash(request_id) % {n_slices} = {i}"
        db.execute(f"""
        INSERT INTO chosen
        WITH first AS (
            SELECT request_id, unit,
                   arg_min({{'arm': arm, 'propensity': propensity, 'context': context, 'ts': epoch_us(timestamp)}},
                           (timestamp, arm, propensity)) AS f
            FROM {exposures} WHERE {window} AND {drawn} AND {usable} AND {mine} GROUP BY 1, 2),
        paid AS (
            SELECT DISTINCT request_id FROM {feedback}
            WHERE type = {quote(bandit.reward)} AND request_id IS NOT NULL AND {mine}
              AND timestamp < make_timestamptz({micros(until)}))
        SELECT unit, f.arm AS arm, f.propensity AS propensity, f.context AS context, f.ts AS ts,
               (paid.request_id IS NOT NULL)::DOUBLE AS reward
        FROM first LEFT JOIN paid USING (request_id)""")
    row = db.execute("SELECT count(*), max(ts) FROM chosen").fetchone()
    assert row is not None
    n, newest = row
    age = f"0.5 ** (({newest or 0} - ts) / {half_life_us}::DOUBLE)" if half_life_us else "1"
    together = "PARTITION BY unit, arm"
    weight = (
        "aged"
        if bandit.by_request
        else f"aged::DOUBLE * (max(aged) OVER ({together}))::DOUBLE / (sum(aged) OVER ({together}))::DOUBLE"
    )
    db.execute(f"""
        CREATE TEMP VIEW decisions AS
        SELECT * EXCLUDE aged, ({weight})::DECIMAL(18, 12) AS weight
        FROM (SELECT *, ({age})::DECIMAL(18, 12) AS aged FROM chosen)""")
    return DecisionCounts(decisions=n, newest_us=newest, forced=n_forced, fixed_split=n_split, unusable=n_unusable)
